"""Stage 4, delta generation [S3.2]: the tuned VDG says, for a pair of images, what turns the reference into the target.

    python gen_deltas.py --vdg out/vdg --pairs out/mine/pairs.jsonl --images aux/images
    torchrun --nproc_per_node 8 gen_deltas.py --vdg out/vdg --triplets cirr/train --root cirr --out out/same_pairs

Reads a VDG (vdg_tune.py), the pairs of mine_pairs.py (with subgroups.jsonl beside) or of human triplets, and images.
Writes OUT/parts/part-R-of-N.jsonl as it goes, then OUT/pseudo.jsonl, cirr/ (the same in CIRR's layout), report.json
and deltas.html.

A delta is a function of the VDG, the two images, the pair's id and the sampling constants, never of batch, order or
number of ranks: the same command goes on after a kill, also with another batch size or on another number of ranks.
Deltas already in OUT are kept: if pictures changed under the same names, or the LLM in its folder, use a new OUT.
On a CPU with MKL this holds to the bit; on a GPU, where a product of another shape rounds otherwise, at the same BATCH.
"""

import os

# Has MKL add up a matrix product in one order, whatever the number of rows or threads. Without it the logits of a pair
# in a batch of 3 and of the same pair in a batch of 64 differ by 2e-5, which flips a word now and then. From eight rows
# on it costs no time that could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import common

common.early_help(__name__, __file__)

import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import nn

import data
import memory
import pages
import vdg_align
import vdg_tune

# ---- what is described ----
VDG = "out/vdg"  # checkpoint of vdg_tune.py
PAIRS = "out/mine/pairs.jsonl"  # pairs of mine_pairs.py
IMAGES = ""  # folder of the images; with TRIPLETS empty means the usual places in and beside ROOT
TRIPLETS = ""  # instead of PAIRS those of human triplets: "cirr/train", "fashioniq/train" (or ".../dress"), "jsonl"
ROOT = ""  # folder of the annotations of TRIPLETS; for "jsonl" the file
FILTER = ""  # checkpoint of train_cir.py: keep a triplet only if it finds the target; empty keeps all [ours]
FILTER_TOP = 1  # ... among the so many best of its subgroup [ours]
SUBGROUPS = 0  # describe this many random subgroups only, 0 = all; 3,345 for CIRR and 3,600 for FashionIQ [S4.1]
MAX_PAIRS = 0  # at most so many pairs, in whole random subgroups, 0 = all [ours]
REVERSE = False  # also say what turns the target into the reference: the same model, images swapped [ours]

# ---- sampling ----
TEMPERATURE = 0.2  # 0 = always the likeliest token [S4.1]
TOP_K = 50  # tokens to draw from, 0 = all [S4.1]
MAX_NEW = 32  # tokens of a delta at most [ours: the paper is silent; the release's value]
GRAPH = True  # on a GPU replay each decoding step as one CUDA graph; not with a quantised LLM [ours: speed]
MERGE = True  # fold LoRA into the LLM's weights, which saves its products; a quantised LLM keeps them apart [ours]

# ---- run ----
OUT = "out/deltas"  # folder of everything written
BATCH = 64  # pairs decoded together
ENCODE_BATCH = 32  # images per forward pass of the ViT
SHOW = 24  # pairs on the sample page deltas.html
WORKERS = 8  # threads that decode images
SEED = 0  # fixes what is drawn
DEVICE = "auto"  # "auto", "cpu" or "cuda"
DTYPE = "auto"  # of the frozen models: bf16 on cuda, fp32 on CPU
PLAN = False  # only print the memory that the run would hold on cards of 80, 40 and 24 GB; nothing is loaded
CHECK = False  # only look at pairs and images: counts of expected, present and unreadable images, then stop

FEWEST = 2**3  # rows decoded together: MKL's products of fewer than four add up in another order on AMD; no flag

REPEATED = re.compile(r"(?:^|\s)(\S+(?:\s\S+){0,7})(?:\s\1){2,}(?=\s|$)")  # up to eight words, three times in a row


