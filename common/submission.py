"""The files that the servers of CIRR and CIRCO take: written from rankings, and scored where the labels are known."""

import json
import os

import torch

from common.annotations import Benchmark, read_submission
from common.console import UserError, say
from common.files import write_text
from common.retrieval import CIRR_KS, NEVER, SUBSET_KS, Indices, best, recall, score_blocks, shortlist


def write_submission(
    folder: str, benchmark: Benchmark, queries: torch.Tensor, images: torch.Tensor, at: Indices, first=None
) -> None:
    """CIRR: OUT/recall.json (50 names a query) and OUT/recall_subset.json (3 names), checked after writing. CIRCO:
    OUT/circo.json (50 image ids a query)."""
    if benchmark.dataset == "circo":
        top = shortlist(queries, images, at, 50, first).columns.tolist()
        ids = {str(q.id): [int(at.names[i]) for i in row] for q, row in zip(benchmark.queries, top, strict=True)}
        _write_compact(os.path.join(folder, "circo.json"), ids)
        where = "https://circo.micc.unifi.it"
    else:
        for metric, lists in _cirr_lists(benchmark, queries, images, at, first).items():
            path = os.path.join(folder, metric + ".json")
            _write_compact(path, {"version": "rc2", "metric": metric} | lists)
            read_submission(path, benchmark, metric)
        where = "https://cirr.cecs.anu.edu.au"
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


def score_submission(path: str, benchmark: Benchmark, metric: str) -> dict[str, float]:
    """Recall in percent of a file in the server's format against a labelled split."""
    if any(query.target is None for query in benchmark.queries):
        raise UserError(f"{benchmark.title} has no labels: only the server can score it")
    lists = read_submission(path, benchmark, metric)
    ranked = [(lists[str(query.id)], query.target) for query in benchmark.queries]
    ranks = torch.tensor([names.index(target) + 1 if target in names else NEVER for names, target in ranked])
    letter, ks = ("R", CIRR_KS) if metric == "recall" else ("Rs", SUBSET_KS)
    return {f"{letter}@{k}": recall(ranks, k) for k in ks}
