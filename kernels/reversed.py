"""The reversed loss of bi-directional training (Liu et al., WACV 2024), without its N x M compositions of width D.

The reversed query composes a *target* with the text that leads back. Of all targets T_j, which one, changed by text
t_i, gives the reference R_i? With p(i) the target that text i belongs to,

    s_ij = cos(f(T_j, t_i), R_i) / tau          L_i = LSE_j s_ij - s_i,p(i)

where the negatives are targets: N x M compositions, which the plain form keeps for its backward.

Element-wise sum, f = T_j + t_i (stage I). |R_i| = 1, so three N x M numbers are all there is:

    s_ij = (R_i . T_j + R_i . t_i) / (tau n_ij)          n_ij^2 = |T_j|^2 + |t_i|^2 + 2 t_i . T_j

    g = dL/ds,  A = g / (tau n),  Q = -g s / n^2:   dt_i = (sum_j A_ij) R_i + (sum_j Q_ij) t_i + sum_j Q_ij T_j
    dT_j = sum_i A_ij R_i + (sum_i Q_ij) T_j + sum_i Q_ij t_i          dR_i = sum_j A_ij T_j + (sum_j A_ij) t_i

Combiner (stage II). Its two hidden layers read [text, image] side by side, so each is a text half plus an image half,
W_u [t, v] = a_i + c_j and W_l [t, v] = e_i + f_j, computed N + M times instead of N x M. What a pair still costs is

    u = relu(a_i + c_j)     lam = sigmoid(w . relu(e_i + f_j) + b)     z = W_o u + b_o + lam t_i + (1 - lam) T_j

one add, one relu and the product h -> D (2 h D FLOP), then s_ij = z . R_i / (|z| tau) and, with y = z / |z|,

    dz = g / (tau |z|) (R_i - (y . R_i) y)     du = [u > 0] W_o^T dz     dW_o += dz u^T     dlam = dz . (t_i - T_j)

Both work on blocks of rows and turn the logits of a block into gradients while its compositions are at hand: the
backward only scales them, nothing is computed twice, and memory is a block. That is why they return a sum: one number
comes back for all rows. dL/dtau = -sum_ij g_ij s_ij / tau.

There is no Triton here: of the work 97 % (h = 5120, D = 256) is three plain matrix products, which cuBLAS has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.similarity_topk import full_precision

BLOCK = 1 << 24  # numbers in the largest array held (64 MiB of fp32; about four such arrays live at a time)

# ---- reference ----


def reversed_reference(compose, reference: Tensor, text: Tensor, target: Tensor, positive: Tensor, tau) -> Tensor:
    """The definition, every pair composed: compose(image (N M, D), text (N M, D)) -> (N M, D); sum of the losses."""
    n, m = len(text), len(target)
    pairs = compose(target.repeat(n, 1), text.repeat_interleave(m, 0)).view(n, m, -1)
    logits = (F.normalize(pairs, dim=2) * reference[:, None]).sum(2) / tau
    return F.cross_entropy(logits, positive, reduction="sum")


# ---- PyTorch: blocks of rows ----


def _blocks(n: int, width: int):
    block = max(1, BLOCK // width)
    return [slice(start, min(start + block, n)) for start in range(0, n, block)]


def _cross_entropy(s: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, M) and the columns of the positives (n,) -> sum of the losses, its gradient (in place of s)."""
    rows = torch.arange(len(s), device=s.device)
    lse = s.logsumexp(1)
    loss = (lse - s[rows, own]).sum()
    g = s.sub_(lse[:, None]).exp_()
    g[rows, own] -= 1
    return loss, g


def _sum(reference, text, target, positive, scale: float):
    """Loss, gradients of reference, text and target, and of the scale 1 / tau."""
    grads = [torch.zeros_like(x) for x in (reference, text, target)]
    d_reference, d_text, d_target = grads
    loss, d_scale = reference.new_zeros(()), reference.new_zeros(())
    target_length = target.square().sum(1)  # (M,)
    for part in _blocks(len(text), len(target)):
        r, t = reference[part], text[part]  # (n, D)

        # the logits s_ij of a block
        square = torch.addmm(t.square().sum(1, keepdim=True) + target_length, t, target.T, alpha=2)  # (n, M)
        length = square.clamp_(min=1e-12).sqrt_()  # t = -T: rounding could leave less than nothing
        cos = torch.addmm((r * t).sum(1, keepdim=True), r, target.T).div_(length)

        # their loss, and g = dL/ds
        part_loss, g = _cross_entropy(cos * scale, positive[part])
        loss += part_loss
        d_scale += (g * cos).sum()

        # the gradients by A and Q, as above
        a = g.mul_(scale).div_(length)  # dL / d(R . (T + t))
        q = (a * cos).div_(length).neg_()  # dL / d(n^2), twice
        d_reference[part] = a @ target + a.sum(1, keepdim=True) * t
        d_text[part] = a.sum(1, keepdim=True) * r + q.sum(1, keepdim=True) * t + q @ target
        d_target.addmm_(a.T, r).addmm_(q.T, t).add_(q.sum(0)[:, None] * target)
    return loss, grads, d_scale


