"""Stage 4, delta generation [S3.2]: the tuned VDG says, for a pair of images, what turns the reference into the target.

    python gen_deltas.py --vdg out/vdg --pairs out/mine/pairs.jsonl --images aux/images
    torchrun --nproc_per_node 8 gen_deltas.py --vdg out/vdg --triplets cirr/train --root cirr --out out/same_pairs

Reads a VDG (vdg_tune.py), the pairs of mine_pairs.py (with subgroups.jsonl beside) or of human triplets, and images.
Writes OUT/parts/part-R-of-N.jsonl as it goes, then OUT/pseudo.jsonl, cirr/ (the same in CIRR's layout), report.json
and deltas.html.

A delta is a function of the VDG, the two images, the pair's id and the sampling constants, never of batch, order or
number of ranks: the same command goes on after a kill, also with another batch size or on another number of ranks.
Deltas already in OUT are kept: if pictures changed under the same names, or the LLM in its folder, use a new OUT.
On a CPU with MKL this holds to the bit; on a GPU, where a product of another shape rounds otherwise, at the same BATCH.
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
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

import vdg_align
import vdg_tune
from common import memory, pages
from common.annotations import FASHIONIQ_CATEGORIES, training_triplets
from common.batches import ahead, chunks, stop_together
from common.console import UserError, progress, run, say
from common.decode import describe, fill, prompt_parts, row_key, start_engine
from common.exports import write_exports
from common.files import (
    JsonlAppender,
    file_sha256,
    lock_folder,
    read_json,
    read_jsonl,
    tensors_sha256,
    write_json,
    write_jsonl,
    write_text,
)
from common.flags import at_least, override
from common.images import ImageStore, check_report, load_pixels, safe_name, shown
from common.llama import llm_shape
from common.ranks import (
    Log,
    all_sum,
    any_rank,
    barrier,
    gather_objects,
    init_world,
    pick_dtype,
    seeded_rng,
    stop_requested,
)
from vdg_align import vision_weights

# ---- what is described ----
VDG = "out/vdg"  # checkpoint of vdg_tune.py
PAIRS = "out/mine/pairs.jsonl"  # pairs of mine_pairs.py
IMAGES = ""  # folder of the images; with TRIPLETS empty means the usual places in and beside ROOT
TRIPLETS = ""  # instead of PAIRS those of human triplets: "cirr/train", "fashioniq/train" (or ".../dress"), "jsonl"
ROOT = ""  # folder of the annotations of TRIPLETS; for "jsonl" the file
FILTER = ""  # checkpoint of train_cir.py: keep a triplet only if it finds the target; empty keeps all [ours]
FILTER_TOP = 1  # ... among the so many best of its subgroup [ours]
SUBGROUPS = 0  # describe this many random subgroups only, 0 = all; 3,345 for CIRR and 3,600 for FashionIQ [S4.1]
MAX_PAIRS = 0  # at most so many pairs, in whole random subgroups, 0 = all [ours]
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
WORKERS = 8  # threads that decode images
SEED = 0  # fixes what is drawn
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the frozen models: bf16 on cuda, fp32 on CPU
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at pairs and images: counts of expected, present and unreadable images, then stop


# ---- pairs ----
def read_pairs(path: str, root: str) -> tuple[list[dict], dict, ImageStore]:
    """Records of pairs.jsonl, the members of each subgroup (subgroups.jsonl beside it, if there), and the images."""
    if not os.path.isdir(root):
        raise UserError(f"--images {root!r} is no folder; name the folder that the pairs' names are relative to")
    beside = Path(path).with_name("subgroups.jsonl")
    members = {group["id"]: group["members"] for group in read_jsonl(beside)} if beside.exists() else {}
    return read_jsonl(path), members, ImageStore(root, own=True)


def triplet_pairs(name: str, root: str, images: str) -> tuple[list[dict], dict, ImageStore]:
    """The pairs of human triplets; the human text is not among them, so that it cannot be taken for a generated one."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 3:
        raise UserError(f"--triplets {name}: wanted dataset/split or dataset/split/category, as in cirr/train")
    dataset, split, category = parts + ["train", "all"][len(parts) - 1 :]
    categories = FASHIONIQ_CATEGORIES if dataset == "fashioniq" and category == "all" else (category,)
    pairs, members = [], {}
    for name in categories:
        triplets, store = training_triplets(dataset, root, split, name, images or None)
        kind = {"category": name} if dataset == "fashioniq" else {}
        pairs += [{"id": t.id, "reference": t.reference, "target": t.target} | kind for t in triplets]
        members |= {t.id: t.members for t in triplets if t.members}
    return pairs, members, store


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
        if not isinstance(pair["id"], int | str):
            raise UserError(f"{here}: id {shown(pair['id'])}; wanted a number or a string")
        if pair["id"] in seen:
            raise UserError(f"{here}: id {shown(pair['id'])} occurs twice; ids must differ")
        seen.add(pair["id"])


