"""Pictures: a name -> a safe path -> pixels, as the checkpoint wants them.

A name from a file never leaves the folders that were given. Links that lie in those folders are the user's own and are
followed wherever they lead: data sets are linked from other disks, and a snapshot of the hub is nothing but links."""

import errno
import filecmp
import functools
import hashlib
import itertools
import math
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

from common.console import UserError, printable, progress, rank_size, reason_of, say, warn
from common.decoders import Transform, cpus_of_rank, fill_rows
from common.files import read_json, write_text
from common.hub import checkpoint_file
from common.pixels import MAX_PIXELS, check_image, open_image, regular_file, verify_image

# Suffixes that a picture may have, tried in this order behind a name that has none. HEIC is here to be counted.
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif", ".heic", ".heif")
OWN_MISSING = 0.1  # share of one's own pictures that may be broken
MAX_NAME = 1024  # characters of a name in an annotation file
# processor class -> (keeps the aspect ratio, mean, std, size) where the file is silent: what transformers assumes then
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSORS = {
    "CLIP": (True, CLIP_MEAN, CLIP_STD, 224),
    "Blip": (False, CLIP_MEAN, CLIP_STD, 384),
    "Siglip": (False, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224),
    "ConvNext": (True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 384),
}


def safe_name(name: object, where: str = "image name") -> str:
    """Returns `name` if it can only mean a file below a root; UserError otherwise. `where` opens the message."""
    if not isinstance(name, str):
        raise UserError(f"{where}: found {shown(name)}, wanted an image name (a string)")
    reason = None
    if len(name) > MAX_NAME:
        reason = f"has {len(name):,} characters, at most {MAX_NAME:,} are read"
    elif any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in name):
        reason = "contains a control character, or is not UTF-8: rename it"
    elif name.startswith(("/", "\\", "~/")) or re.match(r"[A-Za-z]:", name):
        # os.path.join(root, "/etc/passwd") would drop the root
        reason = "is an absolute path, or begins like one of Windows: rename it"
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


def split_folders(text: str) -> list[str]:
    """ "a:b" -> both. A folder may have the ":" in its own name: the longest part that is a folder is taken whole."""
    parts, folders = text.split(os.pathsep), []
    while parts:
        ends = (end for end in range(len(parts), 0, -1) if os.path.isdir(os.pathsep.join(parts[:end])))
        end = next(ends, 1)
        folders.append(os.pathsep.join(parts[:end]))
        parts = parts[end:]
    return [folder for folder in folders if folder]


