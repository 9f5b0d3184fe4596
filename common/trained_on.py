"""Which pairs a checkpoint was trained on, as hashes: whoever measures it hears of queries that it has seen.

A pair is known by its two files, whatever the text, and by the names and sizes of its pictures with the text, wherever
they lie: a copy of the triplets, a part of them, or pictures that moved hide nothing. The hashes tell no names."""

import functools
import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator

import torch

from common.annotations import Benchmark
from common.console import say
from common.files import load_tensors
from common.images import ImageStore
from common.streams import Source
from common.triplets import plain_text

FILE = "trained_on.safetensors"  # beside model.safetensors: {"pairs": (N,) int64, sorted}


def _keys(reference: str, target: str, texts: tuple[str, ...], files: tuple[tuple, tuple]) -> Iterator[int]:
    """The hashes by which a triplet is known; files: of _file, of its two pictures."""
    if all(files):
        yield _hash("files", *(path for path, _ in files))
    names = (unicodedata.normalize("NFC", name) for name in (reference, target))  # macOS takes accents apart
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    sizes = [str(size) for _, size in filter(None, files)]  # each product may have a front.jpg and a back.jpg
    for text in texts:
        yield _hash("words", *stems, *sizes, plain_text(text))


def _file(store: ImageStore, name: str) -> tuple:
    """Real path and bytes of a picture's file; empty where it is not there."""
    path = store.find(name)
    return (os.path.realpath(path), os.path.getsize(path)) if path else ()


def _hash(*parts: str) -> int:
    digest = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], signed=True)


def trained_pairs(sources: list[Source], start: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """FILE and its content, for save_folder: all triplets of the sources, with all texts that may be drawn, and those
    of the checkpoint `start` that training begins from. Nothing where that one does not say what it was trained on."""
    keys = _of_checkpoint(start) if start else set()
    if keys is None:
        say(f"{start} has no {FILE}: what this checkpoint was trained on will not be known")
        return {}
    return {FILE: {"pairs": torch.tensor(sorted(keys | _of_sources(sources)), dtype=torch.int64)}}


def _of_sources(sources: list[Source]) -> set[int]:
    file_of, keys = functools.cache(lambda stream, name: _file(sources[stream].images, name)), set()
    for item in (item for source in sources for item in source.items):
        texts = tuple(text for group in item.deltas for text in group)
        files = file_of(*item.reference), file_of(*item.target)
        keys.update(_keys(item.reference[1], item.target[1], texts, files))
    return keys


def _of_checkpoint(checkpoint: str) -> set[int] | None:
    """None: it does not say."""
    if not os.path.isfile(os.path.join(checkpoint, FILE)):
        return None
    return set(load_tensors(checkpoint, FILE)["pairs"].tolist())


def _note(who: str, keys: set[int], benchmarks: list[Benchmark]) -> str:
    """How many of the queries lead along a pair of `who`; empty where none does, or where their targets are hidden."""
    queries = [(query, b.images) for b in benchmarks for query in b.queries if query.target is not None]
    seen = 0
    for query, images in queries:
        targets = dict.fromkeys([query.target, *query.truths])
        file = _file(images, query.reference)
        own = (_keys(query.reference, name, (query.delta,), (file, _file(images, name))) for name in targets)
        seen += any(key in keys for key in itertools.chain(*own))
    return f"{who} on the pairs of {seen:,} of these {len(queries):,} queries" if seen else ""


def note_of_seen(checkpoint: str, benchmarks: list[Benchmark]) -> str:
    """For the protocol line of a checkpoint: how many of the queries it was trained on; empty where on none."""
    if not checkpoint or all(query.target is None for b in benchmarks for query in b.queries):
        return ""
    if (keys := _of_checkpoint(checkpoint)) is None:
        return f"what the checkpoint was trained on is not known: it has no {FILE}"
    return _note("the checkpoint was trained", keys, benchmarks)


def note_of_overlap(sources: list[Source], benchmarks: list[Benchmark]) -> str:
    """For the protocol line of a validation: the same of what is trained on now."""
    return _note("the model trains", _of_sources(sources), benchmarks) if benchmarks else ""