# ---- pairs ----
def read_pairs(path: str, root: str) -> tuple[list[dict], dict, data.ImageStore]:
    """Records of pairs.jsonl, the members of each subgroup (subgroups.jsonl beside it, if there), and the images."""
    if not os.path.isdir(root):
        raise common.UserError(f"--images {root!r} is no folder; name the folder that the pairs' names are relative to")
    beside = Path(path).with_name("subgroups.jsonl")
    members = {group["id"]: group["members"] for group in common.read_jsonl(beside)} if beside.exists() else {}
    return common.read_jsonl(path), members, data.ImageStore(root)


def triplet_pairs(name: str, root: str, images: str) -> tuple[list[dict], dict, data.ImageStore]:
    """The pairs of human triplets; the human text is not among them, so that it cannot be taken for a generated one."""
    parts = name.split("/")
    if not 1 <= len(parts) <= 3:
        raise common.UserError(f"--triplets {name}: wanted dataset/split or dataset/split/category, as in cirr/train")
    dataset, split, category = parts + ["train", "all"][len(parts) - 1 :]
    categories = data.FASHIONIQ_CATEGORIES if dataset == "fashioniq" and category == "all" else (category,)
    pairs, members = [], {}
    for name in categories:
        triplets, store = data.training_triplets(dataset, root, split, name, images or None)
        kind = {"category": name} if dataset == "fashioniq" else {}
        pairs += [{"id": t.id, "reference": t.reference, "target": t.target} | kind for t in triplets]
        members |= {t.id: t.members for t in triplets if t.members}
    return pairs, members, store


def check_pairs(pairs: list[dict], where: str) -> None:
    """Ids are unique and names are safe; UserError names the record."""
    seen = set()
    for number, pair in enumerate(pairs, 1):
        here = f"{where}, record {number}"
        for key in ("id", "reference", "target"):
            if key not in pair:
                raise common.UserError(f'{here}: no "{key}"; wanted id, reference and target')
        data.safe_name(pair["reference"], here)
        data.safe_name(pair["target"], here)
        if not isinstance(pair["id"], int | str):
            raise common.UserError(f"{here}: id {data.shown(pair['id'])}; wanted a number or a string")
        if pair["id"] in seen:
            raise common.UserError(f"{here}: id {data.shown(pair['id'])} occurs twice; ids must differ")
        seen.add(pair["id"])


def choose_subgroups(pairs: list[dict], subgroups: int, max_pairs: int, seed: int) -> list[dict]:
    """Pairs of random whole subgroups, in their old order; a pair without a subgroup is one by itself."""
    if not subgroups and not max_pairs:
        return pairs
    groups: dict[object, list[dict]] = {}
    for pair in pairs:
        groups.setdefault(pair.get("subgroup", ("alone", pair["id"])), []).append(pair)
    names = list(groups)
    chosen, count = set(), 0
    for i in common.rng("subgroups", seed).permutation(len(names))[: subgroups or None]:
        count += len(groups[names[i]])
        if max_pairs and count > max_pairs:
            break
        chosen.add(names[i])
    if not chosen:
        raise common.UserError(f"--max_pairs {max_pairs} is less than one subgroup has; give at least {count}")
    return [pair for pair in pairs if pair.get("subgroup", ("alone", pair["id"])) in chosen]


def identity(pair: dict) -> tuple:
    """What makes a stored delta this pair's: an id that now means other images is another pair."""
    return pair["id"], pair["reference"], pair["target"]


