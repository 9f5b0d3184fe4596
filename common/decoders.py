"""Processes that open pictures and make them ready, while the process of a stage feeds the model.

Threads alone would not do: in Python one of them runs at a time, and sixteen that augment pictures leave the thread
that launches a GPU's work one operation in four hundred (bench/decoders.py). So each thread here waits for a process of
its own, which gets a path and what to make of the picture, and answers with bytes over a socket: that needs no
/dev/shm, of which a container has 64 MiB as a rule. It imports neither torch nor a stage, holds nothing of its parent
but that socket, and ends when the parent does."""

import contextlib
import fcntl
import functools
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np

from common import pixels
from common.console import UserError

Transform = Callable  # picture -> its bytes (S, S, 3); where processes make it, no lambda and nothing of a stage's file
_LENGTH = struct.Struct("<q")  # of the message that follows; below 0: an exception, of so many bytes


def cpus_of_rank() -> int:
    """The CPUs this process may use, shared by the ranks of its machine; 1 at least."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def fill_rows(rows: np.ndarray, jobs: list[tuple[Any, str, Transform]], workers: int) -> None:
    """Writes what becomes of each picture, (its ImageStore, name, transform), into its row of (n, S, S, 3) bytes.

    workers: processes that do it, as many as this rank has CPUs at most; 0: none but this one. UserError or OSError of
    a picture that cannot be read."""
    if not workers:
        for row, (images, name, transform) in zip(rows, jobs, strict=True):
            row[:] = images.open(name, transform)
        return

    # two parts for each process: fewer turns in Python than a picture at a time, and nobody waits long for the last
    workers = min(workers, cpus_of_rank())
    size = max(1, len(jobs) // (2 * workers))
    parts = [slice(start, start + size) for start in range(0, len(jobs), size)]
    threads = _threads(os.getpid(), workers)  # a forked process has none of its parent's
    for _ in threads.map(_fill, [rows[part] for part in parts], [jobs[part] for part in parts]):
        pass


def _fill(rows: np.ndarray, jobs: list[tuple[Any, str, Transform]]) -> None:
    """By the process of this thread."""
    asked = [(images.find(name) or images.path(name), images.large, transform) for images, name, transform in jobs]
    decoder = _own.__dict__.pop("decoder", None) or _Decoder(_own.turns)
    fault = decoder.fill(rows, asked)
    _own.decoder = decoder  # unless it ended, or said what nobody expects
    if fault:
        raise fault


# ---- this side of the socket ----
_own = threading.local()  # what is of each thread: a decoder, and the file `turns` that is of all of them


@functools.lru_cache(maxsize=1)
def _threads(owner: int, workers: int) -> ThreadPoolExecutor:
    turns = tempfile.TemporaryFile()  # noqa: SIM115  (its lock says which process holds a big picture)
    return ThreadPoolExecutor(workers, "pictures", functools.partial(setattr, _own, "turns", turns))


class _Decoder:
    """A process and the socket to it."""

    def __init__(self, turns: BinaryIO):
        self.socket, theirs = socket.socketpair()
        self.owner, passed = os.getpid(), [theirs.fileno(), turns.fileno()]
        found = os.pathsep.join(os.path.abspath(place) for place in sys.path)
        paths = {"PYTHONPATH": found, "PYTHONSAFEPATH": "1"}  # it imports what this one can, and from the same places
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        argv = [sys.executable, "-m", "common.decoders", *map(str, passed)]
        with theirs:  # a session of its own: Ctrl-C is for the stage, which stops after its step
            self.process = subprocess.Popen(
                argv, pass_fds=passed, env=os.environ | threads | paths, start_new_session=True
            )

    def fill(self, rows: np.ndarray, asked: list[tuple[str, str, Transform]]) -> Exception | None:
        """Writes the rows, or returns what was wrong with a picture; UserError if the process ended over them."""
        try:
            _send(self.socket, pickle.dumps(asked))
            length = _LENGTH.unpack(_receive(self.socket, _LENGTH.size))[0]
            if length < 0:
                return pickle.loads(_receive(self.socket, -length))
            assert length == rows.nbytes, f"{length} bytes of {len(rows)} pictures, {rows.nbytes} wanted"
            _receive_into(self.socket, memoryview(rows).cast("B"))
            return None
        except (EOFError, ConnectionError):
            status = self.process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        cure = "take fewer --workers where memory is short"
        last = f" to {asked[-1][0]}" if len(asked) > 1 else ""
        raise UserError(f"{asked[0][0]}{last}: the process that decoded this ended ({how}); {cure}")

    def __del__(self):
        if self.owner == os.getpid():  # a forked process has a copy of this object
            self.socket.close()
            self.process.kill()
            self.process.wait()


def _send(to: socket.socket, message: bytes, length: int | None = None) -> None:
    to.sendall(_LENGTH.pack(len(message) if length is None else length) + message)


def _receive(source: socket.socket, length: int) -> bytearray:
    message = bytearray(length)
    _receive_into(source, memoryview(message))
    return message


def _receive_into(source: socket.socket, room: memoryview) -> None:
    """Waits for all of it outside of Python: other threads go on."""
    while len(room):
        got = source.recv_into(room, 0, socket.MSG_WAITALL)
        if not got:
            raise EOFError
        room = room[got:]


# ---- the other side ----
class _Turn(contextlib.AbstractContextManager):
    """Lets one process at a time hold a big picture, as pixels.open_image lets one thread."""

    def __init__(self, file: int):
        self.file = file

    def __enter__(self) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a cluster's signal is for the stage: it stops after its step
        signal.signal(number, signal.SIG_IGN)
    stage, pixels.one_at_a_time = socket.socket(fileno=int(sys.argv[1])), _Turn(int(sys.argv[2]))
    with contextlib.suppress(EOFError, ConnectionError):  # the stage is gone
        while True:
            asked = pickle.loads(_receive(stage, _LENGTH.unpack(_receive(stage, _LENGTH.size))[0]))
            try:
                _send(stage, b"".join(pixels.open_image(*job).tobytes() for job in asked))
            except (UserError, OSError, MemoryError) as fault:
                message = pickle.dumps(fault)
                _send(stage, message, -len(message))


if __name__ == "__main__":
    main()
