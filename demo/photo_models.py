"""The stand-in models of product photographs, each with what it is shown and its loss; demo/pretrain_photos.py calls
them.

They see the pretraining photographs of a catalogue alone (`products.is_for_pretraining`), at 64 x 64 pixels, with what
the catalogue knows of each and its shop title. A part goes on from its last state; a model is saved as an ordinary
Hugging Face folder (demo/formats.py) with its time and its held-out scores beside it.
"""

import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.console import progress, say
from demo import products
from demo.architectures import WIDTH, new_blip, new_clip, new_instructblip
from demo.formats import MEAN, STD, bert_tokenizer, clip_tokenizer, preprocessor, save, words_of
from demo.standins import contrast

PIXELS = 64  # side of the picture that a model sees
_BRANDS = 60  # the most frequent first words of titles are an attribute of their own
_HELD = 1000  # photographs kept to measure on
_EVERY = 200  # steps between two states


class Shelf(NamedTuple):
    """Photographs in memory with all that a model may learn of them."""

    pictures: np.ndarray  # (N, 80, 60, 3) uint8
    titles: list[str]
    labels: torch.Tensor  # (N, slots) int64: a class of each slot, -100 where it is not known


class Slots(NamedTuple):
    """What the vision models are asked: the attributes, and the brand."""

    values: dict[str, tuple[str, ...]]

    def sizes(self) -> list[int]:
        return [len(values) for values in self.values.values()]


