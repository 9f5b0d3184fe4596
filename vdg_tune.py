"""Stage 2, instruction tuning [S3.1, Algorithm 2]: projection and LoRA learn to say what turns reference into target.

    python vdg_tune.py --aligned out/align --root data/cirr --images data/img_raw --out out/vdg
    torchrun --nproc_per_node 8 vdg_tune.py --aligned out/align --dataset fashioniq --root data/fashioniq --out out/vdg

Reads OUT of vdg_align.py (it names the vision side and the LLM) and triplets: CIRR, FashionIQ, or a jsonl file.
Writes OUT/adapter_model.safetensors and adapter_config.json (they load with peft), OUT/projection.safetensors,
OUT/config.json, OUT/README.md (a model card), OUT/held_out.html (deltas beside the human ones), OUT/log.jsonl and
OUT/last/ (training state: the same command resumes). --merge FOLDER makes a plain LLaMA, or a Blip-2, of OUT.
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import math
import os
import shutil
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import vdg_align
from common import batches, files, held_out, llama, memory, ranks, seeds
from common.annotations import Triplet, training_triplets
from common.augment import Crop
from common.blip2 import write_blip2
from common.console import UserError, progress, run, say, warn
from common.decode import Sampling, describe, prompt_length, prompt_parts, prompt_pieces, start_engine
from common.disk import open_as_umask_says
from common.exports import adapter_config, require_adapter_config
from common.flags import at_least, below, constants_of, one_of, override, within
from common.hub import near, read_stage
from common.images import ImageStore, load_bytes, require_same_pixels
from common.llama import answer_ids, empty_llm, llm_shape, load_llm, load_tokenizer, make_optimizer, read_llm
from common.pretrained import copy_weights, read_config
from common.ranks import Log, World
from common.resume import resume_state
from common.same_model import require_same_models
from common.tokenizer import require_same, tokenizer_sha256
from common.triplets import groups_of, names_of
from vdg_align import Packed, VisionProjector, caption_loss, encode, pace, pack, share_start

# ---- data ----
ALIGNED = "out/align"  # checkpoint of vdg_align.py; its config.json names the vision side and the LLM
DATASET = "cirr"  # "cirr", "fashioniq" (its captions as one text) or "jsonl" (of several texts the first) [ours]
ROOT = "data/cirr"  # folder with captions/ and image_splits/, or the file of triplets
SPLIT = "train"  # split to learn from [S4.1]
CATEGORY = "all"  # FashionIQ: "dress", "shirt", "toptee" or all three
IMAGES = ""  # folder of the images; empty: the usual places in and beside ROOT
KEYS = ""  # jsonl: names of a record's parts elsewhere, reference=q_img,target=t_img,delta=q_text (see read_triplets)
POOL = ""  # jsonl files of {"did", "img_path"} in which the targets of KEYS are ids (M-BEIR)
HOLD_OUT = 0.0  # jsonl: so many triplets, or below 1 a share of them, are kept for evaluation, as in train_cir.py
HELD_OUT = 0.02  # share kept out, in whole pairs, one at least: a loss each epoch [ours: the paper uses all; 0 does]
MAX_CHARACTERS = 2000  # a longer delta stops the run at start-up rather than exhaust memory at step 4,000 [ours]

# ---- model ----
PROMPT = (
    "Request: Analyze given reference and target images and provide a description that transforms the reference to "
    "match the target.\nReference: <reference>\nTarget: <target>\nResponse:"
)  # [Fig. 3]; <reference> and <target> stand for 32 image tokens each
LLM = ""  # where the LLM of ALIGNED lies now, if its folder moved
VISION = ""  # where the vision side of ALIGNED lies now, if its folder moved
LORA_RANK = 64  # r [S4.1]; 32 and 128 in [Table 7]
LORA_ALPHA = 16.0  # the update is scaled by alpha / r [S4.1]
LORA_DROPOUT = 0.05  # on the input of A [S4.1]
QUANTIZE = ""  # "" as in ALIGNED; "none", "int8" or "nf4" (bitsandbytes) otherwise [ours]
LORA_TARGETS = ("q_proj", "v_proj")  # linears that carry LoRA [ours: the paper does not say; the release's choice]

# ---- training ----
EPOCHS = 10  # passes over the triplets [S4.1]
BATCH = 8  # triplets per GPU and forward pass [S4.1]
ACCUMULATE = 1  # forward passes per optimiser step [ours]
LR = 2e-4  # learning rate of projection and LoRA [S4.1]
WARMUP = 100  # steps over which the rate rises linearly [S4.1]
DECAY_AT = 0.5  # share of the epochs after which the rate falls [S4.1]
DECAY = 0.1  # factor by which it falls [S4.1]
BETAS = (0.9, 0.99)  # decay of AdamW's two moments [S4.1]
WEIGHT_DECAY = 0.05  # weight decay of AdamW [S4.1]
CLIP = 1.0  # largest gradient norm, 0 = no clipping [ours: the paper is silent]
SCALE = (0.8, 1.0)  # random resized crop, share of the area [S4.1]
RATIO = (0.9, 1.1)  # random resized crop, width / height [S4.1]
OPTIMIZER = "adamw"  # or "adamw8bit" (bitsandbytes), which keeps a quarter of the state [ours]
CHECKPOINT = False  # keep each layer's input alone for the backward pass: less memory, a third more work [ours]
TREE = False  # keep a subgroup's triplets together and hold each reference, cropped once, once a batch [ours: speed]
VIEWS = 0  # 0 = a fresh crop each time [S4.1]; K = K crops per image, encoded once, used in turn [ours: speed]
MAX_NEW = 32  # tokens at most of the deltas that held-out pairs are given after each epoch [ours]
SHOW = 24  # of them on the page held_out.html
ENCODE_BATCH = 64  # images per forward pass when views or held-out images are encoded [ours]

# ---- run ----
OUT = "out/vdg"  # folder of the checkpoint and the log
SEED = 0  # fixes LoRA's start, order, augmentation, dropout and the held-out triplets
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the frozen models: bf16 on cuda [S4.1], fp32 on CPU; trained weights stay fp32 [ours]
SAVE_EVERY = 100  # steps between training states in OUT/last
WORKERS = 16  # processes that decode images, one a CPU of this rank at most; 0 = none but its own
MERGE = ""  # fold the LoRA of the finished OUT into its LLM, write a plain Hugging Face model into this folder, stop
FORMAT = "llama"  # of MERGE: "llama", the LLM alone, or "blip2", all of the VDG as a Blip2ForConditionalGeneration
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at the data: counts of expected, present and unreadable images, then stop

# may change at a resume: a step stays as it is
_FREE = {"BATCH", "ACCUMULATE", "IMAGES", "CHECKPOINT", "SHOW", "MAX_NEW", "LLM", "VISION", "MERGE", "FORMAT"}


# ---- LoRA ----
class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A drop(x): W frozen (it may be quantised), A (r, in) and B (out, r) trained, in fp32."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # B = 0: training starts from the LLM as it is
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # on the CPU: the same start on every GPU
        self.to(base.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (B, T, r)
        return self.base(x) + F.linear(down, self.lora_B.to(x.dtype)) * self.scale


def add_lora(llm: nn.Module, rank: int, alpha: float, dropout: float, targets: tuple) -> None:
    """Wrap every linear of the LLM whose last name is in targets."""
    names = [name for name, module in llm.named_modules() if name.split(".")[-1] in targets]
    absent = set(targets) - {name.split(".")[-1] for name in names}
    if absent or not names or rank < 1:
        what = f"LoRA of rank {rank} on {', '.join(targets)}"
        raise UserError(f"{what}: the LLM has no {', '.join(absent) or 'such'} module; look at --lora_targets")
    for name in names:
        llm.set_submodule(name, LoRALinear(llm.get_submodule(name), rank, alpha, dropout))


def lora_weights(llm: nn.Module) -> list[nn.Parameter]:
    return [weight for module in lora_modules(llm).values() for weight in (module.lora_A, module.lora_B)]


def lora_modules(llm: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in llm.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(llm: nn.Module) -> None:
    """W <- W + (alpha / r) B A and the plain linear back in place: generation then pays nothing for LoRA."""
    for name, module in lora_modules(llm).items():
        assert type(module.base) is nn.Linear, "a quantised weight cannot take the update"
        weight = module.base.weight
        weight.data = merged_weight(weight, module.lora_A, module.lora_B, module.scale)
        llm.set_submodule(name, module.base)


def merged_weight(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W (out, in), A (r, in), B (out, r) -> W + scale B A, added in fp32, in the dtype of W."""
    return (weight.float() + scale * up.float() @ down.float()).to(weight.dtype)


