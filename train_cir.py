"""Stage 5, composed image retrieval [S3.3], Algorithm 3: trains a CIR model on human and pseudo triplets together.

    python train_cir.py --root data/cirr --pseudo out/deltas/pseudo.jsonl --pseudo_images data/nlvr2 --out out/cir
    torchrun --nproc_per_node 8 train_cir.py --model combiner --root data/cirr --images data/img_raw --out out/clip

Reads triplets (CIRR, FashionIQ, jsonl), pseudo.jsonl of gen_deltas.py and a CLIP or BLIP ITM model.
Writes OUT/model.safetensors (trained weights only), OUT/config.json, OUT/log.jsonl, OUT/last/ (to resume).
"""

import common

common.early_help(__name__, __file__)  # answers --help before torch is imported

import functools
import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import data
from eval_cir import evaluate
from kernels.contrastive import l_tcc

# ---- model ----
MODEL = "blip_tdm"  # "combiner" (CLIP + Combiner) or "blip_tdm" [S3.3]
BACKBONE = ""  # folder or hub id; empty: openai/clip-vit-large-patch14 or Salesforce/blip-itm-large-coco [S6.1]
TEXT_LENGTH = 0  # tokens of a delta, special ones included; 0 = as many as the backbone has positions (release: 32)
FIRST_TOKEN = "enc"  # blip_tdm: "enc" as BLIP was trained, "cls" as Hugging Face feeds and the release does
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
SAME_PAIRS = ""  # pseudo.jsonl of the same human pairs: human or generated delta, one drawn per step [Table 2, dagger]
PSEUDO = ""  # auxiliary pseudo triplets B': pseudo.jsonl of gen_deltas.py, as large a part of each step as B
PSEUDO_IMAGES = ""  # folder of the images of PSEUDO
WORKERS = 4  # threads that decode and augment images

# ---- optimisation ----
EPOCHS = 0  # passes over the human triplets (PSEUDO without them); 0 = 6 for blip_tdm, 10 for combiner [S6.1]
STEPS = 0  # optimiser steps instead of EPOCHS; 0 = by EPOCHS
BATCH = 64  # triplets per GPU, of B and of B' each [S6.1]
LR = 1e-4  # learning rate, cosine to zero [S6.1]
BETAS = (0.9, 0.99)  # AdamW [S6.1]
WEIGHT_DECAY = 0.05  # AdamW [S6.1]
TAU = 0.01  # temperature of Eq. 2 [S6.1]; with LEARN_TAU where it starts (release: 0.07)
LEARN_TAU = False  # learn the temperature, clamped to [0.001, 0.5], as the release
ALPHA = 1.0  # weight of the positive in the denominator of Eq. 2 [S6.1]
BETA = "auto"  # hardness of negatives in Eq. 2; auto = 0 for combiner, 0.5 for blip_tdm [S6.1]

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
VAL_EVERY = 500  # steps between two measurements; the last step is always measured
KEEP_BEST = True  # save the best measured step, not the last: by mean R@1, 5, 10 (CIRR), R@10, 50 (FashionIQ) [ours]

# ---- run ----
OUT = "out/cir"  # folder written
LOG_EVERY = 10  # steps between two lines of log.jsonl
SAVE_EVERY = 500  # steps between two training states in OUT/last
SEED = 0  # order, augmentation, dropout, Combiner's start
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # compute: auto = bf16 on cuda, fp32 on CPU; weights, similarities and losses stay fp32
CHECK = False  # count triplets and images, name what is missing, stop

HUB = {"combiner": "openai/clip-vit-large-patch14", "blip_tdm": "Salesforce/blip-itm-large-coco"}


# ---- models ----


