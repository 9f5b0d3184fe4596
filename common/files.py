"""Files that survive a kill and are believed only when whole: JSON, jsonl, CSV, checkpoints, a run's state, its lock.

It owns what our files say and when they are believed; common/disk.py owns how they get onto the disk."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from common.console import UserError, rank_size, say, warn
from common.disk import UNSUPPORTED, fresh, naming, open_regular, remove, sync, torch_save, warn_once, whole

# Constants whose change leaves the weights as they are: a run may be resumed with other values of these.
MAY_CHANGE = frozenset({"OUT", "DEVICE", "CHECK", "CHECK_DECODE", "WORKERS", "SAVE_EVERY", "LOG_EVERY"})
# Constants and hashes that runs of before did not keep: where one is absent there, nothing contradicts it.
LATER = frozenset({"llm", "vision", "model of --llm", "model of --vision", "VALIDATION_SHA256", "HOLD_OUT"})
JSON_LIMIT = 2 << 30  # bytes; LLaVA's chat.json, the largest file read, has 0.2 GB
SMALL_JSON = 16 << 20  # bytes; of config.json, manifests and the like
JSON_MEMORY = 2 << 30  # bytes that one JSON document may take once read; chat.json takes about 1 GB
HASH_LIMIT = 256 << 30  # bytes; no file of weights is larger, a sparse file may be
_locks: dict[Path, Any] = {}  # the open files: closing one would unlock it

# ---- writing ----


def _utf8(text: str, path: str | Path) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # a file name that is not UTF-8, half an emoji
        near = text[max(0, error.start - 30) : error.end + 30]
        raise UserError(f"{path} cannot be written: {near!r} is not Unicode; rename or correct it") from None


def write_text(path: str | Path, text: str) -> None:
    """Atomic: a kill leaves the old file or the new one, never a part."""
    data = _utf8(text, path)
    with whole(path) as aside:
        aside.write_bytes(data)


def write_tensors(path: str | Path, tensors: dict) -> None:
    """A safetensors file, atomic as write_text; the tensors may lie anywhere and need not be contiguous."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as aside:
        try:
            save_file(tensors, aside, metadata={"format": "pt"})
        except SafetensorError as error:  # "I/O error: No space left on device (os error 28)"
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Atomic, UTF-8, no NaN."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """One record a line; the old file or the new one, never a part."""
    write_text(path, "".join(map(json_line, records)))


# ---- JSON ----


def _memory(data: bytes) -> int:
    """About the bytes that a JSON text takes once read, within a factor of two or so (measured, CPython 3.11).

    56 for a list, 160 for a dict and 72 for another entry of either; the text itself in bytes, decoded, and in its
    strings. The 3 bytes of "[]," take 27 times as many."""
    text = len(data) * (3 if data.isascii() else 6)
    return 56 * data.count(b"[") + 160 * data.count(b"{") + 72 * data.count(b",") + text


def _fits(data: bytes, where: str, limit: int) -> bytes:
    if (wanted := _memory(data)) > limit:
        raise UserError(
            f"{where}: would take about {wanted / 1e9:.1f} GB of memory, more than the {limit / 1e9:.1f} GB allowed; "
            "split it, or leave out what no stage reads"
        )
    return data


def _parse(data: bytes, where: str) -> Any:
    """Strict JSON: what a lenient reader takes silently (NaN, the second of two equal keys) is an error here."""

    def unique(pairs):
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where}: the key {twice!r} occurs twice in one record")
        return record

    def refuse(word):
        raise UserError(f"{where}: {word} is not JSON; wanted a finite number or null")

    def finite(word):
        return value if math.isfinite(value := float(word)) else refuse(word)

    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{where}: starts with a byte order mark; save it as UTF-8 without BOM")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # surrogates come in pairs: half of one can never be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UserError:
        raise
    except UnicodeEncodeError as error:
        near = ascii(error.object[max(0, error.start - 20) : error.end + 20])
        raise UserError(f"{where}: half a character (a lone surrogate) near {near}; correct that text") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; save it as plain text in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of more than 4,300 digits
        raise UserError(f"{where}: not usable JSON: {error}") from None


def _read_bytes(path: str | Path, limit: int) -> bytes:
    with open_regular(path, limit) as file:
        return file.read()


def read_json(path: str | Path, limit: int = JSON_LIMIT, memory: int = JSON_MEMORY) -> Any:
    """Strict JSON of at most `limit` bytes, and about `memory` bytes once read; UserError names the file and the place.

    limit=SMALL_JSON fits a config, a manifest or an index of weights."""
    return _parse(_fits(_read_bytes(path, limit), str(path), memory), str(path))


def read_jsonl(path: str | Path, limit: int = JSON_LIMIT, memory: int | None = None) -> list[dict]:
    """One JSON object a line, blank lines skipped; UserError names a bad line. Lines end with LF alone: a caption may
    hold U+2028, at which str.splitlines would cut.

    memory: bytes that all records may take; by default half of the machine's."""
    if memory is None:
        memory = max(JSON_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    records = []
    for number, line in enumerate(_fits(_read_bytes(path, limit), str(path), memory).split(b"\n"), 1):
        if line.strip():
            records.append(_parse(_fits(line, f"{path} line {number}", JSON_MEMORY), f"{path} line {number}"))
            if not isinstance(records[-1], dict):
                raise UserError(f"{path} line {number}: wanted a JSON object, found {type(records[-1]).__name__}")
    return records


def read_csv(
    path: str | Path, limit: int = JSON_LIMIT, known: Collection[str] = (), exact: Collection[str] = ()
) -> list[dict[str, str]]:
    """The rows of a table as records, named by its first line; blank lines skipped. UTF-8, with or without a byte order
    mark. Between fields stands what the first line has most of: a comma, a semicolon or a tab.

    known: names, in lower case, that the first line may also write in capitals or with blanks around them.
    exact: names that are kept as they are written.
    UserError for a row with more or fewer fields than the first line."""
    try:
        text = _read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it as CSV in UTF-8") from None
    between = max(",;\t", key=text.partition("\n")[0].count)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    records = []
    try:
        written = list(table.fieldnames or ())
        plain = [name.strip().lower() for name in written]
        table.fieldnames = [
            low if low in known and low not in written and name not in exact else name
            for name, low in zip(written, plain, strict=True)
        ]
        if len(set(table.fieldnames)) < len(written):
            raise UserError(f"{path}: its first line names a column twice")
        for row in table:
            if None in row or None in row.values():  # DictReader's name for what is too much, and for what is absent
                wanted = f"wanted {len(table.fieldnames)} fields; a text that holds {between!r} stands in quotes"
                raise UserError(f"{path}, line {table.line_num}: {wanted}")
            records.append(row)
    except csv.Error as fault:
        raise UserError(f"{path}, line {table.reader.line_num}: {fault}") from None
    return records


def read_lines(path: str | Path, flag: str) -> list[str]:
    """The lines of a list that `flag` names, without white space around them and without blank ones. UTF-8, with or
    without a byte order mark; UserError for other text, in which every name would be an unknown one."""
    try:
        text = _read_bytes(path, JSON_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: byte {error.start} is not UTF-8; save it as plain text in UTF-8") from None
    if "\0" in text:
        raise UserError(f"{flag} {path}: holds zero bytes, as UTF-16 does; save it as plain text in UTF-8")
    return [line.strip() for line in text.split("\n") if line.strip()]


# ---- jsonl that is appended to ----


def json_line(record: dict) -> str:
    """A record as one line of jsonl, with its end; ValueError for NaN."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def append_line(path: Path, record: dict) -> None:
    """One whole line or none: a full disk writes a part of it without raising, which is then cut off again."""
    data = _utf8(json_line(record), path)
    with naming(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, data) != len(data):
                os.ftruncate(handle, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def repair_jsonl(path: str | Path) -> list[dict]:
    """The records of a file that a kill may have torn: whatever follows the last whole line that parses is cut off."""
    path = Path(path)
    if path.is_symlink():
        raise UserError(f"{path} is a link; it is written to, so wanted a file of its own: move the file here")
    data = _read_bytes(path, JSON_LIMIT) if path.exists() else b""
    keep = data.rfind(b"\n") + 1
    while keep:
        start = data.rfind(b"\n", 0, keep - 1) + 1
        try:
            if isinstance(_parse(data[start:keep], ""), dict):
                break
        except UserError:
            pass
        keep = start
    if keep < len(data):
        warn(f"{path}: cut {len(data) - keep} bytes of an unfinished line at the end")
        os.truncate(path, keep)
        sync(path)
    return read_jsonl(path) if keep else []


class JsonlAppender:
    """A jsonl file that a killed run goes on with: `.done` holds the records already there, `.append` adds one.

    fingerprint: all that the records depend on (adapter, prompt, sampling, inputs). It lies in <path>.meta.json; a file
    with another one is refused, so that two kinds of records never mix."""

    def __init__(self, path: str | Path, fingerprint: dict):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        meta = self.path.with_name(self.path.name + ".meta.json")
        fingerprint = json.loads(json.dumps(fingerprint))
        if self.path.exists() and self.path.stat().st_size:
            found = read_json(meta, SMALL_JSON) if meta.exists() else {}
            if _known_then(fingerprint, found) != fingerprint:
                raise other_settings(self.path, found, fingerprint, "delete the file")
        write_json(meta, fingerprint, indent=2)
        self.done = repair_jsonl(self.path)

    def append(self, record: dict) -> None:
        """One whole line or, on a full disk, none and an OSError."""
        append_line(self.path, record)


def other_settings(path: str | Path, then: dict, now: dict, remedy: str) -> UserError:
    """The line that says why what was written under other settings is not overwritten. remedy: besides another --out"""
    what = f"{path} was written with other settings ({_difference(then, now)})"
    return UserError(f"{what}; use those, or another --out, or {remedy}")


def real_path(folder: str | Path) -> str:
    """Where a folder lies, without links, as text for JSON: a path need not be UTF-8."""
    return os.fsencode(os.path.realpath(folder)).decode(errors="backslashreplace")


def _known_then(now: dict, then: dict) -> dict:
    """What a run began with, `then`, and of LATER what it did not keep as it is now."""
    return {name: value for name, value in now.items() if name in LATER} | then


def _difference(found: dict, wanted: dict) -> str:
    """ "LR: 0.1 there, 0.2 now; ..." for the entries of two JSON records that differ; of hashes that they changed."""
    then, now = ({name: json.dumps(value) for name, value in record.items()} for record in (found, wanted))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    said = {name: f"{name}: {then.get(name, 'absent')} there, {now.get(name, 'absent')} now" for name in names}
    said |= {name: f"{name}: the data changed since" for name in names if name.endswith("_SHA256")}
    return "; ".join(said.values())


# ---- hashes and manifests ----


def file_sha256(path: str | Path, limit: int = HASH_LIMIT) -> str:
    """The hex digest of a file's bytes; UserError for anything but a regular file of at most `limit` bytes."""
    with open_regular(path, limit) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(named: Iterable, more: str = "") -> str:
    """sha256 of (name, tensor) pairs in their order: names, dtypes, shapes and bytes; `more` text comes first."""
    import torch

    digest = hashlib.sha256(more.encode())
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest(path: Path) -> dict:
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _verify(path: Path) -> dict:
    """The manifest beside a file, once the file is found to be the one it was written for; else UserError."""
    manifest = read_json(path.parent / "manifest.json", SMALL_JSON)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path.parent}/manifest.json is not a manifest")
    wanted = manifest["files"].get(path.name)
    size = path.stat().st_size
    if not isinstance(wanted, dict) or wanted.get("bytes") != size or wanted != _digest(path):  # the quick one first
        raise UserError(f"{path} is damaged: it does not match the sha256 and size in manifest.json")
    return manifest


def _write_manifest(folder: Path, more: dict) -> None:
    """fsyncs every file of the folder, then writes the manifest: it is the last, so that it vouches for whole files."""
    for path in folder.iterdir():
        sync(path)
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"files": files, **more}, indent=1)


