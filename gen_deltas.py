"""Stage 4, delta generation [S3.2]: the tuned VDG says, for a pair of images, what turns the reference into the target.

    python gen_deltas.py --vdg out/vdg --pairs out/mine/pairs.jsonl --images aux/images
    torchrun --nproc_per_node 8 gen_deltas.py --vdg out/vdg --triplets cirr/train --root cirr --out out/same_pairs

Reads a VDG (vdg_tune.py), the pairs of mine_pairs.py (with subgroups.jsonl beside) or of human triplets, and images.
Writes OUT/parts/part-R-of-N.jsonl as it goes, then OUT/pseudo.jsonl, cirr/ (the same in CIRR's layout), report.json
and deltas.html.

A delta is a function of the VDG, the two images, the pair's id and the sampling constants, never of batch, order or
number of ranks: the same command goes on after a kill, also with another batch size or on another number of ranks.
Deltas already in OUT are kept, also where mining again gave their pairs other ids: after new pictures only new pairs
are described. If pictures changed under the same names, use a new OUT; another LLM is refused.
On a CPU with MKL this holds to the bit; on a GPU, where a product of another shape rounds otherwise, at the same BATCH.

To keep only the triplets that a CIR model can use: python eval_cir.py --checkpoint CKPT --filter OUT
"""

import os

# Has MKL add up a matrix product in one order, whatever the number of rows or threads. Without it the logits of a pair
# in a batch of 3 and of the same pair in a batch of 64 differ by 2e-5, which flips a word now and then. From eight rows
# on it costs no time that could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

from common.flags import early_help

early_help(__name__, __file__)

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import vdg_align
import vdg_tune
from common import decode, llama, memory
from common.annotations import FASHIONIQ_CATEGORIES, training_triplets
from common.batches import ahead, chunks, drop_missing, gather_dealt, rank_batches, say_check, stop_together
from common.browse import write_pages
from common.console import UserError, progress, run, say, warn
from common.decode import Engine, Said, Sampling, describe, fill, prompt_parts, prompt_pieces, row_key, start_engine
from common.exports import check_exports, write_exports
from common.files import (
    JsonlAppender,
    file_sha256,
    lock_folder,
    read_json,
    read_jsonl,
    tensors_sha256,
    write_json,
    write_jsonl,
)
from common.flags import at_least, override
from common.hub import read_stage
from common.images import ImageStore, load_bytes, safe_name, shown
from common.llama import llm_shape
from common.notes import read_labels, respected
from common.pairs import choose_subgroups, described, names_of, with_deltas
from common.ranks import (
    Log,
    World,
    all_sum,
    any_rank,
    barrier,
    gather_objects,
    init_world,
    pick_dtype,
    stop_requested,
)
from common.same_model import models_sha256
from common.seeds import seeded_rng
from vdg_align import VisionProjector, vision_weights

# ---- what is described ----
VDG = "out/vdg"  # checkpoint of vdg_tune.py
LLM = ""  # where the LLM of VDG lies now, if its folder moved
VISION = ""  # where the vision side of VDG lies now, if its folder moved
PAIRS = "out/mine/pairs.jsonl"  # pairs of mine_pairs.py
IMAGES = ""  # folder of the images; with TRIPLETS empty means the usual places in and beside ROOT
TRIPLETS = ""  # instead of PAIRS those of human triplets: "cirr/train", "fashioniq/train" (or ".../dress"), "jsonl"
ROOT = ""  # folder of the annotations of TRIPLETS; for "jsonl" the file
KEYS = ""  # jsonl: names of a record's parts elsewhere, reference=q_img,target=t_img,delta=q_text (see read_triplets)
POOL = ""  # jsonl files of {"did", "img_path"} in which the targets of KEYS are ids (M-BEIR)
SUBGROUPS = 0  # describe this many random subgroups only, 0 = all; 3,345 for CIRR and 3,600 for FashionIQ [S4.1]
MAX_PAIRS = 0  # at most so many pairs, in whole random subgroups, 0 = all [ours]
LABELS = ""  # labels.jsonl of search.py's label view: its texts replace generated ones, rejected ones go [ours]
REVERSE = False  # also say what turns the target into the reference: the same model, images swapped [ours]

