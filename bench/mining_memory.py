"""A gallery that is searched in a quarter of the memory that it takes: the same bytes as in one piece?

    python bench/mining_memory.py                       # 300,000 x 64: 73 MiB on disk, 18 MiB allowed

The gallery lies in a file and is mapped. The limit (RLIMIT_DATA: heap and private memory, not what is mapped from
files) is set to what the process has at the start and a quarter of the gallery; a small search comes before, so that
threads and buffers of the libraries are there. glibc is told to give every freed 128 KiB back at once. Answers are
hashed lot by lot, as nothing holds them all; without the limit exact_topk searches the same gallery in one piece.
"""

import hashlib
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import measure

_FREED = "MALLOC_MMAP_THRESHOLD_"  # else it grows with what is freed, and pieces of the heap stay


def write_gallery(path: Path, pictures: int, width: int) -> None:
    """Random directions, some of them near each other, a thousand rows at a time."""
    import numpy as np

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((pictures // 20 + 1, width), dtype=np.float32)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (pictures, width))
    for start in range(0, pictures, 1000):
        rows = array[start : start + 1000]
        rows[:] = centres[rng.integers(len(centres), size=len(rows))] + 0.4 * rng.standard_normal(rows.shape)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)


def data_bytes() -> int:
    """VmData of this process, what RLIMIT_DATA counts."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return 1024 * int(line.split()[1])


def main() -> None:
    if os.environ.get(_FREED) != "131072":  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {_FREED: "131072"})
    args = measure.arguments(__doc__, pictures=300_000, width=64, k=20, rows=2048, columns=50_000, tile=512, anchors=0)
    import numpy as np
    import torch

    from kernels.similarity_topk import exact_topk
    from kernels.topk_blocks import topk_in_blocks

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
    cpu, sha = torch.device("cpu"), hashlib.sha256
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gallery.npy")
        write_gallery(path, args.pictures, args.width)
        size, anchors = path.stat().st_size, range(args.anchors or args.pictures)
        gallery = torch.from_numpy(np.load(path, mmap_mode="r"))
        list(topk_in_blocks(gallery[:5000], range(600), args.k, 512, 2500, cpu, args.tile))  # what is there once

        before, free = data_bytes(), resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (before + size // 4, free[1]))
        started, blocks = time.perf_counter(), (sha(), sha())
        for _, *found in topk_in_blocks(gallery, anchors, args.k, args.rows, args.columns, cpu, args.tile):
            for part, hashed in zip(found, blocks, strict=True):
                hashed.update(part.contiguous().numpy().data)
        seconds = time.perf_counter() - started
        resource.setrlimit(resource.RLIMIT_DATA, free)

        started, whole = time.perf_counter(), (sha(), sha())
        queries = gallery if len(anchors) == len(gallery) else gallery[: len(anchors)]
        for part, hashed in zip(exact_topk(queries, gallery, args.k, torch.arange(len(anchors))), whole, strict=True):
            hashed.update(part.numpy().data)
        at_once = time.perf_counter() - started
    same = all(a.digest() == b.digest() for a, b in zip(blocks, whole, strict=True))
    sizes = f"{size / 2**20:.0f} MiB, {size / 2**22:.1f} MiB more allowed"
    print(f"{len(anchors):,} anchors, {args.pictures:,} x {args.width}: {sizes}")
    print(f"{'the same bytes' if same else 'OTHER BYTES'}; {seconds:.0f} s in lots, {at_once:.0f} s in one piece")
    sys.exit(not same)


if __name__ == "__main__":
    main()
