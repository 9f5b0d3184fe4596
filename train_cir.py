"""Stage 5, composed image retrieval [S3.3], Algorithm 3: trains a CIR model on human and pseudo triplets together.

    python train_cir.py --root data/cirr --pseudo out/deltas/pseudo.jsonl --pseudo_images data/nlvr2 --out out/cir
    torchrun --nproc_per_node 8 train_cir.py --model combiner --root data/cirr --images data/img_raw --out out/clip

Reads triplets (CIRR, FashionIQ, jsonl), pseudo.jsonl of gen_deltas.py and a CLIP, SigLIP, BLIP or BLIP-2.
Writes OUT/model.safetensors (trained weights only), OUT/config.json, OUT/log.jsonl, OUT/last/ (to resume) and
OUT/trained_on.safetensors (hashes of the triplets: evaluation says how many of its queries are among them).
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import functools
import math

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common import batches, cir_model, files, memory, ranks, seeds, streams
from common.augment import Augmentation
from common.cir_model import CirModel, frozen_sha256, get_trained, put_trained, trained_of
from common.console import UserError, progress, run, say
from common.encoding import Bank, Compute, TrainingImages
from common.files import is_finished, load_tensors, lock_folder, save_folder, save_state
from common.flags import at_least, below, constants_of, one_of, override, within
from common.qformer import QformerCir
from common.ranks import all_sum, any_rank, stop_requested
from common.resume import Pictures, resume_state
from common.streams import Batch, Everyone, Source, draw_batch
from common.towers import build_towers, text_proj_apart
from common.trained_on import trained_pairs
from common.validation import Validation, begin_validation, read_validation, validate
from common.vision import absorb_attention, fuse_attention, in_compute_dtype, in_eights
from kernels.contrastive import l_tcc_ranks
from kernels.max_similarity import l_tcc_max_ranks
from kernels.negatives import draw_candidates, draw_negatives
from kernels.reversed import reversed_combiner, reversed_sum

# ---- model ----
MODEL = "blip_tdm"  # "blip_tdm" [S3.3]; "qformer" (BLIP-2, as SPRC); on CLIP, BLIP, SigLIP: "combiner", "sum" [Bi]
BACKBONE = ""  # folder or hub id; empty: START_FROM's, or openai/clip-vit-large-patch14, Salesforce/blip-itm-large-coco
START_FROM = ""  # checkpoint of train_cir.py to start from: stage II (combiner) from stage I (sum) [Bi]
TEXT_LENGTH = 0  # tokens of a delta, special ones included; 0 = as many as the backbone has positions (release: 32)
FIRST_TOKEN = "enc"  # blip_tdm: "enc" as BLIP was trained, "cls" as Hugging Face feeds and the release does
TRAIN_TEXT = True  # the text encoder [S3.3]; false: only what is behind it (CLIP4Cir's stage II)
TRAIN_TDM_HEAD = True  # blip_tdm: p_theta of Eq. 3 starts as itm_head and trains; the release freezes it
PAD = 0.0  # pictures longer than this ratio get black bars up to it: 1.25 as CLIP4Cir, SPRC; 1 = square; 0 = none
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
WORKERS = 16  # processes that decode and augment images, one a CPU of this rank at most; 0 = none but its own

# ---- optimisation ----
EPOCHS = 0  # passes over the human triplets (PSEUDO without them); 0 = 6 for blip_tdm, 10 for CLIP [S6.1]
STEPS = 0  # optimiser steps instead of EPOCHS; 0 = by EPOCHS
BATCH = 64  # triplets per GPU, of B and of B' each [S6.1]
LR = 1e-4  # learning rate, cosine to zero [S6.1]
TEXT_PROJ_LR = 1.0  # sum and combiner on BLIP: so many times LR for text_proj, 100 in the release of [Bi]
BETAS = (0.9, 0.99)  # decay of AdamW's two moments [S6.1]
WEIGHT_DECAY = 0.05  # weight decay of AdamW [S6.1]
TAU = 0.01  # temperature of Eq. 2 [S6.1]; with LEARN_TAU where it starts (release: 0.07)
LEARN_TAU = False  # learn the temperature, clamped to [0.001, 0.5], as the release
ALPHA = 1.0  # weight of the positive in the denominator of Eq. 2 [S6.1]
BETA = "auto"  # hardness of negatives in Eq. 2; auto = 0 for CLIP, 0.5 for blip_tdm [S6.1]

# ---- ablations and options of the loss ----
CONCAT = True  # second term of L_tcc over B + B' [Eq. 2]; false: over B' alone
TDM = True  # blip_tdm: L_tdm [Eq. 3]; false: L_tcc alone
BANK = False  # all training images and negatives of KEYS, encoded once, are further negative targets of L_tcc [ours]
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
VIEWS = 0  # 0 = fresh augmentation each time [S6.1]; K = K views an image, encoded once, a copy a machine [ours]: speed

# ---- validation ----
VAL_SPLIT = ""  # split whose recall is measured while training (jsonl: "held", or another file); empty: none
JOIN = "forward"  # FashionIQ's captions there, or "reverse", as in eval_cir.py; training draws both and each alone
MISSING = 0.0  # largest share of its pictures that may be missing; counted, in OUT/missing.txt, the protocol marked
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

# may change at a resume: the triplets' hash and the list of their pictures say whether they are the same
_FREE = {"ROOT", "IMAGES", "PSEUDO", "PSEUDO_IMAGES", "SAME_PAIRS"}
_CLIP = "openai/clip-vit-large-patch14"
# MODEL: BACKBONE, EPOCHS and BETA where these are left open [S6.1]
_USUAL = {"combiner": (_CLIP, 10, 0.0), "sum": (_CLIP, 10, 0.0)}
_USUAL |= {"blip_tdm": ("Salesforce/blip-itm-large-coco", 6, 0.5), "qformer": ("Salesforce/blip2-itm-vit-g", 10, 0.0)}


# ---- models ----


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


class BlipTdm(CirModel):
    """BLIP ITM with a trained image-grounded text encoder; vision and vision_proj are frozen."""

    def __init__(
        self, backbone: str, text_length: int, train_text: bool, directions: bool, first_token: str, train_head: bool
    ):
        super().__init__()
        self.load(transformers.BlipForImageTextRetrieval, backbone, text_length)
        fuse_attention(self.backbone.vision_model)
        absorb_attention(self.backbone.text_encoder)
        self.backbone.text_encoder.requires_grad_(train_text)
        self.backbone.text_proj.requires_grad_(True)
        self.backbone.itm_head.requires_grad_(train_head)  # p_theta of Eq. 3
        last = self.backbone.config.text_config.vocab_size - 1  # [ENC], the last word of BLIP
        self.first_token = last if first_token == "enc" else self.tokenizer.cls_token_id
        if directions:
            self.direct(self.backbone.text_encoder.embeddings, "word_embeddings")

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> cls and patch tokens (B, P, D), which every layer of the text encoder reads."""
        return in_compute_dtype(self.backbone.vision_model(pixel_values=pixels).last_hidden_state)

    @torch.no_grad()
    def target(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.backbone.vision_proj(tokens[:, 0]).float(), dim=1)  # (B, d)

    def ground(self, tokens: Tensor, texts: list[str], backward: bool = False) -> tuple[Tensor, Tensor]:
        """Text attending to image tokens: -> hidden states (B, T, D), mask (B, T)."""
        ids, mask = self.tokenize(texts, "cpu", backward)
        ids[:, 0] = self.first_token  # the tokenizer writes [CLS]; the cross-attention was trained behind [ENC]
        # up to four groups, by length: padded to the longest of all, half of the tokens would be none [ours]; on a GPU
        # large ones, as its time goes into launches
        least = 16 if tokens.device.type == "cpu" else 192
        lengths, groups, parts = mask.sum(1), max(1, min(4, len(texts) // least)), []
        order = lengths.argsort(stable=True)
        longest = [int(lengths[rows[-1]]) for rows in order.chunk(groups)]
        ids, mask, order = (ranks.to_device(part, tokens.device) for part in (ids, mask, order))
        lowest = torch.finfo(torch.float32).min  # added to scores, so that nobody reads the mask back
        hidden = lowest * (1 - mask[:, None, None].float())  # (B, 1, 1, T)
        for rows, length in zip(order.chunk(groups), longest, strict=True):
            text, (patches, unseen) = (ids[rows, :length], hidden[rows, ..., :length]), in_eights(tokens[rows])
            pictures = {"encoder_hidden_states": patches, "encoder_attention_mask": unseen}
            states = self.backbone.text_encoder(*text, **pictures).last_hidden_state
            parts.append(F.pad(states, (0, 0, 0, mask.shape[1] - length)))
        return torch.cat(parts)[order.argsort()], mask

    def compose(self, tokens: Tensor, texts: list[str], backward: bool = False) -> Tensor:
        """tokens (B, P, D) of the references, B deltas -> c (B, d), normalised."""
        states, _ = self.ground(tokens, texts, backward)
        return F.normalize(self.backbone.text_proj(states[:, 0]).float(), dim=1)

    def text(self, texts: list[str], device, backward: bool = False) -> Tensor:
        """The text without an image, as BLIP was trained for retrieval: [CLS], no cross-attention -> (B, d), raw."""
        ids, mask = self.tokenize(texts, device, backward)
        return self.backbone.text_proj(self.backbone.text_encoder(ids, mask).last_hidden_state[:, 0])

    def reversed_loss(self, reference, texts: list[str], target, candidates) -> Tensor:
        """Sum over rows: tokens (N, P, D) of references, N reversed texts, tokens (M, P, D) of targets, candidates
        (N, K): the targets each text is composed with, its own first.

        Nothing factorises here, so the N x K compositions run in blocks of N that the backward computes again."""
        r, blocks = self.target(reference), []  # (N, d)

        def block(images: Tensor) -> Tensor:
            return self.compose(target[images], texts, backward=True)

        for images in candidates.T:  # (N,)
            c = torch.utils.checkpoint.checkpoint(block, images, use_reentrant=False)
            blocks.append((c * r).sum(1))
        return -(torch.stack(blocks, dim=1) / self.tau).log_softmax(1)[:, 0].sum()

    def match(self, tokens: Tensor, texts: list[str]) -> Tensor:
        """Eq. 3: tokens (B, P, D) of targets, B deltas -> logits (B, 2), index 1 = matched; mean over text tokens."""
        states, mask = self.ground(tokens, texts)
        logits = self.backbone.itm_head(states).float()  # (B, T, 2)
        return (logits * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


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
    tau: float = 0.01,
    learn_tau: bool = False,
    pad: float = 0.0,
) -> CirModel:
    """A model before CIR training, fp32 on the CPU; a new Combiner and directions draw from torch's generator.

    start: a checkpoint whose weights replace those of the same names, frozen or not."""
    if model not in _USUAL:
        raise UserError(f"--model {model}: one of {', '.join(_USUAL)}")
    shared = (backbone or _USUAL[model][0], text_length, train_text, directions)
    if model == "blip_tdm":
        built = BlipTdm(*shared, first_token, train_tdm_head)
    elif model == "qformer":
        built = QformerCir(*shared)
    else:
        built = build_towers(*shared)
        d = built.width  # 0: the release's widths
        built.combiner = Combiner(d, p or d, h or 2 * d, dropout) if model == "combiner" else Sum()
    built.set_tau(tau, learn_tau)
    built.preprocess = built.preprocess.with_pad(pad)
    if start:
        cir_model.start_from(built, start)
    return built


def load_cir(folder: str, device: str | torch.device = "cpu", backbone: str = "") -> CirModel:
    """The model that main() saved in folder, in eval mode; UserError if weights and config do not belong together.

    backbone: where its CLIP or BLIP lies now, if not where it was; the hash of what is frozen must be the same."""
    config = cir_model.read_settings(folder)
    model = build_cir(**cir_model.find_again(config, folder, backbone), tau=config["tau"])
    put_trained(model, load_tensors(folder, "model.safetensors"), folder)
    cir_model.check_frozen(model, config, folder)
    return model.eval().to(device)


# ---- Algorithm 3: losses of the rows of this rank against those of all ranks ----


def matching(model: CirModel) -> bool:
    return TDM and hasattr(model, "match")


def gather_batch(model: CirModel, x: Tensor, c: Tensor, tokens: Tensor) -> Everyone | None:
    """None where no loss asks for it: the patch tokens of all ranks are large."""
    if not matching(model) and not BIDIRECTIONAL:
        return None
    return Everyone(*(ranks.gather_parts(rows.detach(), BATCH) for rows in (x, c, tokens)))


def contrastive_loss(model: CirModel, x: Tensor, c: Tensor, batch: Batch, bank: Bank | None) -> Tensor:
    """Eq. 2, L_tcc: this rank's share."""
    hardness = _USUAL[MODEL][2] if BETA == "auto" else float(BETA)
    others = bank.without(batch.targets) if bank else None
    of_one = l_tcc_ranks if x.ndim == 2 else l_tcc_max_ranks  # a picture has several vectors
    loss = functools.partial(of_one, tau=model.tau, alpha=ALPHA, beta=hardness, bank=others)
    n = BATCH if TRIPLETS else 0  # human rows
    if CONCAT or n in (0, len(x)):
        return loss(x, c, n)
    return loss(x[:n], c[:n], n) + loss(x[n:], c[n:], 0)


def matching_loss(model: BlipTdm, everyone: Everyone, batch: Batch, noise, compute: Compute) -> Tensor:
    """Eq. 3, L_tdm: this rank's share of the mean over all pairs. Negatives are drawn in fp32, outside autocast."""
    if not matching(model):
        return model.tau.new_zeros(())
    negatives = draw_negatives(everyone.x, everyone.c, batch.targets, model.tau.item(), noise)
    with compute.autocast():
        losses = tdm_loss(model, everyone.tokens, batch.deltas, batch.own, negatives)
    return losses.sum() / (len(batch.draws) + 2 * len(negatives.rows))


def tdm_loss(model: BlipTdm, tokens: Tensor, deltas: list[str], own: list[int], negatives: tuple) -> Tensor:
    """Cross entropies of (target, delta), (hard target, delta), (target, hard delta) for the rows `own` of the batch.

    tokens (G, P, D) and deltas are those of the whole batch, as hard negatives lie anywhere in it."""
    here = set(own)
    mine = [row for row in zip(*(part.tolist() for part in negatives), strict=True) if row[0] in here]
    image = own + [target for _, target, _ in mine] + [row for row, _, _ in mine]
    text = own + [row for row, _, _ in mine] + [delta for _, _, delta in mine]
    matched = (torch.arange(len(image), device=tokens.device) < len(own)).long()
    return F.cross_entropy(model.match(tokens[image], [deltas[i] for i in text]), matched, reduction="none")


def reversed_loss(
    model: CirModel, reference: Tensor, everyone: Everyone, batch: Batch, noise, compute: Compute
) -> Tensor:
    """[Bi], which target, changed by the text that leads back, gives the reference? This rank's share of the mean."""
    back = [d.delta if REVERSED_TEXT == "token" else d.back or None for d in batch.draws]
    rows = [k for k, i in enumerate(batch.own) if back[i] is not None]  # of reference
    if not BIDIRECTIONAL or not rows:
        return model.tau.new_zeros(())
    own = [batch.own[k] for k in rows]
    targets = torch.tensor(own)  # CLIP composes each text with every target: here is its own, the positive
    if not model.factorises:
        drawn = draw_candidates(everyone.x, everyone.c, batch.targets, model.tau.item(), REVERSED_NEGATIVES, noise)
        targets = drawn[own]  # BLIP with a few, as nothing factorises: its own target, then hard ones
    with compute.autocast():
        texts = [back[i] for i in own]
        loss = model.reversed_loss(reference[rows], texts, everyone.tokens, targets.to(reference.device))
    return loss / sum(text is not None for text in back)


# ---- the run ----


def check_flags() -> None:
    at_least(globals(), BATCH=1, EPOCHS=0, STEPS=0, VIEWS=0, LOG_EVERY=1, SAVE_EVERY=1, VAL_EVERY=1, WORKERS=0)
    if PAD and not PAD >= 1:
        raise UserError(f"--pad {PAD}: wanted a ratio of the longer side to the shorter, 1 or more, or 0 for none")
    if TEXT_PROJ_LR != 1 and MODEL not in ("sum", "combiner"):
        raise UserError(f"--text_proj_lr is for --model sum or combiner on BLIP; {MODEL} trains all at one rate")
    if MODEL == "qformer" and (BIDIRECTIONAL or BANK):
        what = "--bidirectional: no direction token" if BIDIRECTIONAL else "--bank: its pictures have several vectors"
        raise UserError(f"--model qformer and {what}; leave it out, or take combiner, sum or blip_tdm")
    at_least(globals(), TAU=1e-4, ALPHA=1e-4, LR=0, WEIGHT_DECAY=0, BETAS=0, BIDIRECTIONAL=0, REVERSED_NEGATIVES=0)
    at_least(globals(), TEXT_PROJ_LR=0, TEXT_LENGTH=0, ROTATE=0, CROP_RATIO=0.01)
    at_least(globals(), COMBINER_P=0, COMBINER_H=0, COMBINER_DROPOUT=0)
    below(globals(), COMBINER_DROPOUT=1, BETAS=1)
    within(globals(), FLIP=(0, 1), CROP_SCALE=(0, 1), JITTER=(0, 1), TRANSLATE=(0, 1))
    one_of(globals(), MODEL=_USUAL, REVERSED_TEXT=("token", "delta"))
    one_of(globals(), FIRST_TOKEN=("enc", "cls"), JOIN=("forward", "reverse"))
    if DTYPE in ("fp16", "float16"):
        raise UserError("--dtype fp16: nothing here scales the loss, small gradients become 0; take bf16 or fp32")
    if BETA != "auto" and not str(BETA).replace(".", "", 1).isdecimal():
        raise UserError(f"--beta {BETA}: wanted a number from 0, or auto")
    if not TRIPLETS and not PSEUDO:
        raise UserError("nothing to train on: --triplets true, or --pseudo with a pseudo.jsonl")


def read_sources() -> list[Source]:
    """D (stream 0, human) and D' (stream 1, auxiliary); one of them may be empty."""
    human = auxiliary = Source()
    if TRIPLETS:
        elsewhere = {"keys": KEYS, "pool": POOL, "hold_out": HOLD_OUT}
        human = streams.human_source(DATASET, ROOT, SPLIT, IMAGES, SAME_PAIRS, SAME_DELTAS, **elsewhere)
    elif DATASET == "jsonl" and ROOT and HOLD_OUT:
        human = streams.held_source(ROOT, IMAGES, KEYS, POOL, HOLD_OUT)
    if PSEUDO:
        auxiliary = streams.pseudo_source(PSEUDO, PSEUDO_IMAGES, PSEUDO_KEYS, POOL)
    return [human, auxiliary]


def complete_data(sources: list[Source], validation: Validation, size: int, workers: int) -> tuple[list, Validation]:
    """What has its images; UserError if triplets are too few, lack what a flag asks for, or cannot be measured."""
    sources = streams.complete_sources(sources, BATCH, size, OUT, workers, BANK)
    validation = begin_validation(validation, VAL_SPLIT, MISSING, OUT, workers, sources)
    if BIDIRECTIONAL and REVERSED_TEXT == "delta":
        streams.say_backs(sources)
    return sources, validation


def model_settings() -> dict:
    """The arguments of build_cir that stand in config.json."""
    build = {"model": MODEL} | cir_model.places_of(BACKBONE, START_FROM, _USUAL[MODEL][0])
    build |= {"text_length": TEXT_LENGTH, "train_text": TRAIN_TEXT}
    build["directions"] = bool(BIDIRECTIONAL) and REVERSED_TEXT == "token"
    build |= {"pad": PAD} if PAD else {}
    if MODEL == "combiner":
        build |= {"p": COMBINER_P, "h": COMBINER_H, "dropout": COMBINER_DROPOUT}
    elif MODEL == "blip_tdm":
        build |= {"first_token": FIRST_TOKEN, "train_tdm_head": TRAIN_TDM_HEAD}
    return build


def make_optimizer(model: CirModel) -> torch.optim.Optimizer:
    """AdamW over the trained weights; a learned tau has no weight decay."""
    weights = [p for name, p in trained_of(model).items() if name != "tau"]
    if not weights:
        raise UserError(f"--model {MODEL} --train_text false trains nothing: take a Combiner, or train the text")
    groups = [{"params": weights}]
    if TEXT_PROJ_LR != 1:
        groups = text_proj_apart(trained_of(model), TEXT_PROJ_LR)
    if LEARN_TAU:
        groups.append({"params": [model.tau], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> float:
    rate = 0.5 * LR * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)
    return rate


def resume(model: CirModel, optimizer, constants: dict, pictures: Pictures) -> tuple[int, dict | None]:
    """-> steps done, and the best measured one so far, from the newest training state in OUT."""
    if not (found := resume_state(OUT, constants, pictures, files.MAY_CHANGE | _FREE)):
        return 0, None
    start, state = found
    put_trained(model, state["weights"], OUT)
    optimizer.load_state_dict(state["optimizer"])
    say(f"resumed after step {start}")
    return start, state["best"]


def summed(**shares: Tensor) -> dict[str, float]:
    """The losses of all ranks, for the log."""
    return {name: float(all_sum(share)) for name, share in shares.items()}


def measure(model: CirModel, validation: Validation, step: int, best: dict | None, compute: Compute, log) -> dict:
    """Logs the recalls of this step -> the best measured step so far."""
    recalls = validate(model, validation, compute)
    log.write(step=step, val=VAL_SPLIT, **recalls)
    say(f"step {step}: {VAL_SPLIT}", *(f"{name} {value:.2f}" for name, value in recalls.items()))
    if best and recalls["score"] <= best["score"]:
        return best
    return {"score": recalls["score"], "step": step, "weights": get_trained(model) if KEEP_BEST else None}


def save_model(
    model: CirModel, settings: dict, steps: int, best: dict | None, protocol: str, constants: dict, pairs: dict
) -> None:
    """Writes OUT/model.safetensors, of the best measured step or the last, OUT/config.json, in which tau stands, and
    OUT/trained_on.safetensors."""
    kept = best if best and KEEP_BEST else {"step": steps, "weights": get_trained(model)}
    weights = dict(kept["weights"])
    tau = weights.pop("tau", model.tau).item()
    config = {"stage": "cir", "build": settings, "near": cir_model.places_near(settings, OUT)}
    config |= {"step": kept["step"], "tau": tau, "constants": constants}
    if best:
        config["val"] = {"split": VAL_SPLIT, "protocol": protocol, "score": best["score"], "step": best["step"]}
    save_folder(OUT, pairs | {"model.safetensors": weights}, {"config.json": config})
    say(f"wrote {OUT}/model.safetensors: {MODEL} after step {kept['step']}")


def main() -> None:
    world = ranks.init_world(DEVICE)
    compute = Compute.on(world.device, DTYPE, BATCH, WORKERS)
    check_flags()

    # data: what to train on and to measure, checked before a model loads
    settings = model_settings()
    sources = read_sources()
    validation = read_validation(DATASET, ROOT, VAL_SPLIT, IMAGES, KEYS, POOL, HOLD_OUT, JOIN)
    if CHECK:
        return streams.check_items(sources, validation.benchmarks, CHECK_DECODE, WORKERS, f"{OUT}/missing.txt")
    lock_folder(OUT, "cir")
    sources, validation = complete_data(sources, validation, world.size, compute.workers)
    pairs = trained_pairs(sources, settings.get("start", ""))  # evaluation says how many of its queries are among them
    epochs = EPOCHS or _USUAL[MODEL][1]
    steps = STEPS or epochs * streams.steps_an_epoch(sources, BATCH, world.size)

    # model
    torch.manual_seed(SEED)  # the start of a Combiner, of [FORWARD] and [BACKWARD]
    model = build_cir(**settings, tau=TAU, learn_tau=LEARN_TAU).to(world.device).train()
    model.say_losses(streams.texts_of(sources))
    model.say_losses([query.delta for benchmark in validation.benchmarks for query in benchmark.queries])
    optimizer = make_optimizer(model)

    # resume: what is drawn is a function of (seed, step), so weights and optimiser are the whole state
    constants = constants_of(globals()) | {"RANKS": world.size}
    constants |= streams.data_sha256(sources, validation.benchmarks)
    constants["FROZEN_SHA256"] = frozen_sha256(model)  # load_cir compares it
    start, best = resume(model, optimizer, constants, streams.pictures_of(sources, validation.benchmarks))
    if is_finished(OUT, "model.safetensors", start, steps):
        return
    log = ranks.Log(OUT, resume_step=start)

    # images: augmented anew and decoded one step ahead, or views of each that are encoded now
    augmented = Augmentation(SEED, CROP_SCALE, CROP_RATIO, FLIP, JITTER, TRANSLATE, ROTATE)  # [S6.1]
    images = TrainingImages(model, sources, augmented if AUGMENT else None, compute)
    bank = images.bank() if BANK else None
    images.keep_views(VIEWS, OUT)

    # Algorithm 3: each step draws B triplets of D and B' of D', over all ranks
    draw = functools.partial(draw_batch, sources, batch=BATCH, seed=SEED, world=world)
    watch = ranks.Stopwatch()
    bar = progress(images.follow(range(start, steps), draw, SEED, OUT), "training", steps, start)
    for batch, tokens in bar:
        # dropout and the rate are functions of the step
        seeds.seed_step(SEED, batch.step, world.rank)
        rate = set_rate(optimizer, batch.step, steps)

        # this rank's rows: x of the targets, c of the references with their deltas
        reference, target = tokens.chunk(2)  # (n, ...) each, of the frozen vision encoder
        with compute.autocast():
            x = model.target(target)  # (n, d)
            c = model.compose(reference, batch.own_deltas)  # (n, d)

        # Eq. 2: HN-NCE over B, and over B + B'
        tcc = contrastive_loss(model, x, c, batch, bank)

        # Eq. 3 and [Bi]: their negatives may be any rank's, so all ranks draw the same
        everyone = gather_batch(model, x, c, target)
        noise = seeds.seeded_generator("step", SEED, batch.step, 0)
        tdm = matching_loss(model, everyone, batch, noise, compute)
        rev = reversed_loss(model, reference, everyone, batch, noise, compute)

        # a loss is this rank's share: shares and gradients add up over the ranks
        loss = tcc + tdm + BIDIRECTIONAL * rev
        optimizer.zero_grad()
        loss.backward()
        ranks.all_reduce_gradients(model.parameters())
        norm = ranks.gradient_norm(model.parameters())
        remedy = "a lower --lr or a higher --tau"
        batches.stop_if_not_finite(batch.step + 1, loss.item() + norm, batch.own_draws, log, remedy)
        optimizer.step()
        model.clamp_tau()

        # log
        done = batch.step + 1
        last = done == steps
        if last or done % LOG_EVERY == 0:
            record = summed(loss=loss, tcc=tcc, tdm=tdm, rev=rev)
            record |= {"lr": rate, "grad_norm": norm, "tau": model.tau.item(), "images": images.encoded_by_all()}
            record |= ranks.pace(watch.seconds(), done - start, steps - done, len(batch.draws))
            log.write(step=done, **record)
            bar.set_postfix(loss=record["loss"])

        # validate, and keep the best step
        if VAL_SPLIT and (last or done % VAL_EVERY == 0):
            with watch.paused():
                best = measure(model, validation, done, best, compute, log)

        # save, and stop where a signal asks for it
        stop = any_rank(stop_requested()) and not last
        if stop or last or done % SAVE_EVERY == 0:
            state = {"weights": get_trained(model), "optimizer": optimizer.state_dict(), "best": best}
            save_state(OUT, done, state, constants)
        if stop:
            say(f"stopped after step {done} of {steps}; the same command goes on from there")
            raise SystemExit(143)

    save_model(model, settings, steps, best, validation.says, constants, pairs)
    ranks.barrier()


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "a smaller --batch, on more GPUs for as many negatives", planned=False))
