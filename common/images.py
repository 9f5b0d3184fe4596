"""Pictures: a name -> a safe path -> pixels, as the checkpoint wants them; and the augmentation of training.

No name leaves the folders that were given. One function, open_image, decodes for every stage."""

import functools
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    import torch

from common.console import UserError
from common.files import read_json
from common.hub import checkpoint_file

FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow reads 40 more, some of them by running other programs (EPS)
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp")  # tried in this order behind a name that has none
MAX_PIXELS = 64_000_000  # a 65-byte PNG can claim 400 million
MAX_ASPECT = 20  # a 1 x 5000 picture becomes 250 million pixels when its shortest edge is resized to 224
MAX_NAME = 1024  # characters of a name in an annotation file
GREY = (128, 128, 128)  # what rotation and translation uncover
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
# processor class -> (keeps the aspect ratio, mean, std, size) where the file is silent: what transformers assumes then
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSORS = {
    "CLIP": (True, CLIP_MEAN, CLIP_STD, 224),
    "Blip": (False, CLIP_MEAN, CLIP_STD, 384),
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


def open_image(path: str | os.PathLike) -> Image.Image:
    """Decodes a JPEG, PNG or WEBP file (first frame) to an upright RGB picture; transparency is laid on white."""
    with _opened(path) as image:
        try:
            image.load()
            orientation = image.getexif().get(0x0112, 1)
            image = _rgb(image)
        except DAMAGED as error:
            raise UserError(f"{path}: cannot be decoded ({reason_of(error)}); replace or remove the file") from None
    # applied here and nowhere else: the stored pixels of a phone's photograph lie on their side
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def verify_image(path: str | os.PathLike) -> None:
    """A quick look: header, size, and checksums where the format has them; does not decode. UserError if bad."""
    with _opened(path) as image:
        try:
            image.verify()
        except DAMAGED as error:
            raise UserError(f"{path}: is damaged ({reason_of(error)}); replace or remove the file") from None


def _opened(path: str | os.PathLike) -> Image.Image:
    """The file's header, read and judged; pixels are not decoded yet."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
        raise UserError(f"{path}: is not a regular file, wanted a picture ({', '.join(FORMATS)})")
    try:
        image = Image.open(path, formats=FORMATS)
    except DAMAGED as error:
        raise UserError(f"{path}: is no readable {', '.join(FORMATS)} picture ({reason_of(error)})") from None
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


def reason_of(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)) or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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


def open_store(images: str | Sequence[str] | None, places: list[str], table: dict | None = None) -> ImageStore:
    """The folders that the user gives, which must exist; else the usual places."""
    if not images:
        return ImageStore(places, table)
    store = ImageStore(images, table)
    for root in store.roots:
        if not os.path.isdir(root):
            raise UserError(f"image folder {root} not found")
    return store


def check_report(names: Iterable[str], images: ImageStore) -> tuple[str, bool]:
    """One line for --check: images expected, present, unreadable, missing, with first names; and whether all is well.

    Looks at headers and checksums only: a JPEG that is cut short shows when it is decoded.
    """
    names, missing, unreadable = list(dict.fromkeys(names)), [], []
    for name in names:
        try:
            path = images.find(name)
            if path is None:
                missing.append(name)
            else:
                verify_image(path)
        except (UserError, OSError) as error:
            unreadable.append(reason_of(error))
    present = len(names) - len(missing) - len(unreadable)
    text = f"images: {len(names):,} expected, {present:,} present"
    text += f", {len(unreadable):,} unreadable, {len(missing):,} missing"
    if missing:
        text += f"; first missing: {', '.join(map(shown, missing[:3]))} (looked in {', '.join(images.roots)})"
    if unreadable:
        text += f"; first unreadable: {unreadable[0]}"
    return text, not missing and not unreadable


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
    try:
        for file in ("preprocessor_config.json", "processor_config.json"):
            if path := checkpoint_file(name, file):
                return path
    except UserError as fault:
        raise UserError(f"{use}: no preprocessor_config.json ({fault})") from None
    raise UserError(f"{use} {shown(name)}: no preprocessor_config.json; wanted a model folder or hub id that holds one")


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
