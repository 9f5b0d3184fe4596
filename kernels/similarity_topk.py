"""The k most similar gallery rows of every query, exactly as float64 orders them.

score(i, j) = sum_d q_id g_jd. A product of two fp32 numbers is exact in float64 (24 + 24 <= 53 bits); the sum is taken
by halving, in one fixed order, with elementwise additions only. So a score is the same bits on every device, for every
block size and every number of ranks. Rows are sorted by score, descending; equal scores by index, ascending.

Doing that for all N x M pairs is slow, so a fast fp32 product only *proposes* the best K' > k of each row, and exact
scores of those K' decide. The proposal is certified row by row: an fp32 dot product, summed in any order, is off by at
most

    bound_i = gamma |q_i| max_j |g_j|,    gamma = n u / (1 - n u),    u = 2^-24,    n = D + 8

(n = D for the products and sums; 8 more cover the rounding of inputs given in float64). Whatever was not proposed
scores at most (approximate K'-th) + bound_i, hence if (exact k-th) > (approximate K'-th) + bound_i, the k best are
among the K'. A row without this certificate (many near ties) is scored again, over every column that could still be
among its k best.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 1 << 25  # scores held at a time by the fp32 pass (128 MiB): N x M is never written
EXACT_BLOCK = 1 << 20  # float64 products held at a time (8 MiB: stays in cache)


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


# ---- PyTorch ----


def _propose(queries: Tensor, gallery: Tensor, width: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 proposal: the `width` highest approximate scores of each row and their columns, (N, width) each, unordered
    among equals; an excluded column has score -inf."""
    block = max(1, BLOCK // len(gallery))
    scores, indices = [], []
    for start in range(0, len(queries), block):
        rows = queries[start : start + block] @ gallery.T  # (block, M)
        if exclude is not None:
            _mask(rows, exclude[start : start + block])
        top = rows.topk(width, dim=1)
        scores.append(top.values)
        indices.append(top.indices)
    return torch.cat(scores), torch.cat(indices)


def _mask(rows: Tensor, exclude: Tensor) -> None:
    at = exclude.ge(0).nonzero()[:, 0]
    rows[at, exclude[at]] = -torch.inf


def _exact_scores(queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Float64 scores (P,) of P pairs (row, column)."""
    block = max(1, EXACT_BLOCK // gallery.size(1))
    pairs = zip(rows.split(block), columns.split(block), strict=True)
    return torch.cat([exact_dot(queries[r], gallery[c]) for r, c in pairs])


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


def _scan(query: Tensor, gallery: Tensor, k: int, exclude: Tensor | None, kth: Tensor, bound: Tensor):
    """One row (1, D) without certificate: every column that could still reach kth is scored exactly."""
    row = query.float() @ gallery.float().T
    if exclude is not None:
        _mask(row, exclude)
    columns = (row[0].double() >= kth - bound).nonzero()[:, 0]  # ascending
    exact = _exact_scores(query, gallery, torch.zeros_like(columns), columns)
    exact, order = exact.sort(descending=True, stable=True)
    return exact[:k], columns[order[:k]]


# ---- public ----


@torch.no_grad()
def similarity_topk(queries: Tensor, gallery: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """queries (N, D), gallery (M, D) -> scores (N, k) fp32, indices (N, k) int64; by score descending, index ascending.

    exclude (N,) int64: one gallery index a row may not return (its own image, its reference), -1 for none.
    Rows with fewer than k columns are padded: score -inf, index -1. ValueError for wrong shapes, NaN and infinity."""
    if queries.ndim != 2 or gallery.ndim != 2 or queries.size(1) != gallery.size(1) or queries.size(1) == 0:
        raise ValueError(f"queries (N, D) and gallery (M, D) wanted, found {(*queries.shape,)} and {(*gallery.shape,)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if exclude is not None:
        if exclude.shape != (len(queries),) or exclude.is_floating_point():
            raise ValueError(f"exclude: one integer per query wanted, found {(*exclude.shape,)} {exclude.dtype}")
        if exclude.numel() and int(exclude.max()) >= len(gallery):
            raise ValueError(f"exclude names column {int(exclude.max())} of a gallery of {len(gallery)}")
    lengths = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in (queries, gallery)]
    for name, length in zip(("queries", "gallery"), lengths, strict=True):
        bad = length.isfinite().logical_not().nonzero()[:, 0]
        if len(bad):
            raise ValueError(f"{name} row {int(bad[0])} holds NaN or infinity ({len(bad)} such rows)")

    n, m = len(queries), len(gallery)
    scores = torch.full((n, k), -torch.inf, dtype=torch.float64, device=queries.device)
    indices = torch.full((n, k), -1, dtype=torch.int64, device=queries.device)
    if n and m:
        found = min(k, m)
        terms = (queries.size(1) + 8) * 2.0**-24
        bound = terms / (1 - terms) * lengths[0] * lengths[1].max()  # (N,)
        wide = min(m, 2 * k + 32)  # K': a certificate fails only if 32 + k scores lie within the bound of the k-th
        with full_precision(queries.device):
            proposal, columns = _propose(queries.float(), gallery.float(), wide, exclude)
            scores[:, :found], indices[:, :found] = _decide(queries, gallery, found, proposal, columns, bound)
            doubtful = scores[:, -1] <= proposal.amin(1).double() + bound if wide < m else torch.zeros(0)
            for i in doubtful.nonzero()[:, 0].tolist():
                own = None if exclude is None else exclude[i : i + 1]
                scores[i], indices[i] = _scan(queries[i : i + 1], gallery, k, own, scores[i, -1], bound[i])
    indices[scores == -torch.inf] = -1
    return scores.float(), indices
