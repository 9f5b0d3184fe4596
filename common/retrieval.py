"""Ranks, recall and mAP of a benchmark, exact and the same on any number of ranks.

Rank of a target = 1 + the gallery images with a higher score + those with an equal score earlier in the gallery's own
order. Scores are cosines in float32 (TF32 off). A target outside the gallery is never found."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.annotations import Benchmark
from common.batches import chunks
from common.console import UserError
from common.encoding import Compute, encode
from common.images import ImageStore, shown
from common.ranks import gather_objects
from common.triplets import Triplet
from kernels.max_similarity import max_scores

CIRR_KS, SUBSET_KS, FASHIONIQ_KS, CIRCO_KS = (1, 5, 10, 50), (1, 2, 3), (10, 50), (5, 10, 25, 50)
SECOND_FIRST = "the second caption first"  # what a protocol says of FashionIQ's captions with --join reverse
NEVER = 2**62  # rank of a target that is not in the gallery: beyond every K, however small the gallery


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
    """queries (N, D) @ images (M, D).T in float32, some rows at a time: (rows, (n, M)); of images (M, Q, D) the best.

    first (N, K): columns that a re-ranking put ahead of all others, best first."""
    block = max(1, min(512, 2**25 // max(1, images[..., 0].numel())))  # 128 MiB of scores at most
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 keeps 10 bits: near ties would change places
    try:
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, len(queries), block):
                rows = slice(start, min(start + block, len(queries)))
                scores = max_scores(images.float(), queries[rows].float())
                if first is not None:
                    above = 3 - torch.arange(first.shape[1], device=scores.device) / first.shape[1]  # cosines end at 1
                    scores.scatter_(1, first[rows].to(scores.device), above.expand(len(scores), -1))
                yield rows, scores
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclasses.dataclass(frozen=True)
class Indices:
    """A benchmark in numbers. The gallery is the first `gallery` of `names`; references and members outside follow."""

    names: tuple[str, ...]
    gallery: int
    reference: torch.Tensor  # (N,)
    target: torch.Tensor | None  # (N,), -1 not among names; None: hidden
    others: torch.Tensor | None  # (N, 5) the other members of img_set, in the order of names
    excluded: torch.Tensor | None  # (N,), -1 outside the gallery
    truths: torch.Tensor | None = None  # (N, G) all right answers, -1 where a query has fewer; None: one each
    soft: torch.Tensor | None = None  # (N, G) images of target_soft, -1 where a query has fewer (CIRR)
    soft_values: torch.Tensor | None = None  # (N, G) what each is worth, from -1 to 1; 0 where a query has fewer


class SoftTargets(NamedTuple):
    """CIRR's target_soft: to what degree an image answers a query."""

    names: list[list[str]]  # of each query
    values: torch.Tensor  # (N, G): 1 right, 0.5 and 0.2 in part, -1 wrong; 0 where a query has fewer


def soft_targets(queries: Sequence[Triplet]) -> SoftTargets | None:
    """None where no query has any; a query without is worth 1 for its target."""
    given = [(query.extra or {}).get("target_soft") for query in queries]
    if not any(given):
        return None
    given = [soft or {query.target: 1.0} for soft, query in zip(given, queries, strict=True)]
    widest = max(map(len, given))
    values = [[*soft.values()] + [0.0] * (widest - len(soft)) for soft in given]
    return SoftTargets([[*soft] for soft in given], torch.tensor(values, dtype=torch.float64))


def soft_recall(ranks: torch.Tensor, values: torch.Tensor, k: int) -> float:
    """Percent: mean over queries of the highest value among their soft targets within the first K, at least 0.

    ranks (N, G) from 1, values (N, G). As CIRPLANT and CoVR count it [read in their code]."""
    return 100.0 * torch.where(ranks <= k, values, 0.0).amax(1).clamp(min=0).mean().item()


