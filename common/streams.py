"""Triplets to train a CIR model on, in two streams, human and pseudo: items, draws, global batches."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from common.annotations import (
    Benchmark,
    Triplet,
    held_of,
    join_captions,
    names_of,
    own_store,
    read_triplets,
    training_triplets,
)
from common.batches import drop_missing, epoch_order
from common.console import UserError, say
from common.images import OWN_MISSING, ImageStore, report_of, unreadable, write_faults
from common.ranks import World
from common.seeds import seeded_rng
from common.triplets import pairs_of, with_text


class Item(NamedTuple):
    """A triplet to train on; images as (store, name), deltas in groups: a group is drawn, then one of it."""

    reference: tuple[int, str]
    target: tuple[int, str]
    deltas: tuple[tuple[str, ...], ...]
    back: tuple[str, ...] = ()  # texts that lead from the target back to the reference, where VDG wrote any
    negatives: tuple[tuple[int, str], ...] = ()  # images that others call hard negatives (--keys negatives=hns)


class Draw(NamedTuple):
    """An item of one step, with the key of its randomness."""

    reference: tuple[int, str]
    target: tuple[int, str]
    delta: str
    key: tuple[int, int, int]  # stream (0 human, 1 auxiliary), epoch, item
    back: str = ""


def human_deltas(triplet: Triplet, dataset: str) -> tuple[str, ...]:
    """What a human wrote; FashionIQ's two captions as CLIP4Cir trains on them: both, swapped, each alone that is not
    blank."""
    if dataset != "fashioniq":
        return (triplet.delta,)
    one, two = triplet.alternatives
    texts = join_captions(one, two), join_captions(two, one), join_captions(one), join_captions(two)
    return tuple(text for text in texts if text)


def backs(triplets: Iterable[Triplet]) -> tuple[str, ...]:
    """The reverse_delta of each that has one which says something."""
    texts = ((t.extra or {}).get("reverse_delta") for t in triplets)
    return tuple(text for text in texts if isinstance(text, str) and text.strip())


def human_items(
    triplets: list[Triplet], dataset: str, generated: list[Triplet], deltas: bool = True, alike: bool = False
) -> list[Item]:
    """Human triplets; generated deltas of the same pairs are a second group (dagger: one of the two is drawn).

    deltas: False takes only the reversed texts of what was generated. alike: several texts of a triplet count alike, as
    in files of others; otherwise those after the first are generated ones."""
    also: dict[tuple[str, str], list[Triplet]] = {}
    for t in generated:
        also.setdefault((t.reference, t.target), []).append(t)
    items = []
    for t in triplets:
        groups, same = [human_deltas(t, dataset)], also.get((t.reference, t.target), [])
        if dataset == "jsonl" and t.alternatives and alike:
            groups = [(t.delta, *t.alternatives)]
        elif dataset == "jsonl" and t.alternatives:
            groups.append(t.alternatives)  # the VDG release's [human, generated]: those after the human one
        if same and deltas:
            groups.append(tuple(other.delta for other in same))
        items.append(Item((0, t.reference), (0, t.target), tuple(groups), backs([t, *same]), negatives_of(t, 0)))
    without = sum((t.reference, t.target) not in also for t in triplets)
    if generated and without == len(triplets):
        raise UserError("--same_pairs: none of its (reference, target) pairs is a human triplet's; wrong file?")
    if generated and without:
        say(f"{without:,} of {len(triplets):,} human triplets have no generated delta in --same_pairs")
    return items


class Source(NamedTuple):
    """One stream of triplets to train on, and where its images lie."""

    images: ImageStore = ImageStore([])
    items: Sequence[Item] = ()  # none: nothing of this stream is trained on
    # images of the references and targets that are held out: no stream may train on such a pair
    held: Sequence[tuple[tuple[int, str], ...]] = ()


_STREAMS = ("human", "auxiliary")


def human_source(
    dataset: str,
    root: str,
    split: str,
    images: str,
    same_pairs: str = "",
    same_deltas: bool = True,
    keys: str = "",
    pool: str = "",
    hold_out: float = 0,
) -> Source:
    """Stream 0, human triplets. same_pairs: a pseudo.jsonl of the same pairs, if not empty; same_deltas: False takes
    only its reversed texts; keys, pool, hold_out: of training_triplets."""
    if not root:
        raise UserError("--root is empty: where the triplets lie, or --triplets false with --pseudo")
    triplets, store = training_triplets(dataset, root, split, "all", images or None, keys, pool, hold_out)
    same = with_text(read_triplets(same_pairs), same_pairs) if same_pairs else []
    said = [t for t in triplets if t.delta.strip()]
    if len(said) < len(triplets):
        say(f"{root}: {len(triplets) - len(said):,} of {len(triplets):,} triplets have no text and are left out")
    if not said:
        raise UserError(f"{root} holds no triplet to train on")
    apart = held_source(root, images, keys, pool, hold_out).held if dataset == "jsonl" and hold_out else ()
    return Source(store, human_items(said, dataset, same, same_deltas, alike=bool(keys)), apart)


def held_source(root: str, images: str, keys: str, pool: str, hold_out: float) -> Source:
    """Nothing to train on; the pairs of one's own triplets that --hold_out keeps."""
    held = [((0, one), (0, other)) for t in held_of(root, keys, pool, hold_out) for one, other in pairs_of(t)]
    return Source(own_store(root, images or None), held=held)


