"""The k most similar gallery rows of every query, exactly as float64 orders them.

score(i, j) = sum_d q_id g_jd. A product of two fp32 numbers is exact in float64 (24 + 24 <= 53 bits); the sum is taken
by halving, in one fixed order, with elementwise additions only. So a score is the same bits on every device, for every
block size and every number of ranks. Rows are sorted by score, descending; equal scores by index, ascending.

Doing that for all N x M pairs is slow, so a fast low-precision product only *proposes* the best K' > k of each row, and
exact scores of those K' decide. The proposal is certified row by row. An fp32 dot product (CPU), summed in any order,
is off by at most

    bound_i = gamma |q_i| max_j |g_j|,    gamma = n u / (1 - n u),    u = 2^-24,    n = D + 8

(n = D for the products and sums; 8 more cover the rounding of inputs given in float64), and n LOST where products
vanish below fp32's smallest number. A product of fp16 copies q', g'
summed in fp32 (Triton) adds |q - q'| |g| + |q'| |g - g'| by Cauchy and Schwarz; both roundings are measured. Whatever
was not proposed scores at most (approximate K'-th) + bound_i, hence if (exact k-th) > (approximate K'-th) + bound_i,
the k best are among the K'. A row without this certificate (many near ties) is scored again, over every column that
could still be among its k best.

The N x M scores are never written. Where the queries are the gallery, a tile of them exists at a time, only the tiles
on and above the diagonal are computed, and each serves its rows and its columns (on a GPU from D = 1,024 on: there the
product is dear enough to pay for writing its tile). Else the fused Triton kernel keeps the best K' of its rows in
registers while it walks over the gallery.
"""

import functools
import os
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import best_lists, interpreter
from kernels.best_lists import keep_best

TILE = {"cpu": 2048, "cuda": 8192}  # rows and columns of a tile of fp32 scores (16 MiB; 256 MiB)
TILE_WIDTH = 1024  # from this D on, a GPU that compares a gallery with itself computes half the tiles and writes them
LARGEST = 2.0**120  # of the product of two rows' lengths: fp32 ends at 2^128
LOST = 2.0**-126  # of a product or sum at most, where it is below the smallest normal number of fp32
EXACT_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 26}  # float64 products held at a time (2 MiB: stays in cache; 512 MiB)
RESCAN = {"cpu": 1 << 20, "cuda": 1 << 28}  # scores of uncertified rows held at a time
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # then CPU tensors take the Triton path
if INTERPRET:
    interpreter.mend()

# Tiles of the proposal kernel by compute capability: rows, columns and depth of a tile, warps, stages. Fixed, so that
# all ranks propose alike. [ours] 9.0: the fastest of bench/sweep.py on an H200, at D = 2048 and at D = 256; 8.0 not
# measured: what fits its registers.
TILES = {(8, 0): (128, 128, 32, 8, 3), (9, 0): (128, 128, 64, 8, 3)}
NARROW_TILES = TILES | {(9, 0): (64, 128, 64, 4, 3)}  # up to D = 256
OTHER_TILES = (64, 64, 32, 4, 2)  # any other GPU, and the interpreter


@contextmanager
def full_precision(device: torch.device):
    """fp32 products in fp32: TF32, the bf16 products that "medium" allows on CPU, and autocast are off inside."""
    backends = ()
    if hasattr(torch.backends, "fp32_precision"):  # torch >= 2.9, where the older function refuses to be mixed with it
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends] or torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if not backends:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=False):
            backend.fp32_precision = precision
        if not backends:
            torch.set_float32_matmul_precision(before)


def exact_dot(a: Tensor, b: Tensor) -> Tensor:
    """Float64 dot products over the last dimension, (..., D) x (..., D) -> (...), summed by halving in fixed order."""
    products = a.double() * b.double()
    n = products.size(-1)
    while n > 1:
        half = n // 2
        products[..., :half] += products[..., n - half : n]
        n -= half
    return products[..., 0]


# ---- reference ----


