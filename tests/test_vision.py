"""BLIP's frozen vision encoder with fused attention, against transformers' eager one and float64."""

import copy

import pytest
import torch
import transformers
from transformers.models.blip.modeling_blip import BlipAttention

from common.vision import FusedAttention, fuse_attention, in_compute_dtype


@pytest.fixture(scope="module")
def towers():
    """(transformers' own, the same with fused attention): 65 patches, 4 heads of 24, scores that are not all alike."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BlipVisionConfig(**sizes, image_size=64, patch_size=8, initializer_range=0.2)
    eager = transformers.BlipVisionModel(config).eval().requires_grad_(False)
    fused = copy.deepcopy(eager)
    fuse_attention(fused)
    return eager, fused


def test_fused_attention_is_as_near_to_float64_as_transformers_is(towers):
    eager, fused = towers
    pixels = torch.randn(5, 3, 64, 64)
    truth = copy.deepcopy(eager).double()(pixel_values=pixels.double()).last_hidden_state
    theirs, ours = (tower(pixel_values=pixels).last_hidden_state for tower in (eager, fused))
    error, reference = ((x - truth).abs().max().item() for x in (ours, theirs))
    assert error < 2 * reference < 2e-4, "rounding alone"
    assert (truth[:, :, None] - truth[:, None]).abs().max() > 0.1, "tokens that differ: attention has something to do"


def test_every_layer_is_fused_and_nothing_else_changes(towers):
    eager, fused = towers
    kinds = [type(module) for module in fused.modules() if isinstance(module, BlipAttention)]
    assert kinds == [FusedAttention] * 3
    assert {type(m) for m in eager.modules()} - {type(m) for m in fused.modules()} == {BlipAttention}
    assert list(eager.state_dict()) == list(fused.state_dict())
    with pytest.raises(RuntimeError, match="no BlipAttention"):
        fuse_attention(torch.nn.Linear(2, 2))


def test_tokens_leave_autocast_in_the_dtype_of_the_products():
    norm, product, x = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4), torch.randn(3, 8)
    assert in_compute_dtype(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        tokens = norm(x)
        cast = in_compute_dtype(tokens)
        assert (tokens.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(product(cast), product(tokens)), "what the product would have read"
