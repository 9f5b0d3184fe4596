"""HN-NCE against the formula written out pair by pair, and against float64 autograd."""

import math
import os

import pytest
import torch
from ranks import run_ranks

from kernels import contrastive, contrastive_torch
from kernels.contrastive import hn_nce, hn_nce_reference, l_tcc

SETTINGS = [(1.0, 0.0, 0.07), (1.0, 0.5, 0.07), (1.0, 0.5, 0.01), (0.5, 0.25, 0.1)]  # alpha, beta, tau


def normalized(n, d, seed, dtype=torch.float64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def written_out(x, c, positive, tau, alpha, beta):
    """The definition with plain exponentials (float64 holds exp(100)), one anchor at a time."""
    s = x @ c.T / tau
    rows, columns = [], []
    for i, own in enumerate(positive.tolist()):
        row_negatives = [s[i, j] for j in range(len(c)) if j != own]
        column_negatives = [s[k, own] for k in range(len(x)) if int(positive[k]) != own]
        for losses, negatives in ((rows, row_negatives), (columns, column_negatives)):
            total = sum(torch.exp(beta * v) for v in negatives)
            hard = 0.0
            for value in negatives:
                weight = len(negatives) * torch.exp(beta * value) / total
                hard = hard + weight * torch.exp(value)
            own_term = torch.exp(s[i, own])
            losses.append(-torch.log(own_term / (alpha * own_term + hard)))
    return torch.stack(rows), torch.stack(columns)


def errors(found, wanted) -> list[float]:
    """The largest error of each tensor, relative to its largest entry."""
    found, wanted = ([t.detach().double().cpu() for t in tensors] for tensors in (found, wanted))
    largest = [float((got - want).abs().max() / want.abs().max()) for got, want in zip(found, wanted, strict=True)]
    assert all(map(math.isfinite, largest))
    return largest


def fixture():
    c = torch.arange(1, 13, dtype=torch.float64).reshape(4, 3) % 5 - 2
    t = (torch.arange(12, dtype=torch.float64).reshape(4, 3) * 3) % 7 - 3
    return torch.nn.functional.normalize(c, dim=1), torch.nn.functional.normalize(t, dim=1)


@pytest.mark.parametrize(
    "setting, wanted", zip(SETTINGS, [22.966267, 24.382970, 162.113560, 16.745643], strict=True), ids=str
)
def test_fixture(setting, wanted):
    alpha, beta, tau = setting
    c, t = fixture()
    for x, y in ((c, t), (t, c)):
        assert float(l_tcc(x, y, 4, tau, alpha, beta)) == pytest.approx(wanted, abs=1e-6)  # published to six decimals
        assert float(l_tcc(x.float(), y.float(), 4, tau, alpha, beta)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("alpha, beta, tau", SETTINGS)
@pytest.mark.parametrize("n, m, seed", [(7, 7, 0), (13, 21, 1), (9, 5, 2)])  # 9 rows on 5 columns: shared positives
def test_equals_the_formula_and_its_autograd(n, m, seed, alpha, beta, tau, monkeypatch):
    monkeypatch.setattr(contrastive_torch, "BLOCK", 4 * m)  # several blocks, the last one partial
    generator = torch.Generator().manual_seed(seed)
    positive = torch.randperm(m, generator=generator)[:n] if n <= m else torch.randint(0, m, (n,), generator=generator)
    weight = torch.rand(2, n, generator=generator, dtype=torch.float64)

    def run(function, dtype):
        x, c = normalized(n, 6, seed + 10, dtype).requires_grad_(), normalized(m, 6, seed + 20, dtype).requires_grad_()
        t = torch.tensor(tau, dtype=dtype, requires_grad=True)
        rows, columns = function(x, c, positive, t, alpha, beta)
        return rows, columns, *torch.autograd.grad((weight[0] * rows).sum() + (weight[1] * columns).sum(), (x, c, t))

    wanted = run(written_out, torch.float64)
    plain = max(errors(run(hn_nce_reference, torch.float32), wanted))  # what fp32 itself loses, on this machine
    for function, dtype, tolerance in (
        (hn_nce_reference, torch.float64, 1e-10),
        (hn_nce, torch.float64, 1e-10),
        (hn_nce, torch.float32, 1e-5 + 4 * plain),
    ):
        found = run(function, dtype)
        assert all(got.dtype == dtype for got in found)
        assert max(errors(found, wanted)) <= tolerance


def test_l_tcc_is_two_terms_and_one_without_auxiliary():
    x, c = normalized(11, 8, 3), normalized(11, 8, 4)
    both = l_tcc(x, c, 5, 0.05, 1.0, 0.5)
    parts = [written_out(x[:n], c[:n], torch.arange(n), 0.05, 1.0, 0.5) for n in (5, 11)]
    truth = [rows.mean() + columns.mean() for rows, columns in parts]
    torch.testing.assert_close(both, truth[0] + truth[1])
    torch.testing.assert_close(l_tcc(x, c, 11, 0.05, 1.0, 0.5), truth[1])
    torch.testing.assert_close(l_tcc(x, c, 0, 0.05, 1.0, 0.5), truth[1])


def two_terms(x, c, n_human, tau, alpha, beta, bank=None):
    """Eq. 2 pair by pair: the bank's rows are negatives of every column of c and have no loss."""
    total = 0.0
    for n in sorted({n_human, len(x)} - {0}):
        s = torch.cat([x[:n], bank] if bank is not None else [x[:n]]) @ c[:n].T / tau
        for i in range(n):
            for values in (s[i], s[:, i]):
                others = torch.cat([values[:i], values[i + 1 :]])
                weights = torch.log_softmax(beta * others, 0) + math.log(max(1, len(others)))
                own = values[i : i + 1]  # by logarithms: fp32 has no exp(100)
                total = total + (torch.cat([own + math.log(alpha), weights + others]).logsumexp(0) - own[0]) / n
    return total


def value_and_gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("alpha, beta, tau", SETTINGS)
@pytest.mark.parametrize("n_human, k", [(5, 0), (5, 4), (12, 3), (0, 2), (1, 3)])
def test_both_terms_and_the_bank_in_one_pass(alpha, beta, tau, n_human, k, monkeypatch):
    monkeypatch.setattr(contrastive_torch, "BLOCK", 3 * 12)

    def run(function, dtype):
        x, c = (normalized(12, 6, seed, dtype).requires_grad_() for seed in (30, 31))
        t = torch.tensor(tau, dtype=dtype, requires_grad=True)
        bank = normalized(k, 6, 2, dtype) if k else None
        return value_and_gradients(function(x, c, n_human, t, alpha, beta, bank), x, c, t)

    wanted = run(two_terms, torch.float64)
    plain = max(errors(run(two_terms, torch.float32), wanted))  # what fp32 itself loses, on this machine
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5 + 4 * plain)):
        found = run(l_tcc, dtype)
        assert all(got.dtype == dtype for got in found)
        assert max(errors(found, wanted)) <= tolerance


