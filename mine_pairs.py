"""Pairs from an unlabelled gallery [S3.2, Table 6]: embed the pictures, find subgroups of six, pair by CIRR's template.

    python mine_pairs.py --images nlvr2/train --exclude cirr/image_splits/split.rc2.val.json,nlvr2/dev,nlvr2/test1
    torchrun --nproc_per_node 8 mine_pairs.py --images cc3m/images --out out/cc3m

Reads a folder of pictures and an image encoder (ResNet, or the vision side of CLIP).
Writes OUT/embeddings.npy and names.json (the gallery that was mined, rows in the order of names), subgroups.jsonl,
pairs.jsonl, stats.json, log.jsonl, and for the eye subgroups.png and subgroups.html. Every decision is a function of
embeddings.npy: neither the number of ranks nor the block size changes a byte. Embeddings are reused while the encoder
and the bytes of the pictures are the same; the same command goes on where a killed run stopped. settings.json names the
folder and the encoder: an OUT of others is refused.
"""

from common.flags import early_help

early_help(__name__, __file__)

import functools
import hashlib
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, ResNetModel

from common import memory, pages
from common.annotations import cirr_template
from common.batches import ahead, chunks, faults_of, gather_dealt, stop_together
from common.console import UserError, progress, run, say
from common.decoders import cpus_of_rank
from common.files import (
    SMALL_JSON,
    file_sha256,
    keep_apart,
    lock_folder,
    other_settings,
    read_json,
    read_jsonl,
    read_lines,
    real_path,
    tensors_sha256,
    whole,
    write_json,
    write_jsonl,
    write_text,
)
from common.flags import at_least, override
from common.images import EXTENSIONS, ImageStore, Preprocess, check_report, leave_out, list_images, load_bytes
from common.memory import advise
from common.pixels import regular_file
from common.pretrained import load_model, model_kind, read_config
from common.ranks import Log, World, barrier, gather_objects, init_world, pick_dtype
from common.seeds import seeded_rng
from kernels.similarity_topk import exact_dot, exact_topk
from kernels.topk_blocks import topk_in_blocks

# ---- gallery ----
IMAGES = "images"  # folder of the unlabelled pictures, searched recursively; names in every output are relative to it
# A picture is left out if its file name without extension is named there, or if its bytes are those of a picture in
# such a folder; a re-encoded copy under another name is not caught.
EXCLUDE = ()  # benchmark splits [S4.1]: folders of pictures, annotation files (.json, .jsonl), name lists (.txt)
ENCODER = "microsoft/resnet-152"  # folder or hub id: ResNet, pooled 2048-d [S3.2], or CLIP
BATCH = 64  # pictures per forward pass; may change the last bit of an embedding (the number of ranks does not)
DTYPE = "fp32"  # of the encoder; embeddings are stored in fp32 [ours: with bf16 they differ between devices]

# ---- subgroups ----
TOP_K = 20  # most similar pictures of an anchor that are looked at [S3.2]
MAX_SCORE = 0.94  # cosine above which a picture is a near duplicate of the anchor and dropped [S3.2]
MIN_GAP = 0.002  # a picture whose score is less than this below the last added one's is passed over [S3.2]
GROUP = 6  # members of a subgroup, the anchor among them [S3.2]; nine pairs each
# More than half shared is heavy; to compare, the paper ends with subgroups for 66 to 82 % of its pictures.
MAX_SHARED = 3  # members a subgroup may share with any accepted one [ours: S3.2 leaves "heavy overlap" open]
GROUPING = True  # false: as many subgroups of random pictures, hence random pairs (the ablation "no grouping")

# ---- run ----
OUT = "out/mine"  # folder of all outputs
SHOW = 24  # subgroups on the contact sheet
SEED = 0  # which subgroups the contact sheet shows, and random groups; mining itself draws nothing
DEVICE = "auto"  # "auto", "cpu" or "cuda"
WORKERS = 16  # processes that decode images, one a CPU of this rank at most; 0 = none but its own
BLOCK = 2048  # rows and columns of a tile of scores in the search on CPU; pairs whose score is computed at once
AT_ONCE = 0  # pictures searched for, and among, at a time; 0 = all where memory has room, which halves the work
PLAN = 0  # only say what so many pictures would take on 1, 8 and 64 GPUs: disk, memory, time of the search; then stop
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at the pictures: counts of expected, present and unreadable ones, then stop


