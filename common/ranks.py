"""The world of ranks: process group, gathering, log, stop signals; a run alone is one rank."""

import importlib.metadata
import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common.console import UserError, rank_size
from common.files import append_line, json_line, repair_jsonl, write_text

# How long a rank waits for the others in one collective. The shares of gen_deltas.py and mine_pairs.py may differ by
# hours; torchrun ends all ranks at once when one dies, so that this only has to end a run that is stuck.
WAIT = timedelta(hours=12)
_stop = {"time": None, "installed": False}

# ---- the group ----


@dataclass(frozen=True)
class World:
    """This process among its peers; a run without torchrun is a world of one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def init_world(device: str = "auto") -> World:
    """Joins the ranks torchrun started (NCCL on GPUs, gloo on CPU). device: "auto", "cpu", "cuda" or "cuda:1"."""
    if next(importlib.metadata.distributions(name="kernels"), None) is not None:
        # it would be imported in place of our kernels/, and transformers runs code from the hub where it is installed
        raise UserError("the PyPI package `kernels` is installed and collides with our kernels/; pip uninstall kernels")
    size, local_rank = _announced(dist.is_initialized())
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device is {device!r}, wanted auto, cpu or cuda")
    if name.startswith("cuda"):
        name = f"cuda:{local_rank}" if name == "cuda" or size > 1 else name
        if torch.device(name).index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"--device {name} wanted, {found} GPUs found; use --device cpu or fewer ranks")
        torch.cuda.set_device(name)
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32: mining compares gaps of 0.002
        torch.backends.cudnn.allow_tf32 = False
        # cuDNN plans its attention anew for every shape, and each batch has another length: flash and others do not
        torch.backends.cuda.enable_cudnn_sdp(False)
    here = torch.device(name)
    if size > 1 and not dist.is_initialized():
        on_gpu = here.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=WAIT,
            device_id=here if on_gpu else None,  # else NCCL guesses at the first collective which GPU is this rank's
        )
    rank, size = rank_size()
    return World(rank, size, local_rank, here)


def _announced(met: bool) -> tuple[int, int]:
    """Ranks of the run, and the number of this one on its machine; UserError where half of it was left in a shell.

    met: whether they have found each other already."""
    if "WORLD_SIZE" not in os.environ:
        return 1, 0
    said = {name: os.environ.get(name, "0") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    numbers = [int(value) if value.isdecimal() else -1 for value in said.values()]
    met |= numbers[0] == 1 or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not (met and 0 <= numbers[1] < numbers[0] and 0 <= numbers[2] < numbers[0]):
        found = " ".join(f"{name}={value}" for name, value in said.items())
        address = "" if met else ", but no MASTER_ADDR and MASTER_PORT"
        remedy = "start ranks with torchrun, or, for a run alone, unset WORLD_SIZE RANK LOCAL_RANK"
        raise UserError(f"the environment says {found}{address}: that is no run of torchrun; {remedy}")
    return numbers[0], numbers[2]


# ---- collectives: every rank must call them ----


def gather(x):
    """(B_r, ...) of each rank -> (sum of B_r, ...) in rank order on all of them, no gradient; the B_r may differ."""
    size = rank_size()[1]
    if size == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    padded = x.new_zeros(max(map(int, counts)), *x.shape[1:])  # all_gather wants equal shapes
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_parts(rows, part: int):
    """(n, ...) of each rank -> (ranks n, ...): each `part` rows of all ranks in turn, as draw_batch orders a batch."""
    return torch.cat([gather(some) for some in rows.split(part)])


def all_reduce_gradients(parameters: Iterable) -> None:
    """Sums .grad over the ranks, in place; the loss was already divided by the global count. No .grad becomes 0, of one
    rank too: weight decay then does the same on any number of ranks."""
    by_dtype = {}
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values() if rank_size()[1] > 1 else ():
        flat = torch.cat([grad.reshape(-1) for grad in grads])  # one message instead of hundreds of small ones
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def gradient_norm(parameters: Iterable) -> float:
    """L2 norm of all gradients; no .grad counts as 0."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def all_sum(x):
    """The sum over ranks of a number (in float64) or of a tensor; no gradient flows."""
    if torch.is_tensor(x):
        total = x.detach().clone()
    else:
        nccl = rank_size()[1] > 1 and dist.get_backend() == "nccl"
        total = torch.tensor(float(x), dtype=torch.float64, device="cuda" if nccl else "cpu")  # NCCL takes GPU tensors
    if rank_size()[1] > 1:
        dist.all_reduce(total)
    return total if torch.is_tensor(x) else float(total)


def any_rank(flag: bool) -> bool:
    """True on every rank if any rank says True, so that all of them stop together."""
    return all_sum(float(bool(flag))) > 0


def gather_objects(item: Any) -> list[Any]:
    """Every rank's small object, in rank order."""
    size = rank_size()[1]
    if size == 1:
        return [item]
    items = [None] * size
    dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Waits for every rank."""
    any_rank(False)


# ---- dtype and log ----


def pick_dtype(dtype: str, device):
    """--dtype to torch's: "auto" is bf16 on CUDA and fp32 on CPU."""
    if dtype == "auto":
        dtype = "bf16" if torch.device(device).type == "cuda" else "fp32"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {str(t).removeprefix("torch."): t for t in names.values()}
    if dtype not in names:
        raise UserError(f"--dtype is {dtype!r}, wanted auto, fp32, bf16 or fp16")
    return names[dtype]


def to_device(x, device):
    """x, a tensor on the CPU, on the device; a GPU copies it while the host goes on, from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


class Log:
    """folder/log.jsonl, one whole line a record, written by rank 0.

    Records carry the steps done so far. resume_step: those of later steps are dropped, which the killed run had reached
    after its last checkpoint and which come again."""

    def __init__(self, folder: str | Path, resume_step: int | None = None):
        self.path = Path(folder) / "log.jsonl"
        if rank_size()[0] == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records = repair_jsonl(self.path)
            if resume_step is not None:
                kept = [record for record in records if record.get("step", 0) <= resume_step]
                if len(kept) < len(records):
                    write_text(self.path, "".join(json_line(record) for record in kept))

    def write(self, **record: Any) -> None:
        """One record; NaN and infinity as words."""
        if rank_size()[0] == 0:
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[key] = str(value)  # JSON has no NaN
            append_line(self.path, record)


class Stopwatch:
    """Seconds of training: what else takes time is measured in paused()."""

    def __init__(self):
        self._began = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @contextmanager
    def paused(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self._began += time.perf_counter() - since


def pace(seconds: float, done: int, left: int, items: int) -> dict[str, float]:
    """For the log: in so many seconds there were `done` steps of `items`; `left` are to come."""
    return {"items_per_s": round(done * items / seconds, 2), "seconds_left": round(seconds / done * left)}


# ---- signals ----


def stop_requested() -> bool:
    """True once SIGTERM or Ctrl-C came; ask each step, `if any_rank(stop_requested())`: save and exit 143.

    The first call installs the handlers, so that a stage which never asks is stopped by the signal itself."""
    if not _stop["installed"]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _on_signal)
        _stop["installed"] = True
    return _stop["time"] is not None


def _on_signal(number: int, frame: Any) -> None:
    # torchrun passes the terminal's Ctrl-C on, so each rank gets it twice within a moment: only a later one insists
    if number == signal.SIGINT and _stop["time"] is not None and time.monotonic() - _stop["time"] > 1:
        raise KeyboardInterrupt
    if _stop["time"] is None:
        _stop["time"] = time.monotonic()
        if rank_size()[0] == 0:  # not print: it fails where the signal came amid another print
            os.write(2, b"stopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
