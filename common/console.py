"""What a stage says to a person: errors and warnings in one line, progress with the loss on it; rank 0 alone speaks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

QUIET = 30  # seconds between two lines of a bar that is written to a file or a pipe
PATIENCE = 10  # seconds that a rank with an error waits for the first rank of its machine to say the same


class UserError(ValueError):
    """A user's mistake in one line: what was found, what was wanted, how to fix it."""


# ---- errors ----


def run(main: Callable[[], None]) -> None:
    """Calls main(): a user's mistake or a file error is one line and exit status 1, a bug keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed where the command was given (>&-): what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)  # a bug's traceback for torchrun's summary; fail() puts one line in its place
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        _out(sys.stderr, "error: interrupted")
        raise SystemExit(130) from None
    if rank_size()[1] > 1:
        # rank 0 may still write: who left first would close connections that it waits on. A signal ends the wait.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.modules["torch"].distributed.barrier()
        sys.modules["torch"].distributed.destroy_process_group()


def interrupt_quietly() -> None:
    """From now on an interrupt before run(), while libraries are imported, is one line too."""
    usual = sys.excepthook

    def say_it(kind, error, trace):
        if kind is not KeyboardInterrupt:
            return usual(kind, error, trace)
        _out(sys.stderr, "error: interrupted")

    sys.excepthook = say_it


def fail(error: Exception) -> None:
    """Prints the error as one line and exits with status 1. Of several ranks with the same error one speaks."""
    rank = rank_size()[0]
    line = _one_line(error)
    if not _said_by_another(line):
        who = f" (rank {rank})" if rank else ""
        _out(sys.stderr, f"error{who}: {line}")
    raise SystemExit(1)


def _one_line(error: Exception) -> str:
    """What to print of an error: for a file error its reason and its file, for a full disk which disk as well."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {os.fsdecode(error.filename)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += f" ({_disk(os.fsdecode(error.filename))}); make room and give the same command again"
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return printable(line) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """What an error of a library says, on one line of 200 characters at most."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _disk(path: str) -> str:
    """ "disk mounted at /data, 0.0 of 250.0 GB free" for the disk that holds a path, there or not yet."""
    import shutil  # not above: --help is instant

    folder = Path(path).absolute()
    while not (folder.exists() and folder.is_mount()) and folder != folder.parent:
        folder = folder.parent
    total, _, free = shutil.disk_usage(folder)
    return f"disk mounted at {folder}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _said_by_another(line: str) -> bool:
    """Under torchrun: leaves the line for torchrun's summary; True if the machine's first rank says the same line.

    torchrun names each rank a file <folder>/<local rank>/error.json. All ranks read the same flags and files, so most
    mistakes are found by all of them at about the same time."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return False
    start = f'{{"message": {{"message": {json.dumps(line)}'  # then the time, which differs by a moment
    with contextlib.suppress(OSError):  # the full disk may be this one
        Path(own).write_text(f'{start}, "extraInfo": {{"timestamp": "{time.time():.0f}"}}}}}}', encoding="utf-8")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    first = Path(own).parent.parent / "0" / Path(own).name
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if first.exists() and first.read_text(encoding="utf-8").startswith(start):
            return True
        time.sleep(0.05)
    return False


def printable(text: str) -> str:
    """Control characters (terminal escapes in a caption or a file name) become U+FFFD; newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def rank_size() -> tuple[int, int]:
    """(rank, size) of the process group; before there is one, the rank torchrun announced and a world of one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"  # RANK alone is a leftover of some shell
    return int(rank) if rank.isdecimal() else 0, 1


# ---- where it goes ----


def hush(stream: Any) -> None:
    """What is still said on a stream goes nowhere; so does what it holds back, which would fail again at the end."""
    with contextlib.suppress(OSError):  # a stream without a number, as a test's is
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _out(stream: Any, line: str, write: Callable[..., None] = print) -> None:
    """A line on a stream. A reader that left (`| head`), or a full disk behind it, does not stop a run of days."""
    try:
        write(line, file=stream)
        stream.flush()
    except OSError as error:
        hush(stream)
        if stream is sys.stdout:
            warn(f"standard output takes no more ({error.strerror}); the run goes on without it")


# ---- progress and lines ----


def progress(iterable: Iterable, desc: str, total: int | None = None, initial: int = 0) -> Any:
    """A bar on rank 0 around an iterable; written to a file or a pipe it is silent for 30 s and speaks every 30 s.

    total: steps of the whole run, initial: those done before (a resumed bar starts there). `bar.set_postfix(loss=1.2)`
    shows numbers behind the bar from its next line on; it prints nothing by itself."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()

    class Bar(tqdm):
        def display(self, *given, **named):
            try:
                if terminal:
                    return super().display(*given, **named)
                print(self, file=sys.stderr, flush=True)  # a line of its own, which a message cannot run into
            except OSError:  # nobody reads it any more
                return hush(sys.stderr)

        def set_postfix(self, ordered_dict=None, refresh=False, **values):  # tqdm's own prints a line each call
            super().set_postfix(ordered_dict, refresh=refresh, **values)

    if total is None and initial and hasattr(iterable, "__len__"):
        total = initial + len(iterable)
    return Bar(
        iterable,
        desc,
        total,
        initial=initial,
        disable=rank_size()[0] != 0,
        mininterval=0.2 if terminal else QUIET,
        delay=0 if terminal else QUIET,
        dynamic_ncols=True,
        leave=terminal,  # else display() has said the last of it
    )


def say(*text: Any) -> None:
    """Prints on rank 0, above a progress bar if there is one."""
    if rank_size()[0] == 0:
        line = printable(" ".join(map(str, text)))
        bars = "tqdm" in sys.modules and sys.stderr.isatty()
        _out(sys.stdout, line, sys.modules["tqdm"].tqdm.write if bars else print)


def warn(text: str) -> None:
    """One line on standard error, from rank 0."""
    if rank_size()[0] == 0:
        _out(sys.stderr, f"WARNING: {printable(text)}")
