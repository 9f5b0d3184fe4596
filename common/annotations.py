"""Readers of CIRR, FashionIQ, CIRCO, LLaVA's chat.json and one's own data: queries, galleries, pictures.

A name in an annotation file is an id until an ImageStore finds its file. A mistake in a file is a UserError that names
file and record."""

import os
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, replace

from common.batches import faults_of
from common.console import UserError, say
from common.files import read_json, read_lines
from common.images import (
    OWN_MISSING,
    ImageStore,
    list_images,
    open_store,
    report_of,
    safe_name,
    shown,
    unreadable,
    write_faults,
)
from common.triplets import (
    Triplet,
    field_of,
    held_out,
    name_of,
    read_triplets,
    records_of,
    require_unique,
    several_of,
    split_paths,
    texts_of,
)

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


def _dataset_folder(root: str | os.PathLike, dataset: str, subfolders: tuple[str, ...]) -> str:
    """`root` if it holds captions/ and image_splits/, or the folder in it that is named after the dataset and does."""
    root = os.fspath(root)
    for folder in (root, *(os.path.join(root, name) for name in subfolders)):
        if all(os.path.isdir(os.path.join(folder, part)) for part in ("captions", "image_splits")):
            return folder
    if os.path.isfile(root):
        raise UserError(
            f"{root} is a file, {dataset} a folder of annotations; a file of one's own wants --dataset jsonl"
        )
    raise UserError(f"{root}: no {dataset} annotations; wanted captions/ and image_splits/ here or in {subfolders[0]}/")


def _annotation(folder: str, part: str, file: str) -> tuple[str, object]:
    path = os.path.join(folder, part, file)
    if not os.path.isfile(path):
        there = sorted(os.listdir(os.path.join(folder, part)))
        raise UserError(f"{path} not found; {part}/ holds {', '.join(there[:9]) or 'nothing'}")
    return path, read_json(path)


def read_cirr(root: str, split: str, images: str | Sequence[str] | None = None) -> Benchmark:
    """CIRR rc2: captions/cap.rc2.{split}.json and image_splits/split.rc2.{split}.json, all of which is the gallery.

    `root` holds captions/, or cirr/ that does. Pictures: `images`, or else img_raw/ or images/ beside or in that
    folder, or train/, dev/ and test1/ beside it, as CLIP4Cir and SPRC keep them in cirr_dataset/.
    """
    folder = _dataset_folder(root, "CIRR", ("cirr", "CIRR", "cirr_dataset/cirr", "cirr_dataset"))
    table_path, table = _annotation(folder, "image_splits", f"split.rc2.{split}.json")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{table_path}: found {shown(table)}, wanted an object of name: path")
    for name in table:
        safe_name(name, table_path)
        safe_name(table[name], f"{table_path}: {shown(name)}")

    path, records = _annotation(folder, "captions", f"cap.rc2.{split}.json")
    queries = []
    for where, record in records_of(path, records):
        image_set = field_of(record, "img_set", dict, where)
        members = tuple(safe_name(name, f"{where}: member") for name in field_of(image_set, "members", list, where))
        query = Triplet(
            reference=name_of(record, "reference", where),
            target=name_of(record, "target_hard", where) if "target_hard" in record else None,
            delta=field_of(record, "caption", str, where),
            id=field_of(record, "pairid", int, where),
            members=members,
            extra={"img_set": image_set, "target_soft": _soft_of(record, where)},
        )
        # members of training records are only looked at, never ranked
        for name in (query.reference, query.target, *(() if split == "train" else members)):
            if name is not None and name not in table:
                raise UserError(f"{where}: image {shown(name)} is not in {table_path}")
        queries.append(query)
    require_unique((query.id for query in queries), path, "pairid")

    beside = os.path.dirname(os.path.abspath(folder))
    places = [os.path.join(place, name) for name in ("img_raw", "images") for place in (beside, folder)]
    store = open_store(images, [*places, folder, beside], table)
    return Benchmark("cirr", split, None, tuple(queries), tuple(table), store)


