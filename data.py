"""Readers of CIRR, FashionIQ, LLaVA chat.json, triplet files and image folders; Pillow transforms; orders and batches.

Nothing here knows a model. A name in an annotation file is an id until an ImageStore finds its file, and no name leaves
the folders that were given. A mistake in a file is a UserError that names file and record. One function, open_image,
decodes for every stage.
"""

import functools
import math
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

import common
from common import UserError, read_json, read_jsonl, write_json

if TYPE_CHECKING:
    import torch

# ---- pictures from files that others made ----
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow reads 40 more, some of them by running other programs (EPS)
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")  # tried in this order behind a name that has none
MAX_PIXELS = 64_000_000  # a 65-byte PNG can claim 400 million
MAX_ASPECT = 20  # a 1 x 5000 picture becomes 250 million pixels when its shortest edge is resized to 224
MAX_NAME = 1024  # characters of a name in an annotation file
SERVER_LIMIT = 5 * 10**6  # bytes of one upload to CIRR's server
GREY = (128, 128, 128)  # what rotation and translation uncover

# ---- the benchmarks as published ----
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

# EXIF orientation -> the transpose that makes the picture upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what Pillow's three decoders raise on damaged bytes
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error)
DAMAGED += (zlib.error, Image.DecompressionBombError)
# Pillow warns at 89 million pixels; _opened refuses at 64 million, in one line that names the file
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ---- names ----
def safe_name(name: object, where: str = "image name") -> str:
    """Returns `name` if it can only mean a file below a root; UserError otherwise. `where` opens the message."""
    if not isinstance(name, str):
        raise UserError(f"{where}: found {shown(name)}, wanted an image name (a string)")
    reason = None
    if len(name) > MAX_NAME:
        reason = f"has {len(name):,} characters, at most {MAX_NAME:,} are read"
    elif any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in name):
        reason = "contains a control character"
    elif name.startswith(("/", "\\", "~/")) or re.match(r"[A-Za-z]:", name):
        reason = "is an absolute path"  # os.path.join(root, "/etc/passwd") would drop the root
    elif ".." in re.split(r"[/\\]", name):
        reason = 'contains ".."'
    elif not [part for part in name.split("/") if part not in ("", ".")]:
        reason = "names no file"
    if reason:
        raise UserError(f"{where}: {shown(name)} {reason}; names are relative to the image folder")
    return name


def shown(value: object) -> str:
    """A value as one short printable line for an error message."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value):,}"
    text = ascii(value[:81] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- one picture ----
def open_image(path: str | os.PathLike) -> Image.Image:
    """Decodes a JPEG, PNG or WEBP file (first frame) to an upright RGB picture; transparency is laid on white."""
    with _opened(path) as image:
        try:
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            image = _rgb(image)
        except DAMAGED as error:
            raise UserError(f"{path}: cannot be decoded ({_reason(error)}); replace or remove the file") from None
    # applied here and nowhere else: the stored pixels of a phone's photograph lie on their side
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def verify_image(path: str | os.PathLike) -> None:
    """A quick look: header, size, and checksums where the format has them; does not decode. UserError if bad."""
    with _opened(path) as image:
        try:
            image.verify()
        except DAMAGED as error:
            raise UserError(f"{path}: is damaged ({_reason(error)}); replace or remove the file") from None


def _opened(path: str | os.PathLike) -> Image.Image:
    """The file's header, read and judged; pixels are not decoded yet."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
        raise UserError(f"{path}: is not a regular file, wanted a picture ({', '.join(FORMATS)})")
    try:
        image = Image.open(path, formats=FORMATS)
    except DAMAGED as error:
        raise UserError(f"{path}: is no readable {', '.join(FORMATS)} picture ({_reason(error)})") from None
    width, height = image.size
    reason = None
    if width * height > MAX_PIXELS:
        reason = f"more than {MAX_PIXELS // 1_000_000} million pixels"
    elif max(width, height) > MAX_ASPECT * min(width, height):
        reason = f"longer than {MAX_ASPECT} times its width"
    if reason:
        image.close()
        raise UserError(f"{path}: is {width} x {height}, {reason}; resize or crop it")
    return image


