"""Pairs from an unlabelled gallery [S3.2, Table 6]: embed the pictures, find subgroups of six, pair by CIRR's template.

    python mine_pairs.py --images nlvr2/train --exclude cirr/image_splits/split.rc2.val.json,nlvr2/dev,nlvr2/test1
    torchrun --nproc_per_node 8 mine_pairs.py --images cc3m/images --out out/cc3m

Reads a folder of pictures and an image encoder (ResNet, or the vision side of CLIP).
Writes OUT/embeddings.npy and names.json (the gallery that was mined, rows in the order of names), subgroups.jsonl,
pairs.jsonl, stats.json, log.jsonl, and for the eye subgroups.png and subgroups.html. Every decision is a function of
embeddings.npy: neither the number of ranks nor the block size changes a byte. Embeddings are reused while the encoder
and the bytes of the pictures are the same; the same command goes on where a killed run stopped.
"""

from common.flags import early_help

early_help(__name__, __file__)

import hashlib
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModelWithProjection, ResNetModel

from common import pages
from common.batches import faults_of
from common.console import UserError, progress, run, say
from common.files import file_sha256, lock_folder, read_json, read_jsonl, write_json, write_jsonl, write_text
from common.flags import at_least, override
from common.images import EXTENSIONS, ImageStore, Preprocess, check_report, leave_out, list_images, load_pixels
from common.ranks import Log, World, barrier, gather_objects, init_world, pick_dtype, seeded_rng
from kernels.similarity_topk import exact_dot, exact_topk

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
WORKERS = 8  # threads that read and decode pictures
BLOCK = 2048  # rows and columns of a tile of scores in the search on CPU
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at the pictures: counts of expected, present and unreadable ones, then stop


# ---- gallery: names, content, exclusion ----
NAME_KEYS = frozenset(  # of CIRR, FashionIQ, LLaVA and CIRCO
    "reference target candidate target_hard target_soft img_set members image "
    "reference_img_id target_img_id gt_img_ids".split()
)


def stem(name: str) -> str:
    """File name without folder and image extension: cirr/dev/dev-244-0-img0.png and dev-244-0-img0 are one picture."""
    base = name.rsplit("/", 1)[-1]
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
            if not isinstance(item, dict) or NAME_KEYS & item.keys():  # a list holds names or records, no tables
                yield from names_in(item)
    elif isinstance(value, dict):
        keys = [key for key in NAME_KEYS if key in value]
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
            pictures += [ImageStore(source).path(name) for name in names]
        elif not os.path.isfile(source):
            raise UserError(f"--exclude {source}: not found; wanted a folder, .json, .jsonl or .txt")
        elif kind == ".txt":
            names = [line.strip() for line in Path(source).read_text(encoding="utf-8").split("\n")]
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
    with ThreadPoolExecutor(max(1, workers)) as pool:
        mine = list(progress(pool.map(file_sha256, mine), "read", len(mine)))
    hashes = [""] * len(paths)
    for rank, part in enumerate(gather_objects(mine)):
        hashes[rank :: world.size] = part
    return hashes


def drop_excluded(names: list[str], hashes: list[str], stems: set[str], others: set[str]):
    """Indices of the pictures that stay, and the names of those left out by name and by content."""
    by_name = [i for i, name in enumerate(names) if stem(name) in stems]
    by_content = [i for i, content in enumerate(hashes) if content in others]
    out = {*by_name, *by_content}
    return [i for i in range(len(names)) if i not in out], [names[i] for i in by_name], [names[i] for i in by_content]


