"""Lists of the K' best scores of each row, and what puts scores into them: Triton kernels of similarity_topk.py.

A tile of scores of a gallery with itself is written once and read once. It serves the lists of its rows at once. What
is above the last score of the list of its column is offered to that list on the way, and merged when the tile is
read. Once lists are full, few scores pass: of a gallery in no order, K' / b of a row in tile b + 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of each kernel: lists of a program, scores of each it looks at together, warps. [ours] the fastest of bench/sweep.py's
# mining as a whole on an H200, but for "down", which galleries in no order do not need.
TILES = {"along": (1, 128, 1), "down": (16, 256, 4), "merge": (4, 0, 4)}
OFFERS = 128  # room for the offers of a tile to one list
FLOOR_PARTS = 128  # parts of a row whose largest scores say where its list begins


@triton.jit
def keep_best(s, column, best, where, kth, lane):
    """Puts the scores s (ROWS, COLUMNS) of `column` (1 or ROWS, COLUMNS) into the lists (ROWS, LANES), one of each row
    a round; kth (ROWS,) is the least of each list."""
    top = tl.max(s, 1)
    while tl.max((top > kth).to(tl.int32), 0) > 0:  # as many rounds as the busiest row needs
        j = tl.argmax(s, 1)
        worst = tl.argmin(best, 1)
        hit = (lane[None, :] == worst[:, None]) & (top > kth)[:, None]
        best = tl.where(hit, top[:, None], best)
        at = tl.arange(0, s.shape[1])[None, :] == j[:, None]
        where = tl.where(hit, tl.max(tl.where(at, column, -1), 1)[:, None], where)
        kth = tl.min(best, 1)
        s = tl.where(at, float("-inf"), s)
        top = tl.max(s, 1)
    return best, where, kth


@triton.jit
def _lists(values, columns, row, n, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """The lists (ROWS, LANES) of some rows, the least score of each, and where they lie."""
    lane = tl.arange(0, LANES)
    at = row.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    held = (row < n)[:, None] & (lane[None, :] < WIDTH)
    best = tl.load(values + at, mask=held, other=float("inf"))
    return best, tl.load(columns + at, mask=held, other=-1), tl.min(best, 1), lane, at, held


@triton.jit
def _absorb_kernel(
    scores, values, columns, n, m, row_step, column_step, start, kth_of_columns, counts, offers, indices,
    WIDTH: tl.constexpr, LANES: tl.constexpr, OFFERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OFFER: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Puts a written tile of scores, (n, m) by its two steps, into the lists (n, WIDTH) of its rows, in place. The
    tile's first column is column `start` of the gallery.

    OFFER: on the way, what is above the last score of its column's list is offered to that list: its score and row go
    into offers and indices (m, OFFERS), in no order; counts (m,) also count offers for which there was no room. LATE:
    only the lists that were offered more than there was room for (n is then the columns of the tile)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = row < n
    if LATE:
        wanted = tl.load(counts + row, mask=wanted, other=0) > OFFERS
    if tl.max(wanted.to(tl.int32), 0) > 0:
        best, where, kth, lane, at, held = _lists(values, columns, row, n, WIDTH, LANES)
        offset, from_ = tl.arange(0, COLUMNS), scores + row.to(tl.int64)[:, None] * row_step
        if LATE:  # down the columns: steps as long as rows
            step = column_step.to(tl.int64)
        else:
            step = column_step
        keep = wanted[:, None] & (offset < m)[None, :]
        following = tl.load(from_ + offset[None, :] * step, mask=keep, other=float("-inf"))
        for begin in range(0, m, COLUMNS):
            column, s = begin + offset, following
            after = column + COLUMNS  # on their way while these are looked at
            keep = wanted[:, None] & (after < m)[None, :]
            following = tl.load(from_ + after[None, :] * step, mask=keep, other=float("-inf"))
            if OFFER:
                offered = s > tl.load(kth_of_columns + column, mask=column < m, other=float("inf"))[None, :]
                if tl.max(tl.max(offered.to(tl.int32), 1), 0) > 0:
                    to = column[None, :] + tl.zeros([ROWS, COLUMNS], tl.int32)
                    place = tl.atomic_add(counts + to, 1, mask=offered, sem="relaxed")
                    room = offered & (place < OFFERS)
                    tl.store(offers + to * OFFERS + place, s, mask=room)
                    tl.store(indices + to * OFFERS + place, to * 0 + row[:, None], mask=room)
            best, where, kth = keep_best(s, (column + start)[None, :], best, where, kth, lane)
        tl.store(values + at, best, mask=held)
        tl.store(columns + at, where, mask=held)


@triton.jit
def _merge_kernel(
    offers, indices, counts, values, columns, n, start,
    WIDTH: tl.constexpr, LANES: tl.constexpr, OFFERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Puts the offers to n columns of a tile into their lists, where there was room for all. The tile's first row is
    row `start` of the gallery."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(counts + row, mask=row < n, other=0)
    count = tl.where(count <= OFFERS, count, 0)
    if tl.max(count, 0) > 0:
        best, where, kth, lane, at, held = _lists(values, columns, row, n, WIDTH, LANES)
        place = tl.arange(0, OFFERS)[None, :]
        some = place < count[:, None]
        s = tl.load(offers + row[:, None] * OFFERS + place, mask=some, other=float("-inf"))
        index = tl.load(indices + row[:, None] * OFFERS + place, mask=some, other=-1)
        best, where, kth = keep_best(s, index + start, best, where, kth, lane)
        tl.store(values + at, best, mask=held)
        tl.store(columns + at, where, mask=held)


def absorb(rows: tuple, columns: tuple | None, s: Tensor, starts: tuple[int, int]) -> None:
    """Puts the scores s (n, m) of a tile into the lists of its rows and, if given, of its columns: pairs of values
    (n, K') and int32 indices (n, K'), in place. starts: the first column and the first row of the tile in the gallery.

    The tile is read once: lists of rows take their scores at once, those of columns are offered theirs. Only where that
    is more than there is room for, the tile is read again."""
    (n, m), width = s.shape, rows[0].size(1)
    tiles = TILES if s.is_cuda else dict.fromkeys(TILES, (32, 64, 4))  # the interpreter counts programs
    shape = width, triton.next_power_of_2(width), OFFERS
    both = columns is not None
    kth = columns[0].amin(1) if both else s
    counts = torch.zeros(m if both else 0, dtype=torch.int32, device=s.device)
    offers = torch.empty(len(counts), OFFERS, device=s.device)
    indices = torch.empty(len(counts), OFFERS, dtype=torch.int32, device=s.device)
    offered = kth, counts, offers, indices
    with torch.cuda.device_of(s):
        lists, scores, warps = tiles["along"]
        sizes = n, m, *s.stride(), starts[0]
        constants = *shape, lists, scores, both, False
        _absorb_kernel[(triton.cdiv(n, lists),)](s, *rows, *sizes, *offered, *constants, num_warps=warps)
        if both:
            lists, _, warps = tiles["merge"]
            merged = offers, indices, counts, *columns, m, starts[1]
            _merge_kernel[(triton.cdiv(m, lists),)](*merged, *shape, lists, num_warps=warps)
            lists, scores, warps = tiles["down"]
            sizes = m, n, *s.T.stride(), starts[1]
            constants = *shape, lists, scores, False, True
            _absorb_kernel[(triton.cdiv(m, lists),)](s, *columns, *sizes, *offered, *constants, num_warps=warps)


def floor(s: Tensor, width: int) -> Tensor:
    """For each row of s a number that its `width` largest scores are above, and most others are not: the row in parts
    (every 128th score), the largest of each, and of these the one in place `width`."""
    size = s.size(1) // FLOOR_PARTS
    if size < 2 or width > FLOOR_PARTS:
        return s.new_full((len(s),), -torch.inf)
    largest = s[:, : FLOOR_PARTS * size].unflatten(1, (size, FLOOR_PARTS)).amax(1)
    return torch.nextafter(largest.topk(width, dim=1).values[:, -1], s.new_tensor(-torch.inf))