class CirModel(nn.Module):
    """What both models share; weights are fp32, the caller chooses autocast.

    tokens(pixels): what compose needs of an image; target(tokens): its frozen gallery feature; compose: the query."""

    def load(self, kind: type, backbone: str, text_length: int, **how: str) -> None:
        """The frozen Hugging Face model, its tokenizer and picture transform, from a folder or hub id."""
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        here = {"local_files_only": os.path.isdir(backbone)}
        found = transformers.AutoConfig.from_pretrained(backbone, **here).model_type
        if found != (wanted := kind.config_class.model_type):
            raise common.UserError(f"--backbone {backbone} is a {found} model, wanted {wanted}: fix it or --model")
        how |= {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True} | here
        self.backbone, info = kind.from_pretrained(backbone, **how)
        if missing := sorted(info["missing_keys"]):  # they would be random, with a warning
            raise common.UserError(f"{backbone}: {len(missing)} weights of {kind.__name__} missing, first {missing[0]}")
        self.backbone.requires_grad_(False)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(backbone, **here)
        self.preprocess = data.Preprocess.from_folder(backbone, kind.__name__)
        positions = self.backbone.config.text_config.max_position_embeddings
        if text_length > positions:
            raise common.UserError(f"--text_length {text_length}: the text encoder has {positions} positions")
        self.length = text_length or positions

    def tokenize(self, texts: list[str], device) -> tuple[torch.Tensor, torch.Tensor]:
        """-> ids (B, T), mask (B, T), right-padded to the longest."""
        # split_special_tokens: a caption that spells "[SEP]" or "<|endoftext|>" must not end the text
        how = {"padding": True, "truncation": True, "max_length": self.length, "split_special_tokens": True}
        rows = self.tokenizer(texts, return_tensors="pt", **how).to(device)
        return rows.input_ids, rows.attention_mask

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


