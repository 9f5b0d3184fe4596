"""The files that the servers of CIRR and CIRCO take: written, looked through, and scored where labels are known."""

import json
import os
from collections.abc import Mapping

import torch

from common import pages
from common.annotations import Benchmark
from common.console import UserError, say
from common.files import file_sha256, read_json, write_json, write_text
from common.images import shown
from common.retrieval import (
    CIRR_KS,
    NEVER,
    SUBSET_KS,
    Indices,
    Ranks,
    aspect_maps,
    best,
    recall,
    recalls,
    score_blocks,
    shortlist,
    soft_recall,
    soft_targets,
)

SERVER_LIMIT = 5 * 10**6  # bytes of one upload to CIRR's server


def write_submission(
    folder: str,
    benchmark: Benchmark,
    queries: torch.Tensor,
    images: torch.Tensor,
    at: Indices,
    origin: dict,
    first=None,
) -> None:
    """CIRR: OUT/recall.json (50 names a query) and OUT/recall_subset.json (3 names), checked after writing. CIRCO:
    OUT/circo.json (50 image ids a query). The servers' formats have no room for the origin, which model answered by
    which protocol: it stands in OUT/submission.json with the hashes of the files."""
    if benchmark.dataset == "circo":
        top = shortlist(queries, images, at, 50, first).columns.tolist()
        ids = {str(q.id): [int(at.names[i]) for i in row] for q, row in zip(benchmark.queries, top, strict=True)}
        paths = [os.path.join(folder, "circo.json")]
        _write_compact(paths[0], ids)
        read_circo_submission(paths[0], benchmark)
        where = "https://circo.micc.unifi.it"
    else:
        paths = []
        for metric, lists in _cirr_lists(benchmark, queries, images, at, first).items():
            paths.append(path := os.path.join(folder, metric + ".json"))
            _write_compact(path, {"version": "rc2", "metric": metric} | lists)
            read_submission(path, benchmark, metric)
        where = "https://cirr.cecs.anu.edu.au"
    hashes = {os.path.basename(path): file_sha256(path) for path in paths}
    write_json(os.path.join(folder, "submission.json"), origin | {"files": hashes}, indent=1)
    say(f"{benchmark.title}, {origin['protocol']}\n{origin['checkpoint']}: sha256 {origin['sha256']}")
    say(f"{benchmark.title} has no labels: the server at {where} answers the files with the numbers")


def _cirr_lists(benchmark: Benchmark, queries: torch.Tensor, images: torch.Tensor, at: Indices, first) -> dict:
    """{"recall": {pairid: 50 names}, "recall_subset": {pairid: 3 names of its img_set}}, none of them the reference."""
    full, subset = {}, {}
    for rows, scores in score_blocks(queries, images, first):
        top = best(scores[:, : at.gallery], 50, at.excluded[rows].to(scores.device))
        others = at.others[rows].to(scores.device)
        within = others.gather(1, best(scores.gather(1, others), 3))
        for query, wide, narrow in zip(benchmark.queries[rows], top.tolist(), within.tolist(), strict=True):
            full[str(query.id)] = [at.names[i] for i in wide if at.names[i] != query.reference]
            subset[str(query.id)] = [at.names[i] for i in narrow]
    return {"recall": full, "recall_subset": subset}


def _write_compact(path: str, record: dict) -> None:
    """JSON without spaces: indented, recall.json would pass the server's 5 MB."""
    write_text(path, json.dumps(record, separators=(",", ":")))
    say(f"wrote {path} ({os.path.getsize(path):,} bytes)")


