"""Pairs of pictures that gen_deltas.py describes: which of them are chosen, and what was said of them before."""

from collections import Counter
from collections.abc import Container, Iterable

from common.console import UserError
from common.seeds import seeded_rng


def names_of(pairs: list[dict]) -> list[str]:
    return sorted({name for pair in pairs for name in (pair["reference"], pair["target"])})


def choose_subgroups(
    pairs: list[dict], subgroups: int, max_pairs: int, seed: int, done: Container[int | str] = ()
) -> list[dict]:
    """Pairs of random whole subgroups, in their old order; a pair without a subgroup is one by itself.

    The larger the share of a subgroup's pairs that is `done` (their ids), the earlier it comes: where pictures were
    added, which changes the draw, what is described stays. Without a change this is the draw itself, also after a kill,
    since then what is done was drawn first."""
    if not pairs:
        raise UserError("no pairs: too few similar pictures")
    if not subgroups and not max_pairs:
        return pairs

    def group_of(pair: dict) -> object:
        return pair.get("subgroup", ("alone", pair["id"]))

    sizes = Counter(map(group_of, pairs))
    names = list(sizes)
    waiting = Counter(group_of(pair) for pair in pairs if pair["id"] not in done)
    order = seeded_rng("subgroups", seed).permutation(len(names)).tolist()
    order.sort(key=lambda i: waiting[names[i]] / sizes[names[i]])  # keeps the draw among equals
    chosen, count = set(), 0
    for i in order[: subgroups or None]:
        count += sizes[names[i]]
        if max_pairs and count > max_pairs:
            break
        chosen.add(names[i])
    if not chosen:
        raise UserError(f"--max_pairs {max_pairs} is less than one subgroup has; give at least {count}")
    return [pair for pair in pairs if group_of(pair) in chosen]


def identity(pair: dict) -> tuple:
    """What makes a stored delta this pair's own: an id that now means other images is another pair."""
    return pair["id"], pair["reference"], pair["target"]


def described(pairs: list[dict], lines: Iterable[dict]) -> dict[int | str, dict]:
    """Id of each pair that is described -> its line of the parts.

    That is the line of its id and images. mine_pairs.py numbers its pairs anew when pictures come or go, so a pair
    without such a line takes one about the same two images whose own pair is gone. No line is given to two pairs: a
    pair of images that stands there twice has two texts."""
    left = {identity(line): line for line in lines}
    found = {pair["id"]: left.pop(identity(pair)) for pair in pairs if identity(pair) in left}

    # lines whose own pair is gone: by their images, in the order of their ids, whichever part they stand in
    others: dict[tuple, list[dict]] = {}
    for key in sorted(left, key=lambda key: (isinstance(key[0], str), key[0])):
        others.setdefault(key[1:], []).append(left[key])
    for pair in pairs:
        same = others.get((pair["reference"], pair["target"]))
        if pair["id"] not in found and same:
            found[pair["id"]] = same.pop(0)
    return found


def with_deltas(pairs: list[dict], said: dict[int | str, dict]) -> list[dict]:
    """The pairs, each with what was said of it (described) and nothing that was said of it elsewhere."""
    parts, records = ("delta", "reverse_delta", "flags", "judged"), []
    for pair in pairs:
        record = {key: value for key, value in pair.items() if key not in parts}
        line = said[pair["id"]]
        records.append(record | {key: line[key] for key in line if key in parts})
    return records
