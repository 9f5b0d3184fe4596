"""Images through a frozen vision encoder: a gallery's, a bank's, and those of each training step."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.augment import Ready
from common.batches import ahead, chunks, stop_together
from common.console import UserError, progress, rank_size
from common.decoders import fill_rows
from common.images import ImageStore, load_bytes
from common.ranks import all_sum, barrier, gather_objects, pick_dtype
from common.seeds import seeded_rng
from common.streams import Batch, Draw, Source, images_of


class Compute(NamedTuple):
    """How a model goes through many inputs."""

    batch: int  # images, or queries, per forward pass
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32  # of the model's products; its weights, scores and losses stay fp32
    workers: int = 0  # processes that decode images, 0: none but this one; threads in gallery.index_folder

    @classmethod
    def on(cls, device: torch.device, dtype: str, batch: int, workers: int) -> "Compute":
        """dtype: as the flag has it."""
        return cls(batch, device, pick_dtype(dtype, device), workers)

    def autocast(self) -> torch.autocast:
        """The context in which the model runs; with fp32 it changes nothing."""
        return torch.autocast(torch.device(self.device).type, dtype=self.dtype, enabled=self.dtype != torch.float32)


# ---- a gallery: each rank has its share ----


class Encoded(NamedTuple):
    """One batch of a list of images, on the device."""

    rows: range  # its places in the list
    tokens: Tensor  # (n, ...) what model.compose needs of an image
    targets: Tensor  # (n, d) its features in a gallery


def encode(
    model: torch.nn.Module, images: ImageStore, names: list[str], compute: Compute, what: str
) -> Iterator[Encoded]:
    """The named images, a batch at a time, in eval mode; the batches are dealt to the ranks. what: for the bar.

    The next batch is decoded meanwhile."""

    def load(rows: range) -> Tensor:
        return load_bytes(images, [names[i] for i in rows], model.preprocess, compute.workers)

    rank, size = rank_size()
    starts = range(0, len(names), compute.batch)
    modes = [(module, module.training) for module in model.modules()]  # frozen parts may be in eval mode already
    model.eval()
    try:
        mine = [range(start, min(start + compute.batch, len(names))) for start in starts[rank % size :: size]]
        for rows, pixels in ahead(load, progress(mine, what)):
            if isinstance(pixels, Exception):
                raise pixels
            with compute.autocast():
                pixels = pixels.to(compute.device, non_blocking=True)
                tokens, targets = model.image(model.preprocess.normalise(pixels))
            yield Encoded(rows, tokens, targets)
    finally:
        for module, mode in modes:
            module.training = mode


# ---- training ----

AT_ONCE = 64  # images in one pass of the vision encoder: those of a step, 4 x 64 as a rule, would take 4 x the memory
Image = tuple[int, str]  # (stream, name), as in common.batches


def image_jobs(draws: list[Draw]) -> list[tuple[Image, tuple]]:
    """References, then targets: (image, key of its augmentation)."""
    references = [(d.reference, ("reference", *d.key)) for d in draws]
    targets = [(d.target, ("target", *d.key)) for d in draws]
    return references + targets


def encode_in_turn(
    blocks: list[list], load: Callable[[list], Tensor], encode_loaded: Callable[[Tensor], Tensor], what: str
) -> Iterator[tuple[list, Tensor]]:
    """(block, its rows on the CPU) for every block, in order, on every rank; the ranks take turns to encode them."""
    rank, size = rank_size()
    rounds = list(chunks(blocks, size))  # a block for each rank; in the last round some have none

    def load_own(blocks: list[list]) -> Tensor | None:
        return load(blocks[rank]) if rank < len(blocks) else None

    for turn, loaded in ahead(load_own, progress(rounds, what)):
        stop_together(loaded)
        rows = None if loaded is None else encode_loaded(loaded).cpu()
        yield from zip(turn, gather_objects(rows), strict=False)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0)) if rank_size()[1] > 1 else 0


def rows_of_machine(folder: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for one tensor that all ranks of a machine see and its first rank writes; every rank must call it.

    A file of `folder`, mapped into memory; it loses its name at once, so that it goes with the run."""
    rank, size = rank_size()
    if size == 1:
        return torch.empty(shape, dtype=dtype)
    path, numbers = Path(folder, f"views-{rank - local_rank()}.tmp"), math.prod(shape)
    fault = None
    if local_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # a further machine may have a disk of its own
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, numbers * dtype.itemsize)  # a full disk shows now
        except OSError as error:
            wanted = f"{numbers * dtype.itemsize / 1e9:.1f} GB for --views"
            fault = UserError(f"{path}: {wanted} ({error.strerror}); make room, or take fewer --views")
    stop_together(fault)
    rows = torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(shape)
    barrier()
    if local_rank() == 0:
        path.unlink()
    return rows


