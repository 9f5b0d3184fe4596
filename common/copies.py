"""What a benchmark counts twice: names that lead to one picture, queries that stand again under another id.

Recall over a hundred names of one picture is no recall over a gallery of a hundred."""

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

from common.annotations import Benchmark
from common.console import UserError
from common.disk import open_regular
from common.files import HASH_LIMIT, file_sha256
from common.images import ImageStore, shown

_MOST = 0.5  # share of copies above which a benchmark is refused; CIRR's test1 repeats 4 of its 4,148 queries
_START = 1 << 12  # bytes that are compared before a whole file is read


def note_of_copies(benchmark: Benchmark) -> str:
    """What the protocol line must say of copies in the gallery and among the queries; empty where there are none.

    UserError where more than half of either are copies. Every picture of the gallery must be there."""
    return "; ".join(filter(None, (_note_of_pictures(benchmark), _note_of_queries(benchmark))))


def same_pictures(images: ImageStore, names: Sequence[str]) -> list[list[int]]:
    """The groups of two and more places in names whose files hold the same bytes. Every picture must be there."""
    paths = [images.path(name) for name in names]
    groups = [[i for i, _ in enumerate(paths)]]
    for key in (os.path.getsize, _start, file_sha256):  # the cheap ones first: few files come to the last
        groups = [part for group in groups for part in _alike(group, lambda i, key=key: key(paths[i]))]
    return groups


def _note_of_pictures(benchmark: Benchmark) -> str:
    names = benchmark.gallery
    groups = same_pictures(benchmark.images, names)
    return _note(benchmark.title, "gallery images", "pictures of their own", groups, len(names), names)


def _note_of_queries(benchmark: Benchmark) -> str:
    queries = benchmark.queries
    groups = _alike(range(len(queries)), lambda i: _asked(queries[i]))
    return _note(benchmark.title, "queries", "asked once", groups, len(queries), [str(q.id) for q in queries])


def _asked(query) -> Hashable:
    """All of a query but its id."""
    return query.reference, query.target, query.delta, query.members, query.truths


def _start(path: str) -> bytes:
    with open_regular(path, HASH_LIMIT) as file:
        return file.read(_START)


def _alike(places: Iterable[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """The groups of two and more that share a key."""
    groups = defaultdict(list)
    for i in places:
        groups[key(i)].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _note(title: str, what: str, wanted: str, groups: list[list[int]], count: int, names: Sequence[str]) -> str:
    copies = sum(len(group) - 1 for group in groups)
    if not copies:
        return ""
    first, second = (shown(names[i]) for i in groups[0][:2])
    text = f"{title}: {copies:,} of {count:,} {what} are copies of another ({second} of {first})"
    if copies > _MOST * count:
        raise UserError(f"{text}; recall over them would be no recall over so many: wanted {what} that are {wanted}")
    return text