def _soft_of(record: dict, where: str) -> dict[str, float] | None:
    """target_soft of a record of CIRR: name -> what it is worth, from -1 (wrong) to 1 (right)."""
    soft = record.get("target_soft")
    if soft is None:
        return None
    values = soft.values() if isinstance(soft, dict) else [None]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and -1 <= x <= 1 for x in values):
        raise UserError(f'{where}: "target_soft" is {str(soft)[:80]}, wanted image names with numbers from -1 to 1')
    return {name: float(value) for name, value in soft.items()}


def read_circo(root: str, split: str, images: str | Sequence[str] | None = None) -> Benchmark:
    """CIRCO: annotations/{val,test}.json over COCO's 123,403 unlabelled images of 2017, all of which is the gallery.

    `root` holds annotations/ and COCO2017_unlabeled/ as its authors lay them out. An image is named by its twelve
    digits. A query's delta is its relative caption, truths are all right answers, the target
    first; extra holds "aspects", the semantic aspects of the query.
    """
    coco = os.path.join(root, "COCO2017_unlabeled")
    listing, info = _annotation(coco, "annotations", "image_info_unlabeled2017.json")
    if not isinstance(info, dict):
        raise UserError(f'{listing}: found {shown(info)}, wanted an object with "images"')
    gallery = tuple(f"{field_of(r, 'id', int, w):012d}" for w, r in records_of(listing, info.get("images")))
    require_unique(gallery, listing, "image")
    known = set(gallery)
    path, records = _annotation(root, "annotations", f"{split}.json")
    queries = []
    for where, record in records_of(path, records):
        ids = record.get("gt_img_ids", [])
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise UserError(f'{where}: "gt_img_ids" is {shown(ids)}, wanted a list of image ids')
        truths = tuple(f"{i:012d}" for i in dict.fromkeys(ids))
        target = f"{field_of(record, 'target_img_id', int, where):012d}" if "target_img_id" in record else None
        reference = f"{field_of(record, 'reference_img_id', int, where):012d}"
        for name in (reference, *truths, *(() if target is None else (target,))):
            if name not in known:
                raise UserError(f"{where}: image {name} is not in {listing}")
        if target is not None and target not in truths:
            raise UserError(f"{where}: target {target} is not among its gt_img_ids")
        aspects = record.get("semantic_aspects", [])
        if not isinstance(aspects, list) or not all(isinstance(aspect, str) for aspect in aspects):
            raise UserError(f'{where}: "semantic_aspects" is {shown(aspects)}, wanted a list of words')
        extra = {"shared_concept": record.get("shared_concept", ""), "aspects": tuple(aspects)}
        delta, id = field_of(record, "relative_caption", str, where), field_of(record, "id", int, where)
        queries.append(Triplet(reference, target, delta, id, truths=truths, extra=extra))
    require_unique((query.id for query in queries), path, "id")
    return Benchmark(
        "circo", split, None, tuple(queries), gallery, open_store(images, [os.path.join(coco, "unlabeled2017")])
    )


def join_captions(*captions: str) -> str:
    """The captions of a FashionIQ query as one text, as CLIP4Cir and its successors join them at test.

    A blank one is left out: 13 of the train split and 3 of val are, each beside one that is not."""
    said = [text.strip(".?, ") for text in captions]
    first, *others = [text for text in said if text] or [""]
    return " and ".join([first.capitalize(), *others])


