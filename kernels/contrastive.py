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

(the sum over a row is zero). Columns are the same with i and j exchanged. From G = dL/ds: dL/dx = G c / tau,
dL/dc = G^T x / tau, and for nothing, dL/dtau = -sum_ij G_ij s_ij / tau = -sum_j c_j . dL/dc_j / tau.

With the row's largest negative logit o_i, u = s_ij - o_i, S_i = sum_neg e^{(1 + beta) u}, T_i = sum_neg e^{beta u},

    H_i = log n_i + o_i + log S_i - log T_i     bracket = (1 + beta) e^{(1 + beta) u} / S_i - beta e^{beta u} / T_i

At beta = 1/2, the paper's, both powers come from t = e^{u/2}, as t^3 and t: one exponential for each direction.

L_tcc is the loss of the human batch B plus the loss of B + B'. The first's logits are a sub-block of the second's, so
one pass over the whole serves both: o, S and T are taken in two parts, over the human and over the other columns (or
rows), and merged; and a gradient inside the sub-block has one coefficient for both terms, with o1 <= o2:

    w1 e^{(1+beta) u1} / S1 + w2 e^{(1+beta) u2} / S2 = [w1 / S1 + w2 e^{(1+beta) (o1-o2)} / S2] e^{(1+beta) u1}

Forward and backward go through blocks of rows: no (N, M) array is kept, only vectors of length N and M. Across ranks
each has a strip of rows and every column: c is gathered once, the columns' (o, S, T) are all-reduced, dL/dc is
reduce-scattered.

(The HN-NCE that CoVR and the VDG release share differs for beta != 0: its row normaliser lands on the columns.)
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import contrastive_torch, contrastive_triton
from kernels.contrastive_torch import merge, powers_of
from kernels.similarity_topk import INTERPRET, full_precision

# ---- reference ----


def hn_nce_reference(x, c, positive, tau, alpha=1.0, beta=0.0):
    """The definition with the whole (N, M) matrix and autograd; same arguments and results as hn_nce."""
    return hn_nce_of_scores(x @ c.T / tau, positive, alpha, beta)


def hn_nce_of_scores(s, positive, alpha=1.0, beta=0.0):
    """The same of scores s (N, M), already divided by tau, however they came about."""
    own = torch.nn.functional.one_hot(positive, s.shape[1]).bool()  # (N, M)
    s_own = s[own]
    losses = []
    for dim, count in ((1, s.shape[1] - own.sum(1)), (0, s.shape[0] - own.sum(0))):
        weights = (beta * s).masked_fill(own, -torch.inf)
        weights = count.to(s.dtype).log().unsqueeze(dim) + weights - weights.logsumexp(dim, keepdim=True)
        hard = (weights + s).masked_fill(own, -torch.inf).logsumexp(dim)
        hard = torch.where(count > 0, hard, -torch.inf)
        hard = hard if dim == 1 else hard[positive]
        losses.append(torch.logaddexp(math.log(alpha) + s_own, hard) - s_own)
    return losses[0], losses[1]


# ---- ranks ----


class Places(NamedTuple):
    """Where the columns of all ranks, first the human ones, lie in their padded parts: column j in place order[j]."""

    order: Tensor  # (M,), rank * longest + row
    longest: int  # rows of the largest part
    own: Tensor  # this rank's columns, in the order of its rows
    human: int  # of all ranks


