"""What a visual delta generator says of pairs held out of its training: counts, a page, and the model card."""

from collections import Counter
from collections.abc import Iterable

from common import pages
from common.annotations import Triplet
from common.console import rank_size
from common.files import read_jsonl, write_text
from common.hub import card_name
from common.images import ImageStore
from common.seeds import seeded_rng
from common.triplets import plain_text


def split_pairs(triplets: list[Triplet], share: float, seed: int) -> tuple[list[Triplet], list[Triplet]]:
    """(to train on, held out): whole (reference, target) pairs with all their texts, drawn by the seed until they are
    the share of the triplets, one at least; share 0: none."""
    places: dict[tuple, list[int]] = {}
    for i, triplet in enumerate(triplets):
        places.setdefault((triplet.reference, triplet.target), []).append(i)
    pairs, held = list(places.values()), set()
    wanted = max(1, int(share * len(triplets))) if share else 0
    for number in seeded_rng("held out", seed).permutation(len(pairs)).tolist():
        if len(held) >= wanted:
            break
        held.update(pairs[number])
    return [t for i, t in enumerate(triplets) if i not in held], [triplets[i] for i in sorted(held)]


def count_flags(said: list[tuple[str, list[str]]], known: Iterable[str]) -> dict[str, int]:
    """said: (delta, flags) of text_of -> how many are empty, repeated, too long, copied from the texts `known`."""
    known = {plain_text(text) for text in known}
    flags = Counter(flag for _, flags in said for flag in flags)
    copied = sum(plain_text(delta) in known for delta, _ in said)
    counts = {"empty": flags["empty"], "repeated": flags["repeated"], "too_long": flags["runaway"], "copied": copied}
    return {"deltas": len(said)} | counts


def records(out: str) -> list[dict]:
    """The held-out records of a run's log, one an epoch."""
    return [record for record in read_jsonl(f"{out}/log.jsonl") if "held_out_loss" in record]


def write_page(out: str, held: list[Triplet], said: list[tuple[str, list[str]]], images: ImageStore, show: int) -> None:
    """out/held_out.html: the log's held-out records, and some pairs with the human and the generated delta. Rank 0."""
    if rank_size()[0] != 0:
        return
    panels = []
    for triplet, (delta, flags) in list(zip(held, said, strict=True))[:show]:
        notes = [f"human: {triplet.delta}", *flags]
        panels.append(pages.delta_panel(images, triplet.reference, triplet.target, delta, notes, out))
    names = ("step", "held_out_loss", "perplexity", "deltas", "empty", "repeated", "too_long", "copied")
    rows = [[record[name] for name in names] for record in records(out)]
    table = pages.table(rows, [name.replace("_", " ") for name in names])
    sections = [("Each epoch", table), ("Generated deltas, greedy", pages.pairs(panels))]
    write_text(f"{out}/held_out.html", pages.page("Held-out triplets", sections))


def model_card(config: dict, history: list[dict]) -> str:
    """README.md of a checkpoint, with the front matter that the hub reads; history: records() of its run."""
    lora = config["lora"]
    measured = "No triplets were held out."
    if history:
        last = history[-1]
        counts = ", ".join(f"{name} {last[name]}" for name in ("empty", "repeated", "too_long", "copied"))
        measured = (
            f"On {last['deltas']:,} held-out triplets: loss per token {last['held_out_loss']:.4f}, perplexity "
            f"{last['perplexity']:.2f}. Of as many greedy deltas: {counts} (copied: word for word in the training "
            "set). held_out.html shows some."
        )
    what = f"rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']}, on {', '.join(lora['targets'])}"
    trained = f"{config['steps']:,} steps on {config['triplets']:,} triplets of {config['dataset']}"
    base = card_name(config["llm"])  # the hub refuses a card that names a folder
    based_on = f"base_model: {base}\n" if base else ""
    return f"""---
{based_on}library_name: peft
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
--merge LLAMA` folds LoRA into the LLM; with `--format blip2` all of it becomes a Blip-2 of plain transformers. The
licences of the LLM, of the vision model and of the triplets apply.
"""
