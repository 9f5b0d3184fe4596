"""Decoding many deltas at once: keys and values kept, noise that belongs to the pair, one CUDA graph a step.

The prompt is a cascade: the instruction is read once a run, each reference once a batch, and what follows (the target)
once a pair. Then one token a step for all pairs of the batch. Nothing is padded: all prompts have the same length."""

import hashlib
import json
import re
from typing import NamedTuple

import torch
from torch import nn

from common.console import UserError
from common.llama import attention, run_layers, tokenize
from common.pages import clean
from kernels.decoding import one_token_attention, takes_kernels

FEWEST = 8  # rows decoded together: MKL's products of fewer than four add up in another order on AMD
REPEATED = re.compile(r"(?:^|\s)(\S+(?:\s\S+){0,7})(?:\s\1){2,}(?=\s|$)")  # up to eight words, three times in a row


def signed(number: int) -> int:
    """The low 64 bits of a number as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)  # splitmix64's step and its two multipliers
MIX1, MIX2 = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)


def fill(items: list, size: int) -> list:
    """The last item again and again until there are at least `size`."""
    return items + [items[-1]] * (size - len(items))


# ---- sampling: noise that belongs to the pair ----
class Sampling(NamedTuple):
    """How tokens are drawn."""

    eos: int  # id of the token that ends a delta
    max_new: int  # tokens of a delta at most
    temperature: float  # 0 = always the likeliest token
    top_k: int  # tokens to draw from, 0 = all


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
    step = GOLDEN * (position + 1)
    if not torch.is_tensor(step):  # a tensor wraps by itself
        step = signed(step)
    bits = mix(mix(keys + step)[:, None] + GOLDEN * (tokens + 1))
    uniform = ((bits >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52  # inside (0, 1): 52 bits and a half are exact
    return -torch.log(-torch.log(uniform))


def choose(logits: torch.Tensor, keys: torch.Tensor, position, temperature: float, top_k: int) -> torch.Tensor:
    """logits (B, V), keys (B,) -> (B,) tokens: the likeliest at temperature 0, else a draw from the top k's softmax.

    position: of the token in its delta, a number or a tensor () of one.
    Gumbel-max: argmax(logits / temperature + Gumbel noise) is such a draw, its noise a function of (key, position)."""
    if temperature == 0:
        return logits.float().argmax(-1)
    vocabulary = logits.shape[1]
    top, tokens = logits.float().topk(min(top_k or vocabulary, vocabulary))  # (B, K)
    best = (top.double() / temperature + gumbel(keys, position, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(1, best)[:, 0]


# ---- keys and values in buffers allocated once ----
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
    those not yet written behind a mask; one token on a GPU has a kernel that reads only what is there, as a number
    does."""
    n, t = x.shape[:2]
    places = start + torch.arange(t, device=x.device)  # (T,)
    stop = cache.keys.shape[2] if torch.is_tensor(start) else start + t
    by_kernel = t == 1 and takes_kernels(x)
    one = t == 1 and not torch.is_tensor(start)  # sees all that is read
    mask = None if one or by_kernel else torch.arange(stop, device=x.device) <= places[:, None]  # (T, stop)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = cache.keys[layer, :n], cache.values[layer, :n]
        for held, new in ((keys, k), (values, v)):
            if torch.is_tensor(start):
                held.index_copy_(1, places, new)
            else:
                held[:, start:stop] = new
        if by_kernel:
            return one_token_attention(q, keys, values, places)
        return attention(q, keys[:, :stop], values[:, :stop], mask)

    return llm.lm_head(run_layers(llm, x, places, attend, (slice(None), -1)))


def prompt_pieces(tokenizer, prompt: str) -> list:
    """The start token and the prompt as ids, "<reference>" and "<target>" left standing where the image tokens go."""
    parts = re.split("(<reference>|<target>)", prompt)
    if sorted(parts[1::2]) != ["<reference>", "<target>"]:
        raise UserError(f"the prompt wants <reference> and <target> once each; found {parts[1::2]}")
    pieces = [[tokenizer.bos_token_id]]
    for part in parts:
        pieces.append(part if part in ("<reference>", "<target>") else tokenize(tokenizer, part.strip(" ")))
    return pieces


def prompt_length(pieces: list, image_tokens: int) -> int:
    """Tokens of prompt_pieces once each image has its own."""
    return sum(image_tokens if isinstance(piece, str) else len(piece) for piece in pieces)