def read_fashioniq(
    root: str,
    split: str,
    category: str,
    images: str | Sequence[str] | None = None,
    protocol: str = "original",
    join: str = "forward",
) -> Benchmark:
    """FashionIQ, one category. Gallery: the split file ("original") or all candidates and targets ("val").

    `delta` is both captions joined, the first one first (join "forward", as CLIP4Cir at test) or last ("reverse");
    `alternatives` are the two raw ones. Pictures: `images`, or else images/ in `root`, or dress/, shirt/ and toptee/ in
    those (CoVR). `root` holds captions/, or fashioniq/ or fashionIQ_dataset/ (CLIP4Cir, SPRC) that does.
    """
    if join not in ("forward", "reverse"):
        raise UserError(f'--join {shown(join)}: wanted "forward" or "reverse"')
    if protocol not in ("original", "val"):
        raise UserError(f'FashionIQ protocol is {shown(protocol)}, wanted "original" or "val"')
    subfolders = ("fashioniq", "fashionIQ", "FashionIQ", "fashion-iq", "fashionIQ_dataset")
    folder = _dataset_folder(root, "FashionIQ", subfolders)
    split_path, gallery = _annotation(folder, "image_splits", f"split.{category}.{split}.json")
    if not isinstance(gallery, list) or not gallery:
        raise UserError(f"{split_path}: found {shown(gallery)}, wanted a list of names")
    known = {safe_name(name, f"{split_path}, entry {i}") for i, name in enumerate(gallery)}
    require_unique(gallery, split_path, "image")

    path, records = _annotation(folder, "captions", f"cap.{category}.{split}.json")
    queries, blank = [], 0
    for where, record in records_of(path, records):
        captions = texts_of(record.get("captions"), where)
        if len(captions) != 2:
            raise UserError(f"{where}: has {len(captions)} captions, wanted 2")
        reference = name_of(record, "candidate", where)
        target = name_of(record, "target", where) if "target" in record else None
        for name in (reference, target):
            if name is not None and name not in known:
                raise UserError(f"{where}: image {shown(name)} is not in {split_path}")
        delta = join_captions(*(captions if join == "forward" else captions[::-1]))
        blank += sum(not text.strip(".?, ") for text in captions)
        queries.append(Triplet(reference, target, delta, f"{category}-{len(queries)}", alternatives=captions))
    if protocol == "val":
        names = [name for query in queries for name in (query.reference, query.target) if name is not None]
        gallery = list(dict.fromkeys(names))

    beside = os.path.dirname(os.path.abspath(folder))
    places = [os.path.join(folder, "images"), os.path.join(folder, "img_raw"), os.path.join(beside, "images"), folder]
    store = open_store(images, places)
    kinds = dict.fromkeys([category, *FASHIONIQ_CATEGORIES])  # its own folder first; a picture may lie in another's
    below = [os.path.join(root, kind) for root in store.roots for kind in kinds]
    store.roots += [folder for folder in below if os.path.isdir(folder)]
    benchmark = Benchmark("fashioniq", split, category, tuple(queries), tuple(gallery), store)
    if blank:
        text = f"{benchmark.title}: {blank:,} of {2 * len(queries):,} captions are blank"
        say(f"{text}; the other caption of the query stands alone")
    return benchmark


def read_benchmarks(
    dataset: str, root: str, split: str, category: str, images: str, protocol: str, join: str = "forward"
) -> list[Benchmark]:
    """One benchmark of CIRR (protocol "split" or "references") or CIRCO, or one a category of FashionIQ.

    Queries without any text are counted and kept: CIRR's test1 has one (27098), which its server wants answered."""
    if not root:
        raise UserError("--root is empty; name the folder that holds the annotations")
    if dataset == "circo":
        benchmarks = [read_circo(root, split, images or None)]
    elif dataset == "fashioniq":
        chosen = FASHIONIQ_CATEGORIES if category == "all" else (category,)
        benchmarks = [read_fashioniq(root, split, one, images or None, protocol, join) for one in chosen]
    else:
        benchmarks = [read_cirr(root, "test1" if split == "test" else split, images or None)]
    if protocol == "references":
        references = {query.reference for query in benchmarks[0].queries}
        gallery = tuple(name for name in benchmarks[0].gallery if name in references)
        benchmarks = [replace(benchmarks[0], gallery=gallery)]
    for benchmark in benchmarks:
        say_silent(benchmark)
    return benchmarks