# ---- a stage's result ----


def save_folder(path: str | Path, tensors: dict[str, dict], texts: dict[str, str | dict]) -> None:
    """A stage's result: safetensors files, texts (a dict becomes JSON) and manifest.json. Rank 0 writes; nobody waits.

    Into path.tmp/ first. A new folder is renamed as a whole. Where it exists (it may hold a log and a run's state) the
    files move over one by one, the manifest first and the tensors last: load_tensors sees a kill in between."""
    if rank_size()[0] != 0:
        return
    path = Path(path)
    with fresh(path.with_name(path.name + ".tmp")) as aside:
        for name, value in texts.items():
            if isinstance(value, str):
                write_text(aside / name, value)
            else:
                write_json(aside / name, value, indent=2)
        for name, entries in tensors.items():
            write_tensors(aside / name, entries)
        _write_manifest(aside, {})
    if path.exists():
        for name in ("manifest.json", *texts, *tensors):
            os.replace(aside / name, path / name)
        aside.rmdir()
        sync(path)
    else:
        os.rename(aside, path)
    sync(path.parent)


def load_tensors(folder: str | Path, file: str) -> dict:
    """The tensors of folder/file, on CPU, checked against the manifest if there is one: bit flips load silently."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / file
    if not path.is_file():
        raise UserError(f"{path} is missing; run the stage that writes it, or correct the folder")
    try:
        if (path.parent / "manifest.json").exists():
            _verify(path)
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); write it again") from None


def read_saved_json(folder: str | Path, file: str = "config.json") -> Any:
    """folder/file of a stage's result, checked against its manifest, if any: a flipped digit is JSON as well."""
    path = Path(folder) / file
    if (path.parent / "manifest.json").exists():
        try:
            _verify(path)
        except UserError as fault:
            moved = "for a model that moved there are --llm, --vision and --backbone"
            raise UserError(f"{fault}, or was edited; restore it ({moved})") from None
    return read_json(path, SMALL_JSON)


