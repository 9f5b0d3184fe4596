"""run_ranks: one function on n gloo processes of this machine, forked so that closures and modules carry over."""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(n: int, fn, *args, timeout: int = 120) -> list:
    """fn(*args) on ranks 0..n-1 with RANK, WORLD_SIZE, LOCAL_RANK set and the process group up -> results by rank.

    A result may hold tensors, numbers, strings, lists, dicts. A failing rank raises here, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=_worker, args=(rank, n, folder, fn, args)) for rank in range(n)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout)
            if worker.is_alive():
                worker.kill()
                worker.join()
        faults = [p.read_text() for p in sorted(Path(folder).glob("fault-*"))]
        if faults:
            raise RuntimeError("\n".join(faults))
        if any(worker.exitcode != 0 for worker in workers):
            raise RuntimeError(f"exit codes of the ranks: {[worker.exitcode for worker in workers]}")
        return [torch.load(f"{folder}/result-{rank}", weights_only=True) for rank in range(n)]


def _worker(rank: int, n: int, folder: str, fn, args: tuple) -> None:
    torch.set_num_threads(1)  # OpenMP's thread pool does not survive a fork
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=timedelta(seconds=60)
        )
        torch.save(fn(*args), f"{folder}/result-{rank}")
        dist.barrier()
    except BaseException as fault:
        if not isinstance(fault, SystemExit) or fault.code not in (None, 0):
            Path(folder, f"fault-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # skip the parent's atexit hooks (pytest's among them)