def index(benchmark: Benchmark, keep_reference: bool) -> Indices:
    """Names to rows; UserError for a gallery with duplicates, targets for some only, or an odd img_set."""
    if not benchmark.queries or not benchmark.gallery:
        raise UserError(f"{benchmark.title}: no queries or no gallery")
    place = {name: i for i, name in enumerate(benchmark.gallery)}
    count = len(place)
    if count < len(benchmark.gallery):
        raise UserError(f"{benchmark.title}: a name stands twice in the gallery; list each once")
    for query in benchmark.queries:
        for name in (query.reference, *(query.members or ())):
            place.setdefault(name, len(place))
    inside = [place[q.reference] if place[q.reference] < count else -1 for q in benchmark.queries]
    hidden = [q.target is None for q in benchmark.queries]
    if any(hidden) and not all(hidden):
        raise UserError(f"{benchmark.title}: query {hidden.index(True)} has no target, others have one")
    target = None
    if not any(hidden):
        target = torch.tensor([place.get(q.target, -1) for q in benchmark.queries])
    others = None
    if benchmark.dataset == "cirr":
        rows = []
        for query in benchmark.queries:
            members = set(query.members or ()) - {query.reference}
            if len(members) != 5 or len(query.members) != 6 or not (target is None or query.target in members):
                raise UserError(
                    f"{benchmark.title}: img_set of pairid {query.id} must be six images, the reference and the"
                    f" target among them; found {list(query.members or ())}"
                )
            rows.append(sorted(place[name] for name in members))  # in gallery order: that is the tie rule of `rank`
        others = torch.tensor(rows)
    kept = keep_reference and benchmark.dataset in ("fashioniq", "circo")
    excluded = None if kept else torch.tensor(inside)
    reference = torch.tensor([place[q.reference] for q in benchmark.queries])
    truths = None
    if any(q.truths for q in benchmark.queries) and target is not None:
        rows = [[place[name] for name in q.truths or (q.target,)] for q in benchmark.queries]
        truths = torch.tensor([row + [-1] * (max(map(len, rows)) - len(row)) for row in rows])
    soft = soft_values = None
    if others is not None and target is not None and (given := soft_targets(benchmark.queries)):
        widest = given.values.shape[1]
        rows = [[place.get(name, -1) for name in names] + [-1] * (widest - len(names)) for names in given.names]
        soft, soft_values = torch.tensor(rows), given.values
    return Indices(tuple(place), count, reference, target, others, excluded, truths, soft, soft_values)


def require_images(benchmark: Benchmark, names: tuple[str, ...]) -> None:
    """Every image of the protocol must be there: UserError with their number and the first that are not."""
    if missing := benchmark.images.missing(names):
        first = f"{len(missing):,} of {len(names):,} images missing: {first_of(missing)}"
        where = f"looked in {', '.join(benchmark.images.roots)}"
        remedy = "add them, name their folder with --images, list all with --check, or go on without by --missing SHARE"
        raise UserError(f"{benchmark.title}: {first} ({where}); recall over fewer is not reported: {remedy}")