def choose_subgroups(pairs: list[dict], subgroups: int, max_pairs: int, seed: int) -> list[dict]:
    """Pairs of random whole subgroups, in their old order; a pair without a subgroup is one by itself."""
    if not subgroups and not max_pairs:
        return pairs
    groups: dict[object, list[dict]] = {}
    for pair in pairs:
        groups.setdefault(pair.get("subgroup", ("alone", pair["id"])), []).append(pair)
    names = list(groups)
    chosen, count = set(), 0
    for i in seeded_rng("subgroups", seed).permutation(len(names))[: subgroups or None]:
        count += len(groups[names[i]])
        if max_pairs and count > max_pairs:
            break
        chosen.add(names[i])
    if not chosen:
        raise UserError(f"--max_pairs {max_pairs} is less than one subgroup has; give at least {count}")
    return [pair for pair in pairs if pair.get("subgroup", ("alone", pair["id"])) in chosen]


def identity(pair: dict) -> tuple:
    """What makes a stored delta this pair's: an id that now means other images is another pair."""
    return pair["id"], pair["reference"], pair["target"]


# ---- Q-Former outputs, once an image ----
def encode_images(vision, images: ImageStore, names: list[str], folder: Path, batch: int, workers: int, world):
    """Q-Former outputs of every distinct picture -> ((N, Q, q_width) memory-mapped, {name: row}).

    The file is named by the hash of encoder weights and image contents: a changed picture or encoder is another file.
    Rows of an earlier file by the same encoder are taken over. Half precision unless the model computes in fp32."""
    share = {name: file_sha256(images.path(name)) for name in names[world.rank :: world.size]}
    content = {name: digest for part in gather_objects(share) for name, digest in part.items()}
    keys = sorted(set(content.values()))
    frozen = (item for item in vision.state_dict().items() if not item[0].startswith("projection."))  # that comes after
    encoder, shape = tensors_sha256(frozen), (len(keys), *vision.query_tokens.shape[1:])
    path = folder / f"{hashlib.sha256(json.dumps([encoder, keys]).encode()).hexdigest()[:16]}.npy"
    row = {key: i for i, key in enumerate(keys)}
    if not any_rank(not path.exists()):
        return np.load(path, mmap_mode="r"), {name: row[key] for name, key in content.items()}

    known = {}  # content -> its row in a file that an earlier run completed
    for header in sorted(folder.glob("*.json")):
        before = read_json(header)
        if before["encoder"] == encoder and header.with_suffix(".npy").exists():
            known |= zip(before["keys"], np.load(header.with_suffix(".npy"), mmap_mode="r"), strict=True)
    aside = path.with_suffix(".tmp")
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        dtype = np.float32 if vision.query_tokens.dtype == torch.float32 else np.float16
        rows = np.lib.format.open_memmap(aside, "w+", dtype, shape)
        for key in row.keys() & known.keys():
            rows[row[key]] = known[key]
        rows.flush()
    barrier()
    rows = np.lib.format.open_memmap(aside, "r+")
    first = {key: name for name, key in reversed(content.items())}  # one name of each content
    todo = [first[key] for key in keys if key not in known][world.rank :: world.size]

    def load(chunk: list[str]) -> torch.Tensor:
        return load_pixels(images, chunk, vision.preprocess, workers)

    fault = None
    for chunk, pixels in ahead(load, chunks(progress(todo, "images"), batch)):
        if isinstance(pixels, Exception):
            fault = pixels
            break
        # always a full batch: the same shape whatever the number of images, hence the same rounding
        queries = vision.queries(pixels[fill(list(range(len(chunk))), batch)].to(world.device))[: len(chunk)]
        rows[[row[content[name]] for name in chunk]] = queries.float().cpu().numpy()
    rows.flush()
    stop_together(fault)  # and waits for every rank's rows
    if world.rank == 0:
        write_json(path.with_suffix(".json"), {"encoder": encoder, "keys": keys})
        os.replace(aside, path)
        for old in folder.iterdir():
            if old.stem != path.stem:
                old.unlink()
    barrier()
    return np.load(path, mmap_mode="r"), {name: row[key] for name, key in content.items()}


