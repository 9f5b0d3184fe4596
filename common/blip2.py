"""A visual delta generator as a plain Blip2ForConditionalGeneration: its folder needs no line of this repository.

Blip-2 is what the VDG is made of: a ViT, a Q-Former that reads no text, a linear into a LLaMA, image tokens among the
words. Two pictures a prompt are ids by hand: `image_token_id` stands where their tokens go, the reference's first."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel

from common.console import UserError, reason_of
from common.decode import prompt_parts
from common.files import write_json, write_tensors, write_text
from common.hub import card_name
from common.images import Preprocess

SHARD = 5 * 2**30  # bytes of a file of weights, which is all that lies in memory at a time
_TEXT = re.compile(r"embeddings\.(word|position)_embeddings\.|encoder\.layer\.\d+\.(intermediate|output)\.")
_OWN = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}


def write_blip2(
    folder: str, vision: nn.Module, llm, weights: Iterable, tokenizer, pieces: list, config: dict, dtype: torch.dtype
) -> None:
    """A new folder: config.json, weights in shards, tokenizer, preprocessor_config.json and a card that says its use.

    vision: a VisionProjector; llm: the LLaMA's config; weights: its (name, tensor) in dtype, LoRA in them; pieces: of
    prompt_pieces; config: the checkpoint's config.json. UserError where Blip-2 would not compute the same."""
    vit, qformer = blip2_vision(vision)
    pictures = plain_pictures(vision.preprocess)
    ids, order = prompt_parts(pieces)
    text = llm.to_dict() | {"tie_word_embeddings": False, "eos_token_id": tokenizer.eos_token_id}
    both = {"vision_config": vit.config.to_dict(), "qformer_config": qformer.config.to_dict(), "text_config": text}
    for part in both.values():
        part["dtype"] = str(dtype).removeprefix("torch.")
    image = spare_id(tokenizer, sum(ids, []))
    queries = vision.query_tokens.shape[1]
    whole = Blip2Config(**both, num_query_tokens=queries, image_token_index=image, tie_word_embeddings=False)
    whole.dtype = dtype
    record = whole.to_dict() | {"architectures": ["Blip2ForConditionalGeneration"]}

    Path(folder).mkdir()
    write_shards(folder, all_weights(vision, vit, qformer, weights, llm.tie_word_embeddings), SHARD)
    write_json(f"{folder}/config.json", record, indent=2)
    write_json(f"{folder}/preprocessor_config.json", pictures, indent=2)
    tokenizer.save_pretrained(folder)
    write_text(f"{folder}/README.md", blip2_card(config, ids, order))


