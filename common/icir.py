"""i-CIR (Psomas et al., NeurIPS 2025, arXiv 2510.25387): its two csv files, and its three means of average precision.

An instance is one object. Its queries, pictures of it each with a text, search the instance's own database; right is
what the database file gives the same instance and the same text. One benchmark an instance."""

import csv
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from common.annotations import Benchmark
from common.console import UserError, say
from common.images import ImageStore, open_store, safe_name, shown
from common.retrieval import Ranks
from common.triplets import Triplet

QUERIES, INSTANCES = 1883, 202  # as published, v1.0.0


class Row(NamedTuple):
    """A line of query_files.csv or database_files.csv."""

    image: str
    text: str
    instance: str


def read_icir(root: str, images: str | None = None, official: bool = True) -> list[Benchmark]:
    """ROOT/{query,database}_files.csv, or in ROOT/annotations: lines of image,text,instance without a header.

    A path counts from ROOT's parent, as the authors' code reads it, or from ROOT, its first folder left out if need be.
    A query's truths are its right images, the target the first. UserError with `official` for other counts than
    published, and for a query without a right image."""
    folder = next((place for place in (root, f"{root}/annotations") if os.path.isfile(f"{place}/query_files.csv")), "")
    if not folder:
        raise UserError(f"--root {root or chr(34) * 2}: no query_files.csv, here or in annotations/; it is i-CIR's")
    queries, database = (list(read_rows(f"{folder}/{name}_files.csv")) for name in ("query", "database"))
    store = open_store(images, [os.path.dirname(os.path.abspath(root)), root])
    if not images and os.path.isdir(f"{root}/webdataset"):
        raise UserError(f"{root}/webdataset holds shards; extract them (tar -xf) and name their folder with --images")
    queries, database = (named(rows, store) for rows in (queries, database))
    found = len(queries), len({row.instance for row in queries})
    if official and found != (QUERIES, INSTANCES):
        counts = f"found {found[0]:,} queries of {found[1]:,} instances, published are {QUERIES:,} of {INSTANCES}"
        raise UserError(f"{folder}: {counts}; --official false for other data in the same layout")

    galleries: dict[str, dict[str, set[str]]] = {}  # instance -> image -> its texts
    for row in database:
        galleries.setdefault(row.instance, {}).setdefault(row.image, set()).add(row.text)
    twice = len(database) - sum(map(len, galleries.values()))
    if twice:
        again = f"{twice:,} lines name an image of their instance again"
        say(f"{folder}/database_files.csv: {again}; it is searched once")
    asked: dict[str, list[Triplet]] = {}
    for i, row in enumerate(queries):
        gallery = galleries.get(row.instance, {})
        truths = tuple(image for image, texts in gallery.items() if row.text in texts)
        if not row.text or not truths:
            text = f"{shown(row.text)} of {shown(row.instance)}"
            raise UserError(f"{folder}/query_files.csv, line {i + 1}: the database has no image of {text}")
        query = Triplet(row.image, truths[0], row.text, f"{row.instance}-{i}", truths=truths)
        asked.setdefault(row.instance, []).append(query)
    return [Benchmark("icir", "", one, tuple(asked[one]), tuple(galleries[one]), store) for one in asked]


def read_rows(path: str) -> Iterator[Row]:
    """Lines of three fields; a text that holds a comma or a quote stands in quotes."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found; i-CIR has query_files.csv and database_files.csv")
    wanted, number = "wanted image,text,instance", 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            for number, fields in enumerate(csv.reader(file, strict=True), 1):
                if len(fields) != 3 or not fields[0] or not fields[2]:  # an image that nobody asks for has no text
                    raise UserError(f"{path}, line {number}: found {shown(fields)}, {wanted}")
                yield Row(safe_name(fields[0], f"{path}, line {number}"), fields[1].strip(), fields[2].strip())
        except (UnicodeDecodeError, csv.Error) as fault:
            raise UserError(f"{path}, after line {number}: {fault}; {wanted} in UTF-8") from None


def named(rows: list[Row], store: ImageStore) -> list[Row]:
    """The rows, their images without the first folder where only that is found: it may have been renamed."""
    if rows and store.missing([rows[0].image]):
        shorter = [row._replace(image=row.image.partition("/")[2]) for row in rows]
        if shorter[0].image and not store.missing([shorter[0].image]):
            return shorter
    return rows


def average_precision(ranks: torch.Tensor) -> torch.Tensor:
    """ranks (N, G) from 1 of each query's right images, -1 where it has fewer -> AP (N,) float64, in 0..1.

    The area under precision over recall by the trapezoidal rule, as the authors' code has it (utils.py, without its
    1e-5 in the denominator): the j-th right image, at place r, adds the mean of (j - 1) / (r - 1) and j / r."""
    there = ranks > 0
    places = torch.where(there, ranks, 2**62).double().sort(dim=1).values  # (N, G)
    j = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64)
    before = torch.where(places > 1, (j - 1) / (places - 1).clamp(min=1), 1.0)
    mean = (before + j / places) / 2
    return torch.where(j <= there.sum(1, keepdim=True), mean, 0.0).sum(1) / there.sum(1)


def icir_maps(parts: list[Ranks]) -> dict[str, float]:
    """Percent, of the ranks of all instances: mAP over the queries, mmAP the mean of the instances' means, minmAP the
    mean of their worst queries."""
    found = [average_precision(part.truths) for part in parts]
    count = len(found)
    maps = {"mAP": torch.cat(found).mean(), "mmAP": sum(one.mean() for one in found) / count}
    maps["minmAP"] = sum(one.min() for one in found) / count
    return {name: 100.0 * value.item() for name, value in maps.items()}
