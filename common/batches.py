"""From records to batches: items to train on, the order of an epoch, pictures decoded one step ahead."""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from common.annotations import Benchmark, Triplet, join_captions, names_of, read_triplets, training_triplets
from common.console import UserError, rank_size, say
from common.images import ImageStore, check_report, leave_out, unreadable
from common.ranks import World, any_rank, gather_objects, seeded_rng
from common.triplets import with_text


class Item(NamedTuple):
    """A triplet to train on; images as (store, name), deltas in groups: a group is drawn, then one of it."""

    reference: tuple[int, str]
    target: tuple[int, str]
    deltas: tuple[tuple[str, ...], ...]
    back: tuple[str, ...] = ()  # texts that lead from the target back to the reference, where VDG wrote any


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
        items.append(Item((0, t.reference), (0, t.target), tuple(groups), backs([t, *same])))
    without = sum((t.reference, t.target) not in also for t in triplets)
    if generated and without == len(triplets):
        raise UserError("--same_pairs: none of its (reference, target) pairs is a human triplet's; wrong file?")
    if generated and without:
        say(f"{without:,} of {len(triplets):,} human triplets have no generated delta in --same_pairs")
    return items


def training_items(
    dataset: str,
    root: str,
    split: str,
    images: str,
    same_pairs: str,
    same_deltas: bool,
    pseudo: str,
    pseudo_images: str,
    human: bool,
    keys: str = "",
    pseudo_keys: str = "",
    pool: str = "",
    hold_out: float = 0,
) -> tuple[list[ImageStore], list[list[Item]]]:
    """-> image stores and items of stream 0 (human) and stream 1 (auxiliary), either may be empty, not both."""
    stores, streams = [ImageStore([]), ImageStore([])], [[], []]
    if human:
        if not root:
            raise UserError("--root is empty: where the triplets lie, or --triplets false with --pseudo")
        triplets, stores[0] = training_triplets(dataset, root, split, "all", images or None, keys, pool, hold_out)
        same = with_text(read_triplets(same_pairs), same_pairs) if same_pairs else []
        streams[0] = human_items(triplets, dataset, same, same_deltas, alike=bool(keys))
    if pseudo:
        triplets, stores[1] = training_triplets("jsonl", pseudo, "", "all", pseudo_images or None, pseudo_keys, pool)
        kept = with_text(triplets, pseudo)
        streams[1] = [Item((1, t.reference), (1, t.target), ((t.delta, *t.alternatives),), backs([t])) for t in kept]
    for wanted, items, file in ((human, streams[0], root), (pseudo, streams[1], pseudo)):
        if wanted and not items:
            raise UserError(f"{file} holds no triplet to train on")
    if not human and not pseudo:
        raise UserError("nothing to train on: --triplets true, or --pseudo with a pseudo.jsonl")
    return stores, streams


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


def faults_of(names: Sequence[str], images: ImageStore, workers: int = 0) -> dict[str, str]:
    """images.unreadable, each rank looking at its share of the pictures; the same answer on all of them."""
    rank, size = rank_size()
    parts = gather_objects(unreadable(names[rank::size], images, workers))
    found = {name: text for part in parts for name, text in part.items()}
    return {name: found[name] for name in names if name in found}


def drop_missing(
    items: list, names_of: Callable, images: ImageStore, what: str, listing: str = "", workers: int = 0
) -> list:
    """The items (`what` they are) whose images are all there; says how many are not, UserError above one in a thousand.

    For training alone: evaluation stops at the first missing image. names_of(item) -> the names it needs. With a file
    `listing` pictures of one's own (images.own) are decoded too, on all ranks together: one item in ten may lack one,
    since some are always broken, and all are in that file."""
    names = sorted({name for item in items for name in names_of(item)})
    if images.own and listing:
        most, faults = 0.1, faults_of(names, images, workers)
        leave_out(names, faults, listing, f"pictures of the {what}")
    else:
        most, faults = 0.001, dict.fromkeys(images.missing(names))
    kept = [item for item in items if faults.keys().isdisjoint(names_of(item))]
    if faults:
        lost = f"{what}: {len(items) - len(kept):,} of {len(items):,} items lack an image, first {min(faults)}"
        lost += f" (looked in {', '.join(images.roots)})"
        if len(items) - len(kept) > most * len(items):
            remedy = "complete the folder or correct the flag that names it"
            raise UserError(f"{lost}, more than {100 * most:g} %; {remedy}")
        say(f"{lost}: left out")
    return kept


