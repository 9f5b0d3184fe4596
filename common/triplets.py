"""Files of triplets, this project's and those of others: a record -> reference, target, delta, wherever its keys stand.

A mistake in a file is a UserError that names file and record."""

import hashlib
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from common.console import UserError, say
from common.files import read_csv, read_json, read_jsonl
from common.images import safe_name, shown

PARTS = ("reference", "target", "delta", "negatives", "id")  # of a triplet, which --keys may find under other names
KNOWN = (*PARTS, "caption", "members")  # all keys that are read under their own names
_ENDINGS = ".jsonl and .ndjson hold a JSON object a line, .csv and .tsv a table, a file of any other name one JSON list"


@dataclass(frozen=True)
class Triplet:
    """Reference image, target image (None where hidden: CIRR test1, FashionIQ test) and modification text."""

    reference: str
    target: str | None
    delta: str
    id: int | str | None = None
    members: tuple[str, ...] | None = None  # CIRR's image set, as listed: the reference and the target are among them
    alternatives: tuple[str, ...] = ()  # FashionIQ: its two raw captions; a list of texts: those after the first
    # all right answers, the target among them, where a query has several; VDG's training, which hashes repr, has no use
    truths: tuple[str, ...] = field(default=(), repr=False)
    extra: dict | None = None


# ---- records of any file ----
def records_of(path: str, records: object) -> Iterable[tuple[str, dict]]:
    """(where, record) of a list of objects; `where` opens every message about that record."""
    if not isinstance(records, list):
        raise UserError(f"{path}: found {shown(records)}, wanted a list of records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {i}: found {shown(record)}, wanted an object")
        yield f"{path}, record {i}", record


def field_of(record: dict, key: str, kind: type, where: str):
    """The value of a key, of the kind wanted; UserError otherwise."""
    if key not in record:
        raise UserError(f'{where}: has no "{key}" (found {", ".join(map(shown, record)) or "nothing"})')
    if not isinstance(record[key], kind) or isinstance(record[key], bool):
        raise UserError(f'{where}: "{key}" is {shown(record[key])}, wanted {kind.__name__}')
    return record[key]


def name_of(record: dict, key: str, where: str) -> str:
    """A key's value as the name of an image, which stays below its root."""
    return safe_name(field_of(record, key, str, where), f'{where}: "{key}"')


def texts_of(values: object, where: str) -> tuple[str, ...]:
    """A list of strings that is not empty."""
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: captions are {shown(values)}, wanted a list of strings")
    return tuple(values)


def read_records(path: str, exact: Collection[str] = ()) -> Iterable[tuple[str, dict]]:
    """records_of a file: .jsonl or .ndjson, .csv or .tsv, and any other as a JSON list.

    A table may write KNOWN names in capitals or with blanks around them; names in `exact` (of --keys) stay."""
    ending = os.path.splitext(path)[1].lower()
    if ending in (".csv", ".tsv"):
        return records_of(path, _table(path, exact))
    if ending in (".jsonl", ".ndjson"):
        return records_of(path, read_jsonl(path))
    try:
        return records_of(path, read_json(path))
    except UserError as error:
        if "not JSON at" not in str(error):
            raise
        raise UserError(f"{error}; {_ENDINGS}") from None


def _table(path: str, exact: Collection[str]) -> list[dict[str, str]]:
    """read_csv; UserError where the first line is already a row, or names other columns that no --keys tells of."""
    records = read_csv(path, known=KNOWN, exact=exact)
    if records and not exact and not any(name in KNOWN for name in records[0]):
        found = ", ".join(map(shown, records[0]))
        wanted = f"the first line must name the columns, reference,target,delta (found {found})"
        raise UserError(f"{path}: {wanted}; a stage that has --keys takes other names")
    return records


