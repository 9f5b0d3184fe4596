"""HN-NCE in both directions, value and gradients, beside the same loss with autograd and beside open_clip's ClipLoss.

    python bench/loss.py                    # CPU, B = 8,192, D = 256
    python bench/loss.py --device cuda      # GPU, D = 768, B = 65,536, and the paper's 512 + 512 in a CUDA graph
    python bench/loss.py --rehearse 1 --b 600 --d 300       # the same on a CPU, without the graph: does it run?

The floor is 8 B^2 D floating-point operations, four products of (B, D) and (B, B), at the speed of torch.mm in this
run. Memory is what a step takes above the embeddings. ClipLoss is less work: no hard-negative weights.
"""

import importlib.util
import sys
from importlib.metadata import version

import measure

TAU, BETA = 0.01, 0.5  # [S3.3], BLIP


def batch(b: int, d: int, device: str):
    """x, c (B, D): normalised, row i of one near row i of the other, as after some training."""
    import torch

    generator = torch.Generator().manual_seed(b + d)
    x = torch.nn.functional.normalize(torch.randn(b, d, generator=generator), dim=1)
    c = torch.nn.functional.normalize(x + 2 * d**-0.5 * torch.randn(b, d, generator=generator), dim=1)
    return x.to(device).requires_grad_(), c.to(device).requires_grad_()


def ours(x, c):
    from kernels.contrastive import l_tcc

    return l_tcc(x, c, len(x), TAU, 1.0, BETA)


def eager(x, c):
    """The definition in the log domain, left to autograd (what a user would write)."""
    import math

    import torch

    s = (x @ c.T) / TAU
    own = torch.diagonal(s)
    negative = s.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -torch.inf)
    loss = 0.0
    for dim in (1, 0):
        weights = BETA * negative - torch.logsumexp(BETA * negative, dim, keepdim=True) + math.log(len(x) - 1)
        loss = loss + (torch.logaddexp(own, torch.logsumexp(negative + weights, dim)) - own).mean()
    return loss


