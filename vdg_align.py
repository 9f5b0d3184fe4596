"""Stage 1, alignment [S3.1, Algorithm 1]: a projection learns to turn Q-Former outputs into tokens of a frozen LLM.

    python vdg_align.py --chat cc3m/chat.json --images cc3m/images --llm meta-llama/Llama-2-7b-hf
    torchrun --nproc_per_node 8 vdg_align.py --chat cc3m/chat.json --images cc3m/images

Reads a vision side (InstructBLIP or BLIP-2; the language model inside is never read), a LLaMA, LLaVA-like captions.
Writes OUT/projection.safetensors, OUT/config.json, OUT/log.jsonl, OUT/last/ (training state: the same command resumes).
"""

import common

common.early_help(__name__, __file__)  # answers --help before torch is imported

import hashlib
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

import data
import memory

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
def checkpoint_file(source: str, name: str) -> str | None:
    """Path of a file of a checkpoint folder or hub id (downloaded once), None when the checkpoint has no such file."""
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise common.UserError(f"{source}: no such folder, and no hub id (owner/name) either")
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def read_tensors(source: str, prefixes: tuple[str, ...] = ("",)):
    """Yield (name, tensor) under the prefixes; shards that hold none of them are neither opened nor downloaded."""
    index = checkpoint_file(source, "model.safetensors.index.json")
    if index:
        weight_map = common.read_json(index)["weight_map"]
        shards = sorted({file for name, file in weight_map.items() if name.startswith(prefixes)})
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        if os.path.basename(shard) != shard:
            raise common.UserError(f"{index}: names a file outside its folder: {shard!r}")
        path = checkpoint_file(source, shard)
        if path is None:
            raise common.UserError(f"{source}: {shard} is missing; download the checkpoint again (safetensors only)")
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]
            for name in names:
                with safe_open(path, "pt") as file:  # anew: pages once read stay resident while a file is open
                    yield name, file.get_tensor(name)
        except SafetensorError as fault:
            raise common.UserError(f"{path}: damaged ({fault}); download or copy it again") from fault


def read_config(source: str, kinds: tuple[str, ...]):
    """config.json of a folder or hub id as a transformers config; its model_type must be one of kinds."""
    if checkpoint_file(source, "config.json") is None:
        raise common.UserError(f"{source}: no config.json; a folder written by save_pretrained, or a hub id, is wanted")
    config = AutoConfig.from_pretrained(source, local_files_only=os.path.isdir(source))
    if config.model_type not in kinds:
        raise common.UserError(f"{source}: a {config.model_type} model; wanted {' or '.join(kinds)}")
    return config


# ---- vision: ViT + Q-Former (frozen) + projection (trained) [S3.1] ----
def vision_classes(kind: str) -> tuple[type, type]:
    if kind == "instructblip":
        return transformers.InstructBlipVisionModel, transformers.InstructBlipQFormerModel
    return transformers.Blip2VisionModel, transformers.Blip2QFormerModel


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
        self.preprocess = data.Preprocess.from_folder(source, "instructblip")

    def _load(self, source: str) -> None:
        """Strict, by prefix: from_pretrained of one part of a whole checkpoint gives random weights and only warns."""
        wanted = {n: t for n, t in self.state_dict().items() if not n.startswith("projection.")}
        for name, tensor in read_tensors(source, ("vision_model.", "qformer.", "query_tokens")):
            if name.endswith("position_ids"):  # older checkpoints store this arange
                continue
            if name not in wanted or wanted[name].shape != tensor.shape:
                here = tuple(wanted[name].shape) if name in wanted else "no such weight"
                raise common.UserError(f"{source}: {name} is {tuple(tensor.shape)} in the file, {here} by config.json")
            wanted.pop(name).copy_(tensor)
        if wanted:
            raise common.UserError(f"{source}: {len(wanted)} weights are not in the files, first {min(wanted)}")

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


