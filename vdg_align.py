"""Stage 1, alignment [S3.1, Algorithm 1]: a projection learns to turn Q-Former outputs into tokens of a frozen LLM.

    python vdg_align.py --chat cc3m/chat.json --images cc3m/images --llm meta-llama/Llama-2-7b-hf
    torchrun --nproc_per_node 8 vdg_align.py --chat cc3m/chat.json --images cc3m/images

Reads a vision side (InstructBLIP or BLIP-2; the language model inside is never read), a LLaMA, LLaVA-like captions.
Writes OUT/projection.safetensors, OUT/config.json, OUT/log.jsonl, OUT/last/ (training state: the same command resumes).
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import math
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from common import memory
from common.annotations import Caption, read_chat
from common.batches import ahead, check_texts, drop_missing, fingerprint, steps_of, stop_together
from common.console import UserError, progress, run, say
from common.files import MAY_CHANGE, load_state, lock_folder, save_folder, save_state
from common.flags import at_least, constants_of, override
from common.hub import located
from common.images import ImageStore, Preprocess, check_report, load_pixels
from common.llama import answer_ids, attention, llm_shape, load_llm, run_layers, tokenize
from common.pretrained import read_config, read_exactly
from common.ranks import (
    Log,
    all_reduce_gradients,
    all_sum,
    any_rank,
    gather_objects,
    gather_with_grad,
    init_world,
    pick_dtype,
    stop_requested,
)

# ---- models ----
VISION = "Salesforce/instructblip-vicuna-13b"  # ViT + Q-Former: folder or hub id, InstructBLIP or BLIP-2 [S4.1]
LLM = "meta-llama/Llama-2-13b-hf"  # LLaMA: folder or hub id [S4.1]; 7B and 13B-chat in [Table 7]
QUANTIZE = ""  # "" keeps the LLM in DTYPE; "int8" or "nf4" by bitsandbytes where memory is short [ours]

# ---- data ----
CHAT = "chat.json"  # captions in LLaVA's format; LLaVA-CC3M-Pretrain-595K in the paper [S4.1]
IMAGES = "images"  # folder of the images that CHAT names
MAX_CHARACTERS = 2000  # a longer caption stops the run at start-up rather than exhaust memory at step 4,000 [ours]

# ---- training ----
EPOCHS = 1  # passes over CHAT [S4.1]
BATCH = 64  # captions per GPU and forward pass [S4.1]
KEEP = False  # encode each image once, its Q-Former outputs stay in host memory, 96 KiB each: for EPOCHS > 1 [ours]
ENCODE_BATCH = 64  # images per forward pass when they are encoded once [ours]
ACCUMULATE = 1  # forward passes per optimiser step; 512 captions a step in the paper: 8 GPUs x 64 x 1 [ours]
LR = 1e-3  # peak learning rate [S4.1]
WARMUP = 0.03  # share of the steps over which the rate rises linearly [ours: the paper is silent; LLaVA's value]
FLOOR = 0.0  # the rate falls along a cosine to this share of LR [ours: the paper is silent; LLaVA decays to zero]
BETAS = (0.9, 0.99)  # AdamW [S4.1]
WEIGHT_DECAY = 0.05  # AdamW [S4.1]
CLIP = 1.0  # largest gradient norm, 0 = no clipping [ours: the paper is silent]
CHECKPOINT = False  # keep each layer's input alone for the backward pass: less memory, a third more work [ours]
START = 0.1  # size of an image token at the start, in word embeddings; PyTorch's default start drowns the words [ours]

# ---- run ----
OUT = "out/align"  # folder of the checkpoint and the log
SEED = 0  # fixes the projection's start and the order of the captions
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the frozen models: bf16 on cuda [S4.1], fp32 on CPU; the projection itself stays fp32 [ours]
SAVE_EVERY = 100  # steps between training states in OUT/last
WORKERS = 8  # threads that decode images
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK = False  # only look at the data: counts of expected, present and unreadable images, then stop


# ---- reading checkpoints ----


# ---- vision: ViT + Q-Former (frozen) + projection (trained) [S3.1] ----
def vision_classes(kind: str) -> tuple[type, type]:
    if kind == "instructblip":
        return transformers.InstructBlipVisionModel, transformers.InstructBlipQFormerModel
    return transformers.Blip2VisionModel, transformers.Blip2QFormerModel


def vision_weights(source: str) -> int:
    """How many weights ViT and Q-Former have; those of InstructBLIP are known without a download."""
    if not os.path.isdir(source):
        return 1_170_000_000  # ViT-g/14 0.99, Q-Former of InstructBLIP 0.18
    config = read_config(source, ("instructblip", "blip-2"))
    vit, qformer = vision_classes(config.model_type)
    with torch.device("meta"):
        models = vit(config.vision_config), qformer(config.qformer_config)
    return sum(p.numel() for model in models for p in model.parameters())


class VisionProjector(nn.Module):
    """Pixels (B, 3, S, S) -> Q-Former outputs (B, Q, q_width), frozen -> projection (B, Q, D), D the LLM's width."""

    def __init__(self, source: str, d_llm: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        config = read_config(source, ("instructblip", "blip-2"))
        self.takes_text = config.model_type == "instructblip"  # its Q-Former insists on an input_ids argument
        vit, qformer = vision_classes(config.model_type)
        q_width = config.qformer_config.hidden_size
        self.projection = nn.Linear(q_width, d_llm)  # first, so that its start depends on the seed alone
        with torch.device(device):
            self.vision_model = vit(config.vision_config)
            self.qformer = qformer(config.qformer_config)
            self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, q_width))
        self._load(source)
        self.requires_grad_(False).to(device=device, dtype=dtype)
        self.projection.requires_grad_(True).float()  # AdamW's steps at lr 1e-3 would be lost in bf16's 8 bits
        self.eval()  # the Q-Former has dropout 0.1
        self.preprocess = Preprocess.from_folder(source, "instructblip")

    def _load(self, source: str) -> None:
        """Strict, by prefix: from_pretrained of one part of a whole checkpoint gives random weights and only warns."""
        wanted = {n: t for n, t in self.state_dict().items() if not n.startswith("projection.")}
        shapes = {name: tensor.shape for name, tensor in wanted.items()}
        prefixes, stored = ("vision_model.", "qformer.", "query_tokens"), ("position_ids",)  # an arange of older files
        for name, tensor in read_exactly(source, shapes, prefixes, ignored=stored, flag="--vision"):
            wanted[name].copy_(tensor)

    @torch.no_grad()
    def queries(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> (B, Q, q_width): the learned queries once they attended to the image, no text."""
        patches = self.vision_model(pixels.to(self.query_tokens)).last_hidden_state  # (B, P, D), already layer-normed
        prompt = {"input_ids": None} if self.takes_text else {}
        start = self.query_tokens.expand(len(pixels), -1, -1)
        return self.qformer(query_embeds=start, encoder_hidden_states=patches, **prompt).last_hidden_state

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """queries (B, Q, q_width) -> tokens in the LLM's embedding space (B, Q, D), fp32 as the projection."""
        return self.projection(queries.to(self.projection.weight))


# ---- language model (frozen) ----
@torch.no_grad()
def start_quietly(projection: nn.Linear, size: float) -> None:
    """Gaussian weights, no bias: for Q-Former outputs, which are layer-normed, each coordinate starts with std `size`.

    An image token far larger than a word hardly changes from layer to layer (what the layers add is of a word's size),
    so nothing the LLM knows to do with words is done with it: on the embedded world captions came out well and
    comparisons did not."""
    projection.weight.normal_(std=size / projection.in_features**0.5)
    projection.bias.zero_()


# ---- text pieces and image tokens -> one batch of embeddings ----


class Packed(NamedTuple):
    """Rows of different length as one line of tokens without padding; only attention sees the rows again."""

    embeddings: torch.Tensor  # (N, D)
    positions: torch.Tensor  # (N,) place of each token in its row
    slots: torch.Tensor  # (B, T) token at each place of each row; after a row's end its last token, which nobody reads
    home: torch.Tensor  # (N,) one place b * T + t of each token: where its attention output is taken from
    predict: torch.Tensor  # (M,) tokens that predict a supervised one
    labels: torch.Tensor  # (M,) the ids that they predict


def pack(embed: nn.Embedding, rows: list[list], answers: list[list[int]] | None = None, share: bool = True) -> Packed:
    """Rows of pieces (each a list of ids, or image tokens (Q, D)), each followed by its answer (ids with a loss).

    Ids come from separately tokenised pieces, in training as in generation. share: rows that begin with the same pieces
    (equal ids: the instruction; the very same image tensor) hold these once, as a tree does. Attention is causal, so
    loss and gradients are the same; LoRA's dropout draws one mask for what is shared [ours: a fifth less work]."""
    ids, images, is_image, positions, slots, home, predict, labels = [], [], [], [], [], [], [], []
    known: dict[tuple, range] = {}  # pieces from the start of a row -> the tokens of the last of them
    for row, answer in zip(rows, answers or [[] for _ in rows], strict=True):
        path, slot = (), []
        for piece in (*row, answer):
            path += (id(piece) if torch.is_tensor(piece) else tuple(piece),)
            if not share or path not in known:
                known[path] = range(len(ids), len(ids) + len(piece))
                positions += range(len(slot), len(slot) + len(piece))
                home += [(len(slots), len(slot) + i) for i in range(len(piece))]
                is_image += [torch.is_tensor(piece)] * len(piece)
                ids += [0] * len(piece) if torch.is_tensor(piece) else piece
                images += [piece] if torch.is_tensor(piece) else []
            slot += known[path]
        predict += slot[len(slot) - len(answer) - 1 : -1]
        labels += answer
        slots.append(slot)
    longest = max(map(len, slots))
    slots = [slot + slot[-1:] * (longest - len(slot)) for slot in slots]
    home = [b * longest + t for b, t in home]
    device = embed.weight.device
    numbers = (torch.tensor(x, dtype=torch.long, device=device) for x in (ids, positions, slots, home, predict, labels))
    ids, *numbers = numbers
    x = embed(ids)  # (N, D)
    if images:
        x = x.masked_scatter(torch.tensor(is_image, device=device)[:, None], torch.cat(images).to(x))
    return Packed(x, *numbers)


# ---- the LLaMA's layers spelled out: training packs its rows, generation keeps keys and values in its own place ----


def caption_loss(llm: nn.Module, batch: Packed, tokens: float, checkpoint: bool = False) -> torch.Tensor:
    """Eq. 1: next-token cross-entropy summed over supervised positions / tokens (those of the whole step, all ranks).

    HF's own loss is a mean per rank and batch: averaged over ranks, it weighs short captions more. Linears see no
    padding; attention, a few percent of the work, sees right-padded rows, where causal order is all the mask it needs.
    """

    def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of x (n, H, d) -> (*index.shape, H, d); embedding's backward adds up repeated rows in a fixed order."""
        return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])

    def attend(_, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(*(take(x, batch.slots) for x in (q, k, v)), causal=True)  # (B, T, H, d)
        return take(out.flatten(0, 1), batch.home)

    hidden = run_layers(llm, batch.embeddings, batch.positions, attend, batch.predict, checkpoint)
    logits = llm.lm_head(hidden).float()  # (M, V): a fifth of the positions
    return F.cross_entropy(logits, batch.labels, reduction="sum") / tokens


def caption_row(tokenizer, caption: Caption, image: torch.Tensor) -> list:
    """Pieces of one caption's prompt: the instruction and the image tokens (Q, D) in the order of the data."""
    start, prompt = [tokenizer.bos_token_id], caption.prompt.strip()
    if caption.image_first:
        return [start, image, tokenize(tokenizer, f"\n{prompt}\n")]
    return [start + tokenize(tokenizer, f"{prompt}\n"), image, tokenize(tokenizer, "\n")]


# ---- one run: order, start, faults ----


def stop_not_finite(step: int, loss: float, norm: float, mine: float, names: list[str]) -> None:
    """All ranks, before the optimiser steps; loss and norm are of all ranks, mine and names of this one."""
    guilty = [name for part in gather_objects([] if math.isfinite(mine) else names) for name in part]
    raise UserError(
        f"step {step}: loss {loss}, gradient norm {norm}; the last state saved is good; items: "
        f"{', '.join(guilty[:16]) or 'any of this step'}; try a lower --lr, or look at these items"
    )


def encode(vision: VisionProjector, images, names: list[str], views, batch: int, workers: int, world) -> dict:
    """Q-Former outputs {name: (K, Q, q_width) on the CPU}, the same on all ranks; views: name -> list of K transforms.

    Ranks share the work, in chunks that do not depend on their number: a chunk's size can change the last bit."""
    chunks = [names[at : at + batch] for at in range(0, len(names), batch)]
    groups = [chunks[at : at + world.size] for at in range(0, len(chunks), world.size)]

    def load(group):
        mine = group[world.rank] if world.rank < len(group) else []
        transforms = [transform for name in mine for transform in views(name)]
        repeated = [name for name in mine for _ in views(name)]
        return load_pixels(images, repeated, transforms, workers) if mine else None

    found = {}
    for group, pixels in progress(ahead(load, groups), "encode", len(groups)):
        stop_together(pixels)
        queries = vision.query_tokens[:0] if pixels is None else vision.queries(pixels)
        k = len(views(group[0][0]))
        queries = gather_with_grad(queries.reshape(len(queries) // k, k, *queries.shape[1:]))
        found |= zip([name for chunk in group for name in chunk], queries.cpu(), strict=True)
    return found


def main() -> None:
    transformers.logging.set_verbosity_error()
    world = init_world(DEVICE)
    dtype = pick_dtype(DTYPE, world.device)
    at_least(globals(), EPOCHS=1, BATCH=1, ENCODE_BATCH=1, ACCUMULATE=1, SAVE_EVERY=1, WORKERS=0)
    at_least(globals(), LR=0, WARMUP=0, FLOOR=0, CLIP=0, WEIGHT_DECAY=0, START=0)
    shape, size = llm_shape(LLM), 2 if PLAN and DTYPE == "auto" else dtype.itemsize

    def parts(quantize: str, checkpoint: bool, batch: int) -> dict[str, float]:
        trained, tokens = (768 + 1) * shape.width, (60, 15)  # of a caption of CC3M with its prompt; supervised ones
        training = memory.training(shape, size, batch * tokens[0], batch * tokens[1], trained, 8, (), checkpoint)
        return memory.frozen(shape, quantize, size, vision_weights(VISION)) | training

    options = memory.options_of(parts, QUANTIZE, CHECKPOINT, BATCH)
    if PLAN:
        memory.say(options, [80, 40, 24])
        return
    captions, images = read_chat(CHAT), ImageStore(IMAGES)
    if CHECK:
        report, ok = check_report((caption.image for caption in captions), images)
        if not ok:
            raise UserError(report)
        say(report)
        return
    captions = drop_missing(captions, lambda caption: [caption.image], images, "captions")
    check_texts(((caption.id, caption.text) for caption in captions), CHAT, MAX_CHARACTERS)
    items = BATCH * ACCUMULATE * world.size
    total = EPOCHS * math.ceil(len(captions) / items)

    lock_folder(OUT)
    constants = {**constants_of(globals()), "items a step": items, "data": fingerprint(captions)}
    saved = load_state(OUT, constants, MAY_CHANGE | {"BATCH", "ACCUMULATE", "IMAGES", "CHECKPOINT"})
    done, state = saved or (0, None)
    if done >= total and os.path.exists(f"{OUT}/projection.safetensors"):
        say(f"{OUT} is finished ({total} steps); for another run take another --out")
        return

    memory.say(options, [memory.has(world.device)])
    torch.manual_seed(SEED)
    llm, tokenizer = load_llm(LLM, dtype, world.device, QUANTIZE)
    vision = VisionProjector(VISION, llm.config.hidden_size, world.device, dtype)
    weights = list(vision.projection.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    start_quietly(vision.projection, START * llm.get_input_embeddings().weight.float().std().item())
    if state:
        vision.projection.load_state_dict(state["projection"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"resuming after step {done} of {total}")

    everything = sorted({caption.image for caption in captions}) if KEEP else []
    kept = encode(vision, images, everything, lambda name: [vision.preprocess], ENCODE_BATCH, WORKERS, world)

    def load(job) -> torch.Tensor | None:
        """Pixels (or kept Q-Former outputs) of this rank's captions."""
        names = [captions[i].image for i in job[2]]
        if KEEP and names:
            return torch.cat([kept[name] for name in names])  # (n, Q, q_width)
        return load_pixels(images, names, vision.preprocess, WORKERS) if names else None

    log, began, seen = Log(OUT, done), time.time(), 0
    jobs = ahead(load, steps_of([[i] for i in range(len(captions))], EPOCHS, items, SEED, world, done))
    for (step, epoch, mine), inputs in progress(jobs, "align", total - done):  # Algorithm 1
        stop_together(inputs)
        warm = (step + 1) / max(1, WARMUP * total)
        fall = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / total)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * min(warm, fall)

        answers = [answer_ids(tokenizer, captions[i].text) for i in mine]
        tokens = all_sum(sum(map(len, answers)))  # Eq. 1's mean is over the step's tokens on all ranks
        share = 0.0  # of the loss, this rank's
        for at in range(0, len(mine), BATCH):
            images_in = inputs[at : at + BATCH].to(world.device)
            image_tokens = vision(images_in if KEEP else vision.queries(images_in))  # (B, Q, D)
            part = zip(mine[at : at + BATCH], image_tokens, strict=True)
            rows = [caption_row(tokenizer, captions[i], image) for i, image in part]
            batch = pack(llm.get_input_embeddings(), rows, answers[at : at + BATCH])
            loss = caption_loss(llm, batch, tokens, CHECKPOINT)
            loss.backward()
            seen += len(batch.home)
            share += loss.item()
        all_reduce_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, CLIP or math.inf).item()
        loss = all_sum(share)
        if not math.isfinite(loss + norm):
            stop_not_finite(step, loss, norm, share, [captions[i].id for i in mine])
        optimizer.step()
        optimizer.zero_grad()

        pace = (time.time() - began) / (step + 1 - done)  # seconds a step
        log.write(
            step=step + 1,
            epoch=epoch,
            loss=loss,
            lr=group["lr"],
            grad_norm=norm,
            items_per_s=round(items / pace, 2),
            tokens_per_s=round(all_sum(seen) / (time.time() - began)),  # on all ranks, none of them padding
            memory=memory.peak(world.device),  # GiB on this rank
            seconds_left=round(pace * (total - step - 1)),
        )
        stop = any_rank(stop_requested())
        if stop or (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            state = {"projection": vision.projection.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(OUT, step + 1, state, constants)
        if stop:
            say(f"stopped after step {step + 1} of {total}; the same command resumes")
            raise SystemExit(143)

    config = {"stage": "align", "vision": located(VISION), "llm": located(LLM), "quantize": QUANTIZE}
    config |= {"dim": llm.config.hidden_size, "steps": total, "captions": len(captions), "seed": SEED}
    save_folder(OUT, {"projection.safetensors": vision.projection.state_dict()}, {"config.json": config})
    say(f"wrote {OUT}/projection.safetensors")


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "--batch 16 --accumulate 4, --checkpoint true or --quantize nf4"))
