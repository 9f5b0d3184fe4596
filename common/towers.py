"""CIR models of two encoders that never see each other's input (CLIP, BLIP, SigLIP), and how features are combined."""

import functools
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
from kernels.reversed import reversed_combiner, reversed_sum


class Sum(nn.Module):
    """Element-wise sum: image, text (B, d), raw -> (B, d), normalised."""

    reversed_loss = staticmethod(reversed_sum)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return F.normalize(image.float() + text.float(), dim=1)


class Combiner(nn.Module):
    """Combining function of Baldrati et al. 2022: image, text (B, d), raw -> (B, d), normalised."""

    def __init__(self, d: int, p: int, h: int, dropout: float):
        super().__init__()
        self.text, self.image = nn.Linear(d, p), nn.Linear(d, p)  # W_t, W_v
        self.hidden, self.out = nn.Linear(2 * p, h), nn.Linear(h, d)  # W_u, W_o
        self.gate_hidden, self.gate = nn.Linear(2 * p, h), nn.Linear(h, 1)  # W_l, w
        self.dropout = dropout

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        drop = functools.partial(F.dropout, p=self.dropout, training=self.training)
        r = torch.cat([drop(F.relu(self.text(text))), drop(F.relu(self.image(image)))], dim=1)  # (B, 2p)
        lam = torch.sigmoid(self.gate(drop(F.relu(self.gate_hidden(r))))).float()  # (B, 1)
        u = self.out(drop(F.relu(self.hidden(r))))  # (B, d)
        return F.normalize(u.float() + lam * text.float() + (1 - lam) * image.float(), dim=1)

    def reversed_loss(self, reference, text, target, positive, tau) -> Tensor:
        """Stage II of [Bi], sum over rows: reference (N, d) normalised, text (N, d), target (M, d), positive (N,).

        Dropout: one mask a text or a target, not one a pair [ours], so that the targets of a row are compared alike."""
        drop = functools.partial(F.dropout, p=self.dropout, training=self.training)
        t, v = drop(F.relu(self.text(text))), drop(F.relu(self.image(target)))
        rate, halves = self.dropout if self.training else 0.0, []
        for layer in (self.hidden, self.gate_hidden):
            of_text, of_image = layer.weight.chunk(2, dim=1)
            half = F.linear(t, of_text, layer.bias)
            if rate:
                half = half.masked_fill(torch.rand_like(half, dtype=torch.float32) < rate, -torch.inf)
            halves.append((half, F.linear(v, of_image)))
        out = (self.out.weight / (1 - rate)).to(half.dtype), self.out.bias
        gate_out = (self.gate.weight[0] / (1 - rate)).to(half.dtype), self.gate.bias[0]
        return reversed_combiner(reference, text, target, *halves, out, gate_out, positive, tau)


class TwoTowers(CirModel):
    """An image encoder, frozen, and a text encoder, trained, that meet in a Sum or a Combiner of their raw features.

    Who inherits gives tokens(): pixels (B, 3, S, S) -> the raw feature of an image (B, d); and text()."""

    width = 0  # d

    def add_combiner(self, p: int, h: int, dropout: float) -> None:
        """A new Combiner in place of the sum; 0: the release's widths."""
        d = self.width
        self.combiner = Combiner(d, p or d, h or 2 * d, dropout)

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
        self.combiner = Sum()

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
        self.combiner = Sum()

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
        self.combiner = Sum()

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
    """The towers of a folder or hub id, meeting in a Sum; UserError for a model of another kind."""
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