# "cirr": OUT/cirr/, in the dataset's own layout, for CLIP4Cir, SPRC, Bi-Blip4CIR, which join the folder of the pictures
# and a path; "stems": OUT/stems/, pictures named without folder and suffix (CoVR); "release": OUT/release.json (VDG's).
EXPORT = ("cirr",)  # in which layouts of others the triplets are written as well

# ---- sampling ----
TEMPERATURE = 0.2  # 0 = always the likeliest token [S4.1]
TOP_K = 50  # tokens to draw from, 0 = all [S4.1]
MAX_NEW = 32  # tokens of a delta at most [ours: the paper is silent; the release's value]
GRAPH = True  # on a GPU replay each decoding step as one CUDA graph; not with a quantised LLM [ours: speed]
MERGE = True  # fold LoRA into the LLM's weights, which saves its products; a quantised LLM keeps them apart [ours]

# ---- run ----
OUT = "out/deltas"  # folder of everything written
BATCH = 64  # pairs decoded together
ENCODE_BATCH = 32  # images per forward pass of the ViT
SHOW = 24  # pairs on the sample page deltas.html
BROWSE = 20_000  # pairs on the pages browse/0001.html ..., 200 each, with links to their pictures; 0 = none
WORKERS = 16  # processes that decode images, one a CPU of this rank at most; 0 = none but its own
SEED = 0  # fixes what is drawn
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the frozen models: bf16 on cuda, fp32 on CPU
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at pairs and images: counts of expected, present and unreadable images, then stop


# ---- pairs ----
class Data(NamedTuple):
    """Pairs to describe."""

    pairs: list[dict]  # id, reference, target, and what else their file says
    members: dict  # id of a pair -> the images of its subgroup, where they are known
    images: ImageStore


def read_pairs(path: str, root: str) -> Data:
    """Records of pairs.jsonl, the members of their subgroups (subgroups.jsonl beside it, if there), and the images."""
    if not os.path.isdir(root):
        what = "name the one that the pairs' names are relative to; of several, put links into it"
        raise UserError(f"--images {root!r} is no folder; {what}")
    pairs, members = read_jsonl(path), {}
    check_pairs(pairs, path)

    beside = Path(path).with_name("subgroups.jsonl")
    if beside.exists():
        groups = read_subgroups(beside)
        for pair in pairs:
            if "subgroup" not in pair:
                continue
            if pair["subgroup"] not in groups:
                what = f"pair {shown(pair['id'])} is of subgroup {shown(pair['subgroup'])}, which is not in {beside}"
                raise UserError(f"{path}: {what}; both files must come from one run of mine_pairs.py")
            members[pair["id"]] = groups[pair["subgroup"]]
        check_members(pairs, members, str(beside))
    return Data(pairs, members, ImageStore(root, own=True))


