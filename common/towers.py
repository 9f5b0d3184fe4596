"""CIR models of two encoders that never see each other's input: CLIP, BLIP, SigLIP."""

import string

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.cir_model import CirModel
from common.console import UserError
from common.files import read_json
from common.hub import checkpoint_file
from common.pretrained import model_kind
from common.vision import fuse_attention


class TwoTowers(CirModel):
    """An image encoder, frozen, and a text encoder, trained, whose raw features meet in `combiner`, which train_cir.py
    sets: its Sum or its Combiner.

    Who inherits gives tokens(): pixels (B, 3, S, S) -> the raw feature of an image (B, d); and text()."""

    width, factorises = 0, True  # d
    combiner: nn.Module

    @torch.no_grad()
    def target(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens.float(), dim=1)  # (B, d)

    def text(self, texts: list[str], device, backward: bool = False) -> Tensor:
        """B texts -> their raw features (B, d)."""
        raise NotImplementedError

    def compose(self, tokens: Tensor, texts: list[str], backward: bool = False) -> Tensor:
        """tokens (B, d) of the references, B deltas -> c (B, d), normalised."""
        return self.combiner(tokens, self.text(texts, tokens.device, backward))

    def reversed_loss(self, reference: Tensor, texts: list[str], target: Tensor, positive: Tensor) -> Tensor:
        """Sum over rows: tokens (N, d) of references, N reversed texts, tokens (M, d) of targets, positive (N,)."""
        text = self.text(texts, target.device, backward=True).float()
        return self.combiner.reversed_loss(self.target(reference), text, target.float(), positive, self.tau)


class ClipTowers(TwoTowers):
    """CLIP: image_embeds and text_embeds."""

    def __init__(self, backbone: str, text_length: int, train_text: bool, directions: bool):
        super().__init__()
        self.load(transformers.CLIPModel, backbone, text_length, attn_implementation="sdpa")
        self.width = self.backbone.config.projection_dim
        self.backbone.text_model.requires_grad_(train_text)
        self.backbone.text_projection.requires_grad_(train_text)
        if directions:
            self.direct(self.backbone.text_model.embeddings, "token_embedding")

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> CLIP's image_embeds, raw (B, d)."""
        return self.backbone.visual_projection(self.backbone.vision_model(pixel_values=pixels).pooler_output)

    def text(self, texts: list[str], device, backward: bool = False) -> Tensor:
        """-> CLIP's text_embeds, raw (B, d)."""
        ids, mask = self.tokenize(texts, device, backward)
        return self.backbone.text_projection(self.backbone.text_model(input_ids=ids, attention_mask=mask).pooler_output)


