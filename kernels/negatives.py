"""Hard negatives of a batch: for target-delta matching (Eq. 3), and for the reversed loss where it does not factorise.

Row i has the target image images[i], its feature target[i] (B, d) and the feature c[i] (B, d) of its delta, both
normalised. All is drawn on the CPU from the generator given, over the global batch: every rank draws the same.
"""

import math
from typing import NamedTuple

import torch


class Negatives(NamedTuple):
    """Rows (U,) that have any negative, and one hard target and one hard delta of each, as rows."""

    rows: torch.Tensor
    targets: torch.Tensor
    deltas: torch.Tensor


@torch.no_grad()
def draw_negatives(target, c, images: list, tau: float, generator: torch.Generator) -> Negatives:
    """Hard negatives as in ALBEF, over the global batch.

    Multinomial from the softmax of similarity / tau; the feature of a delta is c, which Eq. 2 has computed anyway
    [ours]. Two rows with the same target image are no negatives of each other. Over B and B' together [ours]."""
    z = similarity(target, c, images, tau)  # (B, B): target i, delta j
    rows = (z > -math.inf).any(1).nonzero().flatten()  # a batch of one single target has none
    if len(rows) == 0:
        return Negatives(rows, rows, rows)
    hard_target = torch.multinomial(z.T[rows].softmax(1), 1, generator=generator).flatten()
    hard_delta = torch.multinomial(z[rows].softmax(1), 1, generator=generator).flatten()
    return Negatives(rows, hard_target, hard_delta)


def similarity(target, c, images: list, tau: float) -> torch.Tensor:
    """target . c / tau (B, B) on the CPU, -inf where two rows have the same target image."""
    number = {image: i for i, image in enumerate(dict.fromkeys(images))}
    label = torch.tensor([number[image] for image in images])
    return (target @ c.T / tau).cpu().masked_fill(label[:, None] == label, -math.inf)


@torch.no_grad()
def draw_candidates(target, c, images: list, tau: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """(B, 1 + K) targets for each reversed text: its own, then `count` hard ones without repeats; count 0 = all others.

    K is what every row has: other images than its own target's."""
    own = torch.arange(len(images))
    if count == 0:
        return (own[:, None] + own) % len(own)  # each row starts with itself
    z = similarity(target, c, images, tau).T  # (B, B): delta i, target j
    count = min(count, int((z > -math.inf).sum(1).min()))
    z -= torch.empty_like(z).exponential_(generator=generator).log()  # the top k are k draws from the softmax
    return torch.cat([own[:, None], z.topk(count, dim=1).indices], dim=1)
