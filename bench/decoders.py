"""What pictures cost the thread that feeds a model: decoded and augmented by threads beside it, or by processes.

    python bench/decoders.py --images FOLDER          # without a folder: made-up photographs, as bench/pictures.py
    python bench/decoders.py --cores 16               # what 16 free cores would do, on a machine that has two

The feeding thread calls small operations one after another, as the launches of a GPU's work are; the table says how
many a second, alone and beside --workers that make pictures of train_cir.py ready. With --cores the part of a picture's
time in which Python lets other threads run is slept through, the rest (--held, a share: 0.14 by `py-spy record --gil`)
is spent in Python by threads, and slept through as well by processes, whose Python is not this one's."""

import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import measure  # first of ours: it puts the repository on the path
import pictures

from common import decoders
from common.augment import Augmentation, Ready

SECONDS = 3  # of each figure
SIDE = 384


def feed(seconds: float) -> float:
    """Small operations a second, by this thread."""
    import torch

    x, layer = torch.randn(8, 8), torch.nn.Linear(8, 8)
    began, count = time.perf_counter(), 0
    with torch.no_grad():
        while time.perf_counter() - began < seconds:
            for _ in range(20):
                layer(x).relu()
            count += 40
    return count / (time.perf_counter() - began)


def beside(fill, count: int) -> tuple[float, float]:
    """Operations and pictures a second while fill() makes `count` pictures ready, again and again."""
    stop, done = threading.Event(), [0]

    def run() -> None:
        while not stop.is_set():
            fill()
            done[0] += count

    loader = threading.Thread(target=run)
    fill()
    loader.start()
    time.sleep(1)
    before, began = done[0], time.perf_counter()
    operations = feed(SECONDS)
    pace = (done[0] - before) / (time.perf_counter() - began)
    stop.set()
    loader.join()
    return operations, pace


def main() -> None:
    found = measure.arguments(__doc__, images="", workers=0, cores=0, held=0.14, count=256)
    import numpy as np
    import torch

    import train_cir as cir

    torch.set_num_threads(1)
    workers = found.workers or found.cores or min(16, len(os.sched_getaffinity(0)))
    drawn = Augmentation(0, cir.CROP_SCALE, cir.CROP_RATIO, cir.FLIP, cir.JITTER, cir.TRANSLATE, cir.ROTATE)
    with pictures.shelf(found.images, found.count, SIDE) as (images, names, preprocess):
        names = [names[i % len(names)] for i in range(found.count)]
        jobs = [(images, name, Ready(preprocess, drawn, (i,))) for i, name in enumerate(names)]
        rows = np.empty((found.count, SIDE, SIDE, 3), np.uint8)
        one = measure.clock(lambda: decoders.fill_rows(rows, jobs, 0)) / len(jobs)
        size, by_threads, by_processes = f"{workers} workers, {SIDE} px", jobs, jobs
        if found.cores:
            decoders.cpus_of_rank = lambda: found.cores
            size += f", as on {found.cores} free cores: {1000 * one:.1f} ms a picture, {found.held:.0%} of it in Python"
            held = found.held * one
            by_threads = [(*job[:2], functools.partial(pictures.slept, SIDE, one - held, held)) for job in jobs]
            by_processes = [(*job[:2], functools.partial(pictures.slept, SIDE, one, 0.0)) for job in jobs]
        with ThreadPoolExecutor(workers) as pool:

            def in_threads() -> None:
                list(pool.map(lambda row, job: decoders.fill_rows(row[None], [job], 0), rows, by_threads))

            paces = {"alone": (feed(SECONDS), 0.0)}
            paces["threads"] = beside(in_threads, len(jobs))
            paces["processes"] = beside(lambda: decoders.fill_rows(rows, by_processes, workers), len(jobs))
    rows = []
    for kind, (operations, pace) in paces.items():
        note = f"{operations / paces['alone'][0]:.4f} of those alone; {pace:.0f} pictures/s beside them"
        rows.append(measure.row(f"small operations beside pictures: {kind}", size, "cpu", operations, "1/s", note=note))
    measure.publish(rows)


if __name__ == "__main__":
    main()