# ---- a run's state ----


def _steps(out: str | Path) -> list[Path]:
    """The step-N folders of a run, newest first; step-N.tmp of a killed save is none of them."""
    found = [p for p in (Path(out) / "last").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_state(out: str | Path, step: int, state: dict, constants: dict) -> None:
    """Training state after `step` steps into out/last/step-N/, whole or not at all; two are kept. Rank 0 writes.

    state: tensors, numbers, strings, dicts, lists (what weights_only=True reads). A resume must agree on constants."""
    if rank_size()[0] != 0:
        return
    constants = json.loads(json.dumps(constants))
    last = Path(out) / "last"
    last.mkdir(parents=True, exist_ok=True)
    for stray in last.glob("*.tmp"):  # of a save that was killed
        remove(stray)
    final = last / f"step-{step}"
    with fresh(last / f"step-{step}.tmp") as aside:
        saved = {"step": step, "constants": json.dumps(constants), "state": state, "machine": _machine()}
        torch_save(saved, aside / "state.pt")
        _write_manifest(aside, {"step": step, "constants_sha256": _hash(constants)})
    if final.exists():  # left unverified by load_state, or written by the run that this one repeats
        os.rename(final, last / f"step-{step}.old.tmp")
    os.rename(aside, final)
    sync(last)
    known = _steps(out)
    newer = [p for p in known if int(p.name[5:]) > step]  # did not verify, or this run would have started from it
    for old in newer + [p for p in known if p not in newer][2:]:
        os.rename(old, last / f"{old.name}.old.tmp")  # a half-removed folder must not look like a checkpoint
    for stray in last.glob("*.tmp"):
        remove(stray)


def load_state(out: str | Path, constants: dict, may_change: Iterable[str] = MAY_CHANGE) -> tuple[int, dict] | None:
    """(step, state) of the newest checkpoint that verifies, None where none was ever saved.

    A damaged one is said loudly and the one before is taken; if all are damaged, or the constants differ, UserError."""
    constants = json.loads(json.dumps(constants))
    damage = []
    for folder in _steps(out):
        try:
            step, state, then, machine = _load_step(folder)
        except (UserError, OSError) as error:
            damage.append(str(error))
            warn(f"checkpoint {folder} does not verify ({error}); trying the one before")
            continue
        then, ignored = _known_then(constants, then), set(may_change)
        difference = _difference(
            {k: v for k, v in then.items() if k not in ignored},
            {k: v for k, v in constants.items() if k not in ignored},
        )
        if difference:
            raise UserError(
                f"{folder} was saved with other constants ({difference}); "
                "resume with those, or start anew with another --out"
            )
        if machine and (difference := _difference(machine, _machine())):
            warn(f"{folder} comes from another machine ({difference}): the last digits of the weights will differ")
        return step, state
    if damage:
        raise UserError(
            f"no checkpoint in {Path(out) / 'last'} verifies ({'; '.join(damage)}); "
            "restore one from a copy, or delete that folder to start from step 0"
        )
    return None


def _load_step(folder: Path) -> tuple[int, dict, dict, dict]:
    """(step, state, constants, machine); the manifest's own entries are compared too: a bit can flip there as well."""
    import torch

    manifest = _verify(folder / "state.pt")
    try:
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        step, state, constants = saved["step"], saved["state"], json.loads(saved["constants"])
        machine = saved.get("machine", {})
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/state.pt is not a training state ({str(error).splitlines()[0]})") from None
    vouched = (f"step-{manifest.get('step')}", manifest.get("constants_sha256"))
    if folder.name != f"step-{step}" or vouched != (folder.name, _hash(constants)):
        raise UserError(f"{folder}: its step or constants differ from manifest.json")
    return step, state, constants, machine


def is_finished(out: str, file: str, done: int, steps: int) -> bool:
    """Whether an earlier run took all its steps and wrote its result, which must be whole; says so."""
    finished = done >= steps and os.path.exists(os.path.join(out, file))
    if finished:
        load_tensors(out, file)
        say(f"{out} is finished ({steps} steps); for another run take another --out")
    return finished


def _machine() -> dict:
    """What besides constants and data decides the last bits of a result."""
    import torch

    found = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        return found | {"gpu": torch.cuda.get_device_name()}
    return found | {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}


# ---- the lock ----


def keep_apart(out: str | Path, pictures: str, flags: str) -> None:
    """UserError where `out` lies in a folder of which every picture is read, which would be its own the next time.

    flags: the two that name them, "--out --images"."""
    if Path(out).resolve().is_relative_to(Path(pictures).resolve()):
        own, other = flags.split()
        raise UserError(
            f"{own} {out} is in {other} {pictures}: what is written there would be read next time; move {own}"
        )


def lock_folder(out: str | Path, stage: str = "", flag: str = "--out") -> None:
    """Makes the output folder and holds it until this process ends; a second run on it stops. Rank 0 locks.

    stage: as in config.json. A folder with the result of another stage is refused on every rank.
    flag: the one that names the folder, for messages."""
    folder = Path(out).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {out} is a file; wanted a folder")
    if stage:
        _refuse_other_stage(folder, stage, out)
    if rank_size()[0] != 0 or folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    if path.is_symlink():
        raise UserError(f"{path} is a link; remove it")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(handle, "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read(20).decode(errors="replace").strip() or "unknown"
        file.close()
        says = f"{out} is in use by another run (process {owner}); wait for it or use another {flag}"
        raise UserError(says) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"the disk of {folder} has no locks ({error.strerror}): see to it that no second run writes there")
    with naming(path):
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
    _locks[folder] = file


def _refuse_other_stage(folder: Path, stage: str, out: str | Path) -> None:
    """Also where last/ is gone: what another stage finished is not overwritten."""
    path = folder / "config.json"
    found = read_json(path, SMALL_JSON) if path.is_file() else {}
    other = found.get("stage", stage) if isinstance(found, dict) else stage
    if other != stage:
        raise UserError(f"--out {out} holds what stage {other!r} wrote, this is {stage!r}; use another --out")
