"""Hard-negative noise contrastive loss (HN-NCE) in both directions, and L_tcc (Eq. 2 of the VDG paper) made of it.

    s_ij = x_i . c_j / tau
    w_ij = n_i exp(beta s_ij) / sum_{k in neg(i)} exp(beta s_ik)            n_i negatives; mean weight 1
    L_i  = -log( e^{s_i+} / (alpha e^{s_i+} + sum_{j in neg(i)} w_ij e^{s_ij}) )

beta = 0, alpha = 1 is cross entropy. exp(1 / 0.01) overflows fp32, so everything stays in the log domain:

    N_i = LSE_neg beta s_ij     M_i = LSE_neg (1 + beta) s_ij     H_i = log n_i + M_i - N_i
    L_i = logaddexp(log alpha, H_i - s_i+)

(subtracting s_i+ inside keeps the digits of a small loss) and with h_i = exp(H_i - s_i+ - L_i), the share of the
negatives in the denominator,

    dL_i/ds_ij = h_i [(1 + beta) exp((1 + beta) s_ij - M_i) - beta exp(beta s_ij - N_i)]     dL_i/ds_i+ = -h_i

(the sum over a row is zero). With the weights w detached the bracket is exp((1 + beta) s_ij - M_i) alone. Columns are
the same with i and j exchanged. From G = dL/ds: dL/dx = G c / tau, dL/dc = G^T x / tau, and for nothing,
dL/dtau = -sum_ij G_ij s_ij / tau = -sum_j c_j . dL/dc_j / tau.

With the row's largest negative logit o_i, u = s_ij - o_i, S_i = sum_neg e^{(1 + beta) u}, T_i = sum_neg e^{beta u},

    H_i = log n_i + o_i + log S_i - log T_i     bracket = (1 + beta) e^{(1 + beta) u} / S_i - beta e^{beta u} / T_i

At beta = 1/2, the paper's, both powers come from t = e^{u/2}, as t^3 and t: one exponential for each direction.

L_tcc is the loss of the human batch B plus the loss of B + B'. The first's logits are a sub-block of the second's, so
one pass over the whole serves both: o, S and T are taken in two parts, over the human and over the other columns (or
rows), and merged; and a gradient inside the sub-block has one coefficient for both terms, with o1 <= o2:

    w1 e^{(1+beta) u1} / S1 + w2 e^{(1+beta) u2} / S2 = [w1 / S1 + w2 e^{(1+beta) (o1-o2)} / S2] e^{(1+beta) u1}

Forward and backward go through blocks of rows: no (N, M) array is kept, only vectors of length N and M. Across ranks
each has a strip of rows and every column: c is gathered once, the columns' (o, S, T) are all-reduced, dL/dc is
reduce-scattered.

(The HN-NCE that CoVR and the VDG release share differs for beta != 0: its row normaliser lands on the columns.)
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from kernels.similarity_topk import INTERPRET, full_precision, fullest_waves, processors, product

BLOCK = 1 << 21  # logits held at a time on CPU (8 MiB of fp32, five such arrays)
STRIP = 1 << 27  # logits held at a time by the Triton path where they are written (512 MiB of fp32)
FUSED_WIDTH = 256  # up to this D products of 16-bit inputs stay in registers
STRIP_TILES = 128  # tiles of rows whose partial sums of all columns are held at a time

# Tiles by compute capability: rows, columns, (depth,) warps, stages; "sums down": columns, rows, warps. Fixed, so that
# all ranks sum alike. [ours] 9.0: within 2 % of the fastest of bench/sweep.py on an H200 (but "sums" was timed at
# D = 768 alone, above what it serves now); 8.0 not measured.
TILES = {
    (8, 0): {
        "sums": (128, 128, 32, 8, 3),
        "sums along": (2, 1024, 4),  # of a written strip
        "sums down": (64, 32, 4),
        "flash": (64, 64, 8, 1),
        "strip": (16, 128, 4, 1),
    },
    (9, 0): {
        "sums": (256, 128, 64, 8, 3),
        "sums along": (2, 1024, 4),
        "sums down": (64, 32, 4),
        "flash": (128, 64, 8, 3),
        "strip": (16, 128, 4, 1),
    },
}
OTHER_TILES = {  # any other GPU, and the interpreter
    "sums": (32, 64, 32, 4, 2),
    "sums along": (2, 64, 4),
    "sums down": (32, 8, 4),
    "flash": (32, 32, 8, 1),
    "strip": (16, 64, 4, 1),
}

# ---- reference ----


def hn_nce_reference(x, c, positive, tau, alpha=1.0, beta=0.0, detach_weights=False):
    """The definition with the whole (N, M) matrix and autograd; same arguments and results as hn_nce."""
    s = x @ c.T / tau
    own = torch.nn.functional.one_hot(positive, len(c)).bool()  # (N, M)
    s_own = s[own]
    losses = []
    for dim, count in ((1, len(c) - own.sum(1)), (0, len(x) - own.sum(0))):
        weights = (beta * s).masked_fill(own, -torch.inf)
        weights = count.to(s.dtype).log().unsqueeze(dim) + weights - weights.logsumexp(dim, keepdim=True)
        weights = weights.detach() if detach_weights else weights
        hard = (weights + s).masked_fill(own, -torch.inf).logsumexp(dim)
        hard = torch.where(count > 0, hard, -torch.inf)
        hard = hard if dim == 1 else hard[positive]
        losses.append(torch.logaddexp(math.log(alpha) + s_own, hard) - s_own)
    return losses[0], losses[1]


# ---- PyTorch: blocks of rows ----
# Rows are [bank | x], columns are c. label (R,) is the column of each row's positive, -1 for the bank's rows. Rows
# below first_row and columns below first_column are the first group, whose sub-block is a loss of its own.


def _blocks(edges: list[int], columns: int, held: int) -> list[slice]:
    """Blocks of rows with at most `held` logits, none of which crosses an edge."""
    block = max(1, held // columns)
    spans = zip(edges, edges[1:], strict=False)
    return [slice(at, min(at + block, end)) for start, end in spans for at in range(start, end, block)]


def _scratch(like: Tensor, blocks: list[slice], columns: int, count: int) -> list[Tensor]:
    """Flat arrays that hold a block each, allocated once: fresh ones a block cost more in page faults than the sums."""
    rows = max((part.stop - part.start for part in blocks), default=0)
    return [like.new_empty(rows * columns) for _ in range(count)]


def _shaped(flat: Tensor, s: Tensor) -> Tensor:
    return flat[: s.numel()].view(s.shape)


def _powers(u: Tensor, beta: float, spare: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e^{(1 + beta) u} and e^{beta u}; u is overwritten. At beta = 0 nobody asks for the second (N = log n)."""
    if beta == 0:
        return u.exp_(), u
    if beta == 0.5:
        small = u.mul_(0.5).exp_()
        return torch.mul(small, small, out=spare).mul_(small), small
    big = torch.mul(u, 1 + beta, out=spare).exp_()
    return big, u.mul_(beta).exp_()


