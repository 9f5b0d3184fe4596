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
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from common import batches, files, llama, memory, ranks, seeds
from common.annotations import Caption, read_chat
from common.console import UserError, progress, run, say
from common.flags import at_least, below, constants_of, override, within
from common.hub import located, near
from common.images import ImageStore, Preprocess, load_bytes
from common.llama import answer_ids, attention, llm_shape, load_llm, load_tokenizer, run_layers, tokenize
from common.pretrained import build_empty, read_config, read_exactly, require_held
from common.ranks import Log, World
from common.resume import resume_state
from common.same_model import KINDS, PREFIXES, STORED, models_sha256
from common.tokenizer import tokenizer_sha256
from kernels.rows import Gather

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
KEEP = False  # encode each image once, its Q-Former outputs stay in host memory, 96 KiB in fp32: for EPOCHS > 1 [ours]
ENCODE_BATCH = 64  # images per forward pass when they are encoded once [ours]
ACCUMULATE = 1  # forward passes per optimiser step; 512 captions a step in the paper: 8 GPUs x 64 x 1 [ours]
LR = 1e-3  # peak learning rate [S4.1]
WARMUP = 0.03  # share of the steps over which the rate rises linearly [ours: the paper is silent; LLaVA's value]
FLOOR = 0.0  # the rate falls along a cosine to this share of LR [ours: the paper is silent; LLaVA decays to zero]
BETAS = (0.9, 0.99)  # decay of AdamW's two moments [S4.1]
WEIGHT_DECAY = 0.05  # weight decay of AdamW [S4.1]
CLIP = 1.0  # largest gradient norm, 0 = no clipping [ours: the paper is silent]
CHECKPOINT = False  # keep each layer's input alone for the backward pass: less memory, a third more work [ours]
START_SIZE = 0.1  # size of an image token at the start, in word embeddings; PyTorch's start drowns the words [ours]

# ---- run ----
OUT = "out/align"  # folder of the checkpoint and the log
SEED = 0  # fixes the projection's start and the order of the captions
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the frozen models: bf16 on cuda [S4.1], fp32 on CPU; the projection itself stays fp32 [ours]
SAVE_EVERY = 100  # steps between training states in OUT/last
WORKERS = 16  # processes that decode images, one a CPU of this rank at most; 0 = none but its own
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK_DECODE = False  # with CHECK: also decode every picture, which finds those that are cut short
CHECK = False  # only look at the data: counts of expected, present and unreadable images, then stop


# may change at a resume: a step keeps its items, and hashes tell whether the models are the same
_FREE = {"BATCH", "ACCUMULATE", "CHAT", "IMAGES", "CHECKPOINT", "LLM", "VISION"}


# ---- vision: ViT + Q-Former (frozen) + projection (trained) [S3.1] ----
def vision_classes(kind: str) -> tuple[type, type]:
    if kind == "instructblip":
        return transformers.InstructBlipVisionModel, transformers.InstructBlipQFormerModel
    return transformers.Blip2VisionModel, transformers.Blip2QFormerModel


def empty_vision(source: str) -> tuple:
    """-> config.json, and ViT and Q-Former as shapes alone: a config.json that describes none stops here."""
    config = read_config(source, KINDS["vision"], "--vision")
    vit, qformer = vision_classes(config.model_type)

    def build() -> nn.ModuleList:
        return nn.ModuleList([vit(config.vision_config), qformer(config.qformer_config)])

    return config, build_empty(build, source, "--vision")


def vision_weights(source: str) -> tuple[int, int]:
    """How many weights ViT and Q-Former have; those of InstructBLIP are known without a download."""
    if not os.path.isdir(source):
        return 990_000_000, 180_000_000  # ViT-g/14, Q-Former of InstructBLIP
    vit, qformer = (sum(p.numel() for p in part.parameters()) for part in empty_vision(source)[1])
    return vit, qformer


def image_tokens(source: str) -> int:
    """Q, the tokens that an image has."""
    return read_config(source, KINDS["vision"], "--vision").num_query_tokens


