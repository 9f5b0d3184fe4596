"""similarity_topk against a brute-force float64 oracle written here: order, ties, near ties, exclusion, padding."""

import numpy
import pytest
import torch

from kernels import similarity_topk as module
from kernels.similarity_topk import exact_dot, exact_topk, full_precision, similarity_topk, similarity_topk_reference


def oracle(queries, gallery, k, exclude=None):
    scores = queries.double().numpy() @ gallery.double().numpy().T
    rows = []
    for i, row in enumerate(scores):
        columns = [j for j in range(len(row)) if exclude is None or j != int(exclude[i])]
        best = sorted(columns, key=lambda j: (-row[j], j))[:k]
        rows.append(best + [-1] * (k - len(best)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(queries), k)


def unit(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


def grid(n, d, seed):
    """Small integers / 4: every float64 sum is exact in any order, and equal scores abound."""
    return torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)) / 4


@pytest.mark.parametrize(
    "n, m, d, k",
    [(1, 1, 1, 1), (3, 7, 5, 2), (17, 300, 33, 20), (64, 257, 100, 5), (5, 40, 8, 40), (5, 9, 8, 20), (99, 999, 7, 50)],
)
def test_equals_brute_force(n, m, d, k):
    for make in (unit, grid):
        queries, gallery = make(n, d, n + m), make(m, d, n * m + 1)
        exclude = torch.arange(n) % (m + 1) - 1  # -1 excludes nothing
        for ex in (None, exclude):
            scores, indices = similarity_topk(queries, gallery, k, ex)
            wanted = oracle(queries, gallery, k, ex)
            assert torch.equal(indices, wanted)
            assert scores.dtype == torch.float32 and indices.dtype == torch.int64
            exact = (queries.double()[:, None] * gallery.double()[wanted.clamp(min=0)]).sum(-1)
            exact[wanted < 0] = -torch.inf
            torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-7)
            ref_scores, ref_indices = similarity_topk_reference(queries, gallery, k, ex)
            assert torch.equal(ref_indices, indices) and torch.equal(ref_scores.float(), scores)


def test_near_ties_inside_the_shortlist():
    """Thirty near copies: fp32 misorders them around rank k, the shortlist holds them all."""
    base, noise = unit(1, 64, 0).double(), torch.randn(30, 64, generator=torch.Generator().manual_seed(1)) * 3e-8
    gallery = torch.cat([unit(50, 64, 2), (base + noise).float(), unit(300, 64, 3)])
    queries = base.float().expand(5, -1) + 1e-3 * unit(5, 64, 4)
    _, indices = similarity_topk(queries, gallery, 20)
    assert torch.equal(indices, oracle(queries, gallery, 20))
    assert not torch.equal(indices.sort().values, (queries @ gallery.T).topk(20).indices.sort().values)


