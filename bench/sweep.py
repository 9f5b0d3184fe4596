"""Tile sizes of the Triton kernels on this GPU: the committed ones first, then candidates, fastest last.

    python bench/sweep.py                   # compiles with --workers processes, then times each candidate alone
    python bench/sweep.py --only absorb     # the cases whose name begins so
    python bench/sweep.py --small 64        # sizes divided by 64: does it run?

A case is a public step of the kernels at a size that users have. A candidate that this GPU cannot hold says so. Prints
a table and writes it to --out, a csv.
"""

import csv
import functools
import subprocess
import sys
import time

import measure  # first: it puts the repository on the path
import torch

from kernels import contrastive
from kernels import similarity_topk as topk

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
PROPOSE = [
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3), (64, 256, 64, 8, 4),
    (64, 256, 64, 4, 3), (128, 256, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 128, 4, 3),
    (128, 128, 128, 8, 2), (32, 256, 64, 4, 3), (64, 128, 64, 8, 4), (32, 128, 64, 4, 4),
]  # fmt: skip
SUMS = [
    (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3),
    (128, 256, 64, 8, 3), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (128, 128, 128, 8, 2),
]  # fmt: skip
SUMS_ALONG = [(2, 1024, 4), (1, 1024, 4), (1, 2048, 4), (4, 512, 4), (1, 512, 2), (2, 512, 2), (1, 2048, 8)]
SUMS_ALONG += [(2, 2048, 8), (8, 256, 4), (1, 1024, 2), (4, 1024, 8), (1, 4096, 8)]
SUMS_DOWN = [(256, 8, 4), (128, 8, 4), (128, 16, 4), (64, 16, 4), (64, 32, 4), (256, 4, 4), (512, 4, 4), (256, 8, 8)]
SUMS_DOWN += [(128, 8, 2), (256, 4, 2), (512, 2, 4), (256, 16, 8), (512, 1, 4)]
FLASH = [
    (128, 64, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2),
    (128, 64, 8, 1), (64, 32, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2),
]  # fmt: skip
STRIP = [(16, 128, 4, 1), (1, 1024, 4, 1), (2, 512, 4, 1), (4, 256, 4, 1), (8, 128, 4, 1), (4, 512, 4, 1)]
STRIP += [(2, 1024, 8, 1), (8, 256, 4, 1), (32, 128, 4, 1), (32, 64, 4, 1), (16, 128, 8, 1), (16, 256, 8, 1)]
ALONG = [(1, 512, 1), (2, 256, 1), (1, 256, 1), (1, 1024, 2), (2, 512, 2), (1, 1024, 4), (2, 1024, 4), (4, 512, 4)]
ALONG += [(16, 256, 8), (4, 1024, 8), (1, 2048, 4), (4, 256, 2), (8, 128, 2)]
DOWN = [(16, 256, 4), (8, 256, 4), (32, 128, 8), (8, 128, 2), (64, 128, 8), (16, 128, 4), (8, 512, 4), (16, 512, 8)]
DOWN += [(16, 256, 8), (32, 256, 8), (8, 512, 8), (16, 64, 1), (16, 128, 2)]


def tiles_of(module, name: str, value: tuple) -> None:
    """Puts a candidate in the place the kernel looks at."""
    if module is topk:
        topk.TILES[CAPABILITY] = value
    else:
        found = dict(contrastive.TILES.get(CAPABILITY, contrastive.OTHER_TILES))
        contrastive.TILES[CAPABILITY] = found | {name: value}


