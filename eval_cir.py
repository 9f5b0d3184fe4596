"""Stage 6, evaluation [S4]: ranks a gallery for every query of CIRR, FashionIQ or CIRCO and reports recall or mAP.

    python eval_cir.py --checkpoint out/cir --dataset cirr --root data/cirr --out out/eval
    torchrun --nproc_per_node 8 eval_cir.py --checkpoint out/cir --dataset fashioniq --root data/fashioniq
    python eval_cir.py --checkpoint out/cir --split test                   # the two files for CIRR's server
    python eval_cir.py --score ranks.json subset.json --split val --root data/cirr          # any system's files, judged
    python eval_cir.py --checkpoint out/cir --reference a.jpg --text "with long sleeves" --gallery my_pictures

Reads a CIR checkpoint of train_cir.py (or a plain --baseline), the annotations under ROOT and every image that they
name: no number comes from fewer queries or gallery images than the protocol says. Writes OUT/metrics.json,
OUT/found.jsonl (each query, the rank of the right image, the first ten) and OUT/index.html (the hardest queries with
what was found); where targets are hidden, the server's files instead. `--check` only counts queries, gallery and
images; `--score` needs neither a model nor images.

Rank of a target = 1 + the gallery images with a higher score + those with an equal score earlier in the gallery's own
order. Scores are cosines in float32 (TF32 off). A target outside the gallery is never found.
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import dataclasses
import json
import os

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import pages
from common.annotations import (
    FASHIONIQ_CATEGORIES,
    Benchmark,
    all_without_missing,
    check_benchmarks,
    read_benchmarks,
    read_submission,
    read_triplets,
    require_official,
)
from common.console import UserError, run, say
from common.files import file_sha256, lock_folder, read_json, tensors_sha256, write_json, write_jsonl, write_text
from common.flags import at_least, override
from common.images import ImageStore, leave_out, list_images, unreadable
from common.ranks import barrier, init_world, pick_dtype
from common.retrieval import (
    CIRR_KS,
    NEVER,
    SUBSET_KS,
    Indices,
    best,
    embed,
    encode,
    index,
    measure,
    protocol_of,
    recall,
    recalls,
    require_images,
    rerank,
    score_blocks,
    shortlist,
)

# ---- what is evaluated ----
CHECKPOINT = ""  # folder written by train_cir.py
BASELINE = ""  # no checkpoint: what plain BACKBONE finds by "image", "text", or the "sum" of both features
BACKBONE = ""  # of BASELINE: folder or hub id of a CLIP or BLIP ITM model; empty: openai/clip-vit-large-patch14
DATASET = "cirr"  # "cirr", "fashioniq" or "circo"
ROOT = ""  # folder with captions/ and image_splits/ (circo: annotations/)
IMAGES = ""  # folder of the images; empty: the usual places in and beside ROOT
SPLIT = "val"  # val; CIRR's test1 (or test) and CIRCO's test: the server's files
CATEGORY = "all"  # FashionIQ: dress, shirt, toptee, or all three and their mean
MISSING = 0.0  # largest share of pictures that may be missing; counted, in OUT/missing.txt, every number marked
JOIN = "forward"  # FashionIQ's captions: "forward" c1 and c2, as CLIP4Cir at test; "reverse" c2 and c1
OFFICIAL = True  # false: other data in the same layout, whose counts are not the published ones

# ---- protocol ----
CIRR_PROTOCOL = "split"  # gallery: "split" every image of the split; "references" only the queries' (VDG release)
FASHIONIQ_PROTOCOL = "original"  # gallery: "original" the split file; "val" candidates and targets of the captions
KEEP_REFERENCE = True  # FashionIQ, CIRCO: the query's own reference stays in the gallery (CLIP4Cir); CoVR masks it
REVERSED = False  # the other way round: target + [BACKWARD] + text -> reference [Bi, Tables S1 and S2]
REVERSE_TEXT = ""  # with REVERSED: pseudo.jsonl whose reverse_delta is the text (gen_deltas.py --triplets --reverse)
RERANK = 0  # blip_tdm: the first K are ordered anew with the tdm head (50 is usual); 0 = off
RERANK_WEIGHT = 1.0  # score of the re-ranking: cosine / tau + this * log p(matched) [ours]

# ---- one query over a folder of pictures ----
REFERENCE = ""  # picture to start from
TEXT = ""  # what to change
GALLERY = ""  # folder searched; its features are kept beside it, by content and checkpoint
TOP = 10  # pictures named and shown

# ---- running ----
BATCH = 64  # images, and queries, per forward pass
WORKERS = 4  # threads that decode images
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the model: "auto" is bf16 on cuda and fp32 on CPU; ranking is always fp32
SEED = 0  # nothing here is random; kept so that every stage takes it

# ---- output ----
OUT = "out/eval"  # folder for metrics.json, index.html and the server's files
SHOW = 48  # queries on the result page: half the hardest misses, half spread evenly over the rest; 0 = no page
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # count queries, gallery and images, then stop; status 1 if an image is missing
SCORE = ()  # one or both files in the format of CIRR's server, scored against a labelled split


# ---- ranking ----


# ---- a benchmark as indices ----


def turned(benchmark: Benchmark, text_file: str) -> Benchmark:
    """Reversed queries: target + text -> reference; with a file, its reverse_delta of each pair is the text."""
    if benchmark.dataset == "circo" or any(query.target is None for query in benchmark.queries):
        raise UserError(f"--reversed: {benchmark.title} has no single known target; take CIRR or FashionIQ val")
    triplets = read_triplets(text_file) if text_file else []
    texts = {(t.reference, t.target): t.extra.get("reverse_delta") for t in triplets}
    queries = []
    for q in benchmark.queries:
        delta = texts.get((q.reference, q.target)) if text_file else q.delta
        if delta is None:
            raise UserError(f"{text_file}: no reverse_delta for {q.reference} -> {q.target}; make it for all")
        queries.append(dataclasses.replace(q, reference=q.target, target=q.reference, delta=delta))
    return dataclasses.replace(benchmark, queries=tuple(queries))


# ---- embedding and measuring ----


class Baseline(torch.nn.Module):
    """A plain CLIP or BLIP model that answers with the features of the image, of the text, or their sum, normalised."""

    def __init__(self, model: torch.nn.Module, what: str):
        super().__init__()
        self.model, self.what, self.preprocess, self.image = model, what, model.preprocess, model.image

    def compose(self, tokens: torch.Tensor, texts: list[str], backward: bool = False) -> torch.Tensor:
        image, text = self.model.target(tokens), F.normalize(self.model.text(texts, tokens.device).float(), dim=1)
        return {"image": image, "text": text, "sum": F.normalize(image + text, dim=1)}[self.what]


# ---- the server's files ----


def write_submission(
    folder: str, benchmark: Benchmark, queries: torch.Tensor, images: torch.Tensor, at: Indices, first=None
) -> None:
    """CIRR: OUT/recall.json (50 names a query) and OUT/recall_subset.json (3 names), checked after writing. CIRCO:
    OUT/circo.json (50 image ids a query)."""
    full, subset = ({"version": "rc2", "metric": metric} for metric in ("recall", "recall_subset"))
    ids = {}
    for rows, scores in score_blocks(queries, images, first):
        top = best(scores[:, : at.gallery], 50, None if at.excluded is None else at.excluded[rows].to(scores.device))
        within = top
        if at.others is not None:
            others = at.others[rows].to(scores.device)
            within = others.gather(1, best(scores.gather(1, others), 3))
        for query, wide, narrow in zip(benchmark.queries[rows], top.tolist(), within.tolist(), strict=True):
            full[str(query.id)] = [at.names[i] for i in wide if at.names[i] != query.reference]
            subset[str(query.id)] = [at.names[i] for i in narrow]
            if benchmark.dataset == "circo":
                ids[str(query.id)] = [int(at.names[i]) for i in wide]
    for name, record in ({"circo": ids} if ids else {"recall": full, "recall_subset": subset}).items():
        path = os.path.join(folder, name + ".json")
        write_text(path, json.dumps(record, separators=(",", ":")))  # indented, recall.json would pass 5 MB
        if not ids:
            read_submission(path, benchmark, name)
        say(f"wrote {path} ({os.path.getsize(path):,} bytes)")
    where = "https://circo.micc.unifi.it" if ids else "https://cirr.cecs.anu.edu.au"
    say(f"{benchmark.title} has no labels: the server at {where} answers the files with the numbers")


def score_submission(path: str, benchmark: Benchmark, metric: str) -> dict[str, float]:
    """Recall in percent of a file in the server's format against a labelled split."""
    if any(query.target is None for query in benchmark.queries):
        raise UserError(f"{benchmark.title} has no labels: only the server can score it")
    lists = read_submission(path, benchmark, metric)
    ranked = [(lists[str(query.id)], query.target) for query in benchmark.queries]
    ranks = torch.tensor([names.index(target) + 1 if target in names else NEVER for names, target in ranked])
    letter, ks = ("R", CIRR_KS) if metric == "recall" else ("Rs", SUBSET_KS)
    return {f"{letter}@{k}": recall(ranks, k) for k in ks}


