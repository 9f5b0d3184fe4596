"""Attention of BLIP, cheaper than transformers' and equal to it but for rounding; patch tokens in the dtype of the
products. [ours]

In the frozen vision encoder transformers writes the probabilities of all pairs of patches, 256 images x 16 heads x
577 x 577 numbers a layer in a step of the paper's size. In the text encoder each layer makes keys and values of 577
patches for a text of some twenty tokens: two thirds of what that encoder computes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextSelfAttention


class FusedAttention(BlipAttention):
    """BlipAttention without dropout, of the same weights; equal to it but for rounding."""

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        """hidden_states (B, P, D) -> the same shape, and no probabilities."""
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, P, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, P, d) each
        seen = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.projection(seen.transpose(1, 2).flatten(2)), None


def fuse_attention(vision: nn.Module) -> None:
    """Every BlipAttention of a frozen BlipVisionModel becomes a FusedAttention, in place."""
    found = [module for module in vision.modules() if isinstance(module, BlipAttention)]
    if not found:
        raise RuntimeError(f"{type(vision).__name__} has no BlipAttention: another version of transformers?")
    for module in found:
        module.__class__ = FusedAttention


class AbsorbedAttention(BlipTextSelfAttention):
    """Cross-attention of a text to all patches of its picture, of the same weights, without keys and values.

    q (W_k x + b) is (q W_k) x + q b, and q b is alike for all patches: a softmax does not see it. The shares of the
    patches sum to one, so that their mean is taken first and W_v is applied to it. Products of a text of T tokens take
    about T / d of what keys and values take (d: width of a head, 64), in the backward pass too: more where T > d."""

    def forward(self, hidden_states: Tensor, attention_mask=None, encoder_hidden_states=None, **kwargs):
        """hidden_states (B, T, D), encoder_hidden_states (B, P, E) -> (B, T, D), and no probabilities.

        attention_mask: None, or (1 or B, 1, 1, P), which is added to the scores."""
        heads, d, x = self.num_attention_heads, self.attention_head_size, encoder_hidden_states
        key, value = (layer.weight.unflatten(0, (heads, d)) for layer in (self.key, self.value))  # (H, d, E)
        query = self.query(hidden_states).unflatten(-1, (heads, d))  # (B, T, H, d)
        asked = torch.einsum("bthd,hde->bthe", query, key).flatten(1, 2)  # (B, T H, E)
        mask = x.new_zeros(1) if attention_mask is None else attention_mask[:, 0].to(x.dtype)
        scores = torch.baddbmm(mask, asked, x.mT, alpha=1 / math.sqrt(d))  # (B, T H, P)
        # in their own dtype, which autocast respects: it would write them in fp32, and sums are fp32 either way
        shares = self.dropout(scores.softmax(-1, dtype=scores.dtype))
        seen = (shares @ x).unflatten(1, (-1, heads))  # (B, T, H, E)
        found = torch.einsum("bthe,hde->bthd", seen, value)
        bias = self.value.bias.view(heads, d)
        if self.training and self.dropout.p:
            bias = bias * shares.sum(-1).unflatten(1, (-1, heads))[..., None]  # what dropout leaves of one
        return (found + bias.to(found.dtype)).flatten(2), None


def absorb_attention(text: nn.Module) -> None:
    """Every cross-attention of a BlipTextModel becomes an AbsorbedAttention, in place."""
    found = [m for name, m in text.named_modules() if isinstance(m, BlipTextAttention) and "crossattention" in name]
    if not found:
        raise RuntimeError(f"{type(text).__name__} has no cross-attention: another version of transformers?")
    for module in found:
        module.self.__class__ = AbsorbedAttention


def in_eights(patches: Tensor) -> tuple[Tensor, Tensor | None]:
    """patches (B, P, E) -> the same with zeros up to a multiple of 8 patches, and the mask (1, 1, 1, P') that hides
    these: rows of 577 bf16 scores lie at no multiple of 16 bytes, which tensor cores want."""
    more = -patches.shape[1] % 8
    if not more:
        return patches, None
    mask = patches.new_zeros(1, 1, 1, patches.shape[1] + more)
    mask[..., patches.shape[1] :] = -torch.inf
    return F.pad(patches, (0, 0, 0, more)), mask


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes its products in; outside of autocast as it is.

    A layer norm leaves autocast in fp32. What many products read is cast once here, not by each of them: each would
    keep a copy of its own for its backward."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
