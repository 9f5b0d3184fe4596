"""Where the time of mining goes on a GPU: rounding, proposal (fused, or tiles of several sizes), exact scores, rest.

python bench/phases.py                        # N = 102,436, D = 2,048
python bench/phases.py --n 20000 --d 512
TRITON_INTERPRET=1 python bench/phases.py --n 24 --d 64 --repeats 0      # no GPU: does it run?
"""

import sys

import measure  # first: it puts the repository on the path
import mining
import torch

from kernels import similarity_topk as topk


def main() -> None:
    found = measure.arguments(__doc__, n=102_436, d=2048, repeats=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not topk.INTERPRET:
        sys.exit("no GPU: set TRITON_INTERPRET=1")
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    x = mining.gallery(found.n, found.d).to(device)
    n, itself = len(x), torch.arange(found.n, device=device)
    lengths = [topk._lengths(x)] * 2
    time_of = lambda run: min(measure.clock(run, device) for _ in range(found.repeats + 1)) * 1e3  # noqa: E731
    half = x.half()
    product = time_of(mining.torch_mm(torch.nn.functional.pad(half, (0, 0, 0, -n % 64)), n))
    print(f"N = {n}, D = {found.d} on {measure.device_name(device)}: dense product {product:.1f} ms (fp16)")
    print(
        f"lengths {time_of(lambda: topk._lengths(x)):.1f} ms, rounding {time_of(lambda: topk._rounded(x, 64)):.1f} ms"
    )
    tiles = topk.TILES.get(capability, topk.OTHER_TILES)
    q = torch.nn.functional.pad(topk._rounded(x, tiles[2])[0], (0, 0, 0, -n % 128))
    fused = time_of(lambda: topk._propose_fused(q[:n], q[:n], 32, itself, tiles))
    print(f"proposal, fused: {fused:.1f} ms", flush=True)
    for tile, width in ((4096, 48), (7936, 32), (7936, 48), (16384, 48)):
        took = time_of(lambda tile=tile, width=width: topk._propose(q, q, (n, n), width, itself, True, tile, iter))
        print(f"proposal, tiles of {tile}, lists of {width}: {took:.1f} ms", flush=True)
    proposal, columns, bound = topk._propose_triton(x, x, lengths, 48, itself, True, topk.TILE[device])
    exact = []
    real = topk._exact_triton
    topk._exact_triton = lambda *a: exact.append(len(a[2])) or real(*a)
    took = time_of(lambda: topk._decide(x, x, 20, proposal, columns, bound))
    topk._exact_triton = real
    scores, _ = topk._decide(x, x, 20, proposal, columns, bound)
    doubtful = int((scores[:, -1] <= proposal.amin(1).double() + bound).sum())
    print(f"decision {took:.1f} ms: {exact[-1]:,} exact scores; {doubtful:,} rows without certificate", flush=True)
    rows = torch.arange(exact[-1], device=device) * n // max(1, exact[-1])
    took = time_of(lambda: topk._exact_triton(x, x, rows, rows.flip(0)))
    print(f"of it exact scores {took:.1f} ms")
    whole = time_of(lambda: topk.similarity_topk(x, x, 20, itself))
    print(f"whole {whole:.1f} ms = {whole / product:.2f} of the dense product")


if __name__ == "__main__":
    main()
