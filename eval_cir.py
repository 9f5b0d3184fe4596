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

import common

common.early_help(__name__, __file__)  # answers --help before torch is imported

import dataclasses
import json
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import data
import pages

# ---- what is evaluated ----
CHECKPOINT = ""  # folder written by train_cir.py
BASELINE = ""  # no checkpoint: what plain BACKBONE finds by "image", "text", or the "sum" of both features
BACKBONE = ""  # of BASELINE: folder or hub id of a CLIP or BLIP ITM model; empty: openai/clip-vit-large-patch14
DATASET = "cirr"  # "cirr", "fashioniq" or "circo"
ROOT = ""  # folder with captions/ and image_splits/ (circo: annotations/)
IMAGES = ""  # folder of the images; empty: the usual places in and beside ROOT
SPLIT = "val"  # val; CIRR's test1 (or test) and CIRCO's test: the server's files
CATEGORY = "all"  # FashionIQ: dress, shirt, toptee, or all three and their mean
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
CHECK = False  # count queries, gallery and images, then stop; status 1 if an image is missing
SCORE = ()  # one or both files in the format of CIRR's server, scored against a labelled split

CIRR_KS, SUBSET_KS, FASHIONIQ_KS, CIRCO_KS = (1, 5, 10, 50), (1, 2, 3), (10, 50), (5, 10, 25, 50)
NEVER = 2**62  # rank of a target that is not in the gallery: beyond every K, however small the gallery


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