def triplet_pairs(name: str, root: str, images: str, keys: str = "", pool: str = "") -> Data:
    """The pairs of human triplets; the human text is not among them, so that it cannot be taken for a generated one.

    keys, pool: of training_triplets."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 3:
        raise UserError(f"--triplets {name}: wanted dataset/split or dataset/split/category, as in cirr/train")
    dataset, split, category = parts + ["train", "all"][len(parts) - 1 :]
    categories = FASHIONIQ_CATEGORIES if dataset == "fashioniq" and category == "all" else (category,)

    pairs, members = [], {}
    for one in categories:
        triplets, store = training_triplets(dataset, root, split, one, images or None, keys, pool)
        kind = {"category": one} if dataset == "fashioniq" else {}
        for t in triplets:
            pairs.append({"id": t.id, "reference": t.reference, "target": t.target} | kind)
            if t.members:
                members[t.id] = t.members
    check_pairs(pairs, name)
    check_members(pairs, members, name)
    return Data(pairs, members, store)


def check_pairs(pairs: list[dict], where: str) -> None:
    """Ids are unique and names are safe; UserError names the record."""
    seen = set()
    for number, pair in enumerate(pairs, 1):
        here = f"{where}, record {number}"
        for key in ("id", "reference", "target"):
            if key not in pair:
                raise UserError(f'{here}: no "{key}"; wanted id, reference and target')
        safe_name(pair["reference"], here)
        safe_name(pair["target"], here)
        check_id(pair["id"], seen, here)
        if not isinstance(pair.get("subgroup", 0), int | str):
            raise UserError(f"{here}: subgroup {shown(pair['subgroup'])}; wanted a number or a string")


def check_id(id: object, seen: set, here: str) -> None:
    """UserError unless id is a number or a string that is not yet in seen, where it is put."""
    if not isinstance(id, int | str):
        raise UserError(f"{here}: id {shown(id)}; wanted a number or a string")
    if id in seen:
        raise UserError(f"{here}: id {shown(id)} occurs twice; ids must differ")
    seen.add(id)


def read_subgroups(path: Path) -> dict[int | str, list[str]]:
    """subgroups.jsonl -> the members of each subgroup by its id; UserError names the record."""
    groups, seen = {}, set()
    for number, group in enumerate(read_jsonl(path), 1):
        here, members = f"{path}, record {number}", group.get("members")
        check_id(group.get("id"), seen, here)
        if not isinstance(members, list):
            raise UserError(f'{here}: "members" is {shown(members)}; wanted a list of image names')
        groups[group["id"]] = [safe_name(name, here) for name in members]
    return groups


def check_members(pairs: list[dict], members: dict, where: str) -> None:
    """Both images of a pair are among the members of its subgroup: CIRR's layout gives their places there."""
    for pair in pairs:
        group = members.get(pair["id"])
        for side in ("reference", "target"):
            if group is not None and pair[side] not in group:
                what = f"pair {shown(pair['id'])}: its {side} {shown(pair[side])} is no member of its subgroup"
                raise UserError(f"{where}: {what}; pairs and subgroups must come from one run")


# ---- Q-Former outputs, once an image ----
class Queries(NamedTuple):
    """Q-Former outputs of every distinct picture."""

    rows: np.ndarray  # (N, Q, q_width), memory-mapped
    row: dict[str, int]  # image name -> its row; two names of one content share it

    def of(self, names: list[str]) -> torch.Tensor:
        """(n, Q, q_width)"""
        return torch.from_numpy(self.rows[[self.row[name] for name in names]])


def encode_images(vision: VisionProjector, images: ImageStore, names: list[str], folder: Path, world: World) -> Queries:
    """Q-Former outputs of the images, from folder/HASH.npy, which is written where it is not there and whole.

    HASH is of encoder weights, preprocessing and image contents: a changed picture or encoder is another file.
    HASH.json holds both, and the sha256 of the file's bytes. Rows of an earlier file by the same encoder are taken
    over. Half precision unless the model computes in fp32."""
    # what each name shows today; the ranks share the reading
    mine = [file_sha256(images.path(name)) for name in names[world.rank :: world.size]]
    content = dict(zip(names, gather_dealt(mine), strict=True))
    keys = sorted(set(content.values()))
    row = {key: i for i, key in enumerate(keys)}

    frozen = (item for item in vision.state_dict().items() if not item[0].startswith("projection."))  # that comes after
    encoder = tensors_sha256(frozen, vision.preprocess.described())
    path = folder / f"{stem_of(encoder, keys)}.npy"
    if any_rank(world.rank == 0 and whole_rows(path, encoder) != keys):
        name_of = {key: name for name, key in reversed(content.items())}  # one name of each content
        write_queries(path, encoder, {key: name_of[key] for key in keys}, vision, images, world)
    return Queries(np.load(path, mmap_mode="r"), {name: row[key] for name, key in content.items()})


def stem_of(encoder: str, keys: list[str]) -> str:
    return hashlib.sha256(json.dumps([encoder, keys]).encode()).hexdigest()[:16]


