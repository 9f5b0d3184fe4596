"""Random numbers as functions of their keys, so that a resumed run draws what an unbroken one does."""

import hashlib
import json
from typing import Any

import numpy


def _seed(*keys: Any) -> int:
    digest = hashlib.sha256(json.dumps(keys, default=int).encode()).digest()  # default: numpy integers
    return int.from_bytes(digest[:8], "little") >> 1  # 63 bits: torch takes signed seeds


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds torch (CPU and CUDA), so that dropout is a function of (seed, step, rank) and survives a resume."""
    import torch

    torch.manual_seed(_seed("step", seed, step, rank))


def seeded_rng(*keys: Any):
    """A numpy Generator that is a function of the keys (seed, epoch, item, ...: numbers and strings)."""
    return numpy.random.default_rng(_seed(*keys))


def seeded_generator(*keys: Any):
    """A torch.Generator (CPU) that is a function of the keys."""
    import torch

    return torch.Generator().manual_seed(_seed(*keys))
