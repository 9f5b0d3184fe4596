"""Tile sizes of the Triton kernels on this GPU: the committed ones first, then candidates, fastest last.

    python bench/sweep.py                   # compiles with --workers processes, then times each candidate alone
    python bench/sweep.py --only absorb     # the cases whose name begins so, or with one of several: mining,absorb
    python bench/sweep.py --small 64        # sizes divided by 64: does it run?
    TRITON_INTERPRET=1 python bench/sweep.py --workers 0 --small 6400 --first 2 --repeats 1     # no GPU: does it run?

A case is a public step of the kernels at a size that users have. A candidate that this GPU cannot hold says so, and one
that gives other numbers than the first that ran, the committed one if it did, is WRONG. Prints a table and writes it to
--out, a csv.

`mining` times mining as a whole under tiles of the kernel that reads a tile of scores along its rows, and of the one
that merges what it offers to columns: the two `absorb` cases offer scores to lists that hold better ones, as most tiles
do, but while lists fill, a row takes one score a round, and each round looks at all that a program holds.
"""

import csv
import functools
import subprocess
import sys
import time

import measure  # first: it puts the repository on the path
import mining
import torch

from kernels import best_lists, contrastive_triton, decoding
from kernels import rows as taken_rows
from kernels import similarity_topk as topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else None
MINING = [(best_lists.TILES["along"], best_lists.TILES["merge"])]
MINING += [(along, (4, 0, 4)) for along in ((1, 256, 1), (1, 512, 1), (2, 256, 2))] + [((1, 128, 1), (1, 0, 1))]
PROPOSE = [
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3), (64, 256, 64, 8, 4),
    (64, 256, 64, 4, 3), (128, 256, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 128, 128, 4, 3),
    (128, 128, 128, 8, 2), (32, 256, 64, 4, 3), (64, 128, 64, 8, 4), (32, 128, 64, 4, 4),
]  # fmt: skip
NARROW = list(dict.fromkeys([topk.NARROW_TILES.get(CAPABILITY, PROPOSE[0]), *PROPOSE]))
SUMS = [
    (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3),
    (128, 256, 64, 8, 3), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (128, 128, 128, 8, 2),
]  # fmt: skip
STRIP_SUMS = [
    (16, 128, 1, 3), (16, 128, 1, 1), (64, 32, 1, 3), (32, 64, 1, 3), (32, 64, 1, 1), (32, 32, 1, 3), (32, 32, 1, 1),
    (16, 64, 1, 3), (16, 64, 1, 1), (8, 128, 1, 3), (64, 32, 1, 1), (16, 256, 2, 3), (32, 64, 2, 3), (32, 128, 2, 3),
]  # fmt: skip
MERGE = [(8, 128, 4), (4, 128, 2), (8, 128, 8), (4, 128, 4), (8, 64, 4), (16, 64, 4), (16, 128, 8)]
FLASH = [
    (128, 64, 8, 3), (64, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2),
    (128, 64, 8, 1), (64, 32, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2),
]  # fmt: skip
STRIP = [(16, 128, 4, 1), (1, 1024, 4, 1), (2, 512, 4, 1), (4, 256, 4, 1), (8, 128, 4, 1), (4, 512, 4, 1)]
STRIP += [(2, 1024, 8, 1), (8, 256, 4, 1), (32, 128, 4, 1), (32, 64, 4, 1), (16, 128, 8, 1), (16, 256, 8, 1)]
STRIP += [(16, 256, 4, 1), (16, 256, 2, 1), (8, 256, 2, 1), (8, 128, 2, 1), (8, 256, 1, 1), (4, 256, 1, 1)]
ALONG = [best_lists.TILES["along"], (1, 256, 1), (1, 512, 1), (1, 512, 2), (2, 256, 1), (2, 256, 2), (2, 128, 1)]
ALONG += [(1, 1024, 2), (1, 1024, 4), (4, 256, 4), (4, 128, 2)]
ROTATE = [decoding.TILES["rotate"], (16, 4), (8, 2), (4, 1), (16, 2), (16, 1), (32, 8)]
ROWS = [taken_rows.TILE, (4, 1024, 4), (8, 512, 2), (16, 512, 4), (4, 512, 2), (2, 1024, 4)]
ONE_TOKEN = [decoding.TILES["one token"], (16, 2), (32, 2), (32, 4), (8, 1), (4, 1)]


