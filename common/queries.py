"""Which queries are asked: all of a benchmark, those that a file lists, or all the other way round."""

import dataclasses
from collections import Counter
from pathlib import Path

from common.annotations import Benchmark
from common.console import UserError
from common.files import read_json, read_lines
from common.images import shown
from common.triplets import read_triplets


def read_ids(file: str) -> list[str]:
    """Ids of queries as text: a JSON list of strings or whole numbers, or one id a line."""
    if not Path(file).is_file():
        raise UserError(f"--queries {file}: no such file; name one with a JSON list of ids, or one id a line")
    ids = read_lines(file, "--queries")
    if ids and ids[0].startswith(("[", "{")):
        ids = read_json(file)
        if not isinstance(ids, list) or not all(isinstance(id, int | str) and not isinstance(id, bool) for id in ids):
            raise UserError(f"--queries {file}: wanted a JSON list of ids, each a string or a whole number")
    ids = [str(id) for id in ids]
    if not ids:
        raise UserError(f"--queries {file}: lists no query")
    if twice := sorted({id for id in ids if ids.count(id) > 1}) if len(set(ids)) < len(ids) else []:
        raise UserError(f"--queries {file}: {len(twice):,} ids stand twice, first {shown(twice[0])}; list each once")
    return ids


def select_queries(benchmarks: list[Benchmark], file: str) -> tuple[list[Benchmark], str]:
    """The benchmarks with only those queries that the file lists, and what the protocol line says of it.

    The galleries stay whole. UserError for an id that no query has, or several have; a category of which none is listed
    is dropped.
    """
    wanted = set(read_ids(file))
    known = [str(query.id) for benchmark in benchmarks for query in benchmark.queries]
    if strange := sorted(wanted - set(known)):
        first = f"{len(strange):,} of {len(wanted):,} ids are not queries of {benchmarks[0].title}"
        raise UserError(f"--queries {file}: {first}, first {shown(strange[0])}; ids look like {shown(known[0])}")
    if twice := [id for id, count in Counter(known).items() if count > 1 and id in wanted]:
        first = f"{len(twice):,} ids name several queries of {benchmarks[0].title}, first {shown(twice[0])}"
        raise UserError(f"--queries {file}: {first}; give each query an id of its own")
    kept = []
    for benchmark in benchmarks:
        queries = tuple(query for query in benchmark.queries if str(query.id) in wanted)
        if queries:
            kept.append(dataclasses.replace(benchmark, queries=queries))
    return kept, f"only the {len(wanted):,} of {len(known):,} queries that {file} lists"


def reversed_queries(benchmark: Benchmark, text_file: str) -> Benchmark:
    """Queries target + text -> reference; with a file, its reverse_delta of each pair is the text."""
    if benchmark.dataset == "circo" or any(query.target is None for query in benchmark.queries):
        raise UserError(f"--reversed: {benchmark.title} has no single known target; take CIRR or FashionIQ val")
    triplets = read_triplets(text_file) if text_file else []
    texts = {(t.reference, t.target): t.extra.get("reverse_delta") for t in triplets}
    queries = []
    for q in benchmark.queries:
        delta = texts.get((q.reference, q.target)) if text_file else q.delta
        if delta is None:
            raise UserError(f"{text_file}: no reverse_delta for {q.reference} -> {q.target}; make it for all")
        extra = {key: value for key, value in (q.extra or {}).items() if key != "target_soft"}  # of forward queries
        there = {"reference": q.target, "target": q.reference, "truths": ()}
        queries.append(dataclasses.replace(q, delta=delta, extra=extra, **there))
    return dataclasses.replace(benchmark, queries=tuple(queries))
