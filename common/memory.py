"""Memory of the stages that hold a language model: estimated before anything loads, and what to change if it is short.

A plan is a dict of bytes by purpose. A stage makes one for its run and for ever smaller runs; `say` prints the first
and, for each card, which of them fits. Everywhere: itemsize, the bytes of a number that is not quantised; vision, how
many weights ViT and Q-Former have, the latter in fp32.
"""

import os
import re
import resource
from collections.abc import Callable, Sequence

import torch

from common import console
from common.console import UserError
from common.llama import Shape

CONTEXT = "CUDA context, workspaces, fragments (a guess)"


def frozen(shape: Shape, quantize: str, itemsize: int, vision: tuple[int, int]) -> dict[str, float]:
    """Bytes of the frozen weights, by purpose."""
    # nf4: 4 bits, an 8-bit scale for 64 of them and an fp32 one for 256 scales
    bytes_of_one = {"": itemsize, "int8": 1, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
    if quantize not in bytes_of_one:
        raise UserError(f'quantize is {quantize!r}; "", "int8" or "nf4" is wanted')
    linears = shape.layers * sum(a * b for a, b in shape.linears().values())
    tables = 2 * shape.vocabulary * shape.width  # word embeddings and lm_head are never quantised
    largest = max(shape.vocabulary, shape.mlp) * shape.width
    return {
        f"LLM, {quantize or f'{8 * itemsize} bits'}": linears * bytes_of_one[quantize] + tables * itemsize,
        "its largest weight once more, while it loads or is unpacked": largest * itemsize,
        "ViT and Q-Former": vision[0] * itemsize + vision[1] * 4,
        CONTEXT: 1.5 * 2**30,
    }


def of_lora(shape: Shape, rank: int, targets: tuple[str, ...]) -> int:
    """Weights of a LoRA on the linears of these names; UserError for a name that the LLM lacks."""
    linears = shape.linears()
    if unknown := set(targets) - linears.keys():
        raise UserError(f"the LLM has no {', '.join(unknown)}; --lora_targets: {', '.join(linears)}")
    return rank * shape.layers * sum(sum(linears[name]) for name in targets)


def training(
    shape: Shape, itemsize: int, tokens: int, supervised: int, trained: int, state: int, lora: tuple, checkpoint: bool
) -> dict[str, float]:
    """Bytes of what training adds, by purpose.

    tokens of a forward pass, `supervised` of them with a loss; trained: weights; state: optimiser bytes a weight;
    lora: names of the linears that carry one."""
    # a token in a layer: two fp32 copies for the norms, q, k, v and what attention gives, three of the MLP's width, and
    # the dropped-out input of each LoRA with its mask
    of_layer = 8 * shape.width + itemsize * (2 * shape.width + 2 * shape.kv + 3 * shape.mlp)
    of_layer += sum((itemsize + 1) * shape.linears()[name][0] for name in lora)
    of_token = shape.layers * of_layer
    if checkpoint:  # one layer at a time, and the input of every layer
        of_token = of_layer + shape.layers * shape.width * itemsize
    return {
        "trained weights and their gradients": 8 * trained,
        "optimiser": state * trained,
        f"activations of {tokens:,} tokens": tokens * of_token,
        "logits": supervised * shape.vocabulary * (12 + itemsize),
    }


def generation(
    shape: Shape, tuned: dict, vision: tuple[int, int], itemsize: int, batch: int, max_new: int
) -> dict[str, dict[str, float]]:
    """Flags -> bytes by purpose of gen_deltas.py; tuned: config.json of a VDG."""
    weights, options = frozen(shape, tuned["quantize"], itemsize, vision), {}
    prompt = len(tuned["prompt"]) // 4  # about four characters to a token
    for b in dict.fromkeys(max(1, batch // part) for part in (1, 2, 4, 8)):
        places = b * (prompt + 64 + max_new) + max(b, 4) // 4 * (prompt + 32)
        cache = {f"keys and values of {b} pairs": places * shape.layers * 2 * shape.kv * itemsize}
        # the widest moment: the MLP of all pairs' tokens after the reference, and its input
        work = {"prefill": b * (prompt // 2 + 32) * (3 * shape.mlp + 6 * shape.width) * itemsize}
        options["" if b == batch else f"--batch {b}"] = weights | cache | work
    return options


def options_of(
    parts: Callable[[str, bool, int], dict[str, float]], quantize: str, checkpoint: bool, batch: int
) -> dict[str, dict[str, float]]:
    """Flags -> parts(quantize, checkpoint, batch), bytes by purpose: the run as it stands, then ever smaller ones."""
    now = (quantize, checkpoint, batch)
    smaller = [(quantize, True, batch), ("nf4", checkpoint, batch), ("nf4", True, batch), ("nf4", True, 1)]
    options = {}
    for q, c, b in (now, *smaller):
        flags = []
        if q != quantize:
            flags.append(f"--quantize {q}")
        if c != checkpoint:
            flags.append("--checkpoint true")
        if b != batch:
            flags.append(f"--batch {b} --accumulate {batch // b} times as many")
        options.setdefault(" ".join(flags), parts(q, c, b))
    return options


def say(options: dict[str, dict[str, float]], cards: Sequence[float] = (80, 40, 24), device: str = "cuda") -> None:
    """Prints the first option's bytes, and for each card (GiB) what fits it first; a CPU has no CUDA context."""
    together = "together, estimated for one GPU"
    if device == "cpu":
        options = {flags: {k: v for k, v in parts.items() if k != CONTEXT} for flags, parts in options.items()}
        together = "together, estimated"
    first = next(iter(options.values()))
    for what, amount in (first | {together: sum(first.values())}).items():
        console.say(f"{amount / 2**30:9.2f} GiB  {what}")
    totals = {flags: sum(parts.values()) / 2**30 for flags, parts in options.items()}
    for card in cards:
        fits = next((flags for flags, total in totals.items() if total < 0.97 * card), None)
        if fits is None:
            smallest = min(totals, key=totals.get)
            advice = f"too small: {smallest or 'this run'} needs {totals[smallest]:.1f} GiB; take a smaller LLM"
        elif fits:
            advice = f"take {fits}: {totals[fits]:.1f} GiB"
        else:
            advice = "enough"
        console.say(f"memory of {card:.0f} GiB: {advice}")


def say_kept(images: int, queries: torch.Tensor) -> None:
    """Prints what the Q-Former outputs of so many images take, each like queries (1, Q, q_width), if they are kept."""
    if images:
        amount = images * queries.numel() * queries.element_size() / 2**30
        console.say(f"{amount:9.2f} GiB  Q-Former outputs of {images:,} images, in host memory, on every rank")


def has(device: torch.device) -> float:
    """GiB that a device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def peak(device: torch.device) -> float:
    """GiB that this process held at most: tensors on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def advise(main, advice: str, planned: bool = True):
    """main, but where memory runs out, a GPU's or the machine's, its one line says what helps.

    planned: the stage has --plan."""

    def run() -> None:
        try:
            main()
        except (RuntimeError, MemoryError) as fault:
            found = _shortage(fault)
            if not found:
                raise
            plan = "; --plan says what needs how much" if planned else ""
            raise UserError(f"{found} Try {advice}{plan}") from fault

    return run


def _shortage(fault: RuntimeError | MemoryError) -> str:
    """The sentence that says so where memory ran out, else "": of the CPU's torch makes a plain RuntimeError."""
    first = (str(fault).splitlines() or [""])[0]
    if isinstance(fault, torch.OutOfMemoryError):
        return first
    wanted = re.search(r"allocate memory: you tried to allocate (\d+) bytes", first)
    if wanted:
        return f"This machine's memory has no room for {int(wanted[1]) / 2**30:,.1f} GiB more."
    if "Storage size calculation overflowed" in first:  # past what 64 bits count
        return f"No memory has room for that ({first})."
    return f"This machine's memory is full ({first or 'Python'})." if isinstance(fault, MemoryError) else ""
