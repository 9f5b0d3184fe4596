"""What every stage shares: flags from constants, process group, progress and logs, seeds, files that survive a kill.

Nothing here imports torch at module level, so that `python stage.py --help` answers at once. In this order:
errors and `run`, flags, the world of ranks, progress and log and seeds, files, jsonl, checkpoints, stop signals.
"""

from __future__ import annotations

import ast
import difflib
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import stat
import sys
import textwrap
import time
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Constants whose change leaves the weights as they are: a run may be resumed with other values of these.
MAY_CHANGE = frozenset({"OUT", "DEVICE", "CHECK", "WORKERS", "SAVE_EVERY", "LOG_EVERY"})
JSON_LIMIT = 2 << 30  # bytes; LLaVA's chat.json, the largest file read, has 0.2 GB


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
        _fail(error)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if _rank_size()[1] > 1:
        sys.modules["torch"].distributed.destroy_process_group()


def _fail(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    line = printable(" ".join(part.strip() for part in text.splitlines() if part.strip()))
    who = f" (rank {_rank_size()[0]})" if _rank_size()[0] else ""
    print(f"error{who}: {line or type(error).__name__}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def printable(text: str) -> str:
    """Control characters (terminal escapes in a caption or a file name) become U+FFFD; newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


# ---------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flag:
    """One constant of a script: NAME = default  # help, under the last `# ---- group ----` line above it."""

    name: str
    default: Any
    help: str
    group: str


def read_flags(file: str | Path) -> list[Flag]:
    """The UPPERCASE literals at the top level of a script, with their trailing comments; the script is not imported.

    A comment goes on over the indented comment lines that follow. A dict, or a value computed by code, is no flag."""
    source = Path(file).read_text(encoding="utf-8")
    comments = {
        token.start[0]: (token.start[1], token.string.lstrip("#").strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.split("\n")
    groups = {n: m[1] for n, (_, text) in comments.items() if (m := re.fullmatch(r"-{3,}\s*(.+?)\s*-{3,}", text))}
    flags = []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not (isinstance(target, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id)):
            continue
        try:
            default = ast.literal_eval(node.value)
        except (ValueError, TypeError):  # computed by code
            continue
        if not isinstance(default, bool | int | float | str | tuple | list | None):
            continue
        last = node.end_lineno
        text = [comments.get(last, comments.get(node.lineno, (0, "")))[1]]
        while (last := last + 1) in comments and comments[last][0] > 0 and lines[last - 1].lstrip().startswith("#"):
            text.append(comments[last][1])
        group = max((n for n in groups if n < node.lineno), default=None)
        flags.append(Flag(target.id, default, " ".join(text).strip(), groups.get(group, "")))
    return flags


def parse_flags(flags: list[Flag], argv: list[str]) -> dict[str, Any]:
    """["--lr", "1e-4", "--SEED=3", "--check"] -> {"LR": 1e-4, "SEED": 3, "CHECK": True}; the last of a repeat wins."""
    known = {flag.name: flag for flag in flags}
    values = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected {word!r} on the command line; flags look like --name value (see --help)")
        shown, equals, value = word.partition("=")
        name = shown[2:].replace("-", "_").upper()
        if name not in known:
            raise UserError(f"unknown flag {shown}; the nearest is {_nearest(name, flags)} (--help lists all)")
        flag = known[name]
        if not equals:
            has_value = bool(rest) and not rest[0].startswith("--")
            if not has_value and not isinstance(flag.default, bool):
                raise UserError(f"{shown} wants a value, such as {shown} {_show(flag.default)} (its default)")
            value = rest.pop(0) if has_value else "true"
            while isinstance(flag.default, tuple | list) and rest and not rest[0].startswith("--"):
                value += "," + rest.pop(0)  # --score a.json b.json
        try:
            values[name] = _convert(value, flag.default)
        except ValueError as error:
            raise UserError(f"{shown} wants {error}, found {value!r}; its default is {_show(flag.default)}") from None
    return values


def _nearest(name: str, flags: list[Flag]) -> str:
    """Compares with the names and with the comments' first words: leaning_rate finds LR = ...  # learning rate."""
    if not flags:
        return "none: this script has no flags"
    words = {}
    for flag in flags:
        phrase = re.split(r"[^a-z0-9 _-]", flag.help.lower())[0]
        words |= {re.sub(r"[ _-]+", "_", phrase.strip()).upper(): flag.name}
    words |= {flag.name: flag.name for flag in flags}
    return "--" + words[difflib.get_close_matches(name, words, n=1, cutoff=0)[0]].lower()


def _convert(text: str, default: Any) -> Any:
    """Text to the default's type; ValueError names what was wanted."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("true or false")
        return text.lower() in ("true", "1", "yes")
    if isinstance(default, int | float):
        wanted = "a whole number" if isinstance(default, int) else "a number"
        try:
            number = float(text)
            if isinstance(default, float):
                value = number
            else:  # 1e5 is a whole number too; int() alone keeps every digit of a long one
                value = int(number) if number.is_integer() and "e" in text.lower() else int(text)
        except (ValueError, OverflowError):
            raise ValueError(wanted) from None
        if math.isnan(number):
            raise ValueError(wanted)
        return value
    if isinstance(default, tuple | list):
        element = default[0] if default else ""
        parts = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]").split(",")
        parts = [part.strip().strip("'\"") for part in parts]
        try:
            return type(default)(_convert(part, element) for part in parts if part)
        except ValueError as error:
            raise ValueError(f"a list such as {_show(default) or 'a,b'} ({error} each)") from None
    if default is None:
        if text.lower() == "none":
            return None
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
    return text


def _show(value: Any) -> str:
    """A default as one would type it on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    if isinstance(value, str):
        return value if re.fullmatch(r"\S+", value) else json.dumps(value)
    return str(value).lower()


def help_text(file: str | Path) -> str:
    """The script's docstring, then its constants by group: flag, default, meaning."""
    text = [ast.get_docstring(ast.parse(Path(file).read_text(encoding="utf-8"))) or Path(file).name]
    text += ["", "Each constant is a flag, here with its default: --name value or --name=value; a bare --name is true."]
    group = None
    for flag in read_flags(file):
        if flag.group != group:
            group = flag.group
            text += ["", group]
        left = f"  --{flag.name.lower()} {_show(flag.default)}"
        if len(left) > 38:
            text.append(left)
            left = ""
        text += textwrap.wrap(flag.help, 120, initial_indent=left.ljust(40), subsequent_indent=" " * 40) or [left]
    return "\n".join(text)


def _command_line(file: str) -> dict[str, Any]:
    """The values the command line gives, or help and exit 0, or one line and exit 1."""
    argv = sys.argv[1:]
    first = _rank_size()[0] == 0
    try:
        if "--help" in argv or "-h" in argv:
            if first:
                print(help_text(file))
            raise SystemExit(0)
        return parse_flags(read_flags(file), argv)
    except (UserError, OSError) as error:
        if first:  # every rank reads the same command line: once is enough
            _fail(error)
        raise SystemExit(1) from None


def early_help(name: str, file: str) -> None:
    """`common.early_help(__name__, __file__)` above `import torch`: --help and a wrong flag are answered before it."""
    if name == "__main__":
        _command_line(file)


def override(constants: dict[str, Any], argv: list[str] | None = None) -> None:
    """`common.override(globals())`: the command line's flags replace the script's constants.

    Without argv the process's own command line is read, and a mistake ends the process: one line, exit status 1.
    With argv given it raises UserError."""
    file = constants["__file__"]
    constants.update(_command_line(file) if argv is None else parse_flags(read_flags(file), argv))


def constants_of(constants: dict[str, Any]) -> dict[str, Any]:
    """The present values of a script's constants: `constants_of(globals())`."""
    return {flag.name: constants[flag.name] for flag in read_flags(constants["__file__"])}


def at_least(constants: dict[str, Any], **lowest: float) -> None:
    """`common.at_least(globals(), BATCH=1, TAU=1e-4)`: UserError naming the first constant below its lowest value."""
    for name, low in lowest.items():
        if not constants[name] >= low:  # so is NaN
            raise UserError(f"--{name.lower()} {constants[name]}: wanted {low} or more")


# ---------------------------------------------------------------- the world of ranks


@dataclass(frozen=True)
class World:
    """This process among its peers; a run without torchrun is a world of one."""

    rank: int
    size: int
    local_rank: int
    device: Any  # torch.device


def _rank_size() -> tuple[int, int]:
    """(rank, size) of the process group; before there is one, the rank torchrun announced and a world of one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), 1


def init_world(device: str = "auto") -> World:
    """Joins the ranks torchrun started (NCCL on GPUs, gloo on CPU). device: "auto", "cpu", "cuda" or "cuda:1"."""
    import importlib.metadata
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if next(importlib.metadata.distributions(name="kernels"), None) is not None:
        # it would be imported in place of our kernels/, and transformers runs code from the hub where it is installed
        raise UserError("the PyPI package `kernels` is installed and collides with our kernels/; pip uninstall kernels")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
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
    here = torch.device(name)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if here.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))  # a dead peer must not hang the others for ever
    rank, size = _rank_size()
    return World(rank, size, local_rank, here)


@functools.cache
def _gather_function():
    """The autograd function of gather_with_grad, made on first use because its base class needs torch."""
    import torch
    import torch.distributed as dist

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            rank, size = _rank_size()
            counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(size)]
            dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
            counts = [int(count) for count in counts]
            padded = x.new_zeros(max(counts), *x.shape[1:])  # all_gather wants equal shapes
            padded[: len(x)] = x
            parts = [torch.empty_like(padded) for _ in range(size)]
            dist.all_gather(parts, padded)
            ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

        @staticmethod
        def backward(ctx, grad):
            grad = grad.contiguous().clone()  # the incoming gradient may be shared with other nodes: never in place
            dist.all_reduce(grad)
            return grad[ctx.rows]

    return Gather


def gather_with_grad(x):
    """(B_r, ...) of each rank -> (sum of B_r, ...) in rank order, on every rank; the B_r may differ.

    Backward sums the gradients of all ranks' losses and hands each rank its own rows, so every rank must call backward.
    If each rank's loss is a share of the global one, the parameters' gradients then only need all_reduce_gradients."""
    return x if _rank_size()[1] == 1 else _gather_function().apply(x)


def all_reduce_gradients(parameters: Iterable) -> None:
    """Sums .grad over the ranks, in place; the loss was already divided by the global count. No .grad counts as 0."""
    if _rank_size()[1] == 1:
        return
    import torch

    by_dtype = {}
    for p in parameters:
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.reshape(-1) for grad in grads])  # one message instead of hundreds of small ones
        torch.distributed.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def all_sum(x):
    """The sum over ranks of a number (in float64) or of a tensor; no gradient flows."""
    import torch

    if torch.is_tensor(x):
        total = x.detach().clone()
    else:
        nccl = _rank_size()[1] > 1 and torch.distributed.get_backend() == "nccl"
        total = torch.tensor(float(x), dtype=torch.float64, device="cuda" if nccl else "cpu")  # NCCL takes GPU tensors
    if _rank_size()[1] > 1:
        torch.distributed.all_reduce(total)
    return total if torch.is_tensor(x) else float(total)


def any_rank(flag: bool) -> bool:
    """True on every rank if any rank says True, so that all of them stop together."""
    return all_sum(float(bool(flag))) > 0


def gather_objects(item: Any) -> list[Any]:
    """Every rank's small object, in rank order."""
    size = _rank_size()[1]
    if size == 1:
        return [item]
    import torch

    items = [None] * size
    torch.distributed.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Waits for every rank."""
    any_rank(False)


def pick_dtype(dtype: str, device):
    """--dtype to torch's: "auto" is bf16 on CUDA and fp32 on CPU."""
    import torch

    if dtype == "auto":
        dtype = "bf16" if torch.device(device).type == "cuda" else "fp32"
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    names |= {str(t).removeprefix("torch."): t for t in names.values()}
    if dtype not in names:
        raise UserError(f"--dtype is {dtype!r}, wanted auto, fp32, bf16 or fp16")
    return names[dtype]


# ---------------------------------------------------------------- progress, log, seeds


def progress(iterable: Iterable, desc: str, total: int | None = None) -> Iterable:
    """A bar on rank 0; written to a file or a pipe it keeps quiet for 30 s and then speaks every 30 s."""
    from tqdm import tqdm

    quiet = 0.2 if sys.stderr.isatty() else 30
    delay = 0 if quiet < 1 else quiet
    return tqdm(iterable, desc, total, disable=_rank_size()[0] != 0, mininterval=quiet, delay=delay, dynamic_ncols=True)


def say(*text: Any) -> None:
    """Prints on rank 0, above a progress bar if there is one."""
    if _rank_size()[0] == 0:
        line = printable(" ".join(map(str, text)))
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line)
        else:
            print(line)
        sys.stdout.flush()


def _warn(text: str) -> None:
    if _rank_size()[0] == 0:
        print(f"WARNING: {printable(text)}", file=sys.stderr, flush=True)


class Log:
    """folder/log.jsonl, one whole line a record, written by rank 0.

    Records carry the steps done so far. resume_step: those of later steps are dropped, which the killed run had reached
    after its last checkpoint and which come again."""

    def __init__(self, folder: str | Path, resume_step: int | None = None):
        self.path = Path(folder) / "log.jsonl"
        if _rank_size()[0] == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records = repair_jsonl(self.path)
            if resume_step is not None:
                kept = [record for record in records if record.get("step", 0) <= resume_step]
                if len(kept) < len(records):
                    write_text(self.path, "".join(_line(record) for record in kept))

    def write(self, **record: Any) -> None:
        if _rank_size()[0] == 0:
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[key] = str(value)  # JSON has no NaN
            _append(self.path, record)


def _seed(*keys: Any) -> int:
    digest = hashlib.sha256(json.dumps(keys, default=int).encode()).digest()  # default: numpy integers
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits: torch takes signed seeds


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch (CPU and CUDA), so that dropout is a function of (seed, step, rank) and survives a resume."""
    import torch

    torch.manual_seed(_seed("step", seed, step, rank))


def rng(*keys: Any):
    """A numpy Generator that is a function of the keys (seed, epoch, item, ...: numbers and strings)."""
    import numpy

    return numpy.random.default_rng(_seed(*keys))


def generator(*keys: Any):
    """A torch.Generator (CPU) that is a function of the keys."""
    import torch

    return torch.Generator().manual_seed(_seed(*keys))


# ---------------------------------------------------------------- files


def _sync(path: str | Path) -> None:
    """Down to the disk: without it a power cut leaves a renamed file of zeros. Works on folders too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Atomic: a kill leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(text.encode("utf-8"))
    _sync(aside)
    os.replace(aside, path)
    _sync(path.parent)


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Atomic, UTF-8, no NaN."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, records: Iterable[dict]) -> None:
    """One record a line; the old file or the new one, never a part."""
    write_text(path, "".join(map(_line, records)))


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
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of more than 4,300 digits
        raise UserError(f"{where}: not usable JSON: {error}") from None


def _read_bytes(path: str | Path, limit: int) -> bytes:
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path}: not a regular file")
    if info.st_size > limit:
        raise UserError(f"{path}: {info.st_size:,} bytes, more than the limit of {limit:,}")
    return Path(path).read_bytes()


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Strict JSON of at most `limit` bytes; UserError names the file and the place."""
    return _parse(_read_bytes(path, limit), str(path))


def read_jsonl(path: str | Path, limit: int = JSON_LIMIT) -> list[dict]:
    """One JSON object a line, blank lines skipped; UserError names a bad line. Lines end with LF alone: a caption may
    hold U+2028, at which str.splitlines would cut."""
    records = []
    for number, line in enumerate(_read_bytes(path, limit).split(b"\n"), 1):
        if line.strip():
            records.append(_parse(line, f"{path} line {number}"))
            if not isinstance(records[-1], dict):
                raise UserError(f"{path} line {number}: wanted a JSON object, found {type(records[-1]).__name__}")
    return records


# ---------------------------------------------------------------- jsonl that is appended to


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, record: dict) -> None:
    """One whole line or none: a full disk writes a part of it without raising, which is then cut off again."""
    data = _line(record).encode("utf-8")
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, data) != len(data):
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def repair_jsonl(path: str | Path) -> list[dict]:
    """The records of a file that a kill may have torn: whatever follows the last whole line that parses is cut off."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
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
        _warn(f"{path}: cut {len(data) - keep} bytes of an unfinished line at the end")
        os.truncate(path, keep)
        _sync(path)
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
            found = read_json(meta) if meta.exists() else {}
            if found != fingerprint:
                raise UserError(
                    f"{self.path} was written with other settings ({_difference(found, fingerprint)}); "
                    "use those, or another --out, or delete the file"
                )
        else:
            write_json(meta, fingerprint, indent=2)
        self.done = repair_jsonl(self.path)

    def append(self, record: dict) -> None:
        _append(self.path, record)


def _difference(found: dict, wanted: dict) -> str:
    """ "LR: 0.1 there, 0.2 now; ..." for the entries of two JSON records that differ."""
    then, now = ({name: json.dumps(value) for name, value in record.items()} for record in (found, wanted))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(f"{name}: {then.get(name, 'absent')} there, {now.get(name, 'absent')} now" for name in names)


# ---------------------------------------------------------------- checkpoints


def file_sha256(path: str | Path) -> str:
    """The hex digest of a file's bytes."""
    with open(path, "rb") as file:
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
    manifest = read_json(path.parent / "manifest.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path.parent}/manifest.json is not a manifest")
    if _digest(path) != manifest["files"].get(path.name):
        raise UserError(f"{path} is damaged: it does not match the sha256 and size in manifest.json")
    return manifest


def _write_manifest(folder: Path, more: dict) -> None:
    """fsyncs every file of the folder, then writes the manifest: it is the last, so that it vouches for whole files."""
    for path in folder.iterdir():
        _sync(path)
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    write_json(folder / "manifest.json", {"files": files, **more}, indent=1)


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def save_folder(path: str | Path, tensors: dict[str, dict], texts: dict[str, str | dict]) -> None:
    """A stage's result: safetensors files, texts (a dict becomes JSON) and manifest.json. Rank 0 writes; nobody waits.

    Into path.tmp/ first. A new folder is renamed as a whole. Where it exists (it may hold a log and a run's state) the
    files move over one by one, the manifest first and the tensors last: load_tensors sees a kill in between."""
    if _rank_size()[0] != 0:
        return
    from safetensors.torch import save_file

    path = Path(path)
    aside = _fresh(path.with_name(path.name + ".tmp"))
    for name, value in texts.items():
        if isinstance(value, str):
            write_text(aside / name, value)
        else:
            write_json(aside / name, value, indent=2)
    for name, entries in tensors.items():
        entries = {key: tensor.detach().cpu().contiguous() for key, tensor in entries.items()}
        save_file(entries, aside / name, metadata={"format": "pt"})
    _write_manifest(aside, {})
    if path.exists():
        for name in ("manifest.json", *texts, *tensors):
            os.replace(aside / name, path / name)
        aside.rmdir()
        _sync(path)
    else:
        os.rename(aside, path)
    _sync(path.parent)


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


def _steps(out: str | Path) -> list[Path]:
    """The step-N folders of a run, newest first; step-N.tmp of a killed save is none of them."""
    found = [p for p in (Path(out) / "last").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name[5:]))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def save_state(out: str | Path, step: int, state: dict, constants: dict) -> None:
    """Training state after `step` steps into out/last/step-N/, whole or not at all; two are kept. Rank 0 writes.

    state: tensors, numbers, strings, dicts, lists (what weights_only=True reads). A resume must agree on constants."""
    if _rank_size()[0] != 0:
        return
    import torch

    constants = json.loads(json.dumps(constants))
    last = Path(out) / "last"
    last.mkdir(parents=True, exist_ok=True)
    for stray in last.glob("*.tmp"):  # of a save that was killed
        shutil.rmtree(stray)
    final = last / f"step-{step}"
    aside = _fresh(last / f"step-{step}.tmp")
    torch.save({"step": step, "constants": json.dumps(constants), "state": state}, aside / "state.pt")
    _write_manifest(aside, {"step": step, "constants_sha256": _hash(constants)})
    if final.exists():  # left unverified by load_state, or written by the run that this one repeats
        os.rename(final, last / f"step-{step}.old.tmp")
    os.rename(aside, final)
    _sync(last)
    known = _steps(out)
    newer = [p for p in known if int(p.name[5:]) > step]  # did not verify, or this run would have started from it
    for old in newer + [p for p in known if p not in newer][2:]:
        os.rename(old, last / f"{old.name}.old.tmp")  # a half-removed folder must not look like a checkpoint
    for stray in last.glob("*.tmp"):
        shutil.rmtree(stray)


def load_state(out: str | Path, constants: dict, may_change: Iterable[str] = MAY_CHANGE) -> tuple[int, dict] | None:
    """(step, state) of the newest checkpoint that verifies, None where none was ever saved.

    A damaged one is said loudly and the one before is taken; if all are damaged, or the constants differ, UserError."""
    constants = json.loads(json.dumps(constants))
    damage = []
    for folder in _steps(out):
        try:
            step, state, then = _load_step(folder)
        except (UserError, OSError) as error:
            damage.append(str(error))
            _warn(f"checkpoint {folder} does not verify ({error}); trying the one before")
            continue
        ignored = set(may_change)
        difference = _difference(
            {k: v for k, v in then.items() if k not in ignored},
            {k: v for k, v in constants.items() if k not in ignored},
        )
        if difference:
            raise UserError(
                f"{folder} was saved with other constants ({difference}); "
                "resume with those, or start anew with another --out"
            )
        return step, state
    if damage:
        raise UserError(
            f"no checkpoint in {Path(out) / 'last'} verifies ({'; '.join(damage)}); "
            "restore one from a copy, or delete that folder to start from step 0"
        )
    return None


def _load_step(folder: Path) -> tuple[int, dict, dict]:
    """(step, state, constants); the manifest's own entries are compared too, as a bit can flip there as well."""
    import torch

    manifest = _verify(folder / "state.pt")
    try:
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        step, state, constants = saved["step"], saved["state"], json.loads(saved["constants"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/state.pt is not a training state ({str(error).splitlines()[0]})") from None
    vouched = (f"step-{manifest.get('step')}", manifest.get("constants_sha256"))
    if folder.name != f"step-{step}" or vouched != (folder.name, _hash(constants)):
        raise UserError(f"{folder}: its step or constants differ from manifest.json")
    return step, state, constants


_locks: dict[Path, Any] = {}  # the open files: closing one would unlock it


def lock_folder(out: str | Path) -> None:
    """Makes the output folder and holds it until this process ends; a second run on it stops. Rank 0 locks."""
    folder = Path(out).resolve()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out} is a file; wanted a folder")
    if _rank_size()[0] != 0 or folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(20).strip() or "unknown"
        file.close()
        raise UserError(f"{out} is in use by another run (process {owner}); wait for it or use another --out") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _locks[folder] = file


# ---------------------------------------------------------------- stop signals

_stop = {"time": None, "installed": False}


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
        if _rank_size()[0] == 0:  # not print: it fails where the signal came amid another print
            os.write(2, b"stopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