class Bank(NamedTuple):
    """Target features of all training images and of the hard negatives that their files name, not augmented: each is
    one more negative [ours]."""

    images: list[Image]
    features: Tensor  # (len(images), d)

    def without(self, images: list[Image]) -> Tensor:
        """The rows (K, d) of the other images: those of the batch are rows of it already, augmented."""
        left_out = set(images)
        return self.features[[i for i, image in enumerate(self.images) if image not in left_out]]


class TrainingImages:
    """What the frozen vision encoder of a model makes of training images: augmented anew each time, or of views kept.

    augmented(picture, key, S) -> the picture as the randomness of the key changes it, for a model of S x S pixels;
    other processes call it (common/decoders.py). None: every picture stays as it is."""

    def __init__(self, model: torch.nn.Module, sources: list[Source], augmented: Callable | None, compute: Compute):
        self.model, self.sources, self.augmented, self.compute = model, sources, augmented, compute
        self.views: dict[Image, Tensor] = {}  # tokens (K, ...) of its views, on the CPU; empty: augmented anew
        self.encoded = 0  # images that went through this rank's encoder for the last batch
        self._on_gpu = torch.device(compute.device).type == "cuda"

    def _pixels(self, jobs: list[tuple[Image, tuple | None]]) -> Tensor:
        """Bytes (n, S, S, 3) on the CPU, pinned where a GPU copies them; a job without a key is not augmented."""
        preprocess = self.model.preprocess
        pixels = torch.empty(len(jobs), *2 * [preprocess.size], 3, dtype=torch.uint8, pin_memory=self._on_gpu)
        ready = [
            (self.sources[stream].images, name, Ready(preprocess, self.augmented, key)) for (stream, name), key in jobs
        ]
        fill_rows(pixels.numpy(), ready, self.compute.workers)
        return pixels

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Bytes (n, S, S, 3) -> what the encoder takes (n, 3, S, S), on the device; the host goes on meanwhile."""
        return self.model.preprocess.normalise(pixels.to(self.compute.device, non_blocking=True))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        with self.compute.autocast():
            return torch.cat([self.model.tokens(self._normalised(part)) for part in pixels.split(AT_ONCE)])

    def keep_views(self, count: int, folder: str) -> None:
        """Encodes `count` augmented views of every image now; batches then draw among them. 0: nothing happens.

        The ranks of a machine share one copy, in a file of `folder` that has no name any more when this is done."""
        if not count:
            return
        images, first = images_of(self.sources), 0
        jobs = [(image, ("view", *image, k)) for image in images for k in range(count)]
        blocks = list(chunks(jobs, self.compute.batch))  # fixed blocks: a resume sees the same bits
        for block, tokens in encode_in_turn(blocks, self._pixels, self._encode, "encoding views"):
            if not first:
                kept = rows_of_machine(folder, (len(jobs), *tokens.shape[1:]), tokens.dtype)
            if local_rank() == 0:
                kept[first : first + len(block)] = tokens
            first += len(block)
        barrier()  # behind it all rows are written
        for i, image in enumerate(images):
            self.views[image] = kept[i * count : (i + 1) * count]

    @torch.no_grad()
    def bank(self) -> Bank:
        """Target features of all images, not augmented, on every rank."""

        def features(pixels: Tensor) -> Tensor:
            with self.compute.autocast():
                return self.model.image(self._normalised(pixels))[1]

        images = images_of(self.sources, negatives=True)
        blocks = list(chunks([(image, None) for image in images], self.compute.batch))
        rows = [rows for _, rows in encode_in_turn(blocks, self._pixels, features, "encoding the bank")]
        return Bank(images, torch.cat(rows).to(self.compute.device))

    def follow(
        self, steps: Iterable[int], draw: Callable[[int], Batch], seed: int, out: str = ""
    ) -> Iterator[tuple[Batch, Tensor]]:
        """(batch, tokens of this rank's references, then of its targets), the next one drawn and decoded meanwhile.

        draw(step) -> its batch, in a thread. An image that one rank cannot read stops all ranks; out: of stop_together.
        """

        def load(step: int) -> tuple[Batch, Tensor]:
            batch = draw(step)
            return batch, self._load(batch, seed)

        for _, loaded in ahead(load, steps):
            stop_together(loaded, out)
            batch, rows = loaded
            self.encoded = 0 if self.views else len(rows)
            yield batch, rows.to(self.compute.device, non_blocking=True) if self.views else self._encode(rows)

    def encoded_by_all(self) -> int:
        """Images that went through the encoders of all ranks for the last batch."""
        return int(all_sum(self.encoded))

    def _load(self, batch: Batch, seed: int) -> Tensor:
        """Of this rank's references, then targets: bytes, or the tokens of a view each. Runs in a thread."""
        jobs = image_jobs(batch.own_draws)
        if not self.views:
            return self._pixels(jobs)
        chosen = []
        for image, key in jobs:
            views = self.views[image]
            chosen.append(views[seeded_rng(seed, "view", *key).integers(len(views))])
        room = torch.empty(len(chosen), *chosen[0].shape, dtype=chosen[0].dtype, pin_memory=self._on_gpu)
        return torch.stack(chosen, out=room)  # one copy: pinning what is stacked already would be a second
