"""What a stage says to a person: errors and warnings in one line, progress with the loss on it; rank 0 alone speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(ValueError):
    """A user's mistake in one line: what was found, what was wanted, how to fix it."""


def run(main: Callable[[], None]) -> None:
    """Calls main(): a user's mistake or a file error is one line and exit status 1, a bug keeps its traceback."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)  # without it torchrun's summary says only "exitcode: 1"
    try:
        main()
    except (UserError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if rank_size()[1] > 1:
        sys.modules["torch"].distributed.destroy_process_group()


def fail(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    line = printable(" ".join(part.strip() for part in text.splitlines() if part.strip()))
    who = f" (rank {rank_size()[0]})" if rank_size()[0] else ""
    print(f"error{who}: {line or type(error).__name__}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def printable(text: str) -> str:
    """Control characters (terminal escapes in a caption or a file name) become U+FFFD; newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def rank_size() -> tuple[int, int]:
    """(rank, size) of the process group; before there is one, the rank torchrun announced and a world of one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), 1


def progress(iterable: Iterable, desc: str, total: int | None = None) -> Iterable:
    """A bar on rank 0; written to a file or a pipe it keeps quiet for 30 s and then speaks every 30 s."""
    from tqdm import tqdm

    quiet = 0.2 if sys.stderr.isatty() else 30
    delay = 0 if quiet < 1 else quiet
    return tqdm(iterable, desc, total, disable=rank_size()[0] != 0, mininterval=quiet, delay=delay, dynamic_ncols=True)


def say(*text: Any) -> None:
    """Prints on rank 0, above a progress bar if there is one."""
    if rank_size()[0] == 0:
        line = printable(" ".join(map(str, text)))
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line)
        else:
            print(line)
        sys.stdout.flush()


def warn(text: str) -> None:
    if rank_size()[0] == 0:
        print(f"WARNING: {printable(text)}", file=sys.stderr, flush=True)