# ---- Q-Former outputs, once an image ----
def encode_images(vision, images: data.ImageStore, names: list[str], folder: Path, batch: int, workers: int, world):
    """Q-Former outputs of every distinct picture -> ((N, Q, q_width) memory-mapped, {name: row}).

    The file is named by the hash of encoder weights and image contents: a changed picture or encoder is another file.
    Rows of an earlier file by the same encoder are taken over. Half precision unless the model computes in fp32."""
    share = {name: common.file_sha256(images.path(name)) for name in names[world.rank :: world.size]}
    content = {name: digest for part in common.gather_objects(share) for name, digest in part.items()}
    keys = sorted(set(content.values()))
    frozen = (item for item in vision.state_dict().items() if not item[0].startswith("projection."))  # that comes after
    encoder, shape = common.tensors_sha256(frozen), (len(keys), *vision.query_tokens.shape[1:])
    path = folder / f"{hashlib.sha256(json.dumps([encoder, keys]).encode()).hexdigest()[:16]}.npy"
    row = {key: i for i, key in enumerate(keys)}
    if not common.any_rank(not path.exists()):
        return np.load(path, mmap_mode="r"), {name: row[key] for name, key in content.items()}

    known = {}  # content -> its row in a file that an earlier run completed
    for header in sorted(folder.glob("*.json")):
        before = common.read_json(header)
        if before["encoder"] == encoder and header.with_suffix(".npy").exists():
            known |= zip(before["keys"], np.load(header.with_suffix(".npy"), mmap_mode="r"), strict=True)
    aside = path.with_suffix(".tmp")
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        dtype = np.float32 if vision.query_tokens.dtype == torch.float32 else np.float16
        rows = np.lib.format.open_memmap(aside, "w+", dtype, shape)
        for key in row.keys() & known.keys():
            rows[row[key]] = known[key]
        rows.flush()
    common.barrier()
    rows = np.lib.format.open_memmap(aside, "r+")
    first = {key: name for name, key in reversed(content.items())}  # one name of each content
    todo = [first[key] for key in keys if key not in known][world.rank :: world.size]

    def load(chunk: list[str]) -> torch.Tensor:
        return data.load_pixels(images, chunk, vision.preprocess, workers)

    fault = None
    for chunk, pixels in vdg_align.ahead(load, chunks(common.progress(todo, "images"), batch)):
        if isinstance(pixels, Exception):
            fault = pixels
            break
        # always a full batch: the same shape whatever the number of images, hence the same rounding
        queries = vision.queries(pixels[fill(list(range(len(chunk))), batch)].to(world.device))[: len(chunk)]
        rows[[row[content[name]] for name in chunk]] = queries.float().cpu().numpy()
    rows.flush()
    vdg_align.stop_together(fault)  # and waits for every rank's rows
    if world.rank == 0:
        common.write_json(path.with_suffix(".json"), {"encoder": encoder, "keys": keys})
        os.replace(aside, path)
        for old in folder.iterdir():
            if old.stem != path.stem:
                old.unlink()
    common.barrier()
    return np.load(path, mmap_mode="r"), {name: row[key] for name, key in content.items()}


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; taken one by one, so that a progress bar around them counts."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def fill(items: list, size: int) -> list:
    """The last item again and again until there are at least `size`."""
    return items + [items[-1]] * (size - len(items))