def places_of_ranks(n_human: int, rows: int, device: torch.device) -> Places:
    """Every rank says how many rows it has, the first n_human of them human."""
    parts = [torch.empty(2, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([n_human, rows - n_human], device=device))
    human, pseudo = torch.stack(parts).T.tolist()
    rank, longest = dist.get_rank(), max(map(sum, zip(human, pseudo, strict=True)))
    order = [torch.arange(n, device=device) + r * longest for r, n in enumerate(human)]
    order += [torch.arange(n, device=device) + r * longest + human[r] for r, n in enumerate(pseudo)]
    starts = sum(human[:rank]), sum(human) + sum(pseudo[:rank])
    own = [torch.arange(n, device=device) + start for start, n in zip(starts, (human[rank], pseudo[rank]), strict=True)]
    return Places(torch.cat(order), longest, torch.cat(own), sum(human))


def all_gather(rows: Tensor, places: Places) -> Tensor:
    """(N, ...) of each rank -> (M, ...), without gradients."""
    padded = rows.new_zeros(places.longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[places.order]


def _reduce_scatter(dc: Tensor, places: Places) -> Tensor:
    spread = dc.new_zeros(places.longest * dist.get_world_size(), dc.size(1))
    spread[places.order] = dc
    mine = dc.new_empty(places.longest, dc.size(1))
    dist.reduce_scatter(mine, list(spread.split(places.longest)))
    return mine


def _all_reduce_sums(part: Tensor, beta: float) -> Tensor:
    """merge over ranks of (2 groups, 3, M)."""
    top = part[:, 0].contiguous()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    sums = part[:, 1:] * torch.stack(powers_of(part[:, 0] - top, beta), 1)
    dist.all_reduce(sums)
    return torch.cat([top[:, None], sums], 1)


# ---- autograd ----


def _path(rows: Tensor, columns: Tensor) -> tuple:
    """The functions for these inputs, and the inputs as they want them. Logits are fp32 (fp64 for fp64) on every path;
    the tensor cores take bf16 and fp16 as they are, their products being exact in fp32."""
    work = _work(rows, columns)
    if (rows.is_cuda or INTERPRET) and work == torch.float32:
        work = rows.dtype if rows.dtype == columns.dtype else work
        both = rows.to(work).contiguous(), columns.to(work).contiguous()
        return contrastive_triton.statistics, contrastive_triton.gradient, *both
    return contrastive_torch.statistics, contrastive_torch.gradient, rows.to(work), columns.to(work)


def _work(x: Tensor, c: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, c.dtype), torch.float32)


def _anchors(sums: Tensor, count: Tensor, own: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Losses of anchors and the shares h of their negatives, from (3, n) o, S, T, the number of negatives and s_i+."""
    top, big, small = sums
    over = (top - own) + (big.log() if beta == 0 else (count * (big / small)).log())  # H - s_i+
    over = torch.where(count > 0, over, -torch.inf)
    loss = torch.logaddexp(over.new_full((), math.log(alpha)), over)
    return loss, torch.exp(over - loss)


def _vectors(terms: list[tuple[Tensor, Tensor]], beta: float) -> Tensor:
    """(2, 3, n): offset, big and small of _bracket outside and inside the sub-block, from ((3, n) o, S, T and (n,)
    weights) of each term; the last term is the whole, the first, if there are two, the sub-block."""
    (top_all, big_all, small_all), weight_all = terms[-1]
    found = []
    for term in (terms[-1], terms[0]):
        (top, big, small), weight = term
        upper, lower = weight / big, weight / small
        if term is not terms[-1]:
            powers = powers_of(top - top_all, beta)
            upper, lower = upper + weight_all / big_all * powers[0], lower + weight_all / small_all * powers[1]
        if beta == 0:
            lower = torch.zeros_like(lower)
        else:
            upper, lower = (1 + beta) * upper, beta * lower
        nothing = big == 0  # no negatives, or a row of the bank: e^u = 0
        found += [top.masked_fill(nothing, torch.inf), upper.masked_fill(nothing, 0), lower.masked_fill(nothing, 0)]
    return torch.stack(found).unflatten(0, (2, 3))


def _add_at(sums: Tensor, at: Tensor, values: Tensor) -> None:
    """sums[at] += values, in a fixed order where anchors share a column: CUDA's index_add_ is atomic."""
    if sums.is_cuda:
        sums.index_put_((at,), values, accumulate=True)
    else:
        sums.index_add_(0, at, values)


class _Term(NamedTuple):
    """What the backward wants of one term with n anchors; tensors, so that autograd can save them."""

    row_shares: Tensor  # (n,) h, the share of the negatives in the denominator of each row's loss
    column_shares: Tensor  # (n,) the same of the columns' losses
    row_sums: Tensor  # (3, R) o, S and T of each row
    column_sums: Tensor  # (3, M) and of each column


class _Contrast(torch.autograd.Function):
    """Losses of rows and of columns for each term: the first group, where it is a term of its own, then the whole.

    first: rows and columns of the first group. counts: for each term how many negatives its rows have, and its columns
    ((), or (M,) where they differ). places: None, or where the columns of all ranks lie; then x, c, bank and the losses
    are this rank's."""

    @staticmethod
    def forward(ctx, x, c, bank, tau, label, first, counts, places, alpha, beta):
        work = _work(x, c)
        k = len(bank)
        rows = torch.cat([bank.to(x.dtype), x]) if k else x
        columns = c if places is None else all_gather(c, places)
        scale = tau.to(x.device, work).reciprocal()
        shape = torch.cat([label.new_full((k,), -1), label]), k, k + first[0], first[1], scale, beta
        with full_precision(x.device):
            statistics, _, *both = _path(rows, columns)
            row_parts, column_parts = statistics(*both, *shape)
        if places is not None:
            column_parts = _all_reduce_sums(column_parts, beta)
        s_own = (rows[k:].to(work) * columns[label].to(work)).sum(1) * scale
        whole = merge(row_parts, beta), merge(column_parts, beta), len(x)
        sums = [(row_parts[0], column_parts[0], first[0]), whole][-len(counts) :]
        losses, terms = [], []
        for (row_sums, column_sums, n), (row_count, column_count) in zip(sums, counts, strict=True):
            own, at = s_own[:n], label[:n]
            column_count = column_count[at] if column_count.ndim else column_count
            row_loss, row_shares = _anchors(row_sums[:, k : k + n], row_count.to(work), own, alpha, beta)
            column_loss, column_shares = _anchors(column_sums[:, at], column_count.to(work), own, alpha, beta)
            losses += [row_loss, column_loss]
            terms += _Term(row_shares, column_shares, row_sums, column_sums)
        ctx.save_for_backward(rows, columns, tau, *shape[:1], scale, *terms)
        ctx.shape, ctx.places = shape[1:4], places
        ctx.beta, ctx.types, ctx.columns = beta, (x.dtype, c.dtype), len(c)
        return tuple(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        rows, columns, tau, label, scale, *saved = ctx.saved_tensors
        terms = [_Term(*saved[i : i + len(_Term._fields)]) for i in range(0, len(saved), len(_Term._fields))]
        k = ctx.shape[0]
        n = len(rows) - k
        own = scale.new_zeros(n)
        # h of each column's anchors times their incoming gradients, by term
        weights = scale.new_zeros(len(terms), len(columns))
        of_rows, of_columns = [], []
        for term, weight, of_losses in zip(terms, weights, zip(grads[::2], grads[1::2], strict=True), strict=True):
            row_shares, column_shares = term.row_shares * of_losses[0], term.column_shares * of_losses[1]
            m = len(row_shares)
            own[:m] -= row_shares + column_shares
            _add_at(weight, label[k : k + m], column_shares)
            of_rows.append((term.row_sums, torch.nn.functional.pad(row_shares, (k, n - m))))
            of_columns.append((term.column_sums, weight))
        if ctx.places is not None:
            dist.all_reduce(weights)
        vectors = [_vectors(terms, ctx.beta) for terms in (of_rows, of_columns)]
        with full_precision(rows.device):
            _, gradient, *both = _path(rows, columns)
            dx, dc = gradient(*both, label, *ctx.shape, scale, ctx.beta, vectors, own)
        dtau = -(columns.double() * dc).sum() / tau if ctx.needs_input_grad[3] else None
        if ctx.places is not None:
            dc = _reduce_scatter(dc, ctx.places)[: ctx.columns]
        dtau = None if dtau is None else dtau.to(tau)
        return dx.to(ctx.types[0]), dc.to(ctx.types[1]), None, dtau, *[None] * 6


# ---- public ----


def _checked_tau(tau: Tensor | float, alpha: float, beta: float, x: Tensor) -> Tensor:
    if isinstance(tau, Tensor):
        value = 1.0 if tau.is_cuda else tau.tolist()  # a look at a tensor on the GPU would wait for it
    else:
        value, tau = tau, torch.full((), tau, dtype=torch.float64, device=x.device)
    if tau.numel() != 1 or not value > 0 or not alpha > 0 or not beta >= 0:
        raise ValueError(f"tau > 0 (one number), alpha > 0 and beta >= 0 wanted, found {value}, {alpha}, {beta}")
    return tau


def hn_nce(
    x: Tensor,
    c: Tensor,
    positive: Tensor,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x (N, D), c (M, D), positive (N,) int64 -> losses of rows and of columns, (N,) each, fp32 (fp64 for fp64 inputs).

    positive[i] is the column of row i. rows[i]: row i against all columns; its negatives are the M - 1 others.
    columns[i]: column positive[i] against all rows, with row i as its positive; its negatives are the rows whose
    positive is another column. So a column that is nobody's positive has no loss (it only serves the rows as a
    negative), and rows that share a positive do not repel it. An anchor without negatives has loss log(alpha), 0 by
    default, and no gradient: the limit of negatives infinitely far away. Gradients reach x, c and tau (if it is a
    tensor). What `positive` and tau hold is checked on CPU only."""
    if x.ndim != 2 or c.ndim != 2 or x.size(1) != c.size(1) or positive.shape != (len(x),):
        found = f"{(*x.shape,)}, {(*c.shape,)}, {(*positive.shape,)}"
        raise ValueError(f"x (N, D), c (M, D) and positive (N,) wanted, found {found}")
    if len(x) == 0 or not positive.is_cuda and (int(positive.min()) < 0 or int(positive.max()) >= len(c)):
        raise ValueError(f"one positive in 0..{len(c) - 1} for each of at least one row wanted")
    tau = _checked_tau(tau, alpha, beta, x)
    sharing = positive.new_zeros(len(c)).index_add_(0, positive, torch.ones_like(positive))
    counts = [(positive.new_full((), len(c) - 1), len(x) - sharing)]
    bank = x.new_empty(0, x.size(1))
    return _Contrast.apply(x, c, bank, tau, positive, (0, 0), counts, None, float(alpha), float(beta))


def l_tcc(
    x: Tensor,
    c: Tensor,
    n_human: int,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    bank: Tensor | None = None,
) -> Tensor:
    """Eq. 2: HN-NCE of the human triplets, plus HN-NCE of all; each the mean over rows plus the mean over columns.

    x, c (N, D): target and composed embeddings, row i of one belonging to row i of the other; the first n_human rows
    are human, the rest pseudo triplets. Without pseudo triplets, or without human ones, the two terms have one batch
    between them and it counts once. Without a bank the loss is the same with x and c exchanged.
    bank (K, D): features of further targets [ours], each one more negative of every composed embedding, in both terms.
    They get no gradient and have no loss; the caller leaves out those of images that are targets in the batch."""
    _check_batch(x, c, n_human, bank)
    label = torch.arange(len(x), device=x.device)
    sizes = n_human, len(x), 0 if bank is None else len(bank)
    return _sum_of_terms(x, c, n_human, tau, alpha, beta, bank, label, sizes, None)


def l_tcc_ranks(
    x: Tensor,
    c: Tensor,
    n_human: int,
    tau: Tensor | float,
    alpha: float = 1.0,
    beta: float = 0.0,
    bank: Tensor | None = None,
) -> Tensor:
    """This rank's share of l_tcc of the batches of all ranks: the shares add up to it.

    Every rank passes its own rows of x and c (N may differ), its own n_human, and the whole bank, and calls backward on
    its share with the same incoming gradient. x.grad and c.grad are then those of the global loss; the gradient of tau
    is a share (sum it over ranks, like that of any replicated parameter)."""
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size == 1:
        return l_tcc(x, c, n_human, tau, alpha, beta, bank)
    _check_batch(x, c, n_human, bank)
    places, k = places_of_ranks(n_human, len(x), x.device), 0 if bank is None else len(bank)
    sizes, bank = (places.human, len(places.order), k), None if bank is None else bank[dist.get_rank() :: size]
    return _sum_of_terms(x, c, n_human, tau, alpha, beta, bank, places.own, sizes, places)


def _check_batch(x: Tensor, c: Tensor, n_human: int, bank: Tensor | None) -> None:
    if x.ndim != 2 or x.shape != c.shape or not 0 <= n_human <= len(x):
        found = f"{(*x.shape,)}, {(*c.shape,)}, {n_human}"
        raise ValueError(f"x and c of one shape (N, D) and n_human in 0..{len(x)} wanted, found {found}")
    if bank is not None and (bank.ndim != 2 or bank.size(1) != x.size(1)):
        raise ValueError(f"bank (K, {x.size(1)}) wanted, found {(*bank.shape,)}")


def _sum_of_terms(x, c, n_human, tau, alpha, beta, bank, label, sizes, places) -> Tensor:
    """sizes: human and all triplets, and the bank, of all ranks. x, c, n_human, bank and label are this rank's."""
    human, total, k = sizes
    if total == 0:
        raise ValueError("at least one triplet wanted")
    tau = _checked_tau(tau, alpha, beta, x)
    bank = x.new_empty(0, x.size(1)) if bank is None else bank.detach()
    batches = sorted({human, total} - {0})
    counts = [(label.new_full((), n - 1), label.new_full((), n - 1 + k)) for n in batches]
    first = (n_human, human) if len(batches) == 2 else (0, 0)
    losses = _Contrast.apply(x, c, bank, tau, label, first, counts, places, float(alpha), float(beta))
    return sum(loss.sum() / batches[i // 2] for i, loss in enumerate(losses))