def whole_rows(path: Path, encoder: str) -> list[str]:
    """The contents whose rows by this encoder a file holds, in order; none if its bytes are not those written."""
    header = path.with_suffix(".json")
    if not (path.exists() and header.exists()):
        return []
    try:
        written = read_json(header)
        if written["encoder"] != encoder:
            return []
        if stem_of(encoder, written["keys"]) == path.stem and written["sha256"] == file_sha256(path):
            return written["keys"]
        fault = f"{path} does not match {header.name}"
    except (UserError, KeyError, TypeError):
        fault = f"{header} cannot be read"
    warn(f"{fault}; its images are encoded again")
    return []


def write_queries(
    path: Path, encoder: str, name_of: dict[str, str], vision: VisionProjector, images: ImageStore, world: World
) -> None:
    """Encodes one image of each content into path, on all ranks; name_of: content -> image name, in the rows' order."""
    row = {key: i for i, key in enumerate(name_of)}
    aside = path.with_suffix(".tmp")
    shape = (len(row), *vision.query_tokens.shape[1:])
    dtype = np.float32 if vision.dtype == torch.float32 else np.float16

    # room for all rows, and those that an earlier run encoded
    known = take_over(aside, encoder, row, dtype, shape) if world.rank == 0 else None
    stop_together(known)
    known = set(gather_objects(known)[0])
    rows = np.lib.format.open_memmap(aside, "r+")
    todo = [key for key in row if key not in known][world.rank :: world.size]

    def load(chunk: list[str]) -> torch.Tensor:
        return load_bytes(images, [name_of[key] for key in chunk], vision.preprocess, WORKERS)

    # each rank the rest of its own
    fault = None
    for chunk, pictures in ahead(load, chunks(progress(todo, "images"), ENCODE_BATCH)):
        if isinstance(pictures, Exception):
            fault = pictures
            break
        # always a full batch: the same shape whatever the number of images, hence the same rounding
        full = pictures[fill(list(range(len(chunk))), ENCODE_BATCH)]
        queries = vision.queries_of_bytes(full)[: len(chunk)].float().cpu().numpy().astype(dtype)  # (n, Q, q_width)
        good = np.isfinite(queries).all((1, 2))
        if not good.all():
            at = images.path(name_of[chunk[int(good.argmin())]])
            fault = UserError(f"{at}: its Q-Former outputs are NaN or infinite; are the vision model's files damaged?")
            break
        rows[[row[key] for key in chunk]] = queries
    rows.flush()
    stop_together(fault)  # and waits for every rank's rows

    # the file gets its name when it is whole
    if world.rank == 0:
        write_json(path.with_suffix(".json"), {"encoder": encoder, "keys": list(row), "sha256": file_sha256(aside)})
        os.replace(aside, path)
        for old in path.parent.iterdir():
            if old.stem != path.stem:
                old.unlink()
    barrier()


