"""Stage 6, evaluation [S4]: ranks a gallery for every query of CIRR or FashionIQ and reports recall.

    python eval_cir.py --checkpoint out/cir --dataset cirr --root data/cirr --out out/eval
    torchrun --nproc_per_node 8 eval_cir.py --checkpoint out/cir --dataset fashioniq --root data/fashioniq

Reads a CIR checkpoint of train_cir.py, the annotations under ROOT and every image that they name: no number comes from
fewer queries or gallery images than the protocol says. Writes OUT/metrics.json and OUT/index.html (the hardest queries
with what was found); for CIRR's test1, whose targets are hidden, OUT/recall.json and OUT/recall_subset.json for the
server instead of numbers. `--check` only counts queries, gallery and images; `--score` reads files in the server's
format against a labelled split: neither needs a model.

Rank of a target = 1 + the gallery images with a higher score + those with an equal score earlier in the gallery's own
order. Scores are cosines in float32 (TF32 off). A target outside the gallery is never found.
"""

import common

common.early_help(__name__, __file__)  # answers --help before torch is imported

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F

import data
import pages

# ---- what is evaluated ----
CHECKPOINT = ""  # folder written by train_cir.py
DATASET = "cirr"  # "cirr" or "fashioniq"
ROOT = ""  # folder with captions/ and image_splits/
IMAGES = ""  # folder of the images; empty: the usual places in and beside ROOT
SPLIT = "val"  # CIRR: val, test1 (or test: the server's files); FashionIQ: val
CATEGORY = "all"  # FashionIQ: dress, shirt, toptee, or all three and their mean
OFFICIAL = True  # false: other data in the same layout, whose counts are not the published ones

# ---- protocol ----
CIRR_PROTOCOL = "split"  # gallery: "split" every image of the split; "references" only the queries' (VDG release)
FASHIONIQ_PROTOCOL = "original"  # gallery: "original" the split file; "val" candidates and targets of the captions
KEEP_REFERENCE = True  # FashionIQ: the query's own reference stays in the gallery, as in CLIP4Cir; CoVR masks it

# ---- running ----
BATCH = 64  # images, and queries, per forward pass
WORKERS = 4  # threads that decode images
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the model: "auto" is bf16 on cuda and fp32 on CPU; ranking is always fp32
SEED = 0  # nothing here is random; kept so that every stage takes it

# ---- output ----
OUT = "out/eval"  # folder for metrics.json, index.html and the server's files
SHOW = 48  # queries on the result page: half the hardest misses, half spread evenly over the rest; 0 = no page
CHECK = False  # count queries, gallery and images, then stop; status 1 if an image is missing
SCORE = ""  # recall file in the server's format, scored against a labelled CIRR split without a model
SCORE_SUBSET = ""  # recall_subset file for SCORE

CIRR_KS, SUBSET_KS, FASHIONIQ_KS = (1, 5, 10, 50), (1, 2, 3), (10, 50)
NEVER = 2**62  # rank of a target that is not in the gallery: beyond every K, however small the gallery
SERVER_LIMIT = 5 * 10**6  # bytes of one upload to CIRR's server
REFERENCES_COUNTS = {"val": (4181, 2165), "test1": (4148, 2178)}  # queries and gallery of CIRR_PROTOCOL "references"


# ---- ranking ----