def score(benchmark: Benchmark, files: tuple[str, ...], says: str) -> None:
    """Prints the recalls of one or both files, and CIRR's average when both are given."""
    if benchmark.dataset != "cirr":
        raise UserError("--score takes CIRR's server files; found --dataset " + benchmark.dataset)
    numbers, given = {}, {}
    for path in files:
        record = read_json(path)
        subset = isinstance(record, dict) and record.get("metric") == "recall_subset"
        metric = "recall_subset" if subset else "recall"
        if metric in given:
            raise UserError(f"--score: {given[metric]} and {path} both hold {metric}; give one file of each")
        given[metric] = path
        numbers |= score_submission(path, benchmark, metric)
    if {"R@5", "Rs@1"} <= numbers.keys():
        numbers["Avg"] = (numbers["R@5"] + numbers["Rs@1"]) / 2
    row = [benchmark.title, *numbers.values(), len(benchmark.queries), len(benchmark.gallery)]
    say(says + "\n" + pages.text_table([row], ["", *numbers, "queries", "gallery"]))


# ---- one query over a folder of pictures ----


def folder_features(
    model: torch.nn.Module, folder: str, names: list[str], key: str, how: tuple
) -> tuple[torch.Tensor, list[str]]:
    """-> features (M, D) of the pictures and the sha256 of each; kept in FOLDER.KEY.safetensors, by content.

    A picture that was added or changed is encoded, the others are read; key: of the checkpoint and the dtype."""
    store = ImageStore(folder, own=True)
    hashes = [file_sha256(store.path(name)) for name in names]
    file, kept = f"{os.path.abspath(folder)}.{key}.safetensors", {}
    if os.path.exists(file):
        try:
            cache = load_file(file)
            kept = dict(zip((bytes(row).hex() for row in cache["sha256"].numpy()), cache["features"], strict=True))
        except (SafetensorError, KeyError):
            say(f"{file} is damaged: its features are computed again")
    todo = {digest: name for digest, name in zip(hashes, names, strict=True) if digest not in kept}
    say(f"{folder}: {len(names):,} pictures, {len(todo):,} to encode")
    if todo:
        digests = list(todo)
        try:
            for rows, _, targets in encode(model, store, list(todo.values()), *how, "encoding the gallery"):
                kept |= zip((digests[i] for i in rows), targets.float().cpu(), strict=True)
        finally:  # an interrupted run keeps what it has
            if kept:
                content = torch.tensor([list(bytes.fromhex(digest)) for digest in kept], dtype=torch.uint8)
                save_file({"features": torch.stack(list(kept.values())), "sha256": content}, file + ".tmp")
                os.replace(file + ".tmp", file)
    return torch.stack([kept[digest] for digest in hashes]), hashes