def all_weights(vision, vit, qformer, weights: Iterable, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of Blip2ForConditionalGeneration; what is fp32 in the VDG stays so, the ViT is in its dtype."""
    for part, module in (("vision_model", vit), ("qformer", qformer), ("language_projection", vision.projection)):
        for name, tensor in module.state_dict().items():
            yield f"{part}.{name}", tensor
    yield "query_tokens", vision.query_tokens
    for name, tensor in weights:
        yield f"language_model.{name}", tensor
        if tied and name == "model.embed_tokens.weight":  # written twice: who ties what differs between versions
            yield "language_model.lm_head.weight", tensor.clone()


def write_shards(folder: str, tensors: Iterable[tuple[str, Tensor]], limit: int) -> None:
    """Hugging Face's layout of (name, tensor): model.safetensors, or model-00001-of-0000N.safetensors and an index.

    No more than a shard of `limit` bytes, or one larger tensor, is held at a time."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = filled = 0

    def write() -> None:
        write_tensors(f"{folder}/part-{len(shards)}", held)
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and filled + size > limit:
            write()
            filled = 0
        held[name] = tensor
        filled, total = filled + size, total + size
    write()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for i, name in enumerate(names):
        Path(folder, f"part-{i}").rename(Path(folder, name))
    if len(shards) > 1:
        table = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": table}
        write_json(f"{folder}/model.safetensors.index.json", index, indent=2)


# ---- the vision side under Blip-2's names ----
def blip2_vision(vision: nn.Module) -> tuple[Blip2VisionModel, Blip2QFormerModel]:
    """ViT and Q-Former of a VisionProjector as Blip-2's own modules, on the same weights.

    InstructBLIP's Q-Former reads a text beside the queries; the VDG gives it none, so what is left is Blip-2's under
    other names. UserError where it is not: a weight without a place, a setting Blip-2 does not know, other outputs."""
    vit = blip2_part(Blip2VisionModel, Blip2VisionConfig, vision.vision_model, dict)
    qformer = blip2_part(Blip2QFormerModel, Blip2QFormerConfig, vision.qformer, without_text)
    size = vision.preprocess.size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = vision.queries(pixels)
        patches = vit(pixels.to(vision.dtype)).last_hidden_state
        seen = torch.ones(patches.shape[:2], dtype=torch.long)
        start = vision.query_tokens.expand(2, -1, -1)
        theirs = qformer(start, encoder_hidden_states=patches.float(), encoder_attention_mask=seen).last_hidden_state
    if not torch.allclose(theirs.to(ours), ours, rtol=1e-2 if vision.dtype.itemsize == 2 else 1e-4, atol=1e-4):
        gap = (theirs - ours).abs().max().item()
        raise UserError(f"--format blip2: Blip-2's Q-Former differs from this one by {gap:.1e}; --format llama works")
    return vit, qformer


def blip2_part(kind: type, config_kind: type, module: nn.Module, renamed) -> nn.Module:
    """A module of Blip-2 with the config and the weights of InstructBLIP's; renamed: state dict -> Blip-2's names."""
    config = module.config.to_dict()
    unknown = config.keys() - config_kind().to_dict().keys() - _OWN
    if unknown:
        raise UserError(f"--format blip2: Blip-2 has no {', '.join(sorted(unknown))}; --format llama works")
    with torch.device("meta"):
        built = kind(config_kind(**{key: value for key, value in config.items() if key not in _OWN}))
    try:
        built.load_state_dict(renamed(module.state_dict()), assign=True)
    except RuntimeError as fault:
        why = reason_of(fault)
        raise UserError(f"--format blip2: the weights are not Blip-2's ({why}); --format llama works") from None
    return built.eval()


def without_text(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """InstructBLIP's Q-Former less what only a text reads, under the names of Blip-2's; Blip-2's own as it is."""
    if not any(name.startswith("embeddings.") for name in weights):
        return weights
    kept = {name: tensor for name, tensor in weights.items() if not _TEXT.match(name)}
    return {name.removeprefix("embeddings."): tensor for name, tensor in kept.items()}


def plain_pictures(preprocess: Preprocess) -> dict:
    """preprocessor_config.json of BlipImageProcessor; UserError where that would make other pixels."""
    record = preprocess.as_blip()
    if record is None:
        raise UserError("--format blip2: BlipImageProcessor makes other pixels than this one; --format llama works")
    return record


def spare_id(tokenizer, used: list[int]) -> int:
    """An id of a word that the prompt does not use: its embedding is replaced wherever it stands."""
    candidates = [tokenizer.unk_token_id, *range(len(tokenizer))]
    return next(i for i in candidates if i is not None and i not in used)


# ---- the card ----
def blip2_card(config: dict, ids: list[list[int]], order: list[str]) -> str:
    """README.md with the lines of plain transformers that use the folder; ids, order: of prompt_parts."""
    before, between, after = (json.dumps(part) for part in ids)
    base = card_name(config["llm"])
    front = f"base_model: {base}\n" if base else ""
    return f"""---
{front}library_name: transformers
pipeline_tag: image-text-to-text
tags: [composed-image-retrieval, visual-delta, blip-2]
---
# Visual delta generator as a Blip-2

Given a reference and a target picture it says what turns the one into the other (Jang et al., CVPR 2024, arXiv
2404.15516). Vision side: `{config["vision"]}`, its Q-Former without a text. LLM: `{config["llm"]}`,
LoRA in its weights. Only torch, transformers (5.17 to 5.23 were tried) and Pillow are needed:

```python
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, BlipImageProcessorPil, PreTrainedTokenizerFast
folder = "."
model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
pictures, words = BlipImageProcessorPil.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
image = [model.config.image_token_id] * model.config.num_query_tokens
ids = torch.tensor([{before} + image + {between} + image + {after}])
def delta(reference, target):
    pair = [Image.open(name).convert("RGB") for name in ({order[0]}, {order[1]})]
    pixels = pictures(pair, return_tensors="pt").pixel_values.to(model.dtype)
    said = model.generate(pixel_values=pixels, input_ids=ids, max_new_tokens=32, do_sample=False)
    return words.decode(said[0, ids.shape[1]:], skip_special_tokens=True)
```

The numbers are the prompt in ids, which are those of this tokenizer; the {order[0]}'s image tokens come first:

```
{config["prompt"]}
```

Its greedy texts are those of `gen_deltas.py --temperature 0` where both compute in fp32 (`dtype=torch.float32`). In
bf16 transformers rounds Q-Former and projection too, which the VDG keeps in fp32: some texts differ. The licences of
the LLM, of the vision model and of the triplets apply.
"""