def _reason(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ---- names to files ----
class ImageStore:
    """Finds the file of an image name below one or several root folders.

    `roots`: a folder, several joined by os.pathsep, or a list. `table`: name -> path below a root, as in CIRR's split
    files. Under each root a name is tried as the table says, as it is, and with each of EXTENSIONS.
    """

    def __init__(self, roots: str | os.PathLike | Sequence[str], table: dict[str, str] | None = None):
        if isinstance(roots, (str, os.PathLike)):
            roots = os.fspath(roots)
            roots = [roots] if os.path.isdir(roots) else [part for part in roots.split(os.pathsep) if part]
        self.roots = [os.fspath(root) for root in roots]
        self.homes = [os.path.realpath(root) for root in self.roots]
        self.table = table or {}
        self._found: dict[str, str] = {}

    def find(self, name: str) -> str | None:
        """Path of the image, or None. UserError for a name or a link that leaves the root."""
        if name in self._found:
            return self._found[name]
        candidates = [safe_name(name)] + [name + extension for extension in EXTENSIONS]
        if name in self.table:
            entry = safe_name(self.table[name])
            stem = os.path.splitext(entry)[0]  # copies of CIRR converted from .png to .jpg are common
            candidates = [entry] + [stem + extension for extension in EXTENSIONS] + candidates
        for root, home in zip(self.roots, self.homes, strict=True):
            for candidate in candidates:
                path = os.path.join(root, candidate)
                if os.path.exists(path) and not os.path.isdir(path):
                    if os.path.commonpath([os.path.realpath(path), home]) != home:
                        raise UserError(f"{path}: is a link out of {root}; give the folder it points to instead")
                    self._found[name] = path
                    return path
        return None

    def path(self, name: str) -> str:
        """Path of the image; FileNotFoundError names the image and the folders that were searched."""
        path = self.find(name)
        if path is None:
            searched = ", ".join(self.roots) or "no folder"
            raise FileNotFoundError(f"image {shown(name)} not found in {searched}; add it or give the folder it is in")
        return path

    def open(self, name: str) -> Image.Image:
        return open_image(self.path(name))

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.find(name) is None]