class CombinerModel(CirModel):
    """CLIP with a trained text encoder, a frozen vision encoder, and a Combiner of their raw features."""

    def __init__(self, backbone: str, p: int, h: int, dropout: float, text_length: int):
        super().__init__()
        self.load(transformers.CLIPModel, backbone, text_length, attn_implementation="sdpa")
        self.backbone.text_model.requires_grad_(True)
        self.backbone.text_projection.requires_grad_(True)
        d = self.backbone.config.projection_dim
        self.combiner = Combiner(d, p or d, h or 2 * d, dropout)

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> CLIP's image_embeds, raw (B, d)."""
        return self.backbone.visual_projection(self.backbone.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(tokens.float(), dim=1)  # (B, d)

    def compose(self, tokens: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """tokens (B, d) of the references, B deltas -> c (B, d), normalised."""
        ids, mask = self.tokenize(texts, tokens.device)
        text = self.backbone.text_projection(self.backbone.text_model(input_ids=ids, attention_mask=mask).pooler_output)
        return self.combiner(tokens, text)


class BlipTdm(CirModel):
    """BLIP ITM with a trained image-grounded text encoder; vision and vision_proj are frozen."""

    def __init__(self, backbone: str, first_token: str, train_tdm_head: bool, text_length: int):
        super().__init__()
        if first_token not in ("enc", "cls"):
            raise common.UserError(f"--first_token {first_token}: wanted enc or cls")
        self.load(transformers.BlipForImageTextRetrieval, backbone, text_length)  # transformers has no sdpa for it
        self.backbone.text_encoder.requires_grad_(True)
        self.backbone.text_proj.requires_grad_(True)
        self.backbone.itm_head.requires_grad_(train_tdm_head)  # p_theta of Eq. 3
        last = self.backbone.config.text_config.vocab_size - 1
        self.first_token = last if first_token == "enc" else self.tokenizer.cls_token_id

    @torch.no_grad()
    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> cls and patch tokens (B, P, D)."""
        return self.backbone.vision_model(pixel_values=pixels).last_hidden_state

    @torch.no_grad()
    def target(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.backbone.vision_proj(tokens[:, 0]).float(), dim=1)  # (B, d)

    def ground(self, tokens: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text attending to image tokens: -> hidden states (B, T, D), mask (B, T)."""
        ids, mask = self.tokenize(texts, tokens.device)
        ids[:, 0] = self.first_token  # the tokenizer writes [CLS]; the cross-attention was trained behind [ENC]
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        states = self.backbone.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens, encoder_attention_mask=seen
        )
        return states.last_hidden_state, mask

    def compose(self, tokens: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """tokens (B, P, D) of the references, B deltas -> c (B, d), normalised."""
        states, _ = self.ground(tokens, texts)
        return F.normalize(self.backbone.text_proj(states[:, 0]).float(), dim=1)

    def match(self, tokens: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """Eq. 3: tokens (B, P, D) of targets, B deltas -> logits (B, 2), index 1 = matched; mean over text tokens."""
        states, mask = self.ground(tokens, texts)
        logits = self.backbone.itm_head(states).float()  # (B, T, 2)
        return (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def build_cir(
    model: str, backbone: str = "", p=0, h=0, dropout=0.0, first_token="enc", train_tdm_head=True, text_length=0
) -> CirModel:
    """A model before CIR training, fp32 on the CPU; a new Combiner draws from torch's generator."""
    if model not in HUB:
        raise common.UserError(f"--model {model}: one of {', '.join(HUB)}")
    if model == "combiner":
        return CombinerModel(backbone or HUB[model], p, h, dropout, text_length)
    return BlipTdm(backbone or HUB[model], first_token, train_tdm_head, text_length)


def load_cir(folder: str, device: str | torch.device = "cpu") -> CirModel:
    """The model that main() saved in folder, in eval mode; UserError if weights and config do not belong together."""
    settings = common.read_json(os.path.join(folder, "config.json"))
    if not isinstance(settings, dict) or not isinstance(settings.get("build"), dict):
        raise common.UserError(f"{folder}/config.json is not one of train_cir.py")
    model = build_cir(**settings["build"])
    put_trained(model, common.load_tensors(folder, "model.safetensors"), folder)
    return model.eval().to(device)


def get_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the trained weights, by name, on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_trained(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Overwrites exactly the trained weights; UserError naming the first difference."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(own.keys() ^ tensors.keys())
    odd += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if odd:
        raise common.UserError(f"{where}: weights do not fit the model, first {odd[0]}; is the backbone another one?")
    for name, p in own.items():
        p.copy_(tensors[name])


# ---- data ----


class Item(NamedTuple):
    """A triplet to train on; images as (store, name), deltas in groups: a group is drawn, then one of it."""

    reference: tuple[int, str]
    target: tuple[int, str]
    deltas: tuple[tuple[str, ...], ...]


class Draw(NamedTuple):
    """An item of one step, with the key of its randomness."""

    reference: tuple[int, str]
    target: tuple[int, str]
    delta: str
    key: tuple[int, int, int]  # stream (0 human, 1 auxiliary), epoch, item


def human_deltas(triplet: data.Triplet, dataset: str) -> tuple[str, ...]:
    """What a human wrote; FashionIQ's two captions as CLIP4Cir trains on them: both, swapped, each alone."""
    if dataset != "fashioniq":
        return (triplet.delta,)
    one, two = triplet.alternatives
    alone = (text.strip(".?, ").capitalize() for text in (one, two))
    return data.join_captions(one, two), data.join_captions(two, one), *alone


def human_items(triplets: list[data.Triplet], dataset: str, generated: list[data.Triplet]) -> list[Item]:
    """Human triplets; generated deltas of the same pairs are a second group (dagger: one of the two is drawn)."""
    also: dict[tuple[str, str], list[str]] = {}
    for t in generated:
        also.setdefault((t.reference, t.target), []).append(t.delta)
    items = []
    for t in triplets:
        groups = [human_deltas(t, dataset)]
        if dataset == "jsonl" and t.alternatives:
            groups.append(t.alternatives[1:])  # the VDG release's [human, generated]
        if (t.reference, t.target) in also:
            groups.append(tuple(also[t.reference, t.target]))
        items.append(Item((0, t.reference), (0, t.target), tuple(groups)))
    without = sum((t.reference, t.target) not in also for t in triplets)
    if generated and without == len(triplets):
        raise common.UserError("--same_pairs: none of its (reference, target) pairs is a human triplet's; wrong file?")
    if generated and without:
        common.say(f"{without:,} of {len(triplets):,} human triplets have no generated delta in --same_pairs")
    return items


order_of = functools.lru_cache(maxsize=4)(data.epoch_order)  # asked for at every step


def draw(items: list[Item], stream: int, step: int, batch: int, seed: int, world: common.World) -> list[Draw]:
    """This rank's part of the step's global batch: a function of its arguments alone, so resume needs no state."""
    per_epoch = len(items) // (batch * world.size)  # the last, short batch of an epoch is left out: another each epoch
    epoch, at = divmod(step, per_epoch)
    start = (at * world.size + world.rank) * batch
    draws = []
    for i in order_of(len(items), seed + stream, epoch)[start : start + batch]:
        rng = common.rng(seed, "delta", stream, epoch, i)
        group = items[i].deltas[rng.integers(len(items[i].deltas))]
        delta = group[rng.integers(len(group))]
        draws.append(Draw(items[i].reference, items[i].target, delta, (stream, epoch, i)))
    return draws


def image_jobs(draws: list[Draw]) -> list[tuple]:
    """References, then targets: ((store, name), key of the augmentation)."""
    return [(d.reference, ("reference", *d.key)) for d in draws] + [(d.target, ("target", *d.key)) for d in draws]


# ---- losses ----


@torch.no_grad()
def draw_negatives(target: torch.Tensor, c: torch.Tensor, images: list, tau: float) -> tuple[torch.Tensor, ...]:
    """Hard negatives as in ALBEF: rows (U,) that have any, a target (U,) and a delta (U,) for each.

    Multinomial from the softmax of similarity / tau; the feature of a delta is c, which Eq. 2 has computed anyway
    [ours]. Two rows with the same target image are no negatives of each other. Drawn within the rank, over B and B'
    together [ours]: patch tokens stay where they are.
    """
    number = {image: i for i, image in enumerate(dict.fromkeys(images))}
    label = torch.tensor([number[image] for image in images], device=c.device)
    same = label[:, None] == label  # (B, B)
    rows = (~same).any(1).nonzero().flatten()  # a batch of one single target has none
    if len(rows) == 0:
        return rows, rows, rows
    z = (target @ c.T / tau).masked_fill(same, -math.inf)  # (B, B): target i, delta j
    hard_target = torch.multinomial(z.T[rows].softmax(1), 1).flatten()
    hard_delta = torch.multinomial(z[rows].softmax(1), 1).flatten()
    return rows, hard_target, hard_delta


def tdm_loss(
    model: BlipTdm, tokens: torch.Tensor, deltas: list[str], negatives: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Eq. 3: cross entropies (B + 2U,) of (target, delta), (hard target, delta), (target, hard delta)."""
    rows, hard_target, hard_delta = negatives
    image = torch.cat([torch.arange(len(deltas), device=tokens.device), hard_target, rows])
    texts = deltas + [deltas[i] for i in rows.tolist()] + [deltas[i] for i in hard_delta.tolist()]
    matched = (torch.arange(len(image), device=tokens.device) < len(deltas)).long()
    return F.cross_entropy(model.match(tokens[image], texts), matched, reduction="none")


# ---- training ----


def read_items(
    dataset: str, root: str, split: str, images: str, same_pairs: str, pseudo: str, pseudo_images: str, human: bool
) -> tuple[list[data.ImageStore], list[list[Item]]]:
    """-> image stores and items of stream 0 (human) and stream 1 (auxiliary), either may be empty, not both."""
    stores, streams = [data.ImageStore([]), data.ImageStore([])], [[], []]
    if human:
        if not root:
            raise common.UserError("--root is empty: where the triplets lie, or --triplets false with --pseudo")
        triplets, stores[0] = data.training_triplets(dataset, root, split, "all", images or None)
        streams[0] = human_items(
            triplets, dataset, data.with_text(data.read_triplets(same_pairs), same_pairs) if same_pairs else []
        )
    if pseudo:
        triplets, stores[1] = data.training_triplets("jsonl", pseudo, "", "all", pseudo_images or None)
        streams[1] = [Item((1, t.reference), (1, t.target), ((t.delta,),)) for t in data.with_text(triplets, pseudo)]
    for wanted, items, file in ((human, streams[0], root), (pseudo, streams[1], pseudo)):
        if wanted and not items:
            raise common.UserError(f"{file} holds no triplet to train on")
    if not human and not pseudo:
        raise common.UserError("nothing to train on: --triplets true, or --pseudo with a pseudo.jsonl")
    return stores, streams


def read_validation(dataset: str, root: str, split: str, images: str) -> list[data.Benchmark]:
    """The labelled split measured while training: CIRR's, or FashionIQ's three categories."""
    if dataset == "cirr":
        return [data.read_cirr(root, split, images or None)]
    if dataset == "fashioniq":
        return [data.read_fashioniq(root, split, category, images or None) for category in data.FASHIONIQ_CATEGORIES]
    raise common.UserError(f"--val_split {split}: triplets of --dataset {dataset} have no gallery to measure recall in")


def check(stores: list[data.ImageStore], streams: list[list[Item]], benchmarks: list[data.Benchmark]) -> None:
    """Prints what is there; UserError if an image is missing or unreadable."""
    reports = [data.check_report(benchmark) for benchmark in benchmarks]
    for items, store, what in zip(streams, stores, ("human", "auxiliary"), strict=True):
        if items:
            text, ok = data.check_report([name for item in items for _, name in (item.reference, item.target)], store)
            reports.append((f"{what}: {len(items):,} triplets; {text}", ok))
    common.say("\n".join(text for text, _ in reports))
    if not all(ok for _, ok in reports):
        raise common.UserError("images missing or unreadable, see above; fetch them or fix --images / --pseudo_images")


def cache_views(model: nn.Module, images: list[tuple], views: int, load, batch: int, device) -> dict[tuple, list]:
    """K augmented views of every image through the frozen vision encoder, once -> {image: K tokens, on the CPU}."""
    cache = {image: [] for image in images}
    jobs = [(image, ("view", *image, k)) for image in images for k in range(views)]
    for i in common.progress(range(0, len(jobs), batch), "encoding views"):  # fixed blocks: resume sees the same bits
        pixels = torch.stack(load(jobs[i : i + batch])).to(device)
        for (image, _), tokens in zip(jobs[i : i + batch], model.tokens(pixels).cpu(), strict=True):
            cache[image].append(tokens)
    return cache


def main() -> None:
    world = common.init_world(DEVICE)
    device, dtype = world.device, common.pick_dtype(DTYPE, world.device)
    # ---- what there is to train on, checked before a model loads
    stores, streams = read_items(DATASET, ROOT, SPLIT, IMAGES, SAME_PAIRS, PSEUDO, PSEUDO_IMAGES, TRIPLETS)
    benchmarks = read_validation(DATASET, ROOT, VAL_SPLIT, IMAGES) if VAL_SPLIT else []
    if CHECK:
        return check(stores, streams, benchmarks)
    for benchmark in benchmarks:
        if missing := benchmark.images.missing(benchmark.gallery):
            raise common.UserError(f"--val_split {VAL_SPLIT}: {len(missing):,} images missing, first {missing[0]!r}")
    common.lock_folder(OUT)
    streams = [
        data.drop_missing(items, lambda item: (item.reference[1], item.target[1]), store, f"{what} triplets")
        for items, store, what in zip(streams, stores, ("human", "auxiliary"), strict=True)
    ]
    sources = [(s, items) for s, items in enumerate(streams) if items]
    if (fewest := min(len(items) for _, items in sources)) < BATCH * world.size:
        raise common.UserError(f"{fewest} triplets are fewer than {BATCH} on each of {world.size} ranks: lower --batch")
    epochs = EPOCHS or (6 if MODEL == "blip_tdm" else 10)
    steps = STEPS or epochs * (len(sources[0][1]) // (BATCH * world.size))
    if BETA != "auto" and not BETA.replace(".", "", 1).isdecimal():
        raise common.UserError(f"--beta {BETA}: wanted a number from 0, or auto")
    beta = float(BETA) if BETA != "auto" else 0.5 if MODEL == "blip_tdm" else 0.0

    # ---- model
    backbone = os.path.abspath(BACKBONE) if os.path.isdir(BACKBONE) else BACKBONE or HUB.get(MODEL, "")
    build = {"model": MODEL, "backbone": backbone, "text_length": TEXT_LENGTH}
    if MODEL == "combiner":
        build |= {"p": COMBINER_P, "h": COMBINER_H, "dropout": COMBINER_DROPOUT}
    else:
        build |= {"first_token": FIRST_TOKEN, "train_tdm_head": TRAIN_TDM_HEAD}
    torch.manual_seed(SEED)  # the Combiner's start
    model = build_cir(**build).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    tau = torch.tensor(TAU, device=device, requires_grad=LEARN_TAU)
    trained = parameters + [tau] * LEARN_TAU
    groups = [{"params": parameters}] + ([{"params": [tau], "weight_decay": 0.0}] if LEARN_TAU else [])
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    texts = sorted({text for _, items in sources for item in items for group in item.deltas for text in group})
    if cut := model.too_long(texts):
        common.say(f"{len(cut):,} of {len(texts):,} deltas lose what exceeds {model.length} tokens: {cut[0][:60]!r}")

    # ---- resume
    data_hash = hashlib.sha256(json.dumps(streams).encode()).hexdigest()
    constants = common.constants_of(globals()) | {"RANKS": world.size, "TRIPLETS_SHA256": data_hash}
    start, best = 0, None
    if found := common.load_state(OUT, constants):
        start, state = found
        put_trained(model, state["weights"], OUT)
        optimizer.load_state_dict(state["optimizer"])
        tau.data.fill_(state["tau"])
        best = state["best"]
        common.say(f"resumed after step {start} of {steps}")
    log = common.Log(OUT, resume_step=start)

    # ---- images: fresh augmentation decoded one step ahead, or cached views
    strengths = (CROP_SCALE, CROP_RATIO, FLIP, JITTER, TRANSLATE, ROTATE, model.preprocess.size)
    pool = ThreadPoolExecutor(max(1, WORKERS))

    def load_one(job: tuple) -> torch.Tensor:
        (store, name), key = job
        image = stores[store].open(name)
        return model.preprocess(data.augment(image, common.rng(SEED, *key), *strengths) if AUGMENT else image)

    def draws_of(step: int) -> list[Draw]:
        return [d for s, items in sources for d in draw(items, s, step, BATCH, SEED, world)]

    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    if VIEWS:
        images = sorted({image for _, items in sources for item in items for image in (item.reference, item.target)})
        with autocast():
            cache = cache_views(model, images, VIEWS, lambda jobs: list(pool.map(load_one, jobs)), BATCH, device)
    elif start < steps:
        ahead = pool.map(load_one, image_jobs(draws_of(start)))

    clock, seen = time.perf_counter(), 0
    for step in common.progress(range(start, steps), "training"):
        common.seed_step(SEED, step, world.rank)
        lr = 0.5 * LR * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        draws = draws_of(step)  # Algorithm 3: B triplets of D and B' pseudo triplets of D', in this order
        deltas = [d.delta for d in draws]
        with autocast():
            if VIEWS:
                views = [(image, common.rng(SEED, "view", *key).integers(VIEWS)) for image, key in image_jobs(draws)]
                tokens = torch.stack([cache[image][k] for image, k in views]).to(device)
            else:
                pixels = torch.stack(list(ahead)).to(device)
                if step + 1 < steps:
                    ahead = pool.map(load_one, image_jobs(draws_of(step + 1)))
                tokens = model.tokens(pixels)
            reference, target = tokens.chunk(2)
            x, c = model.target(target), model.compose(reference, deltas)  # (B + B', d), encoded once for both terms
        rows = x.new_zeros(0)  # cross entropies of Eq. 3
        if MODEL == "blip_tdm":
            negatives = draw_negatives(x, c, [d.target for d in draws], tau.item())  # outside autocast: fp32
            with autocast():
                rows = tdm_loss(model, target, deltas, negatives)
        # every rank has the whole global batch and takes 1 / size of its loss; gather_with_grad sums the gradients
        xs, cs = ([common.gather_with_grad(part) for part in t.split(BATCH)] for t in (x, c))
        tcc = l_tcc(torch.cat(xs), torch.cat(cs), len(xs[0]), tau, ALPHA, beta)
        tdm = rows.sum() / max(1.0, common.all_sum(len(rows)))
        optimizer.zero_grad()
        (tcc / world.size + tdm).backward()
        common.all_reduce_gradients(trained)
        tcc, tdm = tcc.detach(), tdm.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if common.any_rank(not bool(torch.isfinite(tcc + tdm + norm))):
            names = [(d.reference[1], d.target[1], d.delta) for part in common.gather_objects(draws) for d in part]
            log.write(step=step + 1, error="loss or gradient not finite", tcc=float(tcc), norm=float(norm), items=names)
            raise common.UserError(
                f"loss or gradient not finite at step {step + 1}: its items are in {OUT}/log.jsonl, the last good"
                f" state in {OUT}/last; take a lower --lr or a higher --tau, with another --out"
            )
        optimizer.step()
        if LEARN_TAU:
            tau.data.clamp_(0.001, 0.5)

        done, seen = step + 1, seen + len(draws) * world.size
        if done % LOG_EVERY == 0 or done == steps:
            took, tdm = time.perf_counter() - clock, common.all_sum(tdm)
            record = {"tcc": float(tcc)} | ({"tdm": float(tdm)} if MODEL == "blip_tdm" else {})
            speed = {"items_per_s": round(seen / took, 2), "eta_s": round(took / (done - start) * (steps - done))}
            log.write(step=done, loss=float(tcc + tdm), **record, lr=lr, norm=float(norm), tau=tau.item(), **speed)
        if benchmarks and (done % VAL_EVERY == 0 or done == steps):
            found = [evaluate(model, b, BATCH, device, dtype, workers=WORKERS) for b in benchmarks]
            recall = {name: sum(f[name] for f in found) / len(found) for name in found[0]}  # FashionIQ: mean of three
            chosen = ("R@1", "R@5", "R@10") if DATASET == "cirr" else ("R@10", "R@50")
            score = sum(recall[name] for name in chosen) / len(chosen)
            log.write(step=done, val=VAL_SPLIT, score=score, **recall)
            common.say(f"step {done}: {VAL_SPLIT}", *(f"{name} {value:.2f}" for name, value in recall.items()))
            if best is None or score > best["score"]:
                best = {"score": score, "step": done, "weights": get_trained(model) if KEEP_BEST else None}
        stop = common.any_rank(common.stop_requested()) and done < steps
        if stop or done % SAVE_EVERY == 0 or done == steps:
            state = {"weights": get_trained(model), "optimizer": optimizer.state_dict(), "tau": tau.item()}
            common.save_state(OUT, done, state | {"best": best}, constants)
        if stop:
            pool.shutdown(cancel_futures=True)
            common.say(f"stopped after step {done} of {steps}; the same command goes on from there")
            raise SystemExit(143)
    pool.shutdown()

    keep = best if best and KEEP_BEST else {"step": steps, "weights": get_trained(model)}
    config = {"stage": "cir", "build": build, "step": keep["step"], "tau": tau.item(), "constants": constants}
    config |= {"val": {"split": VAL_SPLIT, "score": best["score"], "step": best["step"]}} if best else {}
    common.save_folder(OUT, {"model.safetensors": keep["weights"]}, {"config.json": config})
    common.say(f"wrote {OUT}/model.safetensors: {MODEL} after step {keep['step']}")
    common.barrier()


if __name__ == "__main__":
    common.override(globals())
    common.run(main)
