"""Rotary positions, and the attention of one new token over a cache of keys and values: Triton kernels of decoding.

Both are bound by memory. Written in PyTorch, rotating reads and writes its input five times; and attention for whole
blocks of queries, given one, reads all places of the cache, those not yet written too, at half the speed of memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.similarity_topk import INTERPRET

# Rows of a program of the rotation, or places that a program of the attention reads together; warps. [ours] the fastest
# of bench/sweep.py on an H200, but for "shared" (several heads of queries to one of keys), not measured: with 4 warps
# eight heads of 128 would spill registers.
TILES = {"rotate": (8, 1), "one token": (16, 1), "one token, shared": (16, 8)}


@triton.jit
def _rotate_kernel(x, cos, sin, out, rows, heads, tokens, d, sign, ROWS: tl.constexpr, HALF: tl.constexpr):
    """x (rows, d), row = (.. x tokens + t) x heads + h, cos and sin (tokens, d)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane, half = tl.arange(0, HALF), d // 2
    inside = (row < rows)[:, None] & (lane < half)[None, :]
    first = row.to(tl.int64)[:, None] * d + lane[None, :]
    at = (row // heads % tokens)[:, None] * d + lane[None, :]
    a = tl.load(x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + first + half, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32) * sign
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    c = tl.load(cos + at + half, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at + half, mask=inside, other=0.0).to(tl.float32) * sign
    tl.store(out + first + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    tokens, heads, d = x.shape[-3:]
    out, rows = torch.empty_like(x), x.numel() // d
    at_once, warps = TILES["rotate"]
    shape = rows, heads, tokens, d, sign, at_once, triton.next_power_of_2(d // 2)
    with torch.cuda.device_of(x):
        _rotate_kernel[(triton.cdiv(rows, at_once),)](x, cos, sin, out, *shape, num_warps=warps)
    return out


def takes_kernels(x: Tensor) -> bool:
    """Whether these kernels are for x: on a GPU (or in the interpreter), but for float64."""
    return (x.is_cuda or INTERPRET) and x.dtype != torch.float64


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _rotated(grad, *ctx.saved_tensors, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (..., T, H, d), d even; cos and sin (T, 1, d) with equal halves, no gradient to them.

    (a, b), the halves of a head, becomes (a cos - b sin, b cos + a sin). On CUDA in one kernel (but for float64),
    computed in fp32 and rounded once; by Hugging Face in the type of x, three times. [ours]"""
    if takes_kernels(x):
        return _Rotate.apply(x, cos, sin)
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


@triton.jit
def _one_token_kernel(
    q, keys, values, last, out, heads, shared, d, row_step, place_step,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """One row and one head of keys, of which `shared` heads of queries make use; the places 0 to last are read."""
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    lane, member = tl.arange(0, WIDTH), tl.arange(0, GROUP)
    at = ((row * heads + head).to(tl.int64) * shared + member)[:, None] * d + lane[None, :]
    mine = (member < shared)[:, None] & (lane < d)[None, :]
    x = tl.load(q + at, mask=mine, other=0.0).to(tl.float32)  # (GROUP, WIDTH)
    scale = 1.4426950408889634 / tl.sqrt(d.to(tl.float32))  # of log2
    stop = tl.load(last) + 1
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total, held = tl.zeros([GROUP], tl.float32), tl.zeros([GROUP, WIDTH], tl.float32)
    start = row.to(tl.int64) * row_step + head * d
    for begin in range(0, stop, PLACES):
        place = begin + tl.arange(0, PLACES)
        inside = (place < stop)[:, None] & (lane < d)[None, :]
        from_ = start + place[:, None] * place_step + lane[None, :]
        k = tl.load(keys + from_, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(values + from_, mask=inside, other=0.0).to(tl.float32)  # (PLACES, WIDTH)
        s = tl.sum(x[:, None, :] * k[None, :, :], 2) * scale  # (GROUP, PLACES)
        s = tl.where((place < stop)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p, fade = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        held = held * fade[:, None] + tl.sum(p[:, :, None] * v[None, :, :], 1)
        top = higher
    tl.store(out + at, (held / total[:, None]).to(out.dtype.element_ty), mask=mine)


def one_token_attention(q: Tensor, keys: Tensor, values: Tensor, last: Tensor) -> Tensor:
    """q (n, 1, H, d) over the places 0 to `last`, an integer tensor (1,), of keys and values (n, S, H_kv, d) whose
    heads lie side by side -> (n, 1, H, d). What a row gets does not depend on the others."""
    n, _, heads, d = q.shape
    shared = heads // keys.size(2)
    q, out = q.contiguous(), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert keys.stride() == values.stride() and keys.stride()[2:] == (d, 1)
    places, warps = TILES["one token, shared" if shared > 1 else "one token"]
    sizes = keys.size(2), shared, d, *keys.stride()[:2]
    shape = triton.next_power_of_2(shared), triton.next_power_of_2(d), places
    with torch.cuda.device_of(q):
        _one_token_kernel[(n * keys.size(2),)](q, keys, values, last, out, *sizes, *shape, num_warps=warps)
    return out
