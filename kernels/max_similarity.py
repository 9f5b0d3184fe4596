"""Pictures of several vectors: the score of a query is the largest of its inner products [BLIP-2, SPRC]; L_tcc on it.

    s_ij = max_q x_iq . c_j / tau        x (N, Q, D) of targets, which are frozen; c (M, D) of composed queries

The loss is that of contrastive.py, by its definition and autograd: the whole matrix of scores is held, (N, Q, M) of
them in a step, which at 512 triplets of 32 vectors is 32 MiB. dL/dc goes through the vector that won [ours: the fused
kernels take one vector a picture]."""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.contrastive import all_gather, hn_nce_of_scores, places_of_ranks


def max_scores(images: Tensor, queries: Tensor) -> Tensor:
    """images (N, Q, D) or (N, D), queries (M, D) -> (M, N)."""
    if images.ndim == 2:
        return queries @ images.T
    return (queries @ images.flatten(0, 1).T).unflatten(1, images.shape[:2]).amax(2)


def l_tcc_max_ranks(
    x: Tensor, c: Tensor, n_human: int, tau: Tensor | float, alpha: float = 1.0, beta: float = 0.0, bank=None
) -> Tensor:
    """As l_tcc_ranks of contrastive.py, with x (N, Q, D): this rank's share of Eq. 2 over the batches of all ranks.

    Shares and gradients of c, tau and what is behind them add up over the ranks. ValueError for a bank, and for
    targets that want a gradient: both are for one vector a picture."""
    if x.ndim != 3 or len(x) != len(c) or c.shape[1:] != x.shape[2:] or not 0 <= n_human <= len(x):
        raise ValueError(f"x (N, Q, D) and c (N, D) wanted, found {(*x.shape,)}, {(*c.shape,)}, n_human {n_human}")
    if bank is not None or x.requires_grad:
        raise ValueError("targets of several vectors are frozen, and there is no bank of them")
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if isinstance(tau, Tensor):  # every rank computes the whole loss: a share of tau's gradient each
        tau = tau.detach() + (tau - tau.detach()) / size
    with torch.autocast(c.device.type, enabled=False):
        targets, queries, human = x.float(), c.float(), n_human
        if size > 1:
            places = places_of_ranks(n_human, len(x), x.device)
            targets, human = all_gather(targets, places), places.human
            # of the queries of all ranks this rank's have a gradient
            queries = all_gather(queries, places).index_copy(0, places.own, queries)
        scores = max_scores(targets, queries).T / tau  # (N, M): rows are targets, as in Eq. 2
        loss = scores.new_zeros(())
        for n in sorted({human, len(scores)} - {0}):
            own = torch.arange(n, device=c.device)
            loss = loss + sum(part.mean() for part in hn_nce_of_scores(scores[:n, :n], own, alpha, beta))
    return loss.detach() / size + (loss - loss.detach())