def adapter_tensors(llm: nn.Module) -> dict[str, torch.Tensor]:
    """LoRA's weights under PEFT's names."""
    tensors = {}
    for name, module in lora_modules(llm).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.lora_B.detach()
    return tensors


def load_adapter(llm: nn.Module, folder: str, lora: dict) -> None:
    """Add the LoRA saved in a folder to the LLM; lora are the settings that it was trained with, from config.json."""
    require_adapter_config(folder, lora)
    add_lora(llm, lora["rank"], lora["alpha"], lora["dropout"], tuple(lora["targets"]))
    fill_lora(llm, files.load_tensors(folder, "adapter_model.safetensors"), folder)


def fill_lora(llm: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy PEFT-named tensors into the LLM's LoRA: every name and every shape must agree."""
    copy_weights(adapter_tensors(llm), tensors, f"{where}: wrong LLM or file")


def check_saved(llm: nn.Module, folder: str) -> None:
    """What was saved, read back as a later stage reads it, must give the outputs of the modules that were trained."""
    tensors = files.load_tensors(folder, "adapter_model.safetensors")
    config = files.read_json(f"{folder}/adapter_config.json")
    for name, module in lora_modules(llm.eval()).items():
        again = LoRALinear(module.base, config["r"], config["lora_alpha"], 0.0).eval()
        again.lora_A.data.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        again.lora_B.data.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
        x = torch.linspace(-1, 1, module.lora_A.shape[1], device=module.lora_A.device).to(llm.dtype)
        with torch.no_grad():
            assert torch.equal(module(x[None]), again(x[None])), f"{folder}: LoRA of {name} does not survive saving"


# ---- prompt [Fig. 3] ----
def delta_row(pieces: list, reference: torch.Tensor, target: torch.Tensor) -> list:
    """Row for pack: prompt_pieces with the image tokens (Q, D) of one pair in their places."""
    images = {"<reference>": reference, "<target>": target}
    return [images[piece] if isinstance(piece, str) else piece for piece in pieces]


# ---- the trained model ----
def load_vdg(folder: str, device: torch.device | str, dtype: torch.dtype, llm: str = "", vision: str = ""):
    """A checkpoint of this script -> (vision projector, LLM with LoRA in eval mode, tokenizer, config.json as dict)."""
    config = read_stage(folder, "tune", llm, vision)
    require_same_models(config, folder)
    model, tokenizer = load_llm(config["llm"], dtype, device, config["quantize"])
    require_same(tokenizer, config, folder)
    load_adapter(model, folder, config["lora"])
    projector = VisionProjector(config["vision"], model.config.hidden_size, device, dtype)
    require_same_pixels(projector.preprocess, config, folder, "--vision")
    load_projection(projector, folder)
    return projector, model.requires_grad_(False).eval(), tokenizer, config


def write_merged(folder: str, out: str, kind: str, dtype: str, llm: str = "", vision: str = "") -> None:
    """A checkpoint of this script -> a folder of plain Hugging Face with LoRA in its weights; dtype "auto": the LLM's.

    kind: "llama", without a place for pictures, or "blip2", the whole. A quantised base is read in full precision."""
    if os.path.exists(out):
        raise UserError(f"--merge {out} exists; name a new folder")
    config = read_stage(folder, "tune", llm, vision)
    require_same_models(config, folder)
    of_llm = read_config(config["llm"], ("llama",)).dtype
    precision = of_llm if dtype == "auto" and of_llm else ranks.pick_dtype(dtype, "cpu")
    aside = f"{out.rstrip('/')}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    (merge_llama if kind == "llama" else merge_blip2)(folder, config, aside, precision)
    open_as_umask_says(aside)
    os.rename(aside, out)
    what = "a LLaMA" if kind == "llama" else "a Blip2ForConditionalGeneration"
    say(f"wrote {out}, {what} with the LoRA of {folder} in its weights")


def merge_llama(folder: str, config: dict, aside: str, dtype: torch.dtype) -> None:
    merged, tokenizer = load_llm(config["llm"], dtype, "cpu")
    load_adapter(merged, folder, config["lora"])
    merge_lora(merged)
    merged.save_pretrained(aside, max_shard_size="5GB")
    tokenizer.save_pretrained(aside)


def merge_blip2(folder: str, config: dict, aside: str, dtype: torch.dtype) -> None:
    """The LLM passes through one tensor at a time."""
    tokenizer = load_tokenizer(config["llm"])
    require_same(tokenizer, config, folder)
    shapes, of_llm = empty_llm(config["llm"], dtype)
    load_adapter(empty_llm(config["llm"], dtype)[0], folder, config["lora"])  # checks names and shapes
    lora = files.load_tensors(folder, "adapter_model.safetensors")
    scale = config["lora"]["alpha"] / config["lora"]["rank"]

    def weights():
        for name, weight in read_llm(config["llm"], shapes, dtype, "cpu"):
            part = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{part}A.weight" in lora:
                weight = merged_weight(weight, lora[f"{part}A.weight"], lora[f"{part}B.weight"], scale)
            yield name, weight

    vision = VisionProjector(config["vision"], of_llm.hidden_size, "cpu", dtype)
    require_same_pixels(vision.preprocess, config, folder, "--vision")
    load_projection(vision, folder)
    pieces = prompt_pieces(tokenizer, config["prompt"])
    write_blip2(aside, vision, of_llm, weights(), tokenizer, pieces, config, dtype)


def load_projection(vision: VisionProjector, folder: str) -> None:
    tensors = files.load_tensors(folder, "projection.safetensors")
    where = f"{folder}/projection.safetensors holds a projection between other models"
    copy_weights(vision.projection.state_dict(), tensors, where)


# ---- loss ----
def delta_batch(llm, vision, pieces: list, queries: torch.Tensor, answers: list, names: list | None = None) -> Packed:
    """Fig. 3's prompt around each pair: queries (B, 2, Q, q_width) of reference and target, ids of the deltas.

    names of the references: hold each of them once, as the instruction is anyway, instead of once a row."""
    known, rows = {}, []
    for i, (reference, target) in enumerate(vision(queries)):  # 2 x (Q, D) each
        shared = reference if names is None else known.setdefault(names[i], reference)
        rows.append(delta_row(pieces, shared, target))
    return pack(llm.get_input_embeddings(), rows, answers)


# ---- this run: what main() calls, and main() alone, may read the constants ----
class Model(NamedTuple):
    """A visual delta generator."""

    llm: nn.Module
    tokenizer: object
    vision: VisionProjector
    pieces: list  # of the prompt


def check_flags() -> None:
    at_least(globals(), EPOCHS=1, BATCH=1, ENCODE_BATCH=1, ACCUMULATE=1, SAVE_EVERY=1, WORKERS=0, MAX_NEW=1)
    at_least(globals(), LR=0, WARMUP=0, CLIP=0, WEIGHT_DECAY=0, VIEWS=0, SHOW=0, LORA_RANK=1)
    at_least(globals(), HELD_OUT=0, LORA_DROPOUT=0, BETAS=0)
    below(globals(), HELD_OUT=1, LORA_DROPOUT=1, BETAS=1)
    within(globals(), DECAY_AT=(0, 1), DECAY=(0, 1), SCALE=(0.01, 1), RATIO=(0.01, 100))
    one_of(globals(), OPTIMIZER=("adamw", "adamw8bit"), FORMAT=("llama", "blip2"))


def read_aligned() -> dict:
    """config.json of ALIGNED, with this run's `quantize`; a plan or a check may be asked for before there is one."""
    aligned = {"llm": LLM or vdg_align.LLM, "vision": VISION or vdg_align.VISION, "quantize": ""}
    if not (PLAN or CHECK) or os.path.exists(f"{ALIGNED}/config.json"):
        aligned = read_stage(ALIGNED, "align", LLM, VISION)
    if QUANTIZE:
        aligned["quantize"] = "" if QUANTIZE == "none" else QUANTIZE
    return aligned


def check_data(triplets: list[Triplet], images: ImageStore) -> None:
    """--check: UserError where an image is missing, or what training begins with."""
    batches.say_check(names_of(triplets), images, f"{len(triplets):,} triplets", OUT, CHECK_DECODE, WORKERS)
    read_stage(ALIGNED, "align", LLM, VISION)


def steps_of(count: int, per_step: int) -> tuple[int, int]:
    """-> optimiser steps of an epoch of `count` triplets, and of the run."""
    per_epoch = math.ceil(count / per_step)
    if WARMUP >= (total := EPOCHS * per_epoch):
        warn(f"--warmup {WARMUP}: the run has {total} steps, so its rate never comes to --lr")
    return per_epoch, total


def memory_options(aligned: dict, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Flags -> bytes by purpose: of the run as it stands, then of ever smaller ones."""
    shape, vision = llm_shape(aligned["llm"]), vdg_align.vision_weights(aligned["vision"])
    itemsize = 2 if PLAN and DTYPE == "auto" else dtype.itemsize
    trained = memory.of_lora(shape, LORA_RANK, LORA_TARGETS) + (768 + 1) * shape.width
    state = 2 if OPTIMIZER == "adamw8bit" else 8

    def parts(quantize: str, checkpoint: bool, batch: int) -> dict[str, float]:
        tokens, supervised = 124 * batch, 21 * batch  # of a triplet of CIRR: 39 of the prompt, 2 x 32, 21 of the delta
        frozen = memory.frozen(shape, quantize, itemsize, vision)
        return frozen | memory.training(shape, itemsize, tokens, supervised, trained, state, LORA_TARGETS, checkpoint)

    return memory.options_of(parts, aligned["quantize"], CHECKPOINT, BATCH)


def split_triplets(triplets: list[Triplet], images: ImageStore) -> tuple[list[Triplet], list[Triplet]]:
    """-> triplets to train on, triplets held out; the draw is a function of SEED."""
    listing = f"{OUT}/unreadable.txt"
    triplets = batches.drop_missing(triplets, lambda t: (t.reference, t.target), images, "triplets", listing, WORKERS)
    batches.check_texts(((t.id, t.delta) for t in triplets), ROOT, MAX_CHARACTERS)
    if several := sum(bool(t.alternatives) for t in triplets if DATASET == "jsonl"):
        say(f"{ROOT}: {several:,} of {len(triplets):,} triplets have several texts: the first is learnt")
    trained, held = held_out.split_pairs(triplets, HELD_OUT, SEED)
    if not trained:
        raise UserError(f"{ROOT} holds no triplet of {SPLIT} to train on; look at --root, --split, --held_out")
    return trained, held


def load_models(aligned: dict, dtype: torch.dtype, world: World) -> Model:
    """Algorithm 2 starts from Algorithm 1's projection, and from a LoRA that changes nothing yet."""
    llm, tokenizer = load_llm(aligned["llm"], dtype, world.device, aligned["quantize"])
    require_same(tokenizer, aligned, ALIGNED)
    vision = VisionProjector(aligned["vision"], llm.config.hidden_size, world.device, dtype)
    require_same_pixels(vision.preprocess, aligned, ALIGNED, "--vision")
    load_projection(vision, ALIGNED)
    torch.manual_seed(SEED)  # here: what the vision side drew before it is overwritten came from the device's generator
    add_lora(llm, LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS)
    share_start(lora_weights(llm), world)
    return Model(llm, tokenizer, vision, prompt_pieces(tokenizer, PROMPT))


def earlier_state(aligned: dict, per_step: int, triplets: list[Triplet], images: ImageStore) -> tuple:
    """-> what a resume must agree on, and how far an earlier run came: its steps and its state, or 0 and None."""
    constants = {**constants_of(globals()), "items a step": per_step, "data": batches.fingerprint(triplets)}
    constants |= {f"model of --{role}": found for role, found in aligned["models_sha256"].items()}
    tokenizer = load_tokenizer(aligned["llm"])
    prompt = prompt_length(prompt_pieces(tokenizer, PROMPT), vdg_align.image_tokens(aligned["vision"]))
    rows = [(f"{ROOT}: record {t.id}", prompt + 1, (t.delta.strip(),)) for t in triplets]  # 1: the end token
    rows += [(f"a delta of --max_new {MAX_NEW} tokens", prompt + MAX_NEW - 1, ())] if HELD_OUT else []
    llama.require_room(aligned["llm"], tokenizer, rows)
    constants["tokenizer"] = tokenizer_sha256(tokenizer)
    found = resume_state(OUT, constants, [(images, names_of(triplets))], files.MAY_CHANGE | _FREE)
    return constants, *(found or (0, None))


def state_of(model: Model, optimizer: torch.optim.Optimizer) -> dict:
    state = {"projection": model.vision.projection.state_dict(), "lora": adapter_tensors(model.llm)}
    return state | {"optimizer": optimizer.state_dict()}


def restore(model: Model, optimizer: torch.optim.Optimizer, state: dict) -> None:
    model.vision.projection.load_state_dict(state["projection"])
    fill_lora(model.llm, state["lora"], OUT)
    optimizer.load_state_dict(state["optimizer"])


def load_steps(triplets: list[Triplet], images: ImageStore, vision: VisionProjector, steps: Iterable, world: World):
    """Yields each step with its inputs (n, 2, ...), reference and target: bytes, or with VIEWS Q-Former outputs."""

    def crop(*keys):
        """A transform whose random crop [S4.1] is a function of the keys."""
        return Crop(vision.preprocess, (SEED, *keys), SCALE, RATIO)

    everything = names_of(triplets) if VIEWS else []
    memory.say_kept(len(everything) * VIEWS, vision.query_tokens.to(vision.dtype))
    crops_of = {name: [crop(name, k) for k in range(VIEWS)] for name in everything}
    views = encode(vision, images, everything, crops_of.get, ENCODE_BATCH, WORKERS, world)

    def load(step: batches.Step) -> torch.Tensor | None:
        mine = [triplets[i] for i in step.items]
        names = [name for triplet in mine for name in (triplet.reference, triplet.target)]
        if not mine:
            return None
        if VIEWS:
            return torch.stack([views[name][step.epoch % VIEWS] for name in names]).unflatten(0, (-1, 2))
        crops = [crop(step.epoch, i, side) for i in step.items for side in ("reference", "target")]
        if TREE:  # one crop of a picture in an epoch, as its tokens are shared
            crops = [crop(step.epoch, name) for name in names]
        return load_bytes(images, names, vision.preprocess, WORKERS, crops).unflatten(0, (-1, 2))

    return batches.ahead(load, steps)


def queries_of(vision: VisionProjector, inputs: torch.Tensor) -> torch.Tensor:
    """What load_steps gives of B pairs -> Q-Former outputs (B, 2, Q, q_width)."""
    return inputs if VIEWS else vision.queries_of_bytes(inputs.flatten(0, 1)).unflatten(0, (-1, 2))


def prompt_batch(model: Model, triplets: list[Triplet], queries: torch.Tensor, answers: list) -> Packed:
    """delta_batch; with TREE each reference is held once."""
    names = [triplet.reference for triplet in triplets] if TREE else None
    return delta_batch(model.llm, model.vision, model.pieces, queries, answers, names)


def learning_rate(step: int, epoch: int) -> float:
    """Rises linearly over WARMUP steps, falls once [S4.1]."""
    warm = min(1, (step + 1) / max(1, WARMUP))
    return LR * (warm * (DECAY if epoch >= DECAY_AT * EPOCHS else 1))


def encode_held_out(held: list[Triplet], images: ImageStore, vision: VisionProjector, world: World) -> dict:
    """Q-Former outputs {name: (1, Q, q_width)} of their images, which are not cropped."""
    return encode(vision, images, names_of(held), lambda name: [vision.preprocess.crop], ENCODE_BATCH, WORKERS, world)


def measure_held_out(model: Model, held: list[Triplet], queries: dict, triplets: list[Triplet], world: World):
    """-> entries for the log, and (greedy delta, flags) of each held-out triplet; the same on every rank.

    queries: of encode_held_out; triplets: those trained on, whose deltas may be copied."""
    llm, tokenizer, vision, pieces = model
    llm.eval()
    prompt, order = prompt_parts(pieces)
    greedy = Sampling(tokenizer.eos_token_id, MAX_NEW, temperature=0.0, top_k=0)
    engine = start_engine(llm, prompt, vision.query_tokens.shape[1], BATCH, greedy, graph=False)

    def image_tokens(names: list[str]) -> torch.Tensor:
        return vision(torch.cat([queries[name] for name in names]).to(world.device))  # (n, Q, D)

    loss, tokens, said = 0.0, 0, []
    for part in batches.chunks(held[world.rank :: world.size], BATCH):
        answers = [answer_ids(tokenizer, triplet.delta) for triplet in part]
        of_both = torch.stack([torch.cat([queries[t.reference], queries[t.target]]) for t in part])
        with torch.no_grad():
            batch = delta_batch(llm, vision, pieces, of_both.to(world.device), answers)  # (B, 2, Q, q_width)
            loss += caption_loss(llm, batch, 1).item()
        tokens += sum(map(len, answers))
        pairs = [tuple(getattr(triplet, side) for side in order) for triplet in part]
        said += describe(engine, image_tokens, tokenizer, pairs, [0] * len(pairs))

    loss, said = ranks.all_sum(loss) / ranks.all_sum(tokens), batches.gather_dealt(said)
    known = (triplet.delta for triplet in triplets)
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 99))} | held_out.count_flags(said, known), said