# ---- gallery: names, content, exclusion ----
_NAME_KEYS = frozenset(  # of CIRR, FashionIQ, LLaVA and CIRCO
    "reference target candidate target_hard target_soft img_set members image "
    "reference_img_id target_img_id gt_img_ids".split()
)


def stem(name: str) -> str:
    """File name without folder and image extension: cirr/dev/dev-244-0-img0.png and dev-244-0-img0 are one picture.

    So are a name with letters and accents apart, as macOS writes it, and one with a Windows path before it."""
    base = unicodedata.normalize("NFC", name).replace("\\", "/").rsplit("/", 1)[-1]
    root, extension = os.path.splitext(base)
    return root if extension.lower() in EXTENSIONS else base


def names_in(value):
    """Image names of an annotation file: a list of names, a table of name -> path, or records."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
        yield f"{value:012d}"  # CIRCO's ids are numbers, COCO's files have twelve digits
    elif isinstance(value, list):
        for item in value:
            if not isinstance(item, dict) or _NAME_KEYS & item.keys():  # a list holds names or records, no tables
                yield from names_in(item)
    elif isinstance(value, dict):
        keys = [key for key in _NAME_KEYS if key in value]
        if keys:
            for key in keys:
                yield from names_in(value[key])
        else:  # CIRR's split file, or target_soft: name -> weight
            yield from value
            yield from (item for item in value.values() if isinstance(item, str))


def excluded(sources: tuple[str, ...]) -> tuple[set[str], list[str]]:
    """Stems that EXCLUDE names, and paths of the pictures in its folders."""
    stems, pictures = set(), []
    for source in sources:
        kind = os.path.splitext(source)[1]
        if os.path.isdir(source):
            names = list_images(source)
            pictures += [regular_file(os.path.join(source, name)) for name in names]  # whatever they are called
        elif not os.path.isfile(source):
            raise UserError(f"--exclude {source}: not found; wanted a folder, .json, .jsonl or .txt")
        elif kind == ".txt":
            names = read_lines(source, "--exclude")
        elif kind in (".json", ".jsonl"):
            names = list(names_in(read_json(source) if kind == ".json" else read_jsonl(source)))
        else:
            raise UserError(f"--exclude {source}: wanted a folder, .json, .jsonl or .txt")
        found = {stem(name) for name in names if name}
        if not found:
            raise UserError(f"--exclude {source}: names no picture; wanted a split file, records or names")
        stems |= found
    return stems, pictures


def hash_files(paths: list[str], workers: int, world: World) -> list[str]:
    """sha256 of every file; the ranks share the reading."""
    mine = paths[world.rank :: world.size]
    with ThreadPoolExecutor(max(1, min(workers, cpus_of_rank()))) as pool:
        return gather_dealt(list(progress(pool.map(file_sha256, mine), "read", len(mine))))


class Gallery(NamedTuple):
    """The pictures that are mined, G' of S3.2."""

    names: list[str]
    hashes: list[str]  # sha256 of each file