class BlipTowers(TwoTowers):
    """BLIP's contrastive half, as in the published model of [Bi]: vision_proj and text_proj of [CLS].

    The text encoder's cross-attention lies idle, so it stays frozen and in no checkpoint."""

    def __init__(self, backbone: str, text_length: int, train_text: bool, directions: bool):
        super().__init__()
        self.load(transformers.BlipForImageTextRetrieval, backbone, text_length)
        self.width = self.backbone.config.image_text_hidden_size
        fuse_attention(self.backbone.vision_model)
        self.backbone.text_proj.requires_grad_(train_text)
        for name, p in self.backbone.text_encoder.named_parameters():
            p.requires_grad_(train_text and ".crossattention." not in name)
        if directions:
            self.direct(self.backbone.text_encoder.embeddings, "word_embeddings")

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> vision_proj of [CLS], raw (B, d)."""
        return self.backbone.vision_proj(self.backbone.vision_model(pixel_values=pixels).last_hidden_state[:, 0])

    def text(self, texts: list[str], device, backward: bool = False) -> Tensor:
        """-> text_proj of [CLS], raw (B, d)."""
        ids, mask = self.tokenize(texts, device, backward)
        return self.backbone.text_proj(self.backbone.text_encoder(ids, mask).last_hidden_state[:, 0])


class SiglipTowers(TwoTowers):
    """SigLIP, and SigLIP 2 of fixed resolution: the pooled features of both encoders.

    A text always has all the tokens that the model has positions for, padding is attended to, and the last one is its
    feature: so it was trained. A direction stands in front of the text, which has no first token of its own."""

    def __init__(self, backbone: str, text_length: int, train_text: bool, directions: bool):
        super().__init__()
        self.load(transformers.SiglipModel, backbone, text_length, attn_implementation="sdpa")
        positions = self.backbone.config.text_config.max_position_embeddings
        if text_length not in (0, positions):
            raise UserError(
                f"--text_length {text_length}: a SigLIP reads texts of {positions} tokens only; leave it out"
            )
        self.width = self.backbone.config.vision_config.hidden_size
        self.backbone.text_model.requires_grad_(train_text)
        if directions:
            self.direct(self.backbone.text_model.embeddings, "token_embedding")
        said = checkpoint_file(backbone, "tokenizer_config.json", "--backbone")
        kind = str(read_json(said).get("tokenizer_class", "")) if said else ""
        self.punctuation = not kind.startswith("SiglipTokenizer")  # SigLIP's own drops it, Gemma's of SigLIP 2 does not

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> the pooled feature, raw (B, d)."""
        return self.backbone.vision_model(pixel_values=pixels).pooler_output

    def tokenize(self, texts: list[str], device, backward: bool = False) -> tuple[Tensor, Tensor]:
        """-> ids (B, T) of the model's full length, and a mask of ones."""
        how = {"padding": "max_length", "truncation": True, "max_length": self.length, "split_special_tokens": True}
        ids = self.tokenizer(siglip_spelling(texts, self.punctuation), return_tensors="pt", **how).input_ids.to(device)
        if self.directed:
            ids = torch.cat([torch.full_like(ids[:, :1], -2 if backward else -1), ids], dim=1)
        return ids, torch.ones_like(ids)

    def too_long(self, texts: list[str]) -> list[str]:
        return super().too_long(siglip_spelling(texts, self.punctuation))

    def unknown(self, texts: list[str]) -> list[str]:
        return super().unknown(siglip_spelling(texts, self.punctuation))

    def text(self, texts: list[str], device, backward: bool = False) -> Tensor:
        """-> the pooled feature, raw (B, d)."""
        ids, _ = self.tokenize(texts, device, backward)
        return self.backbone.text_model(input_ids=ids).pooler_output


def siglip_spelling(texts: list[str], punctuation: bool = False) -> list[str]:
    """Small letters and single spaces; without punctuation: what the tokenizers of transformers read in a text."""
    without = str.maketrans("", "", "" if punctuation else string.punctuation)
    return [" ".join(text.lower().translate(without).split()) for text in texts]


_KINDS = {"clip": ClipTowers, "blip": BlipTowers, "siglip": SiglipTowers}


def build_towers(backbone: str, text_length: int, train_text: bool, directions: bool) -> TwoTowers:
    """The towers of a folder or hub id, without a combiner yet; UserError for a model of another kind."""
    kind = model_kind(backbone, "--backbone")
    if kind not in _KINDS:
        raise UserError(f"--backbone {backbone} is a {kind} model, wanted {', '.join(_KINDS)}: fix it or --model")
    return _KINDS[kind](backbone, text_length, train_text, directions)


def text_proj_apart(trained: dict[str, nn.Parameter], times: float) -> list[dict]:
    """Groups for the optimiser: BLIP's text_proj learns `times` as fast as the other weights; tau is left out."""
    apart = {name: p for name, p in trained.items() if name.startswith("backbone.text_proj.")}
    if not apart:
        raise UserError("--text_proj_lr: the model trains no text_proj; take a BLIP --backbone and --train_text true")
    others = [p for name, p in trained.items() if name not in apart and name != "tau"]
    return [{"params": others}, {"params": list(apart.values()), "times": times}]