def rank(scores: torch.Tensor, target: torch.Tensor, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """Ranks from 1 by counting: scores (N, M), target (N,), excluded (N,) -> (N,) int64.

    Equal scores: the earlier column counts ahead. Index -1 = none: a target of -1, or one that is excluded, is never
    found (NEVER); an excluded column does not count ahead of anything.
    """
    n, m = scores.shape
    column = torch.arange(m, device=scores.device)  # (M,)
    own = scores.gather(1, target.clamp(min=0)[:, None])  # (N, 1)
    ahead = (scores > own) | ((scores == own) & (column < target[:, None]))  # (N, M)
    found = target >= 0
    if excluded is not None:
        ahead &= column != excluded[:, None]
        found &= target != excluded
    return torch.where(found, 1 + ahead.sum(1), NEVER)


def best(scores: torch.Tensor, k: int, excluded: torch.Tensor | None = None) -> torch.Tensor:
    """Columns of the k best by the same order as `rank`: (N, M) -> (N, k) int64; the excluded column is left out."""
    if excluded is not None:
        column = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(column == excluded[:, None], -torch.inf)
        k = min(k, scores.shape[1] - 1)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # stable: equal scores keep gallery order


def recall(ranks: torch.Tensor, k: int) -> float:
    """Percent of ranks (N,) within the first k."""
    return 100.0 * (ranks <= k).double().mean().item()


def score_blocks(queries: torch.Tensor, images: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """queries (N, D) @ images (M, D).T in float32, some rows at a time: (rows, (n, M))."""
    size = max(1, min(512, 2**25 // max(1, len(images))))  # 128 MiB of scores at most
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 keeps 10 bits: near ties would change places
    try:
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, len(queries), size):
                rows = slice(start, min(start + size, len(queries)))
                yield rows, queries[rows].float() @ images.float().T
    finally:
        torch.set_float32_matmul_precision(precision)


# ---- a benchmark as indices ----


@dataclasses.dataclass(frozen=True)
class Indices:
    """A benchmark in numbers. The gallery is the first `gallery` of `names`; references and members outside follow."""

    names: tuple[str, ...]
    gallery: int
    reference: torch.Tensor  # (N,)
    target: torch.Tensor | None  # (N,), -1 not among names; None: hidden
    others: torch.Tensor | None  # (N, 5) the other members of img_set, in the order of names
    excluded: torch.Tensor | None  # (N,), -1 outside the gallery


def index(benchmark: data.Benchmark, keep_reference: bool) -> Indices:
    """Names to rows; UserError for a gallery with duplicates, targets for some only, or an odd img_set."""
    if not benchmark.queries or not benchmark.gallery:
        raise common.UserError(f"{describe(benchmark)}: no queries or no gallery")
    at = {name: i for i, name in enumerate(benchmark.gallery)}
    size = len(at)
    if size < len(benchmark.gallery):
        raise common.UserError(f"{describe(benchmark)}: a name stands twice in the gallery; list each once")
    for query in benchmark.queries:
        for name in (query.reference, *(query.members or ())):
            at.setdefault(name, len(at))
    inside = [at[q.reference] if at[q.reference] < size else -1 for q in benchmark.queries]
    hidden = [q.target is None for q in benchmark.queries]
    if any(hidden) and not all(hidden):
        raise common.UserError(f"{describe(benchmark)}: query {hidden.index(True)} has no target, others have one")
    target = None
    if not any(hidden):
        target = torch.tensor([at.get(q.target, -1) for q in benchmark.queries])
    others = None
    if benchmark.dataset == "cirr":
        rows = []
        for query in benchmark.queries:
            members = set(query.members or ()) - {query.reference}
            if len(members) != 5 or len(query.members) != 6 or not (target is None or query.target in members):
                raise common.UserError(
                    f"{describe(benchmark)}: img_set of pairid {query.id} must be six images, the reference and the"
                    f" target among them; found {list(query.members or ())}"
                )
            rows.append(sorted(at[name] for name in members))  # in gallery order: that is the tie rule of `rank`
        others = torch.tensor(rows)
    excluded = None if benchmark.dataset == "fashioniq" and keep_reference else torch.tensor(inside)
    reference = torch.tensor([at[q.reference] for q in benchmark.queries])
    return Indices(tuple(at), size, reference, target, others, excluded)


def describe(benchmark: data.Benchmark) -> str:
    """'cirr val', 'fashioniq val dress'."""
    return " ".join(part for part in (benchmark.dataset, benchmark.split, benchmark.category) if part)


def require_images(benchmark: data.Benchmark, names: tuple[str, ...]) -> None:
    """Every image of the protocol must be there: UserError naming the first that is not."""
    missing = benchmark.images.missing(names)
    if missing:
        raise common.UserError(
            f"{describe(benchmark)}: {len(missing):,} of {len(names):,} images missing, the first is {missing[0]!r};"
            " recall over fewer is not reported: add them, or name their folder with --images"
        )


# ---- embedding and measuring ----


@torch.no_grad()
def embed(
    model: torch.nn.Module, benchmark: data.Benchmark, at: Indices, batch: int, device, dtype=torch.float32, workers=0
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> queries (N, D), images (len(at.names), D), float32, normalised, on every rank.

    Each image is encoded once: the queries of a reference are composed with the batch that holds it, so that patch
    tokens never outlive their batch. Batches are dealt to the ranks; call it on all of them.
    """
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    place, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    asks: dict[int, list[int]] = {}  # image -> queries that have it as reference
    for query, image in enumerate(at.reference.tolist()):
        asks.setdefault(image, []).append(query)
    modes = [(module, module.training) for module in model.modules()]  # frozen parts may be in eval mode already
    model.eval()
    images, queries = [], []  # (row, embedding)
    for start in common.progress(range(0, len(at.names), batch)[place::size], f"embedding {describe(benchmark)}"):
        rows = range(start, min(start + batch, len(at.names)))
        pixels = data.load_pixels(benchmark.images, [at.names[i] for i in rows], model.preprocess, workers).to(device)
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            tokens, targets = model.image(pixels)
            images += zip(rows, targets.float().cpu(), strict=True)
            pairs = [(i - start, query) for i in rows for query in asks.get(i, ())]
            for first in range(0, len(pairs), batch):
                where, which = zip(*pairs[first : first + batch], strict=True)
                composed = model.compose(tokens[list(where)], [benchmark.queries[i].delta for i in which])
                queries += zip(which, composed.float().cpu(), strict=True)
    for module, mode in modes:
        module.training = mode
    return tuple(_merge(rows, what, benchmark).to(device) for what, rows in (("query", queries), ("image", images)))


def _merge(rows: list, what: str, benchmark: data.Benchmark) -> torch.Tensor:
    """(row, embedding) of all ranks -> (rows, D) in order, normalised; every row must be there once and finite."""
    mine = (torch.tensor([i for i, _ in rows]), torch.stack([x for _, x in rows]) if rows else None)
    parts = [(index, x) for index, x in common.gather_objects(mine) if x is not None]
    index, x = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(len(index))), f"a {what} embedding is lost or doubled"
    x = x[order]
    bad = (~torch.isfinite(x).all(1)).nonzero().flatten().tolist()
    if bad:
        raise common.UserError(f"{describe(benchmark)}: {len(bad)} {what} embeddings are not finite, first {bad[0]}")
    return F.normalize(x, dim=1)


def measure(queries: torch.Tensor, images: torch.Tensor, at: Indices) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ranks in the gallery (N,), and for CIRR among the other members of img_set (N,), else None."""
    ranks, subset = [], []
    for rows, scores in score_blocks(queries, images):  # (n, names)
        target = at.target[rows].to(scores.device)
        inside = torch.where(target < at.gallery, target, -1)
        excluded = None if at.excluded is None else at.excluded[rows].to(scores.device)
        ranks.append(rank(scores[:, : at.gallery], inside, excluded).cpu())
        if at.others is not None:
            others = at.others[rows].to(scores.device)  # (n, 5)
            right = (others == target[:, None]).int().argmax(1)
            subset.append(rank(scores.gather(1, others), right).cpu())
    return torch.cat(ranks), torch.cat(subset) if subset else None


def recalls(ranks: torch.Tensor, subset: torch.Tensor | None) -> dict[str, float]:
    """Percent. With subset ranks CIRR's R@K, Rs@K and Avg = (R@5 + Rs@1) / 2; without, FashionIQ's R@10 and R@50."""
    if subset is None:
        return {f"R@{k}": recall(ranks, k) for k in FASHIONIQ_KS}
    result = {f"R@{k}": recall(ranks, k) for k in CIRR_KS} | {f"Rs@{k}": recall(subset, k) for k in SUBSET_KS}
    return result | {"Avg": (result["R@5"] + result["Rs@1"]) / 2}


def evaluate(
    model: torch.nn.Module,
    benchmark: data.Benchmark,
    batch: int,
    device,
    dtype: torch.dtype = torch.float32,
    keep_reference: bool = True,
    workers: int = 0,
) -> dict[str, float]:
    """Recall in percent of a labelled benchmark; on all ranks together, each encoding its share of the images."""
    at = index(benchmark, keep_reference)
    if at.target is None:
        raise common.UserError(f"{describe(benchmark)} has no labels: nothing to measure")
    require_images(benchmark, at.names)
    return recalls(*measure(*embed(model, benchmark, at, batch, device, dtype, workers), at))


# ---- the server's files for CIRR's test1 ----


def write_submission(folder: str, benchmark: data.Benchmark, queries: torch.Tensor, images: torch.Tensor, at: Indices):
    """OUT/recall.json (50 names a query) and OUT/recall_subset.json (3 names), checked after writing."""
    full, subset = ({"version": "rc2", "metric": metric} for metric in ("recall", "recall_subset"))
    for rows, scores in score_blocks(queries, images):
        others = at.others[rows].to(scores.device)
        top = best(scores[:, : at.gallery], 50, at.excluded[rows].to(scores.device))
        within = others.gather(1, best(scores.gather(1, others), 3))
        for query, wide, narrow in zip(benchmark.queries[rows], top.tolist(), within.tolist(), strict=True):
            full[str(query.id)] = [at.names[i] for i in wide if at.names[i] != query.reference]
            subset[str(query.id)] = [at.names[i] for i in narrow]
    for record in (full, subset):
        path = os.path.join(folder, record["metric"] + ".json")
        common.write_text(path, json.dumps(record, separators=(",", ":")))  # indented, the first would pass 5 MB
        read_submission(path, benchmark, record["metric"])
        common.say(f"wrote {path} ({os.path.getsize(path):,} bytes)")
    common.say(f"{describe(benchmark)} has no labels: CIRR's server answers the two files with the numbers")


def read_submission(path: str, benchmark: data.Benchmark, metric: str) -> dict[str, list[str]]:
    """A file in the server's format, metric "recall" or "recall_subset" -> pairid -> names; UserError if it is not."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise common.UserError(f"{path}: {what}")

    size = os.path.getsize(path)
    require(size <= SERVER_LIMIT, f"{size:,} bytes, the server takes {SERVER_LIMIT:,}: write it without indentation")
    record = common.read_json(path)
    require(isinstance(record, dict), f"found a {type(record).__name__}, wanted an object of pairid: names")
    for key, wanted in (("version", "rc2"), ("metric", metric)):
        require(record.get(key) == wanted, f"{key} is {record.get(key)!r}, wanted {wanted!r}")
    lists = {key: value for key, value in record.items() if key not in ("version", "metric")}
    asked = {str(query.id): query for query in benchmark.queries}
    for what, ids in (("lacks", asked.keys() - lists.keys()), ("has unknown", lists.keys() - asked.keys())):
        require(not ids, f"{what} {len(ids)} of the {len(asked)} pairids of {describe(benchmark)}: {sorted(ids)[:3]}")
    gallery = set(benchmark.gallery)
    for pairid, query in asked.items():
        names = lists[pairid]
        strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
        require(strings, f"pairid {pairid}: wanted a list of image names, found {str(names)[:80]}")
        allowed = (gallery if metric == "recall" else set(query.members)) - {query.reference}
        wanted = min(50 if metric == "recall" else 3, len(allowed))
        require(len(names) == wanted, f"pairid {pairid}: {len(names)} names, wanted {wanted}")
        require(len(set(names)) == len(names), f"pairid {pairid}: a name stands twice")
        require(query.reference not in names, f"pairid {pairid}: lists the query's own reference {query.reference!r}")
        stray = [name for name in names if name not in allowed]
        place = "the gallery" if metric == "recall" else "the query's img_set"
        require(not stray, f"pairid {pairid}: {stray[:1]} is not in {place}")
    return lists


def score_submission(path: str, benchmark: data.Benchmark, metric: str) -> dict[str, float]:
    """Recall in percent of a file in the server's format against a labelled split."""
    if any(query.target is None for query in benchmark.queries):
        raise common.UserError(f"{describe(benchmark)} has no labels: only the server can score it")
    lists = read_submission(path, benchmark, metric)
    ranked = [(lists[str(query.id)], query.target) for query in benchmark.queries]
    ranks = torch.tensor([names.index(target) + 1 if target in names else NEVER for names, target in ranked])
    letter, ks = ("R", CIRR_KS) if metric == "recall" else ("Rs", SUBSET_KS)
    return {f"{letter}@{k}": recall(ranks, k) for k in ks}


def score(benchmark: data.Benchmark, full: str, subset: str, says: str) -> None:
    """Prints the recalls of one or both files, and CIRR's average when both are given."""
    if benchmark.dataset != "cirr":
        raise common.UserError("--score takes CIRR's server files; found --dataset " + benchmark.dataset)
    numbers = score_submission(full, benchmark, "recall") if full else {}
    numbers |= score_submission(subset, benchmark, "recall_subset") if subset else {}
    if full and subset:
        numbers["Avg"] = (numbers["R@5"] + numbers["Rs@1"]) / 2
    row = [describe(benchmark), *numbers.values(), len(benchmark.queries), len(benchmark.gallery)]
    common.say(says + "\n" + text_table([row], ["", *numbers, "queries", "gallery"]))


# ---- reading and checking ----


def one_of(flag: str, value: str, *allowed: str) -> None:
    """UserError for a flag with another value."""
    if value not in allowed:
        raise common.UserError(f"--{flag} is {value!r}; wanted one of {', '.join(allowed)}")


def read_benchmarks(
    dataset: str, root: str, split: str, category: str, images: str, protocol: str
) -> list[data.Benchmark]:
    """One benchmark of CIRR, or one a category of FashionIQ."""
    if not root:
        raise common.UserError("--root is empty; name the folder that holds captions/ and image_splits/")
    if dataset == "fashioniq":
        chosen = data.FASHIONIQ_CATEGORIES if category == "all" else (category,)
        return [data.read_fashioniq(root, split, one, images or None, protocol) for one in chosen]
    benchmark = data.read_cirr(root, "test1" if split == "test" else split, images or None)
    if protocol == "references":
        references = {query.reference for query in benchmark.queries}
        gallery = tuple(name for name in benchmark.gallery if name in references)
        benchmark = dataclasses.replace(benchmark, gallery=gallery)
    return [benchmark]


def require_official(benchmark: data.Benchmark, protocol: str) -> None:
    """Queries and gallery must be as many as published: UserError otherwise."""
    found = (len(benchmark.queries), len(benchmark.gallery))
    key = tuple(part for part in (benchmark.dataset, benchmark.split, benchmark.category) if part)
    key += (protocol,) if protocol == "val" else ()
    wanted = REFERENCES_COUNTS.get(benchmark.split) if protocol == "references" else data.OFFICIAL.get(key)
    if found != wanted:
        has = f"{describe(benchmark)} ({protocol}): found {found[0]:,} queries and {found[1]:,} gallery images"
        want = f"the published ones are {wanted[0]:,} and {wanted[1]:,}" if wanted else "no such split is published"
        raise common.UserError(f"{has}, {want}; --official false for other data in the same layout")


def check(benchmarks: list[data.Benchmark], keep_reference: bool) -> str:
    """Prints expected, present and unreadable images; returns one line of complaint, empty when all are there."""
    bad = []
    for benchmark in benchmarks:
        at = index(benchmark, keep_reference)
        text, ok = data.check_report(at.names, benchmark.images)
        counts = f"{len(benchmark.queries):,} queries, {at.gallery:,} gallery images"
        common.say(f"{describe(benchmark)}: {counts}; {text}")
        if not ok:
            bad.append((benchmark, benchmark.images.missing(at.names)))
    if len(benchmarks) > 1:
        common.say(f"together: {sum(len(benchmark.queries) for benchmark in benchmarks):,} queries")
    named = "; ".join(f"{describe(b)}: " + (f"first {m[0]!r}" if m else "unreadable files") for b, m in bad)
    count = sum(len(missing) for _, missing in bad)
    return f"{count:,} images missing ({named}); add them or name their folder with --images" if bad else ""


# ---- what is shown ----


def protocol_of(dataset: str, protocol: str, keep_reference: bool) -> str:
    """One line that says what the gallery is: it stands beside every number."""
    if dataset == "cirr":
        which = {"split": "every image of the split", "references": "only the images that are a query's reference"}
        return f'protocol "{protocol}": gallery = {which[protocol]}, minus the query\'s own reference'
    which = {"original": "the category's split file", "val": "candidates and targets of the category's captions"}
    kept = "kept in" if keep_reference else "left out of"
    return f'protocol "{protocol}": gallery = {which[protocol]}, the reference {kept} it'


def text_table(rows: list[list], headers: list[str]) -> str:
    """Aligned columns for a terminal."""
    cells = [headers, *([f"{v:.2f}" if isinstance(v, float) else str(v) for v in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join("  ".join(value.rjust(width) for value, width in zip(row, widths, strict=True)) for row in cells)


def panels(benchmark: data.Benchmark, at: Indices, queries, images, ranks, subset, show: int) -> list[tuple]:
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
            ((_, scores),) = score_blocks(queries[i : i + 1], images)  # (1, names)
            excluded = None if at.excluded is None else at.excluded[i : i + 1].to(scores.device)
            top = best(scores[:, : at.gallery], 10, excluded)[0].tolist()
            place = "not in the gallery" if ranks[i] == NEVER else f"at rank {int(ranks[i]):,} of {at.gallery:,}"
            within = "" if subset is None else f", {int(subset[i])} of 5 in its subset"
            shown = [(benchmark.images.path(at.names[j]), f"{n} · {at.names[j]}") for n, j in enumerate(top, 1)]
            answer = None
            if int(at.target[i]) >= 0:
                answer = (benchmark.images.path(query.target), f"right · {query.target}")
            parts.append(
                pages.panel(
                    (benchmark.images.path(query.reference), query.reference),
                    query.delta,
                    shown,
                    right=top.index(int(at.target[i])) if int(at.target[i]) in top else None,
                    note=f"the right one is {place}{within}",
                    answer=answer,
                )
            )
        if parts:
            sections.append((f"{describe(benchmark)}: {heading}", *parts))
    return sections


def report(results: list[dict], sections: list, dataset: str, split: str, says: str, checkpoint: str, out: str) -> None:
    """Prints the table with its protocol; writes OUT/metrics.json and OUT/index.html."""
    with open(os.path.join(checkpoint, "model.safetensors"), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
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
    common.say(f"{dataset} {split}, {says}\n{text_table(rows, headers)}\n{checkpoint}: sha256 {digest}")
    record = {"dataset": dataset, "split": split, "protocol": says, "checkpoint": checkpoint, "sha256": digest}
    common.write_json(os.path.join(out, "metrics.json"), record | {"metrics": metrics, "parts": results}, indent=1)
    if sections:
        top = (f"{dataset} {split}", pages.table(rows, headers), says, f"Checkpoint {checkpoint}, sha256 {digest}")
        common.write_text(os.path.join(out, "index.html"), pages.page("What the model found", [top, *sections]))


# ---- main ----


def main() -> None:
    world = common.init_world(DEVICE)
    one_of("dataset", DATASET, "cirr", "fashioniq")
    one_of("category", CATEGORY, "all", *data.FASHIONIQ_CATEGORIES)
    one_of("cirr_protocol", CIRR_PROTOCOL, "split", "references")
    one_of("fashioniq_protocol", FASHIONIQ_PROTOCOL, "original", "val")
    protocol = CIRR_PROTOCOL if DATASET == "cirr" else FASHIONIQ_PROTOCOL
    says = protocol_of(DATASET, protocol, KEEP_REFERENCE) + ("" if OFFICIAL else "; not the official data")
    benchmarks = read_benchmarks(DATASET, ROOT, SPLIT, CATEGORY, IMAGES, protocol)
    complaint = check(benchmarks, KEEP_REFERENCE) if CHECK else ""
    if OFFICIAL:
        for benchmark in benchmarks:
            require_official(benchmark, protocol)
    if complaint:
        raise common.UserError(complaint)
    if CHECK:
        return
    if SCORE or SCORE_SUBSET:
        score(benchmarks[0], SCORE, SCORE_SUBSET, says)
        return
    if not CHECKPOINT:
        raise common.UserError("--checkpoint is empty; name a folder written by train_cir.py")
    indices = [index(benchmark, KEEP_REFERENCE) for benchmark in benchmarks]
    for benchmark, at in zip(benchmarks, indices, strict=True):
        require_images(benchmark, at.names)  # all of them, before any model is loaded
        if at.target is None and DATASET != "cirr":
            raise common.UserError(f"{describe(benchmark)} has no labels; use --split val")

    common.lock_folder(OUT)

    import train_cir  # here: train_cir imports this file for its ranking

    model = train_cir.load_cir(CHECKPOINT, world.device)
    dtype = common.pick_dtype(DTYPE, world.device)
    results, sections = [], []
    for benchmark, at in zip(benchmarks, indices, strict=True):
        queries, images = embed(model, benchmark, at, BATCH, world.device, dtype, WORKERS)
        if world.rank == 0 and at.target is None:
            write_submission(OUT, benchmark, queries, images, at)
        elif world.rank == 0:
            ranks, subset = measure(queries, images, at)
            counts = {"queries": len(ranks), "gallery": at.gallery}
            results.append({"category": benchmark.category, **counts, "metrics": recalls(ranks, subset)})
            sections += panels(benchmark, at, queries, images, ranks, subset, SHOW)
    if results:  # rank 0, labelled
        report(results, sections, DATASET, SPLIT, says, CHECKPOINT, OUT)
    common.barrier()


if __name__ == "__main__":
    common.override(globals())
    common.run(main)
