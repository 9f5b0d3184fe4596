"""The reversed loss against its definition with every pair composed, in float64; its memory at the size of CLIP4Cir."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels import reversed as ours

TAU, ROOT = 0.05, Path(__file__).parent.parent


def features(n: int, m: int, d: int, dtype=torch.float64, seed: int = 0):
    whole = torch.Generator().manual_seed(seed)
    reference, text, target = (torch.randn(k, d, generator=whole, dtype=torch.float64) for k in (n, n, m))
    positive = torch.randint(m, (n,), generator=whole)
    leaves = [F.normalize(reference, dim=1), 0.7 * text, 1.3 * target, torch.tensor(TAU, dtype=torch.float64)]
    return [x.to(dtype).requires_grad_() for x in leaves], positive


def layers(d: int, p: int, h: int, dtype=torch.float64):
    """A Combiner's W_t, W_v, W_u, W_o, W_l, w as (weight, bias)."""
    whole = torch.Generator().manual_seed(7)
    sizes = {"t": (p, d), "v": (p, d), "u": (h, 2 * p), "o": (d, h), "l": (h, 2 * p), "w": (1, h)}
    draw = {}
    for name, (rows, columns) in sizes.items():
        weight = torch.randn(rows, columns, generator=whole, dtype=torch.float64) / math.sqrt(columns)
        bias = 0.1 * torch.randn(rows, generator=whole, dtype=torch.float64)
        draw[name] = (weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_())
    return draw


def combiner(w: dict, keep_u=None, keep_l=None):
    """f(image, text) as Baldrati et al. write it, on whole pairs; keep_*: dropout masks of pairs (N M, h)."""

    def compose(image, text):
        r = torch.cat([F.relu(F.linear(text, *w["t"])), F.relu(F.linear(image, *w["v"]))], dim=1)
        u, gate = F.relu(F.linear(r, *w["u"])), F.relu(F.linear(r, *w["l"]))
        u, gate = u if keep_u is None else u * keep_u, gate if keep_l is None else gate * keep_l
        lam = torch.sigmoid(F.linear(gate, *w["w"]))
        return F.linear(u, *w["o"]) + lam * text + (1 - lam) * image

    return compose


def factorised(w: dict, reference, text, target, positive, tau, drop=None):
    """The same through reversed_combiner; drop: (units of u (N, h), units of l (N, h), rate)."""
    p = w["t"][0].shape[0]
    t, v = F.relu(F.linear(text, *w["t"])), F.relu(F.linear(target, *w["v"]))
    halves, scale = [], 1.0
    for i, name in enumerate("ul"):
        weight, bias = w[name]
        first = F.linear(t, weight[:, :p], bias)
        if drop:
            first, scale = first.masked_fill(drop[i], -torch.inf), 1 / (1 - drop[2])
        halves.append((first, F.linear(v, weight[:, p:])))
    out, gate_out = (w["o"][0] * scale, w["o"][1]), (w["w"][0][0] * scale, w["w"][1][0])
    return ours.reversed_combiner(reference, text, target, *halves, out, gate_out, positive, tau)


def close(leaves: list, one: torch.Tensor, two: torch.Tensor, rtol: float) -> None:
    """Values and gradients of two graphs over the same leaves, relative to the largest entry of each gradient."""
    torch.testing.assert_close(one, two, rtol=rtol, atol=0)
    for a, b in zip(*(torch.autograd.grad(3 * loss, leaves) for loss in (one, two)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))
        assert b.abs().max() > 0


@pytest.mark.parametrize("block", [1 << 24, 40])
def test_closed_form_equals_the_definition(monkeypatch, block):
    monkeypatch.setattr(ours, "BLOCK", block)  # 40: three rows of 13 at a time, the last block shorter
    (reference, text, target, tau), positive = features(11, 13, 5)
    wanted = ours.reversed_reference(torch.add, reference, text, target, positive, tau)
    found = ours.reversed_sum(reference, text, target, positive, tau)
    close([reference, text, target, tau], found, wanted, 1e-12)


def test_the_definition_is_the_papers():
    """One logit at a time with numpy: which target, changed by text i, gives reference i?"""
    leaves, positive = features(4, 6, 3)
    reference, text, target = (x.detach().numpy() for x in leaves[:3])
    total = 0.0
    for i in range(4):
        logits = []
        for j in range(6):
            z = target[j] + text[i]
            logits.append(float(z @ reference[i]) / (np.linalg.norm(z) * np.linalg.norm(reference[i]) * TAU))
        total += math.log(sum(math.exp(x) for x in logits)) - logits[int(positive[i])]
    leaves = [x.detach() for x in leaves[:3]]
    for form in (ours.reversed_reference(torch.add, *leaves, positive, TAU), ours.reversed_sum(*leaves, positive, TAU)):
        assert float(form) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("block", [1 << 24, 500])
