"""Pictures changed at random for training: a window of them, flipped, in other light, moved and turned."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from common.seeds import seeded_rng

if TYPE_CHECKING:
    from common.images import Preprocess

GREY = (128, 128, 128)  # what rotation and translation uncover


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
    contrast, brightness, sharpness = (rng.uniform(1 - jitter, 1 + jitter) for _ in range(3))
    image = ImageEnhance.Sharpness(with_contrast_and_brightness(image, contrast, brightness)).enhance(sharpness)
    moved = tuple(float(side * rng.uniform(-shift, shift)) for side in image.size)
    angle = rng.uniform(-degrees, degrees)
    return image.rotate(angle, Image.Resampling.BILINEAR, translate=moved, fillcolor=GREY)


def with_contrast_and_brightness(image: Image.Image, contrast: float, brightness: float) -> Image.Image:
    """ImageEnhance.Contrast, then .Brightness, of an RGB or L image: the same bytes in one pass, by a table of 256
    levels."""

    def blend(first: np.ndarray | int, second: np.ndarray, share: float) -> np.ndarray:
        mixed = np.float32(first) + np.float32(share) * (second.astype(np.float32) - np.float32(first))
        return mixed.clip(0, 255).astype(np.uint8)

    levels = np.arange(256)
    counts = np.array(image.convert("L").histogram())
    mean = int(counts @ levels / counts.sum() + 0.5)
    table = blend(0, blend(mean, levels, contrast), brightness)
    return image.point(table.tolist() * len(image.getbands()))


# ---- what other processes make of a picture: functions of their values alone (common/decoders.py) ----
@dataclass(frozen=True)
class Augmentation:
    """The draws of a run, each a function of its key."""

    seed: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    jitter: float
    shift: float
    degrees: float

    def __call__(self, image: Image.Image, key: tuple, size: int) -> Image.Image:
        strengths = self.scale, self.ratio, self.flip, self.jitter, self.shift, self.degrees
        return augment(image, seeded_rng(self.seed, *key), *strengths, size)


@dataclass(frozen=True)
class Ready:
    """Picture -> bytes (S, S, 3) as a model takes them; `augmented` changes it by the key, where both are given."""

    preprocess: "Preprocess"
    augmented: Callable | None
    key: tuple | None

    def __call__(self, image: Image.Image) -> np.ndarray:
        if self.augmented and self.key is not None:
            # bars first: what is augmented is square already
            image = self.augmented(self.preprocess.padded(image), self.key, self.preprocess.size)
        return self.preprocess.crop(image)


@dataclass(frozen=True)
class Crop:
    """Picture -> bytes (S, S, 3) of a window of it [S4.1], drawn by the keys."""

    preprocess: "Preprocess"
    keys: tuple
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, image: Image.Image) -> np.ndarray:
        window = random_resized_crop(image, seeded_rng(*self.keys), self.scale, self.ratio)
        return self.preprocess.crop(window)
