"""What a person says on search.py's page: marks on results, labels of mined pairs; files that train_cir.py reads."""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from common.annotations import Triplet
from common.console import UserError, say
from common.files import read_jsonl, write_jsonl


@dataclass
class Notes:
    """Written whole at each change, so that a kill leaves the files of before or after it."""

    out: Path
    held_out: int  # of so many references the marks of one are kept apart
    marks: dict[tuple, dict]  # (reference, target, delta) -> {"right", "held_out", "texts"}, in the order of making
    pairs: list[Triplet]  # what gen_deltas.py wrote
    labels: dict[int, dict]  # place in pairs -> {"verdict", "delta"}
    history: list[tuple] = field(default_factory=list)  # (marks or labels, key, what stood there)


def read_notes(out: Path, held_out: int, pairs: list[Triplet], names: Container[str]) -> Notes:
    """What was said before, and those of the mined pairs whose two pictures are in the gallery (`names`)."""
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
    at = {(t.reference, t.target, t.delta): i for i, t in enumerate(notes.pairs)}
    for line in read_jsonl(out / "labels.jsonl") if pairs and (out / "labels.jsonl").exists() else ():
        if (line["reference"], line["target"], line["was"]) in at:
            place = at[line["reference"], line["target"], line["was"]]
            notes.labels[place] = {"verdict": line["verdict"], "delta": line["delta"]}
    return notes


def respected(records: list[dict], path: str) -> list[dict]:
    """Generated records after what a person said of them in labels.jsonl: a text that was accepted or edited stands in
    place of the generated one ("judged" beside it), a rejected text is left out, with its pair; another text for the
    same pair, of a better VDG, stays."""
    kept, said, rejected = [], {}, set()
    for line in read_jsonl(path):
        if not {"reference", "target", "verdict", "delta", "was"} <= line.keys():
            raise UserError(f"--labels {path}: a line without verdict, was or delta; wanted labels.jsonl of search.py")
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


def note(notes: Notes, kind: str, key: tuple | int, value: dict | None, keep: bool = True) -> None:
    """Sets (None: takes away) a mark or a label, remembers what stood there, and writes the files."""
    table = getattr(notes, kind)
    before = table.pop(key, None)
    if keep:
        notes.history.append((kind, key, before))
    if value is not None:
        table[key] = value
    if kind == "marks":
        lines = {True: [], False: []}
        for (reference, target, delta), mark in notes.marks.items():
            line = {"reference": reference, "target": target, "delta": delta}
            line |= {"held_out": True} if mark["held_out"] else {}
            line |= {"texts": mark["texts"]} if len(mark["texts"]) > 1 else {}
            lines[mark["right"]].append(line | ({} if mark["right"] else {"wrong": True}))
        write_jsonl(notes.out / "marks.jsonl", lines[True])
        write_jsonl(notes.out / "wrong.jsonl", lines[False])
        return
    lines, good = [], []
    for place, label in notes.labels.items():
        pair = notes.pairs[place]
        lines.append({"reference": pair.reference, "target": pair.target, **label, "was": pair.delta, "id": pair.id})
        if label["verdict"] in ("accept", "edit"):
            good.append({"reference": pair.reference, "target": pair.target, "delta": label["delta"]})
    write_jsonl(notes.out / "labels.jsonl", lines)
    write_jsonl(notes.out / "accepted.jsonl", good)


def is_held_out(notes: Notes, reference: str) -> bool:
    """All marks of a reference stand on one side: a query of the held-out part is not half learned."""
    earlier = {}
    for (name, _, _), mark in notes.marks.items():
        earlier.setdefault(name, mark["held_out"])
    if reference in earlier:
        return earlier[reference]
    return notes.held_out > 0 and len(earlier) % notes.held_out == notes.held_out - 1