class ImageStore:
    """Finds the file of an image name below one or several root folders.

    `roots`: a folder, several joined by os.pathsep ("a:b"), or a list; the first that has the picture wins. `table`:
    name -> path below a root, as in CIRR's split files. A name is tried as the table says, as it is, and with each of
    EXTENSIONS, in capitals and in place of its own too, each way in all roots before the next. `own`: pictures of one's
    own, not a benchmark's, of which some are always too large (they are read small) or broken (batches.drop_missing
    leaves them out).
    """

    def __init__(
        self, roots: str | os.PathLike | Sequence[str], table: dict[str, str] | None = None, own: bool = False
    ):
        if isinstance(roots, (str, os.PathLike)):
            roots = split_folders(os.fspath(roots))
        self.roots = [os.fspath(root) for root in roots]
        self.table = table or {}
        self.own = own
        self.large = "reduce" if own else "refuse"  # what open_image does with a picture that is too large
        self._found: dict[str, tuple[str, str]] = {}  # name -> (root, path below it)
        self._listed: dict[str, dict[str, list[str]]] = {}  # folder -> stem -> suffixes of the pictures in it

    def find(self, name: str) -> str | None:
        """Path of the image, or None; UserError for a name that would leave the root or a folder that is closed."""
        place = self._place(name)
        return None if place is None else os.path.join(*place)

    def _place(self, name: str) -> tuple[str, str] | None:
        if name not in self._found:
            candidates = self._candidates(safe_name(name))
            places = ((root, self._look(root, *candidate)) for candidate in candidates for root in self.roots)
            place = next((place for place in places if place[1]), None)
            if place is None:
                return None
            self._found[name] = place
        return self._found[name]

    def _candidates(self, name: str) -> list[tuple[str, tuple[str, ...]]]:
        """Paths below a root with the suffixes that may follow them; without any, the path as it is."""
        candidates = []
        for spelled in dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]):
            candidates += [(spelled, ()), (spelled, EXTENSIONS)]  # macOS takes letters and their accents apart
            stem, suffix = os.path.splitext(spelled)
            if suffix.lower() in EXTENSIONS:  # x.png that is called x.PNG, or was converted to x.jpg
                candidates += [(stem, (suffix.lower(),)), (stem, EXTENSIONS)]
        if name in self.table:
            entry = os.path.normpath(safe_name(self.table[name])).replace(os.sep, "/")  # CIRR: ./train/34/x.png
            *folders, file = entry.split("/")
            # NLVR2's train/ may lie flat, and --images may name the folder of the split
            places = [entry, "/".join([*folders[:-1], file]), "/".join([*folders[1:], file])]
            either = [[(path, ()), (os.path.splitext(path)[0], EXTENSIONS)] for path in dict.fromkeys(places)]
            candidates = [*itertools.chain(*either), *candidates]  # copies of CIRR converted from .png are common
        return candidates

    def _look(self, root: str, path: str, suffixes: tuple[str, ...]) -> str:
        """The path below `root` of the file, empty if there is none."""
        names = [path]
        if suffixes:
            folder, stem = os.path.split(path)
            there = self._suffixes(os.path.join(root, folder)).get(stem, ())
            names = [path + suffix for wanted in suffixes for suffix in there if suffix.lower() == wanted]
        return next((name for name in names if _is_file(os.path.join(root, name))), "")

    def _suffixes(self, folder: str) -> dict[str, list[str]]:
        """Stem -> suffixes of the pictures in a folder, which is listed once."""
        if folder not in self._listed:
            stems: dict[str, list[str]] = {}
            for name in _listed(folder) if os.path.isdir(folder) else ():
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in EXTENSIONS:
                    stems.setdefault(stem, []).append(suffix)
            self._listed[folder] = stems
        return self._listed[folder]

    def path(self, name: str) -> str:
        """Path of the image, a regular file; FileNotFoundError names the image and the folders that were searched."""
        path = self.find(name)
        if path is None:
            searched = ", ".join(self.roots) or "no folder"
            text = f"image {shown(name)} not found in {searched}; add it or give the folder it is in"
            if dead := next((path for root in self.roots if os.path.islink(path := os.path.join(root, name))), None):
                text = f"{dead}: is a link to {os.readlink(dead)}, where nothing is; mend or remove it"
            raise FileNotFoundError(text)
        return regular_file(path)

    def relative(self, name: str) -> str:
        """Where the image lies below its root: as the table says, or with the suffix with which it was found.

        For files that others read, who join it with the folder of the images."""
        if name in self.table:
            return self.table[name]
        below = self._found[name][1] if self.find(name) else safe_name(name)
        return "./" + os.path.normpath(below).replace(os.sep, "/")

    def require_one_each(self, names: Iterable[str]) -> None:
        """UserError if one of the names is another picture in each of two roots: the first would be taken for both."""
        for name in names if len(self.roots) > 1 else ():
            try:
                candidates = self._candidates(safe_name(name))
            except UserError:  # an odd name of a folder of one's own: unreadable() says so
                continue
            found = ([os.path.join(r, below) for r in self.roots if (below := self._look(r, *c))] for c in candidates)
            paths = next(filter(None, found), [])
            if other := next((path for path in paths[1:] if not filecmp.cmp(paths[0], path, shallow=False)), None):
                text = f"{shown(name)} is one picture in {paths[0]} and another in {other}"
                raise UserError(f"{text}; name a folder above both, and the pictures by their paths below it")

    def open(self, name: str, then: Callable[[Image.Image], Any] | None = None) -> Any:
        return open_image(self.path(name), self.large, then)

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.find(name) is None]


def _mode(path: str, absent: tuple[int, ...] = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)) -> int:
    """st_mode of what is there, links followed; 0 for nothing, which is also a link that leads nowhere or in a circle.

    UserError for what cannot be looked at: no permission, or a path longer than the system takes."""
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if error.errno in absent:
            return 0
        where = path if len(path) < 300 else f"...{path[-200:]}"
        text = f"{where}: cannot be looked at ({error.strerror}), so pictures would be missing"
        raise UserError(f"{text}; correct the permissions, shorten the path, or take it out") from None


def _is_file(path: str) -> bool:
    """Is anything there but a folder? A name out of a file may be longer than a file's can be: it is not there."""
    mode = _mode(path, (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))
    return bool(mode) and not stat.S_ISDIR(mode)