def take_over(aside: Path, encoder: str, row: dict[str, int], dtype, shape: tuple) -> list[str] | UserError:
    """Makes the file of all rows and copies those of earlier files by the same encoder -> the contents of these.

    Its place on the disk is taken at once: where a mapped file finds the disk full, SIGBUS ends the process."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with open(aside, "wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        try:
            os.posix_fallocate(file.fileno(), 0, file.tell() + size)
        except OSError as fault:
            aside.unlink()
            wanted = f"{len(row):,} images want {size / 2**30:,.2f} GiB of Q-Former outputs"
            return UserError(f"{aside.parent}: {fault.strerror}: {wanted}; make room, or take an --out on another disk")

    rows, known = np.lib.format.open_memmap(aside, "r+"), set()
    others = [path for path in sorted(aside.parent.glob("*.npy")) if path.stem != aside.stem]
    for path in others:
        held = whole_rows(path, encoder)
        for key, values in zip(held, np.load(path, mmap_mode="r") if held else (), strict=True):
            if key in row:
                rows[row[key]] = values
                known.add(key)
    rows.flush()
    return sorted(known)


# ---- the VDG at work ----
class Vdg(NamedTuple):
    """A tuned VDG, ready to speak of the images whose Q-Former outputs it has."""

    vision: VisionProjector
    queries: Queries
    engine: Engine
    tokenizer: object
    order: list[str]  # which image of a pair the prompt names first: ["reference", "target"]

    def image_tokens(self, names: list[str]) -> torch.Tensor:
        """(n, Q, D)"""
        queries = self.queries.of(names)
        return self.vision(queries.to(self.vision.projection.weight.device))


def start_vdg(todo: list[dict], images: ImageStore, dtype: torch.dtype, world: World) -> Vdg:
    vision, llm, tokenizer, config = vdg_tune.load_vdg(VDG, world.device, dtype, LLM, VISION)
    plain = not config["quantize"]
    if MERGE and plain:
        vdg_tune.merge_lora(llm)
    pieces = prompt_pieces(tokenizer, config["prompt"])
    longest = decode.prompt_length(pieces, vision.query_tokens.shape[1]) + MAX_NEW - 1  # the last token is never read
    llama.require_room(config["llm"], tokenizer, [(f"a delta of --max_new {MAX_NEW} tokens", longest, ())])
    prompt, order = prompt_parts(pieces)
    queries = encode_images(vision, images, names_of(todo), Path(OUT, "queries"), world)

    sampling = Sampling(tokenizer.eos_token_id, MAX_NEW, TEMPERATURE, TOP_K)
    graph = GRAPH and plain and world.device.type == "cuda"
    engine = start_engine(llm, prompt, queries.rows.shape[1], BATCH, sampling, graph)
    return Vdg(vision, queries, engine, tokenizer, order)


def speak(vdg: Vdg, batch: list[dict], direction: str) -> list[Said] | UserError:
    """What is said of each pair; direction "forward", or "reverse": the images in each other's place in the prompt.

    A fault is the result, not raised: all ranks have to hear of it."""
    if not batch:  # the last batch may have fewer pairs than there are ranks
        return []
    order = vdg.order if direction == "forward" else vdg.order[::-1]
    names = [(pair[order[0]], pair[order[1]]) for pair in batch]
    keys = [row_key(SEED, pair["id"], direction) for pair in batch]
    try:
        return describe(vdg.engine, vdg.image_tokens, vdg.tokenizer, names, keys)
    except UserError as fault:
        return fault


# ---- files ----
def open_parts(dtype: torch.dtype, world: World) -> tuple[JsonlAppender, list[dict]]:
    """This rank's part, and the lines of all parts of this and earlier runs, on any number of ranks."""
    settings = {"vdg": digest_of(VDG), "dtype": str(dtype), "merge": MERGE, "seed": SEED, "reverse": REVERSE}
    settings |= {"temperature": TEMPERATURE, "top_k": TOP_K, "max_new": MAX_NEW}
    config = read_stage(VDG, "tune", LLM, VISION)  # its hashes of both models are in digest_of; load_vdg compares them
    settings |= {} if "models_sha256" in config else models_sha256(config)
    folder = Path(OUT, "parts")
    if world.rank == 0:  # alone: a rank that is already writing must not have its last line taken for a torn one
        for path in sorted(folder.glob("part-*-of-*.jsonl")):
            JsonlAppender(path, settings)  # refuses other settings, cuts a torn tail
    barrier()
    lines = read_parts(folder)
    barrier()
    return JsonlAppender(folder / f"part-{world.rank}-of-{world.size}.jsonl", settings), lines


def read_parts(folder: Path) -> list[dict]:
    return [line for path in sorted(folder.glob("part-*-of-*.jsonl")) for line in read_jsonl(path)]


def line_of(pair: dict, forward: Said, backward: Said | None) -> dict:
    """The line of a pair in its part."""
    record = {key: pair[key] for key in ("id", "reference", "target")} | {"delta": forward.delta}
    flags = list(forward.flags)
    if backward:
        record["reverse_delta"] = backward.delta
        flags += [f"reverse_{flag}" for flag in backward.flags]
    return record | {"flags": flags} if flags else record


