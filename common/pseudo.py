"""Pseudo triplets as queries: which of them does a model find in their own subgroup? [ours]"""

import dataclasses
import glob
import os
from typing import NamedTuple

import torch

from common.annotations import Benchmark, training_triplets
from common.console import UserError
from common.copies import same_pictures
from common.encoding import Compute
from common.files import read_json, read_jsonl
from common.retrieval import Indices, embed


class Pseudo(NamedTuple):
    """What gen_deltas.py wrote."""

    records: list[dict]  # lines of pseudo.jsonl
    benchmark: Benchmark  # the same as queries with the members of their subgroups; its gallery is all these members


def read_pseudo(folder: str, images: str) -> Pseudo:
    """pseudo.jsonl with the subgroups that cirr/captions/cap.rc2.SPLIT.json beside it knows by the pair's id."""
    path = os.path.join(folder, "pseudo.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"{path} not found; --filter wants a folder written by gen_deltas.py")
    triplets, store = training_triplets("jsonl", path, "", images=images or None)
    captions = glob.glob(os.path.join(glob.escape(folder), "cirr", "captions", "cap.rc2.*.json"))
    if len(captions) != 1:
        raise UserError(f"{folder}/cirr/captions holds {len(captions)} cap.rc2.SPLIT.json, wanted one, with subgroups")
    known = {record["pairid"]: record for record in read_json(captions[0])}

    queries = []
    for t in triplets:
        record = known.get(t.id, {})
        members = record.get("img_set", {}).get("members", ())
        if (record.get("reference"), record.get("target_hard")) != (t.reference, t.target):
            raise UserError(f"--filter: pair {t.id} is not in {captions[0]}; run gen_deltas.py again")
        if not set(members) - {t.reference, t.target}:
            raise UserError(
                f"--filter: pair {t.id} has no subgroup; gen_deltas.py wants subgroups.jsonl beside --pairs"
            )
        queries.append(dataclasses.replace(t, members=tuple(members)))
    gallery = tuple(dict.fromkeys(name for query in queries for name in query.members))
    if missing := store.missing(gallery):
        found = f"{len(missing):,} of {len(gallery):,} images of the subgroups are missing, first {missing[0]!r}"
        raise UserError(f"--filter: {found}; name their folder with --images")
    split = os.path.basename(captions[0]).split(".")[2]
    return Pseudo(read_jsonl(path), Benchmark("pseudo", split, None, tuple(queries), gallery, store))


def subgroup_ranks(model: torch.nn.Module, benchmark: Benchmark, compute: Compute) -> list[int]:
    """Place of each target, 1 the best, among its subgroup less the reference; ties count against it.

    Each image is encoded once, by one of the ranks; call it on all of them. Copies of a picture have one score, also
    where a product of matrices rounds each row of a batch in its own way."""
    place = {name: i for i, name in enumerate(benchmark.gallery)}
    row = list(range(len(benchmark.gallery)))  # whose embedding stands for each
    for group in same_pictures(benchmark.images, benchmark.gallery):
        for i in group:
            row[i] = group[0]
    references = torch.tensor([place[query.reference] for query in benchmark.queries])
    at = Indices(benchmark.gallery, len(benchmark.gallery), references, target=None, others=None, excluded=None)
    queries, images = (embedded.cpu() for embedded in embed(model, benchmark, at, compute))
    ranks = []
    for query, c in zip(benchmark.queries, queries, strict=True):
        others = [name for name in query.members if name not in (query.reference, query.target)]
        # picture by picture, so that equal ones tie; of one with several vectors the best
        rows = [row[place[name]] for name in (query.target, *others)]
        scores = (images[rows] * c).sum(-1).reshape(len(rows), -1).amax(1)
        ranks.append(int((scores >= scores[0]).sum()))
    return ranks