def similarity_topk_reference(queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None = None):
    """The definition, row by row over every pair: float64 scores (N, k) and indices (N, k)."""
    scores = torch.full((len(queries), k), -torch.inf, dtype=torch.float64, device=queries.device)
    indices = torch.full((len(queries), k), -1, dtype=torch.int64, device=queries.device)
    for i, query in enumerate(queries):
        row = exact_dot(query.expand_as(gallery), gallery)  # (M,)
        if exclude is not None and exclude[i] >= 0:
            row[exclude[i]] = -torch.inf
        row, order = row.sort(descending=True, stable=True)  # stable: equal scores stay in index order
        found = min(k, int(row.isfinite().sum()))
        scores[i, :found], indices[i, :found] = row[:found], order[:found]
    return scores, indices


# ---- Triton ----


@triton.jit
def _propose_kernel(
    queries, gallery, exclude, values, columns, n, m, d, per_split, splits,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The WIDTH best of ROWS rows among the columns of one split, in no order; LANES = WIDTH up to a power of two.
    d is a multiple of DEPTH. Programs that run together share rows as well as columns: both stay in the L2 cache."""
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    row = tile * ROWS + tl.arange(0, ROWS)
    in_rows = row < n
    at_row = row.to(tl.int64) * d  # N x D exceeds int32 at a million pictures
    lane = tl.arange(0, LANES)
    best = tl.where(lane[None, :] < WIDTH, float("-inf"), float("inf")) + tl.zeros([ROWS, LANES], tl.float32)
    where = tl.full([ROWS, LANES], -1, tl.int32)
    kth = tl.full([ROWS], float("-inf"), tl.float32)
    own = tl.load(exclude + row, mask=in_rows, other=-1)
    first = split * per_split
    for start in range(first, tl.minimum(first + per_split, m), COLUMNS):
        # a tile of scores
        column = start + tl.arange(0, COLUMNS)
        in_columns = column < m
        at_column = column.to(tl.int64) * d
        s = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, d, DEPTH):
            k = begin + tl.arange(0, DEPTH)
            q = tl.load(queries + at_row[:, None] + k[None, :], mask=in_rows[:, None], other=0.0)
            g = tl.load(gallery + at_column[None, :] + k[:, None], mask=in_columns[None, :], other=0.0)
            if UPCAST:
                q, g = q.to(tl.float32), g.to(tl.float32)
            s = tl.dot(q, g, s, input_precision="ieee")

        # its best go into the lists
        s = tl.where(in_columns[None, :] & (column[None, :] != own[:, None]), s, float("-inf"))
        best, where, kth = keep_best(s, column[None, :], best, where, kth, lane)
    at = (split * n + row).to(tl.int64) * WIDTH
    out = in_rows[:, None] & (lane[None, :] < WIDTH)
    tl.store(values + at[:, None] + lane[None, :], best, mask=out)
    tl.store(columns + at[:, None] + lane[None, :], where, mask=out)


@triton.jit
def _exact_kernel(queries, gallery, rows, columns, leaves, scores, pairs, d, LEVELS: tl.constexpr, PAIRS: tl.constexpr):
    """exact_dot of pairs (row, column). leaves (2^LEVELS,): what stands where, so that each level adds two halves."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row = tl.load(rows + pair, mask=pair < pairs, other=0)
    column = tl.load(columns + pair, mask=pair < pairs, other=0)
    leaf = tl.load(leaves + tl.arange(0, 1 << LEVELS))
    some = (pair < pairs)[:, None] & (leaf >= 0)[None, :]
    q = tl.load(queries + row[:, None] * d + leaf[None, :], mask=some, other=0.0).to(tl.float64)
    g = tl.load(gallery + column[:, None] * d + leaf[None, :], mask=some, other=0.0).to(tl.float64)
    x = q * g  # exact, so that no fused multiply-add can change the sum
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [PAIRS, 2, 1 << (LEVELS - 1 - level)]), 1)
    tl.store(scores + pair, tl.reshape(x, [PAIRS]), mask=pair < pairs)