def say_silent(benchmark: Benchmark) -> None:
    """One line if any query has no text."""
    if silent := [query.id for query in benchmark.queries if not query.delta.strip()]:
        first = f"{len(silent):,} queries have no text, first {shown(silent[0])}"
        say(f"{benchmark.title}: {first}; they are asked by their image alone")


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
    for where, record in records_of(os.fspath(path), read_json(path)):
        turns = field_of(record, "conversations", list, where)
        if len(turns) != 2 or [turn.get("from") for turn in turns if isinstance(turn, dict)] != ["human", "gpt"]:
            raise UserError(f"{where}: conversations are {shown(turns)}, wanted one turn of human and one of gpt")
        question, text = (field_of(turn, "value", str, where) for turn in turns)
        question = question.strip()
        first, last = question.startswith("<image>"), question.endswith("<image>")
        if question.count("<image>") != 1 or not (first or last):
            raise UserError(f"{where}: instruction is {shown(question)}, wanted one <image> at its start or its end")
        prompt, id = question.replace("<image>", "").strip(), str(record.get("id", len(captions)))
        captions.append(Caption(name_of(record, "image", where), prompt, text, first, id))
    return captions


def own_alone(dataset: str, **flags: object) -> None:
    """UserError where a flag that is of one's own triplets alone is given with another data set."""
    for name, value in flags.items():
        if value and dataset != "jsonl":
            raise UserError(f"--{name} {value} is of --dataset jsonl alone, and this is {dataset}: leave it out")


def training_triplets(
    dataset: str,
    root: str,
    split: str,
    category: str = "all",
    images: str | Sequence[str] | None = None,
    keys: str = "",
    pool: str = "",
    hold_out: float = 0,
) -> tuple[list[Triplet], ImageStore]:
    """Triplets to train on, and their pictures. dataset: "cirr" | "fashioniq" | "jsonl".

    For "jsonl" `root` is a file or several (read_triplets, with its `keys` and `pool`), and `hold_out` as many are kept
    for read_own. FashionIQ's queries without any text are left out."""
    own_alone(dataset, keys=keys, hold_out=hold_out)
    if dataset == "cirr":
        benchmarks = [read_cirr(root, split, images)]
    elif dataset == "fashioniq":
        categories = FASHIONIQ_CATEGORIES if category == "all" else (category,)
        benchmarks = [read_fashioniq(root, split, name, images) for name in categories]
    elif dataset == "jsonl":
        triplets = without_selves(read_triplets(root, keys, pool), root)
        trained, held = held_out(triplets, hold_out)
        if several := sum(bool(t.truths) for t in triplets):
            say(f"{root}: {several:,} of {len(triplets):,} triplets have several targets: the first is trained on")
        if held:
            more = len(triplets) - len(trained) - len(held)
            say(f"{root}: {len(held):,} of {len(triplets):,} triplets are held out, {more:,} more share their images")
        store = own_store(root, images)
        store.require_one_each(sorted({name for t in trained for name in (t.reference, t.target)}))
        return trained, store
    else:
        raise UserError(f'dataset is {shown(dataset)}, wanted "cirr", "fashioniq" or "jsonl"')
    triplets = [query for benchmark in benchmarks for query in benchmark.queries]
    if any(triplet.target is None for triplet in triplets):
        raise UserError(f"{dataset} {split}: its targets are hidden, so it cannot be trained on; take another split")
    if dataset == "fashioniq" and (silent := sum(not triplet.delta for triplet in triplets)):
        say(f"{dataset} {split}: {silent:,} queries without any text are left out")
        triplets = [triplet for triplet in triplets if triplet.delta]
    return triplets, benchmarks[0].images


# ---- one's own triplets as a benchmark ----
def held_of(root: str, keys: str = "", pool: str = "", hold_out: float = 0) -> list[Triplet]:
    """What training_triplets leaves out for evaluation of one's own file."""
    triplets = [t for t in read_triplets(root, keys, pool) if t.reference not in (t.target, *t.truths)]
    return held_out(triplets, hold_out)[1]


def without_selves(triplets: list[Triplet], path: str) -> list[Triplet]:
    """Those that lead from a picture to another one; says how many do not, UserError where none does."""
    kept, selves = [], []
    for t in triplets:
        (selves if t.reference in (t.target, *t.truths) else kept).append(t)
    if selves:
        first = selves[0].id
        what = f"{len(selves):,} of {len(triplets):,} triplets lead from a picture to itself, first id"
        if not kept:
            raise UserError(f"{path}: {what} {shown(first)}; wanted a target that is another picture")
        say(f"{path}: {what} {shown(first)}: left out")
    return kept