def half(n: int, d: int, dtype=torch.float16, seed: int = 0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(n, d, device="cuda", generator=generator)
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def propose(n: int, m: int, d: int):
    """The fused proposal; work in FLOP."""
    q, g = half(n, d), half(m, d, seed=1)
    return lambda candidate: topk._propose_fused(q, g, 32, None, candidate), 2 * n * m * d


def absorb(down: bool, n: int, d: int):
    """A tile of scores into lists that hold better ones; work in bytes."""
    q = half(2 * n, d)
    scores = q[:n].float() @ q[n:].float().T
    values = torch.full((n, 32), -torch.inf, device="cuda")
    columns = torch.full((n, 32), -1, dtype=torch.int32, device="cuda")
    topk._absorb_triton(values, columns, scores * 1.02, 0, down, None)  # better ones than the tile's

    def run(candidate):
        topk.ABSORB_TILES[down] = candidate
        topk._absorb_triton(values, columns, scores, n, down, None)

    return run, 4 * n * n


def loss(kernel: str, n: int, d: int, dtype):
    """Sums, or the gradient, of l_tcc with n triplets; work in FLOP (in bytes for `strip`)."""
    x, c = half(n, d, dtype), half(n, d, dtype, seed=1)
    label, scale = torch.arange(n, device="cuda"), torch.tensor(100.0, device="cuda")
    shape = x, c, label, 0, 0, 0, scale, 0.5

    def sums(candidate):
        tiles_of(contrastive, kernel, candidate)
        return contrastive._statistics_triton(*shape)

    vectors = [torch.full((2, 3, n), 1.0, device="cuda") for _ in "rc"]

    def gradient(candidate):
        tiles_of(contrastive, kernel, candidate)
        return contrastive._gradient_triton(*shape, vectors, torch.ones(n, device="cuda"))

    return (sums, 2 * n * n * d) if "sums" in kernel else (gradient, 6 * n * n * d)


def cases(small: int) -> dict:
    """name -> (what prepares it, its candidates)."""
    size = lambda n: max(256, n // small)  # noqa: E731
    bf16 = torch.bfloat16
    return {
        "propose D=2048, 16,384 x 102,400": (lambda: propose(size(16_384), size(102_400), 2048), PROPOSE),
        "propose D=256, 16,384 x 409,600": (lambda: propose(size(16_384), size(409_600), 256), PROPOSE),
        "absorb along rows, 8,192 x 8,192": (lambda: absorb(False, size(8192), 2048), ALONG),
        "absorb down columns, 8,192 x 8,192": (lambda: absorb(True, size(8192), 2048), DOWN),
        "sums bf16 D=256, B=32,768": (lambda: loss("sums", size(32_768), 256, bf16), SUMS),
        "sums along bf16 D=768, B=32,768": (lambda: loss("sums along", size(32_768), 768, bf16), SUMS_ALONG),
        "sums down bf16 D=768, B=32,768": (lambda: loss("sums down", size(32_768), 768, bf16), SUMS_DOWN),
        "flash bf16 D=256, B=32,768": (lambda: loss("flash", size(32_768), 256, bf16), FLASH),
        "strip bf16 D=768, B=32,768": (lambda: loss("strip", size(32_768), 768, bf16), STRIP),
    }


def median_ms(run, repeats: int) -> float:
    """Milliseconds by the GPU's own clock, the median."""
    run()
    found = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return sorted(found)[repeats // 2]


def main() -> None:
    found = measure.arguments(__doc__, only="", small=1, workers=8, share="", repeats=7, out="")
    chosen = {name: case for name, case in cases(found.small).items() if name.startswith(found.only)}
    share, of = map(int, found.share.split("/")) if found.share else (0, 1)
    if not found.share:  # Triton keeps what it compiled on disk: many compile first, then one measures alone
        argv = [sys.executable, *sys.argv]
        workers = [subprocess.Popen([*argv, "--share", f"{i}/{found.workers}"]) for i in range(found.workers)]
        for worker in workers:
            worker.wait()
    rows, began = [], time.time()
    for name, (prepare, candidates) in chosen.items():
        run, work = prepare()
        times = {}
        for i, candidate in enumerate(candidates):
            if i % of != share:
                continue
            try:
                times[candidate] = median_ms(functools.partial(run, candidate), 1 if found.share else found.repeats)
            except Exception as error:  # noqa: BLE001  too many registers, too much shared memory: the row says so
                times[candidate] = float("nan")
                print(f"{name} {candidate}: {type(error).__name__}: {str(error)[:90]}", flush=True)
        if found.share:
            continue
        committed = times[candidates[0]]
        for candidate, ms in sorted(times.items(), key=lambda pair: -pair[1]):
            rows.append([name, " ".join(map(str, candidate)), f"{ms:.4f}", f"{work / ms / 1e9:.1f}"])
            mark = "  <- committed" * (candidate == candidates[0])
            print(f"{name}  {str(candidate):24} {ms:8.3f} ms  {work / ms / 1e9:7.1f} T/s  {committed / ms:5.2f}x{mark}")
        print(f"({time.time() - began:.0f} s)", flush=True)
    if found.out and not found.share:
        with open(found.out, "w", newline="") as file:
            csv.writer(file).writerows([["case", "tile", "ms", "T/s"], *rows])


if __name__ == "__main__":
    main()