@pytest.mark.parametrize(
    "parts", [((3, 4), (3, 4)), ((5, 0), (1, 4)), ((0, 0), (4, 5), (2, 1)), ((0, 3), (0, 2))], ids=str
)
@pytest.mark.parametrize("k", [0, 5])
def test_ranks_have_the_gradients_of_the_whole(parts, k):
    """Human and pseudo triplets of each rank; their shares add up to the loss of the batch [human | pseudo]."""
    human, total = sum(h for h, _ in parts), sum(h + p for h, p in parts)
    x, c = normalized(total, 6, 40), normalized(total, 6, 41)
    bank = normalized(k, 6, 42) if k else None
    places, starts = [], [0, human]
    for sizes in parts:
        places.append(torch.cat([torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)]))
        starts = [s + n for s, n in zip(starts, sizes, strict=True)]

    def share():
        rank = int(os.environ["RANK"])
        mine = [t[places[rank]].clone().requires_grad_() for t in (x, c)]
        tau = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        loss = contrastive.l_tcc_ranks(*mine, parts[rank][0], tau, 1.0, 0.5, bank)
        return list(value_and_gradients(3 * loss, *mine, tau))

    results = run_ranks(len(parts), share)
    x, c, tau = x.requires_grad_(), c.requires_grad_(), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    wanted = value_and_gradients(3 * l_tcc(x, c, human, tau, 1.0, 0.5, bank), x, c, tau)
    for i in (0, 3):
        torch.testing.assert_close(sum(result[i] for result in results), wanted[i], rtol=1e-12, atol=0)
    for i in (1, 2):
        for result, rows in zip(results, places, strict=True):
            torch.testing.assert_close(result[i], wanted[i][rows], rtol=1e-9, atol=1e-13)


