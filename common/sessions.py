"""Searches of several turns, in the format of CIRCLED: each turn starts from a picture that the one before found."""

import functools
import os

from common.annotations import Benchmark, gallery_name, gallery_names, own_store
from common.console import UserError
from common.images import shown
from common.retrieval import Ranks, best_rank
from common.triplets import Triplet, field_of, name_of, read_records, records_of

SESSION_KS = (1, 5, 10, 50)


def read_sessions(path: str, images: str | None = None, gallery: str = "") -> Benchmark:
    """{session_id, ground_truth_ids, turns: [{turn, reference_image_id, relative_caption}]}, a JSON list or one a line.

    A query a turn, in order; extra holds "session" and "turn" (from 1); truths are all right images, the first of them
    the target. Gallery: every picture of the folder, or the names in the file `gallery` (.txt or .json). UserError for
    turns that do not count 1, 2, 3, and for a right image outside the gallery: it could never be found."""
    if not os.path.isfile(path):
        raise UserError(f"--root {path or chr(34) * 2}: wanted a file of sessions, .json or .jsonl")
    store = own_store(path, images)
    names = gallery_names(gallery, store)
    known, queries, seen = set(names), [], set()
    in_gallery = functools.partial(gallery_name, known=known, store=store)
    for where, record in read_records(path):
        session, turns = str(record.get("session_id")), field_of(record, "turns", list, where)
        if "session_id" not in record or session in seen:
            raise UserError(f'{where}: "session_id" {shown(session)} is missing or stands twice')
        seen.add(session)
        truths = field_of(record, "ground_truth_ids", list, where)
        if not truths or not all(isinstance(name, str) for name in truths):
            raise UserError(f'{where}: "ground_truth_ids" is {shown(truths)}, wanted a list of image names')
        truths = tuple(dict.fromkeys(map(in_gallery, truths)))
        if stray := [name for name in truths if name not in known]:
            raise UserError(f"{where}: right image {shown(stray[0])} is not in the gallery")
        if not turns:
            raise UserError(f"{where}: has no turn")
        for number, (at, turn) in enumerate(records_of(f"{where}, turns", turns), 1):
            if turn.get("turn", number) != number:
                raise UserError(f"{at}: is turn {shown(turn['turn'])}, wanted {number}: turns count from 1, in order")
            reference = in_gallery(name_of(turn, "reference_image_id", at))
            extra = {"session": session, "turn": number}
            delta = field_of(turn, "relative_caption", str, at)
            queries.append(Triplet(reference, truths[0], delta, f"{session}-{number}", truths=truths, extra=extra))
    return Benchmark("sessions", "all", None, tuple(queries), tuple(names), store)


def session_hits(benchmark: Benchmark, ranks: Ranks) -> dict[str, float]:
    """Percent of sessions of which a right image stands among the first K: first@K at the first turn, last@K at the
    last one, any@K at any. Each turn is asked alone, by its own picture and text [ours]."""
    best: dict[str, list[int]] = {}
    for query, rank in zip(benchmark.queries, best_rank(ranks).tolist(), strict=True):
        best.setdefault(query.extra["session"], []).append(rank)
    result = {}
    for name, pick in (("first", lambda turns: turns[0]), ("last", lambda turns: turns[-1]), ("any", min)):
        for k in SESSION_KS:
            hits = sum(pick(turns) <= k for turns in best.values())
            result[f"{name}@{k}"] = 100.0 * hits / len(best)
    return result
