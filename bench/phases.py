"""Where the time of mining goes on a GPU: rounding, proposal (fused, or tiles of several sizes), exact scores, rest.

python bench/phases.py                        # N = 102,436, D = 2,048
python bench/phases.py --n 20000 --d 512
"""

import measure  # first: it puts the repository on the path
import mining
import torch

from kernels import similarity_topk as topk


def main() -> None:
    found = measure.arguments(__doc__, n=102_436, d=2048, repeats=3)
    x = mining.gallery(found.n, found.d).to("cuda")
    n, itself = len(x), torch.arange(found.n, device="cuda")
    lengths = [topk._lengths(x)] * 2
    time_of = lambda run: min(measure.clock(run, "cuda") for _ in range(found.repeats + 1)) * 1e3  # noqa: E731
    half = x.half()
    product = time_of(mining.torch_mm(torch.nn.functional.pad(half, (0, 0, 0, -n % 64)), n))
    print(f"N = {n}, D = {found.d} on {torch.cuda.get_device_name()}: dense product {product:.1f} ms (fp16)")
    print(
        f"lengths {time_of(lambda: topk._lengths(x)):.1f} ms, rounding {time_of(lambda: topk._rounded(x, 64)):.1f} ms"
    )
    tiles = topk.TILES.get(torch.cuda.get_device_capability(), topk.OTHER_TILES)
    q = torch.nn.functional.pad(topk._rounded(x, tiles[2])[0], (0, 0, 0, -n % 128))
    fused = time_of(lambda: topk._propose_fused(q[:n], q[:n], 32, itself, tiles))
    print(f"proposal, fused: {fused:.1f} ms", flush=True)
    for tile in (4096, 7936, 16384):
        took = time_of(lambda tile=tile: topk._propose(q, q, (n, n), 32, itself, True, tile, iter))
        print(f"proposal, tiles of {tile}: {took:.1f} ms", flush=True)
    proposal, columns, bound = topk._propose_triton(x, x, lengths, 48, itself, True, topk.TILE["cuda"])
    exact = []
    real = topk._exact_triton
    topk._exact_triton = lambda *a: exact.append(len(a[2])) or real(*a)
    took = time_of(lambda: topk._decide(x, x, 20, proposal, columns, bound))
    topk._exact_triton = real
    scores, _ = topk._decide(x, x, 20, proposal, columns, bound)
    doubtful = int((scores[:, -1] <= proposal.amin(1).double() + bound).sum())
    print(f"decision {took:.1f} ms: {exact[-1]:,} exact scores; {doubtful:,} rows without certificate", flush=True)
    rows = torch.arange(exact[-1], device="cuda") * n // max(1, exact[-1])
    took = time_of(lambda: topk._exact_triton(x, x, rows, rows.flip(0)))
    print(f"of it exact scores {took:.1f} ms")
    whole = time_of(lambda: topk.similarity_topk(x, x, 20, itself))
    print(f"whole {whole:.1f} ms = {whole / product:.2f} of the dense product")


if __name__ == "__main__":
    main()
