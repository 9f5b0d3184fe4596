"""What a run began with: its pictures, by name and size. A resume names those that changed since.

A picture that stopped the run since it could not be read was in no step: it may be replaced."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from common.console import UserError, rank_size
from common.files import MAY_CHANGE, load_state, write_text
from common.images import ImageStore, shown
from common.ranks import gather_objects

Pictures = list[tuple[ImageStore, list[str]]]  # each store with the names that a run takes from it


def resume_state(
    out: str | Path, constants: dict, pictures: Pictures, may_change: Iterable[str] = MAY_CHANGE
) -> tuple[int, dict] | None:
    """load_state; the first run writes out/last/pictures.txt, a later one is held against it.

    UserError on every rank names the first picture that is gone, new, or of another size in bytes: one step on it would
    not be the step that the run would have made. A picture that changed and kept its size is not seen. One that
    note_broken knows may be another; the list then has its new size."""
    try:
        found = load_state(out, constants, may_change)
    except UserError as fault:  # other data are other constants: two hashes, which say little
        change = _changes(out, pictures) if rank_size()[0] == 0 else ""
        raise UserError("; ".join(filter(None, (str(fault), change)))) from None
    change = ""
    if rank_size()[0] == 0:
        if found:
            change = _changes(out, pictures)
        if not found or (not change and _broken(out).is_file()):
            _write_list(out, pictures)
    if change := gather_objects(change)[0]:
        raise UserError(f"{out}: {change}; bring the old ones back, or start anew with another --out")
    return found


def _list(out: str | Path) -> Path:
    return Path(out) / "last" / "pictures.txt"


def _broken(out: str | Path) -> Path:
    return Path(out) / "last" / "broken.txt"


def note_broken(out: str | Path, paths: list[str]) -> bool:
    """Notes in out/last/broken.txt the files that could not be read as pictures, "812 /data/a.jpg" each: _changes lets
    them be replaced. All ranks call it, rank 0 writes. Whether all of them are noted: one that changed after the run
    began is not, since a step may have used it as it was."""
    noted = False
    if rank_size()[0] == 0 and paths and _list(out).is_file():
        began = _list(out).stat().st_mtime
        with contextlib.suppress(OSError):  # a full disk, a file that is gone: what could not be read is said anyway
            old = [path for path in set(paths) if os.path.getmtime(path) <= began]
            lines = {f"{os.path.getsize(path)} {os.path.abspath(path)}" for path in old} | _lines(_broken(out))
            write_text(_broken(out), "".join(f"{line}\n" for line in sorted(lines)))
            noted = len(old) == len(set(paths))
    return gather_objects(noted)[0]


def _lines(path: Path) -> set[str]:
    return set(path.read_text(encoding="utf-8").split("\n")) - {""} if path.is_file() else set()


def _sizes(pictures: Pictures) -> set[str]:
    """ "0 812 a.jpg" for each picture: number of its store, bytes, name."""
    lines = set()
    for number, (store, names) in enumerate(pictures):
        for name in set(names):
            if path := store.find(name):
                lines.add(f"{number} {os.path.getsize(path)} {name}")
    return lines


def _write_list(out: str | Path, pictures: Pictures) -> None:
    path = _list(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in sorted(_sizes(pictures))))


def _changes(out: str | Path, pictures: Pictures) -> str:
    """What became of the pictures since the list was written; empty for nothing, or without a list (an older run)."""
    if not _list(out).is_file():
        return ""
    then, broken = _lines(_list(out)), {_without_suffix(line) for line in _lines(_broken(out))}
    stores = {line.split(" ", 1)[0] for line in then}  # an older list may lack some
    now = {line for line in _sizes(pictures) if line.split(" ", 1)[0] in stores}
    before, after = _by_name(then - now), _by_name(now - then)
    for n, name in before.keys() & after.keys():
        path = os.path.abspath(pictures[int(n)][0].find(name))
        if _without_suffix(f"{before[n, name]} {path}") in broken:
            del before[n, name], after[n, name]
    both = sorted(before.keys() & after.keys())
    kinds = {"changed": [f"{shown(name)} ({before[n, name]} bytes then, {after[n, name]} now)" for n, name in both]}
    kinds["gone"] = [shown(name) for _, name in sorted(before.keys() - after.keys())]
    kinds["new"] = [shown(name) for _, name in sorted(after.keys() - before.keys())]
    counts = [f"{len(found):,} {kind}, first {found[0]}" for kind, found in kinds.items() if found]
    return "since the run began, of its pictures " + "; ".join(counts) if counts else ""


def _without_suffix(line: str) -> str:
    """A picture may be replaced by one of another format, which its name finds too."""
    return os.path.splitext(line)[0]


def _by_name(lines: set[str]) -> dict[tuple[str, str], str]:
    """(store, name) -> bytes."""
    parts = (line.split(" ", 2) for line in lines)
    return {(number, name): size for number, size, name in parts}
