"""train_cir.py with one thing as the public releases of the papers have it: what does their way cost?

    python demo/as_released.py hn-nce --model blip_tdm --root data/cirr --out out/released     # flags of train_cir.py

Ways (docs/method.md says what is wrong with each; train_cir.py has none of them):

    hn-nce      the row normaliser of HN-NCE's weights lands on the columns (CoVR, VDG)
    negatives   hard negatives of L_tdm by similarity, not by similarity / tau (VDG)
    normalised  stage I's reversed loss composes the normalised target with the raw text (Bi-Blip4CIR)

On one process. OUT's constants are those of train_cir.py and do not name the way.
"""

import os
import runpy
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.reversed
from common.console import UserError, fail
from kernels import contrastive, negatives
from kernels.negatives import Negatives, draw_negatives
from kernels.reversed import reversed_sum


def hn_nce(c: Tensor, x: Tensor, tau: Tensor | float, alpha: float, beta: float) -> Tensor:
    """Queries c and targets x (N, D) -> rows plus columns; in row i, w_ij is divided by the sum of row j."""
    s = c @ x.T / tau  # (N, N)
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    powers = (beta * s).exp()
    log_alpha = torch.tensor(alpha, dtype=s.dtype, device=s.device).log()
    loss = s.new_zeros(())
    for dim in (1, 0):
        others = powers.masked_fill(own, 0).sum(dim)  # (N,), of rows and of columns; both stand for the columns below
        weights = (len(s) - 1) * powers / others
        logits = torch.where(own, log_alpha + s, weights.log() + s)
        loss = loss + (logits.logsumexp(dim) - s.diagonal()).mean()
    return loss


def l_tcc(x, c, n_human: int, tau, alpha: float, beta: float, bank=None) -> Tensor:
    """Eq. 2 with that: the human triplets, and all; one term where these are the same."""
    terms = [len(x)] if n_human in (0, len(x)) else [n_human, len(x)]
    return sum(hn_nce(c[:n], x[:n], tau, alpha, beta) for n in terms)


def negatives_without_tau(x, c, images: list, tau: float, generator: torch.Generator) -> Negatives:
    return draw_negatives(x, c, images, 1.0, generator)


def reversed_normalised(reference, text, target, positive, tau) -> Tensor:
    return reversed_sum(reference, text, F.normalize(target.float(), dim=1), positive, tau)


WAYS = {  # what train_cir.py will find where it looks for ours
    "hn-nce": (contrastive, "l_tcc_ranks", l_tcc),
    "negatives": (negatives, "draw_negatives", negatives_without_tau),
    "normalised": (kernels.reversed, "reversed_sum", reversed_normalised),
}

if __name__ == "__main__":
    if sys.argv[1:2] not in [[way] for way in WAYS]:
        fail(UserError(f"wanted demo/as_released.py WAY, one of {', '.join(WAYS)}, then the flags of train_cir.py"))
    setattr(*WAYS[sys.argv.pop(1)])
    runpy.run_path(f"{ROOT}/train_cir.py", run_name="__main__")