def _combiner(reference, text, target, a, c, e, f, w_out, b_out, w_gate, b_gate, positive, scale: float):
    """Loss, gradients of the first eleven, and of the scale 1 / tau; the product h -> D in the dtype of `a`."""
    inputs = (reference, text, target, a, c, e, f, w_out, b_out, w_gate, b_gate)
    work = reference.dtype
    grads = [torch.zeros_like(x, dtype=work) for x in inputs]
    d_reference, d_text, d_target, d_a, d_c, d_e, d_f, d_w_out, d_b_out, d_w_gate, d_b_gate = grads
    loss, d_scale = reference.new_zeros(()), reference.new_zeros(())
    m, h = c.shape
    for part in _blocks(len(text), m * h):
        r, t = reference[part, None], text[part, None]  # (n, 1, D)

        # compose every pair: z = W_o u + b_o + lam t_i + (1 - lam) T_j
        gate = (e[part, None] + f).relu_()  # (n, M, h)
        lam = torch.sigmoid((gate @ w_gate).to(work) + b_gate)[..., None]  # (n, M, 1)
        u = (a[part, None] + c).relu_()  # (n, M, h)
        z = (u @ w_out.T).to(work) + b_out  # (n, M, D)
        z += target
        z.addcmul_(lam, t - target)

        # the cosines with R_i, the loss, and g = dL/ds
        length = torch.linalg.vector_norm(z, dim=2, keepdim=True).clamp_(min=1e-12)  # (n, M, 1)
        y = z.div_(length)
        cos = y @ r.mT  # (n, M, 1)
        part_loss, g = _cross_entropy(cos[..., 0] * scale, positive[part])
        loss += part_loss
        g = g[..., None]  # (n, M, 1)
        d_scale += (g * cos).sum()
        g *= scale

        # back through the cosine and the sum
        d_reference[part] = (g * y).sum(1)
        dz = torch.addcmul(r, cos, y, value=-1).mul_(g / length)  # (n, M, D)
        d_b_out += dz.sum((0, 1))
        d_text[part] = (lam * dz).sum(1)
        d_target += ((1 - lam) * dz).sum(0)

        # back through the gate lam
        d_logit = (dz * (t - target)).sum(2, keepdim=True) * lam * (1 - lam)  # (n, M, 1)
        d_b_gate += d_logit.sum()
        thin = d_logit.to(gate.dtype)
        d_w_gate += (thin.flatten()[None] @ gate.flatten(0, 1))[0]
        open_ = gate.sign_()  # (n, M, h): 1 where the hidden unit is on
        d_e[part] = (thin.mT @ open_)[:, 0] * w_gate
        d_f += (open_.mul_(thin).sum(0)) * w_gate

        # back through the hidden layer u
        thin = dz.flatten(0, 1).to(u.dtype)  # (n M, D)
        d_w_out += thin.T @ u.flatten(0, 1)
        du = (thin @ w_out).view_as(u).mul_(u.sign_())
        d_a[part] = du.sum(1)
        d_c += du.sum(0)
    return loss, grads, d_scale


# ---- autograd ----


class _Reversed(torch.autograd.Function):
    """The gradients are made with the loss and scaled by what comes back."""

    @staticmethod
    def forward(ctx, run, positive, tau, *inputs):
        work = torch.promote_types(inputs[0].dtype, torch.float32)
        wide = [x.to(work) for x in inputs[:3]]  # reference, text, target
        device = inputs[0].device
        with full_precision(device), torch.autocast(device.type, enabled=False):
            loss, grads, d_scale = run(*wide, *inputs[3:], positive, 1 / tau.item())
        grads = [grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]
        ctx.save_for_backward((-d_scale / tau.square()).to(tau), *grads)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, None, *(saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)


# ---- public ----


def reversed_sum(reference: Tensor, text: Tensor, target: Tensor, positive: Tensor, tau: Tensor | float) -> Tensor:
    """Sum over rows of the reversed loss with f = target + text.

    reference (N, D), normalised; text (N, D) and target (M, D), raw; positive (N,) int64: the target of each row.
    Gradients reach the first three and tau, if it is a tensor. Divide by the number of rows (of all ranks: each takes
    its own rows against the targets of all)."""
    _check(reference, text, target, positive)
    return _Reversed.apply(_sum, positive, _tensor(tau, reference), reference, text, target)


def reversed_combiner(
    reference: Tensor,
    text: Tensor,
    target: Tensor,
    hidden: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    gate_out: tuple[Tensor, Tensor],
    positive: Tensor,
    tau: Tensor | float,
) -> Tensor:
    """Sum over rows of the reversed loss of a Combiner, as reversed_sum.

    hidden and gate: (text half (N, h) with the bias, image half (M, h)) of W_u and W_l; out: W_o (D, h) and b_o (D,);
    gate_out: w (h,) and b (). Their dtype is that of the pairs' products; lengths, logits and loss are fp32 at least.
    A hidden unit of text i that dropout leaves out is -inf in its text half, with W_o and w scaled by 1 / (1 - p)."""
    _check(reference, text, target, positive)
    return _Reversed.apply(
        _combiner,
        positive,
        _tensor(tau, reference),
        *(reference, text, target),
        *(*hidden, *gate, *out, *gate_out),
    )


def _tensor(tau: Tensor | float, like: Tensor) -> Tensor:
    return tau if isinstance(tau, Tensor) else torch.tensor(tau, dtype=torch.float64, device=like.device)


def _check(reference: Tensor, text: Tensor, target: Tensor, positive: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (reference, text, target, positive)]
    n, width = len(text), text.size(1)
    if shapes[0] != shapes[1] or target.ndim != 2 or target.size(1) != width or shapes[3] != (n,):
        raise ValueError(f"reference and text (N, D), target (M, D), positive (N,) wanted, found {shapes}")
    if n and not 0 <= int(positive.min()) <= int(positive.max()) < len(target):
        raise ValueError(f"positive: a target in 0..{len(target) - 1} for each row wanted")