def write_results(records: list[dict], members: dict, images: ImageStore) -> dict:
    """Writes pseudo.jsonl, the same in the layout of CIRR or FashionIQ, report.json and pages -> the report."""
    out = Path(OUT)
    write_jsonl(out / "pseudo.jsonl", records)
    dataset, split = (TRIPLETS.split("/") + ["train"])[:2] if TRIPLETS else ("cirr", "train")
    known = [record | {"members": members.get(record["id"])} for record in records]
    write_exports(out, EXPORT, dataset, split, known, images)

    flags = Counter(flag for record in records for flag in record.get("flags", ()))
    words = sum(len(record["delta"].split()) for record in records)
    report = {
        "pairs": len(records),
        "images": len(names_of(records)),
        "distinct_deltas": len({record["delta"] for record in records}),
        "mean_words": round(words / max(1, len(records)), 2),
        **{"empty": 0, "runaway": 0, "repeated": 0, **dict(sorted(flags.items()))},
    }
    drawn = sorted(seeded_rng("show", SEED).permutation(len(records))[:SHOW].tolist())
    write_pages(out, records, drawn, report, images, BROWSE)
    write_json(out / "report.json", report, indent=2)
    return report


def digest_of(folder: str) -> str:
    """Hash of a VDG's files; config.json among them names the LLM, the vision side and the prompt."""
    names = ("config.json", "adapter_config.json", "adapter_model.safetensors", "projection.safetensors")
    absent = [name for name in names if not os.path.isfile(f"{folder}/{name}")]
    if absent:
        raise UserError(f"{folder}/{absent[0]} not found; wanted a finished checkpoint of vdg_tune.py")
    return hashlib.sha256("".join(file_sha256(f"{folder}/{name}") for name in names).encode()).hexdigest()


# ---- the run ----
def check_flags() -> None:
    at_least(globals(), TEMPERATURE=0, TOP_K=0, MAX_NEW=1, BATCH=1, ENCODE_BATCH=1)
    check_exports(EXPORT)
    if LABELS and not os.path.isfile(LABELS):
        raise UserError(f"--labels {LABELS}: no such file; wanted labels.jsonl of search.py's label view")
    if LABELS:
        read_labels(LABELS, "--labels")
    at_least(globals(), SUBGROUPS=0, MAX_PAIRS=0, SHOW=0, BROWSE=0, WORKERS=0)


