"""What tests have made of a picture in another process: its module is imported there, so it has one of its own."""

import contextlib
import os
import signal
import sys
import time

import numpy as np
from PIL import Image

from common.seeds import seeded_rng

SIDE = 4  # pixels of the bytes (SIDE, SIDE, 3)


def turned(picture: Image.Image, key: tuple, size: int) -> Image.Image:
    """A part of the picture, drawn."""
    left = int(seeded_rng(*key).integers(8))
    return picture.crop((left, 0, left + 20, 20))


def small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((SIDE, SIDE)))


def filled_with(number: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), number, np.uint8)


def numbers(found: list[float]) -> np.ndarray:
    """Up to six numbers in the bytes of one picture."""
    return np.array((found + 6 * [0])[:6], np.float64).view(np.uint8).reshape(SIDE, SIDE, 3)


def numbers_of(row: np.ndarray) -> list[float]:
    return np.ascontiguousarray(row).reshape(-1).view(np.float64).tolist()


def process_number(picture: Image.Image) -> np.ndarray:
    time.sleep(0.1)  # so that each process gets one
    return numbers([os.getpid()])


def holding(picture: Image.Image) -> np.ndarray:
    """(number of open files, how many libraries of a stage are imported, threads) of the process."""
    from common import augment, images  # noqa: F401  what is asked of it in a run

    heavy = {"torch", "transformers", "train_cir"} & sys.modules.keys()
    return numbers([len(os.listdir("/proc/self/fd")) - 1, len(heavy), len(os.listdir("/proc/self/task"))])


def from_until(picture: Image.Image) -> np.ndarray:
    began = time.monotonic()
    time.sleep(0.2)
    return numbers([began, time.monotonic()])


def killed(picture: Image.Image) -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledOnce:
    """Kills the process where the file is not yet there, which it writes."""

    def __init__(self, file: str):
        self.file = file

    def __call__(self, picture: Image.Image) -> np.ndarray:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.file, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        return small(picture)


def signalled(picture: Image.Image) -> np.ndarray:
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    return filled_with(7)


def asleep(picture: Image.Image) -> np.ndarray:
    time.sleep(1.5)
    return small(picture)


def out_of_memory(picture: Image.Image) -> np.ndarray:
    raise MemoryError("no room")


def mistaken(picture: Image.Image) -> np.ndarray:
    raise KeyError("a bug")


def too_few(picture: Image.Image) -> np.ndarray:
    return np.zeros((1, 1, 3), np.uint8)