def save_result(model: Model, aligned: dict, trained: dict, world: World) -> None:
    """OUT's checkpoint with its card, read back; trained: steps and triplets."""
    lora = {"rank": LORA_RANK, "alpha": LORA_ALPHA, "dropout": LORA_DROPOUT, "targets": list(LORA_TARGETS)}
    config = {"stage": "tune"} | {key: aligned[key] for key in ("vision", "llm", "models_sha256", "dim", "quantize")}
    config["near"] = {key: near(aligned[key], OUT) for key in ("vision", "llm")}  # if all of it moves
    config |= {"lora": lora, "prompt": PROMPT} | trained | {"dataset": DATASET, "seed": SEED}
    config["tokenizer_sha256"] = tokenizer_sha256(model.tokenizer)
    config["pixels"] = model.vision.preprocess.described()
    tensors = {"adapter_model.safetensors": adapter_tensors(model.llm)}
    tensors |= {"projection.safetensors": model.vision.projection.state_dict()}
    texts = {"adapter_config.json": adapter_config(lora, aligned["llm"]), "config.json": config}
    if world.rank == 0:  # it has the log
        texts["README.md"] = held_out.model_card(config, held_out.records(OUT))
    files.save_folder(OUT, tensors, texts)
    if world.rank == 0:
        check_saved(model.llm, OUT)
    say(f"wrote {OUT}/adapter_model.safetensors")