# ---- sampling: noise that belongs to the pair ----
def signed(number: int) -> int:
    """The low 64 bits of a number as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)  # splitmix64's step and its two multipliers
MIX1, MIX2 = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def row_key(seed: int, pair_id: int | str, direction: str) -> int:
    """64 bits from which all the noise of one delta comes."""
    digest = hashlib.sha256(json.dumps([seed, pair_id, direction]).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64, which wraps; >> copies the sign bit, so the mask takes it off."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * MIX1
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * MIX2
    return x ^ (x >> 31 & (1 << 33) - 1)


def gumbel(keys: torch.Tensor, position: int | torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """keys (B,), tokens (B, K) -> (B, K) float64: a Gumbel number for each (key, position, token), stateless."""
    step = GOLDEN * (position + 1)  # a tensor wraps by itself
    bits = mix(mix(keys + (step if torch.is_tensor(step) else signed(step)))[:, None] + GOLDEN * (tokens + 1))
    uniform = ((bits >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52  # inside (0, 1): 52 bits and a half are exact
    return -torch.log(-torch.log(uniform))


def choose(logits: torch.Tensor, keys: torch.Tensor, position, temperature: float, top_k: int) -> torch.Tensor:
    """logits (B, V), keys (B,) -> (B,) tokens: the likeliest at temperature 0, else a draw from the top k's softmax.

    position: of the token in its delta, a number or a tensor () of one.
    Gumbel-max: argmax(logits / temperature + Gumbel noise) is such a draw, its noise a function of (key, position)."""
    if temperature == 0:
        return logits.float().argmax(-1)
    top, tokens = logits.float().topk(min(top_k or logits.shape[1], logits.shape[1]))  # (B, K)
    best = (top.double() / temperature + gumbel(keys, position, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(1, best)[:, 0]


# ---- decoding: instruction once, each reference once, each pair; keys and values in buffers allocated once ----
class Cache(NamedTuple):
    """Keys and values (L, B, S, H_kv, d), S the longest sequence; rows and places beyond those in use hold anything."""

    keys: torch.Tensor
    values: torch.Tensor


def make_cache(llm, rows: int, length: int) -> Cache:
    config, like = llm.config, llm.get_input_embeddings().weight
    head = llm.model.layers[0].self_attn.head_dim
    shape = (config.num_hidden_layers, rows, length, config.num_key_value_heads, head)
    return Cache(*(torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in "kv"))


def feed(llm, x: torch.Tensor, cache: Cache, start: int | torch.Tensor) -> torch.Tensor:
    """x (n, T, D) after the first `start` places of the cache's first n rows -> logits of the next token (n, V).

    A tensor `start` keeps every shape independent of its value, as a CUDA graph wants: attention reads all S places,
    those not yet written behind a mask. A number reads only what is there."""
    n, t = x.shape[:2]
    places = start + torch.arange(t, device=x.device)  # (T,)
    stop = cache.keys.shape[2] if torch.is_tensor(start) else start + t
    one = t == 1 and not torch.is_tensor(start)  # sees all that is read
    mask = None if one else torch.arange(stop, device=x.device) <= places[:, None]  # (T, stop)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = cache.keys[layer, :n], cache.values[layer, :n]
        keys.index_copy_(1, places, k)
        values.index_copy_(1, places, v)
        return vdg_align.attention(q, keys[:, :stop], values[:, :stop], mask)

    return llm.lm_head(vdg_align.run_layers(llm, x, places, attend, (slice(None), -1)))


def prompt_parts(pieces: list) -> tuple[list[list[int]], list[str]]:
    """prompt_pieces -> ids [before, between, after the images], and the order of these: ["reference", "target"]."""
    at = [i for i, piece in enumerate(pieces) if isinstance(piece, str)]
    spans = ((0, at[0]), (at[0] + 1, at[1]), (at[1] + 1, len(pieces)))
    return [sum(pieces[start:stop], []) for start, stop in spans], [pieces[i].strip("<>") for i in at]


class Engine(NamedTuple):
    """What generate() keeps from batch to batch."""

    llm: nn.Module
    parts: list[torch.Tensor]  # embeddings of the prompt before, between and after the images, (T, D) each
    shared: Cache  # instruction + reference, some references at a time
    pairs: Cache  # whole sequences
    token: torch.Tensor  # (B,) the last of each row
    ended: torch.Tensor  # (B,) bool
    keys: torch.Tensor  # (B,) noise
    count: torch.Tensor  # () tokens said so far
    graphs: dict  # captured steps by their number of rows; None: steps are launched kernel by kernel


@torch.inference_mode()
def start_engine(llm, prompt: list[list[int]], image_tokens: int, batch: int, max_new: int, graph: bool) -> Engine:
    """Buffers for `batch` pairs of two images of so many tokens each; graph: capture the decoding step (CUDA)."""
    embed, batch = llm.get_input_embeddings(), max(batch, FEWEST)
    parts = [embed(torch.tensor(ids, dtype=torch.long, device=embed.weight.device)) for ids in prompt]
    first = len(prompt[0]) + image_tokens
    shared = make_cache(llm, max(1, batch // 4), first)
    pairs = make_cache(llm, batch, first + len(prompt[1]) + image_tokens + len(prompt[2]) + max_new - 1)
    feed(llm, parts[0][None], shared, 0)
    for part in shared:
        part[:, 1:, : len(prompt[0])] = part[:, :1, : len(prompt[0])]
    token = torch.zeros(batch, dtype=torch.long, device=embed.weight.device)
    state = token, token.bool(), token.clone(), token[0].clone()
    return Engine(llm, parts, shared, pairs, *state, {} if graph else None)


@torch.inference_mode()
def generate(engine: Engine, references, targets, row, keys, live, eos, max_new, temperature, top_k) -> torch.Tensor:
    """Tokens (B, max_new) of B pairs, `eos` from the end on. All prompts have the same length: nothing is padded.

    references (R, Q, D), of which pair i has number row[i]; targets (B, Q, D); keys (B,): the pairs' noise. Pairs from
    number `live` on only fill the batch. A batch half of whose rows ended goes on with the other half."""
    llm, parts, shared, pairs, device = engine.llm, engine.parts, engine.shared, engine.pairs, targets.device
    size, first = shared.keys.shape[1:3]
    for at in range(0, len(references), size):
        chosen = range(at, min(at + size, len(references)))
        # on a GPU always full: a fixed shape rounds in a fixed way
        x = references[fill(list(chosen), size) if targets.is_cuda else list(chosen)]
        feed(llm, x.to(parts[0]), shared, len(parts[0]))
        to = torch.tensor([i for i, r in enumerate(row) if r in chosen], device=device)
        of = torch.tensor([r - at for r in row if r in chosen], device=device)
        for layer in range(len(pairs.keys)):  # one at a time: the copy between is small
            pairs.keys[layer, to, :first] = shared.keys[layer, of]
            pairs.values[layer, to, :first] = shared.values[layer, of]
    n = len(targets)
    x = torch.cat([part.to(parts[0]).expand(n, -1, -1) for part in (parts[1], targets, parts[2])], 1)
    logits = feed(llm, x, pairs, first)
    start = first + x.shape[1]
    engine.keys[:n] = keys
    engine.token[:n] = choose(logits, keys, 0, temperature, top_k)
    engine.ended[:n] = (engine.token[:n] == eos) | (torch.arange(n, device=device) >= live)
    engine.count.fill_(1)

    def step(n: int, fixed: bool) -> None:
        """One more token for the first n rows."""
        count = engine.count if fixed else int(engine.count)
        x = llm.get_input_embeddings()(engine.token[:n, None])
        token = choose(feed(llm, x, pairs, start + count - 1), engine.keys[:n], count, temperature, top_k)
        engine.token[:n] = token.masked_fill(engine.ended[:n], eos)
        engine.ended[:n] |= engine.token[:n] == eos
        engine.count.add_(1)

    tokens = torch.full((n, max_new), eos, device=device)
    where = torch.arange(n, device=device)  # pair of each row still in the batch
    for number in range(max_new):
        if number and engine.graphs is None:
            step(n, fixed=False)
        elif number:
            if n not in engine.graphs:
                engine.graphs[n] = capture(lambda rows=n: step(rows, fixed=True), engine)
            engine.graphs[n].replay()
        tokens[where, number] = engine.token[:n].masked_fill(engine.ended[:n], eos)
        left = n - int(engine.ended[:n].sum())
        if not left:
            break
        if left <= n // 2 >= FEWEST:
            n //= 2
            rows = engine.ended[: len(where)].int().argsort(stable=True)[:n]  # those that go on, then others
            for part in (*pairs, engine.token, engine.ended, engine.keys):
                for held in part if part.dim() > 1 else [part]:
                    held[:n] = held[rows]
            where = where[rows]
    return tokens


def capture(step, engine: Engine):
    """A CUDA graph of one decoding step; the state that the warm-up changes is put back."""
    state = (engine.token, engine.ended, engine.count)
    before = [x.clone() for x in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuBLAS and the allocator settle before the capture
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for x, old in zip(state, before, strict=True):
        x.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@torch.inference_mode()
def describe(engine: Engine, image_tokens, tokenizer, pairs: list, keys: list[int], max_new, temperature, top_k):
    """(delta, flags) of each pair (name, name) of images in the order of the prompt; image_tokens(names): (n, Q, D)."""
    device = engine.token.device
    # a short batch on a GPU has the shape of the others: the same rounding
    size = len(engine.token) if device.type == "cuda" else FEWEST
    full, noise = fill(pairs, size), torch.tensor(fill(keys, size), device=device)
    shared = {name: i for i, name in enumerate(dict.fromkeys(first for first, _ in full))}
    references = image_tokens(fill(list(shared), len(full)))[: len(shared)]
    targets, row = image_tokens([second for _, second in full]), [shared[first] for first, _ in full]
    sampling = tokenizer.eos_token_id, max_new, temperature, top_k
    ids = generate(engine, references, targets, row, noise, len(pairs), *sampling)
    return [text_of(line, tokenizer) for line in ids[: len(pairs)].tolist()]


def text_of(ids: list[int], tokenizer) -> tuple[str, list[str]]:
    """Generated ids -> (delta, flags). What the model said is kept whole, less control characters and white space."""
    ended = tokenizer.eos_token_id in ids
    said = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)] if ended else ids, skip_special_tokens=True)
    delta = " ".join(pages.clean(said).split())
    wrong = {"empty": not delta, "runaway": not ended, "repeated": bool(REPEATED.search(delta))}
    return delta, [flag for flag, found in wrong.items() if found]


# ---- files ----
def open_parts(folder: Path, fingerprint: dict, world) -> tuple[common.JsonlAppender, dict[tuple, dict]]:
    """This rank's part, and what all parts of this and earlier runs (on any number of ranks) hold, by pair."""
    if world.rank == 0:  # alone: a rank that is already writing must not have its last line taken for a torn one
        for path in sorted(folder.glob("part-*-of-*.jsonl")):
            common.JsonlAppender(path, fingerprint)  # refuses another fingerprint, cuts a torn tail
    common.barrier()
    done = read_parts(folder)
    common.barrier()
    return common.JsonlAppender(folder / f"part-{world.rank}-of-{world.size}.jsonl", fingerprint), done