def without_benchmarks(names: list[str], images: ImageStore, world: World) -> tuple[Gallery, dict[str, int]]:
    """The pictures that can be read and that EXCLUDE leaves, and how many these are."""
    total, faults = len(names), faults_of(names, images, WORKERS)
    names = leave_out(names, faults, f"{OUT}/unreadable.txt")
    if not names:
        raise UserError(f"none of the {total:,} pictures of {IMAGES} can be read: see {OUT}/unreadable.txt")
    stems, pictures = excluded(EXCLUDE)
    hashes = hash_files([images.path(name) for name in names], WORKERS, world)
    others = set(hash_files(pictures, WORKERS, world))

    by_name = [name for name in names if stem(name) in stems]
    by_content = [name for name, content in zip(names, hashes, strict=True) if content in others]
    for reason, left_out in (("name", by_name), ("content", by_content)):
        if left_out:
            say(f"excluded by {reason}: {len(left_out):,} pictures, first {', '.join(left_out[:3])}")

    gone = {*by_name, *by_content}
    kept = [i for i, name in enumerate(names) if name not in gone]
    if not kept:
        raise UserError(f"all {len(names):,} pictures of {IMAGES} are excluded; check --exclude")
    counts = {"images": total, "unreadable": len(faults)}
    counts |= {"excluded by name": len(by_name), "excluded by content": len(by_content)}
    return Gallery([names[i] for i in kept], [hashes[i] for i in kept]), counts