def average_precision(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """AP@K of each query: ranks (N, G) of its right answers, -1 where it has fewer -> (N,), in 0..1."""
    there = ranks > 0
    ranks = torch.where(there, ranks, NEVER).sort(dim=1).values
    found = torch.arange(1, ranks.shape[1] + 1) / ranks  # precision where the g-th is found
    return torch.where(ranks <= k, found, 0.0).sum(1) / there.sum(1).clamp(max=k)


def score_blocks(
    queries: torch.Tensor, images: torch.Tensor, first: torch.Tensor | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """queries (N, D) @ images (M, D).T in float32, some rows at a time: (rows, (n, M)).

    first (N, K): columns that a re-ranking put ahead of all others, best first."""
    size = max(1, min(512, 2**25 // max(1, len(images))))  # 128 MiB of scores at most
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 keeps 10 bits: near ties would change places
    try:
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, len(queries), size):
                rows = slice(start, min(start + size, len(queries)))
                scores = queries[rows].float() @ images.float().T
                if first is not None:
                    above = 3 - torch.arange(first.shape[1], device=scores.device) / first.shape[1]  # cosines end at 1
                    scores.scatter_(1, first[rows].to(scores.device), above.expand(len(scores), -1))
                yield rows, scores
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
    truths: torch.Tensor | None = None  # (N, G) all right answers, -1 where a query has fewer (CIRCO)


def index(benchmark: data.Benchmark, keep_reference: bool) -> Indices:
    """Names to rows; UserError for a gallery with duplicates, targets for some only, or an odd img_set."""
    if not benchmark.queries or not benchmark.gallery:
        raise common.UserError(f"{benchmark.title}: no queries or no gallery")
    at = {name: i for i, name in enumerate(benchmark.gallery)}
    size = len(at)
    if size < len(benchmark.gallery):
        raise common.UserError(f"{benchmark.title}: a name stands twice in the gallery; list each once")
    for query in benchmark.queries:
        for name in (query.reference, *(query.members or ())):
            at.setdefault(name, len(at))
    inside = [at[q.reference] if at[q.reference] < size else -1 for q in benchmark.queries]
    hidden = [q.target is None for q in benchmark.queries]
    if any(hidden) and not all(hidden):
        raise common.UserError(f"{benchmark.title}: query {hidden.index(True)} has no target, others have one")
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
                    f"{benchmark.title}: img_set of pairid {query.id} must be six images, the reference and the"
                    f" target among them; found {list(query.members or ())}"
                )
            rows.append(sorted(at[name] for name in members))  # in gallery order: that is the tie rule of `rank`
        others = torch.tensor(rows)
    excluded = None if benchmark.dataset != "cirr" and keep_reference else torch.tensor(inside)
    reference = torch.tensor([at[q.reference] for q in benchmark.queries])
    truths = None
    if benchmark.dataset == "circo" and target is not None:
        rows = [[at[name] for name in q.extra["truths"]] for q in benchmark.queries]
        truths = torch.tensor([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows])
    return Indices(tuple(at), size, reference, target, others, excluded, truths)


def turned(benchmark: data.Benchmark, text_file: str) -> data.Benchmark:
    """Reversed queries: target + text -> reference; with a file, its reverse_delta of each pair is the text."""
    if benchmark.dataset == "circo" or any(query.target is None for query in benchmark.queries):
        raise common.UserError(f"--reversed: {benchmark.title} has no single known target; take CIRR or FashionIQ val")
    triplets = data.read_triplets(text_file) if text_file else []
    texts = {(t.reference, t.target): t.extra.get("reverse_delta") for t in triplets}
    queries = []
    for q in benchmark.queries:
        delta = texts.get((q.reference, q.target)) if text_file else q.delta
        if delta is None:
            raise common.UserError(f"{text_file}: no reverse_delta for {q.reference} -> {q.target}; make it for all")
        queries.append(dataclasses.replace(q, reference=q.target, target=q.reference, delta=delta))
    return dataclasses.replace(benchmark, queries=tuple(queries))


def require_images(benchmark: data.Benchmark, names: tuple[str, ...]) -> None:
    """Every image of the protocol must be there: UserError naming the first that is not."""
    missing = benchmark.images.missing(names)
    if missing:
        raise common.UserError(
            f"{benchmark.title}: {len(missing):,} of {len(names):,} images missing, the first is {missing[0]!r};"
            " recall over fewer is not reported: add them, or name their folder with --images"
        )


# ---- embedding and measuring ----


def encode(model: torch.nn.Module, images: data.ImageStore, names: list, batch: int, device, dtype, workers, what: str):
    """(rows, tokens, targets) of the pictures, a batch at a time, in eval mode and autocast; dealt to the ranks."""
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    place, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    modes = [(module, module.training) for module in model.modules()]  # frozen parts may be in eval mode already
    model.eval()
    try:
        for start in common.progress(range(0, len(names), batch)[place::size], what):
            rows = range(start, min(start + batch, len(names)))
            pixels = data.load_pixels(images, [names[i] for i in rows], model.preprocess, workers).to(device)
            with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
                yield rows, *model.image(pixels)
    finally:
        for module, mode in modes:
            module.training = mode


def asked(places: list[list[int]]) -> dict[int, list[int]]:
    """Image -> positions of the lists that name it."""
    asks: dict[int, list[int]] = {}
    for position, images in enumerate(places):
        for image in images:
            asks.setdefault(image, []).append(position)
    return asks


@torch.no_grad()
def embed(
    model: torch.nn.Module,
    benchmark: data.Benchmark,
    at: Indices,
    batch: int,
    device,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> queries (N, D), images (len(at.names), D), float32, normalised, on every rank.

    Each image is encoded once: the queries of a reference are composed with the batch that holds it, so that patch
    tokens never outlive their batch. Batches are dealt to the ranks; call it on all of them."""
    asks, images, queries = asked(at.reference[:, None].tolist()), [], []  # (row, embedding)
    how = (batch, device, dtype, workers, f"embedding {benchmark.title}")
    for rows, tokens, targets in encode(model, benchmark.images, at.names, *how):
        images += zip(rows, targets.float().cpu(), strict=True)
        pairs = [(i - rows.start, query) for i in rows for query in asks.get(i, ())]
        for first in range(0, len(pairs), batch):
            where, which = zip(*pairs[first : first + batch], strict=True)
            composed = model.compose(tokens[list(where)], [benchmark.queries[i].delta for i in which], backward)
            queries += zip(which, composed.float().cpu(), strict=True)
    return tuple(_merge(rows, what, benchmark).to(device) for what, rows in (("query", queries), ("image", images)))


@torch.no_grad()
def rerank(
    model: torch.nn.Module,
    images: data.ImageStore,
    names: list,
    deltas: list[str],
    cosines: torch.Tensor,
    top: torch.Tensor,
    tau: float,
    weight: float,
    how: tuple,
) -> torch.Tensor:
    """The columns `top` (N, K) of the gallery `names`, ordered by cosine / tau + weight * log p(matched) [ours].

    cosines (N, K). The tdm head sees a candidate's patch tokens and the delta; each candidate is encoded once more,
    with all the queries that found it. how: batch, device, dtype, workers. Call it on all ranks."""
    found, asks = [], asked(top.tolist())
    wanted = sorted(asks)
    batch = how[0]
    for rows, tokens, _ in encode(model, images, [names[i] for i in wanted], *how, "re-ranking"):
        pairs = [(i - rows.start, query) for i in rows for query in asks[wanted[i]]]
        for first in range(0, len(pairs), batch):
            where, which = zip(*pairs[first : first + batch], strict=True)
            logits = model.match(tokens[list(where)], [deltas[i] for i in which]).log_softmax(1)[:, 1]
            columns = [wanted[rows.start + i] for i in where]
            found += zip(which, columns, logits.tolist(), strict=True)
    matched = {(query, column): value for part in common.gather_objects(found) for query, column, value in part}
    logs = torch.tensor([[matched[i, j] for j in row] for i, row in enumerate(top.tolist())])
    order = (cosines.cpu() / tau + weight * logs).sort(dim=1, descending=True, stable=True).indices
    return top.cpu().gather(1, order)


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
        raise common.UserError(f"{benchmark.title}: {len(bad)} {what} embeddings are not finite, first {bad[0]}")
    return F.normalize(x, dim=1)


def shortlist(
    queries: torch.Tensor, images: torch.Tensor, at: Indices, k: int, first: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (N, K) of the best of the gallery and their scores: cosines, or above all those the places of `first`."""
    parts = []
    for rows, scores in score_blocks(queries, images, first):
        scores = scores[:, : at.gallery]
        top = best(scores, k, None if at.excluded is None else at.excluded[rows].to(scores.device))
        parts.append((top.cpu(), scores.gather(1, top).cpu()))
    return torch.cat([top for top, _ in parts]), torch.cat([cosines for _, cosines in parts])


def measure(
    queries: torch.Tensor, images: torch.Tensor, at: Indices, first: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Ranks in the gallery (N,); for CIRR among the other members of img_set (N,); for CIRCO of all answers (N, G)."""
    ranks, subset, truths = [], [], []
    for rows, scores in score_blocks(queries, images, first):  # (n, names)
        target = at.target[rows].to(scores.device)
        inside = torch.where(target < at.gallery, target, -1)
        excluded = None if at.excluded is None else at.excluded[rows].to(scores.device)
        ranks.append(rank(scores[:, : at.gallery], inside, excluded).cpu())
        if at.others is not None:
            others = at.others[rows].to(scores.device)  # (n, 5)
            right = (others == target[:, None]).int().argmax(1)
            subset.append(rank(scores.gather(1, others), right).cpu())
        if at.truths is not None:
            each = [rank(scores, t, excluded).cpu() for t in at.truths[rows].to(scores.device).T]
            truths.append(torch.where(at.truths[rows] >= 0, torch.stack(each, dim=1), -1))
    return torch.cat(ranks), torch.cat(subset) if subset else None, torch.cat(truths) if truths else None


def recalls(
    ranks: torch.Tensor, subset: torch.Tensor | None = None, truths: torch.Tensor | None = None
) -> dict[str, float]:
    """Percent. With subset ranks CIRR's R@K, Rs@K and Avg = (R@5 + Rs@1) / 2; with truths CIRCO's mAP@K and R@K of the
    target; without either FashionIQ's R@10 and R@50."""
    if truths is not None:
        result = {f"mAP@{k}": 100.0 * average_precision(truths, k).double().mean().item() for k in CIRCO_KS}
        return result | {f"R@{k}": recall(ranks, k) for k in CIRCO_KS}
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
        raise common.UserError(f"{benchmark.title} has no labels: nothing to measure")
    require_images(benchmark, at.names)
    return recalls(*measure(*embed(model, benchmark, at, batch, device, dtype, workers), at))


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
    folder: str, benchmark: data.Benchmark, queries: torch.Tensor, images: torch.Tensor, at: Indices, first=None
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
        common.write_text(path, json.dumps(record, separators=(",", ":")))  # indented, recall.json would pass 5 MB
        if not ids:
            data.read_submission(path, benchmark, name)
        common.say(f"wrote {path} ({os.path.getsize(path):,} bytes)")
    where = "https://circo.micc.unifi.it" if ids else "https://cirr.cecs.anu.edu.au"
    common.say(f"{benchmark.title} has no labels: the server at {where} answers the files with the numbers")


def score_submission(path: str, benchmark: data.Benchmark, metric: str) -> dict[str, float]:
    """Recall in percent of a file in the server's format against a labelled split."""
    if any(query.target is None for query in benchmark.queries):
        raise common.UserError(f"{benchmark.title} has no labels: only the server can score it")
    lists = data.read_submission(path, benchmark, metric)
    ranked = [(lists[str(query.id)], query.target) for query in benchmark.queries]
    ranks = torch.tensor([names.index(target) + 1 if target in names else NEVER for names, target in ranked])
    letter, ks = ("R", CIRR_KS) if metric == "recall" else ("Rs", SUBSET_KS)
    return {f"{letter}@{k}": recall(ranks, k) for k in ks}


def score(benchmark: data.Benchmark, files: tuple[str, ...], says: str) -> None:
    """Prints the recalls of one or both files, and CIRR's average when both are given."""
    if benchmark.dataset != "cirr":
        raise common.UserError("--score takes CIRR's server files; found --dataset " + benchmark.dataset)
    numbers, given = {}, {}
    for path in files:
        record = common.read_json(path)
        subset = isinstance(record, dict) and record.get("metric") == "recall_subset"
        metric = "recall_subset" if subset else "recall"
        if metric in given:
            raise common.UserError(f"--score: {given[metric]} and {path} both hold {metric}; give one file of each")
        given[metric] = path
        numbers |= score_submission(path, benchmark, metric)
    if {"R@5", "Rs@1"} <= numbers.keys():
        numbers["Avg"] = (numbers["R@5"] + numbers["Rs@1"]) / 2
    row = [benchmark.title, *numbers.values(), len(benchmark.queries), len(benchmark.gallery)]
    common.say(says + "\n" + pages.text_table([row], ["", *numbers, "queries", "gallery"]))


# ---- one query over a folder of pictures ----


def folder_features(
    model: torch.nn.Module, folder: str, names: list[str], key: str, how: tuple
) -> tuple[torch.Tensor, list[str]]:
    """-> features (M, D) of the pictures and the sha256 of each; kept in FOLDER.KEY.safetensors, by content.

    A picture that was added or changed is encoded, the others are read; key: of the checkpoint and the dtype."""
    store = data.ImageStore(folder)
    hashes = [common.file_sha256(store.path(name)) for name in names]
    file, kept = f"{os.path.abspath(folder)}.{key}.safetensors", {}
    if os.path.exists(file):
        try:
            cache = load_file(file)
            kept = dict(zip((bytes(row).hex() for row in cache["sha256"].numpy()), cache["features"], strict=True))
        except (SafetensorError, KeyError):
            common.say(f"{file} is damaged: its features are computed again")
    todo = {digest: name for digest, name in zip(hashes, names, strict=True) if digest not in kept}
    common.say(f"{folder}: {len(names):,} pictures, {len(todo):,} to encode")
    if todo:
        digests = list(todo)
        said, readable = data.check_report(todo.values(), store)
        if not readable:
            raise common.UserError(f"{folder}: {said}; take what cannot be read out of the folder")
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
    names, (_, device, dtype, _) = data.list_images(folder), how
    place, name = os.path.split(os.path.abspath(reference))  # first: a wrong name shows before the gallery is encoded
    ((_, tokens, _),) = encode(model, data.ImageStore(place), [name], 1, device, dtype, 0, "reference")
    features, hashes = folder_features(model, folder, names, f"{key[:16]}-{str(dtype).removeprefix('torch.')}", how)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
        c = F.normalize(model.eval().compose(tokens, [text]).float(), dim=1)
    ((_, scores),) = score_blocks(c.cpu(), features)  # (1, M)
    own = common.file_sha256(reference)
    scores[0, [i for i, digest in enumerate(hashes) if digest == own]] = -torch.inf  # the reference itself
    order = best(scores, min(max(top, k), int((scores > -torch.inf).sum())))
    if k:
        cosines = scores.gather(1, order[:, :k])
        first = rerank(model, data.ImageStore(folder), names, [text], cosines, order[:, :k], tau, weight, how)
        order = torch.cat([first, order[:, k:]], dim=1)
    found = [(os.path.join(folder, names[j]), f"{n} · {names[j]}") for n, j in enumerate(order[0, :top].tolist(), 1)]
    for n, j in enumerate(order[0, :top].tolist(), 1):
        common.say(f"{n:3d}  {scores[0, j]:.4f}  {names[j]}")
    pages.write_answer(reference, text, found, out, f"In {folder}")
    common.say(f"wrote {out}/query.png and query.html")


# ---- what is shown ----


def protocol_of(dataset: str, protocol: str, keep_reference: bool, more: tuple[str, ...]) -> str:
    """One line that says what the gallery is, and whatever else is not as usual: it stands beside every number."""
    if dataset == "cirr":
        which = {"split": "every image of the split", "references": "only the images that are a query's reference"}
        says = f'protocol "{protocol}": gallery = {which[protocol]}, minus the query\'s own reference'
    else:
        which = {"original": "the category's split file", "val": "candidates and targets of the category's captions"}
        which["unlabeled2017"] = "COCO's unlabelled images"
        kept = "kept in" if keep_reference else "left out of"
        says = f'protocol "{protocol}": gallery = {which[protocol]}, the reference {kept} it'
    return "; ".join([says, *more])


def found_of(benchmark: data.Benchmark, at: Indices, top, ranks, subset) -> list[dict]:
    """Lines of OUT/found.jsonl: what was asked, the right image's rank (null: not in the gallery), the first ten."""
    lines = []
    for i, query in enumerate(benchmark.queries):
        line = {"id": query.id, "reference": query.reference, "delta": query.delta, "target": query.target}
        line["rank"] = None if ranks[i] == NEVER else int(ranks[i])
        line |= {} if subset is None else {"subset_rank": int(subset[i])}
        lines.append(line | {"top": [at.names[j] for j in top[i].tolist()]})
    return lines


def panels(benchmark: data.Benchmark, at: Indices, top, ranks, subset, show: int) -> list[tuple]:
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
    common.say(f"{dataset} {split}, {says}\n{pages.text_table(rows, headers)}\n{checkpoint}: sha256 {digest}")
    record = {"dataset": dataset, "split": split, "protocol": says, "checkpoint": checkpoint, "sha256": digest}
    common.write_json(os.path.join(out, "metrics.json"), record | {"metrics": metrics, "parts": results}, indent=1)
    common.write_jsonl(os.path.join(out, "found.jsonl"), found)
    if sections:
        top = (f"{dataset} {split}", pages.table(rows, headers), says, f"Checkpoint {checkpoint}, sha256 {digest}")
        common.write_text(os.path.join(out, "index.html"), pages.page("What the model found", [top, *sections]))


# ---- main ----


def load(checkpoint: str, baseline: str, backbone: str, match: bool, device) -> tuple[torch.nn.Module, str, str, float]:
    """The model, what it is called, the sha256 of its weights and its temperature; match: it must have a tdm head."""
    import train_cir  # here: train_cir imports this file for its ranking

    if not baseline:
        model, config = train_cir.load_cir(checkpoint, device), os.path.join(checkpoint, "config.json")
        if match and not hasattr(model, "match"):
            raise common.UserError("--rerank wants a checkpoint of --model blip_tdm: only it has a tdm head")
        tau = common.read_json(config).get("tau", 1.0) if os.path.exists(config) else 1.0
        return model, checkpoint, common.file_sha256(os.path.join(checkpoint, "model.safetensors")), tau
    if match:
        raise common.UserError("--rerank wants a checkpoint: a --baseline has no trained tdm head")
    backbone = backbone or train_cir.HUB["sum"]
    kind = "blip_tdm" if train_cir.model_type(backbone) == "blip" else "sum"
    model = train_cir.build_cir(kind, backbone).eval().to(device)
    digest = common.tensors_sha256(model.named_parameters(), repr(model.preprocess))
    return Baseline(model, baseline), f"plain {backbone}, {baseline}", digest, 1.0


def main() -> None:
    world = common.init_world(DEVICE)
    for flag, value, allowed in (
        ("dataset", DATASET, ("cirr", "fashioniq", "circo")),
        ("category", CATEGORY, ("all", *data.FASHIONIQ_CATEGORIES)),
        ("cirr_protocol", CIRR_PROTOCOL, ("split", "references")),
        ("fashioniq_protocol", FASHIONIQ_PROTOCOL, ("original", "val")),
        ("baseline", BASELINE, ("", "image", "text", "sum")),
    ):
        if value not in allowed:
            raise common.UserError(f"--{flag} is {value!r}; wanted one of {', '.join(filter(None, allowed))}")
    common.at_least(globals(), BATCH=1, WORKERS=0, RERANK=0, TOP=1, SHOW=0)
    dtype = common.pick_dtype(DTYPE, world.device)
    how = (BATCH, world.device, dtype, WORKERS)
    asks = [bool(REFERENCE), bool(TEXT.strip()), bool(GALLERY)]
    if any(asks) and (not all(asks) or world.size > 1):
        raise common.UserError("one query wants --reference, --text and --gallery together, and one process")
    if REVERSE_TEXT and not REVERSED:
        raise common.UserError("--reverse_text is the text of reversed queries: add --reversed")
    if REVERSED and (SCORE or (RERANK and not REVERSE_TEXT)):
        raise common.UserError("--reversed: --score knows forward queries only, --rerank texts that lead back only")
    if (CHECKPOINT and BASELINE) or (BACKBONE and not BASELINE):
        raise common.UserError("--baseline with its --backbone, or --checkpoint, which knows its own backbone")
    if not CHECKPOINT and not BASELINE and not SCORE and not CHECK:
        raise common.UserError("--checkpoint is empty; name a folder written by train_cir.py, or take a --baseline")
    if REFERENCE:
        common.lock_folder(OUT)
        model, _, digest, tau = load(CHECKPOINT, BASELINE, BACKBONE, RERANK > 0, world.device)
        return search(model, REFERENCE, TEXT, GALLERY, digest, TOP, RERANK, tau, RERANK_WEIGHT, how, OUT)

    # ---- the protocol, and every image that it needs, before a model loads
    protocol = {"cirr": CIRR_PROTOCOL, "fashioniq": FASHIONIQ_PROTOCOL, "circo": "unlabeled2017"}[DATASET]
    ways = [("not the official data", not OFFICIAL), ("reversed queries", REVERSED)]
    ways += [(f"texts of {REVERSE_TEXT}", REVERSE_TEXT), (f"first {RERANK} re-ranked by the tdm head", RERANK)]
    says = protocol_of(DATASET, protocol, KEEP_REFERENCE, tuple(text for text, on in ways if on))
    benchmarks = data.read_benchmarks(DATASET, ROOT, SPLIT, CATEGORY, IMAGES, protocol)
    complaint = data.check_benchmarks(benchmarks) if CHECK else ""
    if OFFICIAL:
        for benchmark in benchmarks:
            data.require_official(benchmark, protocol)
    if complaint:
        raise common.UserError(complaint)
    if CHECK:
        return
    if SCORE:
        return score(benchmarks[0], SCORE, says)
    if REVERSED:
        benchmarks = [turned(benchmark, REVERSE_TEXT) for benchmark in benchmarks]
    indices = [index(benchmark, KEEP_REFERENCE) for benchmark in benchmarks]
    for benchmark, at in zip(benchmarks, indices, strict=True):
        require_images(benchmark, at.names)
        if at.target is None and DATASET == "fashioniq":
            raise common.UserError(f"{benchmark.title} has no labels; use --split val")
    common.lock_folder(OUT)

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
    common.barrier()


if __name__ == "__main__":
    common.override(globals())
    common.run(main)
