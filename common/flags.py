"""A script's constants as flags: --help, and one line for a wrong one. Nothing here imports torch: it is instant.

A tuple of numbers wants as many values as its default has (--betas 0.9,0.99); any other tuple takes any number."""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console import UserError, fail, hush, interrupt_quietly, rank_size

_TOO_LARGE = {int: 2**63, float: 2.0**127}  # of int64 and float32: such a number, or inf, fails only where it is used

# ---- a script's flags ----


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


# ---- the command line ----


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
        if abs(number) >= (limit := _TOO_LARGE[type(default)]):
            raise ValueError(f"{wanted} below {limit:.2g}")
        return value
    if isinstance(default, tuple | list):
        element = default[0] if default else ""
        parts = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]").split(",")
        parts = [part.strip().strip("'\"") for part in parts]
        try:
            values = type(default)(_convert(part, element) for part in parts if part)
        except ValueError as error:
            raise ValueError(f"a list such as {_show(default) or 'a,b'} ({error} each)") from None
        if isinstance(element, int | float) and len(values) != len(default):
            raise ValueError(f"{len(default)} numbers such as {_show(default)}")
        return values
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
    first = rank_size()[0] == 0
    try:
        if "--help" in argv or "-h" in argv:
            if first:
                try:
                    print(help_text(file), flush=True)
                except BrokenPipeError:  # --help | head
                    hush(sys.stdout)
            raise SystemExit(0)
        return parse_flags(read_flags(file), argv)
    except (UserError, OSError) as error:
        if first:  # every rank reads the same command line: once is enough
            fail(error)
        raise SystemExit(1) from None


def early_help(name: str, file: str) -> None:
    """`early_help(__name__, __file__)` above `import torch`: --help, a wrong flag and Ctrl-C are answered there."""
    if name == "__main__":
        interrupt_quietly()
        _command_line(file)


def override(constants: dict[str, Any], argv: list[str] | None = None) -> None:
    """`override(globals())`: the command line's flags replace the script's constants.

    Without argv the process's own command line is read, and a mistake ends the process: one line, exit status 1.
    With argv given it raises UserError."""
    file = constants["__file__"]
    constants.update(_command_line(file) if argv is None else parse_flags(read_flags(file), argv))


def constants_of(constants: dict[str, Any]) -> dict[str, Any]:
    """The present values of a script's constants: `constants_of(globals())`."""
    return {flag.name: constants[flag.name] for flag in read_flags(constants["__file__"])}


# ---- values: each of these raises UserError with one line that names the flag ----


def at_least(constants: dict[str, Any], **lowest: float) -> None:
    """`at_least(globals(), BATCH=1, TAU=1e-4)`: none may lie below its lowest value."""
    for name, low in lowest.items():
        _each(constants, name, lambda value, low=low: value >= low, f"{low} or more")


def below(constants: dict[str, Any], **end: float) -> None:
    """`below(globals(), COMBINER_DROPOUT=1)`: each must be less than the number."""
    for name, high in end.items():
        _each(constants, name, lambda value, high=high: value < high, f"less than {high}")


def within(constants: dict[str, Any], **bounds: tuple[float, float]) -> None:
    """`within(globals(), HELD_OUT=(0, 1), BETAS=(0, 1))`: from low to high, both allowed; so is each of a tuple."""
    for name, (low, high) in bounds.items():
        _each(constants, name, lambda value, low=low, high=high: low <= value <= high, f"{low} to {high}")


def _each(constants: dict[str, Any], name: str, holds: Callable[[Any], bool], wanted: str) -> None:
    """NaN holds nowhere."""
    value = constants[name]
    every = value if isinstance(value, tuple | list) else (value,)
    if not all(map(holds, every)):
        raise UserError(f"--{name.lower()} {_show(value)}: wanted {wanted}{' each' if len(every) > 1 else ''}")


def one_of(constants: dict[str, Any], **choices: Iterable[str]) -> None:
    """`one_of(globals(), MODEL=("combiner", "blip_tdm"))`: each must be one of its words."""
    for name, words in choices.items():
        words = list(words)
        value = str(constants[name])
        if value in words:
            continue
        wanted = " or ".join(filter(None, [", ".join(map(_show, words[:-1])), _show(words[-1])]))
        near = difflib.get_close_matches(value.lower(), words, n=1)
        raise UserError(f"--{name.lower()} {_show(value)}: wanted {wanted}" + "".join(f"; meant {w}?" for w in near))