def list_images(root: str | os.PathLike) -> list[str]:
    """Names of all pictures below `root`, relative to it, with "/", sorted."""
    root, names = os.fspath(root), []
    if not os.path.isdir(root):
        raise UserError(f"image folder {root} not found")
    for folder, subfolders, files in os.walk(root):
        for subfolder in subfolders:
            link = os.path.join(folder, subfolder)
            if os.path.islink(link):  # os.walk would skip its pictures in silence
                raise UserError(f"{link}: is a link to a folder; copy it or give it as image folder by itself")
        for file in files:
            if file.lower().endswith(EXTENSIONS) and not file.startswith("."):  # macOS leaves ._x.jpg beside x.jpg
                names.append(os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/"))
    if not names:
        raise UserError(f"image folder {root} holds no {'/'.join(EXTENSIONS)} file")
    return sorted(safe_name(name, f"file in {root}") for name in names)


def _store(images: str | Sequence[str] | None, places: list[str], table: dict | None = None) -> ImageStore:
    """The folders that the user gives, which must exist; else the usual places."""
    if not images:
        return ImageStore(places, table)
    store = ImageStore(images, table)
    for root in store.roots:
        if not os.path.isdir(root):
            raise UserError(f"image folder {root} not found")
    return store


# ---- records ----
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


# ---- CIRR ----
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
    return Benchmark("cirr", split, None, tuple(queries), tuple(table), _store(images, places, table))


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
        common.say(
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


# ---- CIRCO ----
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
        "circo", split, None, tuple(queries), gallery, _store(images, [os.path.join(coco, "unlabeled2017")])
    )


# ---- FashionIQ ----
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
    return Benchmark("fashioniq", split, category, tuple(queries), tuple(gallery), _store(images, places))


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


# ---- any benchmark ----
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


# ---- other files ----
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
        return read_triplets(root), _store(images, [os.path.dirname(os.path.abspath(root))])
    else:
        raise UserError(f'dataset is {shown(dataset)}, wanted "cirr", "fashioniq" or "jsonl"')
    triplets = [query for benchmark in benchmarks for query in benchmark.queries]
    if any(triplet.target is None for triplet in triplets):
        raise UserError(f"{dataset} {split}: its targets are hidden, so it cannot be trained on; take another split")
    return triplets, benchmarks[0].images


# ---- items to train a CIR model on ----
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
    """What a human wrote; FashionIQ's two captions as CLIP4Cir trains on them: both, swapped, each alone."""
    if dataset != "fashioniq":
        return (triplet.delta,)
    one, two = triplet.alternatives
    alone = (text.strip(".?, ").capitalize() for text in (one, two))
    return join_captions(one, two), join_captions(two, one), *alone


def backs(triplets: Iterable[Triplet]) -> tuple[str, ...]:
    """The reverse_delta of each that has one which says something."""
    texts = ((t.extra or {}).get("reverse_delta") for t in triplets)
    return tuple(text for text in texts if isinstance(text, str) and text.strip())


def human_items(triplets: list[Triplet], dataset: str, generated: list[Triplet], deltas: bool = True) -> list[Item]:
    """Human triplets; generated deltas of the same pairs are a second group (dagger: one of the two is drawn).

    deltas: False takes only the reversed texts of what was generated."""
    also: dict[tuple[str, str], list[Triplet]] = {}
    for t in generated:
        also.setdefault((t.reference, t.target), []).append(t)
    items = []
    for t in triplets:
        groups, same = [human_deltas(t, dataset)], also.get((t.reference, t.target), [])
        if dataset == "jsonl" and t.alternatives:
            groups.append(t.alternatives)  # the VDG release's [human, generated]: those after the human one
        if same and deltas:
            groups.append(tuple(other.delta for other in same))
        items.append(Item((0, t.reference), (0, t.target), tuple(groups), backs([t, *same])))
    without = sum((t.reference, t.target) not in also for t in triplets)
    if generated and without == len(triplets):
        raise UserError("--same_pairs: none of its (reference, target) pairs is a human triplet's; wrong file?")
    if generated and without:
        common.say(f"{without:,} of {len(triplets):,} human triplets have no generated delta in --same_pairs")
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
) -> tuple[list[ImageStore], list[list[Item]]]:
    """-> image stores and items of stream 0 (human) and stream 1 (auxiliary), either may be empty, not both."""
    stores, streams = [ImageStore([]), ImageStore([])], [[], []]
    if human:
        if not root:
            raise UserError("--root is empty: where the triplets lie, or --triplets false with --pseudo")
        triplets, stores[0] = training_triplets(dataset, root, split, "all", images or None)
        same = with_text(read_triplets(same_pairs), same_pairs) if same_pairs else []
        streams[0] = human_items(triplets, dataset, same, same_deltas)
    if pseudo:
        triplets, stores[1] = training_triplets("jsonl", pseudo, "", "all", pseudo_images or None)
        kept = with_text(triplets, pseudo)
        streams[1] = [Item((1, t.reference), (1, t.target), ((t.delta,),), backs([t])) for t in kept]
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
        rng = common.rng(seed, "delta", stream, epoch, i)
        group = items[i].deltas[rng.integers(len(items[i].deltas))]
        delta = group[rng.integers(len(group))]
        back = items[i].back[rng.integers(len(items[i].back))] if items[i].back else ""
        draws.append(Draw(items[i].reference, items[i].target, delta, (stream, epoch, i), back))
    return draws