def main() -> None:
    world = ranks.init_world(DEVICE)
    dtype = ranks.pick_dtype(DTYPE, world.device)
    check_flags()
    if MERGE:
        return write_merged(OUT, MERGE, FORMAT, DTYPE, LLM, VISION)
    aligned = read_aligned()
    options = memory_options(aligned, dtype)
    if PLAN:
        return memory.say(options)
    triplets, images = training_triplets(DATASET, ROOT, SPLIT, CATEGORY, IMAGES, KEYS, POOL, HOLD_OUT)
    if CHECK:
        return check_data(triplets, images)
    triplets, held = split_triplets(triplets, images)
    per_step = BATCH * ACCUMULATE * world.size  # triplets
    per_epoch, total = steps_of(len(triplets), per_step)

    # the folder is this run's alone; the same command goes on where it stopped
    files.lock_folder(OUT, "tune")
    aligned["models_sha256"] = require_same_models(aligned, ALIGNED)
    constants, start, state = earlier_state(aligned, per_step, [*triplets, *held], images)
    if files.is_finished(OUT, "projection.safetensors", start, total):
        return

    # projection and LoRA learn; ViT, Q-Former and the LLM's own weights stay as they are
    memory.say(options, [memory.has(world.device)], world.device.type)
    llm, tokenizer, vision, _ = model = load_models(aligned, dtype, world)
    weights = [*vision.projection.parameters(), *lora_weights(llm)]
    optimizer = make_optimizer(OPTIMIZER, weights, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    if state:
        restore(model, optimizer, state)
        say(f"resuming after step {start} of {total}")

    # Algorithm 2
    of_held = encode_held_out(held, images, vision, world)
    steps = batches.training_steps(groups_of(triplets, TREE), EPOCHS, per_step, SEED, world, start)
    loaded = load_steps(triplets, images, vision, steps, world)
    log, watch, seen = Log(OUT, start), ranks.Stopwatch(), 0
    bar = progress(loaded, "tune", total, start)
    for (step, epoch, items), inputs in bar:
        # a rank that could not read its images stops all
        batches.stop_together(inputs, OUT)

        # a linear rise, then one fall; dropout of this step
        rate = learning_rate(step, epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        llm.train()
        seeds.seed_step(SEED, step, world.rank)

        # this rank's triplets; Eq. 1 is a mean over the tokens of all ranks
        mine = [triplets[i] for i in items]
        answers = [answer_ids(tokenizer, triplet.delta) for triplet in mine]
        tokens = ranks.all_sum(sum(map(len, answers)))
        share = 0.0  # of the loss, this rank's

        for part in batches.slices(len(mine), BATCH):
            # [S3.1]: reference and target -> frozen ViT and Q-Former
            queries = queries_of(vision, inputs[part].to(world.device))

            # [Fig. 3]: the prompt with both, projected, then the delta
            batch = prompt_batch(model, mine[part], queries, answers[part])

            # Eq. 1: next-token loss on the delta, through LLM and LoRA
            loss = caption_loss(llm, batch, tokens, CHECKPOINT)
            loss.backward()
            share += loss.item()
            seen += len(batch.home)

        # shares of the loss and their gradients add up over the ranks
        ranks.all_reduce_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, CLIP or math.inf).item()
        loss = ranks.all_sum(share)
        suspects = [] if math.isfinite(share) else [(t.reference, t.target, t.delta) for t in mine]
        batches.stop_if_not_finite(step + 1, loss + norm, suspects, log, "a lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        # a line of the log
        done = step + 1
        speed = pace(watch.seconds(), done - start, total - done, per_step, seen, world)
        log.write(step=done, epoch=epoch, loss=loss, lr=rate, grad_norm=norm, **speed)
        bar.set_postfix(loss=loss)

        # after an epoch the held-out triplets: their loss, and deltas to look at
        if held and done % per_epoch == 0:
            with watch.paused():
                found, said = measure_held_out(model, held, of_held, triplets, world)
            log.write(step=done, epoch=epoch, **found)
            held_out.write_page(OUT, held, said, images, SHOW)

        # a state to resume from: now and then, at the end, when a signal came
        stop = ranks.any_rank(ranks.stop_requested())
        if stop or done % SAVE_EVERY == 0 or done == total:
            files.save_state(OUT, done, state_of(model, optimizer), constants)
        if stop:
            say(f"stopped after step {done} of {total}; the same command resumes")
            raise SystemExit(143)

    save_result(model, aligned, {"steps": total, "triplets": len(triplets)}, world)


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "--batch 4 --accumulate 2, --checkpoint true or --quantize nf4"))