def pseudo_source(file: str, images: str, keys: str = "", pool: str = "") -> Source:
    """Stream 1, auxiliary pseudo triplets: those that say something. keys, pool: of training_triplets."""
    triplets, store = training_triplets("jsonl", file, "", "all", images or None, keys, pool)
    kept = with_text(triplets, file)
    if not kept:
        raise UserError(f"{file} holds no triplet to train on")
    items = []
    for t in kept:
        texts = (t.delta, *t.alternatives)
        items.append(Item((1, t.reference), (1, t.target), (texts,), backs([t]), negatives_of(t, 1)))
    return Source(store, items)


def negatives_of(triplet: Triplet, stream: int) -> tuple[tuple[int, str], ...]:
    """Its hard negatives, where its file names any; only a bank makes use of them."""
    return tuple((stream, name) for name in (triplet.extra or {}).get("negatives", ()))


def _names(item: Item) -> tuple[str, ...]:
    return item.reference[1], item.target[1]


def _names_with_negatives(item: Item) -> tuple[str, ...]:
    return (*_names(item), *(name for _, name in item.negatives))


def complete_sources(
    sources: list[Source], batch: int, ranks: int, out: str, workers: int, bank: bool = False
) -> list[Source]:
    """The same with only those triplets whose images are there; UserError if they do not make one batch a rank.

    UserError too where no step has a negative, unless there is a `bank` of them.

    What cannot be read of one's own pictures is in out/unreadable-human.txt and unreadable-auxiliary.txt."""
    complete = []
    for source, what in zip(sources, _STREAMS, strict=True):
        listing = f"{out}/unreadable-{what}.txt"
        names = _names_with_negatives if bank else _names
        items = drop_missing(source.items, names, source.images, f"{what} triplets", listing, workers)
        complete.append(source._replace(items=items))
    complete = without_held(one_name_each(complete, bank))
    fewest = min(len(source.items) for source in complete if source.items)
    if fewest < batch * ranks:
        raise UserError(f"{fewest} triplets are fewer than {batch} on each of {ranks} ranks: lower --batch")
    targets = {item.target for source in complete for item in source.items}
    a_step = batch * ranks * sum(bool(source.items) for source in complete)
    if not bank and (a_step < 2 or len(targets) < 2):
        raise UserError("every step has one target, and no negative to tell it from: nothing is learned; raise --batch")
    return complete


def without_held(sources: list[Source]) -> list[Source]:
    """The same, of one name each, without the items that lead along a pair which is held out."""
    held, kept = {pair for source in sources for pair in source.held}, []
    for source, what in zip(sources, _STREAMS, strict=True):
        items = [item for item in source.items if (item.reference, item.target) not in held]
        if len(items) < len(source.items):
            lost = f"{len(source.items) - len(items):,} of {len(source.items):,} {what} triplets"
            say(f"{lost} are of pairs that --hold_out keeps for evaluation: left out")
        kept.append(source._replace(items=items))
    return kept


def one_name_each(sources: list[Source], bank: bool) -> list[Source]:
    """The same, where several names lead to one file, in one stream or in both, each time by the first of them: a
    picture is no negative of itself, and is encoded once. bank: negatives are there, and renamed as well."""
    first: dict[str, tuple[int, str]] = {}

    def named(image: tuple[int, str]) -> tuple[int, str]:
        return first.setdefault(os.path.realpath(sources[image[0]].images.path(image[1])), image)

    renamed = []
    for source in sources:
        items = [item._replace(reference=named(item.reference), target=named(item.target)) for item in source.items]
        if bank:
            items = [item._replace(negatives=tuple(map(named, item.negatives))) for item in items]
        renamed.append(source._replace(items=items))

    # what is held out follows, and gives no picture its name; where one is missing nothing can train on the pair
    for stream, source in enumerate(sources):
        there = [pair for pair in source.held if not source.images.missing(name for _, name in pair)]
        renamed[stream] = renamed[stream]._replace(held=[tuple(map(named, pair)) for pair in there])
    return renamed


def draw(items: list[Item], stream: int, step: int, batch: int, seed: int) -> list[Draw]:
    """A step's global batch: a function of its arguments alone, so resume needs no state and every rank knows all."""
    per_epoch = len(items) // batch  # the last, short batch of an epoch is left out: another each epoch
    epoch, at = divmod(step, per_epoch)
    draws = []
    for i in _order_of(len(items), seed + stream, epoch)[at * batch : (at + 1) * batch]:
        rng = seeded_rng(seed, "delta", stream, epoch, i)
        group = items[i].deltas[rng.integers(len(items[i].deltas))]
        delta = group[rng.integers(len(group))]
        back = items[i].back[rng.integers(len(items[i].back))] if items[i].back else ""
        draws.append(Draw(items[i].reference, items[i].target, delta, (stream, epoch, i), back))
    return draws