# ---- photographs ----
def read_shelves(folder: str) -> tuple[Slots, Shelf, Shelf]:
    """-> the slots, what is trained on, what is held out: no near duplicate of a photograph is in the other."""
    catalogue = products.read_catalogue(folder)
    found = [product for product in catalogue.products if products.is_for_pretraining(product)]
    slots = Slots(products.VALUES | {"brand": brands(found)})
    keys = sorted({product.key for product in found}, key=lambda key: (hash_of(key), key))
    held_keys, taken = set(), 0
    of = Counter(product.key for product in found)
    for key in keys:
        if taken >= min(_HELD, len(found) // 10):
            break
        held_keys.add(key)
        taken += of[key]
    trained = [product for product in found if product.key not in held_keys]
    held = [product for product in found if product.key in held_keys]
    return slots, shelf(catalogue, trained, slots), shelf(catalogue, held, slots)


def hash_of(key: str) -> bytes:
    return hashlib.sha256(b"held out " + key.encode()).digest()


def brand(product: products.Product) -> str:
    return product.title.lower().split()[0]


def brands(found: list[products.Product]) -> tuple[str, ...]:
    """The most frequent first words of titles."""
    count = Counter(brand(product) for product in found)
    return tuple(sorted(name for name, _ in count.most_common(_BRANDS)))


def shelf(catalogue: products.Catalogue, found: list[products.Product], slots: Slots) -> Shelf:
    pictures = np.empty((len(found), 80, 60, 3), np.uint8)
    labels = torch.full((len(found), len(slots.values)), -100)
    for i, photo in enumerate(progress(catalogue.photos(found), "reading photographs", len(found))):
        pictures[i] = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB").resize((60, 80)))
        known = found[i].attributes | {"brand": brand(found[i])}
        for slot, (key, values) in enumerate(slots.values.items()):
            if known.get(key) in values:
                labels[i, slot] = values.index(known[key])
    return Shelf(pictures, [product.title for product in found], labels)


def views(pictures: np.ndarray, train: bool) -> torch.Tensor:
    """(B, 80, 60, 3) uint8 -> (B, 3, 64, 64) normalised; in training zoomed, moved, flipped and lit anew, wider and
    higher each by itself, as photographs of other shapes are squashed."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    if train:
        n = len(x)
        zoom = torch.empty(n, 2).uniform_(0.75, 1.15)
        zoom[torch.rand(n) < 0.25] = 1.0
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = zoom[:, 0] * torch.where(torch.rand(n) < 0.5, 1.0, -1.0)
        theta[:, 1, 1] = zoom[:, 1]
        theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (1 - zoom).abs()
        grid = F.affine_grid(theta, (n, 3, PIXELS, PIXELS), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        x = (x * torch.empty(n, 1, 1, 1).uniform_(0.88, 1.12)).clamp(0, 1)
    else:
        x = F.interpolate(x, (PIXELS, PIXELS), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def batch_of(count: int, size: int, seed: int, step: int) -> np.ndarray:
    """Which photographs a step sees: every one once an epoch, whatever was stopped and resumed."""
    first = step * size
    rows = np.arange(first, first + size)
    order = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set(rows // count)}
    return np.array([order[row // count][row % count] for row in rows])


# ---- training ----
def train(name: str, states: str, model: nn.Module, steps: int, lr: float, loss_at, report) -> float:
    """AdamW, 5 % warm-up, cosine to zero; a state every _EVERY steps, from which the same command goes on with the same
    result. -> seconds of all its runs together."""
    file, parameters = f"{states}/{name}.pt", [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    first, before = 0, 0.0
    if os.path.exists(file):
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        first, before = state["step"], state["seconds"]
        say(f"{name}: goes on from step {first}")
    began, mean = time.time(), None
    for step in range(first, steps):
        rate = min(1, (step + 1) / (0.05 * steps)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in adam.param_groups:
            group["lr"] = lr * rate
        torch.manual_seed(step)  # of the views
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_at(step)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        mean = float(loss.detach()) if mean is None else 0.98 * mean + 0.02 * float(loss.detach())
        done, seconds = step + 1, before + time.time() - began
        if done % 100 == 0:
            extra = json.dumps(report()) if done % 600 == 0 else ""
            print(f"{name} {done}/{steps} loss {mean:.3f} {seconds:.0f} s {extra}", flush=True)
        if done % _EVERY == 0 or done == steps:
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "step": done, "seconds": seconds}
            torch.save(state, file + ".tmp")
            os.replace(file + ".tmp", file)
    return before + time.time() - began


def attribute_loss(logits: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Sum over the slots of the cross entropy of what is known. logits (B, sum of sizes), labels (B, slots)."""
    total = torch.zeros(())
    for slot, part in enumerate(logits.float().split(sizes, 1)):
        known = labels[:, slot] >= 0
        if known.any():
            share = known.float().mean().clamp(min=0.2)  # what is seldom known does not shake the rest
            total = total + share * F.cross_entropy(part[known], labels[known, slot])
    return total


def teaching_loss(logits: torch.Tensor, taught: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Sum over the slots of the cross entropy to what a trained model says of the same view."""
    total = torch.zeros(())
    for part, truth in zip(logits.float().split(sizes, 1), taught.float().split(sizes, 1), strict=True):
        total = total + F.cross_entropy(part, truth.softmax(1))
    return total / 2


def accuracy(logits: torch.Tensor, labels: torch.Tensor, slots: Slots) -> dict[str, float]:
    """Share of the known that is right."""
    found = {}
    for slot, (key, part) in enumerate(zip(slots.values, logits.split(slots.sizes(), 1), strict=True)):
        known = labels[:, slot] >= 0
        if known.any():
            found[key] = round(float((part.argmax(1) == labels[:, slot])[known].float().mean()), 3)
    return found


@torch.no_grad()
def in_parts(function, pictures: np.ndarray) -> torch.Tensor:
    return torch.cat([function(views(pictures[i : i + 100], False)) for i in range(0, len(pictures), 100)])


# ---- the models ----
def pretrain_resnet(out: str, states: str, seed: int, steps: int, slots: Slots, shown: Shelf, held: Shelf) -> None:
    model = new_resnet(slots, seed)
    sizes = slots.sizes()

    def loss_at(step):
        picks = batch_of(len(shown.pictures), 128, seed, step)
        x = views(shown.pictures[picks], True).contiguous(memory_format=torch.channels_last)
        return attribute_loss(model(pixel_values=x).logits, shown.labels[picks], sizes)

    def report():
        model.eval()
        scores = accuracy(in_parts(lambda x: model(pixel_values=x).logits, held.pictures), held.labels, slots)
        model.train()
        return scores

    seconds = train("resnet", states, model, steps, 2e-3, loss_at, report)
    facts = {"seconds": round(seconds), "steps": steps, "pictures": len(shown.pictures), "held_out": report()}
    save(model, f"{out}/resnet", **facts, slots=slots.values)
    preprocessor(f"{out}/resnet", "blip", PIXELS)  # squashed, not cropped: a coat fills the height


def new_resnet(slots: Slots, seed: int):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[1, 2, 2, 1],
        layer_type="basic",
        num_labels=sum(slots.sizes()),
    )
    return ResNetForImageClassification(config).to(memory_format=torch.channels_last)


def trained_resnet(out: str):
    from transformers import ResNetForImageClassification

    model = ResNetForImageClassification.from_pretrained(f"{out}/resnet", dtype=torch.float32, trust_remote_code=False)
    return model.to(memory_format=torch.channels_last).eval()


class Vision(nn.Module):
    """InstructBLIP's vision side with a head on its cls token, and one on query k for slot k."""

    def __init__(self, model, sizes: list[int]):
        super().__init__()
        self.vision_model, self.qformer, self.query_tokens = model.vision_model, model.qformer, model.query_tokens
        self.by_cls = nn.Linear(WIDTH, sum(sizes))
        self.by_query = nn.ModuleList(nn.Linear(128, size) for size in sizes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.vision_model(pixel_values=x).last_hidden_state
        queries = self.query_tokens.expand(len(x), -1, -1)
        queries = self.qformer(input_ids=None, query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        said = [head(queries[:, slot]) for slot, head in enumerate(self.by_query)]
        return self.by_cls(tokens[:, 0]), torch.cat(said, 1)


def pretrain_vision(out: str, states: str, seed: int, steps: int, slots: Slots, shown: Shelf, held: Shelf) -> None:
    """The ViT and the Q-Former learn the attributes, and what the trained ResNet says of the same view."""
    model, sizes, teacher = new_instructblip(len(slots.values), PIXELS, seed), slots.sizes(), trained_resnet(out)
    vision = Vision(model, sizes)

    def loss_at(step):
        picks = batch_of(len(shown.pictures), 128, seed, step)
        x, y = views(shown.pictures[picks], True), shown.labels[picks]
        with torch.no_grad():
            taught = teacher(pixel_values=x.contiguous(memory_format=torch.channels_last)).logits
        return sum(attribute_loss(said, y, sizes) + teaching_loss(said, taught, sizes) for said in vision(x))

    def report():
        vision.eval()
        both = in_parts(lambda x: torch.cat(vision(x), 1), held.pictures).chunk(2, 1)
        vision.train()
        return dict(zip(("cls", "queries"), (accuracy(said, held.labels, slots) for said in both), strict=True))

    seconds = train("instructblip", states, vision, steps, 1e-3, loss_at, report)
    facts = {"seconds": round(seconds), "steps": steps, "pictures": len(shown.pictures), "held_out": report()}
    save(model, f"{out}/instructblip", **facts, slots=slots.values)
    preprocessor(f"{out}/instructblip", "blip", PIXELS)


def told(titles: list[str]) -> list[str]:
    """Titles as a text encoder reads them: small letters, words alone."""
    return [" ".join("".join(c if c.isalnum() else " " for c in title.lower()).split()) for title in titles]


def frequent(titles: list[str], corpus: list[str], least: int = 8) -> list[str]:
    """The titles' frequent words, and every word of the corpus: what the tokenizers are fitted on."""
    count = Counter(word for title in told(titles) for word in title.split())
    return [word for word, times in sorted(count.items()) if times >= least] + words_of(corpus)


def ranks(texts: torch.Tensor, images: torch.Tensor) -> dict[str, float]:
    """Recall of each text's own picture among all that are held out."""
    near = F.normalize(texts.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T
    rank = (near > near.diagonal()[:, None]).sum(1)
    return {f"text_to_image_r{k}": round(float((rank < k).float().mean()), 3) for k in (1, 10)}


def pretrain_clip(
    out: str, states: str, seed: int, steps: int, slots: Slots, shown: Shelf, held: Shelf, corpus: list[str]
) -> None:
    tok = clip_tokenizer(f"{out}/clip", told(shown.titles) + corpus, 3000)
    model = new_clip(tok, f"{out}/instructblip", PIXELS, seed)
    sizes = slots.sizes()
    both = nn.ModuleDict({"model": model, "heads": nn.Linear(128, sum(sizes))})

    def image_of(x):
        return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)

    def text_of(titles):
        words = tok(told(titles), padding=True, truncation=True, max_length=40, return_tensors="pt")
        return model.text_projection(model.text_model(**words).pooler_output)

    def loss_at(step):
        picks = batch_of(len(shown.pictures), 128, seed, step)
        image, words = image_of(views(shown.pictures[picks], True)), text_of([shown.titles[i] for i in picks])
        guide = attribute_loss(both["heads"](image), shown.labels[picks], sizes)
        return contrast(image, words, model.logit_scale.exp().clamp(max=100)) + 0.5 * guide

    @torch.no_grad()
    def report():
        model.eval()
        images = in_parts(image_of, held.pictures)
        scores = ranks(text_of(held.titles), images)
        scores["attributes"] = accuracy(both["heads"](images), held.labels, slots)
        model.train()
        return scores

    seconds = train("clip", states, both, steps, 6e-4, loss_at, report)
    facts = {"seconds": round(seconds), "steps": steps, "pictures": len(shown.pictures), "held_out": report()}
    save(model, f"{out}/clip", **facts)
    preprocessor(f"{out}/clip", "clip-squashed", PIXELS)


def pretrain_blip(
    out: str, states: str, seed: int, steps: int, slots: Slots, shown: Shelf, held: Shelf, corpus: list[str]
) -> None:
    """The text encoder learns; the vision tower is the trained ViT. Contrast and matching, as in ALBEF and BLIP."""
    tok = bert_tokenizer(f"{out}/blip", frequent(shown.titles, corpus))
    vocab, sizes = len(tok) + 2, slots.sizes()  # [DEC] and [ENC] come last, as in the released weights
    model = new_blip(vocab, f"{out}/instructblip", PIXELS, seed)
    trained = nn.ModuleDict({"model": model, "guide": nn.Linear(128, sum(sizes))})
    trained.register_parameter("scale", nn.Parameter(torch.tensor(2.6)))

    def encode(titles, tokens=None):
        words = tok(told(titles), padding=True, truncation=True, max_length=40, return_tensors="pt")
        ids, mask = words.input_ids, words.attention_mask
        if tokens is None:
            return model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        ids[:, 0] = vocab - 1  # [ENC]
        seen = torch.ones(tokens.shape[:2], dtype=torch.long)
        return model.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=tokens, encoder_attention_mask=seen
        ).last_hidden_state[:, 0]

    def loss_at(step):
        picks = batch_of(len(shown.pictures), 96, seed, step)
        with torch.no_grad():
            tokens = model.vision_model(pixel_values=views(shown.pictures[picks], True)).last_hidden_state
        titles = [shown.titles[i] for i in picks]
        image, words = model.vision_proj(tokens[:, 0]), model.text_proj(encode(titles))
        itc = contrast(image, words, trained.scale.exp().clamp(max=100))
        # each title also meets its hardest picture of the batch, each picture its hardest title
        with torch.no_grad():
            near = 20 * F.normalize(image.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
            same = torch.tensor([[a == b for b in titles] for a in titles])
            near[same] = -1e4
            hard_text = torch.multinomial(near.softmax(1), 1)[:, 0]
            hard_image = torch.multinomial(near.T.softmax(1), 1)[:, 0]
        both = encode(titles * 2 + [titles[i] for i in hard_text], torch.cat([tokens, tokens[hard_image], tokens]))
        truth = torch.cat([torch.ones(96), torch.zeros(192)]).long()
        guide = attribute_loss(trained["guide"](image), shown.labels[picks], sizes)
        return itc + F.cross_entropy(model.itm_head(both).float(), truth) + 0.5 * guide

    @torch.no_grad()
    def report():
        tokens = in_parts(lambda x: model.vision_model(pixel_values=x).last_hidden_state, held.pictures)
        scores = ranks(model.text_proj(encode(held.titles)), model.vision_proj(tokens[:, 0]))
        for name, first in (("matched", 0), ("mismatched_as_matched", 1)):
            said = model.itm_head(encode(held.titles[first : first + 200], tokens[:200])).argmax(1)
            scores[name] = round(float(said.float().mean()), 3)
        return scores

    seconds = train("blip", states, trained, steps, 1e-3, loss_at, report)
    facts = {"seconds": round(seconds), "steps": steps, "pictures": len(shown.pictures), "held_out": report()}
    save(model, f"{out}/blip", **facts)
    preprocessor(f"{out}/blip", "blip", PIXELS)
