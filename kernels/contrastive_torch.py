"""HN-NCE in PyTorch, a block of rows at a time: what the CPU and float64 take. contrastive.py has the formulas.

Rows are [bank | x], columns are c. label (R,) is the column of each row's positive, -1 for the bank's rows. Rows
below first_row and columns below first_column are the first group, whose sub-block is a loss of its own."""

import torch
from torch import Tensor

BLOCK = 1 << 21  # logits held at a time on CPU (8 MiB of fp32, five such arrays)


def row_blocks(edges: list[int], columns: int, held: int) -> list[slice]:
    """Blocks of rows with at most `held` logits, none of which crosses an edge."""
    block = max(1, held // columns)
    spans = zip(edges, edges[1:], strict=False)
    return [slice(at, min(at + block, end)) for start, end in spans for at in range(start, end, block)]


def _scratch(like: Tensor, blocks: list[slice], columns: int, count: int) -> list[Tensor]:
    """Flat arrays that hold a block each, allocated once: fresh ones a block cost more in page faults than the sums."""
    rows = max((part.stop - part.start for part in blocks), default=0)
    return [like.new_empty(rows * columns) for _ in range(count)]


def _shaped(flat: Tensor, s: Tensor) -> Tensor:
    return flat[: s.numel()].view(s.shape)


def powers_of(u: Tensor, beta: float, spare: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e^{(1 + beta) u} and e^{beta u}; u is overwritten. At beta = 0 nobody asks for the second (N = log n)."""
    if beta == 0:
        return u.exp_(), u
    if beta == 0.5:
        small = u.mul_(0.5).exp_()
        return torch.mul(small, small, out=spare).mul_(small), small
    big = torch.mul(u, 1 + beta, out=spare).exp_()
    return big, u.mul_(beta).exp_()


def _sums(s: Tensor, dim: int, beta: float, spare: list[Tensor]) -> Tensor:
    """o, S and T over dim, (3, the other dimension); where all of s is -inf: the smallest number, 0, 0."""
    top = s.amax(dim, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
    u, other = (_shaped(flat, s) for flat in spare)
    big, small = powers_of(torch.sub(s, top, out=u), beta, other)
    return torch.stack([top.squeeze(dim), big.sum(dim), small.sum(dim)])


def merge(parts: Tensor, beta: float) -> Tensor:
    """(P, 3, n): o, S and T of P parts -> those of the whole (3, n)."""
    top = parts[:, 0].amax(0)
    big, small = powers_of(parts[:, 0] - top, beta)
    return torch.stack([top, (parts[:, 1] * big).sum(0), (parts[:, 2] * small).sum(0)])


def statistics(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float):
    """o, S and T of the module's head over the negatives, of each row within either group of columns (2 groups, 3, R),
    and of each column within either group of rows (2 groups, 3, M)."""
    nothing = x.new_tensor([torch.finfo(x.dtype).min, 0, 0])[:, None]
    rows, columns = (nothing.expand(2, 3, n).clone() for n in (len(x), len(c)))
    blocks = row_blocks([0, bank, first_row, len(x)], len(c), BLOCK)
    held, *spare = _scratch(x, blocks, len(c), 3)
    for part in blocks:
        s = held[: (part.stop - part.start) * len(c)].view(-1, len(c))
        torch.mm(x[part], c.T, out=s).mul_(scale)
        if part.start >= bank:
            s[torch.arange(len(s), device=s.device), label[part]] = -torch.inf
        row_group = int(part.start >= first_row)
        for group, cut in enumerate((slice(0, first_column), slice(first_column, len(c)))):
            if cut.start == cut.stop:
                continue
            if part.start >= bank:  # the bank's rows have no loss
                rows[group, :, part] = _sums(s[:, cut], 1, beta, spare)
            before = columns[row_group, :, cut]
            columns[row_group, :, cut] = merge(torch.stack([before, _sums(s[:, cut], 0, beta, spare)]), beta)
    return rows, columns


def _bracket(s: Tensor, offset: Tensor, big: Tensor, small: Tensor, beta: float, spare: list[Tensor]) -> Tensor:
    """big e^{(1 + beta) u} - small e^{beta u} with u = s - offset; it lies in one of the two spare arrays."""
    u, other = (_shaped(flat, s) for flat in spare)
    if beta == 0:
        return torch.sub(s, offset, out=u).exp_().mul_(big)
    if beta == 0.5:
        t = torch.add(offset * -0.5, s, alpha=0.5, out=u).exp_()
        return torch.addcmul(-small, torch.mul(t, t, out=other), big, out=other).mul_(t)
    powers = powers_of(torch.sub(s, offset, out=u), beta, other)
    return powers[0].mul_(big).sub_(powers[1].mul_(small))


def gradient(x, c, label, bank: int, first_row: int, first_column: int, scale: Tensor, beta: float, vectors, own):
    """dL/dx (R - bank, D) of the rows after the bank's, and dL/dc (M, D).

    vectors: of rows (2, 3, R) and of columns (2, 3, M): offset, big and small of _bracket, outside and inside the
    sub-block. own (R - bank,): dL/ds at the positives."""
    of_rows, of_columns = vectors
    dx, dc = x.new_empty(len(x) - bank, x.size(1)), torch.zeros_like(c)
    blocks = row_blocks([0, bank, first_row, len(x)], len(c), BLOCK)
    held, *spare = _scratch(x, blocks, len(c), 5)
    for part in blocks:
        g = held[: (part.stop - part.start) * len(c)].view(-1, len(c))
        torch.mm(x[part], c.T, out=g).mul_(scale)
        for group, cut in enumerate((slice(0, first_column), slice(first_column, len(c)))):
            inside = int(part.start < first_row and group == 0)
            s = g[:, cut]
            from_columns = _bracket(s, *of_columns[inside, :, None, cut], beta, spare[:2])
            if part.start >= bank:
                torch.add(_bracket(s, *of_rows[inside, :, part, None], beta, spare[2:]), from_columns, out=s)
            else:
                s.copy_(from_columns)
        if part.start >= bank:
            rows = slice(part.start - bank, part.stop - bank)
            g[torch.arange(len(g), device=g.device), label[part]] = own[rows]
            torch.mm(g, c, out=dx[rows])
        dc.addmm_(g.T, x[part])
    return dx.mul_(scale), dc.mul_(scale)