def own_store(path: str, images: str | Sequence[str] | None) -> ImageStore:
    """Pictures of one's own files of triplets: the folder given, or those of the files. Photos may be large."""
    beside = dict.fromkeys(os.path.dirname(os.path.abspath(file)) for file in split_paths(path))
    return open_store(images, list(beside), own=True)


def read_own(
    path: str,
    images: str | Sequence[str] | None = None,
    gallery: str = "",
    hold_out: float = 0,
    part: str = "held",
    keys: str = "",
    pool: str = "",
) -> Benchmark:
    """One's own triplets as a benchmark, dataset "jsonl". Gallery: every picture of the image folder, or the names in
    the file `gallery` (.txt, one a line, or a .json list).

    hold_out: as many triplets as training with the same number left out; part: "held" those, "train" the others, "all".
    A name without folder or suffix is the picture of the gallery that it finds. UserError for a target that the gallery
    lacks: it could never be found."""
    if part not in ("held", "train", "all"):
        raise UserError(f'part is {shown(part)}, wanted "held", "train" or "all"')
    triplets, store = without_selves(read_triplets(path, keys, pool), path), own_store(path, images)
    if hold_out and part != "all":
        trained, held = held_out(triplets, hold_out)
        triplets = held if part == "held" else trained
    names = gallery_names(gallery, store)
    known = set(names)
    queries = []
    for t in triplets:
        reference, target, *truths = (gallery_name(name, known, store) for name in (t.reference, t.target, *t.truths))
        queries.append(replace(t, reference=reference, target=target, truths=several_of(truths)))
    answers = [name for t in queries for name in t.truths or (t.target,)]
    stray = [name for name in answers if name not in known and store.find(name)]
    if stray:
        where = gallery or ", ".join(store.roots)
        raise UserError(f"{path}: {len(stray):,} targets are not in the gallery {where}, first {shown(stray[0])}")
    benchmark = Benchmark("jsonl", part if hold_out else "all", None, tuple(queries), tuple(names), store)
    store.require_one_each(names_of(benchmark))
    say_silent(benchmark)
    return benchmark


def note_of_targets(benchmark: Benchmark) -> str:
    """What the protocol line must say of one's own queries that have several targets; empty where there are none."""
    several = sum(bool(query.truths) for query in benchmark.queries) if benchmark.dataset == "jsonl" else 0
    return f"of {several:,} queries that have several targets the best ranked one counts in R@K" if several else ""


def gallery_name(name: str, known: Container[str], store: ImageStore) -> str:
    """A name without folder or suffix as the gallery's `known` names have the picture it finds; else as it is."""
    below = name if name in known else store.relative(name).removeprefix("./")
    return below if below in known else name


def gallery_names(gallery: str, store: ImageStore) -> list[str]:
    if not gallery:
        return list(dict.fromkeys(name for root in store.roots for name in list_images(root)))
    if gallery.endswith(".json"):
        names = list(texts_of(read_json(gallery), gallery))
    elif gallery.endswith(".txt"):
        names = read_lines(gallery, "--gallery")
    else:
        raise UserError(f"--gallery {gallery}: wanted a .txt (a name a line), a .json list, or none for the folder")
    require_unique(names, gallery, "image")
    return [safe_name(name, gallery) for name in names]


# ---- pictures of a benchmark ----
def images_of(query: Triplet) -> list[str]:
    """Every image without which a query cannot be measured: reference, target, img_set, all right answers."""
    names = (query.reference, query.target, *(query.members or ()), *query.truths)
    return [name for name in names if name is not None]


def names_of(benchmark: Benchmark) -> list[str]:
    """Every image of a benchmark, once: the gallery, then references, targets and members outside it."""
    asked = (name for query in benchmark.queries for name in images_of(query))
    return list(dict.fromkeys([*benchmark.gallery, *asked]))