# ---- embeddings ----
class Encoder(nn.Module):
    """Pixels (B, 3, S, S) -> features (B, D): ResNet's pooled output or CLIP's projected image embedding."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype):
        super().__init__()
        kinds = ("resnet", "clip", "clip_vision_model")
        if (found := model_kind(source, "--encoder")) not in kinds:
            raise UserError(f"--encoder {source}: a {found} model; wanted a ResNet or CLIP")
        config = read_config(source, kinds, "--encoder")
        kind = ResNetModel if config.model_type == "resnet" else CLIPVisionModelWithProjection
        part = config.vision_config if config.model_type == "clip" else config
        self.model = load_model(kind, source, part, dtype, "--encoder")
        self.pooled = config.model_type == "resnet"
        self.preprocess = Preprocess.from_folder(source, "encoder")
        self.requires_grad_(False).to(device).eval()  # eval: batch norm's stored statistics

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model(pixel_values=pixels)
        return out.pooler_output.flatten(1) if self.pooled else out.image_embeds

    def fingerprint(self) -> str:
        """sha256 over weights and preprocessing: whatever an embedding depends on besides the picture."""
        preprocessing = repr((self.preprocess, self.preprocess.table.tolist()))
        return tensors_sha256(sorted(self.state_dict().items()), preprocessing)


def keep_settings(key: str, world: World) -> None:
    """OUT is of one folder of pictures and one encoder (key: its fingerprint), which OUT/settings.json names; where it
    holds what others gave, UserError on every rank. OUT is one for all by default, and embeddings may take hours."""
    fault = None
    if world.rank == 0:
        file = Path(OUT, "settings.json")
        now = {"images": real_path(IMAGES), "encoder": ENCODER, "dtype": DTYPE, "encoder_sha256": key[:16]}
        made = ("embeddings.npy", "embeddings.parts/*.npy", "pairs.jsonl")
        held = any(True for name in made for _ in Path(OUT).glob(name))
        then = read_json(file, SMALL_JSON) if held and file.exists() else now

        # an encoder is its weights and preprocessing, wherever it lies
        same = all(then.get(name) == now[name] for name in ("images", "encoder_sha256"))
        if same:
            write_json(file, now)
        else:
            fault = other_settings(OUT, then, now, f"where your pictures moved, delete {file}")
    stop_together(fault)


@torch.inference_mode()
def embed(encoder: Encoder, images: ImageStore, names: list[str], device, pictures: Tensor) -> np.ndarray:
    """Bytes (B, S, S, 3) of names -> L2-normalised fp32 (B, D); UserError names a picture without a usable one."""
    pixels = encoder.preprocess.normalise(pictures.to(device, non_blocking=True))  # (B, 3, S, S)
    features = encoder(pixels.to(next(encoder.parameters()).dtype)).double()
    lengths = torch.linalg.vector_norm(features, dim=1)
    for name, length in zip(names, lengths.tolist(), strict=True):
        if not 1e-12 < length < float("inf"):  # also catches NaN
            what = "zero" if length <= 1e-12 else "NaN or infinite"
            path = images.path(name)
            raise UserError(f"{path}: its embedding is {what}; remove the picture or use another encoder")
    return (features / lengths[:, None]).float().cpu().numpy()


def embed_gallery(encoder: Encoder, key: str, images: ImageStore, gallery: Gallery, world: World) -> bool:
    """Writes OUT/embeddings.npy and names.json, unless they are there for these pictures and this encoder, whose
    fingerprint `key` is.

    Chunks of BATCH pictures are embedded whole, each by one rank, whatever the number of ranks: the bits of an
    embedding depend on how many share its batch. A chunk's file is named after its content, so that a killed run finds
    what it had. True if something was embedded."""
    names, hashes = gallery
    fingerprint = digest(key, *names, *hashes)
    array, listing, meta = Path(OUT, "embeddings.npy"), Path(OUT, "names.json"), Path(OUT, "embeddings.json")
    if gather_objects(world.rank == 0 and is_current(array, listing, meta, fingerprint, names))[0]:
        return False

    # a file a chunk
    parts = Path(OUT, "embeddings.parts")
    parts.mkdir(parents=True, exist_ok=True)
    pieces = []
    for start in range(0, len(names), BATCH):
        content = digest(key, *hashes[start : start + BATCH])
        pieces.append((start, parts / f"{start:09d}-{content[:24]}.npy"))

    def load(piece: tuple[int, Path]) -> Tensor:
        """Its pictures, decoded while the piece before it is embedded."""
        return load_bytes(images, names[piece[0] : piece[0] + BATCH], encoder.preprocess, WORKERS)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a CPU their number changes the last bit; to use all cores, start more ranks [ours]
    todo = [piece for piece in pieces[world.rank :: world.size] if not piece[1].exists()]
    for (start, path), pictures in ahead(load, progress(todo, "embed")):
        if isinstance(pictures, Exception):
            raise pictures
        rows = embed(encoder, images, names[start : start + BATCH], world.device, pictures)
        write_array(path, rows.shape, [rows])
    torch.set_num_threads(threads)
    barrier()

    # one file of all
    if world.rank == 0:
        width = np.load(pieces[0][1], mmap_mode="r").shape[1]
        write_array(array, (len(names), width), (np.load(path) for _, path in pieces))
        write_json(listing, names)
        write_json(meta, {"fingerprint": fingerprint, "sha256": file_sha256(array)})
        shutil.rmtree(parts)
    barrier()
    return True


def digest(*lines: str) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_current(array: Path, listing: Path, meta: Path, fingerprint: str, names: list[str]) -> bool:
    if not (array.exists() and listing.exists() and meta.exists()):
        return False
    wanted = read_json(meta)
    if wanted["fingerprint"] != fingerprint or read_json(listing) != names:
        return False
    return file_sha256(array) == wanted["sha256"]


def write_array(path: Path, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """fp32 .npy of rows from blocks, without holding them all."""
    with whole(path) as aside, open(aside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for rows in blocks:
            file.write(np.ascontiguousarray(rows, "<f4").data)


def load_embeddings(out: str) -> Tensor:
    """(N, D) fp32, memory-mapped."""
    return torch.from_numpy(np.load(f"{out}/embeddings.npy", mmap_mode="c"))  # "c": torch wants writable memory


# ---- subgroups ----
class Subgroup(NamedTuple):
    """Pictures that are alike, by their row in the embeddings."""

    members: list[int]  # the anchor first
    scores: list[float]  # cosine of each with the anchor


def choose(scores: np.ndarray, max_score: float, min_gap: float, count: int) -> list[int]:
    """Positions of the members taken from an anchor's descending scores, at most `count` [S3.2]."""
    chosen = []
    for position, score in enumerate(scores):
        if len(chosen) == count:
            break
        if score > max_score:  # near duplicate
            continue
        if not chosen or scores[chosen[-1]] - score >= min_gap:
            chosen.append(position)
    return chosen


def held_by_one(width: int) -> int:
    """Bytes of a picture in the search: what it proposes, and its embedding on a device, in 32 bits and in 16."""
    return 48 * 64 + 6 * width