# ---- what is there ----
def drop_missing(items: list, names_of: Callable, images: ImageStore, what: str) -> list:
    """The items (`what` they are) whose images are all there; says how many are not, UserError above one in a thousand.

    For training alone: evaluation stops at the first missing image. names_of(item) -> the names it needs."""
    missing = set(images.missing(sorted({name for item in items for name in names_of(item)})))
    kept = [item for item in items if not missing.intersection(names_of(item))]
    if missing:
        lost = f"{what}: {len(items) - len(kept):,} of {len(items):,} items lack an image, first {min(missing)}"
        lost += f" (looked in {', '.join(images.roots)})"
        if len(items) - len(kept) > len(items) / 1000:
            raise UserError(f"{lost}, more than 0.1 %; complete the folder or correct the flag that names it")
        common.say(f"{lost}: left out")
    return kept


def names_of(benchmark: Benchmark) -> list[str]:
    """Every image of a benchmark, once: the gallery, then references, targets and members outside it."""
    asked = [(q.reference, q.target, *(q.members or ())) for q in benchmark.queries]
    return list(dict.fromkeys([*benchmark.gallery, *(name for names in asked for name in names if name is not None)]))


def check_report(what: Benchmark | Iterable[str], images: ImageStore | None = None) -> tuple[str, bool]:
    """One line for --check: images expected, present, unreadable, missing, with first names; and whether all is well.

    Looks at headers and checksums only: a JPEG that is cut short shows when it is decoded.
    """
    if isinstance(what, Benchmark):
        images, what = images or what.images, names_of(what)
    names, missing, unreadable = list(dict.fromkeys(what)), [], []
    for name in names:
        try:
            path = images.find(name)
            if path is None:
                missing.append(name)
            else:
                verify_image(path)
        except (UserError, OSError) as error:
            unreadable.append(_reason(error))
    present = len(names) - len(missing) - len(unreadable)
    text = f"images: {len(names):,} expected, {present:,} present"
    text += f", {len(unreadable):,} unreadable, {len(missing):,} missing"
    if missing:
        text += f"; first missing: {', '.join(map(shown, missing[:3]))} (looked in {', '.join(images.roots)})"
    if unreadable:
        text += f"; first unreadable: {unreadable[0]}"
    return text, not missing and not unreadable


def check_benchmarks(benchmarks: list[Benchmark]) -> str:
    """Prints expected, present and unreadable images; returns one line of complaint, empty when all are there."""
    bad = []
    for benchmark in benchmarks:
        text, ok = check_report(benchmark)
        counts = f"{len(benchmark.queries):,} queries, {len(benchmark.gallery):,} gallery images"
        common.say(f"{benchmark.title}: {counts}; {text}")
        if not ok:
            bad.append((benchmark.title, benchmark.images.missing(names_of(benchmark))))
    if len(benchmarks) > 1:
        common.say(f"together: {sum(len(benchmark.queries) for benchmark in benchmarks):,} queries")
    named = "; ".join(f"{title}: " + (f"first {m[0]!r}" if m else "unreadable files") for title, m in bad)
    count = sum(len(missing) for _, missing in bad)
    return f"{count:,} images missing ({named}); add them or name their folder with --images" if bad else ""


def check_items(stores: list[ImageStore], streams: list[list[Item]], benchmarks: list[Benchmark]) -> None:
    """Prints what there is to train on and to measure; UserError if an image is missing or unreadable."""
    reports = [check_report(benchmark) for benchmark in benchmarks]
    for items, store, what in zip(streams, stores, ("human", "auxiliary"), strict=True):
        if items:
            text, ok = check_report([name for item in items for _, name in (item.reference, item.target)], store)
            reports.append((f"{what}: {len(items):,} triplets; {text}", ok))
    common.say("\n".join(text for text, _ in reports))
    if not all(ok for _, ok in reports):
        raise UserError("images missing or unreadable, see above; fetch them or fix --images / --pseudo_images")


