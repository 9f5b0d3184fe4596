"""The reversed loss of a Combiner, forward + backward: factorised in blocks, beside the plain form of all pairs.

    python bench/reversed.py                          # B = 512, D = 256, p = 2560, h = 5120: peak memory and seconds
    python bench/reversed.py --peer_b 32              # the plain form, at a B whose pairs fit in memory

Floor: the three products h x D of each pair (logits, and their two gradients), 6 B^2 h D FLOP, at the speed of one
large matrix product of this machine. The plain form is measured at --peer_b and its memory scaled by (B / peer_b)^2.
"""

import measure
import torch
import torch.nn.functional as F

from kernels.reversed import reversed_combiner, reversed_reference

TAU = 0.01


def inputs(b: int, d: int, p: int, h: int, device: str = "cpu") -> tuple[list, torch.Tensor]:
    """reference, text, target (B, D); W_t, W_v (p, D), W_u, W_l (h, 2 p), W_o (D, h), w (h,); positives (B,)."""
    torch.manual_seed(0)
    shapes = [(b, d)] * 3 + [(p, d)] * 2 + [(h, 2 * p)] * 2 + [(d, h), (h,)]
    leaves = [torch.randn(shape, device=device).div_(shape[-1] ** 0.5) for shape in shapes]
    leaves[0] = F.normalize(leaves[0], dim=1)
    return [x.requires_grad_() for x in leaves], torch.arange(b, device=device)


def factorised(leaves: list, positive: torch.Tensor) -> torch.Tensor:
    reference, text, target, w_t, w_v, w_u, w_l, w_o, w = leaves
    p, zero = len(w_t), w.new_zeros(len(w_o))
    t, v = F.relu(text @ w_t.T), F.relu(target @ w_v.T)
    hidden, gate = ((t @ half[:, :p].T, v @ half[:, p:].T) for half in (w_u, w_l))
    return reversed_combiner(reference, text, target, hidden, gate, (w_o, zero), (w, zero[0]), positive, TAU)


def plain(leaves: list, positive: torch.Tensor) -> torch.Tensor:
    reference, text, target, w_t, w_v, w_u, w_l, w_o, w = leaves

    def compose(image, text):
        r = torch.cat([F.relu(text @ w_t.T), F.relu(image @ w_v.T)], dim=1)
        lam = torch.sigmoid(F.relu(r @ w_l.T) @ w)[:, None]
        return F.relu(r @ w_u.T) @ w_o.T + lam * text + (1 - lam) * image

    return reversed_reference(compose, reference, text, target, positive, TAU)


FORMS = {"factorised": factorised, "plain": plain}


def main() -> None:
    given = measure.arguments(__doc__, form="", b=512, d=256, p=2560, h=5120, peer_b=32, repeats=1)
    b = given.peer_b if given.form == "plain" else given.b
    if given.form:  # one contestant: its peak in a fresh process, then its seconds on demand
        leaves, positive = inputs(b, given.d, given.p, given.h, given.device)

        def step() -> None:
            for x in leaves:
                x.grad = None
            FORMS[given.form](leaves, positive).backward()

        measure.serve(step, measure.peak_bytes(step, given.device), given.device)
        return
    size = [f"--{name}={getattr(given, name)}" for name in ("b", "d", "p", "h", "peer_b", "device")]
    contestants = {form: measure.Contestant(__file__, f"--form={form}", *size) for form in FORMS}
    seconds = {form: [contestant() for _ in range(given.repeats)] for form, contestant in contestants.items()}
    x = torch.randn(4096, given.h, device=given.device)
    w = torch.randn(given.h, given.d, device=given.device)
    speed = min(measure.clock(lambda: x @ w, given.device) for _ in range(5))
    per_pair = speed / 4096 * 3
    rows, sizes = [], f"D={given.d} p={given.p} h={given.h}"
    for form, contestant in contestants.items():
        n = given.peer_b if form == "plain" else given.b
        peak, took = contestant.ready / 2**20, min(seconds[form])
        scaled = "" if n == given.b else f"at B={given.b}: {peak * (given.b / n) ** 2 / 1024:.0f} GiB"
        at = (f"B={n} {sizes}", given.device)
        rows.append(measure.row(f"reversed loss, {form}: peak", *at, peak, "MiB", note=scaled))
        rows.append(measure.row(f"reversed loss, {form}: time", *at, took, "s", floor=per_pair * n * n))
        contestant.close()
    measure.publish(rows)


if __name__ == "__main__":
    main()
