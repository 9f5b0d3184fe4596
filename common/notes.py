"""What a person says on search.py's page: marks on results, labels of mined pairs; files that train_cir.py reads."""

import contextlib
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from common.annotations import Triplet
from common.console import UserError, say
from common.files import read_jsonl, write_jsonl
from common.images import ImageStore


@dataclass
class Notes:
    """Written whole at each change, so that a kill leaves the files of before or after it."""

    out: Path
    held_out: int  # of so many references the marks of one are kept apart
    marks: dict[tuple, dict]  # (reference, target, delta) -> {"right", "held_out", "texts"}, in the order of making
    pairs: list[Triplet]  # of --label, those whose two pictures are in the gallery; `delta` is the generated text
    # (reference, target, generated text) -> {"verdict", "delta", "id"}, of these pairs and of others
    labels: dict[tuple, dict]
    history: list[tuple] = field(default_factory=list)  # (marks or labels, key, what stood there)


def read_notes(out: Path, held_out: int, pairs: list[Triplet], names: Container[str]) -> Notes:
    """What was said before, and those of the mined pairs whose two pictures are in the gallery (`names`).

    Labels of other pairs are kept: another --label, or a picture that is away for a day, loses none. A pair whose text
    is a person's (gen_deltas.py --labels put it there) stands with its generated text, and is judged."""
    notes = Notes(out, held_out, {}, [t for t in pairs if t.reference in names and t.target in names], {})
    for file in ("marks.jsonl", "wrong.jsonl"):
        for line in read_jsonl(out / file) if (out / file).exists() else ():
            mark = {"right": not line.get("wrong"), "held_out": bool(line.get("held_out"))}
            mark["texts"] = tuple(line.get("texts", [line["delta"]]))
            notes.marks[line["reference"], line["target"], line["delta"]] = mark
    if pairs and not notes.pairs:
        raise UserError(f"--label: both pictures of none of its {len(pairs):,} pairs are in the gallery")
    if left := len(pairs) - len(notes.pairs):
        say(f"--label: {left:,} of {len(pairs):,} pairs name a picture outside the gallery: left out")
    generated = {}  # (reference, target, a person's text) -> the text that it stands for
    for line in read_labels(out / "labels.jsonl") if pairs and (out / "labels.jsonl").exists() else ():
        key = line.pop("reference"), line.pop("target"), line.pop("was")
        notes.labels[key] = line
        if line["verdict"] in ("accept", "edit"):
            generated[*key[:2], line["delta"]] = key[2]
    for place, pair in enumerate(notes.pairs):
        if (key := key_of(pair)) in generated and key not in notes.labels:
            notes.pairs[place] = replace(pair, delta=generated[key])
    return notes


def key_of(pair: Triplet) -> tuple:
    """Under which its label stands."""
    return pair.reference, pair.target, pair.delta


def verdicts(notes: Notes) -> Counter:
    """How often each was given to the pairs that are shown."""
    labels = (notes.labels.get(key_of(pair)) for pair in notes.pairs)
    return Counter(label["verdict"] for label in labels if label)


def read_labels(path: str | Path, flag: str = "") -> list[dict]:
    """The lines of a labels.jsonl; UserError for another file, which a `flag` may have named."""
    lines = read_jsonl(path)
    if not all({"reference", "target", "verdict", "delta", "was"} <= line.keys() for line in lines):
        lacks = "a line without verdict, was or delta; wanted labels.jsonl of search.py"
        raise UserError(f"{flag} {path}: {lacks}".strip())
    return lines


def respected(records: list[dict], path: str) -> list[dict]:
    """Generated records after what a person said of them in labels.jsonl: a text that was accepted or edited stands in
    place of the generated one ("judged" beside it), a rejected text is left out, with its pair; another text for the
    same pair, of a better VDG, stays."""
    kept, said, rejected = [], {}, set()
    for line in read_labels(path, "--labels"):
        pair = line["reference"], line["target"]
        if line["verdict"] in ("accept", "edit"):
            said[pair] = line
        elif line["verdict"] == "reject":
            rejected.add((*pair, line["was"]))
    judged = 0
    for record in records:
        pair = record["reference"], record["target"]
        if line := said.get(pair):
            judged += 1
            kept.append(record | {"delta": line["delta"], "judged": line["verdict"]})
        elif (*pair, record["delta"]) not in rejected:
            kept.append(record)
    say(f"--labels: {judged:,} texts are a person's, {len(records) - len(kept):,} rejected ones are left out")
    if not kept:
        raise UserError(f"--labels {path}: every text was rejected, nothing is left to write")
    return kept