@torch.no_grad()
def search(model, reference: str, text: str, folder: str, key: str, top: int, k: int, tau, weight, how, out: str):
    """Ranks the pictures of a folder for one query: prints names, writes OUT/query.png and OUT/query.html."""
    names, (_, device, dtype, _) = list_images(folder), how
    names = leave_out(names, unreadable(names, ImageStore(folder, own=True), how[3]), f"{out}/unreadable.txt")
    if not names:
        raise UserError(f"--gallery {folder}: no picture in it can be read, see {out}/unreadable.txt")
    place, name = os.path.split(os.path.abspath(reference))  # first: a wrong name shows before the gallery is encoded
    ((_, tokens, _),) = encode(model, ImageStore(place, own=True), [name], 1, device, dtype, 0, "reference")
    features, hashes = folder_features(model, folder, names, f"{key[:16]}-{str(dtype).removeprefix('torch.')}", how)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        c = F.normalize(model.eval().compose(tokens, [text]).float(), dim=1)
    ((_, scores),) = score_blocks(c.cpu(), features)  # (1, M)
    own = file_sha256(reference)
    scores[0, [i for i, digest in enumerate(hashes) if digest == own]] = -torch.inf  # the reference itself
    order = best(scores, min(max(top, k), int((scores > -torch.inf).sum())))
    if k:
        cosines = scores.gather(1, order[:, :k])
        first = rerank(model, ImageStore(folder, own=True), names, [text], cosines, order[:, :k], tau, weight, how)
        order = torch.cat([first, order[:, k:]], dim=1)
    found = [(os.path.join(folder, names[j]), f"{n} · {names[j]}") for n, j in enumerate(order[0, :top].tolist(), 1)]
    for n, j in enumerate(order[0, :top].tolist(), 1):
        say(f"{n:3d}  {scores[0, j]:.4f}  {names[j]}")
    pages.write_answer(reference, text, found, out, f"In {folder}")
    say(f"wrote {out}/query.png and query.html")