def clip_loss(x, c):
    """open_clip's ClipLoss on one GPU: two products, two cross entropies (summed here, as ours)."""
    import torch

    label = torch.arange(len(x), device=x.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy((x / TAU) @ c.T, label) + cross_entropy((c / TAU) @ x.T, label)


def inf_cl(x, c):
    """Inf-CL's memory-saving CLIP loss in Triton: sums in fp32, products in TF32, whatever the inputs (less work: no
    hard-negative weights)."""
    from inf_cl import cal_inf_loss

    return cal_inf_loss(x, c, scale=1 / TAU) + cal_inf_loss(c, x, scale=1 / TAU)


def products(x, c):
    """The floor: the four products and nothing else, a block of rows at a time."""
    import torch

    with torch.no_grad():
        held, dx, dc = torch.empty(256, len(c)), torch.empty_like(x), torch.zeros_like(c)
        for start in range(0, len(x), 256):
            part = x[start : start + 256]
            s = held[: len(part)]
            for _ in range(2):
                torch.mm(part, c.T, out=s)
            torch.mm(s, c, out=dx[start : start + 256])
            dc.addmm_(s.T, part)


CONTESTANTS = {f.__name__: f for f in (ours, eager, clip_loss, inf_cl, products)}


def step(name: str, x, c):
    def run():
        x.grad = c.grad = None
        loss = CONTESTANTS[name](x, c)
        if loss is not None:
            loss.backward()
        return loss

    return run


def serve(name: str, b: int, d: int) -> None:
    x, c = batch(b, d, "cpu")
    run = step(name, x, c)
    step(name, *batch(64, d, "cpu"))()  # threads and libraries are up before memory is measured
    results = []
    peak = measure.peak_bytes(lambda: results.append(run()))
    sums = [] if results[0] is None else [results[0].item(), x.grad.norm().item(), c.grad.norm().item()]
    x.grad = c.grad = None
    results.clear()
    measure.serve(run, {"bytes": peak, "check": sums})


def on_cpu(b: int, d: int, repeats: int) -> list[dict]:
    import torch

    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    labels = {"ours": "ours", "eager": "eager HN-NCE", "clip_loss": "open_clip's form", "products": "products alone"}
    processes = {n: measure.Contestant(__file__, "--serve", n, str(b), str(d), env=threads) for n in labels}
    for mine, theirs in zip(processes["ours"].ready["check"], processes["eager"].ready["check"], strict=True):
        assert abs(mine - theirs) <= 1e-4 * abs(theirs), f"ours and eager differ: {mine}, {theirs}"
    seconds = measure.interleave(dict(processes), repeats, warm_up=False)  # each has run once
    for process in processes.values():
        process.close()
    sizes, rows, floor = f"B={b} D={d} beta={BETA}", [], sorted(seconds["products"])[repeats // 2]
    memory = {name: process.ready["bytes"] / 2**20 for name, process in processes.items()}
    for name, label in labels.items():
        rows.append(measure.row(f"loss: {label}", sizes, "cpu", sorted(seconds[name])[repeats // 2], "s", floor))
    for name in ("ours", "eager", "clip_loss"):
        rows.append(measure.row(f"loss: {labels[name]}, memory", sizes, "cpu", memory[name], "MiB"))
    for name in ("eager", "clip_loss"):
        value, note = measure.ratio(seconds[name], seconds["ours"])
        rows.append(measure.row(f"loss: {labels[name]} / ours", sizes, "cpu", value, "x", note=note))
        saved = memory[name] / memory["ours"]
        rows.append(measure.row(f"loss: {labels[name]} / ours, memory", sizes, "cpu", saved, "x"))
    return rows


def ours_alone(b: int, d: int, repeats: int, device: str) -> list[dict]:
    import torch

    from kernels.contrastive import l_tcc

    rows, sizes = [], f"B={b} D={d} beta={BETA} bf16"
    x, c = (t.detach().bfloat16().requires_grad_() for t in batch(b, d, device))
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    runs = {
        "ours": lambda: measure.clock(step("ours", x, c), device),
        "mm": lambda: measure.clock(lambda: a @ a, device),
    }
    memory = measure.peak_bytes(step("ours", x, c), device) / 2**20
    seconds = measure.interleave(runs, repeats)
    if device == "cuda" and importlib.util.find_spec("inf_cl"):
        try:
            step("inf_cl", *batch(256, d, device))()  # compiles
            theirs = measure.clock(step("inf_cl", x, c), device)  # seconds: once will do
            ours = sorted(seconds["ours"])[repeats // 2]
            rows.append(
                measure.row(f"loss: inf-cl {version('inf_cl')}", sizes, device, theirs, "s", note="CLIP loss, TF32")
            )
            rows.append(measure.row("loss: inf-cl / ours", sizes, device, theirs / ours, "x", note="1 round"))
        except Exception as error:  # noqa: BLE001  a peer that does not run here costs ours nothing
            print(f"inf-cl: {type(error).__name__}: {str(error)[:200]}")
    took, speed = sorted(seconds["ours"])[repeats // 2], 2 * n**3 / sorted(seconds["mm"])[repeats // 2]
    rows.append(measure.row("loss: ours", sizes, device, took, "s", 8 * b * b * d / speed))
    rows.append(measure.row("loss: ours", sizes, device, 8e-12 * b * b * d / took, "TFLOP/s", speed * 1e-12))
    rows.append(measure.row("loss: ours, memory", sizes, device, memory, "MiB"))
    if device == "cuda":
        measure.profile(f"ours, {sizes}", step("ours", x, c))
        x, c = (t.detach().bfloat16().requires_grad_() for t in batch(2 * b, d, device))
        memory = measure.peak_bytes(step("ours", x, c), device) / 2**20
        took = min(measure.clock(step("ours", x, c), device) for _ in range(2))
        sizes = f"B={2 * b} D={d} beta={BETA} bf16"
        rows.append(measure.row("loss: ours", sizes, device, took, "s", 32 * b * b * d / speed))
        rows.append(measure.row("loss: ours, memory", sizes, device, memory, "MiB"))

    x, c = batch(1024, 256, device)
    tau = torch.tensor(TAU, device=device, requires_grad=True)
    both = lambda: torch.autograd.grad(l_tcc(x, c, 512, tau, 1.0, BETA), (x, c, tau))  # noqa: E731
    if device == "cpu":
        took = sorted(measure.clock(both) for _ in range(repeats))[repeats // 2]
        sizes = f"B=512+512 D=256 beta={BETA} fp32"
        return [*rows, measure.row("loss: ours", sizes, device, took * 1e6, "us")]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    for got, want in zip(captured, both(), strict=True):
        torch.testing.assert_close(got, want)
    measure.profile("512 + 512", graph.replay)
    took = sorted(measure.clock(graph.replay, device, calls=100) for _ in range(repeats))[repeats // 2]
    sizes = f"B=512+512 D=256 beta={BETA} fp32, CUDA graph"
    return [*rows, measure.row("loss: ours", sizes, device, took * 1e6, "us")]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        found = measure.arguments(__doc__, b=0, d=0, repeats=3, rehearse=0)
        if found.device == "cuda" or found.rehearse:
            measure.publish(ours_alone(found.b or 65_536, found.d or 768, found.repeats, found.device))
        else:
            measure.publish(on_cpu(found.b or 8192, found.d or 256, found.repeats))