@pytest.mark.parametrize("dropout", [False, True])
def test_factorised_combiner_equals_the_definition(monkeypatch, block, dropout):
    monkeypatch.setattr(ours, "BLOCK", block)
    n, m, h, rate = 7, 9, 17, 0.5
    leaves, positive = features(n, m, 5)
    w = layers(5, 6, h)
    drop, keep = None, (None, None)
    if dropout:
        whole = torch.Generator().manual_seed(3)
        drop = [torch.rand(n, h, generator=whole) < rate for _ in range(2)]
        keep = [(~mask).double().repeat_interleave(m, 0) / (1 - rate) for mask in drop]
        drop.append(rate)
    wanted = ours.reversed_reference(combiner(w, *keep), *leaves[:3], positive, leaves[3])
    found = factorised(w, *leaves[:3], positive, leaves[3], drop)
    close([*leaves, *(x for pair in w.values() for x in pair)], found, wanted, 1e-11)


def test_a_share_of_the_rows_is_a_share_of_the_loss():
    """What each rank computes: its own rows against the targets of all."""
    (reference, text, target, _), positive = features(10, 12, 5)
    w = layers(5, 6, 8)
    for form in (ours.reversed_sum, functools.partial(factorised, w)):
        whole = form(reference, text, target, positive, TAU)
        parts = [form(reference[s], text[s], target, positive[s], TAU) for s in (slice(0, 4), slice(4, 10))]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    assert ours.reversed_sum(reference[:0], text[:0], target, positive[:0], TAU).item() == 0


def test_single_precision_and_extremes():
    leaves, positive = features(40, 40, 64, torch.float32)
    w = layers(64, 32, 64, torch.float32)
    wide, w64 = [x.detach().double().requires_grad_() for x in leaves], layers(64, 32, 64)
    for run, exact in (
        (ours.reversed_sum, functools.partial(ours.reversed_reference, torch.add)),
        (functools.partial(factorised, w), functools.partial(ours.reversed_reference, combiner(w64))),
    ):
        found, wanted = run(*leaves[:3], positive, leaves[3]), exact(*wide[:3], positive, wide[3])
        assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-5)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, wide), strict=True):
            assert (a.double() - b).abs().max() < 1e-4 * b.abs().max()
    # a text that undoes its target, and the smallest temperature: finite
    target = torch.eye(3, 8)
    text = (-target).clone().requires_grad_()
    loss = ours.reversed_sum(F.normalize(torch.ones(3, 8), dim=1), text, target, torch.arange(3), 0.001)
    (grad,) = torch.autograd.grad(loss, text)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()


def test_wrong_shapes_are_refused():
    (reference, text, target, _), positive = features(4, 5, 3)
    with pytest.raises(ValueError, match="wanted"):
        ours.reversed_sum(reference, text[:3], target, positive, TAU)
    with pytest.raises(ValueError, match="positive"):
        ours.reversed_sum(reference, text, target, positive + 5, TAU)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_memory_is_a_block_not_all_pairs():
    """Peak of a fresh process while the loss runs, at 1/16 of the bench's pairs and blocks of 4 MiB."""
    code = """
import sys, torch
sys.path.insert(0, "bench")
import measure
from bench import reversed as bench
from kernels import reversed as ours
torch.set_num_threads(1)
ours.BLOCK = 1 << 20
leaves, positive = bench.inputs(128, 64, 640, 1280)
print(measure.peak_bytes(lambda: bench.factorised(leaves, positive).backward()) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120  # MiB; one B x B x h array alone takes 80, and the plain form keeps several


def test_half_precision_products_stay_near():
    """As under autocast: the pairs' products in bf16, lengths and logits in fp32."""
    leaves, positive = features(24, 24, 32, torch.float32)
    w = layers(32, 16, 48, torch.float32)
    exact = factorised(w, *leaves[:3], positive, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        p = 16
        t, v = F.relu(F.linear(leaves[1], *w["t"])), F.relu(F.linear(leaves[2], *w["v"]))
        hidden, gate = ((F.linear(t, w[n][0][:, :p], w[n][1]), F.linear(v, w[n][0][:, p:])) for n in "ul")
        out, gate_out = ((w[n][0].bfloat16(), w[n][1]) for n in "ow")
        gate_out = gate_out[0][0], gate_out[1][0]
        found = ours.reversed_combiner(*leaves[:3], hidden, gate, out, gate_out, positive, 0.2)
        plain = ours.reversed_reference(combiner(w), *leaves[:3], positive, 0.2)  # what bf16 loses, on this machine
    assert hidden[0].dtype == torch.bfloat16 and found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.01)
    inputs = [leaves[1], w["u"][0]]
    grads = [torch.autograd.grad(loss, inputs) for loss in (found, exact, plain)]
    for a, b, c in zip(*grads, strict=True):
        lost = float((c - b).norm() / b.norm())
        assert lost < 0.1 and (a - b).norm() < (0.03 + lost) * b.norm()
