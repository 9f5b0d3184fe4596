"""Stage 5, composed image retrieval [S3.3], Algorithm 3: trains a CIR model on human and pseudo triplets together.

    python train_cir.py --root data/cirr --pseudo out/deltas/pseudo.jsonl --pseudo_images data/nlvr2 --out out/cir
    torchrun --nproc_per_node 8 train_cir.py --model combiner --root data/cirr --images data/img_raw --out out/clip

Reads triplets (CIRR, FashionIQ, jsonl), pseudo.jsonl of gen_deltas.py and a CLIP or BLIP ITM model.
Writes OUT/model.safetensors (trained weights only), OUT/config.json, OUT/log.jsonl, OUT/last/ (to resume).
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import functools
import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from common.annotations import all_without_missing, read_benchmarks
from common.batches import Draw, check_items, draw, drop_missing, training_items
from common.console import UserError, progress, run, say
from common.files import load_state, load_tensors, lock_folder, read_json, save_folder, save_state, tensors_sha256
from common.flags import at_least, constants_of, override
from common.images import Preprocess, augment, load_pixels
from common.ranks import (
    Log,
    all_reduce_gradients,
    all_sum,
    any_rank,
    barrier,
    gather_objects,
    gather_with_grad,
    init_world,
    pick_dtype,
    seed_step,
    seeded_generator,
    seeded_rng,
    stop_requested,
)
from common.retrieval import evaluate, protocol_of
from kernels.contrastive import l_tcc_ranks
from kernels.negatives import draw_candidates, draw_negatives
from kernels.reversed import reversed_combiner, reversed_sum

# ---- model ----
MODEL = "blip_tdm"  # "combiner" (CLIP + Combiner), "blip_tdm" [S3.3], or "sum" (CLIP, image + text: stage I of [Bi])
BACKBONE = ""  # folder or hub id; empty: openai/clip-vit-large-patch14 or Salesforce/blip-itm-large-coco [S6.1]
START = ""  # checkpoint of train_cir.py to start from: stage II (combiner) from stage I (sum) [Bi]
TEXT_LENGTH = 0  # tokens of a delta, special ones included; 0 = as many as the backbone has positions (release: 32)
FIRST_TOKEN = "enc"  # blip_tdm: "enc" as BLIP was trained, "cls" as Hugging Face feeds and the release does
TRAIN_TEXT = True  # the text encoder [S3.3]; false: only what is behind it (CLIP4Cir's stage II)
TRAIN_TDM_HEAD = True  # blip_tdm: p_theta of Eq. 3 starts as itm_head and trains; the release freezes it
COMBINER_P = 0  # combiner: projection width, 0 = CLIP's d (768, as the release); CLIP4Cir: 4 d
COMBINER_H = 0  # combiner: hidden width, 0 = 2 d (1536, as the release); CLIP4Cir: 8 d
COMBINER_DROPOUT = 0.0  # combiner: probability; CLIP4Cir: 0.5

# ---- data ----
DATASET = "cirr"  # "cirr", "fashioniq" or "jsonl" (ROOT is then a file of triplets)
ROOT = ""  # folder with captions/ and image_splits/, or the file of triplets
SPLIT = "train"  # split of the human triplets
IMAGES = ""  # folder of the images of ROOT; empty: the usual places in and beside ROOT
TRIPLETS = True  # train on the human triplets; false: on PSEUDO alone
KEYS = ""  # jsonl: names of a record's parts elsewhere, reference=q_img,target=t_img,delta=q_text (see read_triplets)
POOL = ""  # jsonl files of {"did", "img_path"} in which the targets of KEYS and PSEUDO_KEYS are ids (M-BEIR)
HOLD_OUT = 0.0  # jsonl: so many triplets, or below 1 a share of them, are kept for evaluation
SAME_PAIRS = ""  # pseudo.jsonl of the same human pairs: human or generated delta, one drawn per step [Table 2, dagger]
SAME_DELTAS = True  # false: take only the reverse_delta of SAME_PAIRS, for REVERSED_TEXT "delta" [ours]
PSEUDO = ""  # auxiliary pseudo triplets B': pseudo.jsonl of gen_deltas.py, as large a part of each step as B
PSEUDO_IMAGES = ""  # folder of the images of PSEUDO
PSEUDO_KEYS = ""  # as KEYS, for PSEUDO
WORKERS = 4  # threads that decode and augment images

# ---- optimisation ----
EPOCHS = 0  # passes over the human triplets (PSEUDO without them); 0 = 6 for blip_tdm, 10 for CLIP [S6.1]
STEPS = 0  # optimiser steps instead of EPOCHS; 0 = by EPOCHS
BATCH = 64  # triplets per GPU, of B and of B' each [S6.1]
LR = 1e-4  # learning rate, cosine to zero [S6.1]
BETAS = (0.9, 0.99)  # AdamW [S6.1]
WEIGHT_DECAY = 0.05  # AdamW [S6.1]
TAU = 0.01  # temperature of Eq. 2 [S6.1]; with LEARN_TAU where it starts (release: 0.07)
LEARN_TAU = False  # learn the temperature, clamped to [0.001, 0.5], as the release
ALPHA = 1.0  # weight of the positive in the denominator of Eq. 2 [S6.1]
BETA = "auto"  # hardness of negatives in Eq. 2; auto = 0 for CLIP, 0.5 for blip_tdm [S6.1]

# ---- ablations and options of the loss ----
CONCAT = True  # second term of L_tcc over B + B' [Eq. 2]; false: over B' alone
TDM = True  # blip_tdm: L_tdm [Eq. 3]; false: L_tcc alone
BANK = False  # every training image, encoded once without augmentation, is a further negative target of L_tcc [ours]
BIDIRECTIONAL = 0.0  # alpha of [Bi]: weight of the reversed loss; 0 = off; CIRR 0.1; FashionIQ 0.4 (sum), 0.5
# L_tcc sums two directions where [Bi]'s forward loss has one, so the same alpha weighs half as much here [ours].
REVERSED_TEXT = "token"  # "token": the delta behind a learned [BACKWARD] [Bi]; "delta": reverse_delta of VDG [ours]
REVERSED_NEGATIVES = 8  # blip_tdm: targets composed with each reversed text, drawn as in L_tdm [ours]; 0 = all [Bi]

# ---- augmentation [S6.1]: kinds from the paper, strengths but the crop [ours], as it gives none ----
AUGMENT = True  # false: plain preprocessing
CROP_SCALE = (0.5, 1.0)  # random resized crop, share of the area [S6.1]
CROP_RATIO = (0.75, 1.3333)  # random resized crop, width / height [ours]: the usual default
FLIP = 0.5  # probability of a horizontal flip [ours]: a delta that says "left" suffers, yet the paper flips
JITTER = 0.2  # contrast, brightness, sharpness: each factor in 1 +- this [ours]
TRANSLATE = 0.05  # shift, share of the side, each way [ours]
ROTATE = 10.0  # degrees, each way [ours]
VIEWS = 0  # 0 = fresh augmentation each time [S6.1]; K = K views per image, encoded once, kept in memory [ours]: speed

# ---- validation ----
VAL_SPLIT = ""  # split of DATASET under ROOT whose recall is measured while training; empty: none
MISSING = 0.0  # largest share of its pictures that may be missing; counted, in OUT/missing.txt, the protocol marked
JOIN = "forward"  # FashionIQ's captions there: "forward" c1 and c2, as CLIP4Cir at test; "reverse" c2 and c1
VAL_EVERY = 500  # steps between two measurements; the last step is always measured
KEEP_BEST = True  # save the best measured step, not the last: by mean R@1, 5, 10 (CIRR), R@10, 50 (FashionIQ) [ours]

# ---- run ----
OUT = "out/cir"  # folder written
LOG_EVERY = 10  # steps between two lines of log.jsonl
SAVE_EVERY = 500  # steps between two training states in OUT/last
SEED = 0  # order, augmentation, dropout, Combiner's start
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # compute: auto = bf16 on cuda, fp32 on CPU; weights, similarities and losses stay fp32
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # count triplets and images, name what is missing, stop

HUB = {"combiner": "openai/clip-vit-large-patch14", "blip_tdm": "Salesforce/blip-itm-large-coco"}
HUB["sum"] = HUB["combiner"]


# ---- models ----


class Directed(nn.Embedding):
    """A word embedding (V, D) with two more learned rows: id -1 is [FORWARD], id -2 is [BACKWARD] [Bi].

    Not ids V and V + 1: CLIP finds the end of a text by its largest id."""

    def __init__(self, words: nn.Embedding):
        super().__init__(*words.weight.shape, words.padding_idx, _weight=words.weight)
        self.weight = words.weight
        self.directions = nn.Parameter(torch.randn(2, self.embedding_dim) * words.weight.std().item())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        turned = self.directions[(-1 - ids).clamp(min=0)]
        return torch.where(ids[..., None] < 0, turned, super().forward(ids.clamp(min=0)))


class CirModel(nn.Module):
    """What all models share; weights are fp32, the caller chooses autocast.

    tokens(pixels): what compose needs of an image; target(tokens): its frozen gallery feature; compose: the query;
    reversed_loss: which target, changed by the reversed text, gives the reference? (kernels/reversed.py)"""

    directed = False

    def load(self, kind: type, backbone: str, text_length: int, **how: str) -> None:
        """The frozen Hugging Face model, its tokenizer and picture transform, from a folder or hub id."""
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        here = {"local_files_only": os.path.isdir(backbone)}
        if (found := model_type(backbone)) != (wanted := kind.config_class.model_type):
            raise UserError(f"--backbone {backbone} is a {found} model, wanted {wanted}: fix it or --model")
        how |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True} | here
        self.backbone, info = kind.from_pretrained(backbone, **how)
        if missing := sorted(info["missing_keys"]):  # they would be random, with a warning
            raise UserError(f"{backbone}: {len(missing)} weights of {kind.__name__} missing, first {missing[0]}")
        self.backbone.requires_grad_(False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(backbone, **here)
        self.preprocess = Preprocess.from_folder(backbone, kind.__name__)
        positions = self.backbone.config.text_config.max_position_embeddings
        if text_length > positions:
            raise UserError(f"--text_length {text_length}: the text encoder has {positions} positions")
        self.length = text_length or positions

    def direct(self, embeddings: nn.Module, name: str) -> None:
        """Gives the text encoder's embedding its two directions: one leads every text from now on."""
        setattr(embeddings, name, Directed(getattr(embeddings, name)))
        self.directed, self.length = True, self.length - 1

    def tokenize(self, texts: list[str], device, backward: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """-> ids (B, T), mask (B, T), right-padded to the longest; with directions, one behind the first token."""
        # split_special_tokens: a caption that spells "[SEP]" or "<|endoftext|>" must not end the text
        how = {"padding": True, "truncation": True, "max_length": self.length, "split_special_tokens": True}
        rows = self.tokenizer(texts, return_tensors="pt", **how).to(device)
        ids, mask = rows.input_ids, rows.attention_mask
        if self.directed:
            way = torch.full_like(ids[:, :1], -2 if backward else -1)
            ids, mask = torch.cat([ids[:, :1], way, ids[:, 1:]], dim=1), torch.cat([mask[:, :1], mask], dim=1)
        return ids, mask

    def too_long(self, texts: list[str]) -> list[str]:
        """The texts that tokenize() cuts."""
        rows = self.tokenizer(texts, split_special_tokens=True).input_ids
        return [text for text, ids in zip(texts, rows, strict=True) if len(ids) > self.length]

    def train(self, mode: bool = True) -> "CirModel":
        super().train(mode)
        self.backbone.vision_model.eval()  # frozen [S3.3]: its dropout, if any, stays off
        return self

    @torch.no_grad()
    def image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels (B, 3, S, S) -> tokens (B, ...), target (B, d) normalised."""
        tokens = self.tokens(pixels)
        return tokens, self.target(tokens)


class Combiner(nn.Module):
    """Combining function of Baldrati et al. 2022: image, text (B, d), raw -> (B, d), normalised."""

    def __init__(self, d: int, p: int, h: int, dropout: float):
        super().__init__()
        self.text, self.image = nn.Linear(d, p), nn.Linear(d, p)  # W_t, W_v
        self.hidden, self.out = nn.Linear(2 * p, h), nn.Linear(h, d)  # W_u, W_o
        self.gate_hidden, self.gate = nn.Linear(2 * p, h), nn.Linear(h, 1)  # W_l, w
        self.dropout = dropout

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        drop = functools.partial(F.dropout, p=self.dropout, training=self.training)
        r = torch.cat([drop(F.relu(self.text(text))), drop(F.relu(self.image(image)))], dim=1)  # (B, 2p)
        lam = torch.sigmoid(self.gate(drop(F.relu(self.gate_hidden(r))))).float()  # (B, 1)
        u = self.out(drop(F.relu(self.hidden(r))))  # (B, d)
        return F.normalize(u.float() + lam * text.float() + (1 - lam) * image.float(), dim=1)

    def reversed_loss(self, reference, text, target, positive, tau) -> torch.Tensor:
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


class SumModel(CirModel):
    """CLIP with a trained text encoder and a frozen vision encoder; the query is the sum of their raw features."""

    def __init__(self, backbone: str, text_length: int, train_text: bool, directions: bool):
        super().__init__()
        self.load(transformers.CLIPModel, backbone, text_length, attn_implementation="sdpa")
        self.backbone.text_model.requires_grad_(train_text)
        self.backbone.text_projection.requires_grad_(train_text)
        if directions:
            self.direct(self.backbone.text_model.embeddings, "token_embedding")

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> CLIP's image_embeds, raw (B, d)."""
        return self.backbone.visual_projection(self.backbone.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(tokens.float(), dim=1)  # (B, d)

    def text(self, texts: list[str], device, backward: bool = False) -> torch.Tensor:
        """-> CLIP's text_embeds, raw (B, d)."""
        ids, mask = self.tokenize(texts, device, backward)
        return self.backbone.text_projection(self.backbone.text_model(input_ids=ids, attention_mask=mask).pooler_output)

    def combine(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return F.normalize(image.float() + text.float(), dim=1)

    def compose(self, tokens: torch.Tensor, texts: list[str], backward: bool = False) -> torch.Tensor:
        """tokens (B, d) of the references, B deltas -> c (B, d), normalised."""
        return self.combine(tokens, self.text(texts, tokens.device, backward))

    def reversed_loss(self, reference, texts: list[str], target, positive, tau) -> torch.Tensor:
        """Sum over rows: tokens (N, d) of references, N reversed texts, tokens (M, d) of targets, positive (N,)."""
        text = self.text(texts, target.device, backward=True).float()
        return self.combine_reversed(self.target(reference), text, target.float(), positive, tau)

    combine_reversed = staticmethod(reversed_sum)


class CombinerModel(SumModel):
    """The same with a Combiner of the raw features in place of their sum."""

    def __init__(self, backbone: str, p: int, h: int, dropout: float, text_length: int, train_text: bool, directions):
        super().__init__(backbone, text_length, train_text, directions)
        d = self.backbone.config.projection_dim
        self.combiner = Combiner(d, p or d, h or 2 * d, dropout)

    def combine(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.combiner(image, text)

    def combine_reversed(self, *given) -> torch.Tensor:
        return self.combiner.reversed_loss(*given)


class BlipTdm(CirModel):
    """BLIP ITM with a trained image-grounded text encoder; vision and vision_proj are frozen."""

    def __init__(
        self, backbone: str, first_token: str, train_head: bool, text_length: int, train_text: bool, directions
    ):
        super().__init__()
        if first_token not in ("enc", "cls"):
            raise UserError(f"--first_token {first_token}: wanted enc or cls")
        self.load(transformers.BlipForImageTextRetrieval, backbone, text_length)  # transformers has no sdpa for it
        self.backbone.text_encoder.requires_grad_(train_text)
        self.backbone.text_proj.requires_grad_(True)
        self.backbone.itm_head.requires_grad_(train_head)  # p_theta of Eq. 3
        last = self.backbone.config.text_config.vocab_size - 1
        self.first_token = last if first_token == "enc" else self.tokenizer.cls_token_id
        if directions:
            self.direct(self.backbone.text_encoder.embeddings, "word_embeddings")

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> cls and patch tokens (B, P, D)."""
        return self.backbone.vision_model(pixel_values=pixels).last_hidden_state

    @torch.no_grad()
    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.backbone.vision_proj(tokens[:, 0]).float(), dim=1)  # (B, d)

    def ground(
        self, tokens: torch.Tensor, texts: list[str], backward: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text attending to image tokens: -> hidden states (B, T, D), mask (B, T)."""
        ids, mask = self.tokenize(texts, tokens.device, backward)
        ids[:, 0] = self.first_token  # the tokenizer writes [CLS]; the cross-attention was trained behind [ENC]
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        states = self.backbone.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens, encoder_attention_mask=seen
        )
        return states.last_hidden_state, mask

    def compose(self, tokens: torch.Tensor, texts: list[str], backward: bool = False) -> torch.Tensor:
        """tokens (B, P, D) of the references, B deltas -> c (B, d), normalised."""
        states, _ = self.ground(tokens, texts, backward)
        return F.normalize(self.backbone.text_proj(states[:, 0]).float(), dim=1)

    def text(self, texts: list[str], device, backward: bool = False) -> torch.Tensor:
        """The text without an image, as BLIP was trained for retrieval: [CLS], no cross-attention -> (B, d), raw."""
        ids, mask = self.tokenize(texts, device, backward)
        return self.backbone.text_proj(self.backbone.text_encoder(ids, mask).last_hidden_state[:, 0])

    def reversed_loss(self, reference, texts: list[str], target, candidates, tau) -> torch.Tensor:
        """Sum over rows: tokens (N, P, D) of references, N reversed texts, tokens (M, P, D) of targets, candidates
        (N, K): the targets each text is composed with, its own first.

        Nothing factorises here, so the N x K compositions run in blocks of N that the backward computes again."""
        r, blocks = self.target(reference), []  # (N, d)

        def block(images: torch.Tensor) -> torch.Tensor:
            return self.compose(target[images], texts, backward=True)

        for images in candidates.T:  # (N,)
            c = torch.utils.checkpoint.checkpoint(block, images, use_reentrant=False)
            blocks.append((c * r).sum(1))
        return -(torch.stack(blocks, dim=1) / tau).log_softmax(1)[:, 0].sum()

    def match(self, tokens: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Eq. 3: tokens (B, P, D) of targets, B deltas -> logits (B, 2), index 1 = matched; mean over text tokens."""
        states, mask = self.ground(tokens, texts)
        logits = self.backbone.itm_head(states).float()  # (B, T, 2)
        return (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def model_type(backbone: str) -> str:
    """ "clip", "blip" or what else a folder or hub id holds."""
    return transformers.AutoConfig.from_pretrained(backbone, local_files_only=os.path.isdir(backbone)).model_type


def build_cir(
    model: str,
    backbone: str = "",
    p: int = 0,
    h: int = 0,
    dropout: float = 0.0,
    first_token: str = "enc",
    train_tdm_head: bool = True,
    text_length: int = 0,
    train_text: bool = True,
    directions: bool = False,
    start: str = "",
) -> CirModel:
    """A model before CIR training, fp32 on the CPU; a new Combiner and directions draw from torch's generator.

    start: a checkpoint whose weights replace those of the same names, frozen or not."""
    if model not in HUB:
        raise UserError(f"--model {model}: one of {', '.join(HUB)}")
    backbone, shared = backbone or HUB[model], (text_length, train_text, directions)
    if model == "sum":
        built = SumModel(backbone, *shared)
    elif model == "combiner":
        built = CombinerModel(backbone, p, h, dropout, *shared)
    else:
        built = BlipTdm(backbone, first_token, train_tdm_head, *shared)
    if start:
        own = dict(built.named_parameters())
        tensors = load_tensors(start, "model.safetensors")
        put_weights({name: own[name] for name in own.keys() & tensors.keys()}, tensors, start)
    return built


def load_cir(folder: str, device: str | torch.device = "cpu") -> CirModel:
    """The model that main() saved in folder, in eval mode; UserError if weights and config do not belong together."""
    settings = read_json(os.path.join(folder, "config.json"))
    if not isinstance(settings, dict) or not isinstance(settings.get("build"), dict):
        raise UserError(f"{folder}/config.json is not one of train_cir.py")
    model = build_cir(**settings["build"])
    put_trained(model, load_tensors(folder, "model.safetensors"), folder)
    trained_on = settings.get("constants", {}).get("FROZEN_SHA256")
    if trained_on and trained_on != frozen_digest(model):
        on = " or ".join(filter(None, (settings["build"]["backbone"], settings["build"].get("start"))))
        raise UserError(f"{folder} was trained on other frozen weights than {on} holds now; train it again")
    return model.eval().to(device)


def frozen_digest(model: CirModel) -> str:
    """sha256 of what a checkpoint stands on but does not hold: frozen weights and the pictures' preprocessing."""
    frozen = sorted((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    return tensors_sha256(frozen, repr(model.preprocess))


def get_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained weights, by name, on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def put_trained(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Overwrites exactly the trained weights; UserError naming the first difference."""
    put_weights({name: p for name, p in model.named_parameters() if p.requires_grad}, tensors, where)


@torch.no_grad()
def put_weights(own: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor], where: str) -> None:
    odd = sorted(own.keys() ^ tensors.keys())
    odd += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if odd:
        why = "are both with --bidirectional, or both without?" if "directions" in odd[0] else "another backbone?"
        raise UserError(f"{where}: weights do not fit the model, first {odd[0]}; {why}")
    for name, p in own.items():
        p.copy_(tensors[name])


# ---- losses ----


def tdm_loss(
    model: BlipTdm, tokens: torch.Tensor, deltas: list[str], own: list[int], negatives: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Eq. 3 for the rows `own` of the global batch: cross entropies of (target, delta), (hard target, delta), (target,
    hard delta); tokens (G, P, D) and deltas of the whole batch, as hard negatives lie anywhere in it."""
    here = set(own)
    mine = [row for row in zip(*(part.tolist() for part in negatives), strict=True) if row[0] in here]
    image = own + [t for _, t, _ in mine] + [r for r, _, _ in mine]
    text = own + [r for r, _, _ in mine] + [d for _, _, d in mine]
    matched = (torch.arange(len(image), device=tokens.device) < len(own)).long()
    return F.cross_entropy(model.match(tokens[image], [deltas[i] for i in text]), matched, reduction="none")


# ---- training ----


def image_jobs(draws: list[Draw]) -> list[tuple]:
    """References, then targets: ((store, name), key of the augmentation)."""
    return [(d.reference, ("reference", *d.key)) for d in draws] + [(d.target, ("target", *d.key)) for d in draws]


def cache_views(model: nn.Module, images: list[tuple], views: int, load, batch: int, device) -> dict[tuple, list]:
    """K augmented views of every image through the frozen vision encoder, once -> {image: K tokens, on the CPU}."""
    cache = {image: [] for image in images}
    jobs = [(image, ("view", *image, k)) for image in images for k in range(views)]
    for i in progress(range(0, len(jobs), batch), "encoding views"):  # fixed blocks: resume sees the same bits
        pixels = torch.stack(load(jobs[i : i + batch])).to(device)
        for (image, _), tokens in zip(jobs[i : i + batch], model.tokens(pixels).cpu(), strict=True):
            cache[image].append(tokens)
    return cache


@torch.no_grad()
def encode_bank(model: nn.Module, images: list[tuple], stores: list, batch: int, autocast, world):
    """Target embeddings (len(images), d) of every training image, not augmented; each rank encodes its share."""
    rows = []
    for i in progress(range(0, len(images), batch)[world.rank :: world.size], "encoding the bank"):
        part = [load_pixels(stores[s], [name], model.preprocess) for s, name in images[i : i + batch]]
        with autocast():
            rows.append((i, model.image(torch.cat(part).to(world.device))[1].cpu()))
    parts = sorted((part for ranks in gather_objects(rows) for part in ranks), key=lambda part: part[0])
    return torch.cat([x for _, x in parts]).to(world.device)


def main() -> None:
    world = init_world(DEVICE)
    device, dtype = world.device, pick_dtype(DTYPE, world.device)
    at_least(globals(), BATCH=1, EPOCHS=0, STEPS=0, VIEWS=0, LOG_EVERY=1, SAVE_EVERY=1, VAL_EVERY=1, LR=0)
    at_least(globals(), TAU=1e-4, ALPHA=0, BIDIRECTIONAL=0, REVERSED_NEGATIVES=0, TEXT_LENGTH=0, COMBINER_P=0)
    at_least(globals(), COMBINER_H=0, COMBINER_DROPOUT=0, WEIGHT_DECAY=0)
    # ---- what there is to train on, checked before a model loads
    given = (SAME_PAIRS, SAME_DELTAS, PSEUDO, PSEUDO_IMAGES, TRIPLETS)
    given += (KEYS, PSEUDO_KEYS, POOL, HOLD_OUT)
    stores, streams = training_items(DATASET, ROOT, SPLIT, IMAGES, *given)
    benchmarks, says = [], ""
    if VAL_SPLIT:
        if DATASET == "jsonl":
            raise UserError(f"--val_split {VAL_SPLIT}: triplets of --dataset jsonl have no gallery to search")
        protocol = "original" if DATASET == "fashioniq" else "split"
        benchmarks = read_benchmarks(DATASET, ROOT, VAL_SPLIT, "all", IMAGES, protocol, JOIN)
        if any(query.target is None for benchmark in benchmarks for query in benchmark.queries):
            raise UserError(f"--val_split {VAL_SPLIT}: its targets are hidden; take a split with labels")
        counts = [f"{len(b.queries):,} queries, {len(b.gallery):,} gallery images" for b in benchmarks]
        says = f"{protocol_of(DATASET, protocol, True, ())}: {'; '.join(counts)}"
    if CHECK:
        return check_items(stores, streams, benchmarks, CHECK_DECODE)
    benchmarks, note = all_without_missing(benchmarks, MISSING, f"{OUT}/missing.txt")
    says = "; ".join(filter(None, (says, note)))
    for benchmark in benchmarks:
        if missing := benchmark.images.missing(benchmark.gallery):
            raise UserError(f"--val_split {VAL_SPLIT}: {len(missing):,} images missing, first {missing[0]!r}")
    lock_folder(OUT)
    if VAL_SPLIT:
        say(f"validation on {VAL_SPLIT}, {says}")
    own = lambda item: (item.reference[1], item.target[1])  # noqa: E731
    streams = [
        drop_missing(items, own, store, f"{what} triplets", f"{OUT}/unreadable-{what}.txt", WORKERS)
        for items, store, what in zip(streams, stores, ("human", "auxiliary"), strict=True)
    ]
    sources = [(s, items) for s, items in enumerate(streams) if items]
    if (fewest := min(len(items) for _, items in sources)) < BATCH * world.size:
        raise UserError(f"{fewest} triplets are fewer than {BATCH} on each of {world.size} ranks: lower --batch")
    epochs = EPOCHS or (6 if MODEL == "blip_tdm" else 10)
    steps = STEPS or epochs * (len(sources[0][1]) // (BATCH * world.size))
    if BETA != "auto" and not BETA.replace(".", "", 1).isdecimal():
        raise UserError(f"--beta {BETA}: wanted a number from 0, or auto")
    beta = float(BETA) if BETA != "auto" else 0.5 if MODEL == "blip_tdm" else 0.0
    if REVERSED_TEXT not in ("token", "delta"):
        raise UserError(f"--reversed_text {REVERSED_TEXT}: wanted token or delta")
    token, tdm_on = REVERSED_TEXT == "token", MODEL == "blip_tdm" and TDM
    if BIDIRECTIONAL and not token:
        have = [bool(item.back) for _, items in sources for item in items]
        if not any(have):
            raise UserError("--reversed_text delta: no triplet has a reverse_delta (gen_deltas.py --reverse)")
        say(f"{sum(have):,} of {len(have):,} triplets have a reverse_delta; the others have no reversed loss")

    # ---- model
    backbone = os.path.abspath(BACKBONE) if os.path.isdir(BACKBONE) else BACKBONE or HUB.get(MODEL, "")
    build = {"model": MODEL, "backbone": backbone, "text_length": TEXT_LENGTH, "train_text": TRAIN_TEXT}
    build |= {"directions": bool(BIDIRECTIONAL) and token, "start": os.path.abspath(START) if START else ""}
    if MODEL == "combiner":
        build |= {"p": COMBINER_P, "h": COMBINER_H, "dropout": COMBINER_DROPOUT}
    elif MODEL == "blip_tdm":
        build |= {"first_token": FIRST_TOKEN, "train_tdm_head": TRAIN_TDM_HEAD}
    torch.manual_seed(SEED)  # the Combiner's start, the directions'
    model = build_cir(**build).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(f"--model {MODEL} --train_text false trains nothing: take a Combiner, or train the text")
    tau = torch.tensor(TAU, device=device, requires_grad=LEARN_TAU)
    trained = parameters + [tau] * LEARN_TAU
    groups = [{"params": parameters}] + ([{"params": [tau], "weight_decay": 0.0}] if LEARN_TAU else [])
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    texts = {text for _, items in sources for item in items for group in (*item.deltas, item.back) for text in group}
    if cut := model.too_long(sorted(texts)):
        say(f"{len(cut):,} of {len(texts):,} deltas lose what exceeds {model.length} tokens: {cut[0][:60]!r}")

    # ---- resume
    data_hash = hashlib.sha256(json.dumps(streams).encode()).hexdigest()
    constants = constants_of(globals()) | {"RANKS": world.size, "TRIPLETS_SHA256": data_hash}
    constants["FROZEN_SHA256"] = frozen_digest(model)  # load_cir compares it
    start, best = 0, None
    if found := load_state(OUT, constants):
        start, state = found
        if start >= steps and os.path.exists(f"{OUT}/model.safetensors"):
            load_tensors(OUT, "model.safetensors")  # it is whole
            say(f"{OUT} is finished ({steps} steps); for another run take another --out")
            return
        put_trained(model, state["weights"], OUT)
        optimizer.load_state_dict(state["optimizer"])
        tau.data.fill_(state["tau"])
        best = state["best"]
        say(f"resumed after step {start} of {steps}")
    log = Log(OUT, resume_step=start)

    # ---- images: fresh augmentation decoded one step ahead, or cached views
    strengths = (CROP_SCALE, CROP_RATIO, FLIP, JITTER, TRANSLATE, ROTATE, model.preprocess.size)
    pool = ThreadPoolExecutor(max(1, WORKERS))

    def load_one(job: tuple) -> torch.Tensor:
        (store, name), key = job
        image = stores[store].open(name)
        return model.preprocess(augment(image, seeded_rng(SEED, *key), *strengths) if AUGMENT else image)

    size = BATCH * world.size  # of the global batch of one stream
    own = [k * size + world.rank * BATCH + i for k in range(len(sources)) for i in range(BATCH)]  # rows of this rank

    def draws_of(step: int) -> list[Draw]:
        return [d for s, items in sources for d in draw(items, s, step, size, SEED)]

    def jobs_of(step: int) -> list[tuple]:
        draws = draws_of(step)
        return image_jobs([draws[i] for i in own])

    def everywhere(rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in the order of the global batch."""
        return torch.cat([gather_with_grad(part) for part in rows.split(BATCH)])

    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    images = sorted({image for _, items in sources for item in items for image in (item.reference, item.target)})
    bank = encode_bank(model, images, stores, BATCH, autocast, world) if BANK else None
    if VIEWS:
        with autocast():
            cache = cache_views(model, images, VIEWS, lambda jobs: list(pool.map(load_one, jobs)), BATCH, device)
    elif start < steps:
        ahead = pool.map(load_one, jobs_of(start))

    clock, seen = time.perf_counter(), 0
    for step in progress(range(start, steps), "training"):
        seed_step(SEED, step, world.rank)
        lr = 0.5 * LR * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        draws = draws_of(step)  # Algorithm 3: B triplets of D and B' pseudo triplets of D', of all ranks
        deltas, targets = [d.delta for d in draws], [d.target for d in draws]
        encoded = 0  # images through the vision encoder in this step
        with autocast():
            if VIEWS:
                jobs = image_jobs([draws[i] for i in own])
                views = [(image, seeded_rng(SEED, "view", *key).integers(VIEWS)) for image, key in jobs]
                tokens = torch.stack([cache[image][k] for image, k in views]).to(device)
            else:
                pixels = torch.stack(list(ahead)).to(device)
                if step + 1 < steps:
                    ahead = pool.map(load_one, jobs_of(step + 1))
                tokens, encoded = model.tokens(pixels), len(pixels)
            reference, target = tokens.chunk(2)
            x, c = model.target(target), model.compose(reference, [deltas[i] for i in own])
        fresh = None  # the bank without the targets of this batch: they are rows already, augmented
        if BANK:
            present = set(targets)
            fresh = bank[[i for i, image in enumerate(images) if image not in present]]
        # each loss is this rank's share of the global one: the shares, and all gradients, add up over the ranks
        loss_of = functools.partial(l_tcc_ranks, tau=tau, alpha=ALPHA, beta=beta, bank=fresh)
        n = BATCH if TRIPLETS else 0
        tcc = loss_of(x, c, n) if CONCAT or len(sources) == 1 else loss_of(x[:n], c[:n], n) + loss_of(x[n:], c[n:], 0)
        # L_tdm and L_rev, of this rank's rows, against the images of all; negatives drawn outside autocast, in fp32
        if tdm_on or BIDIRECTIONAL:
            xs, cs, everyones = everywhere(x.detach()), everywhere(c.detach()), everywhere(target)
        noise = seeded_generator("step", SEED, step, 0)  # the same on every rank: so are the negatives
        tdm, rev = x.new_zeros(()), x.new_zeros(())
        if tdm_on:
            negatives = draw_negatives(xs, cs, targets, tau.item(), noise)
            with autocast():
                tdm = tdm_loss(model, everyones, deltas, own, negatives).sum() / (len(draws) + 2 * len(negatives[0]))
        if BIDIRECTIONAL and (turned := [k for k, i in enumerate(own) if token or draws[i].back]):
            at = torch.tensor([own[k] for k in turned], device=device)
            back = [draws[own[k]].delta if token else draws[own[k]].back for k in turned]
            if MODEL == "blip_tdm":
                at = draw_candidates(xs, cs, targets, tau.item(), REVERSED_NEGATIVES, noise)[at.cpu()].to(device)
            with autocast():
                rev = model.reversed_loss(reference[turned], back, everyones, at, tau)
            rev = rev / sum(token or bool(d.back) for d in draws)
        optimizer.zero_grad()
        (tcc + tdm + BIDIRECTIONAL * rev).backward()
        all_reduce_gradients(trained)
        tcc, tdm, rev = tcc.detach(), tdm.detach(), rev.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if any_rank(not bool(torch.isfinite(tcc + tdm + rev + norm))):
            names = [(d.reference[1], d.target[1], d.delta) for d in draws]
            log.write(step=step + 1, error="loss or gradient not finite", tcc=float(tcc), norm=float(norm), items=names)
            raise UserError(
                f"loss or gradient not finite at step {step + 1}: its items are in {OUT}/log.jsonl, the last good"
                f" state in {OUT}/last; take a lower --lr or a higher --tau, with another --out"
            )
        optimizer.step()
        if LEARN_TAU:
            tau.data.clamp_(0.001, 0.5)

        done, seen = step + 1, seen + len(draws)
        if done % LOG_EVERY == 0 or done == steps:
            took = time.perf_counter() - clock
            tcc, tdm, rev = (all_sum(loss) for loss in (tcc, tdm, rev))
            record = {"step": done, "loss": float(tcc + tdm + BIDIRECTIONAL * rev), "tcc": float(tcc)}
            record |= ({"tdm": float(tdm)} if tdm_on else {}) | ({"rev": float(rev)} if BIDIRECTIONAL else {})
            record |= {"lr": lr, "norm": float(norm), "tau": tau.item(), "images": int(all_sum(encoded))}
            speed = {"items_per_s": round(seen / took, 2), "eta_s": round(took / (done - start) * (steps - done))}
            log.write(**record, **speed)
        if benchmarks and (done % VAL_EVERY == 0 or done == steps):
            found = [evaluate(model, b, BATCH, device, dtype, workers=WORKERS) for b in benchmarks]
            recall = {name: sum(f[name] for f in found) / len(found) for name in found[0]}  # FashionIQ: mean of three
            chosen = ("R@1", "R@5", "R@10") if DATASET == "cirr" else ("R@10", "R@50")
            score = sum(recall[name] for name in chosen) / len(chosen)
            log.write(step=done, val=VAL_SPLIT, score=score, **recall)
            say(f"step {done}: {VAL_SPLIT}", *(f"{name} {value:.2f}" for name, value in recall.items()))
            if best is None or score > best["score"]:
                best = {"score": score, "step": done, "tau": tau.item()}
                best["weights"] = get_trained(model) if KEEP_BEST else None
        stop = any_rank(stop_requested()) and done < steps
        if stop or done % SAVE_EVERY == 0 or done == steps:
            state = {"weights": get_trained(model), "optimizer": optimizer.state_dict(), "tau": tau.item()}
            save_state(OUT, done, state | {"best": best}, constants)
        if stop:
            pool.shutdown(cancel_futures=True)
            say(f"stopped after step {done} of {steps}; the same command goes on from there")
            raise SystemExit(143)
    pool.shutdown()

    keep = best if best and KEEP_BEST else {"step": steps, "tau": tau.item(), "weights": get_trained(model)}
    config = {"stage": "cir", "build": build, "step": keep["step"], "tau": keep["tau"], "constants": constants}
    if best:
        config["val"] = {"split": VAL_SPLIT, "protocol": says, "score": best["score"], "step": best["step"]}
    save_folder(OUT, {"model.safetensors": keep["weights"]}, {"config.json": config})
    say(f"wrote {OUT}/model.safetensors: {MODEL} after step {keep['step']}")
    barrier()


if __name__ == "__main__":
    override(globals())
    run(main)
