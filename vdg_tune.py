"""Stage 2, instruction tuning [S3.1, Algorithm 2]: projection and LoRA learn to say what turns reference into target.

    python vdg_tune.py --aligned out/align --root data/cirr --images data/img_raw --out out/vdg
    torchrun --nproc_per_node 8 vdg_tune.py --aligned out/align --dataset fashioniq --root data/fashioniq --out out/vdg

Reads OUT of vdg_align.py (it names the vision side and the LLM) and triplets: CIRR, FashionIQ, or a jsonl file.
Writes OUT/adapter_model.safetensors and adapter_config.json (they load with peft), OUT/projection.safetensors,
OUT/config.json, OUT/README.md (a model card), OUT/held_out.html (deltas beside the human ones), OUT/log.jsonl and
OUT/last/ (training state: the same command resumes). --merge FOLDER makes a plain LLaMA of a finished OUT.
"""

from common.flags import early_help

early_help(__name__, __file__)  # answers --help before torch is imported

import math
import os
import re
import shutil
import time
from collections import Counter

import torch
import torch.nn.functional as F
import transformers
from torch import nn

import vdg_align
from common import memory, pages
from common.annotations import Triplet, training_triplets
from common.batches import ahead, check_texts, chunks, drop_missing, fingerprint, steps_of, stop_together
from common.console import UserError, progress, run, say
from common.decode import describe, prompt_parts, start_engine
from common.files import (
    MAY_CHANGE,
    load_state,
    load_tensors,
    lock_folder,
    read_json,
    read_jsonl,
    save_folder,
    save_state,
    write_text,
)
from common.flags import at_least, constants_of, override
from common.images import ImageStore, check_report, load_pixels, random_resized_crop
from common.llama import answer_ids, llm_shape, load_llm, tokenize
from common.pretrained import read_config
from common.ranks import (
    Log,
    all_reduce_gradients,
    all_sum,
    any_rank,
    gather_objects,
    init_world,
    pick_dtype,
    seed_step,
    seeded_rng,
    stop_requested,
)
from vdg_align import (
    Packed,
    VisionProjector,
    caption_loss,
    encode,
    pack,
    stop_not_finite,
    vision_weights,
)

# ---- data ----
ALIGNED = "out/align"  # checkpoint of vdg_align.py; its config.json names the vision side and the LLM
DATASET = "cirr"  # "cirr", "fashioniq" or "jsonl" (ROOT is then a file of triplets)
ROOT = "data/cirr"  # folder with captions/ and image_splits/, or the file of triplets
SPLIT = "train"  # split to learn from [S4.1]
CATEGORY = "all"  # FashionIQ: "dress", "shirt", "toptee" or all three
IMAGES = ""  # folder of the images; empty: the usual places in and beside ROOT
KEYS = ""  # jsonl: names of a record's parts elsewhere, reference=q_img,target=t_img,delta=q_text (see read_triplets)
POOL = ""  # jsonl files of {"did", "img_path"} in which the targets of KEYS are ids (M-BEIR)
HELD_OUT = 0.02  # share of the triplets kept out, for a loss after each epoch [ours: the paper uses all; 0 does]
MAX_CHARACTERS = 2000  # a longer delta stops the run at start-up rather than exhaust memory at step 4,000 [ours]

# ---- model ----
PROMPT = (
    "Request: Analyze given reference and target images and provide a description that transforms the reference to "
    "match the target.\nReference: <reference>\nTarget: <target>\nResponse:"
)  # [Fig. 3]; <reference> and <target> stand for 32 image tokens each
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
BETAS = (0.9, 0.99)  # AdamW [S4.1]
WEIGHT_DECAY = 0.05  # AdamW [S4.1]
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
WORKERS = 8  # threads that decode images
MERGE = ""  # fold the LoRA of the finished OUT into its LLM, write that as a plain LLaMA into this folder, and stop
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at the data: counts of expected, present and unreadable images, then stop