def read_parts(folder: Path) -> dict[tuple, dict]:
    paths = sorted(folder.glob("part-*-of-*.jsonl"))
    return {identity(record): record for path in paths for record in common.read_jsonl(path)}


@torch.inference_mode()
def subgroup_ranks(model, images: data.ImageStore, records: list[dict], members: dict, batch: int, workers: int):
    """Place of each record's target, 1 the best, among its subgroup less the reference, by a CIR model; ties count
    against it. An image outside any subgroup cannot be judged: UserError."""
    device = next(model.parameters()).device

    def encode(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return model.image(data.load_pixels(images, names, model.preprocess, workers).to(device))

    ranked = []
    features: dict[str, torch.Tensor] = {}
    for record in records:
        group = members.get(record.get("subgroup", record["id"]))
        if not group:
            raise common.UserError(f"--filter: pair {record['id']} has no subgroup; is subgroups.jsonl beside it?")
        features |= dict.fromkeys(group)
    for names in chunks(list(features), batch):
        features |= zip(names, encode(names)[1].float(), strict=True)
    for part in chunks(common.progress(records, "filter"), batch):
        first = list(dict.fromkeys(record["reference"] for record in part))
        tokens = encode(first)[0][[first.index(record["reference"]) for record in part]]
        for record, c in zip(part, model.compose(tokens, [record["delta"] for record in part]).float(), strict=True):
            group = members[record.get("subgroup", record["id"])]
            others = [name for name in group if name not in (record["reference"], record["target"])]
            scores = torch.stack([features[name] for name in (record["target"], *others)]) @ c
            ranked.append(int((scores >= scores[0]).sum()))
    return ranked


def write_results(out: Path, records: list[dict], members: dict, images: data.ImageStore, show: int, seed: int, layout):
    """Writes the four files -> what report.json holds. layout: ("cirr" or "fashioniq", split)."""
    common.write_jsonl(out / "pseudo.jsonl", records)
    known = ((record, members.get(record.get("subgroup", record["id"]))) for record in records)
    if layout[0] == "fashioniq":
        data.write_fashioniq_captions(out / "fashioniq", layout[1], records)
    else:
        data.write_cirr_captions(out / "cirr", layout[1], [r | {"members": m} if m else r for r, m in known])
    flags = Counter(flag for record in records for flag in record.get("flags", ()))
    report = {
        "pairs": len(records),
        "images": len({name for r in records for name in (r["reference"], r["target"])}),
        "distinct_deltas": len({record["delta"] for record in records}),
        "mean_words": round(sum(len(record["delta"].split()) for record in records) / max(1, len(records)), 2),
        **{"empty": 0, "runaway": 0, "repeated": 0, **dict(sorted(flags.items()))},
    }
    shown = sorted(common.rng("show", seed).permutation(len(records))[:show].tolist())
    common.write_text(out / "deltas.html", sample_page([records[i] for i in shown], report, images))
    return report


def sample_page(records: list[dict], report: dict, images: data.ImageStore) -> str:
    """A page of deltas beside their two pictures."""
    panels = []
    for r in records:
        notes = [f"pair {r['id']}", *r.get("flags", ())]
        if "reverse_delta" in r:
            notes.append(f"reversed: {r['reverse_delta']}")
        target = (images.path(r["target"]), f"target {r['target']}")
        query = (images.path(r["reference"]), f"reference {r['reference']}")
        panels.append(pages.panel(query, r["delta"] or "(nothing)", [target], note=" · ".join(notes)))
    counts = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in report.items())
    return pages.page("Generated deltas", [("Counts", counts), (f"{len(records)} pairs at random", *panels)])


