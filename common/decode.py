"""Decoding many deltas at once: keys and values kept, noise that belongs to the pair, one CUDA graph a step."""

import hashlib
import json
import re
from typing import NamedTuple

import torch
from torch import nn

from common.llama import attention, run_layers
from common.pages import clean


def signed(number: int) -> int:
    """The low 64 bits of a number as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


FEWEST = 2**3  # rows decoded together: MKL's products of fewer than four add up in another order on AMD; no flag
REPEATED = re.compile(r"(?:^|\s)(\S+(?:\s\S+){0,7})(?:\s\1){2,}(?=\s|$)")  # up to eight words, three times in a row
GOLDEN = signed(0x9E3779B97F4A7C15)  # splitmix64's step and its two multipliers
MIX1, MIX2 = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def fill(items: list, size: int) -> list:
    """The last item again and again until there are at least `size`."""
    return items + [items[-1]] * (size - len(items))


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
        return attention(q, keys[:, :stop], values[:, :stop], mask)

    return llm.lm_head(run_layers(llm, x, places, attend, (slice(None), -1)))


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
    delta = " ".join(clean(said).split())
    wrong = {"empty": not delta, "runaway": not ended, "repeated": bool(REPEATED.search(delta))}
    return delta, [flag for flag, found in wrong.items() if found]