# ---- sampling: noise that belongs to the pair ----


# ---- decoding: instruction once, each reference once, each pair; keys and values in buffers allocated once ----


# ---- files ----
def open_parts(folder: Path, fingerprint: dict, world) -> tuple[JsonlAppender, dict[tuple, dict]]:
    """This rank's part, and what all parts of this and earlier runs (on any number of ranks) hold, by pair."""
    if world.rank == 0:  # alone: a rank that is already writing must not have its last line taken for a torn one
        for path in sorted(folder.glob("part-*-of-*.jsonl")):
            JsonlAppender(path, fingerprint)  # refuses another fingerprint, cuts a torn tail
    barrier()
    done = read_parts(folder)
    barrier()
    return JsonlAppender(folder / f"part-{world.rank}-of-{world.size}.jsonl", fingerprint), done


def read_parts(folder: Path) -> dict[tuple, dict]:
    paths = sorted(folder.glob("part-*-of-*.jsonl"))
    return {identity(record): record for path in paths for record in read_jsonl(path)}


@torch.inference_mode()
def subgroup_ranks(model, images: ImageStore, records: list[dict], members: dict, batch: int, workers: int):
    """Place of each record's target, 1 the best, among its subgroup less the reference, by a CIR model; ties count
    against it. An image outside any subgroup cannot be judged: UserError."""
    device = next(model.parameters()).device

    def encode(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return model.image(load_pixels(images, names, model.preprocess, workers).to(device))

    ranked = []
    features: dict[str, torch.Tensor] = {}
    for record in records:
        group = members.get(record.get("subgroup", record["id"]))
        if not group:
            raise UserError(f"--filter: pair {record['id']} has no subgroup; is subgroups.jsonl beside it?")
        features |= dict.fromkeys(group)
    for names in chunks(list(features), batch):
        features |= zip(names, encode(names)[1].float(), strict=True)
    for part in chunks(progress(records, "filter"), batch):
        first = list(dict.fromkeys(record["reference"] for record in part))
        tokens = encode(first)[0][[first.index(record["reference"]) for record in part]]
        for record, c in zip(part, model.compose(tokens, [record["delta"] for record in part]).float(), strict=True):
            group = members[record.get("subgroup", record["id"])]
            others = [name for name in group if name not in (record["reference"], record["target"])]
            scores = torch.stack([features[name] for name in (record["target"], *others)]) @ c
            ranked.append(int((scores >= scores[0]).sum()))
    return ranked


def write_results(out: Path, records: list[dict], members: dict, images: ImageStore, show: int, seed: int, layout):
    """Writes the four files -> what report.json holds. layout: ("cirr" or "fashioniq", split, EXPORT)."""
    write_jsonl(out / "pseudo.jsonl", records)
    known = ((record, members.get(record.get("subgroup", record["id"]))) for record in records)
    write_exports(out, layout[2], *layout[:2], [r | {"members": m} if m else r for r, m in known], images)
    flags = Counter(flag for record in records for flag in record.get("flags", ()))
    report = {
        "pairs": len(records),
        "images": len({name for r in records for name in (r["reference"], r["target"])}),
        "distinct_deltas": len({record["delta"] for record in records}),
        "mean_words": round(sum(len(record["delta"].split()) for record in records) / max(1, len(records)), 2),
        **{"empty": 0, "runaway": 0, "repeated": 0, **dict(sorted(flags.items()))},
    }
    shown = sorted(seeded_rng("show", seed).permutation(len(records))[:show].tolist())
    write_text(out / "deltas.html", sample_page([records[i] for i in shown], report, images))
    return report


def sample_page(records: list[dict], report: dict, images: ImageStore) -> str:
    """A page of deltas beside their two pictures."""
    panels = []
    for r in records:
        notes = [f"pair {r['id']}", *r.get("flags", ())]
        if "reverse_delta" in r:
            notes.append(f"reversed: {r['reverse_delta']}")
        target = (images.path(r["target"]), f"target {r['target']}")
        query = (images.path(r["reference"]), f"reference {r['reference']}")
        panels.append(pages.panel(query, r["delta"] or "(nothing)", [target], note=" · ".join(notes)))
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in report.items())
    return pages.page("Generated deltas", [("Counts", counts), (f"{len(records)} pairs at random", *panels)])


