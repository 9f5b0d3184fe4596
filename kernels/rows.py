"""Rows taken from a matrix, some often, some never; on a GPU their gradients are added up by one Triton kernel.

PyTorch has two ways back. That of index_select adds with atomics: the order, and so the last bit, changes from run to
run. That of embedding sorts the index at every call, in some thirty launches, and reads and writes partial sums. Here
the index is sorted once, however often and of however many matrices it takes rows."""

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.decoding import takes_kernels

# Places that a program reads together, columns at most, warps: a warp reads 256 columns of 16 bits at once and adds
# without the others. [ours] (4, 1024, 4) was a fifth faster in bench/sweep.py on an H200, autograd included; its
# numbers were not looked at there.
TILE = (8, 1024, 4)


@triton.jit
def _add_up_kernel(grads, places, first, out, width, blocks, PLACES: tl.constexpr, COLUMNS: tl.constexpr):
    """One row of out (n, width) and a block of its columns; grads (places, width), places as Gather.places."""
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    stop = tl.load(first + row + 1)
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(tl.load(first + row), stop, PLACES):
        at = begin + tl.arange(0, PLACES)
        place = tl.load(places + at, mask=at < stop, other=0)  # int64
        inside = (at < stop)[:, None] & (column < width)[None, :]
        grad = tl.load(grads + place[:, None] * width + column[None, :], mask=inside, other=0.0)
        total += tl.sum(grad.to(tl.float32), 0)
    mine = out + row.to(tl.int64) * width + column
    tl.store(mine, total.to(out.dtype.element_ty), mask=column < width)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gather):
        ctx.gather = gather
        return F.embedding(gather.index, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        places, first = ctx.gather.places
        grad, n, width = grad.contiguous(), ctx.gather.n, grad.size(-1)
        out = torch.empty(n, width, dtype=grad.dtype, device=grad.device)
        at_once, columns, warps = TILE
        columns = min(columns, triton.next_power_of_2(width))
        blocks = triton.cdiv(width, columns)
        with torch.cuda.device_of(grad):
            _add_up_kernel[(n * blocks,)](grad, places, first, out, width, blocks, at_once, columns, num_warps=warps)
        return out, None


class Gather:
    """Takes rows of any x (n, H, d) at index (...), int64 in 0..n - 1: gather(x) is (*index.shape, H, d).

    The gradients of a row's places are added up in a fixed order: on a GPU in fp32 and rounded once, else (and for
    float64) by F.embedding. One object serves every x that is taken from at this index: the sort is done once."""

    def __init__(self, index: Tensor, n: int):
        self.index, self.n = index, n

    @functools.cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row i goes to places[first[i] : first[i + 1]] of the flat index, in ascending order; waits for no GPU."""
        rows, places = self.index.flatten().sort(stable=True)
        return places, torch.searchsorted(rows, torch.arange(self.n + 1, device=rows.device))

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        taken = _Take.apply(flat, self) if takes_kernels(x) else F.embedding(self.index, flat)
        return taken.unflatten(-1, x.shape[1:])
