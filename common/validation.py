"""What a run measures itself by while it trains: the benchmarks of --val_split, their protocol, recall of a step."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from common.annotations import Benchmark, all_without_missing, names_of, note_of_targets, read_benchmarks, read_own
from common.batches import faults_of
from common.console import UserError, say
from common.copies import note_of_copies
from common.encoding import Compute
from common.retrieval import SECOND_FIRST, evaluate, first_of, protocol_of
from common.streams import Source
from common.trained_on import note_of_overlap


class Validation(NamedTuple):
    """What a run measures itself by while it trains."""

    benchmarks: list[Benchmark]  # of FashionIQ one a category; empty: none
    says: str = ""  # the protocol and the counts in one line


def read_validation(
    dataset: str,
    root: str,
    split: str,
    images: str,
    keys: str = "",
    pool: str = "",
    hold_out: float = 0,
    join: str = "forward",
) -> Validation:
    """The labelled benchmarks of --val_split, "" for none; UserError for a split that cannot be measured.

    keys, pool, hold_out: of one's own triplets (read_own), whose split is "held" or another file; join: of
    read_fashioniq."""
    if not split:
        return Validation([])
    if dataset == "jsonl":
        file = split != "held" or not hold_out
        if file and not os.path.isfile(split):
            raise UserError(f"--val_split {split}: of --dataset jsonl a file, or held, with --hold_out N triplets")
        protocol = "all pictures"
        benchmarks = [read_own(split if file else root, images, hold_out=0 if file else hold_out, keys=keys, pool=pool)]
    else:
        protocol = "original" if dataset == "fashioniq" else "split"
        benchmarks = read_benchmarks(dataset, root, split, "all", images, protocol, join)
    if any(query.target is None for benchmark in benchmarks for query in benchmark.queries):
        raise UserError(f"--val_split {split}: its targets are hidden; take a split with labels")
    counts = [f"{len(b.queries):,} queries, {len(b.gallery):,} gallery images" for b in benchmarks]
    unusual = (SECOND_FIRST,) if dataset == "fashioniq" and join == "reverse" else ()
    return Validation(benchmarks, f"{protocol_of(dataset, protocol, True, unusual)}: {'; '.join(counts)}")


def begin_validation(
    validation: Validation, split: str, share: float, out: str, workers: int = 0, sources: Sequence[Source] = ()
) -> Validation:
    """Says what will be measured, and how many of the queries the sources train on; UserError for an image that is
    missing or cannot be decoded: a run must not find out after hours. All are decoded, by the ranks together.

    share: of its images that may be missing; they are left out, in out/missing.txt, and the protocol says so."""
    benchmarks, note = all_without_missing(validation.benchmarks, share, f"{out}/missing.txt", workers)
    for benchmark in benchmarks:
        names = names_of(benchmark)
        if missing := benchmark.images.missing(names):
            remedy = "add them, list all with --check, or go on without them by --missing SHARE"
            raise UserError(f"--val_split {split}: {len(missing):,} images missing: {first_of(missing)}; {remedy}")
        if benchmark.dataset != "jsonl" and (faults := faults_of(names, benchmark.images, workers)):
            remedy = "replace them, or go on without them by --missing SHARE"
            raise UserError(f"--val_split {split}: {len(faults):,} images: {next(iter(faults.values()))}; {remedy}")
    notes = [note, *map(note_of_copies, benchmarks), *map(note_of_targets, benchmarks)]
    notes = filter(None, (validation.says, *notes, note_of_overlap(list(sources), benchmarks)))
    validation = Validation(benchmarks, "; ".join(notes))
    if validation.benchmarks:
        say(f"validation on {split}, {validation.says}")
    return validation


def validate(model: torch.nn.Module, validation: Validation, compute: Compute) -> dict[str, float]:
    """Recall in percent, of FashionIQ the mean of its categories and that of each; "score" is the mean by which steps
    are compared: R@1, 5 and 10 of CIRR and of one's own, R@10 and 50 of FashionIQ [ours]."""
    found = [evaluate(model, benchmark, compute) for benchmark in validation.benchmarks]
    mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    chosen = ("R@10", "R@50") if validation.benchmarks[0].dataset == "fashioniq" else ("R@1", "R@5", "R@10")
    score = {"score": sum(mean[name] for name in chosen) / len(chosen)}
    if len(found) == 1:
        return score | mean
    each = zip(validation.benchmarks, found, strict=True)
    return score | mean | {f"{benchmark.category} {name}": one[name] for benchmark, one in each for name in one}