def _sums(s: Tensor, dim: int, beta: float, spare: list[Tensor]) -> Tensor:
    """o, S and T over dim, (3, the other dimension); where all of s is -inf: the smallest number, 0, 0."""
    top = s.amax(dim, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
    u, other = (_shaped(flat, s) for flat in spare)
    big, small = _powers(torch.sub(s, top, out=u), beta, other)
    return torch.stack([top.squeeze(dim), big.sum(dim), small.sum(dim)])


def _merge(parts: Tensor, beta: float) -> Tensor:
    """(P, 3, n): o, S and T of P parts -> those of the whole (3, n)."""
    top = parts[:, 0].amax(0)
    big, small = _powers(parts[:, 0] - top, beta)
    return torch.stack([top, (parts[:, 1] * big).sum(0), (parts[:, 2] * small).sum(0)])


def _statistics(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float):
    """o, S and T of the module's head over the negatives, of each row within either group of columns (2 groups, 3, R),
    and of each column within either group of rows (2 groups, 3, M)."""
    nothing = x.new_tensor([torch.finfo(x.dtype).min, 0, 0])[:, None]
    rows, columns = (nothing.expand(2, 3, n).clone() for n in (len(x), len(c)))
    blocks = _blocks([0, bank, first_row, len(x)], len(c), BLOCK)
    held, *spare = _scratch(x, blocks, len(c), 3)
    for part in blocks:
        s = held[: (part.stop - part.start) * len(c)].view(-1, len(c))
        torch.mm(x[part], c.T, out=s).mul_(scale)
        if part.start >= bank:
            s[torch.arange(len(s), device=s.device), label[part]] = -torch.inf
        row_group = int(part.start >= first_row)
        for group, cut in enumerate((slice(0, first_column), slice(first_column, len(c)))):
            if cut.start == cut.stop:
                continue
            if part.start >= bank:  # the bank's rows have no loss
                rows[group, :, part] = _sums(s[:, cut], 1, beta, spare)
            before = columns[row_group, :, cut]
            columns[row_group, :, cut] = _merge(torch.stack([before, _sums(s[:, cut], 0, beta, spare)]), beta)
    return rows, columns


def _bracket(s: Tensor, offset: Tensor, big: Tensor, small: Tensor, beta: float, spare: list[Tensor]) -> Tensor:
    """big e^{(1 + beta) u} - small e^{beta u} with u = s - offset; it lies in one of the two spare arrays."""
    u, other = (_shaped(flat, s) for flat in spare)
    if beta == 0:
        return torch.sub(s, offset, out=u).exp_().mul_(big)
    if beta == 0.5:
        t = torch.add(offset * -0.5, s, alpha=0.5, out=u).exp_()
        return torch.addcmul(-small, torch.mul(t, t, out=other), big, out=other).mul_(t)
    powers = _powers(torch.sub(s, offset, out=u), beta, other)
    return powers[0].mul_(big).sub_(powers[1].mul_(small))


def _gradient(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float, vectors, own):
    """dL/dx (R - bank, D) of the rows after the bank's, and dL/dc (M, D).

    vectors: of rows (2, 3, R) and of columns (2, 3, M): offset, big and small of _bracket, outside and inside the
    sub-block. own (R - bank,): dL/ds at the positives."""
    of_rows, of_columns = vectors
    dx, dc = x.new_empty(len(x) - bank, x.size(1)), torch.zeros_like(c)
    blocks = _blocks([0, bank, first_row, len(x)], len(c), BLOCK)
    held, *spare = _scratch(x, blocks, len(c), 5)
    for part in blocks:
        g = held[: (part.stop - part.start) * len(c)].view(-1, len(c))
        torch.mm(x[part], c.T, out=g).mul_(scale)
        for group, cut in enumerate((slice(0, first_column), slice(first_column, len(c)))):
            inside = int(part.start < first_row and group == 0)
            s = g[:, cut]
            from_columns = _bracket(s, *of_columns[inside, :, None, cut], beta, spare[:2])
            if part.start >= bank:
                torch.add(_bracket(s, *of_rows[inside, :, part, None], beta, spare[2:]), from_columns, out=s)
            else:
                s.copy_(from_columns)
        if part.start >= bank:
            rows = slice(part.start - bank, part.stop - bank)
            g[torch.arange(len(g), device=g.device), label[part]] = own[rows]
            torch.mm(g, c, out=dx[rows])
        dc.addmm_(g.T, x[part])
    return dx.mul_(scale), dc.mul_(scale)


# ---- Triton ----
# The kernels see a matrix of rows and one of columns, or a written strip of their products. Either has two groups, and
# no tile (or split of a sum) crosses from one to the other, so that it lies inside the sub-block or outside.


@triton.jit
def _span(tile, begin, first, end, size):
    """Where a tile of [begin, first) and [first, end) starts, where its group ends, and whether that is the first."""
    tiles = tl.cdiv(first - begin, size)
    in_first = tile < tiles
    start = tl.where(in_first, begin + tile * size, first + (tile - tiles) * size)
    return start, tl.where(in_first, first, end), in_first


@triton.jit
def _load(matrix, index, limit, k, d):
    """Rows `index` and columns k of an (n, d) matrix; zero beyond limit and d."""
    at = matrix + index.to(tl.int64)[:, None] * d + k[None, :]  # n x d may exceed int32
    return tl.load(at, mask=(index < limit)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def _tile_of_logits(
    rows, columns, row, row_end, column, column_end, scale, d, DEPTH: tl.constexpr, UPCAST: tl.constexpr
):
    s = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for begin in range(0, d, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        x, c = _load(rows, row, row_end, k, d), _load(columns, column, column_end, k, d)
        if UPCAST:  # the interpreter's bf16 products are wrong
            x, c = x.to(tl.float32), c.to(tl.float32)
        s = tl.dot(x, tl.trans(c), s, input_precision="ieee")
    return s * tl.load(scale)


@triton.jit
def _exponentials(u, BETA: tl.constexpr):
    """_powers in a kernel."""
    if BETA == 0.0:
        big = tl.exp(u)
        small = big
    elif BETA == 0.5:
        small = tl.exp(0.5 * u)
        big = small * small * small
    else:
        big = tl.exp((1 + BETA) * u)
        small = tl.exp(BETA * u)
    return big, small


@triton.jit
def _sums_kernel(
    rows, columns, label, scale, row_out, column_out, start_row, stop_row, r, m, d, first_column, per_split,
    BETA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """o, S and T of a tile of the rows start_row.. over one split of the columns, (splits, 3, R), and of those columns
    over the tile, (tiles of this launch, 3, M): partial results, merged in a fixed order outside."""
    LOWEST: tl.constexpr = -1e37  # finite: -inf less itself is NaN
    row = start_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.load(label + row, mask=row < stop_row, other=-1)
    start, stop, _ = _span(tl.program_id(1), 0, first_column, m, per_split)
    stop = tl.minimum(start + per_split, stop)
    top = tl.full([ROWS], LOWEST, tl.float32)
    big, small = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for begin in range(start, stop, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        s = _tile_of_logits(rows, columns, row, stop_row, column, stop, scale, d, DEPTH, UPCAST)
        negative = (row < stop_row)[:, None] & (column < stop)[None, :] & (own[:, None] != column[None, :])
        s = tl.where(negative, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        fade_big, fade_small = _exponentials(top - higher, BETA)
        new_big, new_small = _exponentials(s - higher[:, None], BETA)
        big, small = big * fade_big + tl.sum(new_big, 1), small * fade_small + tl.sum(new_small, 1)
        top = higher
        column_top = tl.maximum(tl.max(s, 0), LOWEST)
        new_big, new_small = _exponentials(s - column_top[None, :], BETA)
        out = column_out + tl.program_id(0).to(tl.int64) * 3 * m + column
        tl.store(out, column_top, mask=column < stop)
        tl.store(out + m, tl.sum(new_big, 0), mask=column < stop)
        tl.store(out + 2 * m, tl.sum(new_small, 0), mask=column < stop)
    out = row_out + tl.program_id(1).to(tl.int64) * 3 * r + row
    tl.store(out, top, mask=row < stop_row)
    tl.store(out + r, big, mask=row < stop_row)
    tl.store(out + 2 * r, small, mask=row < stop_row)


@triton.jit
def _strip_sums_kernel(
    s, label, scale, out, start_row, n, m, row_step, column_step, first, per_split, total,
    BETA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    """o, S and T of n anchors over one split of the m others, (splits, 3, total), from a written strip s of products:
    those of its rows, or, DOWN, of its columns (out then begins at its first column, else at its first row). label:
    the positive of each row of the strip. Each lane sums for itself, and the lanes of an anchor meet at the end."""
    LOWEST: tl.constexpr = -1e37
    anchor = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start, stop, _ = _span(tl.program_id(1), 0, first, m, per_split)
    stop = tl.minimum(start + per_split, stop)
    own = tl.load(label + start_row + anchor, mask=(anchor < n) & (DOWN == 0), other=-1)[:, None]
    top = tl.full([ROWS, COLUMNS], LOWEST, tl.float32)
    big, small = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(start, stop, COLUMNS):
        other = begin + tl.arange(0, COLUMNS)
        negative = (anchor < n)[:, None] & (other < stop)[None, :]
        if DOWN:
            positive = tl.load(label + start_row + other, mask=other < stop, other=-1)[None, :]
            negative = negative & (positive != anchor[:, None])
        else:
            negative = negative & (own != other[None, :])
        at = anchor.to(tl.int64)[:, None] * row_step + other.to(tl.int64)[None, :] * column_step
        logits = tl.load(s + at, mask=negative, other=float("-inf")) * tl.load(scale)
        higher = tl.maximum(top, logits)
        fade_big, fade_small = _exponentials(top - higher, BETA)
        new_big, new_small = _exponentials(logits - higher, BETA)
        big, small = big * fade_big + new_big, small * fade_small + new_small
        top = higher
    highest = tl.max(top, 1)
    fade_big, fade_small = _exponentials(top - highest[:, None], BETA)
    at = out + tl.program_id(1).to(tl.int64) * 3 * total + anchor
    tl.store(at, highest, mask=anchor < n)
    tl.store(at + total, tl.sum(big * fade_big, 1), mask=anchor < n)
    tl.store(at + 2 * total, tl.sum(small * fade_small, 1), mask=anchor < n)


@triton.jit
def _one_bracket(s, vectors, n, inside, index, limit, BETA: tl.constexpr, AXIS: tl.constexpr):
    at = vectors + inside * 3 * n + index
    offset = tl.expand_dims(tl.load(at, mask=index < limit, other=float("inf")), AXIS)
    big = tl.expand_dims(tl.load(at + n, mask=index < limit, other=0.0), AXIS)
    small = tl.expand_dims(tl.load(at + 2 * n, mask=index < limit, other=0.0), AXIS)
    e_big, e_small = _exponentials(s - offset, BETA)
    return big * e_big - small * e_small


@triton.jit
def _tile_of_gradients(
    s, row, row_end, column, column_end, inside, row_vectors, column_vectors, r, m, row_label, column_label,
    row_own, column_own, BETA: tl.constexpr,
):  # fmt: skip
    """dL/ds of a tile. At a positive (equal labels) it is the sum of the two `own`, one of which is zero."""
    in_rows, in_columns = row < row_end, column < column_end
    g = _one_bracket(s, row_vectors, r, inside, row, row_end, BETA, 1)
    g += _one_bracket(s, column_vectors, m, inside, column, column_end, BETA, 0)
    left = tl.load(row_label + row, mask=in_rows, other=-2)
    right = tl.load(column_label + column, mask=in_columns, other=-3)
    own = tl.load(row_own + row, mask=in_rows, other=0.0)[:, None]
    own = own + tl.load(column_own + column, mask=in_columns, other=0.0)[None, :]
    g = tl.where(left[:, None] == right[None, :], own, g)
    return tl.where(in_rows[:, None] & in_columns[None, :], g, 0.0)


@triton.jit
def _flash_gradient_kernel(
    rows, columns, row_vectors, column_vectors, row_label, column_label, row_own, column_own, scale, out,
    r, m, d, begin_row, first_row, begin_column, first_column,
    BETA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dL/d(rows) (R - begin_row, D): the logits again, their gradients, times the columns; WIDTH >= D."""
    row, row_end, row_first = _span(tl.program_id(0), begin_row, first_row, r, ROWS)
    row += tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    x = _load(rows, row, row_end, k, d)
    if UPCAST:
        x = x.to(tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    tiles = tl.cdiv(first_column - begin_column, COLUMNS) + tl.cdiv(m - first_column, COLUMNS)
    for tile in range(0, tiles):
        column, column_end, column_first = _span(tile, begin_column, first_column, m, COLUMNS)
        column += tl.arange(0, COLUMNS)
        inside = (row_first & column_first).to(tl.int32)
        c = _load(columns, column, column_end, k, d)
        if UPCAST:
            c = c.to(tl.float32)
        s = tl.dot(x, tl.trans(c), input_precision="ieee") * tl.load(scale)
        g = _tile_of_gradients(
            s, row, row_end, column, column_end, inside, row_vectors, column_vectors, r, m, row_label, column_label,
            row_own, column_own, BETA,
        )  # fmt: skip
        total = tl.dot(g.to(c.dtype), c, total, input_precision="ieee")
    at = out + (row - begin_row).to(tl.int64)[:, None] * d + k[None, :]
    tl.store(at, total * tl.load(scale), mask=(row < row_end)[:, None] & (k < d)[None, :])


@triton.jit
def _strip_gradient_kernel(
    s, g, row_vectors, column_vectors, row_label, column_label, row_own, column_own, scale,
    r, m, start, stop, first_row, first_column, BETA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products s (stop - start, M) of the rows start.. -> dL/ds in g, which may be s itself."""
    row = start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, column_end, column_first = _span(tl.program_id(1), 0, first_column, m, COLUMNS)
    column += tl.arange(0, COLUMNS)
    mask = (row < stop)[:, None] & (column < column_end)[None, :]
    at = (row - start).to(tl.int64)[:, None] * m + column[None, :]
    logits = tl.load(s + at, mask=mask, other=0.0) * tl.load(scale)
    inside = ((start < first_row) & column_first).to(tl.int32)
    gradient = _tile_of_gradients(
        logits, row, stop, column, column_end, inside, row_vectors, column_vectors, r, m, row_label, column_label,
        row_own, column_own, BETA,
    )  # fmt: skip
    tl.store(g + at, gradient.to(g.dtype.element_ty), mask=mask)


def _tiles(begin: int, first: int, end: int, size: int) -> tuple[int, int]:
    return triton.cdiv(first - begin, size), triton.cdiv(end - first, size)


def _fused(x: Tensor) -> bool:
    """Whether products stay in registers: while D is small, and not in fp32, which the tensor cores do not take. Else a
    strip of products is written by cuBLAS and read by the kernels."""
    return x.size(1) <= FUSED_WIDTH and x.dtype != torch.float32


def _statistics_triton(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float):
    """What _statistics returns (the bank's rows have sums too, which nobody reads)."""
    sums = _sums_fused if _fused(x) else _sums_of_strips
    nothing = torch.zeros(3, 1, device=x.device)
    nothing[0] = torch.finfo(torch.float32).min
    row_out, splits, columns = sums(x, c, label, first_row, first_column, scale, beta, nothing)
    rows = [_merge(part, beta) if len(part) else nothing.expand(3, len(x)) for part in row_out.split(splits)]
    return torch.stack(rows), torch.stack(columns)


def _sums_fused(x, c, label, first_row: int, first_column: int, scale: Tensor, beta: float, nothing: Tensor):
    """Partial sums of rows (splits, 3, R), the splits of either group, and the sums of columns (3, M) by group."""
    r, m, d = len(x), len(c), x.size(1)
    tile_rows, tile_columns, depth, warps, stages = _tile_sizes(x, "sums")
    launches = triton.cdiv(r, STRIP_TILES * tile_rows)
    blocks = _blocks([0, first_row, r], 1, triton.cdiv(triton.cdiv(r, launches), tile_rows) * tile_rows)
    per_split, splits = _cut(m, first_column, tile_columns, triton.cdiv(_tallest(blocks), tile_rows), x)
    row_out = torch.empty(sum(splits), 3, r, device=x.device)  # every program writes its part, be it empty
    columns = [nothing.expand(3, m), nothing.expand(3, m)]
    for part in blocks:
        column_out = torch.empty(triton.cdiv(part.stop - part.start, tile_rows), 3, m, device=x.device)
        with torch.cuda.device_of(x):
            _sums_kernel[len(column_out), sum(splits)](
                x, c, label, scale, row_out, column_out, part.start, part.stop, r, m, d, first_column, per_split,
                beta, tile_rows, tile_columns, depth, not x.is_cuda, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        group = int(part.start >= first_row)
        columns[group] = _merge(torch.cat([columns[group][None], column_out]), beta)
    return row_out, splits, columns


def _sums_of_strips(x, c, label, first_row: int, first_column: int, scale: Tensor, beta: float, nothing: Tensor):
    """What _sums_fused returns, from strips of products."""
    r, m = len(x), len(c)
    rows, row_columns, row_warps = _tile_sizes(x, "sums along")
    columns_at_once, column_rows, column_warps = _tile_sizes(x, "sums down")
    blocks = _blocks([0, first_row, r], m, STRIP)
    tallest = _tallest(blocks)
    per_split, splits = _cut(m, first_column, row_columns, triton.cdiv(tallest, rows), x)
    per_part, (_, parts) = _cut(tallest, 0, column_rows, triton.cdiv(m, columns_at_once), x)
    row_out = torch.empty(sum(splits), 3, r, device=x.device)  # every program writes its part, be it empty
    columns = [nothing.expand(3, m), nothing.expand(3, m)]
    for part in blocks:
        s, n = product(x[part], c.T), part.stop - part.start
        column_out = torch.empty(parts, 3, m, device=x.device)
        along = s, label, scale, row_out[:, :, part.start :], part.start, n, m, *s.stride(), first_column, per_split, r
        down = s, label, scale, column_out, part.start, m, n, *s.T.stride(), 0, per_part, m
        with torch.cuda.device_of(x):
            _strip_sums_kernel[triton.cdiv(n, rows), sum(splits)](
                *along, beta, rows, row_columns, False, num_warps=row_warps
            )
            _strip_sums_kernel[triton.cdiv(m, columns_at_once), parts](
                *down, beta, columns_at_once, column_rows, True, num_warps=column_warps
            )
        group = int(part.start >= first_row)
        columns[group] = _merge(torch.cat([columns[group][None], column_out]), beta)
    return row_out, splits, columns


def _tallest(blocks: list[slice]) -> int:
    return max((part.stop - part.start for part in blocks), default=1)


def _cut(n: int, first: int, tile: int, programs: int, x: Tensor) -> tuple[int, tuple[int, int]]:
    """What each program sums of n others, in whole tiles, and the splits that makes of either group."""
    wanted = max(fullest_waves(programs, processors(x)), processors(x) // programs)  # few programs: more splits
    per_split = triton.cdiv(triton.cdiv(n, tile), wanted) * tile
    return per_split, _tiles(0, first, n, per_split)


def _gradient_triton(
    x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float, vectors, own
):
    """What _gradient returns, in fp32. Fused, logits are computed twice and never leave the registers; else a strip of
    them is written, turned into its gradient in place, and multiplied twice."""
    of_rows, of_columns = (v.contiguous() for v in vectors)
    unit = None
    if x.dtype == torch.float16:  # gradients of a mean over many rows fall below its smallest number
        unit = torch.stack([own.abs().amax(), of_rows[:, 1:].abs().amax(), of_columns[:, 1:].abs().amax()]).amax()
        unit = unit.clamp_(min=1e-30)
        of_rows, of_columns, own = of_rows.clone(), of_columns.clone(), own / unit
        of_rows[:, 1:] /= unit
        of_columns[:, 1:] /= unit
    r, m, d = len(x), len(c), x.size(1)
    row_own, column_own = torch.nn.functional.pad(own, (bank, 0)), own.new_zeros(m)
    column_label = torch.arange(m, device=x.device)
    dx, dc = (torch.empty(n, d, device=x.device) for n in (r - bank, m))
    with torch.cuda.device_of(x):
        if _fused(x):
            rows, columns, warps, stages = _tile_sizes(x, "flash")
            of_x = x, c, of_rows, of_columns, label, column_label, row_own, column_own, scale, dx, r, m, d
            of_c = c, x, of_columns, of_rows, column_label, label, column_own, row_own, scale, dc, m, r, d
            width = max(16, triton.next_power_of_2(d))
            for arguments, spans, n in (
                (of_x, (bank, first_row, 0, first_column), r),
                (of_c, (0, first_column, 0, first_row), m),
            ):
                tiles = sum(_tiles(*spans[:2], n, rows))
                constants = beta, rows, columns, width, not x.is_cuda
                _flash_gradient_kernel[(tiles,)](*arguments, *spans, *constants, num_warps=warps, num_stages=stages)
        else:
            rows, columns, warps, _ = _tile_sizes(x, "strip")
            dc.zero_()
            for part in _blocks([0, bank, first_row, r], m, STRIP):
                s = product(x[part], c.T)
                g = s if x.dtype == torch.float32 else torch.empty_like(s, dtype=x.dtype)
                grid = triton.cdiv(len(s), rows), sum(_tiles(0, first_column, m, columns))
                _strip_gradient_kernel[grid](
                    s, g, of_rows, of_columns, label, column_label, row_own, column_own, scale,
                    r, m, part.start, part.stop, first_row, first_column, beta, rows, columns, num_warps=warps,
                )  # fmt: skip
                _add_product(dc, g.T, x[part])
                if part.start >= bank:
                    dx[part.start - bank : part.stop - bank] = product(g, c)
            dx, dc = dx.mul_(scale), dc.mul_(scale)
    return (dx, dc) if unit is None else (dx.mul_(unit), dc.mul_(unit))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, whatever the inputs."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _tile_sizes(x: Tensor, kernel: str) -> tuple[int, ...]:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    return TILES.get(capability, OTHER_TILES)[kernel]


# ---- ranks ----


class _Places(NamedTuple):
    """Where the columns of all ranks, first the human ones, lie in their padded parts: column j in place order[j]."""

    order: Tensor  # (M,), rank * longest + row
    longest: int  # rows of the largest part


def _all_gather(c: Tensor, places: _Places) -> Tensor:
    padded = c.new_zeros(places.longest, c.size(1))
    padded[: len(c)] = c
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[places.order]


def _reduce_scatter(dc: Tensor, places: _Places) -> Tensor:
    spread = dc.new_zeros(places.longest * dist.get_world_size(), dc.size(1))
    spread[places.order] = dc
    mine = dc.new_empty(places.longest, dc.size(1))
    dist.reduce_scatter(mine, list(spread.split(places.longest)))
    return mine


def _all_reduce_sums(part: Tensor, beta: float) -> Tensor:
    """_merge over ranks of (2 groups, 3, M)."""
    top = part[:, 0].contiguous()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    sums = part[:, 1:] * torch.stack(_powers(part[:, 0] - top, beta), 1)
    dist.all_reduce(sums)
    return torch.cat([top[:, None], sums], 1)


# ---- autograd ----


def _path(rows: Tensor, columns: Tensor) -> tuple:
    """The functions for these inputs, and the inputs as they want them. Logits are fp32 (fp64 for fp64) on every path;
    the tensor cores take bf16 and fp16 as they are, their products being exact in fp32."""
    work = _work(rows, columns)
    if (rows.is_cuda or INTERPRET) and work == torch.float32:
        work = rows.dtype if rows.dtype == columns.dtype else work
        return _statistics_triton, _gradient_triton, rows.to(work).contiguous(), columns.to(work).contiguous()
    return _statistics, _gradient, rows.to(work), columns.to(work)


def _work(x: Tensor, c: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, c.dtype), torch.float32)


def _anchors(sums: Tensor, count: Tensor, own: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Losses of anchors and the shares h of their negatives, from (3, n) o, S, T, the number of negatives and s_i+."""
    top, big, small = sums
    over = (top - own) + (big.log() if beta == 0 else (count * (big / small)).log())  # H - s_i+
    over = torch.where(count > 0, over, -torch.inf)
    loss = torch.logaddexp(over.new_full((), math.log(alpha)), over)
    return loss, torch.exp(over - loss)


def _vectors(terms: list[tuple[Tensor, Tensor]], beta: float, detach_weights: bool) -> Tensor:
    """(2, 3, n): offset, big and small of _bracket outside and inside the sub-block, from ((3, n) o, S, T and (n,)
    weights) of each term; the last term is the whole, the first, if there are two, the sub-block."""
    (top_all, big_all, small_all), weight_all = terms[-1]
    found = []
    for term in (terms[-1], terms[0]):
        (top, big, small), weight = term
        upper, lower = weight / big, weight / small
        if term is not terms[-1]:
            powers = _powers(top - top_all, beta)
            upper, lower = upper + weight_all / big_all * powers[0], lower + weight_all / small_all * powers[1]
        if beta == 0 or detach_weights:
            lower = torch.zeros_like(lower)
        else:
            upper, lower = (1 + beta) * upper, beta * lower
        nothing = big == 0  # no negatives, or a row of the bank: e^u = 0
        found += [top.masked_fill(nothing, torch.inf), upper.masked_fill(nothing, 0), lower.masked_fill(nothing, 0)]
    return torch.stack(found).unflatten(0, (2, 3))


def _add_at(sums: Tensor, at: Tensor, values: Tensor) -> None:
    """sums[at] += values, in a fixed order where anchors share a column: CUDA's index_add_ is atomic."""
    if sums.is_cuda:
        sums.index_put_((at,), values, accumulate=True)
    else:
        sums.index_add_(0, at, values)


class _Term(NamedTuple):
    """What the backward wants of one term with n anchors; tensors, so that autograd can save them."""

    row_shares: Tensor  # (n,) h, the share of the negatives in the denominator of each row's loss
    column_shares: Tensor  # (n,) the same of the columns' losses
    row_sums: Tensor  # (3, R) o, S and T of each row
    column_sums: Tensor  # (3, M) and of each column


class _Contrast(torch.autograd.Function):
    """Losses of rows and of columns for each term: the first group, where it is a term of its own, then the whole.

    first: rows and columns of the first group. counts: for each term how many negatives its rows have, and its columns
    ((), or (M,) where they differ). places: None, or where the columns of all ranks lie; then x, c, bank and the losses
    are this rank's."""

    @staticmethod
    def forward(ctx, x, c, bank, tau, label, first, counts, places, alpha, beta, detach_weights):
        work = _work(x, c)
        k = len(bank)
        rows = torch.cat([bank.to(x.dtype), x]) if k else x
        columns = c if places is None else _all_gather(c, places)
        scale = tau.to(x.device, work).reciprocal()
        shape = torch.cat([label.new_full((k,), -1), label]), k, k + first[0], first[1], scale, beta
        with full_precision(x.device):
            statistics, _, *both = _path(rows, columns)
            row_parts, column_parts = statistics(*both, *shape)
        if places is not None:
            column_parts = _all_reduce_sums(column_parts, beta)
        s_own = (rows[k:].to(work) * columns[label].to(work)).sum(1) * scale
        whole = _merge(row_parts, beta), _merge(column_parts, beta), len(x)
        sums = [(row_parts[0], column_parts[0], first[0]), whole][-len(counts) :]
        losses, terms = [], []
        for (row_sums, column_sums, n), (row_count, column_count) in zip(sums, counts, strict=True):
            own, at = s_own[:n], label[:n]
            column_count = column_count[at] if column_count.ndim else column_count
            row_loss, row_shares = _anchors(row_sums[:, k : k + n], row_count.to(work), own, alpha, beta)
            column_loss, column_shares = _anchors(column_sums[:, at], column_count.to(work), own, alpha, beta)
            losses += [row_loss, column_loss]
            terms += _Term(row_shares, column_shares, row_sums, column_sums)
        ctx.save_for_backward(rows, columns, tau, *shape[:1], scale, *terms)
        ctx.shape, ctx.places, ctx.detach_weights = shape[1:4], places, detach_weights
        ctx.beta, ctx.types, ctx.columns = beta, (x.dtype, c.dtype), len(c)
        return tuple(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        rows, columns, tau, label, scale, *saved = ctx.saved_tensors
        terms = [_Term(*saved[i : i + len(_Term._fields)]) for i in range(0, len(saved), len(_Term._fields))]
        k = ctx.shape[0]
        n = len(rows) - k
        own = scale.new_zeros(n)
        # h of each column's anchors times their incoming gradients, by term
        weights = scale.new_zeros(len(terms), len(columns))
        of_rows, of_columns = [], []
        for term, weight, of_losses in zip(terms, weights, zip(grads[::2], grads[1::2], strict=True), strict=True):
            row_shares, column_shares = term.row_shares * of_losses[0], term.column_shares * of_losses[1]
            m = len(row_shares)
            own[:m] -= row_shares + column_shares
            _add_at(weight, label[k : k + m], column_shares)
            of_rows.append((term.row_sums, torch.nn.functional.pad(row_shares, (k, n - m))))
            of_columns.append((term.column_sums, weight))
        if ctx.places is not None:
            dist.all_reduce(weights)
        vectors = [_vectors(terms, ctx.beta, ctx.detach_weights) for terms in (of_rows, of_columns)]
        with full_precision(rows.device):
            _, gradient, *both = _path(rows, columns)
            dx, dc = gradient(*both, label, *ctx.shape, scale, ctx.beta, vectors, own)
        dtau = -(columns.double() * dc).sum() / tau if ctx.needs_input_grad[3] else None
        if ctx.places is not None:
            dc = _reduce_scatter(dc, ctx.places)[: ctx.columns]
        dtau = None if dtau is None else dtau.to(tau)
        return dx.to(ctx.types[0]), dc.to(ctx.types[1]), None, dtau, *[None] * 7


# ---- public ----


def _checked_tau(tau: Tensor | float, alpha: float, beta: float, x: Tensor) -> Tensor:
    if isinstance(tau, Tensor):
        value = 1.0 if tau.is_cuda else tau.tolist()  # a look at a tensor on the GPU would wait for it
    else:
        value, tau = tau, torch.full((), tau, dtype=torch.float64, device=x.device)
    if tau.numel() != 1 or not value > 0 or not alpha > 0 or not beta >= 0:
        raise ValueError(f"tau > 0 (one number), alpha > 0 and beta >= 0 wanted, found {value}, {alpha}, {beta}")
    return tau


def hn_nce(
    x: Tensor,
    c: Tensor,
    positive: Tensor,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    detach_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (N, D), c (M, D), positive (N,) int64 -> losses of rows and of columns, (N,) each, fp32 (fp64 for fp64 inputs).

    positive[i] is the column of row i. rows[i]: row i against all columns; its negatives are the M - 1 others.
    columns[i]: column positive[i] against all rows, with row i as its positive; its negatives are the rows whose
    positive is another column. So a column that is nobody's positive has no loss (it only serves the rows as a
    negative), and rows that share a positive do not repel it. An anchor without negatives has loss log(alpha), 0 by
    default, and no gradient: the limit of negatives infinitely far away. Gradients reach x, c and tau (if it is a
    tensor); with detach_weights none flows through w. What `positive` and tau hold is checked on CPU only."""
    if x.ndim != 2 or c.ndim != 2 or x.size(1) != c.size(1) or positive.shape != (len(x),):
        found = f"{(*x.shape,)}, {(*c.shape,)}, {(*positive.shape,)}"
        raise ValueError(f"x (N, D), c (M, D) and positive (N,) wanted, found {found}")
    if len(x) == 0 or not positive.is_cuda and (int(positive.min()) < 0 or int(positive.max()) >= len(c)):
        raise ValueError(f"one positive in 0..{len(c) - 1} for each of at least one row wanted")
    tau = _checked_tau(tau, alpha, beta, x)
    sharing = positive.new_zeros(len(c)).index_add_(0, positive, torch.ones_like(positive))
    counts = [(positive.new_full((), len(c) - 1), len(x) - sharing)]
    bank = x.new_empty(0, x.size(1))
    return _Contrast.apply(x, c, bank, tau, positive, (0, 0), counts, None, float(alpha), float(beta), detach_weights)


def l_tcc(
    x: Tensor,
    c: Tensor,
    n_human: int,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    detach_weights: bool = False,
    bank: Tensor | None = None,
) -> Tensor:
    """Eq. 2: HN-NCE of the human triplets, plus HN-NCE of all; each the mean over rows plus the mean over columns.

    x, c (N, D): target and composed embeddings, row i of one belonging to row i of the other; the first n_human rows
    are human, the rest pseudo triplets. Without pseudo triplets, or without human ones, the two terms have one batch
    between them and it counts once. Without a bank the loss is the same with x and c exchanged.
    bank (K, D): features of further targets [ours], each one more negative of every composed embedding, in both terms.
    They get no gradient and have no loss; the caller leaves out those of images that are targets in the batch."""
    _check_batch(x, c, n_human, bank)
    label = torch.arange(len(x), device=x.device)
    sizes = n_human, len(x), 0 if bank is None else len(bank)
    return _sum_of_terms(x, c, n_human, tau, alpha, beta, detach_weights, bank, label, sizes, None)


def l_tcc_ranks(
    x: Tensor,
    c: Tensor,
    n_human: int,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    detach_weights: bool = False,
    bank: Tensor | None = None,
) -> Tensor:
    """This rank's share of l_tcc of the batches of all ranks: the shares add up to it.

    Every rank passes its own rows of x and c (N may differ), its own n_human, and the whole bank, and calls backward on
    its share with the same incoming gradient. x.grad and c.grad are then those of the global loss; the gradient of tau
    is a share (sum it over ranks, like that of any replicated parameter)."""
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size == 1:
        return l_tcc(x, c, n_human, tau, alpha, beta, detach_weights, bank)
    _check_batch(x, c, n_human, bank)
    parts = [torch.empty(2, dtype=torch.int64, device=x.device) for _ in range(size)]
    dist.all_gather(parts, torch.tensor([n_human, len(x) - n_human], device=x.device))
    human, pseudo = torch.stack(parts).T.tolist()
    rank, longest = dist.get_rank(), max(map(sum, zip(human, pseudo, strict=True)))
    order = [torch.arange(human[r], device=x.device) + r * longest for r in range(size)]
    order += [torch.arange(pseudo[r], device=x.device) + (r * longest + human[r]) for r in range(size)]
    starts = sum(human[:rank]), sum(human) + sum(pseudo[:rank])
    spans = zip(starts, (human[rank], pseudo[rank]), strict=True)
    label = torch.cat([torch.arange(start, start + n, device=x.device) for start, n in spans])
    sizes = sum(human), sum(human) + sum(pseudo), 0 if bank is None else len(bank)
    bank = None if bank is None else bank[rank::size]
    places = _Places(torch.cat(order), longest)
    return _sum_of_terms(x, c, n_human, tau, alpha, beta, detach_weights, bank, label, sizes, places)


def _check_batch(x: Tensor, c: Tensor, n_human: int, bank: Tensor | None) -> None:
    if x.ndim != 2 or x.shape != c.shape or not 0 <= n_human <= len(x):
        found = f"{(*x.shape,)}, {(*c.shape,)}, {n_human}"
        raise ValueError(f"x and c of one shape (N, D) and n_human in 0..{len(x)} wanted, found {found}")
    if bank is not None and (bank.ndim != 2 or bank.size(1) != x.size(1)):
        raise ValueError(f"bank (K, {x.size(1)}) wanted, found {(*bank.shape,)}")


def _sum_of_terms(x, c, n_human, tau, alpha, beta, detach_weights, bank, label, sizes, places) -> Tensor:
    """sizes: human and all triplets, and the bank, of all ranks. x, c, n_human, bank and label are this rank's."""
    human, total, k = sizes
    if total == 0:
        raise ValueError("at least one triplet wanted")
    tau = _checked_tau(tau, alpha, beta, x)
    bank = x.new_empty(0, x.size(1)) if bank is None else bank.detach()
    batches = sorted({human, total} - {0})
    counts = [(label.new_full((), n - 1), label.new_full((), n - 1 + k)) for n in batches]
    first = (n_human, human) if len(batches) == 2 else (0, 0)
    constants = places, float(alpha), float(beta), detach_weights
    losses = _Contrast.apply(x, c, bank, tau, label, first, counts, *constants)
    return sum(loss.sum() / batches[i // 2] for i, loss in enumerate(losses))
