"""Exact similarity + top-k of a gallery against itself, beside its product alone and beside other libraries.

    python bench/mining.py                  # CPU; installs faiss-cpu, scikit-learn and usearch into out/venv-mining
    python bench/mining.py --device cuda    # GPU; torch, and flashlib where it is installed
    python bench/mining.py --check 1        # no times: indices against the float64 reference, N = 1 to 20,000
    python bench/mining.py --rehearse 1 --n 300 --d 64      # what --device cuda measures, on a CPU: does it run?

The floor is the upper triangle of the product, N^2 D floating-point operations, at the speed of torch.mm in this run.
Peers answer the first `slice` queries only, torch.mm four times as many; their seconds are scaled to all N (they are
linear in the queries).
"""

import importlib.util
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import measure

K = 20
PEERS = ("faiss-cpu==1.15.1", "scikit-learn==1.9.1", "usearch==2.26.6", "numpy")


def gallery(n: int, d: int, kind: str = "resnet-like"):
    """(n, d) fp32 unit rows: random, clustered, with duplicates, or non-negative and crowded like ResNet's."""
    import torch

    generator = torch.Generator().manual_seed(n + d)
    if kind == "random":
        x = torch.randn(n, d, generator=generator)
    elif kind == "clustered":
        centres = torch.randn(n // 30 + 1, d, generator=generator)
        x = centres[torch.randint(len(centres), (n,), generator=generator)]
        x = x + 0.3 * torch.randn(n, d, generator=generator)
    else:
        x = torch.rand(n, d, generator=generator) ** 4
    if kind == "duplicates":  # a third of the rows are copies, a few of them dozens of times
        x[: n // 3] = (
            x[torch.randint(n // 3, n // 3 + n // 100 + 1, (n // 3,), generator=generator)] if n > 2 else x[:0]
        )
    return torch.nn.functional.normalize(x, dim=1)


# ---- contestants: prepare with the gallery -> a function that runs once and returns indices (rows, k) ----


def ours(x, rows):
    import torch

    from kernels.similarity_topk import similarity_topk

    itself = torch.arange(len(x), device=x.device)
    return lambda: similarity_topk(x, x, K, itself)[1]


def torch_mm(x, rows):
    import torch

    step = 1000 if not x.is_cuda else 8192
    buffer = torch.empty(step, len(x), device=x.device, dtype=x.dtype)

    def run():
        for start in range(0, rows, step):
            part = x[start : min(start + step, rows)]
            torch.mm(part, x.T, out=buffer[: len(part)])

    return run


def torch_topk(x, rows, padding=0):
    import torch

    def run():
        found = []
        for start in range(0, rows, 1000):
            s = x[start : min(start + 1000, rows)] @ x.T
            at = torch.arange(len(s), device=s.device)
            s[at, at + start] = -2
            s[:, len(x) - padding :] = -2
            found.append(s.topk(K, dim=1).indices)
        return torch.cat(found)

    return run


def faiss(x, rows):
    import faiss

    index = faiss.IndexFlatIP(x.shape[1])
    index.add(x)
    return lambda: index.search(x[:rows], K + 1)[1]


def sklearn(x, rows):
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=K + 1, algorithm="brute", metric="euclidean").fit(x)  # unit rows: same order
    return lambda: index.kneighbors(x[:rows], return_distance=False)


def usearch(x, rows):
    from usearch.index import MetricKind, search

    return lambda: search(x, x[:rows], K + 1, MetricKind.IP, exact=True).keys


def flashlib(x, rows):
    from flashlib import flash_knn

    return lambda: flash_knn(x[:rows], x, K + 1, return_distances=False)  # by distance: unit rows, same order


CONTESTANTS = {f.__name__: f for f in (ours, torch_mm, torch_topk, faiss, sklearn, usearch, flashlib)}


def serve(name: str, path: str, rows: int) -> None:
    """One contestant in a process of its own: its indices of the first rows to PATH.NAME.npy, then its times."""
    import numpy

    x = numpy.load(path)
    if name in ("ours", "torch_mm", "torch_topk"):
        import torch

        x = torch.from_numpy(x)
    run = CONTESTANTS[name](x, rows)
    found = run()
    if found is not None:
        numpy.save(f"{path}.{name}.npy", numpy.asarray(found[:rows]))
    measure.serve(run)


# ---- tables ----


def same_sets(path: str, name: str) -> float:
    """Share of rows for which a peer's neighbours, itself left out, are ours."""
    import numpy

    mine, theirs = numpy.load(f"{path}.ours.npy"), numpy.load(f"{path}.{name}.npy")
    equal = [set(a) == set([j for j in b if j != i][:K]) for i, (a, b) in enumerate(zip(mine, theirs, strict=True))]
    return sum(equal) / len(equal)


def on_cpu(n: int, d: int, rows: int, repeats: int) -> list[dict]:
    import numpy
    import torch

    flags = Path("/proc/cpuinfo").read_text()
    kernel = "SkylakeX" if "avx512f" in flags else "Haswell"  # what OpenBLAS should choose here
    python = measure.venv("mining", *PEERS)
    right = {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_L2_SIZE": None}
    plans = {
        "ours": ("ours", sys.executable, {}, n),
        "torch.mm": ("torch_mm", sys.executable, {}, min(n, 4 * rows)),
        "torch mm + topk": ("torch_topk", sys.executable, {}, rows),
        "faiss IndexFlatIP as installed": ("faiss", python, {}, rows),
        f"faiss OPENBLAS_CORETYPE={kernel}": ("faiss", python, right, rows),
        "sklearn brute": ("sklearn", python, {}, rows),
        "usearch exact": ("usearch", python, {}, rows),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/x.npy"
        numpy.save(path, gallery(n, d).numpy())
        runs, notes, processes = {}, {}, []
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        for label, (name, interpreter, env, asked) in plans.items():
            process = measure.Contestant(
                __file__,
                "--serve",
                name,
                path,
                str(min(asked, rows) if name == "ours" else asked),
                python=interpreter,
                env=threads | env,
            )
            processes.append(process)
            runs[label] = lambda process=process, scale=n / asked: process() * scale
            if name not in ("ours", "torch_mm"):
                share = same_sets(path, name)
                assert share > 0.97, f"{label} finds other neighbours than ours in {1 - share:.1%} of the rows"
                notes[label] = f"{share:.2%} of rows have our neighbours; {asked:,} queries, scaled"
        seconds = measure.interleave(runs, repeats, warm_up=False)  # each has run once
        for process in processes:
            process.close()
    return table(seconds, notes, n, d, "cpu", floor=sorted(seconds["torch.mm"])[repeats // 2] / 2)


def on_gpu(n: int, d: int, repeats: int, device: str) -> list[dict]:
    import torch

    x = gallery(n, d).to(device)
    half = x.half()
    padded = torch.nn.functional.pad(half, (0, 0, 0, -n % 64))  # cuBLAS is a third as fast at odd sizes
    runs = {
        "ours": ours(x, n),
        "torch.mm": torch_mm(padded, n),
        "torch mm + topk": torch_topk(padded, n, -n % 64),
    }
    mine, theirs = (runs[name]()[:1000].sort(1).values for name in ("ours", "torch mm + topk"))
    share = float((mine == theirs).all(1).float().mean())
    notes = {"torch.mm": "fp16", "torch mm + topk": f"fp16, {share:.2%} of rows have our neighbours"}
    if importlib.util.find_spec("flashlib"):
        try:
            runs["flashlib"] = flashlib(half, n)
            found = runs["flashlib"]()[:1000].tolist()
            same = [
                set(a) == set([j for j in b if j != i][:K])
                for i, (a, b) in enumerate(zip(mine.tolist(), found, strict=True))
            ]
            notes["flashlib"] = f"{version('flashlib')}, fp16, {sum(same) / len(same):.2%} of rows have our neighbours"
        except Exception as error:  # noqa: BLE001  a peer that does not run here costs ours nothing
            print(f"flashlib: {type(error).__name__}: {str(error)[:200]}")
            del runs["flashlib"]
    seconds = measure.interleave(
        {name: lambda run=run: measure.clock(run, device) for name, run in runs.items()}, repeats
    )
    if device == "cuda":
        measure.profile("ours", runs["ours"])
    return table(seconds, notes, n, d, device, floor=sorted(seconds["torch.mm"])[repeats // 2] / 2)


def table(seconds: dict, notes: dict, n: int, d: int, device: str, floor: float) -> list[dict]:
    sizes, rows = f"N={n} D={d} k={K}", []
    for name, times in seconds.items():
        rows.append(
            measure.row(
                f"mining: {name}", sizes, device, sorted(times)[len(times) // 2], "s", floor, notes.get(name, "")
            )
        )
    for name in list(seconds)[1:]:
        value, note = (
            measure.ratio(seconds["ours"], seconds[name])
            if name == "torch.mm"
            else measure.ratio(seconds[name], seconds["ours"])
        )
        what = "ours / torch.mm" if name == "torch.mm" else f"{name} / ours"
        rows.append(measure.row(f"mining: {what}", sizes, device, value, "x", note=note))
    return rows


def check(device: str, d: int, largest: int) -> None:
    """Indices equal similarity_topk_reference (float64, every pair) on sampled rows."""
    import torch

    from kernels.similarity_topk import similarity_topk, similarity_topk_reference

    for kind in ("random", "clustered", "duplicates", "resnet-like"):
        for n in [n for n in (1, 2, 3, 20, 33, 500, 5_000, 20_000) if n <= largest]:
            x = gallery(n, d, kind).to(device)
            itself = torch.arange(n, device=device)
            sample = itself if n <= 500 else itself[:: n // 50]
            scores, indices = similarity_topk(x, x, K, itself)
            wanted = similarity_topk_reference(x[sample], x, K, sample)
            assert torch.equal(indices[sample], wanted[1]), (kind, n)
            assert torch.equal(scores[sample], wanted[0].float()), (kind, n)
        print(f"{kind}: indices and scores equal the float64 reference, N = 1 to {n:,}, D = {d} ({device})", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        found = measure.arguments(__doc__, n=0, d=2048, slice=1000, repeats=3, check=0, rehearse=0)
        if found.check:
            widths = (256, 1024) if found.device == "cuda" else (256,)  # on a GPU: the fused kernel, and written tiles
            for width in sorted({min(found.d, width) for width in widths}):
                check(found.device, width, found.n or 20_000)
        elif found.device == "cuda" or found.rehearse:
            measure.publish(on_gpu(found.n or 102_436, found.d, found.repeats, found.device))
        else:
            measure.publish(on_cpu(found.n or 20_000, found.d, found.slice, found.repeats))