# ---- picture -> tensor, as the checkpoint wants it ----
# processor class -> (keeps the aspect ratio, mean, std, size) where the file is silent: what transformers assumes then
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSORS = {
    "CLIP": (True, CLIP_MEAN, CLIP_STD, 224),
    "Blip": (False, CLIP_MEAN, CLIP_STD, 384),
    "ConvNext": (True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 384),
}


@dataclass(frozen=True)
class Preprocess:
    """RGB picture -> float32 (3, S, S): resize, centre crop, normalise; equal to transformers' Pillow processors."""

    size: int  # S, pixels
    edge: int  # the shortest edge after resizing, or both edges when the aspect ratio is not kept
    keep_ratio: bool
    resample: int  # Pillow's number: 2 bilinear, 3 bicubic
    mean: tuple[float, ...]
    std: tuple[float, ...]
    table: np.ndarray = field(repr=False, compare=False)  # (3, 256): the normalised value of every byte

    @classmethod
    def from_folder(cls, name: str | os.PathLike, use: str = "image model") -> "Preprocess":
        """Settings of a local folder or hub id, from preprocessor_config.json or processor_config.json."""
        path = _processor_file(os.fspath(name), use)
        config = read_json(path)
        if isinstance(config, dict) and os.path.basename(path) == "processor_config.json":
            config = config.get("image_processor")
        if not isinstance(config, dict):
            raise UserError(f"{path}: holds no image settings for the {use}")
        return cls.from_config(config, path)

    @classmethod
    def from_config(cls, config: dict, path: str = "image processor") -> "Preprocess":
        kind = config.get("image_processor_type") or config.get("feature_extractor_type")
        if kind is None:  # old files leave the class out
            kind = "ConvNext" if "crop_pct" in config else "CLIP" if "crop_size" in config else "Blip"
        match = re.fullmatch(r"(CLIP|Blip|ConvNext)((ImageProcessor|FeatureExtractor)(Fast|Pil)?)?", str(kind))
        if not match:
            raise UserError(f"{path}: image processor is {shown(kind)}, wanted one of CLIP, Blip, ConvNext")
        keep_ratio, mean, std, size = PROCESSORS[match[1]]

        size = config.get("size", size)
        if isinstance(size, dict):
            keep_ratio = "shortest_edge" in size
        edge = size = _side(size, path, "size")
        if match[1] == "ConvNext":
            keep_ratio = size < 384  # at 384 and above it squashes instead
            edge = int(size / config.get("crop_pct", 224 / 256)) if keep_ratio else size
        elif config.get("do_center_crop", match[1] == "CLIP"):
            size = _side(config.get("crop_size", 224), path, "crop_size")
        elif keep_ratio:
            raise UserError(f"{path}: keeps the aspect ratio and does not crop; wanted square pictures")
        if not config.get("do_resize", True):
            raise UserError(f"{path}: does not resize; wanted pictures of one size")

        mean, std = tuple(config.get("image_mean") or mean), tuple(config.get("image_std") or std)
        # in this order of float64 and float32, which transformers uses: the result is equal, not only close
        table = np.arange(256, dtype=np.float64)
        if config.get("do_rescale", True):
            table = table * config.get("rescale_factor", 1 / 255)
        table = np.repeat(table.astype(np.float32)[None], 3, axis=0)
        if config.get("do_normalize", True):
            table = (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
        return cls(size, edge, keep_ratio, int(config.get("resample", 3)), mean, std, table)

    def __call__(self, image: Image.Image) -> "torch.Tensor":
        """RGB picture of any size -> (3, S, S)."""
        import torch

        width, height = image.size
        if not self.keep_ratio:
            width = height = self.edge
        elif width <= height:
            width, height = self.edge, int(self.edge * height / width)
        else:
            width, height = int(self.edge * width / height), self.edge
        image = image.resize((width, height), self.resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))  # black where the picture is smaller
        pixels = np.asarray(image)  # (S, S, 3)
        return torch.from_numpy(np.stack([self.table[c][pixels[:, :, c]] for c in range(3)]))


