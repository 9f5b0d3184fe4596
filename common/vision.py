"""BLIP's frozen vision encoder on a GPU: fused attention, and patch tokens in the dtype of the products.

transformers gives BLIP no SDPA: its attention writes the probabilities of all pairs of patches, 256 images x 16 heads x
577 x 577 numbers a layer in a step of the paper's size. [ours]"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipAttention


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


def in_compute_dtype(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes its products in; outside of autocast as it is.

    A layer norm leaves autocast in fp32. What many products read is cast once here, not by each of them: each would
    keep a copy of its own for its backward."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
