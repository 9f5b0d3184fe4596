"""BLIP-2's Q-Former as a CIR model, in the form of SPRC (Xu et al., ICLR 2024): reference and text through it together.

A picture in a gallery is the 32 outputs of the query tokens, each projected and normalised; a query's score is the
largest of its 32 cosines, as BLIP-2 was trained for retrieval."""

import copy

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from common.cir_model import CirModel
from common.console import UserError
from common.pretrained import model_kind, read_config
from common.vision import in_compute_dtype


def through_qformer(qformer: nn.Module, x: Tensor, queries: int, mask: Tensor, image: Tensor | None = None) -> Tensor:
    """Blip2QFormerModel: x (B, T, D), the first `queries` of them query tokens, the others words; mask (B, T);
    image (B, P, E) for the cross-attention, which without one is left out, as in SPRC -> (B, T, D)."""
    x = qformer.dropout(qformer.layernorm(x))
    seen = create_bidirectional_mask(config=qformer.config, inputs_embeds=x, attention_mask=mask)
    for layer in qformer.encoder.layer:
        x = layer.attention(hidden_states=x, attention_mask=seen)
        own, words = x[:, :queries], x[:, queries:]
        if image is not None and layer.has_cross_attention:
            own = layer.crossattention(hidden_states=own, encoder_hidden_states=image)
        x = layer.feed_forward_chunk_query(own)
        if words.shape[1]:
            x = torch.cat([x, layer.feed_forward_chunk(words)], dim=1)
    return x


class QformerCir(CirModel):
    """A BLIP-2 of image-text retrieval. Trained: the Q-Former as queries go through it, and text_projection.

    The gallery's Q-Former is a frozen copy of where it started [ours: SPRC trains one for both sides; a gallery of a
    frozen encoder outlives the training, as of every model here], and the query tokens are frozen with it."""

    def __init__(self, backbone: str, text_length: int, train_text: bool, directions: bool):
        super().__init__()
        if directions:
            raise UserError("--bidirectional: --model qformer has no direction token; take combiner, sum or blip_tdm")
        if model_kind(backbone, "--backbone") == "blip-2":
            part = read_config(backbone, ("blip-2",), "--backbone").qformer_config
            if not part.use_qformer_text_input:
                wanted = "wanted one of image-text retrieval, such as Salesforce/blip2-itm-vit-g"
                raise UserError(f"--backbone {backbone}: the Q-Former of this BLIP-2 reads no text; {wanted}")
        self.load(transformers.Blip2ForImageTextRetrieval, backbone, text_length, attn_implementation="sdpa")
        self.backbone.gallery = copy.deepcopy(self.backbone.qformer)  # frozen, in no checkpoint
        self.vectors = self.backbone.query_tokens.shape[1]
        for part in (self.backbone.qformer, self.backbone.embeddings):
            part.requires_grad_(train_text)
        self.backbone.text_projection.requires_grad_(True)

    def train(self, mode: bool = True) -> "QformerCir":
        super().train(mode)
        self.backbone.gallery.eval()  # frozen: its dropout stays off
        return self

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> cls and patch tokens (B, P, E)."""
        return in_compute_dtype(self.backbone.vision_model(pixel_values=pixels).last_hidden_state)

    @torch.no_grad()
    def target(self, tokens: Tensor) -> Tensor:
        """tokens (B, P, E) -> (B, Q, d), each vector normalised."""
        start = self.backbone.query_tokens.expand(len(tokens), -1, -1)
        mask = torch.ones(start.shape[:2], dtype=torch.long, device=tokens.device)
        states = through_qformer(self.backbone.gallery, start, start.shape[1], mask, tokens)
        return F.normalize(self.backbone.vision_projection(states).float(), dim=-1)

    def compose(self, tokens: Tensor, texts: list[str], backward: bool = False) -> Tensor:
        """tokens (B, P, E) of the references, B deltas -> c (B, d), normalised.

        SPRC: query tokens and words see the reference; then what became of the query tokens and the words again,
        without it; [CLS] of the words, projected, is the query."""
        if backward:
            raise UserError("--reversed: --model qformer has no direction token; take combiner, sum or blip_tdm")
        ids, mask = self.tokenize(texts, tokens.device)
        words = self.backbone.embeddings(input_ids=ids)
        start = self.backbone.query_tokens.expand(len(ids), -1, -1)
        q = start.shape[1]
        mask = torch.cat([mask.new_ones(len(ids), q), mask], dim=1)
        fused = through_qformer(self.backbone.qformer, torch.cat([start, words], dim=1), q, mask, tokens)
        again = torch.cat([fused[:, :q].to(words), words], dim=1)
        states = through_qformer(self.backbone.qformer, again, q, mask)
        return F.normalize(self.backbone.text_projection(states[:, q]).float(), dim=1)
