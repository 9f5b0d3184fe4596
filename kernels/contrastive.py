"""Hard-negative noise contrastive loss (HN-NCE) in both directions, and L_tcc (Eq. 2 of the VDG paper) made of it.

    s_ij = x_i . c_j / tau
    w_ij = n_i exp(beta s_ij) / sum_{k in neg(i)} exp(beta s_ik)            n_i negatives; mean weight 1
    L_i  = -log( e^{s_i+} / (alpha e^{s_i+} + sum_{j in neg(i)} w_ij e^{s_ij}) )

beta = 0, alpha = 1 is cross entropy. exp(1 / 0.01) overflows fp32, so everything stays in the log domain:

    N_i = LSE_neg beta s_ij     M_i = LSE_neg (1 + beta) s_ij     H_i = log n_i + M_i - N_i
    L_i = logaddexp(log alpha, H_i - s_i+)

(subtracting s_i+ inside keeps the digits of a small loss) and with h_i = exp(H_i - s_i+ - L_i), the share of the
negatives in the denominator,

    dL_i/ds_ij = h_i [(1 + beta) exp((1 + beta) s_ij - M_i) - beta exp(beta s_ij - N_i)]     dL_i/ds_i+ = -h_i

(the sum over a row is zero). With the weights w detached the bracket is exp((1 + beta) s_ij - M_i) alone. Columns are
the same with i and j exchanged. From G = dL/ds: dL/dx = G c / tau, dL/dc = G^T x / tau, and for nothing,
dL/dtau = -sum_ij G_ij s_ij / tau = -sum_i x_i . dL/dx_i / tau.

Forward and backward go through blocks of rows: no (N, M) array is kept, only vectors of length N and M.

(The HN-NCE that CoVR and the VDG release share differs for beta != 0: its row normaliser lands on the columns.)
"""

import math

import torch
from torch import Tensor

from kernels.similarity_topk import full_precision

BLOCK = 1 << 22  # logits held at a time (16 MiB of fp32, three such arrays)

# ---- reference ----


def hn_nce_reference(x, c, positive, tau, alpha=1.0, beta=0.0, detach_weights=False):
    """The definition with the whole (N, M) matrix and autograd; same arguments and results as hn_nce."""
    s = x @ c.T / tau
    own = torch.nn.functional.one_hot(positive, len(c)).bool()  # (N, M)
    s_own = s[own]
    losses = []
    for dim, count in ((1, len(c) - own.sum(1)), (0, len(x) - own.sum(0))):
        weights = (beta * s).masked_fill(own, -torch.inf)
        weights = count.to(s.dtype).log().unsqueeze(dim) + weights - weights.logsumexp(dim, keepdim=True)
        weights = weights.detach() if detach_weights else weights
        hard = (weights + s).masked_fill(own, -torch.inf).logsumexp(dim)
        hard = torch.where(count > 0, hard, -torch.inf)
        hard = hard if dim == 1 else hard[positive]
        losses.append(torch.logaddexp(math.log(alpha) + s_own, hard) - s_own)
    return losses[0], losses[1]


# ---- PyTorch: blocks of rows ----