def lot_of(count: int, width: int, device: torch.device) -> int:
    """How many pictures are searched for, and among, at a time: AT_ONCE, or what half of the memory has room for."""
    of_one = held_by_one(width if device.type == "cuda" else 0)
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks that have one memory
    room = memory.has(device) * 2**30 / 2 / sharing
    fitting = count if count * of_one <= room else max(1, int(room / 3 / of_one))  # a lot, a block, the next block
    return min(count, AT_ONCE or fitting)


def nearest(embeddings: Tensor, rows: range, top_k: int, lot: int, device: torch.device) -> Iterator[tuple]:
    """The K nearest pictures of each anchor, itself left out, some anchors at a time: (anchors, scores (n, K), indices
    (n, K)), scores being float64 cosines. embeddings: on the device, or, where a lot is fewer, wherever they are."""
    top_k = max(1, min(top_k, len(embeddings) - 1))
    tile, searching = None if device.type == "cuda" else BLOCK, functools.partial(progress, desc="search")
    if lot < len(embeddings):
        columns = lot if device.type == "cuda" else len(embeddings)  # a CPU reads them as they are mapped
        yield from topk_in_blocks(embeddings, rows, top_k, lot, columns, device, tile, searching)
        return
    everything = len(rows) == len(embeddings)  # the search then computes each pair once, not twice
    queries = embeddings if everything else embeddings[rows.start : rows.stop]
    itself = torch.arange(rows.start, rows.stop, device=device)
    yield rows, *exact_topk(queries, embeddings, top_k, itself, tile, searching)


def candidates(
    neighbours: Iterable[tuple], max_score: float, min_gap: float, group: int
) -> tuple[list[Subgroup], Counter]:
    """The subgroups of the anchors that find enough members, and why the others do not; neighbours: of nearest()."""
    found, discarded = [], Counter()
    for anchors, *both in neighbours:
        for anchor, scores, indices in zip(anchors, *(part.cpu().numpy() for part in both), strict=True):
            # near duplicates out, then members whose scores keep a distance
            chosen = choose(scores, max_score, min_gap, group - 1)
            if len(chosen) == group - 1:
                found.append(Subgroup([anchor, *indices[chosen].tolist()], [1.0, *scores[chosen].tolist()]))
            elif (scores > max_score).all():
                discarded["all neighbours are near duplicates"] += 1
            else:
                discarded["too few neighbours left"] += 1
    return found, discarded


def drop_overlapping(found: list[Subgroup], max_shared: int) -> list[Subgroup]:
    """In the order of anchors, the subgroups that share at most `max_shared` members with each one accepted before."""
    accepted = []
    groups_of: dict[int, list[int]] = {}  # picture -> the accepted subgroups that it is in
    for subgroup in found:
        shared = Counter(group for member in subgroup.members for group in groups_of.get(member, ()))
        if max(shared.values(), default=0) <= max_shared:
            for member in subgroup.members:
                groups_of.setdefault(member, []).append(len(accepted))
            accepted.append(subgroup)
    return accepted


def cosines(embeddings: Tensor, pairs: list[tuple[int, int]], block: int) -> list[float]:
    """Float64 cosines of pairs of rows, `block` at a time: a call a subgroup would cost a GPU more than the sums."""
    scores = []
    for some in chunks(pairs, block):
        rows = embeddings[torch.tensor(some, device=embeddings.device)]  # (n, 2, D)
        scores += exact_dot(rows[:, 0], rows[:, 1]).tolist()
    return scores


def random_groups(embeddings: Tensor, count: int, group: int, seed: int, block: int) -> list[Subgroup]:
    """`count` subgroups of random pictures."""
    drawn = []
    for i in range(count):
        drawn.append(seeded_rng("random group", seed, i).choice(len(embeddings), group, replace=False).tolist())
    scores = cosines(embeddings, [(members[0], member) for members in drawn for member in members], block)
    return [Subgroup(members, scores[i * group : (i + 1) * group]) for i, members in enumerate(drawn)]


# ---- outputs ----
def subgroup_records(subgroups: list[Subgroup], names: list[str]) -> list[dict]:
    """The lines of subgroups.jsonl."""
    records = []
    for id, (members, scores) in enumerate(subgroups):
        named = [names[member] for member in members]
        records.append({"id": id, "members": named, "scores": [round(score, 6) for score in scores]})
    return records


