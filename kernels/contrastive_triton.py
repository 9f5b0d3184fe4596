"""HN-NCE in Triton: what CUDA tensors take, but for float64. contrastive.py has the formulas.

The kernels see a matrix of rows and one of columns, or a written strip of their products. Either has two groups, and
no tile (or split of a sum) crosses from one to the other, so that it lies inside the sub-block or outside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contrastive_torch import row_blocks
from kernels.similarity_topk import fullest_waves, processors, product

STRIP = 1 << 27  # logits held at a time by the Triton path where they are written (512 MiB of fp32)
FUSED_WIDTH = 256  # up to this D products of 16-bit inputs stay in registers
WARPS = 32  # of the kernel of a strip's sums for each multiprocessor: some three times what its registers hold
STRIP_TILES = 128  # tiles of rows whose partial sums of all columns are held at a time

# Tiles by compute capability: rows, columns, (depth,) warps, stages; "merge": parts, columns, warps. Fixed, so that all
# ranks sum alike. [ours] 9.0: within 2 % of the fastest of bench/sweep.py on an H200, but "strip sums", 7 % ("sums" was
# timed at D = 768 alone, above what it serves now). 8.0: not measured. Where M or the first group's columns are no
# multiple of 16, "strip sums" spills registers: right, but not timed.
TILES = {
    (8, 0): {
        "sums": (128, 128, 32, 8, 3),
        "strip sums": (16, 128, 1, 1),  # of a written strip
        "flash": (64, 64, 8, 1),
        "strip": (16, 128, 4, 1),
        "merge": (8, 128, 4),
    },
    (9, 0): {
        "sums": (256, 128, 64, 8, 3),
        "strip sums": (16, 128, 1, 3),
        "flash": (128, 64, 8, 3),
        "strip": (16, 128, 4, 1),
        "merge": (8, 128, 4),
    },
}
OTHER_TILES = {  # any other GPU, and the interpreter
    "sums": (32, 64, 32, 4, 2),
    "strip sums": (8, 32, 1, 1),
    "flash": (32, 32, 8, 1),
    "strip": (16, 64, 4, 1),
    "merge": (2, 32, 4),
}


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
def _exponentials(u, BETA: tl.constexpr, unit=1.0):
    """contrastive_torch.powers_of in a kernel, of u times unit. By exp2, four instructions shorter than exp."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if BETA == 0.0:
        big = tl.exp2((LOG2E * unit) * u)
        small = big
    elif BETA == 0.5:
        small = tl.exp2((0.5 * LOG2E * unit) * u)
        big = small * small * small
    else:
        big = tl.exp2(((1 + BETA) * LOG2E * unit) * u)
        small = tl.exp2((BETA * LOG2E * unit) * u)
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
    s, label, scale, row_out, column_out, n, m, first_column, per_split,
    BETA: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o, S and T of a tile of rows over one split of the columns, (splits, 3, n), and of those columns over the tile,
    (tiles, 3, M), from one reading of a written strip s (n, M) of products. label (n,): the positive of each row.

    A tile lies in one warp, four neighbouring columns in a lane where rows and groups begin at multiples of 16 columns:
    each lane sums its columns over its rows, and keeps its own sums of each row, which meet at the end. Sums are of raw
    products: the scale comes in with the exponent."""
    LOWEST: tl.constexpr = -1e30  # times the scale still finite
    NEAR: tl.constexpr = 4
    unit = tl.load(scale)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    whole_rows = (tl.program_id(0) + 1) * ROWS <= n
    own = tl.load(label + row, mask=row < n, other=-1)
    last_own, first_own = tl.max(own, 0), tl.min(tl.where(own < 0, m, own), 0)
    start, stop, _ = _span(tl.program_id(1), 0, first_column, m, per_split)
    stop = tl.minimum(start + per_split, stop)
    top = tl.full([ROWS, COLUMNS // NEAR], LOWEST, tl.float32)
    big = tl.zeros([ROWS, COLUMNS // NEAR], tl.float32)
    small = tl.zeros([ROWS, COLUMNS // NEAR], tl.float32)
    for begin in tl.range(start, stop, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        at = s + row.to(tl.int64)[:, None] * m + column[None, :]
        p = tl.load(at, mask=(row < n)[:, None] & (column < stop)[None, :], other=0.0)
        end = begin + COLUMNS
        # few tiles hold a positive or end early
        if (begin <= last_own and end > first_own) or (end > stop or not whole_rows):
            negative = (row < n)[:, None] & (column < stop)[None, :] & (own[:, None] != column[None, :])
            p = tl.where(negative, p, float("-inf"))
        near = tl.reshape(p, [ROWS, COLUMNS // NEAR, NEAR])
        higher = tl.maximum(top, tl.max(near, 2))
        fade_big, fade_small = _exponentials(top - higher, BETA, unit)
        new_big, new_small = _exponentials(near - higher[:, :, None], BETA, unit)
        big, small = big * fade_big + tl.sum(new_big, 2), small * fade_small + tl.sum(new_small, 2)
        top = higher
        column_top = tl.maximum(tl.max(p, 0), LOWEST)
        new_big, new_small = _exponentials(p - column_top[None, :], BETA, unit)
        out = column_out + tl.program_id(0).to(tl.int64) * 3 * m + column
        tl.store(out, column_top * unit, mask=column < stop)
        tl.store(out + m, tl.sum(new_big, 0), mask=column < stop)
        tl.store(out + 2 * m, tl.sum(new_small, 0), mask=column < stop)
    highest = tl.max(top, 1)
    fade_big, fade_small = _exponentials(top - highest[:, None], BETA, unit)
    out = row_out + tl.program_id(1).to(tl.int64) * 3 * n + row
    tl.store(out, highest * unit, mask=row < n)
    tl.store(out + n, tl.sum(big * fade_big, 1), mask=row < n)
    tl.store(out + 2 * n, tl.sum(small * fade_small, 1), mask=row < n)


@triton.jit
def _merge_kernel(parts, whole, count, n, step, BETA: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """contrastive_torch.merge of parts (count, 3, n) into whole (3, n), whose rows are `step` apart; in fixed order."""
    LOWEST: tl.constexpr = -1e37
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = tl.arange(0, PARTS)
    top = tl.full([PARTS, COLUMNS], LOWEST, tl.float32)
    big, small = tl.zeros([PARTS, COLUMNS], tl.float32), tl.zeros([PARTS, COLUMNS], tl.float32)
    for begin in range(0, count, PARTS):
        at = parts + (begin + here).to(tl.int64)[:, None] * 3 * n + column[None, :]
        mask = (begin + here < count)[:, None] & (column < n)[None, :]
        new_top = tl.load(at, mask=mask, other=LOWEST)
        new_big, new_small = tl.load(at + n, mask=mask, other=0.0), tl.load(at + 2 * n, mask=mask, other=0.0)
        higher = tl.maximum(top, new_top)
        fade_big, fade_small = _exponentials(top - higher, BETA)
        e_big, e_small = _exponentials(new_top - higher, BETA)
        big, small = big * fade_big + new_big * e_big, small * fade_small + new_small * e_small
        top = higher
    mask = column < n
    before = tl.load(whole + column, mask=mask, other=LOWEST)
    highest = tl.maximum(tl.max(top, 0), before)
    e_big, e_small = _exponentials(before - highest, BETA)
    old_big = tl.load(whole + step + column, mask=mask, other=0.0) * e_big
    old_small = tl.load(whole + 2 * step + column, mask=mask, other=0.0) * e_small
    e_big, e_small = _exponentials(top - highest[None, :], BETA)
    tl.store(whole + column, highest, mask=mask)
    tl.store(whole + step + column, old_big + tl.sum(big * e_big, 0), mask=mask)
    tl.store(whole + 2 * step + column, old_small + tl.sum(small * e_small, 0), mask=mask)


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


def statistics(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float):
    """What contrastive_torch.statistics returns (the bank's rows have sums too, which nobody reads)."""
    sums = _sums_fused if _fused(x) else _sums_of_strips
    rows, columns = (torch.zeros(2, 3, n, device=x.device) for n in (len(x), len(c)))
    rows[:, 0] = columns[:, 0] = -1e37  # the kernels' LOWEST
    sums(x, c, label, first_row, first_column, scale, beta, rows, columns)
    return rows, columns


def _merge(parts: Tensor, whole: Tensor, beta: float) -> None:
    """o, S and T of parts (P, 3, n) into those of whole (3, n), in one launch."""
    count, _, n = parts.shape
    at_once, columns, warps = _tile_sizes(parts, "merge")
    sizes = count, n, whole.stride(0)
    with torch.cuda.device_of(parts):
        _merge_kernel[(triton.cdiv(n, columns),)](parts, whole, *sizes, beta, at_once, columns, num_warps=warps)


def _sums_fused(x, c, label, first_row: int, first_column: int, scale: Tensor, beta: float, of_rows, of_columns):
    """Merges the sums of rows and of columns into those of either group, (2, 3, R) and (2, 3, M)."""
    r, m, d = len(x), len(c), x.size(1)
    tile_rows, tile_columns, depth, warps, stages = _tile_sizes(x, "sums")
    launches = triton.cdiv(r, STRIP_TILES * tile_rows)
    blocks = row_blocks([0, first_row, r], 1, triton.cdiv(triton.cdiv(r, launches), tile_rows) * tile_rows)
    per_split, splits = _cut(m, first_column, tile_columns, triton.cdiv(_tallest(blocks), tile_rows), x)
    row_out = torch.empty(sum(splits), 3, r, device=x.device)  # every program writes its part, be it empty
    for part in blocks:
        column_out = torch.empty(triton.cdiv(part.stop - part.start, tile_rows), 3, m, device=x.device)
        with torch.cuda.device_of(x):
            _sums_kernel[len(column_out), sum(splits)](
                x, c, label, scale, row_out, column_out, part.start, part.stop, r, m, d, first_column, per_split,
                beta, tile_rows, tile_columns, depth, not x.is_cuda, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        _merge(column_out, of_columns[int(part.start >= first_row)], beta)
    for group, parts in zip(of_rows, row_out.split(splits), strict=True):
        _merge(parts, group, beta)


def _sums_of_strips(x, c, label, first_row: int, first_column: int, scale: Tensor, beta: float, of_rows, of_columns):
    """What _sums_fused does, from strips of products, each read once."""
    r, m = len(x), len(c)
    rows, columns, warps, stages = _tile_sizes(x, "strip sums")
    blocks = row_blocks([0, first_row, r], m, STRIP)
    tiles = triton.cdiv(_tallest(blocks), rows)
    per_split, splits = _cut(m, first_column, columns, tiles, x, WARPS // warps)
    for part in blocks:
        s, n = product(x[part], c.T), part.stop - part.start
        row_out = torch.empty(sum(splits), 3, n, device=x.device)  # every program writes its part, be it empty
        column_out = torch.empty(triton.cdiv(n, rows), 3, m, device=x.device)
        with torch.cuda.device_of(x):
            _strip_sums_kernel[len(column_out), len(row_out)](
                s, label[part], scale, row_out, column_out, n, m, first_column, per_split,
                beta, rows, columns, stages, num_warps=warps,
            )  # fmt: skip
        _merge(column_out, of_columns[int(part.start >= first_row)], beta)
        for group, parts in zip(of_rows, row_out.split(splits), strict=True):
            _merge(parts, group[:, part], beta)


def _tallest(blocks: list[slice]) -> int:
    return max((part.stop - part.start for part in blocks), default=1)


def _cut(n: int, first: int, tile: int, programs: int, x: Tensor, at_once: int = 1) -> tuple[int, tuple[int, int]]:
    """What each program sums of n others, in whole tiles, and the splits that makes of either group. at_once: programs
    that a multiprocessor holds."""
    places = processors(x) * at_once
    wanted = max(fullest_waves(programs, places), places // programs)  # few programs: more splits
    per_split = triton.cdiv(triton.cdiv(n, tile), wanted) * tile
    return per_split, _tiles(0, first, n, per_split)


def gradient(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float, vectors, own):
    """What contrastive_torch.gradient returns, in fp32. Fused, logits are computed twice and never leave the registers;
    else a strip of them is written, turned into its gradient in place, and multiplied twice."""
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
            for part in row_blocks([0, bank, first_row, r], m, STRIP):
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
