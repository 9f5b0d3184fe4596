"""Processes that open pictures and make them ready, while the process of a stage feeds the model.

Threads alone would not do: in Python one of them runs at a time, and sixteen that augment pictures on sixteen cores
leave the thread that launches a GPU's work one operation in a hundred (simulated: bench/decoders.py). So each thread
here waits for a process of its own, which gets paths and what to make of the pictures, and answers with bytes over a
socket: that needs no /dev/shm, of which a container has 64 MiB as a rule. Such a process imports neither torch nor a
stage, has no file of its parent but what it prints to and a lock, and ends with it, after the picture at hand."""

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
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
    assert len(rows) == len(jobs) and rows.flags.c_contiguous
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
    """By the process of this thread; by another one if that was killed, once."""
    asked = [(images.path(name), images.large, transform) for images, name, transform in jobs]
    for attempt in (1, 2):
        decoder = _own.__dict__.pop("decoder", None) or _Decoder()
        try:
            fault = decoder.fill(rows, asked)
            break
        except _Killed as how:
            if attempt == 2:
                what = f"one of {len(asked)} pictures, first {asked[0][0]}"
                cure = "take fewer --workers where memory is short"
                raise UserError(f"{what}: the process that decodes them was killed twice ({how}); {cure}") from None
    _own.decoder = decoder  # unless it said what nobody expects
    if fault:
        raise fault


# ---- this side of the socket ----
_own = threading.local()  # each thread's decoder


class _Killed(Exception):
    """The process ended by a signal."""


@functools.lru_cache(maxsize=1)
def _threads(owner: int, workers: int) -> ThreadPoolExecutor:
    _lock_file()  # before there are threads
    return ThreadPoolExecutor(workers, "pictures")


@functools.cache
def _lock_file() -> int:
    """An open file without a name; who locks it may hold a big picture."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("big picture")
    file, name = tempfile.mkstemp()
    os.unlink(name)
    return file


class _Decoder:
    """A process and the socket to it."""

    process = None  # not yet

    def __init__(self):
        places = [os.path.abspath(place) for place in sys.path]  # it imports what this one can, from the same places
        start = f"import sys; sys.path[:] = {places!a}; from common import decoders; decoders.main()"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        how = {"stdin": subprocess.DEVNULL, "env": os.environ | threads}
        how |= {"start_new_session": True}  # Ctrl-C is for the stage, which stops after its step
        try:
            self.socket, theirs = socket.socketpair()
            with theirs:
                passed = [theirs.fileno(), _lock_file()]
                argv = [sys.executable, "-c", start, *map(str, passed)]
                self.process = subprocess.Popen(argv, pass_fds=passed, **how)
        except OSError as fault:
            what = f"no process could be started to decode pictures ({fault.strerror})"
            raise UserError(f"{what}; take fewer --workers, or 0") from None

    def fill(self, rows: np.ndarray, asked: list[tuple[str, str, Transform]]) -> Exception | None:
        """Writes the rows, or returns what was wrong with a picture."""
        try:
            _send(self.socket, pickle.dumps(asked))
            length = _receive_length(self.socket)
            if length < 0:
                return pickle.loads(_receive(self.socket, -length))
            if length != rows.nbytes:
                raise ValueError(f"{length} bytes of {len(rows)} pictures, {rows.nbytes} wanted")
            _receive_into(self.socket, memoryview(rows).cast("B"))
            return None
        except (EOFError, ConnectionError):
            status = self.process.wait()
        if status < 0:
            raise _Killed(f"signal {-status}")
        raise RuntimeError(f"the process that decodes {asked[0][0]} ended with status {status}: its fault is above")

    def __del__(self):
        if self.process:
            self.socket.close()
            self.process.kill()
            self.process.wait()


def _send(to: socket.socket, message: bytes, length: int | None = None) -> None:
    to.sendall(_LENGTH.pack(len(message) if length is None else length) + message)


def _receive_length(source: socket.socket) -> int:
    return _LENGTH.unpack(_receive(source, _LENGTH.size))[0]


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
class _LockOfProcesses(contextlib.AbstractContextManager):
    """Lets one process at a time hold a big picture, as pixels.py's own lets one thread."""

    def __init__(self, file: int):
        self.file = file

    def __enter__(self) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_) -> None:
        fcntl.lockf(self.file, fcntl.LOCK_UN)


def main() -> None:
    """Answers until the stage is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):  # a cluster's signal is for the stage: it stops after its step
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, which every process would repeat
    stage, pixels.big_picture = socket.socket(fileno=int(sys.argv[1])), _LockOfProcesses(int(sys.argv[2]))
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            asked = pickle.loads(_receive(stage, _receive_length(stage)))
            try:
                _send(stage, b"".join(pixels.open_image(*job).tobytes() for job in asked))
            except (UserError, OSError, MemoryError) as fault:
                message = pickle.dumps(fault)
                _send(stage, message, -len(message))
