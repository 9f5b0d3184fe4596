"""Pseudo triplets in the layouts that other CIR code reads: CIRR's, FashionIQ's, by stems, and the VDG release's list.

CLIP4Cir, Bi-Blip4CIR and SPRC join the folder of the pictures with the path in image_splits; CoVR looks up *.png by
their names without folder and suffix; the VDG release names both pictures by their path."""

import os
import posixpath
from collections.abc import Iterable, Sequence

from common.console import UserError
from common.files import read_json, write_json
from common.images import ImageStore, shown

EXPORTS = ("cirr", "stems", "release")


def check_exports(kinds: Sequence[str], names: Iterable[str] = (), images: ImageStore | None = None) -> None:
    """UserError for a kind that is none of EXPORTS, and for two of the pictures `names` that "stems" could not tell
    apart."""
    for kind in kinds:
        if kind not in EXPORTS:
            raise UserError(f"--export {shown(kind)}: wanted some of {', '.join(EXPORTS)}")
    if "stems" in kinds and images:
        _stems({name: images.relative(name) for name in names})


def write_exports(
    folder: str | os.PathLike,
    kinds: Sequence[str],
    dataset: str,
    split: str,
    records: Sequence[dict],
    images: ImageStore,
) -> None:
    """Writes records (see write_cirr_captions) once for each of `kinds`, of EXPORTS.

    "cirr": folder/cirr/, for FashionIQ's own pairs folder/fashioniq/; "stems": folder/stems/, CIRR's layout with stems
    as names; "release": folder/release.json."""
    folder = os.fspath(folder)
    check_exports(kinds)
    for kind in kinds:
        if kind == "release":
            write_release(os.path.join(folder, "release.json"), records, images)
        elif kind == "stems":
            write_cirr_captions(os.path.join(folder, "stems"), split, records, images, stems=True)
        elif dataset == "fashioniq":
            write_fashioniq_captions(os.path.join(folder, "fashioniq"), split, records)
        else:
            write_cirr_captions(os.path.join(folder, "cirr"), split, records, images)


def write_cirr_captions(
    folder: str | os.PathLike,
    split: str,
    records: Iterable[dict],
    images: ImageStore | None = None,
    stems: bool = False,
) -> None:
    """Writes pseudo triplets in CIRR's layout, so that other CIR code trains on them unchanged:
    captions/cap.rc2.{split}.json and image_splits/split.rc2.{split}.json, a table of name: path.

    A record: reference, target, delta; and id (-> pairid), subgroup, members where known. Without members, those of a
    subgroup are its images in the order in which they occur. Ranks are positions in members: 0 is the anchor.
    images: says where below their folder the pictures lie (ImageStore.relative); without it a path is the name itself.
    stems: pictures are called by their file's name without folder and suffix; UserError where two have the same.
    """
    records = list(records)
    groups: dict[object, dict[str, None]] = {}  # a dict keeps the order of its keys
    for i, record in enumerate(records):
        names = record.get("members") or (record["reference"], record["target"])
        groups.setdefault(record.get("subgroup", f"pair {i}"), {}).update(dict.fromkeys(names))
    every = dict.fromkeys(name for group in groups.values() for name in group)
    paths = {name: images.relative(name) if images else f"./{name}" for name in every}
    called = _stems(paths) if stems else {name: name for name in every}

    written, used = [], {}
    for i, record in enumerate(records):
        members = list(record.get("members") or groups[record.get("subgroup", f"pair {i}")])
        ranks = {f"{role}_rank": members.index(record[role]) for role in ("reference", "target")}
        reference, target = called[record["reference"]], called[record["target"]]
        image_set = {"id": record.get("subgroup", i), "members": [called[name] for name in members], **ranks}
        triplet = {"pairid": record.get("id", i), "reference": reference, "target_hard": target}
        written.append({**triplet, "target_soft": {target: 1.0}, "caption": record["delta"], "img_set": image_set})
        used |= {called[name]: paths[name] for name in members}
    write_json(os.path.join(folder, "captions", f"cap.rc2.{split}.json"), written)
    write_json(os.path.join(folder, "image_splits", f"split.rc2.{split}.json"), used)


def _stems(paths: dict[str, str]) -> dict[str, str]:
    """Name -> its file's name without folder and suffix."""
    stems, owners = {}, {}
    for name, path in paths.items():
        stem = stems[name] = posixpath.splitext(posixpath.basename(path))[0]
        if owners.setdefault(stem, path) != path:
            text = f"--export stems: {shown(owners[stem])} and {shown(path)} have the same stem {shown(stem)}"
            raise UserError(f"{text}; rename one of them, or export otherwise")
    return stems


def write_fashioniq_captions(folder: str | os.PathLike, split: str, records: Sequence[dict]) -> None:
    """Deltas of FashionIQ's pairs in its layout. Readers want two captions of a query: the delta stands there twice."""
    kinds: dict[str, list[dict]] = {}
    for record in records:
        kinds.setdefault(record["category"], []).append(record)
    for kind, some in kinds.items():
        captions = [
            {"target": r["target"], "candidate": r["reference"], "captions": [r["delta"], r["delta"]]} for r in some
        ]
        names = sorted({name for r in some for name in (r["reference"], r["target"])})
        write_json(os.path.join(folder, "captions", f"cap.{kind}.{split}.json"), captions)
        write_json(os.path.join(folder, "image_splits", f"split.{kind}.{split}.json"), names)


def write_release(path: str | os.PathLike, records: Iterable[dict], images: ImageStore) -> None:
    """The VDG release's file: one JSON list of {"reference": path, "target": path, "caption": delta}."""
    triplets = []
    for record in records:
        reference, target = (images.relative(record[role]).removeprefix("./") for role in ("reference", "target"))
        triplets.append({"reference": reference, "target": target, "caption": record["delta"]})
    write_json(path, triplets)


def adapter_config(lora: dict, llm: str) -> dict:
    """adapter_config.json as PEFT reads it; lora = {"rank", "alpha", "dropout", "targets"}."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": llm,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": list(lora["targets"]),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def require_adapter_config(folder: str, lora: dict) -> None:
    """UserError where a folder's adapter_config.json is not adapter_config(lora, ...).

    Wrong alpha, other targets or rsLoRA load silently and wrongly elsewhere."""
    path = f"{folder}/adapter_config.json"
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: wanted an object, PEFT's settings of a LoRA; copy it again")
    wanted = adapter_config(lora, found.get("base_model_name_or_path")) | {"rank_pattern": {}, "alpha_pattern": {}}
    for key, value in wanted.items():
        here, there = (sorted(v, key=str) if isinstance(v, list) else v or None for v in (found.get(key), value))
        if here != there:
            raise UserError(f"{path}: {key} is {repr(here)[:80]}, config.json says {there!r}; copy both files again")