def _side(size: object, path: str, key: str) -> int:
    sides = [size]
    if isinstance(size, dict) and set(size) in ({"height", "width"}, {"shortest_edge"}):
        sides = list(size.values())
    if not isinstance(sides[0], int) or not 0 < sides[0] <= 4096 or sides[0] != sides[-1]:
        raise UserError(f'{path}: "{key}" is {size}, wanted one side of a square, in pixels')
    return sides[0]


def _processor_file(name: str, use: str) -> str:
    for file in ("preprocessor_config.json", "processor_config.json"):
        if os.path.isdir(name):
            path = os.path.join(name, file)
            if os.path.isfile(path):
                return path
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
            from transformers.utils import cached_file

            try:
                path = cached_file(name, file)
            except OSError:  # not there, or the hub cannot be reached
                continue
            if path is not None:
                return path
    raise UserError(
        f"{use} {shown(name)}: no preprocessor_config.json; wanted a model folder that holds one, "
        "or a hub id that is cached or can be downloaded"
    )


# ---- augmentation: every draw from the generator given ----
def random_resized_crop(
    image: Image.Image, rng: np.random.Generator, scale=(0.8, 1.0), ratio=(0.9, 1.1), size: int | None = None
) -> Image.Image:
    """Cuts a window of `scale` of the area and `ratio` width / height [S6.1]; resized to size x size if that is given.

    Without `size` the window is returned as it is: a Preprocess that squashes then resamples once only. Where no window
    fits in ten draws (a long picture), it is the largest centred one of an allowed shape, as in torchvision.
    """
    width, height = image.size
    box = None
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            box = (left, top, left + w, top + h)
            break
    if box is None:
        w = min(width, max(1, round(height * ratio[1])))
        h = min(height, max(1, round(width / ratio[0])))
        box = ((width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h)
    image = image.crop(box)
    return image if size is None else image.resize((size, size), Image.Resampling.BICUBIC)


def augment(
    image: Image.Image,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    jitter: float,
    shift: float,
    degrees: float,
    size: int | None = None,
) -> Image.Image:
    """CIR training: resized crop, flip, contrast / brightness / sharpness, translation and rotation [S6.1].

    `flip` is a probability, `jitter` the largest change of a factor from 1, `shift` the largest move as a fraction of
    the side. The paper names the operations and the crop's scale; the other strengths are the caller's [ours].
    """
    image = random_resized_crop(image, rng, scale, ratio, size)
    if rng.random() < flip:
        image = ImageOps.mirror(image)
    for enhance in (ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness):
        image = enhance(image).enhance(rng.uniform(1 - jitter, 1 + jitter))
    moved = tuple(float(side * rng.uniform(-shift, shift)) for side in image.size)
    angle = rng.uniform(-degrees, degrees)
    return image.rotate(angle, Image.Resampling.BILINEAR, translate=moved, fillcolor=GREY)


# ---- order and batches ----
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n items in one epoch, a function of (seed, epoch) alone: equal on every rank and after a resume."""
    return common.rng("order", seed, epoch).permutation(n).tolist()


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


@functools.lru_cache(maxsize=2)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="images")


def load_pixels(
    images: ImageStore,
    names: Sequence[str],
    transform: Callable | Sequence[Callable],
    workers: int = 0,
) -> "torch.Tensor":
    """Decodes and transforms a batch, in threads if workers > 0 (Pillow frees the GIL) -> (B, 3, S, S).

    A transform that draws needs a generator of its own for each image: give a list of transforms, one a name.
    """
    import torch

    transforms = [transform] * len(names) if callable(transform) else transform
    assert len(transforms) == len(names) > 0
    run = _pool(workers).map if workers > 0 else map
    return torch.stack(list(run(lambda name, to_pixels: to_pixels(images.open(name)), names, transforms)))