def put_tile(kernel: str, candidate: tuple) -> None:
    """Puts a candidate in the place the loss looks at."""
    found = contrastive_triton.TILES.get(CAPABILITY, contrastive_triton.OTHER_TILES)
    contrastive_triton.TILES[CAPABILITY] = found | {kernel: candidate}


def half(n: int, d: int, dtype=torch.float16, seed: int = 0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(n, d, device=DEVICE, generator=generator)
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def propose(n: int, m: int, d: int):
    """The fused proposal; work in FLOP."""
    q, g = half(n, d), half(m, d, seed=1)
    return lambda candidate: topk._propose_fused(q, g, 32, None, candidate)[0], 2 * n * m * d


def whole(n: int, d: int):
    """A gallery against itself; work in FLOP, half of the product."""
    x, itself = mining.gallery(n, d).to(DEVICE), torch.arange(n, device=DEVICE)

    def run(candidate):
        best_lists.TILES["along"], best_lists.TILES["merge"] = candidate
        return topk.similarity_topk(x, x, mining.K, itself)[0]

    return run, n * n * d


def absorb(both: bool, n: int, d: int):
    """A tile of scores into lists, of rows or of rows and columns, that hold better ones; work in bytes."""
    q = half(2 * n, d)
    scores = q[:n].float() @ q[n:].float().T
    values = torch.full((n, 48), -torch.inf, device=DEVICE)
    lists = values, torch.full((n, 48), -1, dtype=torch.int32, device=DEVICE)
    best_lists.absorb(lists, None, scores * 1.02, (0, 0))  # better ones than the tile's
    of_columns = tuple(x.clone() for x in lists) if both else None
    start = lists[0].clone()

    def run(candidate):
        best_lists.TILES["along"] = candidate
        for values, _ in (lists, of_columns or lists):
            values.copy_(start)
        best_lists.absorb(lists, of_columns, scores, (n, 0))
        return lambda: lists[0].sort(1).values  # a list is in no order

    return run, 4 * n * n


def loss(kernel: str, n: int, d: int, dtype):
    """Sums, or the gradient, of l_tcc with n triplets; work in FLOP."""
    x, c = half(n, d, dtype), half(n, d, dtype, seed=1)
    label, scale = torch.arange(n, device=DEVICE), torch.tensor(100.0, device=DEVICE)
    shape = x, c, label, 0, 0, 0, scale, 0.5

    def sums(candidate):
        put_tile(kernel, candidate)
        rows, columns = contrastive_triton.statistics(*shape)
        return rows[1], columns[1]  # the other group is empty

    vectors = [torch.full((2, 3, n), 1.0, device=DEVICE) for _ in "rc"]

    def gradient(candidate):
        put_tile(kernel, candidate)
        return contrastive_triton.gradient(*shape, vectors, torch.ones(n, device=DEVICE))

    return (sums, 2 * n * n * d) if kernel in ("sums", "strip sums", "merge") else (gradient, 6 * n * n * d)


def rotate(n: int, tokens: int, heads: int):
    """Keys or queries of new tokens of Llama-2-13B; work in bytes."""
    x = half(n * tokens * heads, 128, torch.bfloat16).view(n, tokens, heads, 128)
    cos, sin = (half(tokens, 128, torch.bfloat16)[:, None] for _ in "cs")

    def run(candidate):
        decoding.TILES["rotate"] = candidate
        return decoding.rotate(x, cos, sin)

    return run, 4 * x.numel()


def gradients(n: int, places: int, width: int):
    """Back from the rows of attention, 40 places of which all rows share; work in bytes read and written."""
    own = torch.arange(n * places, device=DEVICE).view(n, places)
    own[:, : places // 3] = own[0, : places // 3]
    gather, grads = taken_rows.Gather(own, n * places), half(n * places, width, torch.bfloat16)
    rows = torch.zeros(n * places, 1, width, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    taken = gather(rows).view_as(grads)

    def run(candidate):
        taken_rows.TILE, rows.grad = candidate, None
        taken.backward(grads, retain_graph=True)
        return rows.grad

    return run, 4 * grads.numel()


def one_token(n: int, places: int, heads: int):
    """Attention of a decoding step of Llama-2-13B, one layer; work in bytes of keys and values."""
    q = half(n * heads, 128, torch.bfloat16).view(n, 1, heads, 128)
    keys, values = (half(n * places * heads, 128, torch.bfloat16).view(n, places, heads, 128) for _ in "kv")
    last = torch.tensor([places - 1], device=DEVICE)

    def run(candidate):
        decoding.TILES["one token"] = candidate
        return decoding.one_token_attention(q, keys, values, last)

    return run, 4 * keys.numel()


def cases(small: int) -> dict:
    """name -> (what prepares it, its candidates)."""
    size = lambda n: max(16, n // small)  # noqa: E731
    bf16 = torch.bfloat16
    return {
        "mining as a whole D=2048, N=102,436": (lambda: whole(size(102_436), 2048), MINING),
        "rotate, 512 x 41 tokens": (lambda: rotate(size(512), size(41), size(40)), ROTATE),
        "one token, 512 rows, 122 places": (lambda: one_token(size(512), size(122), size(40)), ONE_TOKEN),
        "rows taken, 64 x 122 of 5,120": (lambda: gradients(size(64), size(122), size(5120)), ROWS),
        "propose D=2048, 16,384 x 102,400": (lambda: propose(size(16_384), size(102_400), 2048), PROPOSE),
        "propose D=256, 16,384 x 409,600": (lambda: propose(size(16_384), size(409_600), 256), NARROW),
        "absorb for rows, 8,192 x 8,192": (lambda: absorb(False, size(8192), 2048), ALONG),
        "absorb for rows and columns, 8,192 x 8,192": (lambda: absorb(True, size(8192), 2048), ALONG),
        "sums bf16 D=256, B=32,768": (lambda: loss("sums", size(32_768), 256, bf16), SUMS),
        "strip sums bf16 D=768, B=32,768": (lambda: loss("strip sums", size(32_768), 768, bf16), STRIP_SUMS),
        "merge bf16 D=768, B=32,768": (lambda: loss("merge", size(32_768), 768, bf16), MERGE),
        "flash bf16 D=256, B=32,768": (lambda: loss("flash", size(32_768), 256, bf16), FLASH),
        "strip bf16 D=768, B=32,768": (lambda: loss("strip", size(32_768), 768, bf16), STRIP),
    }


def result_of(run, candidate):
    result = run(candidate)
    return result() if callable(result) else result


def same(found, wanted) -> bool:
    """Whether two tiles give the same but for rounding."""
    for a, b in zip(*(x if isinstance(x, tuple | list) else (x,) for x in (found, wanted)), strict=True):
        usual = float(b[b.isfinite()].float().abs().mean())
        if not torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02 * usual):
            return False
    return True


def median_ms(run, repeats: int) -> float:
    """Milliseconds by the GPU's own clock, the median; by the wall's without a GPU."""
    run()
    found = []
    if DEVICE == "cpu":
        return sorted(measure.clock(run) for _ in range(repeats))[repeats // 2] * 1e3
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return sorted(found)[repeats // 2]


def main() -> None:
    found = measure.arguments(__doc__, only="", small=1, workers=8, share="", repeats=7, first=0, out="")
    if DEVICE == "cpu" and not topk.INTERPRET:
        sys.exit("no GPU: set TRITON_INTERPRET=1")
    only = tuple(found.only.split(","))
    chosen = {name: case for name, case in cases(found.small).items() if name.startswith(only)}
    share, of = map(int, found.share.split("/")) if found.share else (0, 1)
    if not found.share:  # Triton keeps what it compiled on disk: many compile first, then one measures alone
        argv = [sys.executable, *sys.argv]
        workers = [subprocess.Popen([*argv, "--share", f"{i}/{found.workers}"]) for i in range(found.workers)]
        for worker in workers:
            worker.wait()
    rows, began = [], time.time()
    for name, (prepare, candidates) in chosen.items():
        run, work = prepare()
        times, wanted = {}, None
        for i, candidate in enumerate(candidates[: found.first or None]):
            if i % of != share:
                continue
            times[candidate] = float("nan")
            try:
                result = result_of(run, candidate)
                wanted = result if wanted is None else wanted
                if same(result, wanted):
                    times[candidate] = median_ms(functools.partial(run, candidate), 1 if found.share else found.repeats)
                else:
                    print(f"{name} {candidate}: WRONG: other numbers than the first that ran", flush=True)
            except Exception as error:  # noqa: BLE001  too many registers, too much shared memory: the row says so
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
