"""Mutates files that users bring, real ones where they lie beside the repository, and calls what reads them.

    python tests/faults/fuzz.py --seed 3                         # the mutations of COUNTS
    python tests/faults/fuzz.py --count 400                      # so many of each kind
    python tests/faults/fuzz.py --kind checkpoint --seed 3 --only 117       # one of them again, with its traceback

A mutation is a function of (seed, kind, number). A reader may refuse with one line (UserError) or an error of the
disk, or accept. Counted as faults: a traceback, a hang of ten seconds, and an acceptance that changes a number without
a word: other queries or gallery images than the protocol's count allows, another feature of a checkpoint that vouches
for its model, another state, adapter or prompt than was saved. Exit status 1 if there is any.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gen_deltas  # noqa: I001  (sets MKL's summation order before torch computes)
import mine_pairs
import numpy as np
import torch
import train_cir
import transformers
import vdg_align
import vdg_tune
import zoo
from common import annotations, files
from common.console import UserError
from common.images import ImageStore
from common.llama import load_tokenizer
from common.tokenizer import tokenizer_sha256
from common.triplets import read_triplets

COUNTS = {"annotations": 10_000, "pairs": 10_000, "model": 2_000, "checkpoint": 800, "picture": 800}
HANG = 10  # seconds that a reader may take
MEMORY = 12 << 30  # bytes of address space of the worker
SHARED = ROOT.parent / "shared" / "data"


class Target(NamedTuple):
    """Files of which one is mutated, and a reader that must then refuse or give what it gave before.

    compared: whether another answer is a fault; else only an exception is."""

    files: tuple[Path, ...]
    read: Callable[[], object]
    compared: bool = True


# ---- mutations ----

NONSENSE = [None, True, False, 0, -1, 1, 7, 0.5, -1e308, 10**30, 2**31, "", " ", "x", "..", "../x", "/etc/passwd"] + [
    "a" * 2000,
    "\u2028",
    "\x1b[2J",
    "</s>",
    [],
    {},
    [[]],
    [None],
    {"": 0},
    ["x"] * 3,
    "NaN",
    "cls",
    100000,
]
WORDS = [b"NaN", b"1e999", b"-1", b"null", b"[]", b"{}", b'""', b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"[" * 3000]


def places_of(value: object, here: tuple = ()) -> list[tuple]:
    """The path of every entry below a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in entries for place in ((*here, key), *places_of(inner, (*here, key)))]


def change_entry(value: object, draw: random.Random) -> object:
    """The value with one entry replaced, deleted, doubled, renamed or swapped with another."""
    places = places_of(value)
    if not places:
        return draw.choice(NONSENSE)
    *above, key = draw.choice(places)
    inside = value
    for step in above:
        inside = inside[step]
    how = draw.choice(("replace", "replace", "delete", "double", "other"))
    if how == "replace":
        inside[key] = draw.choice(NONSENSE)
    elif how == "delete":
        del inside[key]
    elif how == "double" and isinstance(inside, list):
        inside.insert(draw.randrange(len(inside) + 1), inside[key])
    elif how == "double":
        inside[f"{key}x"] = inside.pop(key)
    else:
        other = draw.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        inside[key], inside[other] = inside[other], inside[key]
    return value


def change_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to three of: a bit flipped, a range cut, doubled or zeroed, a word put in, the end cut off."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 64, 1000)))
        how = draw.randrange(6)
        if how == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif how == 1:
            data = data[:at] + data[end:]
        elif how == 2:
            data = data[:end] + data[at:]
        elif how == 3:
            data = data[:at] + bytes(end - at) + data[end:]
        elif how == 4:
            data = data[:at] + draw.choice(WORDS) + data[at:]
        else:
            data = data[:at]
    return data


def mutated(path: Path, data: bytes, draw: random.Random) -> bytes:
    """Of JSON half of the mutations change the structure, as a hand or another program would."""
    if path.suffix == ".json" and draw.random() < 0.5:
        return json.dumps(change_entry(json.loads(data), draw)).encode()
    if path.suffix == ".jsonl" and draw.random() < 0.5:
        lines = data.decode().splitlines()
        i = draw.randrange(len(lines))
        lines[i] = json.dumps(change_entry(json.loads(lines[i]), draw))
        return "\n".join(lines).encode()
    return change_bytes(data, draw)


# ---- what is read ----


