"""kernels/topk_blocks.py gives the bytes of exact_topk, whatever the blocks."""

import numpy as np
import pytest
import torch

from kernels.similarity_topk import exact_topk, similarity_topk_reference
from kernels.topk_blocks import topk_in_blocks


def galleries():
    draw = torch.Generator().manual_seed(0)
    plain = torch.randn(211, 24, generator=draw)
    ties = torch.randint(-1, 2, (190, 8), generator=draw).float()  # many equal rows, and equal scores of unequal ones
    return {"plain": plain, "ties": ties, "copies": plain[:40].repeat(4, 1), "few": plain[:3], "one": plain[:1]}


@pytest.mark.parametrize("name", galleries())
@pytest.mark.parametrize("rows,columns", [(1000, 1000), (50, 64), (7, 33), (64, 1)])
def test_blocks_give_the_same_bytes(name, rows, columns):
    gallery, k = galleries()[name], 5
    itself = torch.arange(len(gallery))
    scores, indices = exact_topk(gallery, gallery, k, itself)
    for anchors in (range(len(gallery)), range(len(gallery) // 3, 2 * len(gallery) // 3 + 1)):
        lots = list(topk_in_blocks(gallery, anchors, k, rows, columns, torch.device("cpu")))
        assert [i for some, _, _ in lots for i in some] == list(anchors)
        of = slice(anchors.start, anchors.stop)
        assert torch.equal(torch.cat([lot[1] for lot in lots]), scores[of])
        assert torch.equal(torch.cat([lot[2] for lot in lots]), indices[of])


def test_against_float64():
    gallery = galleries()["ties"]
    itself = torch.arange(len(gallery))
    wanted = similarity_topk_reference(gallery, gallery, 9, itself)[1]
    lots = topk_in_blocks(gallery, range(len(gallery)), 9, 31, 29, torch.device("cpu"), tile=8)
    assert torch.equal(torch.cat([indices for _, _, indices in lots]), wanted)


def test_a_mapped_gallery_is_read_where_it_lies(tmp_path):
    gallery = galleries()["plain"]
    np.save(tmp_path / "g.npy", gallery.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "g.npy", mmap_mode="c"))
    lots = topk_in_blocks(mapped, range(100), 5, 30, 40, torch.device("cpu"))
    assert torch.equal(torch.cat([i for _, _, i in lots]), exact_topk(gallery[:100], gallery, 5, torch.arange(100))[1])