@functools.lru_cache(maxsize=8)
def _leaves(d: int, device: torch.device) -> Tensor:
    """Where exact_dot's halving of d products has its leaves in a full binary tree, (2^levels,) int32, -1 for none.

    Of n products the last n // 2 are added to the first: leaf j goes right where j >= n - n // 2, and on to what is
    left of j."""
    index, place, n = torch.arange(d), torch.zeros(d, dtype=torch.int64), d
    while n > 1:
        n -= n // 2
        right = index >= n
        index, place = index - n * right, 2 * place + right
    leaves = torch.full((1 << (d - 1).bit_length(),), -1, dtype=torch.int32)
    leaves[place] = torch.arange(d, dtype=torch.int32)
    return leaves.to(device)


def _exact_triton(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What _exact_scores returns, for fp32 rows and narrower ones."""
    scores, pairs = torch.empty(len(rows), dtype=torch.float64, device=queries.device), len(rows)
    leaves = _leaves(queries.size(1), queries.device)
    at_once, levels = max(1, 4096 // len(leaves)), len(leaves).bit_length() - 1
    queries, gallery = queries.contiguous(), gallery.contiguous()
    if pairs:
        with torch.cuda.device_of(queries):
            _exact_kernel[(triton.cdiv(pairs, at_once),)](
                queries, gallery, rows, columns, leaves, scores, pairs, queries.size(1), levels, at_once
            )
    return scores


def _lengths(x: Tensor) -> Tensor:
    """Lengths (N,) of the rows in float64, without a float64 copy of all of them."""
    step = max(1, EXACT_BLOCK[x.device.type] // x.size(1))
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in x.split(step)]
    return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.float64)


def _rounded(x: Tensor, multiple: int) -> tuple[Tensor, Tensor, float | Tensor]:
    """x / unit in fp16, unit a power of two (no overflow), its width filled with zeros to a multiple, and the lengths
    of what the rounding took from each row."""
    d = x.size(1)
    unit = torch.exp2(torch.maximum(x.amax(), x.amin().neg()).clamp_(min=1e-30).log2().ceil()).to(x.dtype)
    half = torch.zeros(len(x), triton.cdiv(d, multiple) * multiple, dtype=torch.float16, device=x.device)
    lost = torch.empty(len(x), dtype=torch.float64, device=x.device)
    step = max(1, (1 << 26) // d)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        half[rows, :d] = x[rows] / unit
        lost[rows] = _lengths(x[rows] - half[rows, :d].to(x.dtype) * unit)
    return half, lost, unit


def fullest_waves(programs: int, processors: int, most: int = 8) -> int:
    """Into how many parts the work of each program is best cut, so that the last wave leaves few processors idle."""
    return min(range(1, most + 1), key=lambda parts: (triton.cdiv(programs * parts, processors) / parts, parts))


def processors(x: Tensor) -> int:
    """Multiprocessors of the GPU that holds x."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _propose_triton(
    queries: Tensor, gallery: Tensor, lengths, width: int, exclude: Tensor | None, symmetric, tile: int, progress=iter
):
    """What _propose returns, and the bound (N,) on the error of its scores. lengths: of the rows of either."""
    d = queries.size(1)
    capability = torch.cuda.get_device_capability(queries.device) if queries.is_cuda else None
    tiles = (TILES if d > 256 else NARROW_TILES).get(capability, OTHER_TILES)
    q, q_lost, q_unit = _rounded(queries, tiles[2])
    g, g_lost, g_unit = (q, q_lost, q_unit) if symmetric else _rounded(gallery, tiles[2])
    if symmetric and d >= TILE_WIDTH:
        n = len(q)
        even = triton.cdiv(triton.cdiv(n, triton.cdiv(n, tile)), 128) * 128  # whole tiles: cuBLAS is slow at odd sizes
        q = torch.nn.functional.pad(q, (0, 0, 0, -n % even))
        values, found = _propose(q, q, (n, n), width, exclude, True, even, progress)
    else:
        values, found = _propose_fused(q, g, width, exclude, tiles)
    q_length, g_length = lengths
    sums = _gamma(4 * (d + 8)) * (q_length + q_lost) * (g_length + g_lost).max()  # tensor cores may cut, not round
    bound = q_lost * g_length.max() + (q_length + q_lost) * g_lost.max() + sums + 2 * LOST
    return values * q_unit * g_unit, found, bound