def pair_records(subgroups: list[Subgroup], names: list[str], embeddings: Tensor) -> list[dict]:
    """The lines of pairs.jsonl: of each subgroup those pairs that CIRR takes of its own."""
    pairs, home = [], []
    for id, (members, _) in enumerate(subgroups):
        for a, b in cirr_template(GROUP):
            pairs.append((members[a], members[b]))
            home.append(id)

    records = []
    for id, (a, b), score in zip(home, pairs, cosines(embeddings, pairs, BLOCK), strict=True):
        named = {"reference": names[a], "target": names[b], "score": round(score, 6)}
        records.append({"id": len(records), "subgroup": id, **named})
    return records


def write_results(subgroups: list[dict], pairs: list[dict], counts: dict[str, int], images: ImageStore) -> None:
    """subgroups.jsonl, pairs.jsonl, stats.json, and for the eye subgroups.png and subgroups.html."""
    write_jsonl(f"{OUT}/subgroups.jsonl", subgroups)
    write_jsonl(f"{OUT}/pairs.jsonl", pairs)
    rule = {"top_k": TOP_K, "max_score": MAX_SCORE, "min_gap": MIN_GAP, "group": GROUP, "max_shared": MAX_SHARED}
    stats = {"counts": counts, "rule": rule | {"grouping": GROUPING}, "encoder": ENCODER, "exclude": list(EXCLUDE)}
    write_json(f"{OUT}/stats.json", stats, indent=2)
    draw(subgroups, counts, images)

    for name, value in counts.items():
        say(f"{value:>10,} {name}")
    if not subgroups:
        say(
            f"no subgroup: one takes an anchor and {GROUP - 1} pictures, none above {MAX_SCORE} similar to it and each "
            f"{MIN_GAP} below the last; see the counts (--max_score, --min_gap, another encoder or more pictures)"
        )


def draw(subgroups: list[dict], counts: dict[str, int], images: ImageStore) -> None:
    """subgroups.png and subgroups.html: some subgroups, one a row, the anchor first."""
    count = min(SHOW, len(subgroups))
    picked = sorted(seeded_rng("contact sheet", SEED).permutation(len(subgroups))[:count].tolist())
    rows, strips = [], []
    for subgroup in (subgroups[i] for i in picked):
        labels = ["anchor", *(f"{score:.3f}" for score in subgroup["scores"][1:])]
        named = zip(labels, subgroup["members"], strict=True)
        rows.append([(images.path(name), f"{label} {name}") for label, name in named])
        strips.append((f"Subgroup {subgroup['id']}", pages.strip(rows[-1])))

    title = f"{count} of {len(subgroups):,} subgroups: the anchor, then its members with their cosine"
    pages.contact_sheet(rows, f"{OUT}/subgroups.png", title=title)
    table = pages.table([[name, str(value)] for name, value in counts.items()], ["", "count"])
    write_text(f"{OUT}/subgroups.html", pages.page("Mined subgroups", [("Counts", table), title, *strips]))


def say_plan(count: int, width: int = 2048) -> None:
    """What `count` pictures would take, by arithmetic; width: of ResNet-152's embeddings. The search goes at the rate
    of the one that was measured (an H200, 102,436 pictures in 94 ms: docs/measured.md); in lots as fast [a guess]."""
    rate, whole = 102_436**2 * 2048 / 0.094, count * held_by_one(width) / 2**30
    say(f"{4 * count * width / 2**30:12,.1f} GiB  embeddings on disk; embedding the pictures was not measured on a GPU")
    say(f"{count * 1024 / 2**30:12,.1f} GiB  names, hashes and subgroups in host memory, about 1 KB a picture")
    say(f"{whole:12,.1f} GiB  on each GPU for the search in one piece; with less than twice that, it goes in lots")
    for gpus in (1, 8, 64):
        once = gpus == 1 and whole <= 70  # a gallery against itself scores a pair once; against a part of it twice
        seconds = (1 if once else 2) * count**2 * width / rate / gpus
        say(f"{seconds / 3600:12,.3f} h    search on {gpus} GPU{'s' * (gpus > 1)}, at an H200's rate")