def steps_an_epoch(sources: list[Source], batch: int, ranks: int) -> int:
    """One pass over the human triplets, or over the auxiliary ones where there are no others."""
    items = next(source.items for source in sources if source.items)
    return len(items) // (batch * ranks)


def images_of(sources: list[Source], negatives: bool = False) -> list[tuple[int, str]]:
    """Every image that is trained on, once, in one order; with the hard negatives that the files name, if asked for."""
    items = [item for source in sources for item in source.items]
    named = {image for item in items for image in item.negatives} if negatives else set()
    return sorted(named | {image for item in items for image in (item.reference, item.target)})


def pictures_of(sources: list[Source], benchmarks: Sequence[Benchmark] = ()) -> list[tuple[ImageStore, list[str]]]:
    """Each source's images and the names of them that are trained on, and each benchmark's, for resume_state."""
    named = [image for source in sources for item in source.items for image in (item.reference, item.target)]
    trained = [(source.images, [name for s, name in named if s == stream]) for stream, source in enumerate(sources)]
    return trained + [(benchmark.images, names_of(benchmark)) for benchmark in benchmarks]


def texts_of(sources: list[Source]) -> list[str]:
    """Every text that may be drawn, once, in one order."""
    items = [item for source in sources for item in source.items]
    return sorted({text for item in items for group in (*item.deltas, item.back) for text in group})


def say_backs(sources: list[Source]) -> None:
    """How many triplets have a text that leads back; UserError if none has."""
    have = [bool(item.back) for source in sources for item in source.items]
    if not any(have):
        raise UserError("--reversed_text delta: no triplet has a reverse_delta (gen_deltas.py --reverse)")
    say(f"{sum(have):,} of {len(have):,} triplets have a reverse_delta; the others have no reversed loss")


def data_sha256(sources: list[Source], benchmarks: Sequence[Benchmark] = ()) -> dict[str, str]:
    """Hashes of all triplets, and of the queries and galleries that validate: a resumed run must find those that it
    began with, or the best step would be the best of two different measurements."""
    hashes = {"TRIPLETS_SHA256": hashlib.sha256(json.dumps([source.items for source in sources]).encode()).hexdigest()}
    if benchmarks:
        asked = repr([(b.queries, [query.truths for query in b.queries], b.gallery) for b in benchmarks])
        hashes["VALIDATION_SHA256"] = hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
    return hashes


class Batch(NamedTuple):
    """The triplets of one step on all ranks, stream after stream, in each of them rank after rank."""

    step: int
    draws: list[Draw]
    own: list[int]  # rows of this rank

    @property
    def own_draws(self) -> list[Draw]:
        return [self.draws[i] for i in self.own]

    @property
    def own_deltas(self) -> list[str]:
        return [d.delta for d in self.own_draws]

    @property
    def deltas(self) -> list[str]:
        return [d.delta for d in self.draws]

    @property
    def targets(self) -> list[tuple[int, str]]:
        return [d.target for d in self.draws]


def draw_batch(sources: list[Source], step: int, batch: int, seed: int, world: World) -> Batch:
    """`batch` triplets of every source that has any, for each rank; a function of the step, equal on all ranks."""
    draws, own = [], []
    for stream, source in enumerate(sources):
        if source.items:
            first = len(draws) + world.rank * batch
            own += range(first, first + batch)
            draws += draw(source.items, stream, step, batch * world.size, seed)
    return Batch(step, draws, own)


class Everyone(NamedTuple):
    """What losses against all images want of all ranks: rows in the order of the batch, without gradients."""

    x: Tensor  # (G, d) of the targets
    c: Tensor  # (G, d) of the queries
    tokens: Tensor  # (G, ...) of the targets


def check_items(sources: list[Source], benchmarks: list[Benchmark], decode: bool, workers: int, listing: str) -> None:
    """Prints what there is to train on and to measure; UserError if an image is missing or unreadable, all of which
    are in the file `listing` then."""
    parts = [(f"{b.title}: {len(b.queries):,} queries", names_of(b), b.images) for b in benchmarks]
    for source, what in zip(sources, _STREAMS, strict=True):
        if source.items:
            names = dict.fromkeys(name for item in source.items for name in _names(item))
            parts.append((f"{what}: {len(source.items):,} triplets", list(names), source.images))
    lines = []
    for what, names, images in parts:
        faults = unreadable(names, images, workers, decode)
        say(f"{what}; {report_of(len(names), faults, images)}")
        lines += faults.values()
    write_faults(lines, listing)
    if lines:
        goes_on = f"training leaves out up to {OWN_MISSING:.0%} of one's own triplets, evaluation --missing"
        what = f"{len(lines):,} images missing or unreadable, all in {listing}; fetch them or fix --images"
        raise UserError(f"{what} ({goes_on})")


_order_of = functools.lru_cache(maxsize=4)(epoch_order)  # asked for at every step