def note(notes: Notes, kind: str, key: tuple, value: dict | None, keep: bool = True) -> None:
    """Sets (None: takes away) a mark or a label, writes the files, and remembers what stood there. Where a file cannot
    be written all stays as it was."""
    write, before = {"marks": write_marks, "labels": write_labels}[kind], getattr(notes, kind)
    now = {name: said for name, said in before.items() if name != key}
    if value is not None:
        now[key] = value
    try:
        write(notes.out, now)
    except (UserError, OSError):
        with contextlib.suppress(UserError, OSError):  # the first of the two files may be written already
            write(notes.out, before)
        raise
    setattr(notes, kind, now)
    if keep:
        notes.history.append((kind, key, before.get(key)))


def write_marks(out: Path, marks: dict[tuple, dict]) -> None:
    lines = {True: [], False: []}
    for (reference, target, delta), mark in marks.items():
        line = {"reference": reference, "target": target, "delta": delta}
        line |= {"held_out": True} if mark["held_out"] else {}
        line |= {"texts": mark["texts"]} if len(mark["texts"]) > 1 else {}
        lines[mark["right"]].append(line | ({} if mark["right"] else {"wrong": True}))
    write_jsonl(out / "marks.jsonl", lines[True])
    write_jsonl(out / "wrong.jsonl", lines[False])


def write_labels(out: Path, labels: dict[tuple, dict]) -> None:
    lines, good = [], []
    for (reference, target, was), label in labels.items():
        pair = {"reference": reference, "target": target}
        lines.append(pair | {"was": was} | label)
        if label["verdict"] in ("accept", "edit"):
            good.append(pair | {"delta": label["delta"]})
    write_jsonl(out / "labels.jsonl", lines)
    write_jsonl(out / "accepted.jsonl", good)


def is_held_out(notes: Notes, reference: str) -> bool:
    """All marks of a reference stand on one side: a query of the held-out part is not half learned."""
    earlier = {}
    for (name, _, _), mark in notes.marks.items():
        earlier.setdefault(name, mark["held_out"])
    if reference in earlier:
        return earlier[reference]
    return notes.held_out > 0 and len(earlier) % notes.held_out == notes.held_out - 1


class Lessons(NamedTuple):
    """What there is to learn from, each a list of triplets."""

    train: list[dict]  # right marks, accepted and edited labels
    held: list[dict]  # marks held out, with "texts"
    pseudo: list[dict]  # pairs that nobody judged, or that were skipped
    gone: int  # right marks and labels that are left out: a picture of theirs is not found


def teaching_data(notes: Notes, images: ImageStore) -> Lessons:
    """Of what was said, all whose two pictures are there; a rejected pair is not learned."""
    train, held, pseudo = [], [], []
    for (reference, target, delta), mark in notes.marks.items():
        if mark["right"]:
            line = {"reference": reference, "target": target, "delta": delta}
            held.append(line | {"texts": mark["texts"]}) if mark["held_out"] else train.append(line)
    apart = {(line["reference"], line["target"]) for line in held}
    for pair in notes.pairs:
        label = notes.labels.get(key_of(pair), {"verdict": "skip", "delta": pair.delta})
        line = {"reference": pair.reference, "target": pair.target, "delta": label["delta"]}
        if (pair.reference, pair.target) in apart or label["verdict"] == "reject" or not label["delta"].strip():
            continue
        (pseudo if label["verdict"] == "skip" else train).append(line)

    # pictures move and go while what was said of them stays
    count = len(train) + len(held)
    for lines in (train, held):
        lines[:] = [line for line in lines if images.find(line["reference"]) and images.find(line["target"])]
    return Lessons(train, held, pseudo, count - len(train) - len(held))
