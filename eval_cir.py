"""Stage 6, evaluation [S4]: ranks a gallery for every query of CIRR, FashionIQ, CIRCO, i-CIR; reports recall or mAP.

    python eval_cir.py --checkpoint out/cir --dataset cirr --root data/cirr --out out/eval
    torchrun --nproc_per_node 8 eval_cir.py --checkpoint out/cir --dataset fashioniq --root data/fashioniq
    python eval_cir.py --checkpoint out/cir --split test                   # the two files for CIRR's server
    python eval_cir.py --score ranks.json subset.json --split val --root data/cirr          # any system's files, judged
    python eval_cir.py --checkpoint out/cir --audit true --out out/audit   # what half of the question answers
    python eval_cir.py --checkpoint out/cir --reference a.jpg --text "with long sleeves" --gallery my_pictures
    python eval_cir.py --checkpoint out/cir --filter out/deltas --images aux --out out/kept   # pseudo triplets it finds

Reads a CIR checkpoint of train_cir.py (or a plain --baseline), the annotations under ROOT and every image that they
name: no number comes from fewer queries or gallery images than the protocol says. Writes OUT/metrics.json,
OUT/found.jsonl (each query, the rank of the right image, the first TOP) and OUT/index.html (the hardest queries with
what was found); where targets are hidden, the server's files and OUT/submission.json, which names their model.
`--check` only counts queries, gallery and images; `--score` needs neither a model nor images. `--filter` writes
OUT/pseudo.jsonl, OUT/cirr/ and OUT/report.json.

Rank of a target = 1 + the gallery images with a higher score + those with an equal score earlier in the gallery's own
order. Scores are cosines in float32 (TF32 off). A target outside the gallery is never found.
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from common import pages
from common.annotations import (
    FASHIONIQ_CATEGORIES,
    Benchmark,
    all_without_missing,
    check_benchmarks,
    note_of_targets,
    own_alone,
    read_benchmarks,
    read_own,
    require_official,
)
from common.audit import Audited, audit, audit_tables, ways_alone
from common.cir_model import find_again, inner, one_vector, read_settings
from common.console import UserError, run, say
from common.copies import note_of_copies
from common.encoding import Compute, encode
from common.exports import write_cirr_captions
from common.files import (
    file_sha256,
    keep_apart,
    load_tensors,
    lock_folder,
    tensors_sha256,
    write_json,
    write_jsonl,
    write_tensors,
    write_text,
)
from common.flags import at_least, one_of, override
from common.icir import icir_maps, read_icir
from common.images import ImageStore, leave_out, list_images, unreadable
from common.memory import advise
from common.pretrained import model_kind
from common.pseudo import Pseudo, read_pseudo, subgroup_ranks
from common.queries import reversed_queries, select_queries
from common.ranks import World, barrier, init_world
from common.retrieval import (
    NEVER,
    SECOND_FIRST,
    Indices,
    Ranks,
    Shortlist,
    Way,
    aspect_maps,
    best,
    best_rank,
    embed_ways,
    index,
    mean_recalls,
    measure,
    protocol_of,
    recalls,
    require_images,
    rerank,
    score_blocks,
    shortlist,
    whole_query,
)
from common.sessions import read_sessions, session_hits
from common.submission import score, write_submission
from common.trained_on import note_of_seen
from train_cir import build_cir, load_cir

# ---- what is evaluated ----
CHECKPOINT = ""  # folder written by train_cir.py
BASELINE = ""  # no checkpoint: what plain BACKBONE finds by "image", "text", or the "sum" of both features
BACKBONE = ""  # of BASELINE: folder or hub id of a CLIP or BLIP ITM model; empty: openai/clip-vit-large-patch14
# With CHECKPOINT where its CLIP or BLIP lies now; empty: where it was, or beside the checkpoint.
PAD = 0.0  # of BASELINE: black bars as train_cir.py --pad; a CHECKPOINT knows its own
DATASET = "cirr"  # "cirr", "fashioniq", "circo", "icir"; ROOT a file: "jsonl" (own triplets), "sessions" (CIRCLED's)
ROOT = ""  # folder with captions/ and image_splits/ (circo: annotations/)
IMAGES = ""  # folder of the images; empty: the usual places in and beside ROOT
SPLIT = "val"  # val; CIRR's test1 (or test) and CIRCO's test: the server's files
CATEGORY = "all"  # FashionIQ: dress, shirt, toptee, or all three and their mean
MISSING = 0.0  # largest share of pictures that may be missing; counted, in OUT/missing.txt, every number marked
JOIN = "forward"  # FashionIQ's captions: "forward" c1 and c2, as CLIP4Cir at test; "reverse" c2 and c1
KEYS = ""  # jsonl: names of a record's parts elsewhere, reference=q_img,target=t_img,delta=q_text (see read_triplets)
POOL = ""  # jsonl files of {"did", "img_path"} in which the targets of KEYS are ids (M-BEIR)
HOLD_OUT = 0.0  # jsonl: only those triplets that train_cir.py kept for evaluation with the same number; 0 = all
QUERIES = ""  # file of query ids, a JSON list or one a line: only these are measured, over the whole gallery
OFFICIAL = True  # false: other data in the same layout, whose counts are not the published ones

# ---- protocol ----
CIRR_PROTOCOL = "split"  # gallery: "split" every image of the split; "references" only the queries' (VDG release)
FASHIONIQ_PROTOCOL = "original"  # gallery: "original" the split file; "val" candidates and targets of the captions
KEEP_REFERENCE = True  # FashionIQ, CIRCO: the query's own reference stays in the gallery (CLIP4Cir); CoVR masks it
REVERSED = False  # the other way round: target + [BACKWARD] + text -> reference [Bi, Tables S1 and S2]
REVERSE_TEXT = ""  # with REVERSED: pseudo.jsonl whose reverse_delta is the text (gen_deltas.py --triplets --reverse)
RERANK = 0  # blip_tdm: the first K are ordered anew with the tdm head (50 is usual); 0 = off
RERANK_WEIGHT = 1.0  # score of the re-ranking: cosine / tau + this * log p(matched) [ours]
AUDIT = False  # also rank by image alone and by text alone, and measure over the queries that neither answers [ours]

# ---- one query over a folder of pictures ----
REFERENCE = ""  # picture to start from: a path, or a name in GALLERY
TEXT = ""  # what to change
GALLERY = ""  # folder searched, its features are kept beside it; jsonl, sessions: .txt or .json of names, "" = all
TOP = 10  # pictures named and shown; of a benchmark: named in OUT/found.jsonl, 10 at least

# ---- pseudo triplets worth keeping ----
FILTER = ""  # OUT of gen_deltas.py: keep those of its triplets whose target the checkpoint finds [ours]
FILTER_TOP = 1  # ... among the so many best of its subgroup, which has the target and not the reference [ours]

# ---- running ----
BATCH = 64  # images, and queries, per forward pass
WORKERS = 16  # processes that decode images, one a CPU of this rank at most; 0 = none but its own
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the model: "auto" is bf16 on cuda and fp32 on CPU; ranking is always fp32
SEED = 0  # nothing here is random; kept so that every stage takes it

# ---- output ----
OUT = "out/eval"  # folder for metrics.json, index.html and the server's files
SHOW = 48  # queries on the result page: half the hardest misses, half spread evenly over the rest; 0 = no page
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # count queries, gallery and images, then stop; status 1 if an image is missing
SCORE = ()  # one or both files of CIRR's server, or CIRCO's one: scored, or of a hidden split looked through

_FILES = ("jsonl", "sessions")  # data sets of which ROOT is a file and GALLERY a list of names


# ---- what is evaluated ----


class System(NamedTuple):
    """A model that answers queries."""

    model: torch.nn.Module
    name: str  # as the report calls it
    sha256: str  # of its weights


class Baseline(torch.nn.Module):
    """A plain CLIP or BLIP model that answers with the features of the image, of the text, or their sum, normalised."""

    def __init__(self, model: torch.nn.Module, what: str):
        super().__init__()
        self.model, self.what, self.preprocess, self.image = model, what, model.preprocess, model.image

    def compose(self, tokens: torch.Tensor, texts: list[str], backward: bool = False) -> torch.Tensor:
        image, text = self.model.target(tokens), F.normalize(self.model.text(texts, tokens.device).float(), dim=1)
        return {"image": image, "text": text, "sum": F.normalize(image + text, dim=1)}[self.what]


def load_baseline(backbone: str, what: str, device: torch.device, pad: float = 0.0) -> Baseline:
    kind = "blip_tdm" if backbone and model_kind(backbone, "--backbone") == "blip" else "sum"
    return Baseline(build_cir(kind, backbone, pad=pad).eval().to(device), what)


def load_system(device: torch.device) -> System:
    """The model of --checkpoint or --baseline; --rerank wants one with a trained tdm head."""
    if CHECKPOINT:
        model = load_cir(CHECKPOINT, device, BACKBONE)
        if RERANK and not hasattr(model, "match"):
            raise UserError("--rerank wants a checkpoint of --model blip_tdm: only it has a tdm head")
        if RERANK and not read_settings(CHECKPOINT).get("constants", {}).get("TDM", True):
            raise UserError("--rerank wants a trained tdm head: this checkpoint was trained with --tdm false")
        return System(model, CHECKPOINT, file_sha256(os.path.join(CHECKPOINT, "model.safetensors")))
    if RERANK:
        raise UserError("--rerank wants a checkpoint: a --baseline has no trained tdm head")
    baseline = load_baseline(BACKBONE, BASELINE, device, PAD)
    digest = tensors_sha256(baseline.model.named_parameters(), baseline.preprocess.described())
    return System(baseline, f"plain {baseline.model.source}, {BASELINE}", digest)


def halves_of(system: System, device: torch.device) -> dict[str, Way]:
    """--audit: the ways to ask with half of a query, by the frozen backbone of the system and by the system itself."""
    one_vector(system.model, "--audit")
    if isinstance(system.model, Baseline):
        return ways_alone(None, system.model.model)
    build = find_again(read_settings(CHECKPOINT), CHECKPOINT, BACKBONE)
    kind = "blip_tdm" if build["model"] == "blip_tdm" else "sum"
    plain = build_cir(kind, build["backbone"]).eval().to(device)
    return ways_alone(system.model, plain)


# ---- one query over a folder of pictures ----


class Pictures(NamedTuple):
    """A folder of pictures, embedded."""

    names: list[str]
    hashes: list[str]  # sha256 of each file
    features: torch.Tensor  # (M, d)


def embed_folder(system: System, folder: str, compute: Compute) -> Pictures:
    """The pictures of a folder; their features are kept in FOLDER.KEY.safetensors, by content, model and dtype.

    A picture that was added or changed is encoded, the others are read."""
    names, store = list_images(folder), ImageStore(folder, own=True)
    faults = unreadable(names, store, WORKERS, decode=False)
    content = {name: file_sha256(store.path(name)) for name in names if name not in faults}
    key = f"{system.sha256[:16]}-{str(compute.dtype).removeprefix('torch.')}"
    place = os.path.abspath(folder)
    if not os.access(os.path.dirname(place), os.W_OK):  # a disk of photographs that is only read
        place = os.path.join(OUT, os.path.basename(place))
    file, kept = f"{place}.{key}.safetensors", {}
    if os.path.exists(file):
        try:
            cache = load_file(file)
            kept = dict(zip((bytes(row).hex() for row in cache["sha256"].numpy()), cache["features"], strict=True))
        except (SafetensorError, KeyError):
            say(f"{file} is damaged: its features are computed again")

    # what is kept was decoded once; of the others those that cannot be are left out
    faults |= unreadable([name for name, digest in content.items() if digest not in kept], store, WORKERS)
    names = leave_out(names, faults, f"{OUT}/unreadable.txt")
    if not names:
        raise UserError(f"--gallery {folder}: no picture in it can be read, see {OUT}/unreadable.txt")
    hashes = [content[name] for name in names]
    todo = {digest: name for digest, name in zip(hashes, names, strict=True) if digest not in kept}
    say(f"{folder}: {len(names):,} pictures, {len(todo):,} to encode; kept in {file}")
    if todo:
        digests = list(todo)
        try:
            for rows, _, targets in encode(system.model, store, list(todo.values()), compute, "encoding the gallery"):
                kept |= zip((digests[i] for i in rows), targets.float().cpu(), strict=True)
        finally:  # an interrupted run keeps what it has
            if kept:
                digests = torch.tensor([list(bytes.fromhex(digest)) for digest in kept], dtype=torch.uint8)
                write_tensors(file, {"features": torch.stack(list(kept.values())), "sha256": digests})
    return Pictures(names, hashes, torch.stack([kept[digest] for digest in hashes]))


@torch.no_grad()
def answer_query(system: System, compute: Compute) -> None:
    """Ranks the pictures of GALLERY for one query: prints names, writes OUT/query.png and OUT/query.html."""
    keep_apart(OUT, GALLERY, "--out --gallery")  # it holds a contact sheet
    # the reference first: a wrong name shows before the gallery is encoded
    asked = next((p for p in (REFERENCE, os.path.join(GALLERY, REFERENCE)) if os.path.isfile(p)), REFERENCE)
    folder, name = os.path.split(os.path.abspath(asked))
    alone = compute._replace(batch=1, workers=0)
    ((_, tokens, _),) = encode(system.model, ImageStore(folder, own=True), [name], alone, "reference")
    pictures = embed_folder(system, GALLERY, compute)

    with compute.autocast():
        c = system.model.eval().compose(tokens, [TEXT])
    ((_, scores),) = score_blocks(F.normalize(c.float(), dim=1).cpu(), pictures.features)  # (1, M)
    reference = file_sha256(asked)
    scores[0, [i for i, digest in enumerate(pictures.hashes) if digest == reference]] = -torch.inf  # no answer
    order = best(scores, min(max(TOP, RERANK), int((scores > -torch.inf).sum())))
    if RERANK:
        head = Shortlist(order[:, :RERANK], scores.gather(1, order[:, :RERANK]))
        store = ImageStore(GALLERY)
        first = rerank(system.model, store, pictures.names, [TEXT], head, RERANK_WEIGHT, compute)
        order = torch.cat([first, order[:, RERANK:]], dim=1)

    found = []
    for n, j in enumerate(order[0, :TOP].tolist(), 1):
        name = pictures.names[j]
        say(f"{n:3d}  {scores[0, j]:.4f}  {name}")
        found.append((os.path.join(GALLERY, name), f"{n} · {name}"))
    pages.write_answer(asked, TEXT, found, OUT, f"In {GALLERY}")
    say(f"wrote {OUT}/query.png and query.html")


# ---- pseudo triplets worth keeping ----


def keep_found(pseudo: Pseudo, system: System, compute: Compute, world: World) -> None:
    """Writes the triplets whose target is among the FILTER_TOP best, as gen_deltas.py writes them, and report.json."""
    ranks = subgroup_ranks(system.model, pseudo.benchmark, compute)
    kept = [i for i, rank in enumerate(ranks) if rank <= FILTER_TOP]
    records, queries = pseudo.records, pseudo.benchmark.queries
    report = {"pairs": len(records), "kept": len(kept), "share_kept": round(len(kept) / max(1, len(records)), 4)}
    report |= {"filter_top": FILTER_TOP, "checkpoint": system.name, "sha256": system.sha256}
    if world.rank == 0:
        write_jsonl(os.path.join(OUT, "pseudo.jsonl"), [records[i] for i in kept])
        grouped = [records[i] | {"members": queries[i].members} for i in kept]
        write_cirr_captions(os.path.join(OUT, "cirr"), pseudo.benchmark.split, grouped, pseudo.benchmark.images)
        write_json(os.path.join(OUT, "report.json"), report, indent=2)
    say(f"wrote {OUT}/pseudo.jsonl: {len(kept):,} of {len(records):,} triplets kept ({report['share_kept']:.1%})")
    barrier()


# ---- what is shown ----


class Result(NamedTuple):
    """What one labelled benchmark gave."""

    benchmark: Benchmark
    at: Indices
    ranks: Ranks
    best: torch.Tensor  # (N,) rank of the right image, of several the best
    top: Shortlist  # (N, TOP) the first, and their scores
    alone: dict[str, torch.Tensor]  # --audit: way -> (N,) rank by half of the query; else empty


def place_of(rank: torch.Tensor) -> int | None:
    """A rank as it is written; None: the right image is not in the gallery."""
    return None if rank == NEVER else int(rank)


def found_lines(result: Result) -> list[dict]:
    """Lines of OUT/found.jsonl: what was asked, the right image's rank (null: not in the gallery), the first TOP with
    their cosines, which a re-ranking does not leave in order."""
    lines = []
    for i, query in enumerate(result.benchmark.queries):
        line = {"id": query.id, "reference": query.reference, "delta": query.delta, "target": query.target}
        line["rank"] = place_of(result.best[i])
        if result.ranks.subset is not None:
            line["subset_rank"] = int(result.ranks.subset[i])
        if result.alone:
            line["alone"] = {way: place_of(ranks[i]) for way, ranks in result.alone.items()}
        if query.truths:
            ranks = result.ranks.truths[i, : len(query.truths)]
            line |= {"targets": query.truths, "ranks": [place_of(rank) for rank in ranks]}
        line["top"] = [result.at.names[j] for j in result.top.columns[i].tolist()]
        if not RERANK:
            line["scores"] = [round(score, 4) for score in result.top.scores[i].tolist()]
        lines.append(line)
    return lines


def sections_of(result: Result, show: int) -> list[tuple]:
    """Two sections of retrieval panels, hardest first: the hardest queries, then a spread over the rest."""
    order = sorted(range(len(result.best)), key=lambda i: -int(result.best[i]))
    hard, rest = order[: show // 2], order[show // 2 :]
    count = min(show - show // 2, len(rest))
    spread = [rest[i * len(rest) // count] for i in range(count)]
    sections = []
    for heading, chosen in (("Hardest misses", hard), ("Spread over the rest, hardest first", spread)):
        if chosen:
            sections.append((f"{result.benchmark.title}: {heading}", *(panel_of(result, i) for i in chosen)))
    return sections


def panel_of(result: Result, i: int) -> pages.Html:
    """The i-th query: what was asked, the first ten, the right one."""
    images, at, query = result.benchmark.images, result.at, result.benchmark.queries[i]
    columns, target, rank = result.top.columns[i, :10].tolist(), int(at.target[i]), place_of(result.best[i])
    right = [n for n, j in enumerate(columns) if at.names[j] in (query.truths or (query.target,))]
    note = f"the right one is at rank {rank:,} of {at.gallery:,}" if rank else "the right one is not in the gallery"
    if result.ranks.subset is not None:
        note += f", {int(result.ranks.subset[i])} of 5 in its subset"
    return pages.panel(
        (images.path(query.reference), query.reference),
        query.delta,
        [(images.path(at.names[j]), f"{n} · {at.names[j]}") for n, j in enumerate(columns, 1)],
        right=right[0] if right else None,
        note=note,
        answer=(images.path(query.target), f"right · {query.target}") if target >= 0 else None,
    )


def numbers_of(result: Result) -> dict[str, float]:
    """All metrics of its protocol, in percent."""
    if DATASET == "sessions":
        return session_hits(result.benchmark, result.ranks)
    if DATASET == "icir":
        return icir_maps([result.ranks])
    return recalls(result.ranks, DATASET)


def report(results: list[Result], system: System, protocol: str) -> None:
    """Prints the table with its protocol; writes OUT/metrics.json, OUT/found.jsonl and OUT/index.html."""
    parts = []
    for result in results:
        counts = {"queries": len(result.best), "gallery": result.at.gallery}
        parts.append({"category": result.benchmark.category, **counts, "metrics": numbers_of(result)})
    metrics = mean_recalls([part["metrics"] for part in parts], DATASET)
    if DATASET == "icir":  # the mean over all queries is not that of the instances
        metrics = icir_maps([result.ranks for result in results])

    split = results[0].benchmark.split.replace("held", "held-out")  # of one's own triplets that, or "all"
    headers, rows = [DATASET, *metrics, "queries", "gallery"], []
    for part in parts:
        numbers = [part["metrics"].get(key, "") for key in metrics]
        rows.append([part["category"] or split, *numbers, part["queries"], part["gallery"]])
    if DATASET == "fashioniq":
        rows.append(["mean", *metrics.values(), sum(part["queries"] for part in parts), ""])
    if DATASET == "icir":  # 202 instances: each of them stands in metrics.json
        totals = [sum(part[name] for part in parts) for name in ("queries", "gallery")]
        rows = [[f"{len(parts):,} instances", *metrics.values(), *totals]]
    say(f"{DATASET} {split}, {protocol}\n{pages.text_table(rows, headers)}\n{system.name}: sha256 {system.sha256}")

    record = {"dataset": DATASET, "split": split, "protocol": protocol, "checkpoint": system.name}
    record |= {"sha256": system.sha256, "metrics": metrics, "parts": parts}
    tables = [(protocol, headers, rows)]
    if DATASET == "circo" and (aspects := aspect_maps(results[0].benchmark, results[0].ranks)):
        record["mAP@10 by semantic aspect"] = aspects
        tables.append(("mAP@10 by semantic aspect", [*aspects], [[*aspects.values()]]))
    if AUDIT:
        audited = [Audited(r.benchmark.category or "", r.ranks, r.alone) for r in results]
        record["audit"] = audit(audited, DATASET)
        tables += audit_tables(record["audit"], metrics)
    for title, names, lines in tables[1:]:
        say(f"{title}\n{pages.text_table(lines, names)}")
    write_json(os.path.join(OUT, "metrics.json"), record, indent=1)
    write_jsonl(os.path.join(OUT, "found.jsonl"), [line for result in results for line in found_lines(result)])
    if SHOW:
        weights = f"Checkpoint {system.name}, sha256 {system.sha256}"
        shown_each = max(1, SHOW // len(results)) if DATASET == "icir" else SHOW
        sections = [section for result in results for section in sections_of(result, shown_each)]
        shown = [part for title, names, lines in tables for part in (pages.table(lines, names), title)]
        top = (f"{DATASET} {split}", *shown, weights)
        write_text(os.path.join(OUT, "index.html"), pages.page("What the model found", [top, *sections]))
    say(f"wrote {OUT}/metrics.json, found.jsonl{' and index.html' if SHOW else ''}")


# ---- main ----


def check_flags(world: World) -> None:
    one_of(globals(), DATASET=("cirr", "fashioniq", "circo", "icir", *_FILES), CATEGORY=("all", *FASHIONIQ_CATEGORIES))
    one_of(globals(), JOIN=("forward", "reverse"))
    one_of(globals(), CIRR_PROTOCOL=("split", "references"), FASHIONIQ_PROTOCOL=("original", "val"))
    one_of(globals(), BASELINE=("", "image", "text", "sum"))
    at_least(globals(), BATCH=1, WORKERS=0, RERANK=0, TOP=1, SHOW=0, FILTER_TOP=1, MISSING=0)
    asks = [bool(REFERENCE), bool(TEXT.strip()), bool(GALLERY) and DATASET not in _FILES]
    if any(asks) and (not all(asks) or world.size > 1):
        raise UserError("one query wants --reference, --text and --gallery together, and one process")
    if REVERSE_TEXT and not REVERSED:
        raise UserError("--reverse_text is the text of reversed queries: add --reversed")
    if DATASET in ("sessions", "icir") and (AUDIT or REVERSED or SCORE or RERANK):
        raise UserError(f"--dataset {DATASET} is measured as it is: no --audit, --reversed, --rerank or --score")
    if AUDIT and (REVERSED or SCORE or FILTER or REFERENCE or BASELINE not in ("", "sum")):
        raise UserError("--audit asks forward queries of a benchmark, of a --checkpoint or of --baseline sum")
    if QUERIES and (SCORE or FILTER or REFERENCE):
        raise UserError("--queries chooses among a benchmark's queries: --score, --filter and --reference take none")
    if REVERSED and (SCORE or (RERANK and not REVERSE_TEXT)):
        raise UserError("--reversed: --score knows forward queries only, --rerank texts that lead back only")
    if FILTER and (REFERENCE or SCORE or CHECK or REVERSED or RERANK):
        raise UserError("--filter takes --filter_top, --images and a --checkpoint: it judges no benchmark and no query")
    if FILTER and os.path.realpath(FILTER) == os.path.realpath(OUT):
        raise UserError(f"--out {OUT} is --filter's folder: what is kept goes into another")
    if PAD and (CHECKPOINT or PAD < 1):
        raise UserError(f"--pad {PAD} is of a --baseline, a ratio from 1; a checkpoint pads as it was trained")
    if CHECKPOINT and BASELINE:
        raise UserError("--baseline with its --backbone, or --checkpoint, which knows its own backbone")
    if not CHECKPOINT and not BASELINE and not SCORE and not CHECK:
        raise UserError("--checkpoint is empty; name a folder written by train_cir.py, or take a --baseline")


def gallery_protocol() -> str:
    own = GALLERY or "all pictures"
    return {"cirr": CIRR_PROTOCOL, "fashioniq": FASHIONIQ_PROTOCOL, "circo": "unlabeled2017"}.get(DATASET, own)


def check_models() -> None:
    """--check: the checkpoint or the backbone that is named must be there."""
    if CHECKPOINT:
        find_again(read_settings(CHECKPOINT), CHECKPOINT, BACKBONE)
        load_tensors(CHECKPOINT, "model.safetensors")
    elif BACKBONE:
        model_kind(BACKBONE, "--backbone")


def padding() -> float:
    """--pad of the baseline or the checkpoint; 0: none. A checkpoint that is not there stops where it is loaded."""
    if CHECKPOINT and os.path.isfile(os.path.join(CHECKPOINT, "config.json")):
        return read_settings(CHECKPOINT)["build"].get("pad", 0.0)
    return PAD


def protocol_text() -> str:
    """What stands beside every number: the gallery, and all that is not as usual."""
    ratio = padding()
    unusual = {
        "not the official data": not OFFICIAL,
        "reversed queries": REVERSED,
        SECOND_FIRST: DATASET == "fashioniq" and JOIN == "reverse",
        f"texts of {REVERSE_TEXT}": REVERSE_TEXT,
        f"pictures padded to a ratio of {ratio}": ratio,
        f"first {RERANK} re-ranked by the tdm head": RERANK,
    }
    return protocol_of(DATASET, gallery_protocol(), KEEP_REFERENCE, tuple(text for text, on in unusual.items() if on))


def read_asked() -> list[Benchmark]:
    """The benchmarks, with the counts that were published, or one's own; with --check every image is looked at."""
    own_alone(DATASET, keys=KEYS, pool=POOL, hold_out=HOLD_OUT)
    if DATASET == "sessions":
        benchmarks = [read_sessions(ROOT, IMAGES or None, GALLERY)]
    elif DATASET == "icir":
        benchmarks = read_icir(ROOT, IMAGES or None, OFFICIAL)
    elif DATASET == "jsonl":
        benchmarks = [read_own(ROOT, IMAGES or None, GALLERY, HOLD_OUT, "held", KEYS, POOL)]
    else:
        benchmarks = read_benchmarks(DATASET, ROOT, SPLIT, CATEGORY, IMAGES, gallery_protocol(), JOIN)
    complaint = check_benchmarks(benchmarks, MISSING, CHECK_DECODE, WORKERS, f"{OUT}/missing.txt") if CHECK else ""
    if OFFICIAL and DATASET not in (*_FILES, "icir"):
        for benchmark in benchmarks:
            require_official(benchmark, gallery_protocol())
    if complaint:
        raise UserError(complaint)
    return benchmarks