class VisionProjector(nn.Module):
    """Pixels (B, 3, S, S) -> Q-Former outputs (B, Q, q_width), frozen -> projection (B, Q, D), D the LLM's width.

    dtype: of the ViT and of the Q-Former's outputs; the Q-Former itself is fp32 [ours], a sixth of the weights."""

    def __init__(self, source: str, d_llm: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        config, empty = empty_vision(source)
        require_held(empty, source, "--vision")
        self.takes_text = config.model_type == "instructblip"  # its Q-Former insists on an input_ids argument
        vit, qformer = vision_classes(config.model_type)
        q_width = config.qformer_config.hidden_size
        self.projection = nn.Linear(q_width, d_llm)  # start_quietly draws its start
        with torch.device(device):
            self.vision_model = vit(config.vision_config)
            self.qformer = qformer(config.qformer_config)
            self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, q_width))
        self._load(source)
        self.requires_grad_(False).to(device)
        self.dtype = dtype
        self.vision_model.to(dtype)
        self.projection.requires_grad_(True)  # fp32: AdamW's steps at lr 1e-3 would be lost in bf16's 8 bits
        self.eval()  # the Q-Former has dropout 0.1
        self.preprocess = Preprocess.from_folder(source, "instructblip")

    def _load(self, source: str) -> None:
        """Strict, by prefix: from_pretrained of one part of a whole checkpoint gives random weights and only warns."""
        wanted = {n: t for n, t in self.state_dict().items() if not n.startswith("projection.")}
        shapes = {name: tensor.shape for name, tensor in wanted.items()}
        prefixes, stored = PREFIXES["vision"], STORED["vision"]
        for name, tensor in read_exactly(source, shapes, prefixes, ignored=stored, flag="--vision"):
            wanted[name].copy_(tensor)

    @torch.no_grad()
    def queries(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, S, S) -> (B, Q, q_width): the learned queries once they attended to the image, no text."""
        device = self.query_tokens.device
        patches = self.vision_model(pixels.to(device, self.dtype)).last_hidden_state  # (B, P, D), already layer-normed
        prompt = {"input_ids": None} if self.takes_text else {}
        start = self.query_tokens.expand(len(pixels), -1, -1)
        queries = self.qformer(query_embeds=start, encoder_hidden_states=patches.float(), **prompt).last_hidden_state
        return queries.to(self.dtype)

    def queries_of_bytes(self, pictures: torch.Tensor) -> torch.Tensor:
        """Bytes (B, S, S, 3) on the CPU, as preprocess.crop makes them -> (B, Q, q_width)."""
        return self.queries(self.preprocess.normalise(pictures.to(self.query_tokens.device, non_blocking=True)))

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """queries (B, Q, q_width) -> tokens in the LLM's embedding space (B, Q, D), fp32 as the projection."""
        return self.projection(queries.to(self.projection.weight))


# ---- where the projection starts ----
@torch.no_grad()
def start_quietly(projection: nn.Linear, std: float, seed: int) -> None:
    """Gaussian weights, no bias: of Q-Former outputs, which are layer-normed, it makes coordinates of this std.

    An image token far larger than a word hardly changes from layer to layer (what the layers add is of a word's size),
    so nothing the LLM knows to do with words is done with it: on the embedded world captions came out well and
    comparisons did not. Drawn on the CPU by the seed alone: the same start on every device."""
    draw = seeds.seeded_generator("projection", seed)
    drawn = torch.empty(projection.weight.shape).normal_(std=std / projection.in_features**0.5, generator=draw)
    projection.weight.copy_(drawn)
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


