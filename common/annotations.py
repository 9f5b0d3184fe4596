"""Readers and writers of CIRR, FashionIQ, CIRCO, LLaVA chat.json and triplet files.

A name in an annotation file is an id until an ImageStore finds its file. A mistake in a file is a UserError that names
file and record."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from common.console import UserError, say
from common.files import read_json, read_jsonl, write_json
from common.images import ImageStore, check_report, open_store, safe_name, shown

SERVER_LIMIT = 5 * 10**6  # bytes of one upload to CIRR's server
FASHIONIQ_CATEGORIES = ("dress", "shirt", "toptee")
# (queries, gallery images); FashionIQ "original" and CIRR "split", the other protocol's name as the last key
OFFICIAL = {
    ("cirr", "train"): (28225, 16939),
    ("cirr", "val"): (4181, 2297),
    ("cirr", "test1"): (4148, 2315),
    ("cirr", "val", "references"): (4181, 2165),
    ("cirr", "test1", "references"): (4148, 2178),
    ("circo", "val"): (220, 123403),
    ("circo", "test"): (800, 123403),
    ("fashioniq", "val", "dress"): (2017, 3817),
    ("fashioniq", "val", "shirt"): (2038, 6346),
    ("fashioniq", "val", "toptee"): (1961, 5373),
    ("fashioniq", "val", "dress", "val"): (2017, 2628),
    ("fashioniq", "val", "shirt", "val"): (2038, 3089),
    ("fashioniq", "val", "toptee", "val"): (1961, 2902),
}


def cirr_template(group: int = 6) -> list[tuple[int, int]]:
    """CIRR's pairs of ranks within a subgroup: a ring, then the anchor with all but its neighbours in it; 9 for 6."""
    ring = [(i, (i + 1) % group) for i in range(group)]
    return ring + [(0, i) for i in range(2, group - 1)]


@dataclass(frozen=True)
class Triplet:
    """Reference image, target image (None where hidden: CIRR test1, FashionIQ test) and modification text."""

    reference: str
    target: str | None
    delta: str
    id: int | str | None = None
    members: tuple[str, ...] | None = None  # CIRR's image set, as listed: the reference and the target are among them
    alternatives: tuple[str, ...] = ()  # FashionIQ: its two raw captions; a list of texts: those after the first
    extra: dict | None = None


@dataclass(frozen=True)
class Benchmark:
    """Queries and the gallery that is searched. Names in the gallery are unique."""

    dataset: str
    split: str
    category: str | None
    queries: tuple[Triplet, ...]
    gallery: tuple[str, ...]
    images: ImageStore

    @property
    def title(self) -> str:
        """'cirr val', 'fashioniq val dress'."""
        return " ".join(part for part in (self.dataset, self.split, self.category) if part)


@dataclass(frozen=True)
class Caption:
    """One record of LLaVA's chat.json: an image, an instruction, and the caption that answers it."""

    image: str
    prompt: str
    text: str
    image_first: bool  # the image stands before the instruction
    id: str


def _records(path: str, records: object) -> Iterable[tuple[str, dict]]:
    """(where, record) of a list of objects; `where` opens every message about that record."""
    if not isinstance(records, list):
        raise UserError(f"{path}: found {shown(records)}, wanted a list of records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {i}: found {shown(record)}, wanted an object")
        yield f"{path}, record {i}", record


def _get(record: dict, key: str, kind: type, where: str):
    if key not in record:
        raise UserError(f'{where}: has no "{key}" (found {", ".join(map(shown, record)) or "nothing"})')
    if not isinstance(record[key], kind) or isinstance(record[key], bool):
        raise UserError(f'{where}: "{key}" is {shown(record[key])}, wanted {kind.__name__}')
    return record[key]


def _name(record: dict, key: str, where: str) -> str:
    return safe_name(_get(record, key, str, where), f'{where}: "{key}"')