def load_llm(name: str, dtype: torch.dtype, device: torch.device | str, quantize: str = ""):
    """LLaMA from a folder or hub id -> (model in eval mode, frozen; tokenizer). quantize: "" | "int8" | "nf4".

    Weights stream from the files to the device, one tensor at a time: no accelerate, and no copy in host memory."""
    if quantize not in ("", "int8", "nf4"):
        raise common.UserError(f'quantize is {quantize!r}; "", "int8" or "nf4" is wanted')
    tokenizer = load_tokenizer(name)
    config = read_config(name, ("llama",))
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    convert = quantizer(llm, quantize, dtype, device) if quantize else None
    missing = {n for n, _ in llm.named_parameters()}  # a tied lm_head.weight is not listed
    for key, tensor in read_tensors(name):
        if key not in missing:
            if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tie_word_embeddings):
                continue  # older checkpoints store them
            raise common.UserError(f"{name}: {key} is not a weight of the LLaMA that config.json describes")
        path, leaf = key.rsplit(".", 1)
        module = llm.get_submodule(path)
        shape = (
            (module.out_features, module.in_features) if isinstance(module, nn.Linear) else getattr(module, leaf).shape
        )
        if tensor.shape != tuple(shape):
            raise common.UserError(f"{name}: {key} is {tuple(tensor.shape)} in the file, {tuple(shape)} by config.json")
        tensor = tensor.to(dtype)
        weight = convert(module, leaf, tensor) if convert else None
        module._parameters[leaf] = nn.Parameter(tensor.to(device)) if weight is None else weight
        missing.discard(key)
    llm.tie_weights()
    if missing:
        raise common.UserError(f"{name}: {len(missing)} weights are not in the files, first {min(missing)}")
    llm.model.rotary_emb = type(llm.model.rotary_emb)(config).to(device)  # its buffers are in no file, fp32
    return llm.requires_grad_(False).eval(), tokenizer


def quantizer(llm: nn.Module, quantize: str, dtype: torch.dtype, device: torch.device | str):
    """Swap the linears (all but lm_head) for bitsandbytes' -> function (module, leaf, tensor) -> weight or None."""
    import bitsandbytes as bnb  # lazily: optional, and its CPU backend logs at import

    for name, linear in list(llm.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            size = (linear.in_features, linear.out_features, linear.bias is not None)
            with torch.device("meta"):
                if quantize == "nf4":
                    swap = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
                else:
                    swap = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
            llm.set_submodule(name, swap)

    def convert(module: nn.Module, leaf: str, tensor: torch.Tensor) -> nn.Parameter | None:
        if leaf == "weight" and isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.nn.Params4bit(tensor, False, quant_type="nf4", compress_statistics=True, module=module)
            return weight.to(device)
        if leaf == "weight" and isinstance(module, bnb.nn.Linear8bitLt):
            return bnb.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False).to(device)
        return None

    return convert