def digest_of(folder: str) -> str:
    """Hash of a VDG's files; config.json among them names the LLM, the vision side and the prompt."""
    names = ("config.json", "adapter_config.json", "adapter_model.safetensors", "projection.safetensors")
    absent = [name for name in names if not os.path.isfile(f"{folder}/{name}")]
    if absent:
        raise common.UserError(f"{folder}/{absent[0]} not found; wanted a finished checkpoint of vdg_tune.py")
    return hashlib.sha256("".join(common.file_sha256(f"{folder}/{name}") for name in names).encode()).hexdigest()


def main() -> None:
    transformers.logging.set_verbosity_error()
    world = common.init_world(DEVICE)
    common.at_least(globals(), TEMPERATURE=0, TOP_K=0, MAX_NEW=1, BATCH=1, ENCODE_BATCH=1, FILTER_TOP=1)
    common.at_least(globals(), SUBGROUPS=0, MAX_PAIRS=0, SHOW=0, WORKERS=0)
    dtype = common.pick_dtype(DTYPE, world.device)
    tuned = {"llm": vdg_align.LLM, "vision": vdg_align.VISION, "quantize": "", "prompt": vdg_tune.PROMPT}
    if not (PLAN or CHECK) or os.path.exists(f"{VDG}/config.json"):
        tuned = vdg_tune.read_stage(VDG, "tune")
    size = 2 if PLAN and DTYPE == "auto" else dtype.itemsize
    options = memory.generation(tuned, size, BATCH, MAX_NEW)
    if PLAN:
        memory.say(options, [80, 40, 24])
        return
    pairs, members, images = triplet_pairs(TRIPLETS, ROOT, IMAGES) if TRIPLETS else read_pairs(PAIRS, IMAGES)
    check_pairs(pairs, TRIPLETS or PAIRS)
    pairs = choose_subgroups(pairs, SUBGROUPS, MAX_PAIRS, SEED)
    names = sorted({name for pair in pairs for name in (pair["reference"], pair["target"])})
    if CHECK:
        report, ok = data.check_report(names, images)
        common.say(f"{len(pairs):,} pairs; {report}")
        if not ok:
            raise common.UserError("images are missing or unreadable; complete the folder or correct --images")
        return
    missing = images.missing(names)
    if missing:
        found = f"{len(missing):,} of {len(names):,} images are not in {', '.join(images.roots)}"
        raise common.UserError(f"{found}, first {data.shown(missing[0])}; complete the folder or correct --images")
    common.lock_folder(OUT)
    out = Path(OUT)
    settings = {"vdg": digest_of(VDG), "dtype": str(dtype), "merge": MERGE, "seed": SEED, "reverse": REVERSE}
    settings |= {"temperature": TEMPERATURE, "top_k": TOP_K, "max_new": MAX_NEW}
    part, done = open_parts(out / "parts", settings, world)
    todo = [pair for pair in pairs if identity(pair) not in done]
    todo.sort(key=lambda pair: (pair["reference"], pair["target"], json.dumps(pair["id"])))  # a reference's together
    common.say(f"{len(pairs):,} pairs of {len(names):,} images, {len(pairs) - len(todo):,} of them described already")

    if todo:
        memory.say(options, [memory.has(world.device)])
        vision, llm, tokenizer, config = vdg_tune.load_vdg(VDG, world.device, dtype)
        if MERGE and not config["quantize"]:
            vdg_tune.merge_lora(llm)
        prompt, order = prompt_parts(vdg_tune.prompt_pieces(tokenizer, config["prompt"]))
        names = sorted({name for pair in todo for name in (pair["reference"], pair["target"])})
        queries, row = encode_images(vision, images, names, out / "queries", ENCODE_BATCH, WORKERS, world)
        graph = GRAPH and world.device.type == "cuda" and not config["quantize"]
        engine = start_engine(llm, prompt, queries.shape[1], BATCH, MAX_NEW, graph)

        def image_tokens(names: list[str]) -> torch.Tensor:
            return vision(torch.from_numpy(queries[[row[name] for name in names]]).to(world.device))  # (n, Q, D)

        def say(batch: list[dict], order: list[str], direction: str) -> list[tuple[str, list[str]]]:
            """(delta, flags) of each pair; order: which of its images come first and second in the prompt."""
            names = [tuple(pair[side] for side in order) for pair in batch]
            keys = [row_key(SEED, pair["id"], direction) for pair in batch]
            return describe(engine, image_tokens, tokenizer, names, keys, MAX_NEW, TEMPERATURE, TOP_K)

    mine = todo[len(todo) * world.rank // world.size : len(todo) * (world.rank + 1) // world.size]
    began, count = time.time(), 0
    for batch in chunks(common.progress(mine, "deltas"), BATCH):
        if common.stop_requested():
            break
        forward = say(batch, order, "forward")
        backward = say(batch, order[::-1], "reverse") if REVERSE else None
        for i, pair in enumerate(batch):
            record = {key: pair[key] for key in ("id", "reference", "target")} | {"delta": forward[i][0]}
            flags = forward[i][1]
            if backward:
                record["reverse_delta"] = backward[i][0]
                flags = flags + [f"reverse_{flag}" for flag in backward[i][1]]
            part.append(record | ({"flags": flags} if flags else {}))
        count += len(batch)
    made, seconds = common.all_sum(count), max(time.time() - began, 1e-9)
    if made:
        common.Log(OUT).write(generated=int(made), seconds=round(seconds, 1), pairs_per_s=round(made / seconds, 2))
    if common.any_rank(count < len(mine)):
        common.say(f"stopped with {len(todo) - int(made):,} pairs to go; the same command goes on")
        raise SystemExit(143)
    said = read_parts(out / "parts")
    keys = ("delta", "reverse_delta", "flags")
    records = [pair | {key: said[identity(pair)][key] for key in keys if key in said[identity(pair)]} for pair in pairs]
    kept = records
    if FILTER:
        import train_cir

        model = train_cir.load_cir(FILTER, world.device)
        mine = records[world.rank :: world.size]
        shares = common.gather_objects(subgroup_ranks(model, images, mine, members, ENCODE_BATCH, WORKERS))
        ranks = [shares[i % world.size][i // world.size] for i in range(len(records))]
        kept = [record for record, rank in zip(records, ranks, strict=True) if rank <= FILTER_TOP]
    if world.rank == 0:
        dataset, split = (TRIPLETS.split("/") + ["train"])[:2] if TRIPLETS else ("cirr", "train")
        report = write_results(out, kept, members, images, SHOW, SEED, (dataset, split))
        if FILTER:
            report |= {"share_kept": round(len(kept) / max(1, len(records)), 4), "filter_top": FILTER_TOP}
        common.write_json(out / "report.json", report, indent=2)
        common.say(f"wrote {OUT}/pseudo.jsonl: {', '.join(f'{name} {value:,}' for name, value in report.items())}")
    common.barrier()


if __name__ == "__main__":
    common.override(globals())
    common.run(memory.advise(main, "a smaller --batch"))