# ---- embeddings ----
class Encoder(nn.Module):
    """Pixels (B, 3, S, S) -> features (B, D): ResNet's pooled output or CLIP's projected image embedding."""

    def __init__(self, source: str, device: torch.device, dtype: torch.dtype):
        super().__init__()
        local = os.path.isdir(source)
        kinds = {"resnet": ResNetModel, "clip": CLIPVisionModelWithProjection}
        kinds["clip_vision_model"] = kinds["clip"]
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=local)
            if config.model_type not in kinds:
                raise UserError(f"{source}: a {config.model_type} model; wanted a ResNet or CLIP")
            self.model, report = kinds[config.model_type].from_pretrained(
                source, dtype=dtype, use_safetensors=True, local_files_only=local, output_loading_info=True
            )
        except SafetensorError as fault:
            raise UserError(f"{source}: damaged weights ({fault}); download or copy them again") from None
        except OSError as fault:
            wanted = "wanted a folder with config.json and model.safetensors, or a hub id that can be downloaded"
            raise UserError(f"--encoder {source} cannot be read ({fault}); {wanted}") from None
        except ValueError as fault:  # transformers': no model_type in config.json
            if isinstance(fault, UserError):
                raise
            raise UserError(f"{source}: {fault}; a folder written by save_pretrained is wanted") from None
        if report["missing_keys"] or report["mismatched_keys"]:  # transformers would go on with random weights
            first = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[0]
            raise UserError(f"{source}: weights are missing, first {first}; download or copy them again")
        self.pooled = config.model_type == "resnet"
        self.preprocess = Preprocess.from_folder(source, "encoder")
        self.requires_grad_(False).to(device).eval()  # eval: batch norm's stored statistics

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model(pixel_values=pixels)
        return out.pooler_output.flatten(1) if self.pooled else out.image_embeds

    def fingerprint(self) -> str:
        """sha256 over weights and preprocessing: whatever an embedding depends on besides the picture."""
        digest = hashlib.sha256(repr((self.preprocess, self.preprocess.table.tolist())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


@torch.inference_mode()
def embed(encoder: Encoder, images: ImageStore, names: list[str], device, workers: int) -> np.ndarray:
    """L2-normalised fp32 embeddings (B, D); UserError names a picture without a usable one."""
    pixels = load_pixels(images, names, encoder.preprocess, workers)
    features = encoder(pixels.to(device, next(encoder.parameters()).dtype)).double()
    lengths = torch.linalg.vector_norm(features, dim=1)
    for name, length in zip(names, lengths.tolist(), strict=True):
        if not 1e-12 < length < float("inf"):  # also catches NaN
            what = "zero" if length <= 1e-12 else "NaN or infinite"
            path = images.path(name)
            raise UserError(f"{path}: its embedding is {what}; remove the picture or use another encoder")
    return (features / lengths[:, None]).float().cpu().numpy()


def embed_gallery(
    encoder: Encoder,
    images: ImageStore,
    names: list[str],
    hashes: list[str],
    out: str,
    batch: int,
    workers: int,
    world: World,
) -> bool:
    """Writes out/embeddings.npy and names.json, unless they are there for these pictures and this encoder.

    Chunks of `batch` pictures are embedded whole, each by one rank, whatever the number of ranks: the bits of an
    embedding depend on how many share its batch. A chunk's file is named after its content, so that a killed run finds
    what it had. True if something was embedded."""
    key = encoder.fingerprint()
    fingerprint = hashlib.sha256("\n".join([key, *names, *hashes]).encode()).hexdigest()
    array, listing, meta = Path(out, "embeddings.npy"), Path(out, "names.json"), Path(out, "embeddings.json")
    if gather_objects(world.rank == 0 and is_current(array, listing, meta, fingerprint, names))[0]:
        return False
    parts = Path(out, "embeddings.parts")
    parts.mkdir(parents=True, exist_ok=True)
    chunks = []
    for start in range(0, len(names), batch):
        content = hashlib.sha256("\n".join([key, *hashes[start : start + batch]]).encode()).hexdigest()
        chunks.append((start, parts / f"{start:09d}-{content[:24]}.npy"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a CPU their number changes the last bit; to use all cores, start more ranks [ours]
    for start, path in progress(chunks[world.rank :: world.size], "embed"):
        if not path.exists():
            rows = embed(encoder, images, names[start : start + batch], world.device, workers)
            write_array(path, rows.shape, [rows])
    torch.set_num_threads(threads)
    barrier()
    if world.rank == 0:
        width = np.load(chunks[0][1], mmap_mode="r").shape[1]
        write_array(array, (len(names), width), (np.load(path) for _, path in chunks))
        write_json(listing, names)
        write_json(meta, {"fingerprint": fingerprint, "sha256": file_sha256(array)})
        shutil.rmtree(parts)
    barrier()
    return True


def is_current(array: Path, listing: Path, meta: Path, fingerprint: str, names: list[str]) -> bool:
    if not (array.exists() and listing.exists() and meta.exists()):
        return False
    wanted = read_json(meta)
    if wanted["fingerprint"] != fingerprint or read_json(listing) != names:
        return False
    return file_sha256(array) == wanted["sha256"]


def write_array(path: Path, shape: tuple[int, ...], blocks) -> None:
    """fp32 .npy of rows from blocks, without holding them all; a kill leaves the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for rows in blocks:
            file.write(np.ascontiguousarray(rows, "<f4").data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_embeddings(out: str) -> Tensor:
    """(N, D) fp32, memory-mapped."""
    return torch.from_numpy(np.load(f"{out}/embeddings.npy", mmap_mode="c"))  # "c": torch wants writable memory


# ---- subgroups ----
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


def candidates(
    embeddings: Tensor, rows: range, top_k: int, max_score: float, min_gap: float, group: int, block: int
) -> tuple[list, Counter]:
    """[(members, scores)] of the anchors `rows` that find enough of them, and why the others do not. Scores are float64
    cosines with the pictures most similar to the anchor, itself left out."""
    whole = len(rows) == len(embeddings)  # the search then computes each pair once, not twice
    queries = embeddings if whole else embeddings[rows.start : rows.stop]
    itself = torch.arange(rows.start, rows.stop, device=embeddings.device)
    top_k = max(1, min(top_k, len(embeddings) - 1))
    nearest = exact_topk(queries, embeddings, top_k, itself, block, lambda tiles: progress(tiles, "search"))
    found, discarded = [], Counter()
    for anchor, scores, indices in zip(rows, *(part.cpu().numpy() for part in nearest), strict=True):
        chosen = choose(scores, max_score, min_gap, group - 1)
        if len(chosen) == group - 1:
            found.append(([anchor, *indices[chosen].tolist()], [1.0, *scores[chosen].tolist()]))
        elif len(embeddings) > 1 and (scores > max_score).all():
            discarded["all neighbours are near duplicates"] += 1
        else:
            discarded["too few neighbours left"] += 1
    return found, discarded


def drop_overlapping(found: list, max_shared: int) -> list:
    """In the order of anchors, the subgroups that share at most `max_shared` members with each one accepted before."""
    accepted, groups_of = [], {}
    for members, scores in found:
        shared = Counter(group for member in members for group in groups_of.get(member, ()))
        if max(shared.values(), default=0) <= max_shared:
            for member in members:
                groups_of.setdefault(member, []).append(len(accepted))
            accepted.append((members, scores))
    return accepted


def random_groups(embeddings: Tensor, count: int, group: int, seed: int) -> list:
    """[(members, scores with the first)] of `count` subgroups of random pictures."""
    groups = []
    for i in range(count):
        members = seeded_rng("random group", seed, i).choice(len(embeddings), group, replace=False).tolist()
        rows = embeddings[torch.tensor(members, device=embeddings.device)]
        groups.append((members, exact_dot(rows[:1].expand_as(rows), rows).tolist()))
    return groups


# ---- pairs ----
def template(group: int) -> list[tuple[int, int]]:
    """CIRR's pairs of ranks within a subgroup: a ring, then the anchor with all but its neighbours in it; 9 for 6."""
    ring = [(i, (i + 1) % group) for i in range(group)]
    return ring + [(0, i) for i in range(2, group - 1)]


def pairs_of(embeddings: Tensor, members: list[int], places: list[tuple[int, int]]) -> list[tuple[int, int, float]]:
    pairs = [(members[a], members[b]) for a, b in places]
    rows = embeddings[torch.tensor(pairs, device=embeddings.device)]  # (9, 2, D)
    return [(a, b, score) for (a, b), score in zip(pairs, exact_dot(rows[:, 0], rows[:, 1]).tolist(), strict=True)]


# ---- outputs ----
def draw(subgroups: list[dict], images: ImageStore, stats: dict, out: str, show: int, seed: int) -> None:
    """subgroups.png and subgroups.html: some subgroups, one a row, the anchor first."""
    count = min(show, len(subgroups))
    picked = sorted(seeded_rng("contact sheet", seed).permutation(len(subgroups))[:count].tolist())
    rows = []
    for subgroup in (subgroups[i] for i in picked):
        labels = ["anchor", *(f"{score:.3f}" for score in subgroup["scores"][1:])]
        named = zip(labels, subgroup["members"], strict=True)
        rows.append([(images.path(name), f"{label} {name}") for label, name in named])
    title = f"{count} of {len(subgroups):,} subgroups: the anchor, then its members with their cosine"
    pages.contact_sheet(rows, f"{out}/subgroups.png", title=title)
    counts = pages.table([[name, str(value)] for name, value in stats["counts"].items()], ["", "count"])
    strips = [(f"Subgroup {subgroups[i]['id']}", pages.strip(row)) for i, row in zip(picked, rows, strict=True)]
    write_text(f"{out}/subgroups.html", pages.page("Mined subgroups", [("Counts", counts), title, *strips]))


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if GROUP < 3 or TOP_K < GROUP - 1:
        raise UserError(f"--group {GROUP} --top_k {TOP_K}: wanted a group of 3 or more, top_k of group - 1")
    at_least(globals(), BATCH=1, BLOCK=1)
    world = init_world(DEVICE)
    names, images = list_images(IMAGES), ImageStore(IMAGES, own=True)
    if CHECK:
        report, ok = check_report(names, images, CHECK_DECODE, WORKERS)
        if not ok:
            raise UserError(report)
        say(report)
        return
    if Path(OUT).resolve().is_relative_to(Path(IMAGES).resolve()):
        raise UserError(f"--out {OUT} is in --images: its contact sheet would be mined next time; move --out")
    lock_folder(OUT)
    log = Log(OUT)

    # the gallery G', without what cannot be read and without the pictures of the benchmark
    faults, total = faults_of(names, images, WORKERS), len(names)
    names = leave_out(names, faults, f"{OUT}/unreadable.txt")
    if not names:
        raise UserError(f"none of the {total:,} pictures of {IMAGES} can be read: see {OUT}/unreadable.txt")
    stems, others = excluded(EXCLUDE)
    hashes = hash_files([images.path(name) for name in names], WORKERS, world)
    kept, by_name, by_content = drop_excluded(names, hashes, stems, set(hash_files(others, WORKERS, world)))
    counts = {"images": total, "unreadable": len(faults)}
    counts |= {"excluded by name": len(by_name), "excluded by content": len(by_content)}
    for reason, left_out in (("name", by_name), ("content", by_content)):
        if left_out:
            say(f"excluded by {reason}: {len(left_out):,} pictures, first {', '.join(left_out[:3])}")
    if not kept:
        raise UserError(f"all {len(names):,} pictures of {IMAGES} are excluded; check --exclude")
    names, hashes = [names[i] for i in kept], [hashes[i] for i in kept]

    # embeddings, then subgroups: each rank searches for its anchors, one decides on overlap
    encoder = Encoder(ENCODER, world.device, pick_dtype(DTYPE, world.device))
    fresh = embed_gallery(encoder, images, names, hashes, OUT, BATCH, WORKERS, world)
    say(f"embeddings of {len(names):,} pictures: {'written' if fresh else 'reused'} ({OUT}/embeddings.npy)")
    embeddings = load_embeddings(OUT).to(world.device)
    anchors = range(len(names) * world.rank // world.size, len(names) * (world.rank + 1) // world.size)
    searched = candidates(embeddings, anchors, TOP_K, MAX_SCORE, MIN_GAP, GROUP, BLOCK)
    searched = gather_objects(searched)  # in rank order, hence in anchor order
    if world.rank != 0:
        return
    found = [group for groups, _ in searched for group in groups]
    accepted = drop_overlapping(found, MAX_SHARED)
    if not GROUPING:
        accepted = random_groups(embeddings, len(accepted), GROUP, SEED)

    subgroups, pairs = [], []
    for id, (members, scores) in enumerate(accepted):
        scores = [round(score, 6) for score in scores]
        subgroups.append({"id": id, "members": [names[m] for m in members], "scores": scores})
        for a, b, score in pairs_of(embeddings, members, template(GROUP)):
            pair = {"reference": names[a], "target": names[b], "score": round(score, 6)}
            pairs.append({"id": len(pairs), "subgroup": id, **pair})
    discarded = sum((reasons for _, reasons in searched), Counter())
    discarded[f"more than {MAX_SHARED} members shared with an accepted subgroup"] = len(found) - len(accepted)
    counts |= {"anchors": len(names)} | {f"discarded: {reason}": n for reason, n in sorted(discarded.items())}
    counts |= {"subgroups": len(subgroups), "pairs": len(pairs)}
    rule = {"top_k": TOP_K, "max_score": MAX_SCORE, "min_gap": MIN_GAP, "group": GROUP, "max_shared": MAX_SHARED}
    rule |= {"grouping": GROUPING}
    stats = {"counts": counts, "rule": rule, "encoder": ENCODER, "exclude": list(EXCLUDE)}

    write_jsonl(f"{OUT}/subgroups.jsonl", subgroups)
    write_jsonl(f"{OUT}/pairs.jsonl", pairs)
    write_json(f"{OUT}/stats.json", stats, indent=2)
    draw(subgroups, images, stats, OUT, SHOW, SEED)
    log.write(**counts)
    for name, value in counts.items():
        say(f"{value:>10,} {name}")
    if not subgroups:
        say(
            f"no subgroup: one takes an anchor and {GROUP - 1} pictures, none above {MAX_SCORE} similar to it and each "
            f"{MIN_GAP} below the last; see the counts (--max_score, --min_gap, another encoder or more pictures)"
        )


if __name__ == "__main__":
    override(globals())
    run(main)