def first_of(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more


def asked(places: list[list[int]]) -> dict[int, list[int]]:
    """Image -> positions of the lists that name it."""
    asks: dict[int, list[int]] = {}
    for position, images in enumerate(places):
        for image in images:
            asks.setdefault(image, []).append(position)
    return asks


# a way to ask: tokens (n, ...) of references, n deltas -> (n, D), normalised
Way = Callable[[torch.Tensor, list[str]], torch.Tensor]


def embed(
    model: torch.nn.Module, benchmark: Benchmark, at: Indices, compute: Compute, backward: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> queries (N, D), images (len(at.names), D), float32, normalised, on every rank; call it on all of them."""
    (queries,), images = embed_ways(model, benchmark, at, compute, [whole_query(model, backward)])
    return queries, images


def whole_query(model: torch.nn.Module, backward: bool = False) -> Way:
    """The usual way: the reference composed with its delta."""
    return lambda tokens, deltas: model.compose(tokens, deltas, backward)


@torch.no_grad()
def embed_ways(
    model: torch.nn.Module, benchmark: Benchmark, at: Indices, compute: Compute, ways: Sequence[Way]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """-> queries (N, D) for each way to ask, and images, as embed().

    Each image is encoded once: the queries of a reference are composed with the batch that holds it, so that patch
    tokens never outlive their batch. Batches are dealt to the ranks; call it on all of them."""
    asks, images = asked(at.reference[:, None].tolist()), []  # images: (row, embedding)
    queries: list[list] = [[] for _ in ways]
    for rows, tokens, targets in encode(model, benchmark.images, at.names, compute, f"embedding {benchmark.title}"):
        images += zip(rows, targets.float().cpu(), strict=True)
        pairs = [(i - rows.start, query) for i in rows for query in asks.get(i, ())]
        for part in chunks(pairs, compute.batch):
            where, which = zip(*part, strict=True)
            deltas = [benchmark.queries[i].delta for i in which]
            for way, found in zip(ways, queries, strict=True):
                with compute.autocast():
                    composed = way(tokens[list(where)], deltas)
                found += zip(which, composed.float().cpu(), strict=True)
    merged = [_merge(found, "query", benchmark.title).to(compute.device) for found in queries]
    return merged, _merge(images, "image", benchmark.title).to(compute.device)


class Shortlist(NamedTuple):
    """The best columns of the gallery for each query, best first."""

    columns: torch.Tensor  # (N, K)
    scores: torch.Tensor  # (N, K): cosines, or above all those the places that a re-ranking gave


@torch.no_grad()
def rerank(
    model: torch.nn.Module,
    images: ImageStore,
    names: list,
    deltas: list[str],
    top: Shortlist,
    weight: float,
    compute: Compute,
) -> torch.Tensor:
    """The columns (N, K) of the gallery `names`, ordered by cosine / tau + weight * log p(matched) [ours].

    The tdm head sees a candidate's patch tokens and the delta; each candidate is encoded once more, with all the
    queries that found it. Call it on all ranks."""
    found, asks = [], asked(top.columns.tolist())
    wanted = sorted(asks)
    for rows, tokens, _ in encode(model, images, [names[i] for i in wanted], compute, "re-ranking"):
        pairs = [(i - rows.start, query) for i in rows for query in asks[wanted[i]]]
        for part in chunks(pairs, compute.batch):
            where, which = zip(*part, strict=True)
            with compute.autocast():
                logits = model.match(tokens[list(where)], [deltas[i] for i in which])
            columns = [wanted[rows.start + i] for i in where]
            found += zip(which, columns, logits.log_softmax(1)[:, 1].tolist(), strict=True)
    matched = {(query, column): value for part in gather_objects(found) for query, column, value in part}
    logs = torch.tensor([[matched[i, j] for j in row] for i, row in enumerate(top.columns.tolist())])
    order = (top.scores.cpu() / model.tau.item() + weight * logs).sort(dim=1, descending=True, stable=True).indices
    return top.columns.cpu().gather(1, order)


def _merge(rows: list, what: str, title: str) -> torch.Tensor:
    """(row, embedding) of all ranks -> (rows, ..., D) in order, normalised; every row must be there once and finite."""
    mine = (torch.tensor([i for i, _ in rows]), torch.stack([x for _, x in rows]) if rows else None)
    parts = [(index, x) for index, x in gather_objects(mine) if x is not None]
    index, x = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(len(index))), f"a {what} embedding is lost or doubled"
    x = x[order]
    bad = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{title}: {len(bad)} {what} embeddings are not finite, first {bad[0]}")
    return F.normalize(x, dim=-1)


def shortlist(
    queries: torch.Tensor, images: torch.Tensor, at: Indices, k: int, first: torch.Tensor | None = None
) -> Shortlist:
    """The k best of the gallery for each query; first: columns that a re-ranking put ahead, as in score_blocks."""
    columns, values = [], []
    for rows, scores in score_blocks(queries, images, first):
        scores = scores[:, : at.gallery]
        top = best(scores, k, None if at.excluded is None else at.excluded[rows].to(scores.device))
        columns.append(top.cpu())
        values.append(scores.gather(1, top).cpu())
    return Shortlist(torch.cat(columns), torch.cat(values))


class Ranks(NamedTuple):
    """Where the right images of N queries stand, from 1."""

    target: torch.Tensor  # (N,) in the gallery; NEVER if it is not there
    subset: torch.Tensor | None = None  # CIRR: (N,) among the other members of img_set
    truths: torch.Tensor | None = None  # (N, G) of all right answers, -1 where a query has fewer; None: one each
    soft: torch.Tensor | None = None  # CIRR: (N, G) of the soft targets among the other members of img_set
    soft_values: torch.Tensor | None = None  # CIRR: (N, G) what each of them is worth

    def of(self, rows: torch.Tensor) -> "Ranks":
        """Those of the chosen queries: rows (n,) of indices or (N,) of bool."""
        return Ranks(*(part if part is None else part[rows] for part in self))


def measure(queries: torch.Tensor, images: torch.Tensor, at: Indices, first: torch.Tensor | None = None) -> Ranks:
    """Ranks of every query's right images; first: columns that a re-ranking put ahead, as in score_blocks."""
    ranks, subset, truths, soft = [], [], [], []
    for rows, scores in score_blocks(queries, images, first):  # (n, names)
        target = at.target[rows].to(scores.device)
        inside = torch.where(target < at.gallery, target, -1)
        excluded = None if at.excluded is None else at.excluded[rows].to(scores.device)
        ranks.append(rank(scores[:, : at.gallery], inside, excluded).cpu())
        if at.others is not None:
            others = at.others[rows].to(scores.device)  # (n, 5)
            right = (others == target[:, None]).int().argmax(1)
            among = scores.gather(1, others)
            subset.append(rank(among, right).cpu())
            if at.soft is not None:
                soft.append(_ranks_within(among, others, at.soft[rows].to(scores.device)).cpu())
        if at.truths is not None:
            known = at.truths[rows].to(scores.device).T  # (G, n); i-CIR's references lie outside the gallery
            each = [rank(scores[:, : at.gallery], t, excluded).cpu() for t in known]
            truths.append(torch.where(at.truths[rows] >= 0, torch.stack(each, dim=1), -1))
    parts = [torch.cat(part) if part else None for part in (ranks, subset, truths, soft)]
    return Ranks(*parts, at.soft_values)


def _ranks_within(among: torch.Tensor, others: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """among (n, 5): scores of the columns others (n, 5) -> ranks (n, G) of the columns soft (n, G); NEVER outside."""
    each = []
    for wanted in soft.T:  # (n,)
        here = others == wanted[:, None]
        each.append(rank(among, torch.where(here.any(1), here.int().argmax(1), -1)))
    return torch.stack(each, dim=1)


def best_rank(ranks: Ranks) -> torch.Tensor:
    """(N,) rank of the target; where a query has several right answers that of the best ranked one."""
    if ranks.truths is None:
        return ranks.target
    return torch.where(ranks.truths > 0, ranks.truths, NEVER).amin(1)


def recalls(ranks: Ranks, dataset: str = "") -> dict[str, float]:
    """Percent. CIRR: R@K, Rs@K, Avg = (R@5 + Rs@1) / 2, and Rs@K with soft targets where the split has them; CIRCO:
    mAP@K, and R@K of the target; FashionIQ: R@10, 50; one's own ("jsonl"): R@1, 5, 10, 50 of the best ranked target,
    and mAP@K where queries have several."""
    maps = {}
    if ranks.truths is not None:
        maps = {f"mAP@{k}": 100.0 * average_precision(ranks.truths, k).double().mean().item() for k in CIRCO_KS}
    if dataset == "jsonl":
        return {f"R@{k}": recall(best_rank(ranks), k) for k in CIRR_KS} | maps
    if maps:
        return maps | {f"R@{k}": recall(ranks.target, k) for k in CIRCO_KS}
    if ranks.subset is None:
        return {f"R@{k}": recall(ranks.target, k) for k in FASHIONIQ_KS}
    result = {f"R@{k}": recall(ranks.target, k) for k in CIRR_KS}
    result |= {f"Rs@{k}": recall(ranks.subset, k) for k in SUBSET_KS}
    result |= {"Avg": (result["R@5"] + result["Rs@1"]) / 2}
    if ranks.soft is not None:
        result |= {f"soft-Rs@{k}": soft_recall(ranks.soft, ranks.soft_values, k) for k in SUBSET_KS}
    return result


def mean_recalls(parts: list[dict[str, float]], dataset: str) -> dict[str, float]:
    """The mean over the parts of a benchmark, such as FashionIQ's categories, and FashionIQ's Avg."""
    mean = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    return mean | ({"Avg": (mean["R@10"] + mean["R@50"]) / 2} if dataset == "fashioniq" else {})


def aspect_maps(benchmark: Benchmark, ranks: Ranks) -> dict[str, float]:
    """CIRCO: mAP@10 in percent of the queries of each semantic aspect, in the order of their first query."""
    precision, of_aspect = average_precision(ranks.truths, 10).double().tolist(), {}
    for value, query in zip(precision, benchmark.queries, strict=True):
        for aspect in query.extra.get("aspects", ()):
            of_aspect.setdefault(aspect, []).append(value)
    return {aspect: 100.0 * sum(values) / len(values) for aspect, values in of_aspect.items()}


def evaluate(model: torch.nn.Module, benchmark: Benchmark, compute: Compute) -> dict[str, float]:
    """Recall in percent of a labelled benchmark; on all ranks together, each encoding its share of the images."""
    at = index(benchmark, keep_reference=True)
    if at.target is None:
        raise UserError(f"{benchmark.title} has no labels: nothing to measure")
    require_images(benchmark, at.names)
    queries, images = embed(model, benchmark, at, compute)
    return recalls(measure(queries, images, at), benchmark.dataset)


def protocol_of(dataset: str, protocol: str, keep_reference: bool, more: tuple[str, ...]) -> str:
    """One line that says what the gallery is, and whatever else is not as usual: it stands beside every number."""
    if dataset == "cirr":
        which = {"split": "every image of the split", "references": "only the images that are a query's reference"}
        says = f'protocol "{protocol}": gallery = {which[protocol]}, minus the query\'s own reference'
    elif dataset == "sessions":
        says = f"each turn asked alone: gallery = {protocol}, minus the turn's own reference"
    elif dataset == "icir":
        says = "gallery = the database of the query's instance"
    elif dataset == "jsonl":
        says = f"one's own triplets: gallery = {protocol}, minus the query's own reference"
    else:
        which = {"original": "the category's split file", "val": "candidates and targets of the category's captions"}
        which["unlabeled2017"] = "COCO's unlabelled images"
        kept = "kept in" if keep_reference else "left out of"
        says = f'protocol "{protocol}": gallery = {which[protocol]}, the reference {kept} it'
    return "; ".join([says, *more])
