"""Queries of search.py that stand in a file: read as triplets are, though either part may be missing, and answered."""

from collections.abc import Iterator
from typing import NamedTuple

from common.batches import chunks
from common.console import UserError, progress, say
from common.files import file_sha256, write_jsonl
from common.gallery import Engine, Query, find
from common.images import ImageStore, safe_name, shown
from common.triplets import KNOWN, delta_key, read_records, split_paths, spoken

_BESIDE = ("subgroup", "score", "flags", "results")  # what pairs of mine_pairs.py and a search before say beside


class Asked(NamedTuple):
    """A query of a file."""

    record: dict  # as it stands there
    path: str  # of its reference; "" for none
    text: str  # "" for none


def read_asked(file: str, folder: str) -> list[Asked]:
    """The queries of a file that read_triplets could read, or of several; pictures are looked for in `folder`.

    Either part may be missing. UserError for a record with neither, and for one that lacks a part and has a key that
    nobody reads: it may be that part, misspelt."""
    store = ImageStore(folder, own=True)
    return [
        Asked(record, store.path(name) if name else "", text)
        for part in split_paths(file)
        for record, name, text in _parts(part)
    ]


def _parts(file: str) -> Iterator[tuple[dict, str, str]]:
    """(record, reference, text) of each record."""
    for where, record in read_records(file):
        name, key = record.get("reference"), delta_key(record)
        said = record.get(key)
        known = {*KNOWN, *_BESIDE} - {"caption"} | {key}
        strange = [other for other in record if other not in known]
        lacks = [part for part, value in (("reference", name), (key, said)) if value is None]
        if lacks and strange:
            raise UserError(f'{where}: has no "{lacks[0]}", but {", ".join(map(shown, strange))}, which nobody reads')

        # an empty part is none
        if name not in (None, ""):
            name = safe_name(name, f'{where}: "reference"')
        text = "" if said is None else spoken(said, key, where)[0].strip()
        if not (name or text):
            raise UserError(f'{where}: wanted "reference" (a name), "delta" (a text), or both')
        yield record, name or "", text


def answer(engine: Engine, asked: list[Asked], out: str, top: int) -> None:
    """Writes the record of each query with its results: [{"name", "score"}], best first."""
    queries, answers = [], []
    for _, path, text in asked:
        own = engine.gallery.ids.get(file_sha256(path), -1) if path else -1
        queries.append(Query(path, (text,) if text else (), own))
    for part in chunks(progress(list(zip(asked, queries, strict=True)), "answering"), engine.compute.batch):
        for (one, _), found in zip(part, find(engine, [query for _, query in part], top), strict=True):
            named = [{"name": engine.gallery.names[id], "score": round(score, 6)} for id, score in found]
            answers.append(one.record | {"results": named})
    write_jsonl(out, answers)
    say(f"wrote {out}: {len(answers):,} queries, {top} pictures each at most")
