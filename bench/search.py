"""A query over a gallery of 100,000 pictures: time after the text is encoded, and memory above start.

    python bench/search.py                       # synthetic features, 768 wide: 307 MB on the disk
    python bench/search.py --n 10000 --width 256

The features are written as search.py's index keeps them, mapped, and searched by its own functions in a process of its
own; its answer is first compared with float64 products in numpy. The floor is one pass over the features at the speed
of a copy of as many bytes.
"""

import os
import sys
import tempfile
from pathlib import Path

import measure

TOP = 48


def mapped(file: str, n: int, width: int):
    """The gallery and the engine that search.py would have over these features; the query is given, so no model."""
    import numpy as np
    import torch

    from common.encoding import Compute
    from common.gallery import _HEADER, Engine, Gallery

    features = torch.from_numpy(np.memmap(file, "<f4", "c", _HEADER, (n, width)))
    names = {id: f"{id:06d}.jpg" for id in range(n)}
    of_name = {name: id for id, name in names.items()}
    gallery = Gallery(".", "", names, of_name, {}, {}, features, torch.arange(n), 0)
    return Engine(None, {}, "", gallery, Compute(64))


def contestant(file: str, n: int, width: int) -> None:
    """Answers one query a line; says its memory above start first."""
    import torch

    import common.gallery as gallery

    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)  # the libraries' own buffers belong to the start
    vector = torch.nn.functional.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(1)), dim=1)
    gallery.vectors = lambda engine, queries: vector  # the text is encoded already
    found = []

    def run() -> None:
        engine = mapped(file, n, width)
        found.extend(gallery.find(engine, [gallery.Query("", ("text",), -1)], TOP)[0])
        measured.append(engine)

    measured: list = []
    above = measure.peak_bytes(run)
    exact = measured[0].gallery.features.double().numpy() @ vector[0].double().numpy()
    assert [id for id, _ in found] == exact.argsort(kind="stable")[::-1][:TOP].tolist(), "not the best by float64"
    query = [gallery.Query("", ("text",), -1)]
    measure.serve(lambda: gallery.find(measured[0], query, TOP), above)


def floor_of(n: int, width: int):
    """Seconds of a copy of as many bytes, halved: a copy reads and writes."""
    import torch

    torch.set_num_threads(2)
    source = torch.randn(n, width)
    target = torch.empty_like(source)
    return lambda: measure.clock(lambda: target.copy_(source)) / 2


def write_features(file: Path, n: int, width: int) -> None:
    import numpy as np

    from common.gallery import append_features

    rng = np.random.default_rng(0)
    for start in range(0, n, 10_000):
        rows = rng.standard_normal((min(10_000, n - start), width), dtype=np.float32)
        append_features(file, rows / np.linalg.norm(rows, axis=1, keepdims=True), start)


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        return contestant(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    args = measure.arguments(__doc__, n=100_000, width=768, rounds=9)
    import statistics

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features.npy"
        write_features(file, args.n, args.width)
        ours = measure.Contestant(__file__, "serve", str(file), str(args.n), str(args.width))
        os.environ["MKL_DYNAMIC"] = "FALSE"
        seconds = measure.interleave({"ours": ours, "floor": floor_of(args.n, args.width)}, args.rounds)
        ours.close()
    took, floor = (statistics.median(seconds[name]) for name in ("ours", "floor"))
    sizes = f"M={args.n} D={args.width} k={TOP}"
    note = f"{min(seconds['ours']):.3f}-{max(seconds['ours']):.3f} s in {args.rounds} rounds"
    rows = [measure.row("search: one query, encoded", sizes, "cpu", took, "s", floor=floor, note=note)]
    note = f"of which the mapped features {args.n * args.width * 4 / 2**20:.0f} MiB"
    rows.append(measure.row("search: memory above start", sizes, "cpu", ours.ready / 2**20, "MiB", note=note))
    measure.publish(rows)


if __name__ == "__main__":
    main()