# ---- what is shown ----


def found_of(benchmark: Benchmark, at: Indices, top, ranks, subset) -> list[dict]:
    """Lines of OUT/found.jsonl: what was asked, the right image's rank (null: not in the gallery), the first ten."""
    lines = []
    for i, query in enumerate(benchmark.queries):
        line = {"id": query.id, "reference": query.reference, "delta": query.delta, "target": query.target}
        line["rank"] = None if ranks[i] == NEVER else int(ranks[i])
        line |= {} if subset is None else {"subset_rank": int(subset[i])}
        lines.append(line | {"top": [at.names[j] for j in top[i].tolist()]})
    return lines


def panels(benchmark: Benchmark, at: Indices, top, ranks, subset, show: int) -> list[tuple]:
    """Two sections of retrieval panels, hardest first: the hardest queries, then a spread over the rest."""
    order = sorted(range(len(ranks)), key=lambda i: -int(ranks[i]))
    hard, rest = order[: show // 2], order[show // 2 :]
    count = min(show - show // 2, len(rest))
    spread = [rest[i * len(rest) // count] for i in range(count)]
    sections = []
    for heading, chosen in (("Hardest misses", hard), ("Spread over the rest, hardest first", spread)):
        parts = []
        for i in chosen:
            query = benchmark.queries[i]
            columns = top[i].tolist()
            place = "not in the gallery" if ranks[i] == NEVER else f"at rank {int(ranks[i]):,} of {at.gallery:,}"
            within = "" if subset is None else f", {int(subset[i])} of 5 in its subset"
            shown = [(benchmark.images.path(at.names[j]), f"{n} · {at.names[j]}") for n, j in enumerate(columns, 1)]
            answer = None
            if int(at.target[i]) >= 0:
                answer = (benchmark.images.path(query.target), f"right · {query.target}")
            parts.append(
                pages.panel(
                    (benchmark.images.path(query.reference), query.reference),
                    query.delta,
                    shown,
                    right=columns.index(int(at.target[i])) if int(at.target[i]) in columns else None,
                    note=f"the right one is {place}{within}",
                    answer=answer,
                )
            )
        if parts:
            sections.append((f"{benchmark.title}: {heading}", *parts))
    return sections


def report(results: list[dict], found: list[dict], sections: list, dataset, split, says, checkpoint, digest, out):
    """Prints the table with its protocol; writes OUT/metrics.json, OUT/found.jsonl and OUT/index.html."""
    metrics = {key: sum(r["metrics"][key] for r in results) / len(results) for key in results[0]["metrics"]}
    if dataset == "fashioniq":
        metrics["Avg"] = (metrics["R@10"] + metrics["R@50"]) / 2
    headers = [dataset, *metrics, "queries", "gallery"]
    rows = [
        [r["category"] or split, *(r["metrics"].get(key, "") for key in metrics), r["queries"], r["gallery"]]
        for r in results
    ]
    if dataset == "fashioniq":
        rows.append(["mean", *metrics.values(), sum(r["queries"] for r in results), ""])
    say(f"{dataset} {split}, {says}\n{pages.text_table(rows, headers)}\n{checkpoint}: sha256 {digest}")
    record = {"dataset": dataset, "split": split, "protocol": says, "checkpoint": checkpoint, "sha256": digest}
    write_json(os.path.join(out, "metrics.json"), record | {"metrics": metrics, "parts": results}, indent=1)
    write_jsonl(os.path.join(out, "found.jsonl"), found)
    if sections:
        top = (f"{dataset} {split}", pages.table(rows, headers), says, f"Checkpoint {checkpoint}, sha256 {digest}")
        write_text(os.path.join(out, "index.html"), pages.page("What the model found", [top, *sections]))


# ---- main ----


def load(checkpoint: str, baseline: str, backbone: str, match: bool, device) -> tuple[torch.nn.Module, str, str, float]:
    """The model, what it is called, the sha256 of its weights and its temperature; match: it must have a tdm head."""
    import train_cir  # here: train_cir imports this file for its ranking

    if not baseline:
        model, config = train_cir.load_cir(checkpoint, device), os.path.join(checkpoint, "config.json")
        if match and not hasattr(model, "match"):
            raise UserError("--rerank wants a checkpoint of --model blip_tdm: only it has a tdm head")
        tau = read_json(config).get("tau", 1.0) if os.path.exists(config) else 1.0
        return model, checkpoint, file_sha256(os.path.join(checkpoint, "model.safetensors")), tau
    if match:
        raise UserError("--rerank wants a checkpoint: a --baseline has no trained tdm head")
    backbone = backbone or train_cir.HUB["sum"]
    kind = "blip_tdm" if train_cir.model_type(backbone) == "blip" else "sum"
    model = train_cir.build_cir(kind, backbone).eval().to(device)
    digest = tensors_sha256(model.named_parameters(), repr(model.preprocess))
    return Baseline(model, baseline), f"plain {backbone}, {baseline}", digest, 1.0


def main() -> None:
    world = init_world(DEVICE)
    for flag, value, allowed in (
        ("dataset", DATASET, ("cirr", "fashioniq", "circo")),
        ("category", CATEGORY, ("all", *FASHIONIQ_CATEGORIES)),
        ("cirr_protocol", CIRR_PROTOCOL, ("split", "references")),
        ("fashioniq_protocol", FASHIONIQ_PROTOCOL, ("original", "val")),
        ("baseline", BASELINE, ("", "image", "text", "sum")),
    ):
        if value not in allowed:
            raise UserError(f"--{flag} is {value!r}; wanted one of {', '.join(filter(None, allowed))}")
    at_least(globals(), BATCH=1, WORKERS=0, RERANK=0, TOP=1, SHOW=0, MISSING=0)
    dtype = pick_dtype(DTYPE, world.device)
    how = (BATCH, world.device, dtype, WORKERS)
    asks = [bool(REFERENCE), bool(TEXT.strip()), bool(GALLERY)]
    if any(asks) and (not all(asks) or world.size > 1):
        raise UserError("one query wants --reference, --text and --gallery together, and one process")
    if REVERSE_TEXT and not REVERSED:
        raise UserError("--reverse_text is the text of reversed queries: add --reversed")
    if REVERSED and (SCORE or (RERANK and not REVERSE_TEXT)):
        raise UserError("--reversed: --score knows forward queries only, --rerank texts that lead back only")
    if (CHECKPOINT and BASELINE) or (BACKBONE and not BASELINE):
        raise UserError("--baseline with its --backbone, or --checkpoint, which knows its own backbone")
    if not CHECKPOINT and not BASELINE and not SCORE and not CHECK:
        raise UserError("--checkpoint is empty; name a folder written by train_cir.py, or take a --baseline")
    if REFERENCE:
        lock_folder(OUT)
        model, _, digest, tau = load(CHECKPOINT, BASELINE, BACKBONE, RERANK > 0, world.device)
        return search(model, REFERENCE, TEXT, GALLERY, digest, TOP, RERANK, tau, RERANK_WEIGHT, how, OUT)

    # ---- the protocol, and every image that it needs, before a model loads
    protocol = {"cirr": CIRR_PROTOCOL, "fashioniq": FASHIONIQ_PROTOCOL, "circo": "unlabeled2017"}[DATASET]
    ways = [("not the official data", not OFFICIAL), ("reversed queries", REVERSED)]
    ways += [("the second caption first", DATASET == "fashioniq" and JOIN == "reverse")]
    ways += [(f"texts of {REVERSE_TEXT}", REVERSE_TEXT), (f"first {RERANK} re-ranked by the tdm head", RERANK)]
    says = protocol_of(DATASET, protocol, KEEP_REFERENCE, tuple(text for text, on in ways if on))
    benchmarks = read_benchmarks(DATASET, ROOT, SPLIT, CATEGORY, IMAGES, protocol, JOIN)
    listing = f"{OUT}/missing.txt"
    complaint = check_benchmarks(benchmarks, MISSING, CHECK_DECODE, WORKERS, listing) if CHECK else ""
    if OFFICIAL:
        for benchmark in benchmarks:
            require_official(benchmark, protocol)
    if complaint:
        raise UserError(complaint)
    if CHECK:
        return
    if SCORE:
        return score(benchmarks[0], SCORE, says)
    benchmarks, note = all_without_missing(benchmarks, MISSING, listing)
    says = "; ".join(filter(None, (says, note)))
    if REVERSED:
        benchmarks = [turned(benchmark, REVERSE_TEXT) for benchmark in benchmarks]
    indices = [index(benchmark, KEEP_REFERENCE) for benchmark in benchmarks]
    for benchmark, at in zip(benchmarks, indices, strict=True):
        require_images(benchmark, at.names)
        if at.target is None and DATASET == "fashioniq":
            raise UserError(f"{benchmark.title} has no labels; use --split val")
    lock_folder(OUT)

    # ---- embed, rank, report
    model, name, digest, tau = load(CHECKPOINT, BASELINE, BACKBONE, RERANK > 0, world.device)
    results, found, sections = [], [], []
    for benchmark, at in zip(benchmarks, indices, strict=True):
        # with a text that leads back, the query is a forward one
        queries, images = embed(model, benchmark, at, *how, backward=REVERSED and not REVERSE_TEXT)
        first = None
        if RERANK:
            top, cosines = shortlist(queries, images, at, RERANK)
            deltas = [query.delta for query in benchmark.queries]
            first = rerank(model, benchmark.images, at.names, deltas, cosines, top, tau, RERANK_WEIGHT, how)
        if world.rank == 0 and at.target is None:
            write_submission(OUT, benchmark, queries, images, at, first)
        elif world.rank == 0:
            ranks, subset, truths = measure(queries, images, at, first)
            counts = {"queries": len(ranks), "gallery": at.gallery}
            results.append({"category": benchmark.category, **counts, "metrics": recalls(ranks, subset, truths)})
            shown = shortlist(queries, images, at, 10, first)[0]
            found += found_of(benchmark, at, shown, ranks, subset)
            sections += panels(benchmark, at, shown, ranks, subset, SHOW)
    if results:  # rank 0, labelled
        report(results, found, sections, DATASET, SPLIT, says, name, digest, OUT)
    barrier()


if __name__ == "__main__":
    override(globals())
    run(main)
