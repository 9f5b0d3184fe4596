"""How a file gets onto the disk whole, and is opened safely: aside first, fsync, rename; no link, pipe or device.

common/files.py says what is in the files."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.console import UserError, warn

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # by some network disks
_warned: set[str] = set()


# ---- writing ----


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError without a file name gets this one: of a full disk the system says only "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def sync(path: str | Path) -> None:
    """Down to the disk: without it a power cut leaves a renamed file of zeros. Works on folders too.

    A disk that has no fsync (some network disks for folders) is named once, and the run goes on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        folder = path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path))
        warn_once(f"the disk of {folder} has no fsync ({error.strerror}): a power cut there may lose what was written")
    finally:
        os.close(handle)


def warn_once(text: str) -> None:
    """As warn, but the second time nothing."""
    if text not in _warned:
        _warned.add(text)
        warn(text)


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """`with whole(path) as aside:` write the file `aside`; then path is the new file, or after an error the old one.

    Its mode is what the umask says, whoever writes it. A link that lies in the way is replaced, never followed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            remove(aside)  # of a write that was killed
            handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            os.close(handle)
            yield aside
            if stat.S_IMODE(os.stat(aside).st_mode) != mode:  # safetensors makes a file of its own, with 0600
                os.chmod(aside, mode)
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(aside)
        raise


def open_as_umask_says(folder: str | Path) -> None:
    """Gives a folder's files the mode of new ones: safetensors makes its own with 0600, which no colleague can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in Path(folder).iterdir():
        if path.is_file() and not path.is_symlink():
            os.chmod(path, 0o666 & ~mask)


def remove(path: Path) -> None:
    """A file, a link (not what it leads to) or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """A new, empty folder; removed again after an error, so that a full disk is no fuller than before."""
    remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class _Raw:
    """A file for torch.save, which forgets why a write failed: "unexpected pos 64 vs 0" is a full disk."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.fault: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):  # a full disk writes a part; the next attempt says why
                done += self.file.write(view[done:])
        except OSError as error:
            self.fault = error
            raise
        return done

    def flush(self) -> None:
        """Nothing is held back."""


def torch_save(value: Any, path: str | Path) -> None:
    """torch.save, atomic as `whole`; an OSError names the file and the reason."""
    import torch

    with whole(path) as aside, open(aside, "wb", buffering=0) as file:
        raw = _Raw(file)
        try:
            torch.save(value, raw)
        except RuntimeError:
            if raw.fault is None:
                raise
            raise OSError(raw.fault.errno, raw.fault.strerror, str(path)) from None


# ---- reading ----


def open_regular(path: str | Path, limit: int) -> BinaryIO:
    """The open file, if it is one of at most `limit` bytes: a pipe or a device would block or never end."""
    try:
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except IsADirectoryError:
        raise UserError(f"{path}: not a regular file but a folder") from None
    info = os.fstat(file.fileno())
    fault = None
    if not stat.S_ISREG(info.st_mode):
        fault = "not a regular file"
    elif info.st_size > limit:
        fault = f"{info.st_size:,} bytes, more than the limit of {limit:,}"
    if fault:
        file.close()
        raise UserError(f"{path}: {fault}")
    return file