def _blocks(n: int, m: int):
    block = max(1, BLOCK // m)
    return [slice(start, min(start + block, n)) for start in range(0, n, block)]


def _logits(x: Tensor, c: Tensor, positive: Tensor, part: slice, scale: float) -> tuple[Tensor, Tensor]:
    """Rows `part` of s (block, M), and the places (row, column) of the positives: the only pairs that are no negatives,
    for the row and for the column alike."""
    s = (x[part] @ c.T).mul_(scale)
    return s, (torch.arange(len(s), device=s.device), positive[part])


def _times(s: Tensor, factor: float, positives) -> Tensor:
    z = s * factor
    z[positives] = -torch.inf  # after the product: 0 * -inf is NaN
    return z


def _forward(x: Tensor, c: Tensor, positive: Tensor, scale: float, alpha: float, beta: float):
    """Losses of rows and columns (N,) each, and what the backward needs: per anchor M, N, h."""
    n, m = len(x), len(c)
    s_own = x.new_empty(n)
    row_m, row_n = x.new_empty(n), x.new_empty(n)
    col_m, col_n = x.new_full((m,), -torch.inf), x.new_full((m,), -torch.inf)
    for part in _blocks(n, m):
        s, positives = _logits(x, c, positive, part, scale)
        s_own[part] = s[positives]
        z = _times(s, 1 + beta, positives)
        row_m[part] = z.logsumexp(1)
        col_m = torch.logaddexp(col_m, z.logsumexp(0))
        z = _times(s, beta, positives)
        row_n[part] = z.logsumexp(1)
        col_n = torch.logaddexp(col_n, z.logsumexp(0))
    col_count = n - torch.bincount(positive, minlength=m)  # rows of the same positive are not its negatives
    losses, saved = [], []
    for big, small, count in ((row_m, row_n, x.new_full((n,), m - 1)), (col_m, col_n, col_count.to(x.dtype))):
        hard = torch.where(count > 0, count.log() + big - small, -torch.inf)
        hard = hard if big is row_m else hard[positive]  # (N,)
        losses.append(torch.logaddexp(hard.new_tensor(math.log(alpha)), hard - s_own))
        saved += [big, small, torch.exp(hard - s_own - losses[-1])]
    return losses, saved


def _backward(x, c, positive, scale, beta, detach_weights, saved, row_grad, col_grad):
    """dL/dx (N, D) and dL/dc (M, D)."""
    row_m, row_n, row_h, col_m, col_n, col_h = saved
    row_h, col_h = row_h * row_grad, col_h * col_grad  # (N,), h of each anchor times its incoming gradient
    col_sum = torch.zeros_like(col_m).index_add_(0, positive, col_h)  # (M,): anchors may share a column
    big, small = (1.0, 0.0) if detach_weights else (1 + beta, beta)
    dx, dc = torch.empty_like(x), torch.zeros_like(c)
    for part in _blocks(len(x), len(c)):
        s, positives = _logits(x, c, positive, part, scale)
        z = _times(s, 1 + beta, positives)
        g = (z - row_m[part, None]).exp_().mul_(big * row_h[part, None])
        g += z.sub_(col_m).exp_().mul_(big * col_sum)
        if small:
            z = _times(s, beta, positives)
            g -= (z - row_n[part, None]).exp_().mul_(small * row_h[part, None])
            g -= z.sub_(col_n).exp_().mul_(small * col_sum)
        g[positives] = -(row_h + col_h)[part]  # an anchor without negatives has M = -inf and NaN here, and only here
        dx[part] = g @ c
        dc.addmm_(g.T, x[part])
    return dx.mul_(scale), dc.mul_(scale)


# ---- autograd ----


class _HnNce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, c, positive, tau, alpha, beta, detach_weights):
        work = torch.promote_types(torch.promote_types(x.dtype, c.dtype), torch.float32)
        wide = x.to(work), c.to(work)  # logits in fp32 at least: bf16 has three digits
        with full_precision(x.device):
            losses, saved = _forward(*wide, positive, 1 / tau.item(), alpha, beta)
        ctx.save_for_backward(x, c, positive, tau, *saved)
        ctx.constants = work, beta, detach_weights
        return losses[0], losses[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, row_grad, col_grad):
        x, c, positive, tau, *saved = ctx.saved_tensors
        work, beta, detach_weights = ctx.constants
        wide = x.to(work), c.to(work)
        with full_precision(x.device):
            dx, dc = _backward(*wide, positive, 1 / tau.item(), beta, detach_weights, saved, row_grad, col_grad)
        dtau = -(wide[0].double() * dx).sum() / tau.item() if ctx.needs_input_grad[3] else None
        return dx.to(x.dtype), dc.to(c.dtype), None, None if dtau is None else dtau.to(tau), None, None, None


# ---- public ----


def hn_nce(
    x: Tensor,
    c: Tensor,
    positive: Tensor,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    detach_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """x (N, D), c (M, D), positive (N,) int64 -> losses of rows and of columns, (N,) each, fp32 (fp64 for fp64 inputs).

    positive[i] is the column of row i. rows[i]: row i against all columns; its negatives are the M - 1 others.
    columns[i]: column positive[i] against all rows, with row i as its positive; its negatives are the rows whose
    positive is another column. So a column that is nobody's positive has no loss (it only serves the rows as a
    negative), and rows that share a positive do not repel it. An anchor without negatives has loss log(alpha), 0 by
    default, and no gradient: the limit of negatives infinitely far away. Gradients reach x, c and tau (if it is a
    tensor); with detach_weights none flows through w. Inputs of several ranks are gathered by the caller."""
    if x.ndim != 2 or c.ndim != 2 or x.size(1) != c.size(1) or positive.shape != (len(x),):
        found = f"{(*x.shape,)}, {(*c.shape,)}, {(*positive.shape,)}"
        raise ValueError(f"x (N, D), c (M, D) and positive (N,) wanted, found {found}")
    if len(x) == 0 or int(positive.min()) < 0 or int(positive.max()) >= len(c):
        raise ValueError(f"one positive in 0..{len(c) - 1} for each of at least one row wanted")
    tau = tau if isinstance(tau, Tensor) else torch.tensor(tau, dtype=torch.float64)
    if tau.numel() != 1 or not tau.item() > 0 or not alpha > 0 or not beta >= 0:
        raise ValueError(f"tau > 0 (one number), alpha > 0 and beta >= 0 wanted, found {tau.tolist()}, {alpha}, {beta}")
    return _HnNce.apply(x, c, positive, tau, float(alpha), float(beta), detach_weights)


def l_tcc(
    x: Tensor,
    c: Tensor,
    n_human: int,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    detach_weights: bool = False,
) -> Tensor:
    """Eq. 2: HN-NCE of the human triplets, plus HN-NCE of all; each the mean over rows plus the mean over columns.

    x, c (N, D): target and composed embeddings (the loss is the same with the two exchanged), row i of one belonging
    to row i of the other; the first n_human rows (of all ranks, when gathered) are human, the rest pseudo triplets.
    Without pseudo triplets, or without human ones, the two terms have one batch between them and it counts once."""
    if x.shape != c.shape or not 0 <= n_human <= len(x):
        found = f"{(*x.shape,)}, {(*c.shape,)}, {n_human}"
        raise ValueError(f"x and c of one shape and n_human in 0..{len(x)} wanted, found {found}")
    loss = 0.0
    for n in sorted({n_human, len(x)} - {0}):
        rows, columns = hn_nce(x[:n], c[:n], torch.arange(n, device=x.device), tau, alpha, beta, detach_weights)
        loss = loss + rows.mean() + columns.mean()
    return loss