def _propose_fused(q: Tensor, g: Tensor, width: int, exclude: Tensor | None, tiles: tuple):
    """The `width` best columns of each row by the fused kernel: scores and columns (N, width), descending."""
    (n, d), m = q.shape, len(g)
    rows, columns, depth, warps, stages = tiles
    own = torch.full((n,), -1, device=q.device) if exclude is None else exclude.contiguous()
    programs = triton.cdiv(n, rows)
    splits = min(fullest_waves(programs, processors(q)), triton.cdiv(m, 4 * columns))
    splits = max(splits, min(2 * processors(q) // programs, triton.cdiv(m, 4 * columns)))  # few rows: more
    per_split = triton.cdiv(triton.cdiv(m, columns), splits) * columns
    splits = triton.cdiv(m, per_split)
    values = torch.empty(splits, n, width, device=q.device)
    found = torch.empty(splits, n, width, dtype=torch.int32, device=q.device)
    sizes = n, m, d, per_split, splits
    shape = width, triton.next_power_of_2(width), rows, columns, depth, not q.is_cuda
    with torch.cuda.device_of(q):
        _propose_kernel[(programs * splits,)](
            q, g, own, values, found, *sizes, *shape, num_warps=warps, num_stages=stages
        )
    values, order = values.transpose(0, 1).reshape(n, -1).topk(width, dim=1)
    return values, found.transpose(0, 1).reshape(n, -1).gather(1, order).long()


# ---- PyTorch ----


def _gamma(n: int) -> float:
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def _absorb(values: Tensor, columns: Tensor, s: Tensor, start: int, transposed: bool, own: Tensor | None) -> None:
    """Puts what the scores s of columns start.. have to offer into the lists (rows, K') of these rows, in place.
    own: the gallery column each row leaves out."""
    if own is not None:
        at = ((own >= start) & (own < start + s.size(1))).nonzero()[:, 0]
        s[at, own[at] - start] = -torch.inf
    kth = values[:, -1]

    # nothing yet: all of s would pass
    if not transposed and kth[0] == -torch.inf and s.size(1) > values.size(1):
        values[:], columns[:] = s.topk(values.size(1), dim=1)
        columns += start
        return

    # which scores are offered: those above the last of their row's list
    if transposed:  # s[j, i]: the rows of the lists are its columns
        column, row = (s > kth).nonzero(as_tuple=True)
        row, order = row.sort(stable=True)
        column = column[order]
        offered = s[column, row]
    else:
        row, column = (s > kth[:, None]).nonzero(as_tuple=True)
        offered = s[row, column]
    if len(row) == 0:
        return

    # the lists of those rows, with a slot for each offer behind
    count = torch.bincount(row, minlength=len(values))
    some = count.nonzero()[:, 0]
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    at = torch.empty_like(count)
    at[some] = torch.arange(len(some), device=row.device)
    width, more = values.size(1), int(count.max())
    both = torch.nn.functional.pad(values[some], (0, more), value=-torch.inf)
    names = torch.nn.functional.pad(columns[some], (0, more), value=-1)
    both[at[row], width + slot] = offered
    names[at[row], width + slot] = column + start

    # the best of both stay
    values[some], order = both.topk(width, dim=1)
    columns[some] = names.gather(1, order)


def _propose(
    queries: Tensor, gallery: Tensor, counts, width: int, exclude: Tensor | None, symmetric: bool, tile: int, progress
):
    """The `width` highest approximate scores of each row and their columns, (N, width) each; an excluded column has
    score -inf. fp32 inputs on CPU; fp16 ones for Triton. counts: N and M; rows behind them are padding. symmetric:
    queries is gallery, and a row excludes itself or nothing."""
    (n, m), device = counts, queries.device
    on_gpu = queries.dtype == torch.float16
    assert symmetric or not on_gpu, "a GPU walks over another gallery in the fused kernel"
    values = torch.full((n, width), -torch.inf, device=device)
    columns = torch.full((n, width), -1, dtype=torch.int32 if on_gpu else torch.int64, device=device)
    order = [(i, j) for i in range(0, n, tile) for j in range(0, m, tile)]
    if symmetric:  # the diagonal first: every row then has a threshold that few scores pass
        order = [(i, i) for i in range(0, n, tile)] + [(i, j) for i, j in order if i < j]
    buffer = torch.empty(min(tile, len(queries)) * min(tile, len(gallery)), device=device)
    for i, j in progress(order):
        rows, others = slice(i, min(i + tile, n)), slice(j, min(j + tile, m))

        # the scores of a tile
        q, g = queries[i : i + tile], gallery[j : j + tile]
        s = buffer[: len(q) * len(g)].view(len(q), len(g))
        product(q, g.T, s)
        s = s[: rows.stop - i, : others.stop - j]

        # each serves its rows and, where queries and gallery are one, its columns
        both = symmetric and i < j
        if on_gpu:
            if i == j:
                if exclude is not None:
                    s.diagonal().fill_(-torch.inf)
                # a list that starts empty would take hundreds of scores, one a round
                values[rows] = best_lists.floor(s, width)[:, None]
            lists = [(values[at], columns[at]) for at in (rows, others)]
            best_lists.absorb(lists[0], lists[1] if both else None, s, (j, i))
            continue
        own = exclude[rows] if exclude is not None and (not symmetric or i == j) else None
        _absorb(values[rows], columns[rows], s, j, False, own)
        if both:
            _absorb(values[others], columns[others], s, i, True, None)
    return values, columns.long()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (N, D) @ b (D, M) in fp32, whatever the inputs; in `out`, if there is one."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def _exact_scores(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Float64 scores (P,) of P pairs (row, column)."""
    if (queries.is_cuda or INTERPRET) and torch.float64 not in (queries.dtype, gallery.dtype):
        return _exact_triton(queries, gallery, rows, columns)
    block = max(1, EXACT_BLOCK[queries.device.type] // gallery.size(1))
    scores = torch.empty(len(rows), dtype=torch.float64, device=queries.device)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        scores[part] = exact_dot(queries.index_select(0, rows[part]), gallery.index_select(0, columns[part]))
    return scores


def _decide(queries: Tensor, gallery: Tensor, k: int, approximate: Tensor, columns: Tensor, bound: Tensor):
    """The k best of each row's proposal (N, K') by exact score: scores and columns (N, k), ties by column."""
    columns, order = columns.sort(dim=1)  # ascending, so that a stable sort by score breaks ties by column
    approximate = approximate.gather(1, order).double()
    # an exact score is worth computing only where the approximate one leaves a chance to be among the k best
    floor = approximate.topk(k, dim=1).values[:, -1] - 2 * bound
    rows, places = ((approximate >= floor[:, None]) & (approximate > -torch.inf)).nonzero(as_tuple=True)
    exact = torch.full_like(approximate, -torch.inf)
    exact[rows, places] = _exact_scores(queries, gallery, rows, columns[rows, places])
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    return exact[:, :k], columns.gather(1, order)[:, :k]


def _rescan(s: Tensor, queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None, kth: Tensor, bound: Tensor):
    """Rows without certificate, and their fp32 scores s (B, M): each column that could still reach kth (B,) is scored
    exactly."""
    if exclude is not None:
        at = exclude.ge(0).nonzero()[:, 0]
        s[at, exclude[at]] = -torch.inf
    rows, columns = ((s.double() >= (kth - bound)[:, None]) & (s > -torch.inf)).nonzero(as_tuple=True)
    exact, order = _exact_scores(queries, gallery, rows, columns).sort(descending=True, stable=True)
    rows, by_row = rows[order].sort(stable=True)  # within a row: by score, then by column
    exact, columns = exact[by_row], columns[order][by_row]
    count = torch.bincount(rows, minlength=len(queries))
    place = torch.arange(k, device=rows.device).expand(len(queries), k)
    take = (place + (count.cumsum(0) - count)[:, None]).clamp_(max=max(0, len(rows) - 1))
    short = place >= count[:, None]
    return exact[take].masked_fill(short, -torch.inf), columns[take].masked_fill(short, -1)


# ---- public ----


def similarity_topk(queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """queries (N, D), gallery (M, D) -> scores (N, k) fp32, indices (N, k) int64; by score descending, index ascending.

    exclude (N,) int64: one gallery index a row may not return (its own image, its reference), -1 for none.
    Rows with fewer than k columns are padded: score -inf, index -1. ValueError for wrong shapes, NaN and infinity, and
    rows so long that fp32 cannot hold their products."""
    scores, indices = exact_topk(queries, gallery, k, exclude)
    return scores.float(), indices


@torch.no_grad()
def exact_topk(
    queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None = None, tile: int | None = None, progress=iter
) -> tuple[Tensor, Tensor]:
    """similarity_topk with the float64 scores. Give the gallery itself as queries where it is: half the work.

    tile: rows and columns of a tile of scores (TILE). progress: wraps the list of tiles (a progress bar)."""
    # what was given
    if queries.ndim != 2 or gallery.ndim != 2 or queries.size(1) != gallery.size(1) or queries.size(1) == 0:
        raise ValueError(f"queries (N, D) and gallery (M, D) wanted, found {(*queries.shape,)} and {(*gallery.shape,)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if exclude is not None:
        if exclude.shape != (len(queries),) or exclude.is_floating_point():
            raise ValueError(f"exclude: one integer per query wanted, found {(*exclude.shape,)} {exclude.dtype}")
        if exclude.numel() and int(exclude.max()) >= len(gallery):
            raise ValueError(f"exclude names column {int(exclude.max())} of a gallery of {len(gallery)}")
    lengths = [_lengths(queries)]
    lengths += lengths if queries is gallery else [_lengths(gallery)]
    for name, length in zip(("queries", "gallery"), lengths, strict=True):
        bad = length.isfinite().logical_not().nonzero()[:, 0]
        if len(bad):
            raise ValueError(f"{name} row {int(bad[0])} holds NaN or infinity ({len(bad)} such rows)")

    n, m = len(queries), len(gallery)
    if n and m and not float(lengths[0].max() * lengths[1].max()) < LARGEST:
        raise ValueError("queries and gallery: numbers too large for products in fp32; divide them")

    # the answer, filled with what a row of too few columns keeps
    scores = torch.full((n, k), -torch.inf, dtype=torch.float64, device=queries.device)
    indices = torch.full((n, k), -1, dtype=torch.int64, device=queries.device)
    if n and m:
        found = min(k, m)
        itself = torch.arange(n, device=queries.device)
        symmetric = queries is gallery and (exclude is None or torch.equal(exclude, itself))
        # of 102,436 rows (D = 2048) on an H200 1,352 had no certificate at K' = 32, and none at 48
        least = 48 if queries.is_cuda and symmetric and queries.size(1) >= TILE_WIDTH else 32
        wide = min(m, max(least, k + k // 2 + 2))  # K'; a certificate fails if the last K' - k lie within the bound
        terms = queries.size(1) + 8
        fp32 = _gamma(terms) * lengths[0] * lengths[1].max() + terms * LOST  # (N,)
        narrow = queries.float(), gallery.float()
        tile = tile or TILE[queries.device.type]

        # propose K' of each row, decide by exact scores, and scan the rows that have no certificate
        with full_precision(queries.device):
            if queries.is_cuda or INTERPRET:
                proposal, columns, bound = _propose_triton(*narrow, lengths, wide, exclude, symmetric, tile, progress)
            else:
                proposal, columns = _propose(*narrow, (n, m), wide, exclude, symmetric, tile, progress)
                bound = fp32
            scores[:, :found], indices[:, :found] = _decide(queries, gallery, found, proposal, columns, bound)
            doubtful = torch.zeros(0, dtype=torch.int64)
            if wide < m:
                certain = scores[:, -1] > proposal.amin(1).double() + bound
                doubtful = certain.logical_not().nonzero()[:, 0]
            for rows in doubtful.split(max(1, RESCAN[queries.device.type] // m)) if len(doubtful) else ():
                own = None if exclude is None else exclude[rows]
                s = narrow[0][rows] @ narrow[1].T
                scores[rows], indices[rows] = _rescan(s, queries[rows], gallery, k, own, scores[rows, -1], fp32[rows])
    indices[scores == -torch.inf] = -1
    return scores, indices