def prompt_parts(pieces: list) -> tuple[list[list[int]], list[str]]:
    """prompt_pieces -> ids [before, between, after the images], and the order of these: ["reference", "target"]."""
    first, second = [i for i, piece in enumerate(pieces) if isinstance(piece, str)]
    parts = [pieces[:first], pieces[first + 1 : second], pieces[second + 1 :]]
    return [sum(part, []) for part in parts], [pieces[i].strip("<>") for i in (first, second)]


class Engine(NamedTuple):
    """What generate() keeps from batch to batch; a captured step holds its sampling too, so that it belongs here."""

    llm: nn.Module
    sampling: Sampling
    parts: list[torch.Tensor]  # embeddings of the prompt before, between and after the images, (T, D) each
    shared: Cache  # instruction + reference, some references at a time
    pairs: Cache  # whole sequences
    token: torch.Tensor  # (B,) the last of each row
    ended: torch.Tensor  # (B,) bool
    finite: torch.Tensor  # (B,) bool: the logits of the row's first token are numbers
    keys: torch.Tensor  # (B,) noise
    count: torch.Tensor  # () tokens said so far
    graphs: dict  # captured steps by their number of rows; None: steps are launched kernel by kernel


@torch.inference_mode()
def start_engine(
    llm, prompt: list[list[int]], image_tokens: int, batch: int, sampling: Sampling, graph: bool
) -> Engine:
    """Buffers for `batch` pairs of two images of so many tokens each; graph: capture the decoding step (CUDA)."""
    embed, batch = llm.get_input_embeddings(), max(batch, FEWEST)
    device = embed.weight.device
    parts = [embed(torch.tensor(ids, dtype=torch.long, device=device)) for ids in prompt]

    # the instruction, read once: all rows of `shared` begin with it
    first = len(prompt[0]) + image_tokens
    shared = make_cache(llm, max(1, batch // 4), first)
    feed(llm, parts[0][None], shared, 0)
    for part in shared:
        part[:, 1:, : len(prompt[0])] = part[:, :1, : len(prompt[0])]

    # a whole sequence less its last token, which is never read
    length = first + len(prompt[1]) + image_tokens + len(prompt[2]) + sampling.max_new - 1
    pairs = make_cache(llm, batch, length)

    token = torch.zeros(batch, dtype=torch.long, device=device)
    flags = torch.zeros(batch, dtype=torch.bool, device=device)
    state = token, flags, flags.clone(), token.clone(), token[0].clone()
    return Engine(llm, sampling, parts, shared, pairs, *state, {} if graph else None)


# ---- decoding ----
def read_references(engine: Engine, references: torch.Tensor, row: list[int]) -> None:
    """references (R, Q, D), each read once -> the start of the cache of pair i is that of reference row[i]."""
    shared, pairs, instruction = engine.shared, engine.pairs, engine.parts[0]
    size, first = shared.keys.shape[1:3]
    for at in range(0, len(references), size):
        chosen = list(range(at, min(at + size, len(references))))
        # on a GPU always full: a fixed shape rounds in a fixed way
        x = references[fill(chosen, size) if references.is_cuda else chosen]
        feed(engine.llm, x.to(instruction), shared, len(instruction))

        # the keys and values of each reference go to the rows of its pairs
        to = [i for i, r in enumerate(row) if r in chosen]
        if to and to == list(range(to[0], to[-1] + 1)):  # pairs in the order of their references: a plain copy
            to = slice(to[0], to[-1] + 1)
        else:
            to = torch.tensor(to, dtype=torch.long, device=references.device)
        of = torch.tensor([r - at for r in row if r in chosen], device=references.device)
        for layer in range(len(pairs.keys)):  # one at a time: the copy between is small
            pairs.keys[layer, to, :first] = shared.keys[layer, of]
            pairs.values[layer, to, :first] = shared.values[layer, of]


@torch.inference_mode()
def generate(
    engine: Engine, references: torch.Tensor, targets: torch.Tensor, row: list[int], keys: torch.Tensor, live: int
) -> torch.Tensor:
    """Tokens (B, max_new) of B pairs, the end token from the end on; engine.finite says whose logits are numbers.

    references (R, Q, D), of which pair i has number row[i]; targets (B, Q, D); keys (B,): the pairs' noise. Pairs from
    number `live` on only fill the batch. A batch half of whose rows ended goes on with the other half."""
    eos, max_new, temperature, top_k = engine.sampling
    n, device = len(targets), targets.device

    # the prompt: each reference once, then of each pair what follows its reference
    read_references(engine, references, row)
    first = engine.shared.keys.shape[2]
    rest = [part.to(engine.parts[0]).expand(n, -1, -1) for part in (engine.parts[1], targets, engine.parts[2])]
    x = torch.cat(rest, 1)  # (n, T, D)
    logits = feed(engine.llm, x, engine.pairs, first)
    start = first + x.shape[1]

    # the first token of each delta
    engine.finite[:n] = logits.isfinite().all(1)
    engine.keys[:n] = keys
    engine.token[:n] = choose(logits, keys, 0, temperature, top_k)
    engine.ended[:n] = (engine.token[:n] == eos) | (torch.arange(n, device=device) >= live)
    engine.count.fill_(1)

    tokens = torch.full((n, max_new), eos, device=device)
    where = torch.arange(n, device=device)  # pair of each row still in the batch
    for number in range(max_new):
        # the next token of the n rows in front
        if number:
            advance(engine, n, start)
        tokens[where, number] = engine.token[:n].masked_fill(engine.ended[:n], eos)

        # the last row ended
        left = n - int(engine.ended[:n].sum())
        if not left:
            break

        # half of the rows ended: the others come to the front, filled up with some that ended
        if left <= n // 2 >= FEWEST:
            n //= 2
            rows = engine.ended[: len(where)].int().argsort(stable=True)[:n]
            keep_rows(engine, rows)
            where = where[rows]
    return tokens


def keep_rows(engine: Engine, rows: torch.Tensor) -> None:
    """Moves these rows of the batch to its front, in this order."""
    n = len(rows)
    for cache in engine.pairs:
        for layer in cache:  # one at a time: the copy between is small
            layer[:n] = layer[rows]
    for state in (engine.token, engine.ended, engine.keys):
        state[:n] = state[rows]


def advance(engine: Engine, n: int, start: int) -> None:
    """One more token for the first n rows, whose prompts have `start` tokens: launched, or replayed as a graph."""
    if engine.graphs is None:
        step(engine, n, start, int(engine.count))
        return
    if n not in engine.graphs:
        engine.graphs[n] = capture(lambda: step(engine, n, start, engine.count), engine)
    engine.graphs[n].replay()


def step(engine: Engine, n: int, start: int, count: int | torch.Tensor) -> None:
    """Token number `count` of the first n rows; as a tensor () it keeps every shape independent of its value."""
    eos, _, temperature, top_k = engine.sampling
    x = engine.llm.get_input_embeddings()(engine.token[:n, None])  # (n, 1, D)
    logits = feed(engine.llm, x, engine.pairs, start + count - 1)
    token = choose(logits, engine.keys[:n], count, temperature, top_k)
    engine.token[:n] = token.masked_fill(engine.ended[:n], eos)
    engine.ended[:n] |= engine.token[:n] == eos
    engine.count.add_(1)


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


# ---- from pairs of images to texts ----
class Said(NamedTuple):
    """A delta and what is odd about it: "empty", "runaway" (not ended after max_new tokens), "repeated"."""

    delta: str
    flags: list[str]


@torch.inference_mode()
def describe(engine: Engine, image_tokens, tokenizer, pairs: list[tuple[str, str]], keys: list[int]) -> list[Said]:
    """What is said of each pair of images, named in the order of the prompt; keys: the pairs' noise.

    image_tokens(names) -> (n, Q, D). UserError where the model's logits are no numbers: any text would be nonsense."""
    device = engine.token.device
    # a short batch on a GPU has the shape of the others: the same rounding
    size = len(engine.token) if device.type == "cuda" else FEWEST
    full, noise = fill(pairs, size), torch.tensor(fill(keys, size), device=device)

    # each reference once
    number = {name: i for i, name in enumerate(dict.fromkeys(first for first, _ in full))}
    references = image_tokens(fill(list(number), len(full)))[: len(number)]
    row = [number[first] for first, _ in full]
    targets = image_tokens([second for _, second in full])

    ids = generate(engine, references, targets, row, noise, len(pairs))
    for pair, finite in zip(pairs, engine.finite[: len(pairs)].tolist(), strict=True):
        if not finite:
            raise UserError(
                f"the LLM's logits for the images {pair[0]} and {pair[1]} are NaN or infinite; the checkpoint or the "
                "LLM's files are damaged, or --dtype is too small for them (bf16 has the range of fp32, fp16 has not)"
            )
    return [text_of(line, tokenizer) for line in ids[: len(pairs)].tolist()]


def text_of(ids: list[int], tokenizer) -> Said:
    """Generated ids -> what was said, kept whole less control characters and white space."""
    ended = tokenizer.eos_token_id in ids
    if ended:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    delta = " ".join(clean(tokenizer.decode(ids, skip_special_tokens=True)).split())
    wrong = {"empty": not delta, "runaway": not ended, "repeated": bool(REPEATED.search(delta))}
    return Said(delta, [flag for flag, found in wrong.items() if found])