# ---- loss ----
def caption_loss(llm: nn.Module, batch: Packed, tokens: float, checkpoint: bool = False) -> torch.Tensor:
    """Eq. 1: next-token cross-entropy summed over supervised positions / tokens (those of the whole step, all ranks).

    HF's own loss is a mean per rank and batch: averaged over ranks, it weighs short captions more. Linears see no
    padding; attention, a few percent of the work, sees right-padded rows, where causal order is all the mask it needs.
    """

    rows, home = Gather(batch.slots, len(batch.embeddings)), Gather(batch.home, batch.slots.numel())

    def attend(_, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(rows(q), rows(k), rows(v), causal=True)  # (B, T, H, d)
        return home(out.flatten(0, 1))

    hidden = run_layers(llm, batch.embeddings, batch.positions, attend, batch.predict, checkpoint)
    logits = llm.lm_head(hidden).float()  # (M, V): a fifth of the positions
    return F.cross_entropy(logits, batch.labels, reduction="sum") / tokens


def texts_around(caption: Caption) -> tuple[str, str]:
    """The instruction before and after the image, in the order of the data."""
    prompt = caption.prompt.strip()
    return ("", f"\n{prompt}\n") if caption.image_first else (f"{prompt}\n", "\n")


def caption_row(tokenizer, caption: Caption, image: torch.Tensor) -> list:
    """Pieces of one caption's prompt: the instruction and the image tokens (Q, D)."""
    before, after = (tokenize(tokenizer, text) if text else [] for text in texts_around(caption))
    return [[tokenizer.bos_token_id, *before], image, after]


# ---- what this stage and the next do alike in a run ----
def encode(vision: VisionProjector, images, names: list[str], views, batch: int, workers: int, world) -> dict:
    """Q-Former outputs {name: (K, Q, q_width) on the CPU}, the same on all ranks; views: name -> K transforms to bytes.

    Ranks share the work, in chunks that do not depend on their number: a chunk's size can change the last bit."""
    rounds = list(batches.chunks(batches.chunks(names, batch), world.size))  # in each a chunk of names for every rank

    def load(chunk_of_rank: list[list[str]]) -> torch.Tensor | None:
        if world.rank >= len(chunk_of_rank):
            return None
        mine = chunk_of_rank[world.rank]
        transforms = [transform for name in mine for transform in views(name)]
        repeated = [name for name in mine for _ in views(name)]
        return load_bytes(images, repeated, vision.preprocess, workers, transforms)

    found = {}
    for chunk_of_rank, pictures in progress(batches.ahead(load, rounds), "encode", len(rounds)):
        batches.stop_together(pictures)
        queries = vision.query_tokens[:0].to(vision.dtype) if pictures is None else vision.queries_of_bytes(pictures)
        k = len(views(chunk_of_rank[0][0]))
        queries = ranks.gather(queries.reshape(len(queries) // k, k, *queries.shape[1:]))
        found |= zip([name for chunk in chunk_of_rank for name in chunk], queries.cpu(), strict=True)
    return found


@torch.no_grad()
def share_start(weights: list[nn.Parameter], world: World) -> None:
    """Every rank starts from rank 0's weights: another kind of CPU may round the same draw otherwise."""
    if world.size > 1:
        for weight in weights:
            weight.copy_(ranks.all_sum(weight if world.rank == 0 else torch.zeros_like(weight)))


def pace(seconds: float, steps: int, left: int, per_step: int, tokens: int, world: World) -> dict[str, float]:
    """ranks.pace, this rank's tokens of all these steps a second, summed over ranks (none is padding), and GiB held."""
    more = {"tokens_per_s": round(ranks.all_sum(tokens) / seconds), "memory": memory.peak(world.device)}
    return ranks.pace(seconds, steps, left, per_step) | more


# ---- this run: what main() calls, and main() alone, may read the constants ----
def check_flags() -> None:
    at_least(globals(), EPOCHS=1, BATCH=1, ENCODE_BATCH=1, ACCUMULATE=1, SAVE_EVERY=1, WORKERS=0)
    at_least(globals(), LR=0, CLIP=0, WEIGHT_DECAY=0, START_SIZE=0, BETAS=0)
    within(globals(), WARMUP=(0, 1), FLOOR=(0, 1))
    below(globals(), BETAS=1)


def memory_options(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Flags -> bytes by purpose: of the run as it stands, then of ever smaller ones."""
    shape, vision = llm_shape(LLM), vision_weights(VISION)
    itemsize = 2 if PLAN and DTYPE == "auto" else dtype.itemsize

    def parts(quantize: str, checkpoint: bool, batch: int) -> dict[str, float]:
        tokens, supervised = 60 * batch, 15 * batch  # of a caption of CC3M with its prompt
        trained = (768 + 1) * shape.width
        frozen = memory.frozen(shape, quantize, itemsize, vision)
        return frozen | memory.training(shape, itemsize, tokens, supervised, trained, 8, (), checkpoint)

    return memory.options_of(parts, QUANTIZE, CHECKPOINT, BATCH)


def read_captions() -> tuple[list[Caption], ImageStore]:
    captions = read_chat(CHAT)
    if not captions:
        raise UserError(f"{CHAT} holds no caption; wanted a list of records in LLaVA's format, one or more")
    return captions, ImageStore(IMAGES)


def check_captions(captions: list[Caption], images: ImageStore) -> list[Caption]:
    """Those whose image is there; UserError where many are not, and for a text that is blank or too long."""
    captions = batches.drop_missing(captions, lambda caption: [caption.image], images, "captions")
    batches.check_texts(((caption.id, caption.text) for caption in captions), CHAT, MAX_CHARACTERS)
    return captions


def load_models(dtype: torch.dtype, world: World) -> tuple[nn.Module, object, VisionProjector]:
    """-> LLM and its tokenizer, vision side; all frozen but the projection, which stands at its start."""
    llm, tokenizer = load_llm(LLM, dtype, world.device, QUANTIZE)
    vision = VisionProjector(VISION, llm.config.hidden_size, world.device, dtype)
    start_quietly(vision.projection, START_SIZE * llm.get_input_embeddings().weight.float().std().item(), SEED)
    share_start(list(vision.projection.parameters()), world)
    return llm, tokenizer, vision


def load_steps(captions: list[Caption], images: ImageStore, vision: VisionProjector, steps: Iterable, world: World):
    """Yields each step with its inputs: bytes (n, S, S, 3), or with KEEP Q-Former outputs (n, Q, q_width)."""
    everything = sorted({caption.image for caption in captions}) if KEEP else []
    memory.say_kept(len(everything), vision.query_tokens.to(vision.dtype))
    kept = encode(vision, images, everything, lambda name: [vision.preprocess.crop], ENCODE_BATCH, WORKERS, world)

    def load(step: batches.Step) -> torch.Tensor | None:
        names = [captions[i].image for i in step.items]
        if not names:
            return None
        if KEEP:
            return torch.cat([kept[name] for name in names])
        return load_bytes(images, names, vision.preprocess, WORKERS)

    return batches.ahead(load, steps)


def queries_of(vision: VisionProjector, inputs: torch.Tensor) -> torch.Tensor:
    """What load_steps gives of B captions -> Q-Former outputs (B, Q, q_width)."""
    return inputs if KEEP else vision.queries_of_bytes(inputs)


def learning_rate(step: int, total: int) -> float:
    """Rises linearly over WARMUP of the steps, falls along a cosine."""
    warm = (step + 1) / max(1, WARMUP * total)
    fall = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * step / total)) / 2
    return LR * min(warm, fall)


def earlier_state(captions: list[Caption], images: ImageStore, per_step: int, models: dict[str, str]) -> tuple:
    """-> what a resume must agree on, and how far an earlier run came: its steps and its state, or 0 and None."""
    constants = {**constants_of(globals()), "items a step": per_step, "data": batches.fingerprint(captions)}
    constants |= {f"model of --{role}": found for role, found in models.items()}
    tokenizer, besides = load_tokenizer(LLM), image_tokens(VISION) + 2  # the start token and the end token
    rows = ((f"{CHAT}: record {c.id}", besides, (*texts_around(c), c.text.strip())) for c in captions)
    llama.require_room(LLM, tokenizer, rows)
    constants["tokenizer"] = tokenizer_sha256(tokenizer)
    constants["pixels"] = Preprocess.from_folder(VISION, "instructblip").described()
    pictures = [(images, [caption.image for caption in captions])]
    return constants, *(resume_state(OUT, constants, pictures, files.MAY_CHANGE | _FREE) or (0, None))


def save_result(vision: VisionProjector, tokenizer, models: dict[str, str], steps: int, captions: int) -> None:
    """OUT's checkpoint, which stage 2 starts from; models: their hashes."""
    config = {"stage": "align", "vision": located(VISION), "llm": located(LLM), "quantize": QUANTIZE}
    config["near"] = {"vision": near(VISION, OUT), "llm": near(LLM, OUT)}  # if all of it moves
    config["models_sha256"] = models
    config |= {"dim": vision.projection.out_features, "steps": steps, "captions": captions, "seed": SEED}
    config["tokenizer_sha256"], config["pixels"] = tokenizer_sha256(tokenizer), vision.preprocess.described()
    files.save_folder(OUT, {"projection.safetensors": vision.projection.state_dict()}, {"config.json": config})
    say(f"wrote {OUT}/projection.safetensors")


def main() -> None:
    world = ranks.init_world(DEVICE)
    dtype = ranks.pick_dtype(DTYPE, world.device)
    check_flags()
    options = memory_options(dtype)
    if PLAN:
        return memory.say(options)
    captions, images = read_captions()
    if CHECK:
        names, what = [caption.image for caption in captions], f"{len(captions):,} captions"
        return batches.say_check(names, images, what, OUT, CHECK_DECODE, WORKERS)
    captions = check_captions(captions, images)
    per_step = BATCH * ACCUMULATE * world.size  # captions
    total = EPOCHS * math.ceil(len(captions) / per_step)  # steps

    # the folder is this run's alone; the same command goes on where it stopped
    files.lock_folder(OUT, "align")
    models = models_sha256({"llm": LLM, "vision": VISION})
    constants, start, state = earlier_state(captions, images, per_step, models)
    if files.is_finished(OUT, "projection.safetensors", start, total):
        return

    # ViT, Q-Former and LLM stay as they are, the projection learns
    memory.say(options, [memory.has(world.device)], world.device.type)
    llm, tokenizer, vision = load_models(dtype, world)
    weights = list(vision.projection.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    if state:
        vision.projection.load_state_dict(state["projection"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"resuming after step {start} of {total}")

    # Algorithm 1
    steps = batches.training_steps([[i] for i in range(len(captions))], EPOCHS, per_step, SEED, world, start)
    loaded = load_steps(captions, images, vision, steps, world)
    log, watch, seen = Log(OUT, start), ranks.Stopwatch(), 0
    bar = progress(loaded, "align", total, start)
    for (step, epoch, items), inputs in bar:
        # a rank that could not read its images stops all
        batches.stop_together(inputs, OUT)

        # a linear rise, then a cosine
        rate = learning_rate(step, total)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # this rank's captions; Eq. 1 is a mean over the tokens of all ranks
        mine = [captions[i] for i in items]
        answers = [answer_ids(tokenizer, caption.text) for caption in mine]
        tokens = ranks.all_sum(sum(map(len, answers)))
        share = 0.0  # of the loss, this rank's

        for part in batches.slices(len(mine), BATCH):
            # [S3.1]: image -> frozen ViT and Q-Former -> projection
            queries = queries_of(vision, inputs[part].to(world.device))
            pairs = zip(mine[part], vision(queries), strict=True)

            # the instruction with the image's tokens, then the caption
            rows = [caption_row(tokenizer, *pair) for pair in pairs]
            batch = pack(llm.get_input_embeddings(), rows, answers[part])

            # Eq. 1: next-token loss on the caption, through the frozen LLM
            loss = caption_loss(llm, batch, tokens, CHECKPOINT)
            loss.backward()
            share += loss.item()
            seen += len(batch.home)

        # shares of the loss and their gradients add up over the ranks
        ranks.all_reduce_gradients(weights)
        norm = nn.utils.clip_grad_norm_(weights, CLIP or math.inf).item()
        loss = ranks.all_sum(share)
        suspects = [] if math.isfinite(share) else [caption.id for caption in mine]
        batches.stop_if_not_finite(step + 1, loss + norm, suspects, log, "a lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        # a line of the log
        done = step + 1
        speed = pace(watch.seconds(), done - start, total - done, per_step, seen, world)
        log.write(step=done, epoch=epoch, loss=loss, lr=rate, grad_norm=norm, **speed)
        bar.set_postfix(loss=loss)

        # a state to resume from: now and then, at the end, when a signal came
        stop = ranks.any_rank(ranks.stop_requested())
        if stop or done % SAVE_EVERY == 0 or done == total:
            state = {"projection": vision.projection.state_dict()}
            state["optimizer"] = optimizer.state_dict()
            files.save_state(OUT, done, state, constants)
        if stop:
            say(f"stopped after step {done} of {total}; the same command resumes")
            raise SystemExit(143)

    save_result(vision, tokenizer, models, total, len(captions))


if __name__ == "__main__":
    override(globals())
    run(memory.advise(main, "--batch 16 --accumulate 4, --checkpoint true or --quantize nf4"))