def test_beta_zero_is_cross_entropy_in_both_directions():
    x, c = normalized(9, 5, 5), normalized(9, 5, 6)
    rows, columns = hn_nce(x, c, torch.arange(9), 0.07)
    logits = x @ c.T / 0.07
    for got, z in ((rows, logits), (columns, logits.T)):
        torch.testing.assert_close(got, torch.nn.functional.cross_entropy(z, torch.arange(9), reduction="none"))


@pytest.mark.parametrize("alpha, beta, tau", SETTINGS)
def test_gradients_of_a_row_and_of_a_column_sum_to_zero(alpha, beta, tau):
    x = (torch.rand(8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 2 - 1).requires_grad_()
    for which, dim in ((0, 1), (1, 0)):  # c = identity: the gradient of x is the gradient of s over tau
        loss = hn_nce(x, torch.eye(8, dtype=torch.float64), torch.arange(8), tau, alpha, beta)[which].sum()
        (g,) = torch.autograd.grad(loss, x)
        assert g.sum(dim).abs().max() < 1e-10 * g.abs().max()
        off = g - torch.diag(torch.diag(g))
        assert torch.diag(g).max() < 0
        if beta == 0:
            assert off.min() >= 0


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_at_cosine_one(beta, sign):
    """tau = 0.01, all embeddings alike (or opposite): exp(1 / tau) is inf in fp32."""
    x = torch.zeros(6, 4)
    x[:, 0] = 1
    x.requires_grad_()
    c = (sign * x).detach().requires_grad_()
    tau = torch.tensor(0.01, requires_grad=True)
    loss = l_tcc(x, c, 3, tau, 1.0, beta)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(3) + 2 * math.log(6), rel=1e-5)
    assert all(t.grad.isfinite().all() for t in (x, c, tau))


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.0), (1.0, 0.5), (0.5, 0.5)])
def test_no_negatives(alpha, beta):
    x, c = normalized(1, 4, 8).requires_grad_(), normalized(1, 4, 9).requires_grad_()
    loss = l_tcc(x, c, 1, 0.01, alpha, beta)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(alpha), abs=1e-12)
    assert not x.grad.any() and not c.grad.any()
    # one column for two rows: the rows have no negatives, neither has the column
    rows, columns = hn_nce(normalized(2, 4, 8), c, torch.tensor([0, 0]), 0.01, alpha, beta)
    assert torch.cat([rows, columns]).tolist() == pytest.approx([math.log(alpha)] * 4, abs=1e-12)


def test_blocks_change_nothing_and_nothing_square_is_kept(monkeypatch):
    x, c = normalized(200, 16, 10, torch.float32).requires_grad_(), normalized(200, 16, 11, torch.float32)

    def small(t):
        assert t.numel() <= 200 * 16
        return t

    results = []
    for block in (1, 7 * 200, 1 << 30):
        monkeypatch.setattr(contrastive_torch, "BLOCK", block)
        with torch.autograd.graph.saved_tensors_hooks(small, lambda t: t):
            loss = l_tcc(x, c, 120, 0.02, 1.0, 0.5)
        results.append((loss, *torch.autograd.grad(loss, x)))
    for result in results[1:]:
        torch.testing.assert_close(result[0], results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(result[1], results[0][1], rtol=1e-4, atol=1e-6)


def test_bf16_and_autocast_compute_in_fp32():
    x, c = normalized(20, 8, 12).bfloat16().requires_grad_(), normalized(20, 8, 13).bfloat16()
    wanted = l_tcc(x.double(), c.double(), 20, 0.01, 1.0, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = l_tcc(x, c, 20, 0.01, 1.0, 0.5)
        loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]), 0.1), "wanted"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 2]), 0.1), "0..1"),
        ((torch.zeros(0, 3), torch.zeros(2, 3), torch.tensor([], dtype=torch.int64), 0.1), "at least one row"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), 0.0), "tau > 0"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), 0.1, 0.0), "alpha > 0"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        hn_nce(*arguments)