def without(benchmark: Benchmark, lost: Collection[str]) -> tuple[Benchmark, str]:
    """The benchmark without some images and without the queries that need one of them; and how many those are."""
    lost = set(lost)
    queries = tuple(query for query in benchmark.queries if lost.isdisjoint(images_of(query)))
    gallery = tuple(name for name in benchmark.gallery if name not in lost)
    if not queries:
        raise UserError(f"{benchmark.title}: every query needs an image that is missing; complete the folder")
    counts = []
    for what, all_, kept in (("queries", benchmark.queries, queries), ("gallery images", benchmark.gallery, gallery)):
        counts.append(f"{len(all_) - len(kept):,} of {len(all_):,} {what}")
    note = f"{benchmark.title}: {' and '.join(counts)} left out" if lost else ""
    return replace(benchmark, queries=queries, gallery=gallery), note


def without_missing(benchmark: Benchmark, share: float, workers: int = 0) -> tuple[Benchmark, str, dict[str, str]]:
    """The benchmark without the images that are missing or cannot be decoded, if they are at most `share` of all; of
    one's own triplets, where some are always broken, a tenth.

    -> benchmark, what its protocol line must say (empty if nothing is missing), image -> what is wrong with it.
    Of others with share 0 nothing is looked at and nothing left out: whoever measures then stops at a missing image."""
    own = benchmark.dataset == "jsonl"
    if not share and not own:
        return benchmark, "", {}
    names = names_of(benchmark)
    faults = faults_of(names, benchmark.images, workers)
    if not faults:
        return benchmark, "", {}
    first = f"{len(faults):,} of {len(names):,} images are missing or unreadable, first {next(iter(faults.values()))}"
    if len(faults) > max(share, OWN_MISSING if own else 0) * len(names):
        most = f"--missing {share} allows" if share else "a tenth: correct --images, or go on by a larger --missing"
        raise UserError(f"{benchmark.title}: {first}; that is more than {most}")
    if any(query.target is None for query in benchmark.queries):
        raise UserError(f"{benchmark.title}: {first}; its server wants every query, so --missing cannot help")
    benchmark, note = without(benchmark, faults)
    return benchmark, note if own else f"{note}, not comparable with the full protocol", faults


def all_without_missing(
    benchmarks: list[Benchmark], share: float, listing: str, workers: int = 0
) -> tuple[list[Benchmark], str]:
    """without_missing of each; their notes in one line; what is missing goes into the file `listing`."""
    kept, notes, faults = [], [], {}
    for benchmark in benchmarks:
        benchmark, note, missing = without_missing(benchmark, share, workers)
        kept.append(benchmark)
        notes += [note] * bool(note)
        faults |= missing
    if share or any(benchmark.dataset == "jsonl" for benchmark in benchmarks):
        write_faults(faults.values(), listing)
    if faults:
        say(f"{len(faults):,} pictures cannot be read, all in {listing}: {'; '.join(notes)}")
    return kept, "; ".join(notes)


def check_benchmarks(
    benchmarks: list[Benchmark], share: float = 0.0, decode: bool = False, workers: int = 0, listing: str = ""
) -> str:
    """Prints expected, present and unreadable images; returns one line of complaint, empty when all are there, or when
    at most `share` of a benchmark's images is not. All that is wrong goes into the file `listing`."""
    bad, lines = [], {}
    for benchmark in benchmarks:
        names = names_of(benchmark)
        faults = unreadable(names, benchmark.images, workers, decode)
        lines |= faults
        counts = f"{len(benchmark.queries):,} queries, {len(benchmark.gallery):,} gallery images"
        say(f"{benchmark.title}: {counts}; {report_of(len(names), faults, benchmark.images)}")
        if len(faults) > share * len(names):
            bad.append((benchmark.title, benchmark.images.missing(names)))
        elif faults:
            say(f"{without(benchmark, faults)[1]}, not comparable with the full protocol")
    if len(benchmarks) > 1:
        say(f"together: {sum(len(benchmark.queries) for benchmark in benchmarks):,} queries")
    if listing:
        write_faults(lines.values(), listing)
    named = "; ".join(f"{title}: " + (f"first {m[0]!r}" if m else "unreadable files") for title, m in bad)
    count = sum(len(missing) for _, missing in bad)
    where = f", all in {listing}" if listing else ""
    return f"{count:,} images missing ({named}){where}; add them or name their folder with --images" if bad else ""