def check_items(
    stores: list[ImageStore], streams: list[list[Item]], benchmarks: list[Benchmark], decode: bool = False
) -> None:
    """Prints what there is to train on and to measure; UserError if an image is missing or unreadable."""
    reports = [check_report(names_of(benchmark), benchmark.images, decode) for benchmark in benchmarks]
    for items, store, what in zip(streams, stores, ("human", "auxiliary"), strict=True):
        if items:
            names = [name for item in items for _, name in (item.reference, item.target)]
            text, ok = check_report(names, store, decode)
            reports.append((f"{what}: {len(items):,} triplets; {text}", ok))
    say("\n".join(text for text, _ in reports))
    if not all(ok for _, ok in reports):
        raise UserError("images missing or unreadable, see above; fetch them or fix --images / --pseudo_images")


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n items in one epoch, a function of (seed, epoch) alone: equal on every rank and after a resume."""
    return seeded_rng("order", seed, epoch).permutation(n).tolist()


_order_of = functools.lru_cache(maxsize=4)(epoch_order)  # asked for at every step


def rank_batches(order: Sequence[int], batch: int, rank: int = 0, size: int = 1) -> list[list[int]]:
    """Cuts `order` into global batches of `batch` items and returns this rank's contiguous part of each.

    All ranks get equally many parts. Their sizes differ by one at most; a part is empty where the last batch has fewer
    items than ranks. In rank order the parts of a batch make up the batch that a single rank would see.
    """
    assert batch > 0 and 0 <= rank < size
    parts = []
    for start in range(0, len(order), batch):
        items = list(order[start : start + batch])
        parts.append(items[len(items) * rank // size : len(items) * (rank + 1) // size])
    return parts


def steps_of(groups: list[list[int]], epochs: int, items: int, seed: int, world: World, done: int):
    """Yield (step, epoch, this rank's items) from step `done` on; a step has `items` on all ranks.

    groups: items that keep together while the groups are shuffled; of one item each as a rule."""
    per_epoch = math.ceil(sum(map(len, groups)) / items)
    for epoch in range(done // per_epoch, epochs):
        order = [item for g in epoch_order(len(groups), seed, epoch) for item in groups[g]]
        batches = rank_batches(order, items, world.rank, world.size)
        for i, mine in enumerate(batches):
            if epoch * per_epoch + i >= done:
                yield epoch * per_epoch + i, epoch, mine


def ahead(load, jobs):
    """Yield (job, load(job)) while a thread loads the next; a user's mistake in load is yielded as its result."""

    def attempt(job):
        try:
            return load(job)
        except (UserError, OSError) as fault:
            return fault

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for job in jobs:
            following = job, pool.submit(attempt, job)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def stop_together(result) -> None:
    """All ranks stop when one loaded a fault: one that stops alone leaves the others waiting in a collective."""
    found = isinstance(result, Exception)
    if any_rank(found):
        raise UserError(next(text for text in gather_objects(str(result) if found else "") if text))


def check_texts(texts, where: str, most: int) -> None:
    """Stop at start-up over (id, text) that is blank (nothing to learn) or longer than `most` characters (memory)."""
    for name, text in texts:
        if not 0 < len(text.strip()) <= most:
            raise UserError(
                f"{where}: record {name}: a text of {len(text.strip())} characters, 1 to {most} wanted; correct it, "
                "or raise --max_characters"
            )


def fingerprint(items: list) -> str:
    """A hash of records: a resumed run must find the data that it began with."""
    return hashlib.sha256("\n".join(map(repr, items)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; taken one by one, so that a progress bar around them counts."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk
