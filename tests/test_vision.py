"""BLIP's encoders with fused and with absorbed attention, against transformers' eager ones and float64."""

import copy

import pytest
import torch
import transformers
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from common.vision import (
    AbsorbedAttention,
    FusedAttention,
    absorb_attention,
    fuse_attention,
    in_compute_dtype,
    in_eights,
)


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


def text_encoders(dropout: float = 0.0) -> list[BlipTextModel]:
    """[transformers' own, the same with absorbed attention]: 2 layers, 4 heads of 16, pictures of width 48."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"encoder_hidden_size": 48, "vocab_size": 50, "max_position_embeddings": 40, "initializer_range": 0.2}
    config = transformers.BlipTextConfig(**sizes, attention_probs_dropout_prob=dropout)
    eager = BlipTextModel(config, add_pooling_layer=False).eval()
    for name, weight in eager.named_parameters():
        if name.endswith("bias"):  # they start at 0, which would hide what is wrong with them
            torch.nn.init.normal_(weight)
    absorbed = copy.deepcopy(eager)
    absorb_attention(absorbed)
    return [eager, absorbed]


@pytest.mark.parametrize("length", [1, 7, 30])
def test_absorbed_attention_has_transformers_values_and_gradients(length):
    ids, pictures = torch.randint(1, 50, (5, length)), 3 * torch.randn(5, 21, 48)
    mask, coming = torch.ones_like(ids), torch.randn(5, length, 64)
    mask[1, length // 2 + 1 :] = 0
    found = {}
    for kind, model in zip(("eager", "absorbed"), text_encoders(), strict=True):
        for dtype in (torch.float32, torch.float64):
            model = model.to(dtype)
            model.zero_grad()
            states = model(ids, mask, encoder_hidden_states=pictures.to(dtype)).last_hidden_state
            (states * coming.to(dtype) * mask[..., None]).sum().backward()
            # the keys' bias changes no share: ours has no gradient, theirs is noise
            biases = [p for name, p in model.named_parameters() if "crossattention.self.key.bias" in name]
            assert len(biases) == 2 and all((p.grad is None) == (kind == "absorbed") for p in biases)
            others = [p for p in model.parameters() if all(p is not bias for bias in biases)]
            found[kind, dtype] = [states.detach(), *(p.grad.clone() for p in others)]
    order = [(kind, dtype) for dtype in (torch.float64, torch.float32) for kind in ("eager", "absorbed")]
    for truth, same, theirs, ours in zip(*(found[key] for key in order), strict=True):
        torch.testing.assert_close(same, truth, rtol=1e-9, atol=1e-9)
        error, reference = ((x - truth).abs().max().item() for x in (ours, theirs))
        assert error <= 4 * reference + 1e-6 * truth.abs().max()


def test_absorbed_attention_in_bf16_is_as_near_as_transformers():
    ids, pictures = torch.randint(1, 50, (8, 12)), 2 * torch.randn(8, 200, 48)
    eager, absorbed = text_encoders()
    truth = eager.double()(ids, encoder_hidden_states=pictures.double()).last_hidden_state
    errors = []
    for model in (absorbed, eager.float()):
        with torch.autocast("cpu", torch.bfloat16):
            states = model(ids, encoder_hidden_states=in_compute_dtype(pictures)).last_hidden_state
        errors.append((states - truth).pow(2).mean().sqrt().item())
    assert errors[0] < 1.25 * errors[1] < 0.1, errors


class Dropped(torch.nn.Dropout):
    """A dropout that keeps the shares it is given."""

    def __init__(self, kept: torch.Tensor):
        super().__init__(0.5)
        self.kept = kept

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        return shares * self.kept / (1 - self.p)


def test_absorbed_attention_loses_what_transformers_loses_with_the_same_shares_dropped():
    """The value's bias too loses what its shares lose."""
    states, pictures = torch.randn(5, 3, 64).double(), torch.randn(5, 9, 48).double()
    kept, found = (torch.rand(5, 4, 3, 9) > 0.5).double(), []  # (B, H, T, P)
    for model, mask in zip(text_encoders(dropout=0.5), (kept, kept.transpose(1, 2).flatten(1, 2)), strict=True):
        layer = model.encoder.layer[0].crossattention.self.double().train()
        layer.dropout = Dropped(mask)
        found.append(layer(states, encoder_hidden_states=pictures)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patches", [1, 8, 9, 21])
def test_patches_in_eights_hide_what_they_add(patches):
    ids, pictures = torch.randint(1, 50, (5, 7)), 3 * torch.randn(5, patches, 48).double()
    eager, absorbed = (model.double() for model in text_encoders())
    padded, mask = in_eights(pictures)
    assert padded.shape == (5, -(-patches // 8) * 8, 48) and (mask is None) == (patches == 8)
    truth = eager(ids, encoder_hidden_states=pictures).last_hidden_state
    states = absorbed(ids, encoder_hidden_states=padded, encoder_attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states, truth, rtol=1e-9, atol=1e-9)


def test_every_cross_attention_is_absorbed_and_nothing_else_changes():
    eager, absorbed = text_encoders()
    kinds = {name: type(m) for name, m in absorbed.named_modules() if isinstance(m, BlipTextSelfAttention)}
    assert {name.rsplit(".", 2)[1]: kind for name, kind in kinds.items()} == {
        "attention": BlipTextSelfAttention,
        "crossattention": AbsorbedAttention,
    }
    assert list(kinds.values()).count(AbsorbedAttention) == 2
    assert list(eager.state_dict()) == list(absorbed.state_dict())
    with pytest.raises(RuntimeError, match="no cross-attention"):
        absorb_attention(torch.nn.Linear(2, 2))


def test_tokens_leave_autocast_in_the_dtype_of_the_products():
    norm, product, x = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4), torch.randn(3, 8)
    assert in_compute_dtype(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        tokens = norm(x)
        cast = in_compute_dtype(tokens)
        assert (tokens.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(product(cast), product(tokens)), "what the product would have read"