def require_unique(values: Iterable, path: str, what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{path}: {what} {shown(value)} occurs twice")
        seen.add(value)


# ---- triplets ----
def read_triplets(path: str | os.PathLike, keys: str = "", pool: str = "") -> list[Triplet]:
    """Triplets of one file or of several ("a.jsonl,b.csv"), of any kind that read_records knows.

    Without `keys` a record is {"reference", "target", "delta", ...}; the VDG release has "caption" for "delta". Of a
    list of texts the first that says something is the delta, the others are the alternatives ([human, generated] in the
    release). Of a list of targets the first is the target, and all are `truths`. Other keys are kept in `extra`.

    keys: where other files have them, "reference=q_img,target=t_img,delta=q_text,negatives=hns" (MegaPairs); a part of
    a list or of an object stands behind a dot, "reference=query-image.1" (LaSCo). `negatives` become
    extra["negatives"], names of images.
    pool: file or files of {"did", "img_path"} (M-BEIR), in which targets and negatives are ids."""
    places, paths_of = parse_keys(keys), read_pool(pool)
    triplets = []
    for file in split_paths(path):
        for where, record in read_records(file, places.values()):
            number = len(triplets)
            one = _triplet(record, where, places, paths_of, number) if places else _plain(record, where, number)
            triplets.append(one)
    return triplets


def split_paths(path: str | os.PathLike) -> list[str]:
    """ "a.jsonl,b.jsonl" -> both; a file whose own name has a comma is one."""
    path = os.fspath(path)
    return [path] if os.path.exists(path) else [part.strip() for part in path.split(",") if part.strip()] or [path]


def delta_key(record: dict) -> str:
    """Where the text of a record stands that no --keys names."""
    return "caption" if "caption" in record and "delta" not in record else "delta"


def _plain(record: dict, where: str, number: int) -> Triplet:
    """A record in this project's own words, or in those of the VDG release."""
    key = delta_key(record)
    if absent := [name for name in ("reference", "target", key) if name not in record]:
        found = ", ".join(map(shown, record)) or "nothing"
        raise UserError(
            f'{where}: has no "{absent[0]}" (found {found}); --keys says where it stands under another name'
        )
    if not isinstance(record.get(key), list):
        field_of(record, key, str, where)
    delta, *others = spoken(record[key], key, where)
    members = field_of(record, "members", list, where) if record.get("members") else ()
    names = tuple(safe_name(name, f"{where}: member") for name in members)
    reference = name_of(record, "reference", where)
    targets = record["target"] if isinstance(record["target"], list) else [name_of(record, "target", where)]
    truths = _names(targets, "target", where)
    extra = {k: v for k, v in record.items() if k not in ("reference", "target", "members", "id", key)}
    more = {"alternatives": tuple(others), "truths": several_of(truths), "extra": extra}
    return Triplet(reference, truths[0], delta, record.get("id", number), names or None, **more)


def _names(values: list, key: str, where: str) -> tuple[str, ...]:
    """A list of image names, one at least."""
    if not values:
        raise UserError(f'{where}: "{key}" names no image')
    return tuple(safe_name(value, f'{where}: "{key}"') for value in values)


def several_of(targets: Iterable[str]) -> tuple[str, ...]:
    """Triplet.truths: each once; of a query with one right answer none."""
    targets = tuple(dict.fromkeys(targets))
    return targets if len(targets) > 1 else ()


def spoken(value: object, key: str, where: str) -> tuple[str, ...]:
    """The texts of a delta; of several the blank ones are left out, unless there is no other."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise UserError(f"{where}: {shown(key)} is {shown(value)}, wanted a text or a list of texts")
    texts = texts_of(value, where)
    return tuple(text for text in texts if text.strip()) or texts[:1]


def parse_keys(keys: str) -> dict[str, str]:
    """ "reference=q_img,target=t_img" -> {"reference": "q_img", ...}; UserError names the part that is wrong."""
    places: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in keys.split(","))):
        name, equals, key = part.partition("=")
        if not equals or not key or name not in PARTS or name in places:
            wanted = f"wanted each of {', '.join(PARTS)} once at most, as in reference=q_img,target=t_img,delta=q_text"
            raise UserError(f"--keys: {shown(part)} is not understood; {wanted}")
        places[name] = key
    for name in PARTS[:3] if places else ():
        places.setdefault(name, name)
    return places


def value_at(record: dict, key: str, where: str) -> object:
    """record[key]; a key that the record lacks is a path of keys and positions with dots between them."""
    if key in record:
        return record[key]
    value: object = record
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            found = ", ".join(map(shown, record)) or "nothing"
            raise UserError(f"{where}: has no {shown(key)} (found {found}); see --keys")
    return value


def _triplet(record: dict, where: str, places: dict[str, str], paths_of: dict[str, str], number: int) -> Triplet:
    """A record whose parts stand where `places` says."""

    def images(part: str) -> tuple[str, ...]:
        value = value_at(record, places[part], where)
        names = value if isinstance(value, list) else [value]
        if paths_of and part != "reference":  # M-BEIR names a query's image by its path, its answers by ids
            names = [_pooled(name, paths_of, where) for name in names]
        return _names(names, places[part], where)

    reference, targets = images("reference"), images("target")
    delta, *others = spoken(value_at(record, places["delta"], where), places["delta"], where)
    extra = {k: v for k, v in record.items() if k not in places.values()}
    if "negatives" in places:
        extra["negatives"] = images("negatives")
    id = value_at(record, places["id"], where) if "id" in places else record.get("id", number)
    more = {"alternatives": tuple(others), "truths": several_of(targets), "extra": extra}
    return Triplet(reference[0], targets[0], delta, id, **more)


def read_pool(pool: str) -> dict[str, str]:
    """Candidates of M-BEIR, {"did": "9:123", "img_path": "mbeir_images/..."} a line -> id: path; those of text alone
    have none."""
    paths: dict[str, str] = {}
    for file in split_paths(pool) if pool else ():
        for where, record in records_of(file, read_jsonl(file)):
            did = field_of(record, "did", str, where)
            if record.get("img_path") is not None:
                paths[did] = name_of(record, "img_path", where)
    if pool and not paths:
        raise UserError(f"--pool {pool}: names no image; wanted lines with did and img_path")
    return paths


def _pooled(did: object, paths_of: dict[str, str], where: str) -> str:
    if did not in paths_of:
        raise UserError(f"{where}: {shown(did)} is no image of --pool; wanted the pool that belongs to this file")
    return paths_of[did]


def plain_text(text: str) -> str:
    """A text as it is compared: in lower case, with one space between words."""
    return " ".join(text.lower().split())


def names_of(triplets: Iterable[Triplet]) -> list[str]:
    """Every image of the pairs, once, sorted."""
    return sorted({name for triplet in triplets for name in (triplet.reference, triplet.target)})


def with_text(triplets: list[Triplet], file: str) -> list[Triplet]:
    """Generated triplets that say something; empty deltas are counted and left out, flagged ones counted and kept."""
    kept = [t for t in triplets if t.delta.strip()]
    flagged = sum(bool((t.extra or {}).get("flags")) for t in kept)
    if flagged or len(kept) < len(triplets):
        empty = len(triplets) - len(kept)
        say(f"{file}: {empty:,} of {len(triplets):,} deltas are empty and left out; {flagged:,} kept are flagged")
    return kept


def pairs_of(triplet: Triplet) -> list[tuple[str, str]]:
    """The pairs along which it leads: one, or one a target."""
    return [(triplet.reference, name) for name in triplet.truths or (triplet.target,)]


def held_out(triplets: list[Triplet], count: float) -> tuple[list[Triplet], list[Triplet]]:
    """(to train on, `count` held out): a number of triplets, or below 1 a share of them.

    Which ones is a function of what they say, not of their order, so that training and evaluation agree.
    Triplets of the same two images are held out together as far as the count goes; what is left of the last such pair
    is not trained on either."""

    def key(triplet: Triplet) -> tuple[str, str]:
        pair = f"0\n{triplet.reference}\n{triplet.target}"
        return hashlib.sha256(pair.encode()).hexdigest(), hashlib.sha256(triplet.delta.encode()).hexdigest()

    number = int(count) if count >= 1 else round(count * len(triplets))
    if not 0 <= number <= len(triplets) or (count and not number):
        raise UserError(f"--hold_out {count}: of {len(triplets):,} triplets that is none or too many")
    order = sorted(range(len(triplets)), key=lambda i: (key(triplets[i]), i))
    held = set(order[:number])
    pairs = {pair for i in held for pair in pairs_of(triplets[i])}
    kept = [t for t in triplets if (t.reference, t.target) not in pairs]
    return kept, [triplets[i] for i in sorted(held)]


def groups_of(triplets: list[Triplet], tree: bool) -> list[list[int]]:
    """Places of what stays together in the order of an epoch: each triplet by itself, with `tree` a subgroup's."""
    if not tree:
        return [[i] for i in range(len(triplets))]
    groups: dict[object, list[int]] = {}
    for i in sorted(range(len(triplets)), key=lambda i: (triplets[i].reference, i)):
        groups.setdefault(triplets[i].members or triplets[i].reference, []).append(i)
    return list(groups.values())