def main() -> None:
    world = init_world(DEVICE)
    compute = Compute.on(world.device, DTYPE, BATCH, WORKERS)
    check_flags(world)

    # one query over a folder, or pseudo triplets worth keeping
    if REFERENCE:
        lock_folder(OUT)
        return answer_query(load_system(world.device), compute)
    if FILTER:
        pseudo = read_pseudo(FILTER, IMAGES)
        lock_folder(OUT)
        return keep_found(pseudo, load_system(world.device), compute, world)

    # a benchmark: its protocol, and every image that it needs, before a model loads
    benchmarks = read_asked()
    if CHECK:
        return check_models()
    if SCORE:
        return score(benchmarks[0], SCORE, protocol_text())
    benchmarks, note = all_without_missing(benchmarks, MISSING, f"{OUT}/missing.txt", WORKERS)
    chosen = ""
    if QUERIES:
        benchmarks, chosen = select_queries(benchmarks, QUERIES)
    seen = note_of_seen(CHECKPOINT, benchmarks)
    if REVERSED:
        benchmarks = [reversed_queries(benchmark, REVERSE_TEXT) for benchmark in benchmarks]
    indices = [index(benchmark, KEEP_REFERENCE) for benchmark in benchmarks]
    for benchmark, at in zip(benchmarks, indices, strict=True):
        require_images(benchmark, at.names)
        if at.target is None and DATASET == "fashioniq":
            raise UserError(f"{benchmark.title} has no labels; use --split val")
        if at.target is None and (AUDIT or QUERIES):
            raise UserError(f"{benchmark.title} has no labels: --audit and --queries want --split val")
    notes = [note, *map(note_of_copies, benchmarks), *map(note_of_targets, benchmarks), seen]
    protocol = "; ".join(filter(None, (protocol_text(), *notes, chosen)))
    lock_folder(OUT)
    system = load_system(world.device)
    inner(system.model).say_losses([q.delta for b in benchmarks for q in b.queries])
    halves = halves_of(system, world.device) if AUDIT else {}

    results = []
    for benchmark, at in zip(benchmarks, indices, strict=True):
        # embed the gallery and the queries, on all ranks; with a text that leads back, a query is a forward one
        backward = REVERSED and not REVERSE_TEXT
        ways = [whole_query(system.model, backward), *halves.values()]
        (queries, *alone), images = embed_ways(system.model, benchmark, at, compute, ways)

        # order the first K anew by the tdm head
        first = None
        if RERANK:
            top = shortlist(queries, images, at, RERANK)
            deltas = [query.delta for query in benchmark.queries]
            first = rerank(system.model, benchmark.images, at.names, deltas, top, RERANK_WEIGHT, compute)

        # rank: numbers where the targets are known, else the server's files
        if world.rank == 0 and at.target is None:
            origin = {"dataset": DATASET, "split": benchmark.split, "protocol": protocol}
            origin |= {"checkpoint": system.name, "sha256": system.sha256}
            write_submission(OUT, benchmark, queries, images, at, origin, first)
        elif world.rank == 0:
            ranks = measure(queries, images, at, first)
            shown = shortlist(queries, images, at, max(10, TOP), first)
            by_half = [best_rank(measure(half, images, at)) for half in alone]
            of_half = dict(zip(halves, by_half, strict=True))
            results.append(Result(benchmark, at, ranks, best_rank(ranks), shown, of_half))
    if results:  # on rank 0
        report(results, system, protocol)
    barrier()


if __name__ == "__main__":
    override(globals())
    run(advise(main, "a smaller --batch", planned=False))