@pytest.mark.parametrize("copies, noise", [(400, 0.0), (400, 1e-8), (200, 1e-6)])
def test_near_ties_wider_than_the_shortlist(copies, noise, monkeypatch):
    """Hundreds of (nearly) equal images: fp32 cannot order them, the shortlist cannot hold them: no certificate."""
    scanned = []
    scan = module._rescan
    monkeypatch.setattr(module, "_rescan", lambda *args: scanned.extend(args[0]) or scan(*args))
    base = unit(1, 64, 0).double()
    jitter = torch.randn(copies, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * noise
    gallery = torch.cat([unit(50, 64, 2), (base + jitter).float(), unit(50, 64, 3)])
    queries = torch.cat([gallery[60:64], unit(4, 64, 4)])
    exclude = torch.tensor([60, 61, 62, 63, -1, -1, -1, -1])
    scores, indices = similarity_topk(queries, gallery, 20, exclude)
    assert torch.equal(indices, similarity_topk_reference(queries, gallery, 20, exclude)[1])
    # independent: float64 with numpy's own sum, equal up to its rounding (1e-15 at most here)
    exact = queries.double().numpy() @ gallery.double().numpy().T
    for i, row in enumerate(indices.tolist()):
        others = numpy.delete(exact[i], row + ([exclude[i]] if exclude[i] >= 0 else []))
        assert exact[i][row].min() >= others.max() - 1e-14
        assert (numpy.diff(exact[i][row]) <= 1e-14).all()
        if noise == 0 and i < 4:
            assert row == [j for j in range(50, 450) if j != exclude[i]][:20]
    assert len(scanned) >= 4


def test_no_certificate_needed_on_ordinary_galleries(monkeypatch):
    monkeypatch.setattr(module, "_rescan", lambda *args: pytest.fail("an ordinary row was scanned"))
    similarity_topk(unit(40, 128, 0), unit(2000, 128, 1), 20)


def test_tiles_and_row_split_change_nothing(monkeypatch):
    queries, gallery = unit(50, 96, 5), unit(700, 96, 6)
    scores, indices = exact_topk(queries, gallery, 10)
    for tile, exact_block in ((1, 1), (7, 96 * 13), (64, 1 << 20), (1 << 30, 1 << 30)):
        monkeypatch.setattr(module, "EXACT_BLOCK", {"cpu": exact_block})
        parts = [exact_topk(queries[i : i + 13], gallery, 10, tile=tile) for i in range(0, 50, 13)]
        assert torch.equal(torch.cat([p[0] for p in parts]), scores)
        assert torch.equal(torch.cat([p[1] for p in parts]), indices)


def resnet_like(n, d, seed):
    """Non-negative, crowded cosines around 0.6, some exact and some near duplicates."""
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) ** 4
    x[n // 2 : n // 2 + n // 10] = x[: n // 10]
    x[-(n // 10) - 1 :] = x[0] + 1e-6 * x[-(n // 10) - 1 :]
    return torch.nn.functional.normalize(x, dim=1)


@pytest.mark.parametrize("make", [unit, grid, resnet_like])
@pytest.mark.parametrize("n, tile", [(1, 8), (2, 8), (21, 8), (130, 32), (333, 50)])
def test_gallery_against_itself_computes_half(make, n, tile, monkeypatch):
    """The symmetric path: every tile on and above the diagonal once, the same answer as the dense one."""
    gallery = make(n, 40, n)
    tiles = []
    for exclude in (None, torch.arange(n)):
        scores, indices = exact_topk(gallery, gallery, 20, exclude, tile, lambda order: tiles.extend(order) or order)
        wanted = similarity_topk_reference(gallery, gallery, 20, exclude)
        assert torch.equal(indices, wanted[1]) and torch.equal(scores, wanted[0])
        dense = exact_topk(gallery.clone(), gallery, 20, exclude, tile)
        assert torch.equal(indices, dense[1]) and torch.equal(scores, dense[0])
    side = -(-n // tile)
    assert len(tiles) == len(set(tiles)) * 2 == side * (side + 1)
    shifted = (torch.arange(n) + 1) % n  # excludes another than itself: not symmetric
    assert torch.equal(
        exact_topk(gallery, gallery, 5, shifted, tile)[1], similarity_topk_reference(gallery, gallery, 5, shifted)[1]
    )


def test_exact_dot_is_exact_and_order_fixed():
    from fractions import Fraction

    a, b = unit(20, 37, 7), unit(20, 37, 8)
    for x, y, got in zip(a.tolist(), b.tolist(), exact_dot(a, b).tolist(), strict=True):
        truth = sum((Fraction(p) * Fraction(q) for p, q in zip(x, y, strict=True)), Fraction(0))
        assert abs(float(truth) - got) <= 1e-16
    assert torch.equal(exact_dot(a, b)[3:9], exact_dot(a[3:9], b[3:9]))
    assert torch.equal(exact_dot(a[:, None], b[None])[:, 4], exact_dot(a, b[4].expand_as(a)))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_low_precision_settings_do_not_reach_the_product(precision):
    queries, gallery = unit(30, 256, 9), unit(3000, 256, 10)
    wanted = similarity_topk(queries, gallery, 20)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = similarity_topk(queries, gallery, 20)
            with full_precision(torch.device("cpu")):
                product = queries @ gallery.T
                if hasattr(torch.backends, "fp32_precision"):  # not every CPU has the bf16 products to go wrong with
                    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[0], wanted[0])
    exact = queries.double() @ gallery.double().T
    assert product.dtype == torch.float32 and (product - exact).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    queries, gallery = unit(20, 48, 11).to(dtype), unit(500, 48, 12).to(dtype)
    scores, indices = similarity_topk(queries, gallery, 9)
    assert torch.equal(indices, oracle(queries, gallery, 9))


def test_empty_and_bad_inputs():
    scores, indices = similarity_topk(torch.zeros(0, 4), unit(3, 4, 0), 2)
    assert scores.shape == indices.shape == (0, 2)
    scores, indices = similarity_topk(unit(2, 4, 0), torch.zeros(0, 4), 3)
    assert (indices == -1).all() and (scores == -torch.inf).all()
    bad = unit(5, 4, 0)
    bad[3, 1] = torch.nan
    for arguments, words in [
        ((unit(2, 4, 0), bad, 1), "gallery row 3"),
        ((bad, unit(2, 4, 0), 1), "queries row 3"),
        ((unit(2, 4, 0), unit(2, 5, 0), 1), "wanted"),
        ((unit(2, 4, 0), unit(2, 4, 0), 0), "k must"),
        ((unit(2, 4, 0), unit(2, 4, 0), 1, torch.tensor([0, 2])), "column 2"),
        ((unit(2, 4, 0), unit(2, 4, 0), 1, torch.tensor([0])), "one integer per query"),
    ]:
        with pytest.raises(ValueError, match=words):
            similarity_topk(*arguments)