def plan(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Bytes of the run by purpose, as it stands and with smaller batches; without a VDG those of the paper's."""
    tuned = {"llm": vdg_align.LLM, "vision": vdg_align.VISION, "quantize": "", "prompt": vdg_tune.PROMPT}
    if not (PLAN or CHECK) or os.path.exists(f"{VDG}/config.json"):
        tuned = read_stage(VDG, "tune", LLM, VISION)
    size = 2 if PLAN and DTYPE == "auto" else dtype.itemsize
    return memory.generation(llm_shape(tuned["llm"]), tuned, vision_weights(tuned["vision"]), size, BATCH, MAX_NEW)


def choose(data: Data, done: Container[int | str] = ()) -> Data:
    """The pairs that SUBGROUPS and MAX_PAIRS ask for; those that are `done` (ids) first."""
    return data._replace(pairs=choose_subgroups(data.pairs, SUBGROUPS, MAX_PAIRS, SEED, done))


def check_stems(data: Data) -> None:
    """UserError where EXPORT would fail after the last delta."""
    members = (name for pair in data.pairs for name in data.members.get(pair["id"], ()))
    check_exports(EXPORT, dict.fromkeys([*names_of(data.pairs), *members]), data.images)


def readable(data: Data) -> Data:
    """The pairs whose pictures can be read, and the members of their subgroups.

    Pairs of broken pictures of one's own are left out, and these listed in OUT/unreadable.txt. UserError where that is
    more than a tenth, and for a missing picture of a benchmark; a damaged one of it stops the run when it is decoded.
    """
    pairs, all_members, images = data
    names = names_of(pairs)
    if images.own:
        ends = lambda pair: (pair["reference"], pair["target"])  # noqa: E731
        kept = drop_missing(pairs, ends, images, "pairs", f"{OUT}/unreadable.txt", WORKERS)
        lost = set(names) - set(names_of(kept))
        members = {id: [name for name in group if name not in lost] for id, group in all_members.items()}
        return Data(kept, members, images)
    missing = images.missing(names)
    if missing:
        found = f"{len(missing):,} of {len(names):,} images are not in {', '.join(images.roots)}"
        raise UserError(f"{found}, first {shown(missing[0])}; complete the folder or correct --images")
    return data


def main() -> None:
    world = init_world(DEVICE)
    check_flags()
    dtype = pick_dtype(DTYPE, world.device)
    options = plan(dtype)
    if PLAN:
        memory.say(options, [80, 40, 24])
        return

    # pairs of S3.2's mining, or those of human triplets
    data = triplet_pairs(TRIPLETS, ROOT, IMAGES, KEYS, POOL) if TRIPLETS else read_pairs(PAIRS, IMAGES)
    if CHECK:
        chosen = choose(data)
        check_stems(chosen)
        what = f"{len(chosen.pairs):,} pairs"
        say_check(names_of(chosen.pairs), data.images, what, OUT, CHECK_DECODE, WORKERS)
        digest_of(VDG)  # UserError where there is none yet
        return

    # a killed run goes on, and one over more pictures: what was said is in the parts
    lock_folder(OUT, "deltas")
    part, lines = open_parts(dtype, world)
    done = described(data.pairs, lines)
    chosen = readable(choose(data, done))
    check_stems(chosen)
    pairs, members, images = chosen
    todo = [pair for pair in pairs if pair["id"] not in done]
    todo.sort(key=lambda pair: (pair["reference"], pair["target"], json.dumps(pair["id"])))  # a reference's together
    say(
        f"{len(pairs):,} pairs of {len(names_of(pairs)):,} images, {len(pairs) - len(todo):,} of them described already"
    )

    # the VDG, and every image through ViT and Q-Former
    if todo:
        memory.say(options, [memory.has(world.device)], world.device.type)
        vdg = start_vdg(todo, images, dtype, world)

    # equally many batches on every rank, so that all stop together
    batches = rank_batches(todo, BATCH * world.size, world.rank, world.size)
    began, count = time.time(), 0
    for batch in progress(batches, "deltas"):
        # a signal to one rank stops all before the same batch
        if any_rank(stop_requested()):
            break

        # S3.2: the prompt of Fig. 3, its two images, and a delta drawn token by token
        forward = speak(vdg, batch, "forward")
        stop_together(forward)  # it is a fault where the logits are no numbers

        # [ours] the other way round: the same model, images swapped
        backward = [None] * len(batch)
        if REVERSE:
            backward = speak(vdg, batch, "reverse")
            stop_together(backward)

        # on the disk at once, a line a pair
        for pair, there, back in zip(batch, forward, backward, strict=True):
            part.append(line_of(pair, there, back))
        count += len(batch)

    made, seconds = int(all_sum(count)), max(time.time() - began, 1e-9)
    if made:
        Log(OUT).write(generated=made, seconds=round(seconds, 1), pairs_per_s=round(made / seconds, 2))
    if made < len(todo):
        say(f"stopped with {len(todo) - made:,} pairs to go; the same command goes on")
        raise SystemExit(143)

    # pseudo triplets: all pairs in their order, whichever run and rank described them
    if world.rank == 0:
        records = with_deltas(pairs, described(data.pairs, read_parts(Path(OUT, "parts"))))
        records = respected(records, LABELS) if LABELS else records
        report = write_results(records, members, images)
        say(f"wrote {OUT}/pseudo.jsonl: {', '.join(f'{name} {value:,}' for name, value in report.items())}")
    barrier()


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "a smaller --batch"))
