"""The k most similar rows of a gallery for each of its own, where neither the gallery nor the answer fits in memory.

Some anchors at a time meet the gallery block by block. An exact score is the same bits in whatever block it is computed
(similarity_topk.py), so the k best of all blocks are the k best of the whole: the same bytes as in one piece. What that
costs: a pair of pictures is scored twice, once for each of the two, and the gallery is read once for each lot of
anchors, from wherever it is mapped."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.similarity_topk import exact_topk


def topk_in_blocks(
    gallery: Tensor,
    anchors: range,
    k: int,
    rows: int,
    columns: int,
    device: torch.device,
    tile: int | None = None,
    progress=iter,
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """gallery (M, D) in host memory or mapped from a file -> (some of anchors, scores (n, k) float64, indices (n, k)),
    `rows` anchors at a time, on device; itself left out, sorted as exact_topk does.

    columns: rows of the gallery that are on the device at a time. progress: wraps the list of (anchor, column)."""
    for anchor, column in progress([(i, j) for i in anchors[::rows] for j in range(0, len(gallery), columns)]):
        some = range(anchor, min(anchor + rows, anchors.stop))
        if column == 0:
            best, queries, blocks = None, gallery[some.start : some.stop].to(device), _blocks(gallery, columns, device)
        block = next(blocks)

        # the best of this block, then of all so far: stable, so that equal scores stay in the order of the gallery
        itself = torch.arange(some.start, some.stop, device=device) - column
        itself = torch.where((itself >= 0) & (itself < len(block)), itself, -1)
        scores, indices = exact_topk(queries, block, k, itself, tile)
        indices = torch.where(indices >= 0, indices + column, -1)
        if best is not None:
            scores, order = torch.cat([best[0], scores], 1).sort(dim=1, descending=True, stable=True)
            scores, indices = scores[:, :k], torch.cat([best[1], indices], 1).gather(1, order[:, :k])
        best = scores, indices
        if column + columns >= len(gallery):
            yield some, *best


def _blocks(gallery: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """`size` rows at a time on the device. On a GPU the next ones travel there while some are worked on; they are
    read from the disk before."""
    parts = gallery.split(size)
    if device.type != "cuda":
        yield from parts
        return
    copies = torch.cuda.Stream(device)

    def copied(part: Tensor) -> Tensor:
        with torch.cuda.stream(copies):
            return part.pin_memory().to(device, non_blocking=True)

    following = copied(parts[0])
    for i in range(len(parts)):
        torch.cuda.current_stream(device).wait_stream(copies)
        block = following
        block.record_stream(torch.cuda.current_stream(device))  # its memory is not given to a copy while it is read
        following = copied(parts[i + 1]) if i + 1 < len(parts) else None
        yield block