# ---- LoRA ----
class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A drop(x): W frozen (it may be quantised), A (r, in) and B (out, r) trained, in fp32."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # B = 0: training starts from the LLM as it is
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # on the CPU: the same start on every device
        self.to(base.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (B, T, r)
        return self.base(x) + F.linear(down, self.lora_B.to(x.dtype)) * self.scale


def add_lora(llm: nn.Module, rank: int, alpha: float, dropout: float, targets: tuple) -> dict[str, LoRALinear]:
    """Wrap every linear of the LLM whose last name is in targets -> the new modules by name."""
    names = [name for name, module in llm.named_modules() if name.split(".")[-1] in targets]
    absent = set(targets) - {name.split(".")[-1] for name in names}
    if absent or not names or rank < 1:
        what = f"LoRA of rank {rank} on {', '.join(targets)}"
        raise UserError(f"{what}: the LLM has no {', '.join(absent) or 'such'} module; look at --lora_targets")
    for name in names:
        llm.set_submodule(name, LoRALinear(llm.get_submodule(name), rank, alpha, dropout))
    return lora_modules(llm)


def lora_modules(llm: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in llm.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(llm: nn.Module) -> None:
    """W <- W + (alpha / r) B A and the plain linear back in place: generation then pays nothing for LoRA."""
    for name, module in lora_modules(llm).items():
        assert type(module.base) is nn.Linear, "a quantised weight cannot take the update"
        weight = module.base.weight
        weight.data = (weight.float() + module.scale * module.lora_B.float() @ module.lora_A.float()).to(weight.dtype)
        llm.set_submodule(name, module.base)


def adapter_tensors(llm: nn.Module) -> dict[str, torch.Tensor]:
    """LoRA's weights under PEFT's names."""
    tensors = {}
    for name, module in lora_modules(llm).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.lora_B.detach()
    return tensors


def adapter_config(lora: dict, llm: str) -> dict:
    """adapter_config.json as PEFT reads it; lora = {"rank", "alpha", "dropout", "targets"}."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": llm,
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": list(lora["targets"]),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def load_adapter(llm: nn.Module, folder: str, lora: dict) -> dict[str, LoRALinear]:
    """Add the LoRA saved in a folder to the LLM; lora are the settings that it was trained with, from config.json.

    Wrong alpha, other targets, rsLoRA or a missing prefix load silently and wrongly elsewhere: each stops here."""
    path = f"{folder}/adapter_config.json"
    found = read_json(path)
    wanted = adapter_config(lora, found.get("base_model_name_or_path")) | {"rank_pattern": {}, "alpha_pattern": {}}
    for key, value in wanted.items():
        here, there = (sorted(v) if isinstance(v, list) else v or None for v in (found.get(key), value))
        if here != there:
            raise UserError(f"{path}: {key} is {here!r}, config.json says {there!r}; copy both files again")
    modules = add_lora(llm, lora["rank"], lora["alpha"], lora["dropout"], tuple(lora["targets"]))
    fill_lora(llm, load_tensors(folder, "adapter_model.safetensors"), folder)
    return modules


def fill_lora(llm: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy PEFT-named tensors into the LLM's LoRA: every name and every shape must agree."""
    wanted = adapter_tensors(llm)
    if wanted.keys() != tensors.keys():
        name = min(wanted.keys() ^ tensors.keys())
        raise UserError(
            f"{where}: LoRA weight {name} is {'missing' if name in wanted else 'one too many'}; wrong LLM or file"
        )
    for name, weight in wanted.items():
        found = tensors[name].shape
        if weight.shape != found:
            raise UserError(f"{where}: {name} is {tuple(found)}, {tuple(weight.shape)} wanted; wrong LLM")
        weight.copy_(tensors[name])


def check_saved(llm: nn.Module, folder: str) -> None:
    """What was saved, read back as a later stage reads it, must give the outputs of the modules that were trained."""
    tensors = load_tensors(folder, "adapter_model.safetensors")
    config = read_json(f"{folder}/adapter_config.json")
    for name, module in lora_modules(llm.eval()).items():
        again = LoRALinear(module.base, config["r"], config["lora_alpha"], 0.0).eval()
        again.lora_A.data.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        again.lora_B.data.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
        x = torch.linspace(-1, 1, module.lora_A.shape[1], device=module.lora_A.device).to(llm.dtype)
        with torch.no_grad():
            assert torch.equal(module(x[None]), again(x[None])), f"{folder}: LoRA of {name} does not survive saving"


# ---- prompt [Fig. 3] ----
def prompt_pieces(tokenizer, prompt: str) -> list:
    """The start token and the prompt as ids, "<reference>" and "<target>" left standing where the image tokens go."""
    parts = re.split("(<reference>|<target>)", prompt)
    if sorted(parts[1::2]) != ["<reference>", "<target>"]:
        raise UserError(f"the prompt wants <reference> and <target> once each; found {parts[1::2]}")
    ids = [part if at % 2 else tokenize(tokenizer, part.strip(" ")) for at, part in enumerate(parts)]
    return [[tokenizer.bos_token_id], *ids]


def delta_row(pieces: list, reference: torch.Tensor, target: torch.Tensor) -> list:
    """Row for pack: prompt_pieces with the image tokens (Q, D) of one pair in their places."""
    images = {"<reference>": reference, "<target>": target}
    return [images[piece] if isinstance(piece, str) else piece for piece in pieces]


# ---- the trained model ----
def load_vdg(folder: str, device: torch.device | str, dtype: torch.dtype):
    """A checkpoint of this script -> (vision projector, LLM with LoRA in eval mode, tokenizer, config.json as dict)."""
    config = read_stage(folder, "tune")
    llm, tokenizer = load_llm(config["llm"], dtype, device, config["quantize"])
    load_adapter(llm, folder, config["lora"])
    vision = VisionProjector(config["vision"], llm.config.hidden_size, device, dtype)
    load_projection(vision, folder)
    return vision, llm.requires_grad_(False).eval(), tokenizer, config


def write_merged(folder: str, out: str, dtype: str) -> None:
    """A checkpoint of this script -> a plain Hugging Face LLaMA with LoRA in its weights; dtype "auto": the LLM's own.

    The projection is not in it: a LLaMA has no place for pictures. A quantised base is read in full precision."""
    if os.path.exists(out):
        raise UserError(f"--merge {out} exists; name a new folder")
    config = read_stage(folder, "tune")
    own = read_config(config["llm"], ("llama",)).dtype
    precision = own if dtype == "auto" and own else pick_dtype(dtype, "cpu")
    llm, tokenizer = load_llm(config["llm"], precision, "cpu")
    load_adapter(llm, folder, config["lora"])
    merge_lora(llm)
    aside = f"{out.rstrip('/')}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    llm.save_pretrained(aside, max_shard_size="5GB")
    tokenizer.save_pretrained(aside)
    os.rename(aside, out)


def model_card(config: dict, held_out: dict) -> str:
    """README.md of a checkpoint, with the front matter that the hub reads."""
    lora = config["lora"]
    measured = "No triplets were held out."
    if held_out:
        counts = ", ".join(f"{name} {held_out[name]}" for name in ("empty", "repeated", "too_long", "copied"))
        measured = (
            f"On {held_out['deltas']:,} held-out triplets: loss per token {held_out['held_out_loss']:.4f}, perplexity "
            f"{held_out['perplexity']:.2f}. Of as many greedy deltas: {counts} (copied: word for word in the training "
            "set). held_out.html shows some."
        )
    what = f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']}, on {', '.join(lora['targets'])}"
    trained = f"{config['steps']:,} steps on {config['triplets']:,} triplets of {config['dataset']}"
    return f"""---
base_model: {config["llm"]}
library_name: peft
tags: [composed-image-retrieval, visual-delta, lora]
---
# Visual delta generator

LoRA ({what}) for `{config["llm"]}`,
and a projection of the Q-Former outputs of `{config["vision"]}` into its embeddings. Given a reference
and a target picture it says what turns the one into the other (Jang et al., CVPR 2024, arXiv 2404.15516).

Trained for {trained}, seed {config["seed"]}. {measured}

- `adapter_model.safetensors`, `adapter_config.json`: `peft.PeftModel.from_pretrained(llama, folder)` reads them
- `projection.safetensors`: `weight` (d_llm, d_qformer) and `bias`
- `config.json`: models, LoRA and the prompt, in which `<reference>` and `<target>` stand for the image tokens

`python gen_deltas.py --vdg FOLDER --pairs pairs.jsonl --images FOLDER` writes deltas; `python vdg_tune.py --out FOLDER
--merge LLAMA` folds LoRA into the LLM. The licences of the LLM, of the vision model and of the triplets apply.
"""


def read_stage(folder: str, stage: str) -> dict:
    """config.json of a checkpoint of ours, which must be of that stage ("align" or "tune")."""
    path = f"{folder}/config.json"
    if not os.path.exists(path):
        raise UserError(f"{path} not found; wanted a finished checkpoint of vdg_{stage}.py")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("stage") != stage:
        raise UserError(f"{path}: not a checkpoint of vdg_{stage}.py")
    return config


def load_projection(vision: VisionProjector, folder: str) -> None:
    tensors = load_tensors(folder, "projection.safetensors")
    wanted, found = ({n: tuple(t.shape) for n, t in d.items()} for d in (vision.projection.state_dict(), tensors))
    if wanted != found:
        raise UserError(f"{folder}/projection.safetensors holds {found}; Q-Former and LLM want {wanted}")
    vision.projection.load_state_dict(tensors)


# ---- images ----
def names_of(triplets: list[Triplet]) -> list[str]:
    return sorted({name for triplet in triplets for name in (triplet.reference, triplet.target)})


# ---- loss ----
def delta_batch(llm, vision, pieces: list, queries: torch.Tensor, answers: list, names: list | None = None) -> Packed:
    """Fig. 3's prompt around each pair: queries (B, 2, Q, q_width) of reference and target, ids of the deltas.

    names of the references: hold each of them once, as the instruction is anyway, instead of once a row."""
    known, rows = {}, []
    for i, (reference, target) in enumerate(vision(queries)):  # 2 x (Q, D) each
        shared = reference if names is None else known.setdefault(names[i], reference)
        rows.append(delta_row(pieces, shared, target))
    return pack(llm.get_input_embeddings(), rows, answers)


# ---- held-out triplets ----
def plain_text(text: str) -> str:
    return " ".join(text.lower().split())


def count_flags(said: list[tuple[str, list[str]]], known: set[str]) -> dict[str, int]:
    """said: (delta, flags) of text_of -> how many are empty, repeated, too long, copied from `known`."""
    flags = Counter(flag for _, flags in said for flag in flags)
    copied = sum(plain_text(delta) in known for delta, _ in said)
    counts = {"empty": flags["empty"], "repeated": flags["repeated"], "too_long": flags["runaway"], "copied": copied}
    return {"deltas": len(said)} | counts


def held_out_page(held: list[Triplet], said: list, images: ImageStore, history: list[dict], show: int) -> str:
    """A page of held-out pairs with the human and the generated delta; history: the held-out records of the log."""
    panels = []
    for triplet, (delta, flags) in list(zip(held, said, strict=True))[:show]:
        query = (images.path(triplet.reference), f"reference {triplet.reference}")
        note = " · ".join([f"human: {triplet.delta}", *flags])
        target = (images.path(triplet.target), f"target {triplet.target}")
        panels.append(pages.panel(query, delta or "(nothing)", [target], note=note))
    names = ("step", "held_out_loss", "perplexity", "deltas", "empty", "repeated", "too_long", "copied")
    rows = [[record[name] for name in names] for record in history]
    table = pages.table(rows, [name.replace("_", " ") for name in names])
    return pages.page("Held-out triplets", [("Each epoch", table), ("Generated deltas, greedy", *panels)])


def make_optimizer(kind: str, weights: list, **how) -> torch.optim.Optimizer:
    if kind == "adamw8bit":
        import bitsandbytes as bnb  # lazily: optional

        return bnb.optim.AdamW8bit(weights, **how)
    if kind != "adamw":
        raise UserError(f'--optimizer is {kind!r}; "adamw" or "adamw8bit" is wanted')
    return torch.optim.AdamW(weights, **how)


def main() -> None:
    transformers.logging.set_verbosity_error()
    world = init_world(DEVICE)
    dtype = pick_dtype(DTYPE, world.device)
    if MERGE:
        write_merged(OUT, MERGE, DTYPE)
        say(f"wrote {MERGE}, a LLaMA with the LoRA of {OUT} in its weights")
        return
    aligned = {"llm": vdg_align.LLM, "vision": vdg_align.VISION, "quantize": ""}  # of a plan or a check without one
    at_least(globals(), EPOCHS=1, BATCH=1, ENCODE_BATCH=1, ACCUMULATE=1, SAVE_EVERY=1, WORKERS=0, MAX_NEW=1)
    at_least(globals(), LR=0, WARMUP=0, DECAY_AT=0, DECAY=0, CLIP=0, WEIGHT_DECAY=0, HELD_OUT=0, VIEWS=0, SHOW=0)
    if not (PLAN or CHECK) or os.path.exists(f"{ALIGNED}/config.json"):
        aligned = read_stage(ALIGNED, "align")
    quantize = {"": aligned["quantize"], "none": ""}.get(QUANTIZE, QUANTIZE)
    shape, size = llm_shape(aligned["llm"]), 2 if PLAN and DTYPE == "auto" else dtype.itemsize

    def parts(quantize: str, checkpoint: bool, batch: int) -> dict[str, float]:
        tokens, supervised = 124 * batch, 21 * batch  # of a triplet of CIRR: 39 of the prompt, 2 x 32, 21 of the delta
        lora = LORA_RANK * shape.layers * sum(sum(shape.linears()[name]) for name in LORA_TARGETS)
        trained, state = lora + (768 + 1) * shape.width, 2 if OPTIMIZER == "adamw8bit" else 8
        training = memory.training(shape, size, tokens, supervised, trained, state, LORA_TARGETS, checkpoint)
        return memory.frozen(shape, quantize, size, vision_weights(aligned["vision"])) | training

    if unknown := set(LORA_TARGETS) - shape.linears().keys():
        raise UserError(f"the LLM has no {', '.join(unknown)}; --lora_targets: {', '.join(shape.linears())}")
    options = memory.options_of(parts, quantize, CHECKPOINT, BATCH)
    if PLAN:
        memory.say(options, [80, 40, 24])
        return
    triplets, images = training_triplets(DATASET, ROOT, SPLIT, CATEGORY, IMAGES, KEYS, POOL)
    if CHECK:
        report, ok = check_report(names_of(triplets), images, CHECK_DECODE, WORKERS)
        report = f"{len(triplets):,} triplets; {report}"
        if not ok:
            raise UserError(report)
        say(report)
        return
    both = lambda t: (t.reference, t.target)  # noqa: E731
    triplets = drop_missing(triplets, both, images, "triplets", f"{OUT}/unreadable.txt", WORKERS)
    check_texts(((t.id, t.delta) for t in triplets), ROOT, MAX_CHARACTERS)
    shuffled = seeded_rng("held out", SEED).permutation(len(triplets)).tolist()
    held = [triplets[i] for i in sorted(shuffled[: int(HELD_OUT * len(triplets))])]
    triplets = [triplets[i] for i in sorted(shuffled[int(HELD_OUT * len(triplets)) :])]
    items = BATCH * ACCUMULATE * world.size
    per_epoch = math.ceil(len(triplets) / items)
    total = EPOCHS * per_epoch

    lock_folder(OUT)
    constants = {**constants_of(globals()), "items a step": items, "data": fingerprint([*triplets, *held])}
    free = {"BATCH", "ACCUMULATE", "IMAGES", "CHECKPOINT", "SHOW", "MAX_NEW"}
    saved = load_state(OUT, constants, MAY_CHANGE | free)
    done, state = saved or (0, None)
    if done >= total and os.path.exists(f"{OUT}/projection.safetensors"):
        say(f"{OUT} is finished ({total} steps); for another run take another --out")
        return

    memory.say(options, [memory.has(world.device)])
    torch.manual_seed(SEED)
    llm, tokenizer = load_llm(aligned["llm"], dtype, world.device, quantize)
    vision = VisionProjector(aligned["vision"], llm.config.hidden_size, world.device, dtype)
    load_projection(vision, ALIGNED)  # Algorithm 2 starts from Algorithm 1's projection
    lora = {"rank": LORA_RANK, "alpha": LORA_ALPHA, "dropout": LORA_DROPOUT, "targets": list(LORA_TARGETS)}
    modules = add_lora(llm, LORA_RANK, LORA_ALPHA, LORA_DROPOUT, LORA_TARGETS)
    weights = [*vision.projection.parameters(), *(w for m in modules.values() for w in (m.lora_A, m.lora_B))]
    optimizer = make_optimizer(OPTIMIZER, weights, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    if state:
        vision.projection.load_state_dict(state["projection"])
        fill_lora(llm, state["lora"], OUT)
        optimizer.load_state_dict(state["optimizer"])
        say(f"resuming after step {done} of {total}")

    pieces = prompt_pieces(tokenizer, PROMPT)

    def crop(*keys):
        """A transform whose random crop is a function of the keys."""
        return lambda image: vision.preprocess(random_resized_crop(image, seeded_rng(SEED, *keys), SCALE, RATIO))

    plain = encode(vision, images, names_of(held), lambda name: [vision.preprocess], ENCODE_BATCH, WORKERS, world)
    cached = names_of(triplets) if VIEWS else []
    views = encode(
        vision, images, cached, lambda name: [crop(name, k) for k in range(VIEWS)], ENCODE_BATCH, WORKERS, world
    )

    def load(job) -> torch.Tensor | None:
        """(n, 2, ...) of this rank's triplets: reference and target, pixels or (of cached views) Q-Former outputs."""
        _, epoch, mine = job
        names = [name for i in mine for name in (triplets[i].reference, triplets[i].target)]
        if not mine:
            return None
        if VIEWS:
            return torch.stack([views[name][epoch % VIEWS] for name in names]).unflatten(0, (-1, 2))
        transforms = [crop(epoch, i, side) for i in mine for side in ("reference", "target")]
        if TREE:  # one crop of a picture in an epoch, as its tokens are shared
            transforms = [crop(epoch, name) for name in names]
        return load_pixels(images, names, transforms, WORKERS).unflatten(0, (-1, 2))

    def held_out_loss() -> float:
        """Mean loss per token on the held-out triplets, whole images, no dropout; the same number on every rank."""
        llm.eval()
        mine, answers = held[world.rank :: world.size], []
        loss = 0.0
        for at in range(0, len(mine), BATCH):
            part = mine[at : at + BATCH]
            queries = torch.stack([torch.cat([plain[t.reference], plain[t.target]]) for t in part]).to(world.device)
            batch = [answer_ids(tokenizer, t.delta) for t in part]
            with torch.no_grad():
                loss += caption_loss(llm, delta_batch(llm, vision, pieces, queries, batch), 1).item()
            answers += batch
        return all_sum(loss) / all_sum(sum(map(len, answers)))

    def describe_held_out() -> list[tuple[str, list[str]]]:
        """(greedy delta, flags) of each held-out triplet, the same list on every rank."""

        llm.eval()
        prompt, order = prompt_parts(pieces)
        engine = start_engine(llm, prompt, vision.query_tokens.shape[1], BATCH, MAX_NEW, graph=False)
        said = []
        for part in chunks(held[world.rank :: world.size], BATCH):
            pairs = [tuple(getattr(triplet, side) for side in order) for triplet in part]
            said += describe(engine, whole_images, tokenizer, pairs, [0] * len(pairs), MAX_NEW, 0.0, 0)
        shares = gather_objects(said)
        return [shares[i % world.size][i // world.size] for i in range(len(held))]

    def whole_images(names: list[str]) -> torch.Tensor:
        return vision(torch.cat([plain[name] for name in names]).to(world.device))  # (n, Q, D)

    known = {plain_text(triplet.delta) for triplet in triplets}
    groups = {i: [i] for i in range(len(triplets))}
    if TREE:
        groups = {}
        for i in sorted(range(len(triplets)), key=lambda i: (triplets[i].reference, i)):
            groups.setdefault(triplets[i].members or triplets[i].reference, []).append(i)
    log, began, seen = Log(OUT, done), time.time(), 0
    jobs = ahead(load, steps_of(list(groups.values()), EPOCHS, items, SEED, world, done))
    for (step, epoch, mine), inputs in progress(jobs, "tune", total - done):  # Algorithm 2
        stop_together(inputs)
        rate = min(1, (step + 1) / max(1, WARMUP)) * (DECAY if epoch >= DECAY_AT * EPOCHS else 1)
        for group in optimizer.param_groups:
            group["lr"] = LR * rate

        llm.train()
        seed_step(SEED, step, world.rank)  # LoRA's dropout
        answers = [answer_ids(tokenizer, triplets[i].delta) for i in mine]
        tokens = all_sum(sum(map(len, answers)))  # Eq. 1's mean is over the step's tokens on all ranks
        share = 0.0  # of the loss, this rank's
        for at in range(0, len(mine), BATCH):
            part = inputs[at : at + BATCH].to(world.device)
            queries = part if VIEWS else vision.queries(part.flatten(0, 1)).unflatten(0, (-1, 2))  # (B, 2, Q, q_width)
            names = [triplets[i].reference for i in mine[at : at + BATCH]] if TREE else None
            batch = delta_batch(llm, vision, pieces, queries, answers[at : at + BATCH], names)
            loss = caption_loss(llm, batch, tokens, CHECKPOINT)
            loss.backward()
            seen += len(batch.home)
            share += loss.item()
        all_reduce_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, CLIP or math.inf).item()
        loss = all_sum(share)
        if not math.isfinite(loss + norm):
            stop_not_finite(step, loss, norm, share, [f"{triplets[i].reference} -> {triplets[i].target}" for i in mine])
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
        if held and (step + 1) % per_epoch == 0:
            loss, said = held_out_loss(), describe_held_out()
            record = {"held_out_loss": loss, "perplexity": math.exp(min(loss, 99))} | count_flags(said, known)
            log.write(step=step + 1, epoch=epoch, **record)
            if world.rank == 0:
                history = [r for r in read_jsonl(f"{OUT}/log.jsonl") if "held_out_loss" in r]
                write_text(f"{OUT}/held_out.html", held_out_page(held, said, images, history, SHOW))
        stop = any_rank(stop_requested())
        if stop or (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            state = {"projection": vision.projection.state_dict(), "lora": adapter_tensors(llm)}
            save_state(OUT, step + 1, {**state, "optimizer": optimizer.state_dict()}, constants)
        if stop:
            say(f"stopped after step {step + 1} of {total}; the same command resumes")
            raise SystemExit(143)

    upstream = {key: aligned[key] for key in ("vision", "llm", "dim")} | {"quantize": quantize}
    config = {"stage": "tune", **upstream, "lora": lora, "prompt": PROMPT}
    config |= {"steps": total, "triplets": len(triplets), "dataset": DATASET, "seed": SEED}
    tensors = {"adapter_model.safetensors": adapter_tensors(llm)}
    tensors |= {"projection.safetensors": vision.projection.state_dict()}
    texts = {"adapter_config.json": adapter_config(lora, aligned["llm"]), "config.json": config}
    if world.rank == 0:
        measured = [record for record in read_jsonl(f"{OUT}/log.jsonl") if "held_out_loss" in record]
        texts["README.md"] = model_card(config, measured[-1] if measured else {})
    save_folder(OUT, tensors, texts)
    if world.rank == 0:
        check_saved(llm, OUT)
    say(f"wrote {OUT}/adapter_model.safetensors")


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "--batch 4 --accumulate 2, --checkpoint true or --quantize nf4"))