def read_submission(path: str, benchmark: Benchmark, metric: str) -> dict[str, list[str]]:
    """A file in the server's format, metric "recall" or "recall_subset" -> pairid -> names; UserError if it is not."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{path}: {what}")

    size = os.path.getsize(path)
    require(size <= SERVER_LIMIT, f"{size:,} bytes, the server takes {SERVER_LIMIT:,}: write it without indentation")
    record = read_json(path)
    require(isinstance(record, dict), f"found a {type(record).__name__}, wanted an object of pairid: names")
    for key, wanted in (("version", "rc2"), ("metric", metric)):
        require(record.get(key) == wanted, f"{key} is {record.get(key)!r}, wanted {wanted!r}")
    lists = {key: value for key, value in record.items() if key not in ("version", "metric")}
    asked = {str(query.id): query for query in benchmark.queries}
    require_ids(path, lists, benchmark, "pairids")
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


def require_ids(path: str, lists: Mapping[str, object], benchmark: Benchmark, what: str) -> None:
    """UserError unless a file for a server answers each query of the benchmark, by its id, and no other."""
    asked = {str(query.id) for query in benchmark.queries}
    for says, ids in (("lacks", asked - lists.keys()), ("has unknown", lists.keys() - asked)):
        if ids:
            found = f"{len(ids)} of the {len(asked)} {what} of {benchmark.title}"
            raise UserError(f"{path}: {says} {found}: {sorted(ids)[:3]}")


def read_circo_submission(path: str, benchmark: Benchmark) -> dict[str, list[str]]:
    """A file in the format of CIRCO's server, query id -> 50 image ids -> the same with names; UserError if it is not.

    Source of the format: the README and src/evaluation.py of CIRCO's authors."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path}: found {shown(record)}, wanted an object of query id: image ids")
    require_ids(path, record, benchmark, "ids")
    gallery, lists = set(benchmark.gallery), {}
    most = min(50, len(gallery))
    for id in (str(query.id) for query in benchmark.queries):
        found = record[id]
        if not isinstance(found, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise UserError(f"{path}: query {id}: wanted a list of image ids, found {str(found)[:80]}")
        names = [f"{i:012d}" for i in found]
        if len(names) != most:
            raise UserError(f"{path}: query {id}: {len(names)} image ids, wanted {most}")
        if len(set(names)) < len(names):
            raise UserError(f"{path}: query {id}: an image id stands twice")
        if stray := [name for name in names if name not in gallery]:
            raise UserError(f"{path}: query {id}: {stray[0]} is not in the gallery")
        lists[id] = names
    return lists


def _places(names: list[str], wanted: list[str]) -> list[int]:
    """From 1; NEVER for what is not listed."""
    return [names.index(name) + 1 if name in names else NEVER for name in wanted]


def score_circo(path: str, benchmark: Benchmark) -> tuple[dict[str, float], dict[str, float]]:
    """mAP@K and R@K in percent, and mAP@10 by semantic aspect; both empty where the labels are hidden."""
    lists = read_circo_submission(path, benchmark)
    if any(query.target is None for query in benchmark.queries):
        return {}, {}
    rows = [_places(lists[str(q.id)], list(q.truths)) for q in benchmark.queries]
    widest = max(map(len, rows))
    target = [_places(lists[str(q.id)], [q.target])[0] for q in benchmark.queries]
    truths = torch.tensor([row + [-1] * (widest - len(row)) for row in rows])
    ranks = Ranks(torch.tensor(target), truths=truths)
    return recalls(ranks), aspect_maps(benchmark, ranks)


def score_submission(path: str, benchmark: Benchmark, metric: str) -> dict[str, float]:
    """Recall in percent of a file in the format of CIRR's server; empty where the labels are hidden, which it judges.

    metric "recall_subset": also with soft targets, where the split has them."""
    lists = read_submission(path, benchmark, metric)
    if any(query.target is None for query in benchmark.queries):
        return {}
    ranks = torch.tensor([_places(lists[str(query.id)], [query.target])[0] for query in benchmark.queries])
    if metric == "recall":
        return {f"R@{k}": recall(ranks, k) for k in CIRR_KS}
    result = {f"Rs@{k}": recall(ranks, k) for k in SUBSET_KS}
    if soft := soft_targets(benchmark.queries):
        rows = [_places(lists[str(q.id)], names) for q, names in zip(benchmark.queries, soft.names, strict=True)]
        widest = soft.values.shape[1]
        places = torch.tensor([row + [NEVER] * (widest - len(row)) for row in rows])
        result |= {f"soft-Rs@{k}": soft_recall(places, soft.values, k) for k in SUBSET_KS}
    return result


def score(benchmark: Benchmark, files: tuple[str, ...], protocol: str) -> None:
    """Prints the numbers of one or both files of CIRR, with its average, or of one of CIRCO.

    Of a split whose labels are hidden: whether the server will take them."""
    if benchmark.dataset not in ("cirr", "circo"):
        raise UserError("--score takes files of CIRR's and CIRCO's servers; found --dataset " + benchmark.dataset)
    numbers, given, aspects = {}, {}, {}
    for path in files:
        metric = "mAP"
        if benchmark.dataset == "cirr":
            record = read_json(path)
            subset = isinstance(record, dict) and record.get("metric") == "recall_subset"
            metric = "recall_subset" if subset else "recall"
        if metric in given:
            raise UserError(f"--score: {given[metric]} and {path} both hold {metric}; give one file of each")
        given[metric] = path
        if benchmark.dataset == "circo":
            numbers, aspects = score_circo(path, benchmark)
        else:
            numbers |= score_submission(path, benchmark, metric)
    if not numbers:
        say(f"{', '.join(files)}: as the server of {benchmark.title} wants it; only the server knows the labels")
        return
    if {"R@5", "Rs@1"} <= numbers.keys():
        numbers["Avg"] = (numbers["R@5"] + numbers["Rs@1"]) / 2
    row = [benchmark.title, *numbers.values(), len(benchmark.queries), len(benchmark.gallery)]
    say(protocol + "\n" + pages.text_table([row], ["", *numbers, "queries", "gallery"]))
    if aspects:
        say("mAP@10 by semantic aspect\n" + pages.text_table([[*aspects.values()]], [*aspects]))
