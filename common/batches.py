"""From records to batches: items to train on, the order of an epoch, pictures decoded one step ahead."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from common.console import UserError, rank_size, say, warn
from common.images import OWN_MISSING, ImageStore, check_report, leave_out, unreadable
from common.ranks import Log, World, any_rank, gather_objects
from common.resume import note_broken
from common.seeds import seeded_rng

SLOW_AFTER = 60  # seconds in which a loop mostly waited for its pictures: rank 0 says so


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
        most, faults = OWN_MISSING, faults_of(names, images, workers)
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


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n items in one epoch, a function of (seed, epoch) alone: equal on every rank and after a resume."""
    return seeded_rng("order", seed, epoch).permutation(n).tolist()


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


class Step(NamedTuple):
    """One optimiser step, as one rank sees it."""

    step: int  # of the whole run, from 0
    epoch: int
    items: list[int]  # this rank's, by their index; none where the last batch of an epoch has fewer items than ranks


def training_steps(
    groups: list[list[int]], epochs: int, per_step: int, seed: int, world: World, done: int
) -> Iterator[Step]:
    """The steps of a run from number `done` on, each of `per_step` items on all ranks; the same after every resume.

    groups: items that keep together while the groups are shuffled; of one item each as a rule."""
    per_epoch = math.ceil(sum(map(len, groups)) / per_step)
    for epoch in range(done // per_epoch, epochs):
        order = [item for g in epoch_order(len(groups), seed, epoch) for item in groups[g]]
        for i, items in enumerate(rank_batches(order, per_step, world.rank, world.size)):
            step = epoch * per_epoch + i
            if step >= done:
                yield Step(step, epoch, items)


def ahead(load: Callable[[Any], Any], jobs: Iterable) -> Iterator[tuple[Any, Any]]:
    """Yields (job, load(job)) while a thread loads the next one; one job ahead, so that two are held at most.

    A user's mistake in load is yielded as its result: stop_together tells the other ranks. Once, after a minute, a line
    says if most of the time is waited for what load brings."""
    began, waited, told = 0.0, 0.0, False  # since the first is there

    def attempt(job):
        try:
            return load(job)
        except (UserError, OSError) as fault:
            return fault

    def result(loading: Future):
        nonlocal began, waited, told
        since = time.monotonic()
        loaded = loading.result()
        now = time.monotonic()
        if not began:
            began = now
            return loaded
        waited, whole = waited + now - since, now - began
        if whole > SLOW_AFTER and waited > whole / 2 and not told:
            told = True
            remedy = "more CPUs for each rank, smaller pictures or a faster disk would help"
            warn(f"{waited / whole:.0%} of {whole:.0f} s went by waiting for pictures: {remedy}")
        return loaded

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for job in jobs:
            following = job, pool.submit(attempt, job)
            if waiting:
                yield waiting[0], result(waiting[1])
            waiting = following
        if waiting:
            yield waiting[0], result(waiting[1])


def stop_together(loaded: Any, out: str = "") -> None:
    """All ranks stop, in one line, when one of them loaded a fault: one that stops alone leaves the others waiting.

    out: of a run that can be resumed; it notes there which pictures could not be read."""
    fault = (str(loaded) or type(loaded).__name__) if isinstance(loaded, Exception) else ""
    if any_rank(bool(fault)):
        faults = gather_objects((fault, getattr(loaded, "picture", "")))
        text = next(text for text, _ in faults if text)
        noted = note_broken(out, [picture for _, picture in faults if picture]) if out else False
        raise UserError(text + ("; once it is replaced, the same command goes on" if noted else ""))


def stop_if_not_finite(step: int, value: float, items: list, log: Log, remedy: str) -> None:
    """All ranks stop before the optimiser steps: the last state saved is good. step: from 1; value: loss plus gradient
    norm; items: those of this rank that may be to blame."""
    if any_rank(not math.isfinite(value)):
        what, items = "loss or gradient not finite", [item for part in gather_objects(items) for item in part]
        log.write(step=step, error=what, value=float(value), items=items)
        raise UserError(
            f"{what} at step {step}: its items are in {log.path}, the last good state in last/ beside it; "
            f"take {remedy}, with another --out"
        )


def say_check(
    names: Iterable[str], images: ImageStore, what: str, out: str, decode: bool = False, workers: int = 0
) -> None:
    """The answer to --check, `what` in front; UserError where an image is missing or unreadable, with all of them in
    out/missing.txt. decode: every one."""
    report, well = check_report(names, images, decode, workers, f"{out}/missing.txt")
    if not well:
        raise UserError(f"{what}; {report}; complete the folder or correct --images")
    say(f"{what}; {report}")


def slices(count: int, length: int) -> list[slice]:
    """Slices that cut `count` items into parts of `length`, the last one shorter."""
    return [slice(start, start + length) for start in range(0, count, length)]


def check_texts(texts: Iterable[tuple[str, str]], where: str, most: int) -> None:
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


def gather_dealt(mine: list) -> list:
    """Every rank's results of items that were dealt out as items[rank :: ranks], in the items' order, on all ranks."""
    shares = gather_objects(mine)
    longest = len(shares[0])
    return [share[i] for i in range(longest) for share in shares if i < len(share)]