def benchmark_of(read: Callable, counts: tuple[int, int], key: tuple) -> Callable[[], object]:
    """A reader of a benchmark whose official counts are those of its unharmed files."""

    def answer() -> object:
        kept = annotations.OFFICIAL
        annotations.OFFICIAL = kept | {key: counts}
        try:
            benchmark = read()
            annotations.require_official(benchmark, "original" if key[0] == "fashioniq" else "split")
        finally:
            annotations.OFFICIAL = kept
        assert all(isinstance(text, str) for query in benchmark.queries for text in (query.delta, query.reference))
        return len(benchmark.queries), len(benchmark.gallery)

    return answer


def sample_annotations(root: Path) -> list[Target]:
    """CIRR and FashionIQ, thirty real records of each where the real files are there; chat.json; triplets."""
    from test_eval_cir import write_world
    from test_vdg_align import chat

    write_world(root)
    cirr, targets = root / "cirr", []
    if SHARED.is_dir():
        records = json.loads((SHARED / "cirr/captions/cap.rc2.val.json").read_text())[:30]
        table = json.loads((SHARED / "cirr/image_splits/split.rc2.val.json").read_text())
        known = {name for record in records for name in record["img_set"]["members"]}
        zoo.write(cirr / "captions/cap.rc2.val.json", records)
        zoo.write(cirr / "image_splits/split.rc2.val.json", {name: table[name] for name in table if name in known})
        for part in ("captions", "image_splits"):
            (root / "fashioniq" / part).mkdir(parents=True, exist_ok=True)
        records = json.loads((SHARED / "fashioniq/captions/cap.dress.val.json").read_text())[:30]
        names = list(dict.fromkeys(name for r in records for name in (r["candidate"], r["target"])))
        zoo.write(root / "fashioniq/captions/cap.dress.val.json", records)
        zoo.write(root / "fashioniq/image_splits/split.dress.val.json", names)
        both = tuple(sorted((root / "fashioniq").glob("*/*.json")))
        (root / "dress").mkdir()
        reader = benchmark_of(
            lambda: annotations.read_fashioniq(str(root / "fashioniq"), "val", "dress", str(root / "dress")),
            (30, len(names)),
            ("fashioniq", "val", "dress"),
        )
        targets.append(Target(both, reader))
    both = tuple(sorted(cirr.glob("*/*.json")))
    images = str(root / "img_raw")
    unharmed = annotations.read_cirr(str(cirr), "val", images)
    counts = len(unharmed.queries), len(unharmed.gallery)
    reader = benchmark_of(lambda: annotations.read_cirr(str(cirr), "val", images), counts, ("cirr", "val"))
    targets.append(Target(both, reader))
    chat(root / "chat", 12)
    targets.append(Target((root / "chat/chat.json",), lambda: annotations.read_chat(root / "chat/chat.json"), False))
    lines = [{"id": i, "reference": f"a{i}.jpg", "target": f"b{i}.jpg", "delta": f"more {i}"} for i in range(12)]
    for line in lines[6:]:
        line["target"] = [line["target"], f"c{line['id']}.jpg"]
    (root / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [f'{i};"a{i}.jpg";b{i}.jpg;"more; {i}"' for i in range(12)]
    (root / "t.csv").write_text("\n".join(["id;reference;target;delta", *rows]))
    for name in ("t.jsonl", "t.csv"):
        targets.append(Target((root / name,), lambda name=name: read_triplets(str(root / name)), False))
    return targets


def sample_pairs(root: Path) -> list[Target]:
    names = [f"{i}.png" for i in range(12)]
    groups = [{"id": g, "members": names[6 * g : 6 * g + 6], "scores": [1.0] * 6} for g in range(2)]
    pairs = []
    for group in groups:
        for a, b in annotations.cirr_template():
            pair = {"id": len(pairs), "subgroup": group["id"], "score": 0.5}
            pairs.append(pair | {"reference": group["members"][a], "target": group["members"][b]})
    for name, records in (("pairs", pairs), ("subgroups", groups)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def read() -> object:
        found = gen_deltas.read_pairs(str(root / "pairs.jsonl"), str(root))
        ids = [pair["id"] for pair in found.pairs]
        assert len(set(ids)) == len(ids) and found.members.keys() <= set(ids)
        gen_deltas.choose_subgroups(found.pairs, 1, 0, 0)
        return len(ids)

    return [Target((root / "pairs.jsonl", root / "subgroups.jsonl"), read, False)]


def features_of(checkpoint: Path) -> object:
    """What a CIR checkpoint makes of one picture and one text, as bytes."""
    model = train_cir.load_cir(str(checkpoint))
    pixels = model.preprocess(zoo_picture())[None]
    with torch.no_grad():
        tokens, target = model.image(pixels)
        return target.numpy().tobytes(), model.compose(tokens, ["make it red and add a dog"]).numpy().tobytes()


def zoo_picture():
    from PIL import Image

    rows = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(rows)


def sample_models(root: Path) -> list[Target]:
    """Folders of CLIP, BLIP, ResNet, InstructBLIP and LLaMA; checkpoints of ours on the first two vouch for them."""
    zoo.build(root)
    targets = []
    for kind, name in (("sum", "clip"), ("blip_tdm", "blip")):
        checkpoint = write_cir(root, kind, name)
        read = lambda checkpoint=checkpoint: features_of(checkpoint)  # noqa: E731
        targets.append(Target(tuple(sorted((root / name).glob("*.*"))), read))
    device = torch.device("cpu")
    reads = {
        "resnet": lambda: mine_pairs.Encoder(str(root / "resnet"), device, torch.float32).fingerprint(),
        "instructblip": lambda: vdg_align.VisionProjector(str(root / "instructblip"), 64),
        "llama": lambda: vdg_align.load_llm(str(root / "llama"), torch.float32, "cpu"),
    }
    for name, read in reads.items():
        targets.append(Target(tuple(sorted((root / name).glob("*.*"))), read, False))
    return targets


def write_cir(root: Path, kind: str, name: str) -> Path:
    """A checkpoint as train_cir.py writes it, on root/name."""
    torch.manual_seed(0)
    build = {"model": kind, "backbone": str(root / name)}
    model = train_cir.build_cir(**build)
    with torch.no_grad():
        for weight in train_cir.trained_of(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.01)
    config = {"stage": "cir", "build": build, "step": 1, "tau": 0.01}
    config["constants"] = {"FROZEN_SHA256": train_cir.frozen_sha256(model)}
    folder = root / f"cir-{name}"
    files.save_folder(folder, {"model.safetensors": train_cir.get_trained(model)}, {"config.json": config})
    return folder


def sample_checkpoints(root: Path) -> list[Target]:
    """What our stages saved: CIR models, a VDG, a training state, the queries of a generation."""
    from test_gen_deltas import tiny_vdg

    zoo.build(root)
    targets = []
    for kind, name in (("sum", "clip"), ("blip_tdm", "blip")):
        checkpoint = write_cir(root, kind, name)
        read = lambda checkpoint=checkpoint: features_of(checkpoint)  # noqa: E731
        targets.append(Target(tuple(sorted(checkpoint.glob("*.*"))), read))

    (root / "vdg").mkdir()
    folder = tiny_vdg(root, root / "vdg")
    config = json.loads((folder / "config.json").read_text())
    config["tokenizer_sha256"] = tokenizer_sha256(load_tokenizer(config["llm"]))
    (folder / "config.json").write_text(json.dumps(config))
    record = json.loads((folder / "manifest.json").read_text())
    record["files"]["config.json"] = files._digest(folder / "config.json")
    (folder / "manifest.json").write_text(json.dumps(record))

    def read_vdg() -> object:
        vision, llm, _, config = vdg_tune.load_vdg(str(folder), torch.device("cpu"), torch.float32)
        weights = [*vision.projection.named_parameters(), *vdg_tune.adapter_tensors(llm).items()]
        scales = [module.scale for module in vdg_tune.lora_modules(llm).values()]
        return files.tensors_sha256(weights), config["prompt"], scales

    targets.append(Target(tuple(sorted(folder.glob("*.*"))), read_vdg))

    out, state = root / "run", {"weights": {"w": torch.arange(64.0)}, "best": None}
    for step in (1, 2):
        files.save_state(out, step, state, {"LR": 0.1})
    states = tuple(path / name for path in (out / "last").iterdir() for name in ("state.pt", "manifest.json"))

    def read_state() -> object:
        step, found = files.load_state(out, {"LR": 0.1})
        return step, found["weights"]["w"].numpy().tobytes(), found["best"]

    return [*targets, Target(states, read_state)]


def sample_pictures(root: Path) -> list[Target]:
    """Real photographs where they are there, else drawn ones, as JPEG, PNG and WEBP."""
    found = sorted((SHARED / "clothing").glob("*/*.jpg"))[::400][:8] if SHARED.is_dir() else []
    names = [shutil.copy(path, root / f"{i}.jpg") for i, path in enumerate(found)]
    for suffix in ("jpg", "png", "webp"):
        zoo_picture().save(root / f"drawn.{suffix}")
        names.append(root / f"drawn.{suffix}")
    store = ImageStore(str(root))

    def reader(name: str) -> Callable[[], object]:
        def read() -> object:
            picture = store.open(name)
            assert picture.mode == "RGB"
            return picture.size

        return read

    return [Target((Path(path),), reader(Path(path).name), False) for path in names]


KINDS = {
    "annotations": sample_annotations,
    "pairs": sample_pairs,
    "model": sample_models,
    "checkpoint": sample_checkpoints,
    "picture": sample_pictures,
}


# ---- trying them ----


def attempt(targets: list[Target], truths: list, draw: random.Random) -> tuple[str, str]:
    """One mutation -> what came of it, and words about it."""
    which = draw.randrange(len(targets))
    target = targets[which]
    path = draw.choice(target.files)
    before = path.read_bytes()
    path.write_bytes(mutated(path, before, draw))
    said, where = io.StringIO(), f"{path.parent.name}/{path.name}"
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            found = target.read()
    except UserError as error:
        long = "\n" in str(error) or len(str(error)) > 1500
        return ("traceback", f"{where}: not one line: {error}") if long else ("refused", where)
    except OSError:
        return "refused", where
    except BaseException:
        return "traceback", f"{where}: {traceback.format_exc()}"
    finally:
        path.write_bytes(before)
    if target.compared and found != truths[which] and "WARNING" not in said.getvalue():
        return "changed", f"{where}: accepted, with another result"
    return "accepted", where


def work(pipe, kind: str, seed: int) -> None:
    """A process that tries mutations by their number until it is told None."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            targets = KINDS[kind](Path(folder))
            truths = [target.read() if target.compared else None for target in targets]
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            pipe.send(attempt(targets, truths, random.Random(f"{seed} {kind} {number}")))


def fuzz(kind: str, seed: int, numbers: range) -> tuple[Counter, list[str]]:
    """-> how often each outcome came, and a line about each fault; a worker that hangs is replaced."""
    context, counts, faults = multiprocessing.get_context("fork"), Counter(), []
    worker = None
    for number in numbers:
        if worker is None:
            pipe, other = context.Pipe()
            worker = context.Process(target=work, args=(other, kind, seed), daemon=True)
            worker.start()
            other.close()  # a worker that dies is then the end of the pipe
            pipe.recv()
        pipe.send(number)
        try:
            outcome, words = pipe.recv() if pipe.poll(HANG) else ("hang", "")
        except EOFError:
            outcome, words = "traceback", "the process died"
        counts[outcome] += 1
        if outcome in ("hang", "traceback", "changed"):
            faults.append(f"--kind {kind} --seed {seed} --only {number}: {outcome} {words}")
        if outcome == "hang" or words == "the process died":
            worker.kill()
            worker = None
    if worker is not None:
        pipe.send(None)
        worker.join(10)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="", help=f"{', '.join(KINDS)}; empty: all")
    parser.add_argument("--count", type=int, default=0, help="mutations of each kind; 0: those of COUNTS")
    parser.add_argument("--seed", type=int, default=0, help="fixes the mutations")
    parser.add_argument("--only", type=int, help="only the mutation of this number")
    given = parser.parse_args()
    total = Counter()
    print(f"{'kind':12}{'tried':>7}{'refused':>9}{'accepted':>10}{'changed':>9}{'traceback':>11}{'hang':>6}")
    for kind in [given.kind] if given.kind else KINDS:
        numbers = range(given.count or COUNTS[kind]) if given.only is None else range(given.only, given.only + 1)
        counts, faults = fuzz(kind, given.seed, numbers)
        row = [counts[outcome] for outcome in ("refused", "accepted", "changed", "traceback", "hang")]
        print(f"{kind:12}{sum(row):7}{row[0]:9}{row[1]:10}{row[2]:9}{row[3]:11}{row[4]:6}", flush=True)
        print("\n".join(fault if given.only is not None else last_line(fault) for fault in faults), flush=True)
        total += counts
    return 1 if total["changed"] + total["traceback"] + total["hang"] else 0


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0].split(': Traceback')[0]}: {lines[-1]}"[:240]


if __name__ == "__main__":
    sys.exit(main())