def digest_of(folder: str) -> str:
    """Hash of a VDG's files; config.json among them names the LLM, the vision side and the prompt."""
    names = ("config.json", "adapter_config.json", "adapter_model.safetensors", "projection.safetensors")
    absent = [name for name in names if not os.path.isfile(f"{folder}/{name}")]
    if absent:
        raise UserError(f"{folder}/{absent[0]} not found; wanted a finished checkpoint of vdg_tune.py")
    return hashlib.sha256("".join(file_sha256(f"{folder}/{name}") for name in names).encode()).hexdigest()


def main() -> None:
    transformers.logging.set_verbosity_error()
    world = init_world(DEVICE)
    at_least(globals(), TEMPERATURE=0, TOP_K=0, MAX_NEW=1, BATCH=1, ENCODE_BATCH=1, FILTER_TOP=1)
    at_least(globals(), SUBGROUPS=0, MAX_PAIRS=0, SHOW=0, WORKERS=0)
    dtype = pick_dtype(DTYPE, world.device)
    tuned = {"llm": vdg_align.LLM, "vision": vdg_align.VISION, "quantize": "", "prompt": vdg_tune.PROMPT}
    if not (PLAN or CHECK) or os.path.exists(f"{VDG}/config.json"):
        tuned = vdg_tune.read_stage(VDG, "tune")
    size = 2 if PLAN and DTYPE == "auto" else dtype.itemsize
    vision_size = vision_weights(tuned["vision"])
    options = memory.generation(llm_shape(tuned["llm"]), tuned, vision_size, size, BATCH, MAX_NEW)
    if PLAN:
        memory.say(options, [80, 40, 24])
        return
    pairs, members, images = triplet_pairs(TRIPLETS, ROOT, IMAGES) if TRIPLETS else read_pairs(PAIRS, IMAGES)
    check_pairs(pairs, TRIPLETS or PAIRS)
    pairs = choose_subgroups(pairs, SUBGROUPS, MAX_PAIRS, SEED)
    names = sorted({name for pair in pairs for name in (pair["reference"], pair["target"])})
    if CHECK:
        report, ok = check_report(names, images, CHECK_DECODE, WORKERS)
        say(f"{len(pairs):,} pairs; {report}")
        if not ok:
            raise UserError("images are missing or unreadable; complete the folder or correct --images")
        return
    missing = images.missing(names)
    if missing:
        found = f"{len(missing):,} of {len(names):,} images are not in {', '.join(images.roots)}"
        raise UserError(f"{found}, first {shown(missing[0])}; complete the folder or correct --images")
    lock_folder(OUT)
    out = Path(OUT)
    settings = {"vdg": digest_of(VDG), "dtype": str(dtype), "merge": MERGE, "seed": SEED, "reverse": REVERSE}
    settings |= {"temperature": TEMPERATURE, "top_k": TOP_K, "max_new": MAX_NEW}
    part, done = open_parts(out / "parts", settings, world)
    todo = [pair for pair in pairs if identity(pair) not in done]
    todo.sort(key=lambda pair: (pair["reference"], pair["target"], json.dumps(pair["id"])))  # a reference's together
    say(f"{len(pairs):,} pairs of {len(names):,} images, {len(pairs) - len(todo):,} of them described already")

    if todo:
        memory.say(options, [memory.has(world.device)])
        vision, llm, tokenizer, config = vdg_tune.load_vdg(VDG, world.device, dtype)
        if MERGE and not config["quantize"]:
            vdg_tune.merge_lora(llm)
        prompt, order = prompt_parts(vdg_tune.prompt_pieces(tokenizer, config["prompt"]))
        names = sorted({name for pair in todo for name in (pair["reference"], pair["target"])})
        queries, row = encode_images(vision, images, names, out / "queries", ENCODE_BATCH, WORKERS, world)
        graph = GRAPH and world.device.type == "cuda" and not config["quantize"]
        engine = start_engine(llm, prompt, queries.shape[1], BATCH, MAX_NEW, graph)

        def image_tokens(names: list[str]) -> torch.Tensor:
            return vision(torch.from_numpy(queries[[row[name] for name in names]]).to(world.device))  # (n, Q, D)

        def speak(batch: list[dict], order: list[str], direction: str) -> list[tuple[str, list[str]]]:
            """(delta, flags) of each pair; order: which of its images come first and second in the prompt."""
            names = [tuple(pair[side] for side in order) for pair in batch]
            keys = [row_key(SEED, pair["id"], direction) for pair in batch]
            return describe(engine, image_tokens, tokenizer, names, keys, MAX_NEW, TEMPERATURE, TOP_K)

    mine = todo[len(todo) * world.rank // world.size : len(todo) * (world.rank + 1) // world.size]
    began, count = time.time(), 0
    for batch in chunks(progress(mine, "deltas"), BATCH):
        if stop_requested():
            break
        forward = speak(batch, order, "forward")
        backward = speak(batch, order[::-1], "reverse") if REVERSE else None
        for i, pair in enumerate(batch):
            record = {key: pair[key] for key in ("id", "reference", "target")} | {"delta": forward[i][0]}
            flags = forward[i][1]
            if backward:
                record["reverse_delta"] = backward[i][0]
                flags = flags + [f"reverse_{flag}" for flag in backward[i][1]]
            part.append(record | ({"flags": flags} if flags else {}))
        count += len(batch)
    made, seconds = all_sum(count), max(time.time() - began, 1e-9)
    if made:
        Log(OUT).write(generated=int(made), seconds=round(seconds, 1), pairs_per_s=round(made / seconds, 2))
    if any_rank(count < len(mine)):
        say(f"stopped with {len(todo) - int(made):,} pairs to go; the same command goes on")
        raise SystemExit(143)
    said = read_parts(out / "parts")
    keys = ("delta", "reverse_delta", "flags")
    records = [pair | {key: said[identity(pair)][key] for key in keys if key in said[identity(pair)]} for pair in pairs]
    kept = records
    if FILTER:
        import train_cir

        model = train_cir.load_cir(FILTER, world.device)
        mine = records[world.rank :: world.size]
        shares = gather_objects(subgroup_ranks(model, images, mine, members, ENCODE_BATCH, WORKERS))
        ranks = [shares[i % world.size][i // world.size] for i in range(len(records))]
        kept = [record for record, rank in zip(records, ranks, strict=True) if rank <= FILTER_TOP]
    if world.rank == 0:
        dataset, split = (TRIPLETS.split("/") + ["train"])[:2] if TRIPLETS else ("cirr", "train")
        report = write_results(out, kept, members, images, SHOW, SEED, (dataset, split, EXPORT))
        if FILTER:
            report |= {"share_kept": round(len(kept) / max(1, len(records)), 4), "filter_top": FILTER_TOP}
        write_json(out / "report.json", report, indent=2)
        say(f"wrote {OUT}/pseudo.jsonl: {', '.join(f'{name} {value:,}' for name, value in report.items())}")
    barrier()


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "a smaller --batch"))