# ---- the run ----
def check_flags() -> None:
    if GROUP < 3 or TOP_K < GROUP - 1:
        raise UserError(f"--group {GROUP} --top_k {TOP_K}: wanted a group of 3 or more, top_k of group - 1")
    at_least(globals(), BATCH=1, BLOCK=1, WORKERS=0, MAX_SHARED=0, AT_ONCE=0, PLAN=0)


def check_pictures(names: list[str], images: ImageStore) -> None:
    """Counts; UserError for pictures that cannot be read, for a wrong EXCLUDE, and where its names leave none."""
    report, ok = check_report(names, images, CHECK_DECODE, WORKERS, f"{OUT}/unreadable.txt")
    stems, _ = excluded(EXCLUDE)
    by_name = sum(stem(name) in stems for name in names)
    if by_name == len(names):
        raise UserError(f"all {len(names):,} pictures of {IMAGES} are excluded; check --exclude")
    if not ok:
        raise UserError(report)
    say(report + (f"; {by_name:,} excluded by name" if EXCLUDE else ""))


def main() -> None:
    check_flags()
    if PLAN:
        return say_plan(PLAN)
    world = init_world(DEVICE)
    names, images = list_images(IMAGES), ImageStore(IMAGES, own=True)
    if CHECK:
        return check_pictures(names, images)
    keep_apart(OUT, IMAGES, "--out --images")  # it holds a contact sheet
    lock_folder(OUT, "mine")
    encoder = Encoder(ENCODER, world.device, pick_dtype(DTYPE, world.device))
    key = encoder.fingerprint()
    keep_settings(key, world)
    log = Log(OUT)

    # S3.2: the gallery G', and S4.1: without the pictures of the benchmarks
    gallery, counts = without_benchmarks(names, images, world)

    # an embedding of each picture
    fresh = embed_gallery(encoder, key, images, gallery, world)
    names = gallery.names
    say(f"embeddings of {len(names):,} pictures: {'written' if fresh else 'reused'} ({OUT}/embeddings.npy)")
    embeddings = load_embeddings(OUT)  # (N, D), mapped
    lot = lot_of(*embeddings.shape, world.device)
    if lot == len(names):
        embeddings = embeddings.to(world.device)

    # S3.2: every picture is an anchor and looks for its subgroup; each rank searches for its share of them
    anchors = range(len(names) * world.rank // world.size, len(names) * (world.rank + 1) // world.size)
    neighbours = nearest(embeddings, anchors, TOP_K, lot, world.device)
    searched = gather_objects(candidates(neighbours, MAX_SCORE, MIN_GAP, GROUP))  # in rank order, hence in anchor order

    # one rank decides: whether a subgroup overlaps depends on all before it
    if world.rank == 0:
        found = [subgroup for some, _ in searched for subgroup in some]
        accepted = drop_overlapping(found, MAX_SHARED)
        discarded = sum((reasons for _, reasons in searched), Counter())
        discarded[f"more than {MAX_SHARED} members shared with an accepted subgroup"] = len(found) - len(accepted)

        # the ablation "no grouping" [Table 6]: as many subgroups of random pictures
        if not GROUPING:
            accepted = random_groups(embeddings, len(accepted), GROUP, SEED, BLOCK)

        # CIRR's pairs of each subgroup
        subgroups = subgroup_records(accepted, names)
        pairs = pair_records(accepted, names, embeddings)

        counts |= {"anchors": len(names)} | {f"discarded: {reason}": n for reason, n in sorted(discarded.items())}
        counts |= {"subgroups": len(subgroups), "pairs": len(pairs)}
        write_results(subgroups, pairs, counts, images)
        log.write(**counts)
    barrier()  # the process group lives as long as its first rank works


if __name__ == "__main__":
    override(globals())
    run(advise(main, "a smaller --batch, --block or --at_once"))