def list_images(root: str | os.PathLike) -> list[str]:
    """Names of all pictures below `root`, relative to it, with "/", sorted: every file with one of EXTENSIONS. Among
    them are those that safe_name refuses ("b: x.jpg", one that is not UTF-8): unreadable() says so of each.

    Links to folders are followed, each real folder is listed once: a loop ends. Hidden files and folders are passed
    over (macOS leaves ._x.jpg beside x.jpg). UserError for a folder that cannot be read: what lies in it would be
    missing in silence."""
    root = os.fspath(root)
    if not os.path.isdir(root):
        several = "; wanted one: put links to several into a folder" if os.pathsep in root else ""
        raise UserError(f"image folder {root} not found{several}")
    names, dead, seen = [], [], set()
    folders, links = [""], []  # links come last: a picture is named after the real folder where it has one in `root`
    while folders or links:
        below = folders.pop() if folders else links.pop(0)
        folder = os.path.join(root, below)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        for name in _listed(folder):
            path = os.path.join(below, name)
            mode = _mode(os.path.join(root, path))
            if stat.S_ISDIR(mode):
                (links if os.path.islink(os.path.join(root, path)) else folders).append(path)
            elif name.lower().endswith(EXTENSIONS):
                names.append(path.replace(os.sep, "/"))
            elif not mode:
                dead.append(os.path.join(root, path))
    if dead:
        warn(f"{len(dead):,} links in {root} lead nowhere, first {dead[0]}; is a disk missing?")
    if not names:
        raise UserError(f"image folder {root} holds no {'/'.join(EXTENSIONS)} file")
    return sorted(names)


def _listed(folder: str) -> list[str]:
    """What a folder holds and does not hide."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        text = f"{folder}: cannot be read ({error.strerror}), so pictures would be missing"
        raise UserError(f"{text}; correct the permissions or take it out") from None


def open_store(
    images: str | Sequence[str] | None, places: list[str], table: dict | None = None, own: bool = False
) -> ImageStore:
    """The folders that the user gives, which must exist; else the usual places."""
    if not images:
        return ImageStore(places, table, own)
    store = ImageStore(images, table, own)
    for root in store.roots:
        if not os.path.isdir(root):
            raise UserError(f"image folder {root} not found")
    return store


def unreadable(names: Iterable[str], images: ImageStore, workers: int = 0, decode: bool = True) -> dict[str, str]:
    """Name -> what is wrong with it, for every picture that is missing, empty, damaged, too large or no picture.

    decode: False looks at headers and checksums only, and misses a JPEG that is cut short."""
    look = check_image if decode else verify_image

    def fault(name: str) -> str:
        try:
            look(images.path(name), images.large)
        except (UserError, OSError) as error:
            return reason_of(error)
        return ""

    names = list(dict.fromkeys(names))
    found = progress(_pool(workers).map(fault, names) if workers else map(fault, names), "looking", len(names))
    return {name: text for name, text in zip(names, found, strict=True) if text}


def leave_out(names: Sequence[str], faults: dict[str, str], listing: str, what: str = "pictures") -> list[str]:
    """The names without a fault; says how many others there are and writes all of them into the file `listing`.

    For folders of one's own. A benchmark counts only with all its pictures: see annotations.without_missing."""
    kept = [name for name in names if name not in faults]
    lost = [faults[name] for name in names if name in faults]
    write_faults(lost, listing)
    if lost:
        text = f"{len(lost):,} of {len(names):,} {what} cannot be read and are left out, all in {listing}"
        say(f"{text}; first: {lost[0]}")
    return kept


def write_faults(lines: Iterable[str], listing: str) -> None:
    """One line a fault; without any, a list that an earlier run left is removed."""
    if rank_size()[0] != 0:
        return
    if text := "".join(f"{line}\n" for line in lines):
        write_text(listing, printable(text))
    elif os.path.exists(listing):
        os.unlink(listing)


def check_report(
    names: Iterable[str],
    images: ImageStore,
    decode: bool = False,
    workers: int = 0,
    listing: str = "",
) -> tuple[str, bool]:
    """One line for --check: images expected, present, unreadable, missing, with first names; and whether all is well.

    Without `decode` it looks at headers and checksums only: a JPEG that is cut short shows when it is decoded. All that
    is wrong is written into the file `listing`, if one is named.
    """
    names = list(dict.fromkeys(names))
    faults = unreadable(names, images, workers, decode)
    text = report_of(len(names), faults, images)
    if listing:
        write_faults(faults.values(), listing)
        text += f"; all in {listing}" if faults else ""
    return text, not faults


def report_of(count: int, faults: dict[str, str], images: ImageStore) -> str:
    """check_report's line about `count` images with these faults."""
    missing = [name for name in faults if _absent(images, name)]
    damaged = [text for name, text in faults.items() if name not in set(missing)]
    text = f"images: {count:,} expected, {count - len(faults):,} present"
    text += f", {len(damaged):,} unreadable, {len(missing):,} missing"
    if missing:
        text += f"; first missing: {', '.join(map(shown, missing[:3]))} (looked in {', '.join(images.roots)})"
    if damaged:
        text += f"; first unreadable: {damaged[0]}"
    return text