def load_tokenizer(name: str):
    """Tokenizer of a LLaMA folder or hub id; it must have the fast form, a start and an end token."""
    if checkpoint_file(name, "tokenizer.json") is None:
        raise common.UserError(
            f"{name}: no tokenizer.json (tokenizer.model alone cannot be read); "
            "where sentencepiece is installed, AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=os.path.isdir(name))
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise common.UserError(f"{name}: its tokenizer_config.json sets no bos_token or no eos_token")
    return tokenizer


# ---- text pieces and image tokens -> one batch of embeddings ----
def tokenize(tokenizer, text: str) -> list[int]:
    """Ids of one piece of text, without special tokens: a "</s>" written in a caption is text, not an end."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def answer_ids(tokenizer, text: str) -> list[int]:
    """Ids of a supervised text and the end token after it."""
    ids = tokenize(tokenizer, text.strip())
    if not ids:
        raise common.UserError(f"a caption without text: {text!r}; a row needs at least one supervised token")
    return [*ids, tokenizer.eos_token_id]


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
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None, causal: bool = False) -> torch.Tensor:
    """q (B, T, H, d), k and v (B, S, H_kv, d), mask (T, S) True where seen, or None -> (B, T, H, d)."""
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **grouped).transpose(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x (..., T, H, d), cos and sin (T, 1, d)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def run_layers(llm: nn.Module, x: torch.Tensor, positions: torch.Tensor, attend, keep=..., checkpoint: bool = False):
    """x (..., T, D) at positions (T,) -> normalised outputs of the last layer, where `keep` (an index) says.

    attend(layer, q (..., T, H, d), k (..., T, H_kv, d), v) -> (..., T, H, d). The numbers of LlamaModel.forward, less
    what only other tokens of the last layer need. checkpoint: keep each layer's input alone, compute the rest again."""
    cos, sin = (table[0, :, None] for table in llm.model.rotary_emb(x, positions[None]))  # (T, 1, d)
    last = len(llm.model.layers) - 1

    def layer(i: int, x: torch.Tensor) -> torch.Tensor:
        block = llm.model.layers[i]
        h, attn = block.input_layernorm(x), block.self_attn
        q, k, v = (linear(h).unflatten(-1, (-1, attn.head_dim)) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        h = attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2)
        if i == last:
            x, h = x[keep], h[keep]
        x = x + attn.o_proj(h)
        return x + block.mlp(block.post_attention_layernorm(x))

    for i in range(last + 1):
        # non-reentrant: the input of the first layer may need no gradient
        x = checkpointed(layer, i, x, use_reentrant=False) if checkpoint else layer(i, x)
    return llm.model.norm(x)


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


def caption_row(tokenizer, caption: data.Caption, image: torch.Tensor) -> list:
    """Pieces of one caption's prompt: the instruction and the image tokens (Q, D) in the order of the data."""
    start, prompt = [tokenizer.bos_token_id], caption.prompt.strip()
    if caption.image_first:
        return [start, image, tokenize(tokenizer, f"\n{prompt}\n")]
    return [start + tokenize(tokenizer, f"{prompt}\n"), image, tokenize(tokenizer, "\n")]


# ---- one run: order, start, faults ----
def plan(groups: list[list[int]], epochs: int, items: int, seed: int, world: common.World, done: int):
    """Yield (step, epoch, this rank's items) from step `done` on; a step has `items` on all ranks.

    groups: items that keep together while the groups are shuffled; of one item each as a rule."""
    per_epoch = math.ceil(sum(map(len, groups)) / items)
    for epoch in range(done // per_epoch, epochs):
        order = [item for g in data.epoch_order(len(groups), seed, epoch) for item in groups[g]]
        batches = data.rank_batches(order, items, world.rank, world.size)
        for i, mine in enumerate(batches):
            if epoch * per_epoch + i >= done:
                yield epoch * per_epoch + i, epoch, mine


def ahead(load, jobs):
    """Yield (job, load(job)) while a thread loads the next; a user's mistake in load is yielded as its result."""

    def attempt(job):
        try:
            return load(job)
        except (common.UserError, OSError) as fault:
            return fault

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for job in jobs:
            following = job, pool.submit(attempt, job)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()


def stop_together(result) -> None:
    """All ranks stop when one loaded a fault: one that stops alone leaves the others waiting in a collective."""
    found = isinstance(result, Exception)
    if common.any_rank(found):
        raise common.UserError(next(text for text in common.gather_objects(str(result) if found else "") if text))


def stop_not_finite(step: int, loss: float, norm: float, mine: float, names: list[str]) -> None:
    """All ranks, before the optimiser steps; loss and norm are of all ranks, mine and names of this one."""
    guilty = [name for part in common.gather_objects([] if math.isfinite(mine) else names) for name in part]
    raise common.UserError(
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
        return data.load_pixels(images, repeated, transforms, workers) if mine else None

    found = {}
    for group, pixels in common.progress(ahead(load, groups), "encode", len(groups)):
        stop_together(pixels)
        queries = vision.query_tokens[:0] if pixels is None else vision.queries(pixels)
        k = len(views(group[0][0]))
        queries = common.gather_with_grad(queries.reshape(len(queries) // k, k, *queries.shape[1:]))
        found |= zip([name for chunk in group for name in chunk], queries.cpu(), strict=True)
    return found


def check_texts(texts, where: str, most: int) -> None:
    """Stop at start-up over (id, text) that is blank (nothing to learn) or longer than `most` characters (memory)."""
    for name, text in texts:
        if not 0 < len(text.strip()) <= most:
            raise common.UserError(
                f"{where}: record {name}: a text of {len(text.strip())} characters, 1 to {most} wanted; correct it, "
                "or raise --max_characters"
            )


def fingerprint(items: list) -> str:
    """A hash of records: a resumed run must find the data that it began with."""
    return hashlib.sha256("\n".join(map(repr, items)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def main() -> None:
    transformers.logging.set_verbosity_error()
    world = common.init_world(DEVICE)
    dtype = common.pick_dtype(DTYPE, world.device)
    common.at_least(globals(), EPOCHS=1, BATCH=1, ENCODE_BATCH=1, ACCUMULATE=1, SAVE_EVERY=1, WORKERS=0)
    common.at_least(globals(), LR=0, WARMUP=0, FLOOR=0, CLIP=0, WEIGHT_DECAY=0, START=0)
    shape, size = memory.llm_shape(LLM), 2 if PLAN and DTYPE == "auto" else dtype.itemsize

    def parts(quantize: str, checkpoint: bool, batch: int) -> dict[str, float]:
        trained, tokens = (768 + 1) * shape.width, (60, 15)  # of a caption of CC3M with its prompt; supervised ones
        training = memory.training(shape, size, batch * tokens[0], batch * tokens[1], trained, 8, (), checkpoint)
        return memory.frozen(shape, quantize, size, VISION) | training

    options = memory.options_of(parts, QUANTIZE, CHECKPOINT, BATCH)
    if PLAN:
        memory.say(options, [80, 40, 24])
        return
    captions, images = data.read_chat(CHAT), data.ImageStore(IMAGES)
    if CHECK:
        report, ok = data.check_report((caption.image for caption in captions), images)
        if not ok:
            raise common.UserError(report)
        common.say(report)
        return
    captions = data.drop_missing(captions, lambda caption: [caption.image], images, "captions")
    check_texts(((caption.id, caption.text) for caption in captions), CHAT, MAX_CHARACTERS)
    items = BATCH * ACCUMULATE * world.size
    total = EPOCHS * math.ceil(len(captions) / items)

    common.lock_folder(OUT)
    constants = {**common.constants_of(globals()), "items a step": items, "data": fingerprint(captions)}
    saved = common.load_state(OUT, constants, common.MAY_CHANGE | {"BATCH", "ACCUMULATE", "IMAGES", "CHECKPOINT"})
    done, state = saved or (0, None)
    if done >= total and os.path.exists(f"{OUT}/projection.safetensors"):
        common.say(f"{OUT} is finished ({total} steps); for another run take another --out")
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
        common.say(f"resuming after step {done} of {total}")

    everything = sorted({caption.image for caption in captions}) if KEEP else []
    kept = encode(vision, images, everything, lambda name: [vision.preprocess], ENCODE_BATCH, WORKERS, world)

    def load(job) -> torch.Tensor | None:
        """Pixels (or kept Q-Former outputs) of this rank's captions."""
        names = [captions[i].image for i in job[2]]
        if KEEP and names:
            return torch.cat([kept[name] for name in names])  # (n, Q, q_width)
        return data.load_pixels(images, names, vision.preprocess, WORKERS) if names else None

    log, began, seen = common.Log(OUT, done), time.time(), 0
    jobs = ahead(load, plan([[i] for i in range(len(captions))], EPOCHS, items, SEED, world, done))
    for (step, epoch, mine), inputs in common.progress(jobs, "align", total - done):  # Algorithm 1
        stop_together(inputs)
        warm = (step + 1) / max(1, WARMUP * total)
        fall = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / total)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * min(warm, fall)

        answers = [answer_ids(tokenizer, captions[i].text) for i in mine]
        tokens = common.all_sum(sum(map(len, answers)))  # Eq. 1's mean is over the step's tokens on all ranks
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
        common.all_reduce_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, CLIP or math.inf).item()
        loss = common.all_sum(share)
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
            tokens_per_s=round(common.all_sum(seen) / (time.time() - began)),  # on all ranks, none of them padding
            memory=memory.peak(world.device),  # GiB on this rank
            seconds_left=round(pace * (total - step - 1)),
        )
        stop = common.any_rank(common.stop_requested())
        if stop or (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            state = {"projection": vision.projection.state_dict(), "optimizer": optimizer.state_dict()}
            common.save_state(OUT, step + 1, state, constants)
        if stop:
            common.say(f"stopped after step {step + 1} of {total}; the same command resumes")
            raise SystemExit(143)

    config = {"stage": "align", "vision": located(VISION), "llm": located(LLM), "quantize": QUANTIZE}
    config |= {"dim": llm.config.hidden_size, "steps": total, "captions": len(captions), "seed": SEED}
    common.save_folder(OUT, {"projection.safetensors": vision.projection.state_dict()}, {"config.json": config})
    common.say(f"wrote {OUT}/projection.safetensors")


def located(source: str) -> str:
    """A checkpoint's name for config.json: the next stage may run from another folder."""
    return os.path.abspath(source) if os.path.isdir(source) else source


if __name__ == "__main__":
    common.override(globals())
    common.run(memory.advise(main, "--batch 16 --accumulate 4, --checkpoint true or --quantize nf4"))