def _texts(values: object, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: captions are {shown(values)}, wanted a list of strings")
    return tuple(values)


def _unique(values: Iterable, path: str, what: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise UserError(f"{path}: {what} {shown(value)} occurs twice")
        seen.add(value)


def _dataset_folder(root: str | os.PathLike, dataset: str, subfolders: tuple[str, ...]) -> str:
    """`root` if it holds captions/ and image_splits/, or the folder in it that is named after the dataset and does."""
    root = os.fspath(root)
    for folder in (root, *(os.path.join(root, name) for name in subfolders)):
        if all(os.path.isdir(os.path.join(folder, part)) for part in ("captions", "image_splits")):
            return folder
    raise UserError(f"{root}: no {dataset} annotations; wanted captions/ and image_splits/ here or in {subfolders[0]}/")


def _annotation(folder: str, part: str, file: str) -> tuple[str, object]:
    path = os.path.join(folder, part, file)
    if not os.path.isfile(path):
        there = sorted(os.listdir(os.path.join(folder, part)))
        raise UserError(f"{path} not found; {part}/ holds {', '.join(there[:9]) or 'nothing'}")
    return path, read_json(path)


def read_cirr(root: str, split: str, images: str | Sequence[str] | None = None) -> Benchmark:
    """CIRR rc2: captions/cap.rc2.{split}.json and image_splits/split.rc2.{split}.json, all of which is the gallery.

    `root` holds captions/, or cirr/ that does. Pictures: `images`, or else img_raw/ beside or in that folder.
    """
    folder = _dataset_folder(root, "CIRR", ("cirr", "CIRR"))
    table_path, table = _annotation(folder, "image_splits", f"split.rc2.{split}.json")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{table_path}: found {shown(table)}, wanted an object of name: path")
    for name in table:
        safe_name(name, table_path)
        safe_name(table[name], f"{table_path}: {shown(name)}")

    path, records = _annotation(folder, "captions", f"cap.rc2.{split}.json")
    queries = []
    for where, record in _records(path, records):
        image_set = _get(record, "img_set", dict, where)
        members = tuple(safe_name(name, f"{where}: member") for name in _get(image_set, "members", list, where))
        query = Triplet(
            reference=_name(record, "reference", where),
            target=_name(record, "target_hard", where) if "target_hard" in record else None,
            delta=_get(record, "caption", str, where),
            id=_get(record, "pairid", int, where),
            members=members,
            extra={"img_set": image_set, "target_soft": record.get("target_soft")},
        )
        # members of training records are only looked at, never ranked
        for name in (query.reference, query.target, *(() if split == "train" else members)):
            if name is not None and name not in table:
                raise UserError(f"{where}: image {shown(name)} is not in {table_path}")
        queries.append(query)
    _unique((query.id for query in queries), path, "pairid")

    beside = os.path.dirname(os.path.abspath(folder))
    places = [os.path.join(beside, "img_raw"), os.path.join(folder, "img_raw"), os.path.join(folder, "images"), folder]
    return Benchmark("cirr", split, None, tuple(queries), tuple(table), open_store(images, places, table))


def read_submission(path: str, benchmark: Benchmark, metric: str) -> dict[str, list[str]]:
    """A file in the server's format, metric "recall" or "recall_subset" -> pairid -> names; UserError if it is not."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise UserError(f"{path}: {what}")

    size = os.path.getsize(path)
    require(size <= SERVER_LIMIT, f"{size:,} bytes, the server takes {SERVER_LIMIT:,}: write it without indentation")
    record = read_json(path)
    require(isinstance(record, dict), f"found a {type(record).__name__}, wanted an object of pairid: names")
    for key, wanted in (("version", "rc2"), ("metric", metric)):
        require(record.get(key) == wanted, f"{key} is {record.get(key)!r}, wanted {wanted!r}")
    lists = {key: value for key, value in record.items() if key not in ("version", "metric")}
    asked = {str(query.id): query for query in benchmark.queries}
    for what, ids in (("lacks", asked.keys() - lists.keys()), ("has unknown", lists.keys() - asked.keys())):
        require(not ids, f"{what} {len(ids)} of the {len(asked)} pairids of {benchmark.title}: {sorted(ids)[:3]}")
    gallery = set(benchmark.gallery)
    for pairid, query in asked.items():
        names = lists[pairid]
        strings = isinstance(names, list) and all(isinstance(name, str) for name in names)
        require(strings, f"pairid {pairid}: wanted a list of image names, found {str(names)[:80]}")
        allowed = (gallery if metric == "recall" else set(query.members)) - {query.reference}
        wanted = min(50 if metric == "recall" else 3, len(allowed))
        require(len(names) == wanted, f"pairid {pairid}: {len(names)} names, wanted {wanted}")
        require(len(set(names)) == len(names), f"pairid {pairid}: a name stands twice")
        require(query.reference not in names, f"pairid {pairid}: lists the query's own reference {query.reference!r}")
        stray = [name for name in names if name not in allowed]
        place = "the gallery" if metric == "recall" else "the query's img_set"
        require(not stray, f"pairid {pairid}: {stray[:1]} is not in {place}")
    return lists


def with_text(triplets: list[Triplet], file: str) -> list[Triplet]:
    """Generated triplets that say something; empty deltas are counted and left out, flagged ones counted and kept."""
    kept = [t for t in triplets if t.delta.strip()]
    flagged = sum(bool((t.extra or {}).get("flags")) for t in kept)
    if flagged or len(kept) < len(triplets):
        empty = len(triplets) - len(kept)
        say(
            f"{file}: {empty:,} of {len(triplets):,} deltas are empty and left out; {flagged:,} kept are flagged"
        )
    return kept


def write_cirr_captions(folder: str | os.PathLike, split: str, records: Iterable[dict]) -> None:
    """Writes pseudo triplets in CIRR's layout, so that other CIR code trains on them unchanged:
    captions/cap.rc2.{split}.json and image_splits/split.rc2.{split}.json, whose paths are the names themselves.

    A record: reference, target, delta; and id (-> pairid), subgroup, members where known. Without members, those of a
    subgroup are its images in the order in which they occur. Ranks are positions in members: 0 is the anchor.
    """
    records = list(records)
    groups: dict[object, dict[str, None]] = {}  # a dict keeps the order of its keys
    for i, record in enumerate(records):
        names = record.get("members") or (record["reference"], record["target"])
        groups.setdefault(record.get("subgroup", f"pair {i}"), {}).update(dict.fromkeys(names))
    written = []
    for i, record in enumerate(records):
        members = list(record.get("members") or groups[record.get("subgroup", f"pair {i}")])
        ranks = {f"{role}_rank": members.index(record[role]) for role in ("reference", "target")}
        triplet = {"pairid": record.get("id", i), "reference": record["reference"], "target_hard": record["target"]}
        image_set = {"id": record.get("subgroup", i), "members": members, **ranks}
        soft = {record["target"]: 1.0}
        written.append({**triplet, "target_soft": soft, "caption": record["delta"], "img_set": image_set})
    names = dict.fromkeys(name for triplet in written for name in triplet["img_set"]["members"])
    write_json(os.path.join(folder, "captions", f"cap.rc2.{split}.json"), written)
    write_json(os.path.join(folder, "image_splits", f"split.rc2.{split}.json"), {name: f"./{name}" for name in names})


def read_circo(root: str, split: str, images: str | Sequence[str] | None = None) -> Benchmark:
    """CIRCO: annotations/{val,test}.json over COCO's 123,403 unlabelled images of 2017, all of which is the gallery.

    `root` holds annotations/ and COCO2017_unlabeled/ as its authors lay them out. An image is named by its twelve
    digits. A query's delta is its relative caption; extra holds "truths", all right answers, the target first.
    """
    coco = os.path.join(root, "COCO2017_unlabeled")
    listing, info = _annotation(coco, "annotations", "image_info_unlabeled2017.json")
    if not isinstance(info, dict):
        raise UserError(f'{listing}: found {shown(info)}, wanted an object with "images"')
    gallery = tuple(f"{_get(r, 'id', int, w):012d}" for w, r in _records(listing, info.get("images")))
    _unique(gallery, listing, "image")
    known = set(gallery)
    path, records = _annotation(root, "annotations", f"{split}.json")
    queries = []
    for where, record in _records(path, records):
        ids = record.get("gt_img_ids", [])
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise UserError(f'{where}: "gt_img_ids" is {shown(ids)}, wanted a list of image ids')
        truths = tuple(f"{i:012d}" for i in dict.fromkeys(ids))
        target = f"{_get(record, 'target_img_id', int, where):012d}" if "target_img_id" in record else None
        reference = f"{_get(record, 'reference_img_id', int, where):012d}"
        for name in (reference, *truths, *(() if target is None else (target,))):
            if name not in known:
                raise UserError(f"{where}: image {name} is not in {listing}")
        if target is not None and target not in truths:
            raise UserError(f"{where}: target {target} is not among its gt_img_ids")
        extra = {"truths": truths, "shared_concept": record.get("shared_concept", "")}
        delta, id = _get(record, "relative_caption", str, where), _get(record, "id", int, where)
        queries.append(Triplet(reference, target, delta, id, extra=extra))
    _unique((query.id for query in queries), path, "id")
    return Benchmark(
        "circo", split, None, tuple(queries), gallery, open_store(images, [os.path.join(coco, "unlabeled2017")])
    )


def join_captions(first: str, second: str) -> str:
    """The two captions of a FashionIQ query as one text, as CLIP4Cir and its successors join them at test."""
    return f"{first.strip('.?, ').capitalize()} and {second.strip('.?, ')}"


def read_fashioniq(
    root: str, split: str, category: str, images: str | Sequence[str] | None = None, protocol: str = "original"
) -> Benchmark:
    """FashionIQ, one category. Gallery: the split file ("original") or all candidates and targets ("val").

    `delta` is both captions joined, `alternatives` the two raw ones. Pictures: `images`, or else images/ in `root`.
    """
    if protocol not in ("original", "val"):
        raise UserError(f'FashionIQ protocol is {shown(protocol)}, wanted "original" or "val"')
    folder = _dataset_folder(root, "FashionIQ", ("fashioniq", "fashionIQ", "FashionIQ", "fashion-iq"))
    split_path, gallery = _annotation(folder, "image_splits", f"split.{category}.{split}.json")
    if not isinstance(gallery, list) or not gallery:
        raise UserError(f"{split_path}: found {shown(gallery)}, wanted a list of names")
    known = {safe_name(name, f"{split_path}, entry {i}") for i, name in enumerate(gallery)}
    _unique(gallery, split_path, "image")

    path, records = _annotation(folder, "captions", f"cap.{category}.{split}.json")
    queries = []
    for where, record in _records(path, records):
        captions = _texts(record.get("captions"), where)
        if len(captions) != 2:
            raise UserError(f"{where}: has {len(captions)} captions, wanted 2")
        reference = _name(record, "candidate", where)
        target = _name(record, "target", where) if "target" in record else None
        for name in (reference, target):
            if name is not None and name not in known:
                raise UserError(f"{where}: image {shown(name)} is not in {split_path}")
        delta = join_captions(*captions)
        queries.append(Triplet(reference, target, delta, f"{category}-{len(queries)}", alternatives=captions))
    if protocol == "val":
        names = [name for query in queries for name in (query.reference, query.target) if name is not None]
        gallery = list(dict.fromkeys(names))

    beside = os.path.dirname(os.path.abspath(folder))
    places = [os.path.join(folder, "images"), os.path.join(folder, "img_raw"), os.path.join(beside, "images"), folder]
    return Benchmark("fashioniq", split, category, tuple(queries), tuple(gallery), open_store(images, places))


def write_fashioniq_captions(folder: str | os.PathLike, split: str, records: list[dict]) -> None:
    """Deltas of FashionIQ's pairs in its layout. Readers want two captions of a query: the delta stands there twice."""
    kinds: dict[str, list[dict]] = {}
    for record in records:
        kinds.setdefault(record["category"], []).append(record)
    for kind, some in kinds.items():
        captions = [
            {"target": r["target"], "candidate": r["reference"], "captions": [r["delta"], r["delta"]]} for r in some
        ]
        names = sorted({name for r in some for name in (r["reference"], r["target"])})
        write_json(os.path.join(folder, "captions", f"cap.{kind}.{split}.json"), captions)
        write_json(os.path.join(folder, "image_splits", f"split.{kind}.{split}.json"), names)


def read_benchmarks(dataset: str, root: str, split: str, category: str, images: str, protocol: str) -> list[Benchmark]:
    """One benchmark of CIRR (protocol "split" or "references") or CIRCO, or one a category of FashionIQ."""
    if not root:
        raise UserError("--root is empty; name the folder that holds the annotations")
    if dataset == "circo":
        return [read_circo(root, split, images or None)]
    if dataset == "fashioniq":
        chosen = FASHIONIQ_CATEGORIES if category == "all" else (category,)
        return [read_fashioniq(root, split, one, images or None, protocol) for one in chosen]
    benchmark = read_cirr(root, "test1" if split == "test" else split, images or None)
    if protocol == "references":
        references = {query.reference for query in benchmark.queries}
        gallery = tuple(name for name in benchmark.gallery if name in references)
        benchmark = replace(benchmark, gallery=gallery)
    return [benchmark]


def require_official(benchmark: Benchmark, protocol: str) -> None:
    """Queries and gallery must be as many as published: UserError otherwise."""
    found = (len(benchmark.queries), len(benchmark.gallery))
    key = tuple(part for part in (benchmark.dataset, benchmark.split, benchmark.category) if part)
    key += (protocol,) if protocol in ("val", "references") else ()
    wanted = OFFICIAL.get(key)
    if found != wanted:
        has = f"{benchmark.title} ({protocol}): found {found[0]:,} queries and {found[1]:,} gallery images"
        want = f"the published ones are {wanted[0]:,} and {wanted[1]:,}" if wanted else "no such split is published"
        raise UserError(f"{has}, {want}; --official false for other data in the same layout")


def read_chat(path: str | os.PathLike) -> list[Caption]:
    """LLaVA's chat.json: one picture, one instruction with <image> before or after it, one caption a record."""
    captions = []
    for where, record in _records(os.fspath(path), read_json(path)):
        turns = _get(record, "conversations", list, where)
        if len(turns) != 2 or [turn.get("from") for turn in turns if isinstance(turn, dict)] != ["human", "gpt"]:
            raise UserError(f"{where}: conversations are {shown(turns)}, wanted one turn of human and one of gpt")
        question, text = (_get(turn, "value", str, where) for turn in turns)
        question = question.strip()
        first, last = question.startswith("<image>"), question.endswith("<image>")
        if question.count("<image>") != 1 or not (first or last):
            raise UserError(f"{where}: instruction is {shown(question)}, wanted one <image> at its start or its end")
        prompt, id = question.replace("<image>", "").strip(), str(record.get("id", len(captions)))
        captions.append(Caption(_name(record, "image", where), prompt, text, first, id))
    return captions


def read_triplets(path: str | os.PathLike) -> list[Triplet]:
    """A .jsonl of {"reference", "target", "delta", ...}, or the VDG release's .json list with "caption".

    Of a list of texts ([human, generated]) the first is the delta, the others are the alternatives. Other keys are kept
    in `extra`.
    """
    path = os.fspath(path)
    records = read_jsonl(path) if path.endswith(".jsonl") else read_json(path)
    triplets = []
    for where, record in _records(path, records):
        key = "delta" if "delta" in record else "caption"
        texts = _texts(record[key], where) if isinstance(record.get(key), list) else (_get(record, key, str, where),)
        names = (safe_name(name, f"{where}: member") for name in record.get("members") or ())
        reference, target = _name(record, "reference", where), _name(record, "target", where)
        extra = {k: v for k, v in record.items() if k not in ("reference", "target", "members", "id", key)}
        id = record.get("id", len(triplets))
        triplets.append(Triplet(reference, target, texts[0], id, tuple(names) or None, texts[1:], extra))
    return triplets


def training_triplets(
    dataset: str, root: str, split: str, category: str = "all", images: str | Sequence[str] | None = None
) -> tuple[list[Triplet], ImageStore]:
    """Triplets to train on, and their pictures. dataset: "cirr" | "fashioniq" | "jsonl" (`root` is then the file)."""
    if dataset == "cirr":
        benchmarks = [read_cirr(root, split, images)]
    elif dataset == "fashioniq":
        categories = FASHIONIQ_CATEGORIES if category == "all" else (category,)
        benchmarks = [read_fashioniq(root, split, name, images) for name in categories]
    elif dataset == "jsonl":
        return read_triplets(root), open_store(images, [os.path.dirname(os.path.abspath(root))])
    else:
        raise UserError(f'dataset is {shown(dataset)}, wanted "cirr", "fashioniq" or "jsonl"')
    triplets = [query for benchmark in benchmarks for query in benchmark.queries]
    if any(triplet.target is None for triplet in triplets):
        raise UserError(f"{dataset} {split}: its targets are hidden, so it cannot be trained on; take another split")
    return triplets, benchmarks[0].images


def names_of(benchmark: Benchmark) -> list[str]:
    """Every image of a benchmark, once: the gallery, then references, targets and members outside it."""
    asked = [(q.reference, q.target, *(q.members or ())) for q in benchmark.queries]
    return list(dict.fromkeys([*benchmark.gallery, *(name for names in asked for name in names if name is not None)]))


def check_benchmarks(benchmarks: list[Benchmark]) -> str:
    """Prints expected, present and unreadable images; returns one line of complaint, empty when all are there."""
    bad = []
    for benchmark in benchmarks:
        text, ok = check_report(names_of(benchmark), benchmark.images)
        counts = f"{len(benchmark.queries):,} queries, {len(benchmark.gallery):,} gallery images"
        say(f"{benchmark.title}: {counts}; {text}")
        if not ok:
            bad.append((benchmark.title, benchmark.images.missing(names_of(benchmark))))
    if len(benchmarks) > 1:
        say(f"together: {sum(len(benchmark.queries) for benchmark in benchmarks):,} queries")
    named = "; ".join(f"{title}: " + (f"first {m[0]!r}" if m else "unreadable files") for title, m in bad)
    count = sum(len(missing) for _, missing in bad)
    return f"{count:,} images missing ({named}); add them or name their folder with --images" if bad else ""