def _absent(images: ImageStore, name: str) -> bool:
    try:
        return images.find(name) is None
    except UserError:  # a name that leaves the root, a folder that is closed
        return False


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
        match = re.fullmatch(r"(CLIP|Blip|Siglip|ConvNext)((ImageProcessor|FeatureExtractor)(Fast|Pil)?)?", str(kind))
        if not match:
            raise UserError(f"{path}: image processor is {shown(kind)}, wanted one of CLIP, Blip, Siglip, ConvNext")
        keep_ratio, mean, std, size = PROCESSORS[match[1]]

        size = config.get("size", size)
        if isinstance(size, dict):
            keep_ratio = "shortest_edge" in size
        edge = size = _side(size, path, "size")
        if match[1] == "ConvNext":
            keep_ratio = size < 384  # at 384 and above it squashes instead
            edge = int(size / _number(config, "crop_pct", 224 / 256, path)) if keep_ratio else size
        elif _yes(config, "do_center_crop", match[1] == "CLIP", path):
            size = _side(config.get("crop_size", 224), path, "crop_size")
        elif keep_ratio:
            raise UserError(f"{path}: keeps the aspect ratio and does not crop; wanted square pictures")
        if not _yes(config, "do_resize", True, path):
            raise UserError(f"{path}: does not resize; wanted pictures of one size")

        mean, std = _colours(config, "image_mean", mean, path), _colours(config, "image_std", std, path)
        factor = _number(config, "rescale_factor", 1 / 255, path) if _yes(config, "do_rescale", True, path) else 1
        table = _table(mean, std, factor, _yes(config, "do_normalize", True, path))
        resample = config.get("resample", 3)
        if isinstance(resample, bool) or resample not in range(6):
            raise UserError(f'{path}: "resample" is {shown(resample)}, wanted a number of Pillow, 0 to 5')
        return cls(size, edge, keep_ratio, resample, mean, std, table)

    def as_blip(self) -> dict | None:
        """preprocessor_config.json of transformers' BlipImageProcessor; None where that would make other pixels."""
        record = {"image_processor_type": "BlipImageProcessor", "do_convert_rgb": True, "do_resize": True}
        record |= {"size": {"height": self.size, "width": self.size}, "resample": int(self.resample)}
        record |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        record |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        again = Preprocess.from_config(record)
        return record if again == self and (again.table == self.table).all() else None

    def described(self) -> str:
        """All that a pixel depends on besides its picture, for the hashes that vouch for features.

        Of the table only where it is not the usual one of its mean and deviation: what was hashed before stays true."""
        usual = np.array_equal(self.table, _table(self.mean, self.std))
        return repr(self) + ("" if usual else f", table {hashlib.sha256(self.table.tobytes()).hexdigest()[:16]}")

    def __call__(self, image: Image.Image) -> "torch.Tensor":
        """RGB picture of any size -> (3, S, S)."""
        import torch

        pixels = self.crop(image)
        return torch.from_numpy(np.stack([self.table[c][pixels[:, :, c]] for c in range(3)]))

    def padded(self, image: Image.Image) -> Image.Image:
        """The picture as it is; a Padded adds bars."""
        return image

    def with_pad(self, ratio: float) -> "Preprocess":
        """The same, that pads first; 0: itself."""
        given = {part.name: getattr(self, part.name) for part in fields(Preprocess)}
        return Padded(**given, pad=ratio) if ratio else self

    def crop(self, image: Image.Image) -> np.ndarray:
        """RGB picture of any size -> its bytes (S, S, 3), resized and cropped: a quarter of what normalising makes."""
        image = self.padded(image)
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
        return np.asarray(image)

    def normalise(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Bytes (B, S, S, 3) of crop() -> (B, 3, S, S) on the same device: the bits of __call__."""
        import torch

        table = torch.from_numpy(self.table).to(pixels.device, non_blocking=True)  # so few bytes are staged at once
        return torch.stack([table[c][pixels[..., c].int()] for c in range(3)], dim=1)


@dataclass(frozen=True)
class Padded(Preprocess):
    """Adds black bars to a picture whose longer side is over `pad` times the shorter, up to that ratio.

    CLIP4Cir's TargetPad (1.25), its SquarePad is 1. Name and ratio stand in repr(), and so in the hash of what a
    checkpoint stands on."""

    pad: float = 1.25

    def padded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        shortest = max(width, height) / self.pad
        left, top = (max(int((shortest - side) / 2), 0) for side in image.size)
        size = width + 2 * left, height + 2 * top
        if size == image.size:
            return image
        if size[0] * size[1] > MAX_PIXELS:  # bars around a long panorama would take gigabytes [ours]
            return self.padded(image.reduce(math.ceil(math.sqrt(size[0] * size[1] / MAX_PIXELS))))
        wide = Image.new("RGB", size)
        wide.paste(image, (left, top))
        return wide


def require_same_pixels(preprocess: Preprocess, config: dict, checkpoint: str, flag: str) -> None:
    """A checkpoint's pictures are prepared as those it was trained on (config.json says how since it is kept)."""
    if config.get("pixels") not in (None, preprocess.described()):
        where = f"preprocessor_config.json of {flag}"
        raise UserError(
            f"{checkpoint} was trained on pictures prepared otherwise than {where} says now; restore that one"
        )


def _table(mean: Sequence[float], std: Sequence[float], factor: float = 1 / 255, normalised: bool = True) -> np.ndarray:
    """(3, 256) float32: what becomes of each byte. In this order of float64 and float32, which transformers uses: the
    result is equal, not only close."""
    table = np.repeat((np.arange(256, dtype=np.float64) * factor).astype(np.float32)[None], 3, axis=0)
    return (table - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None] if normalised else table


def _yes(config: dict, key: str, usual: bool, path: str) -> bool:
    """Whether a step is taken; null is what transformers writes for a class's own choice."""
    found = usual if config.get(key) is None else config[key]
    if not isinstance(found, bool):
        raise UserError(f'{path}: "{key}" is {shown(found)}, wanted true or false')
    return found


def _number(config: dict, key: str, usual: float, path: str) -> float:
    """A number above zero, as sizes, factors and deviations are."""
    found = config.get(key, usual)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 1e-6 < found < 1e6:
        raise UserError(f'{path}: "{key}" is {shown(found)}, wanted a number above 0')
    return found


def _colours(config: dict, key: str, usual: tuple[float, ...], path: str) -> tuple[float, ...]:
    """Three numbers, one a channel; a mean may be 0, a deviation may not."""
    found = config.get(key) or usual
    least = 1e-6 if key == "image_std" else -1e6
    numbers = isinstance(found, list | tuple) and len(found) == 3
    for value in found if numbers else ():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        numbers &= number and least < value < 1e6
    if not numbers:
        raise UserError(f'{path}: "{key}" is {shown(found)}, wanted three numbers, one a channel')
    return tuple(found)


def _side(size: object, path: str, key: str) -> int:
    sides = [size]
    if isinstance(size, dict) and set(size) in ({"height", "width"}, {"shortest_edge"}):
        sides = list(size.values())
    if not isinstance(sides[0], int) or not 0 < sides[0] <= 4096 or sides[0] != sides[-1]:
        raise UserError(f'{path}: "{key}" is {size}, wanted one side of a square, in pixels')
    return sides[0]


def _processor_file(name: str, use: str) -> str:
    try:
        for file in ("preprocessor_config.json", "processor_config.json"):
            if path := checkpoint_file(name, file):
                return path
    except UserError as fault:
        raise UserError(f"{use}: no preprocessor_config.json ({fault})") from None
    raise UserError(f"{use} {shown(name)}: no preprocessor_config.json; wanted a model folder or hub id that holds one")


@functools.lru_cache(maxsize=2)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(workers, cpus_of_rank()), thread_name_prefix="images")


def load_bytes(
    images: ImageStore,
    names: Sequence[str],
    preprocess: Preprocess,
    workers: int = 0,
    transforms: Sequence[Transform] | None = None,
) -> "torch.Tensor":
    """Pictures resized and cropped, or as the transform of each makes them -> bytes (B, S, S, 3) on the CPU.

    workers: processes, see decoders.fill_rows. Preprocess.normalise makes floats of them, four times as large, on the
    device. Pinned where a GPU is in use: it copies them while the host goes on."""
    import torch

    transforms, shape = transforms or [preprocess.crop] * len(names), (len(names), *2 * [preprocess.size], 3)
    rows = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
    fill_rows(rows.numpy(), [(images, *job) for job in zip(names, transforms, strict=True)], workers)
    return rows


def load_pixels(images: ImageStore, names: Sequence[str], preprocess: Preprocess) -> "torch.Tensor":
    """Pictures as a checkpoint wants them -> (B, 3, S, S) on the CPU; for a few."""
    return preprocess.normalise(load_bytes(images, names, preprocess))
