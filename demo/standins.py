"""The stand-in models of the embedded world, each with what it is shown and its loss; demo/pretrain.py calls them.

A model is saved as an ordinary Hugging Face folder below `out` (demo/formats.py), with its held-out scores beside it.
"""

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.console import progress
from common.seeds import seeded_rng
from demo import world
from demo.architectures import new_blip, new_clip, new_instructblip
from demo.formats import MEAN, PIXELS, STD, bert_tokenizer, clip_tokenizer, llama_tokenizer, preprocessor, save, write
from demo.texts import KINDS_OF_TEXT, SLOTS, corpus, document

NOTHING = ("print", "sleeves", "length", "neck")  # attributes that a garment may lack
CLASSES = [(k, v) for k in SLOTS for v in world.VALUES[k] + ((None,) if k in NOTHING else ())]
CLASS_OF = {kv: i for i, kv in enumerate(CLASSES)}


def label(garment: dict) -> list[int]:
    """Class of each slot, "not there" being a class of its own."""
    return [CLASS_OF[k, garment[k] if world.applies(garment, k) else None] for k in SLOTS]


# ---- pictures ----
def _draw(job):
    seed, i = job
    rng = seeded_rng("pretrain", seed, i)
    garment = world.random_garment(rng)
    return np.asarray(world.draw(garment, rng)), garment


def bank(folder: str, n: int, seed: int):
    """-> pictures (n, 128, 128, 3) uint8, their garments; drawn once and kept."""
    file = f"{folder}/bank-{seed}-{n}.npy"
    if not os.path.exists(file):
        os.makedirs(folder, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            drawn = list(progress(pool.map(_draw, ((seed, i) for i in range(n)), chunksize=64), "drawing", n))
        np.save(file, np.stack([picture for picture, _ in drawn]))
        write(file + ".json", [garment for _, garment in drawn])
    with open(file + ".json") as f:
        return np.load(file, mmap_mode="r"), json.load(f)


def views(pictures: np.ndarray, train: bool) -> torch.Tensor:
    """(B, 128, 128, 3) uint8 -> (B, 3, PIXELS, PIXELS) normalised; in training cropped, flipped, lit anew."""
    x = torch.tensor(pictures).permute(0, 3, 1, 2).float() / 255
    if train:
        n = len(x)
        zoom = torch.where(torch.rand(n) < 0.35, torch.ones(n), torch.empty(n).uniform_(0.75, 1))
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = zoom * torch.empty(n).uniform_(0.95, 1.05) * torch.where(torch.rand(n) < 0.5, 1.0, -1.0)
        theta[:, 1, 1] = zoom
        theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (1 - zoom)[:, None]
        x = F.grid_sample(
            x,
            F.affine_grid(theta, (n, 3, PIXELS, PIXELS), align_corners=False),
            padding_mode="border",
            align_corners=False,
        )
        x = (x * torch.empty(n, 1, 1, 1).uniform_(0.9, 1.1)).clamp(0, 1)
    else:
        x = F.interpolate(x, (PIXELS, PIXELS), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def train(name, parameters, steps, lr, loss_at, report=None):
    """AdamW, 5 % warm-up, cosine to zero; prints the loss now and then."""
    parameters = [p for p in parameters if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    start, mean = time.time(), 0.0
    for step in range(steps):
        rate = min(1, (step + 1) / (0.05 * steps)) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        for group in adam.param_groups:
            group["lr"] = lr * rate
        loss = loss_at(step)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        mean = 0.98 * mean + 0.02 * float(loss.detach()) if step else float(loss.detach())
        if (step + 1) % 100 == 0:
            extra = report(step) if report and (step + 1) % 300 == 0 else ""
            print(f"{name} {step + 1}/{steps} loss {mean:.3f} {time.time() - start:.0f} s {extra}", flush=True)
    return time.time() - start


# ---- the models ----
def pretrain_llama(out: str, seed: int, steps: int, comparing: float, noisy: float) -> None:
    """comparing, noisy: shares of the steps, as demo/pretrain.py explains its flags."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rng = np.random.default_rng(seed)
    tok = llama_tokenizer(f"{out}/llama", corpus(rng, 1500))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    )
    print("llama", sum(p.numel() for p in model.parameters()), "parameters, vocabulary", len(tok))
    cache = {}

    def ids(text):
        if text not in cache:
            cache[text] = tok(text, add_special_tokens=False).input_ids
        return cache[text]

    def batch(rng, kinds, size):
        rows = []
        for kind in kinds:
            shown, answer = document(rng, kind)
            row, soft = [1], [0]
            for text, is_tags in shown:
                if is_tags:  # the number of its slot for each
                    words = [ids(w) for w in text.split()]
                    new = [i for word in words for i in word]
                    soft = soft + [slot for slot, word in enumerate(words, 1) for _ in word]
                else:
                    new = ids(text)
                    soft = soft + [0] * len(new)
                row = row + new
            reply = tok(answer, add_special_tokens=False).input_ids + [2]
            rows.append((row + reply, soft + [0] * len(reply), len(row)))
        longest = max(len(r) for r, _, _ in rows)
        x, y = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
        soft = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, (row, slots, prompt) in enumerate(rows):
            x[i, : len(row)] = torch.tensor(row)
            y[i, prompt : len(row)] = x[i, prompt : len(row)]
            soft[i, : len(row)] = torch.tensor(slots)
        return x, y, soft

    def logits_of(x, y, soft, noise):
        embedded = model.get_input_embeddings()(x)
        # Image tokens will be no exact words. What a projection learned from captions does to them: a linear map gone
        # astray in its own way, louder or quieter; an offset of its own for each slot, the same in all pictures; noise.
        n, width = len(x), embedded.shape[-1]
        size = embedded.detach()[soft > 0].std() * noise
        astray = embedded.detach() @ (torch.randn(width, width) * (1.5 * noise / width**0.5))
        offset = size * 1.8 * torch.rand(n, 1, 1) * torch.randn(n, 1 + len(SLOTS), width)
        own = size * torch.rand(n, 1, 1) ** 2 * torch.randn_like(embedded)
        louder = torch.exp(noise * torch.empty(n, 1, 1).uniform_(-1.6, 0.7))
        tokens = louder * (embedded + torch.rand(n, 1, 1) * astray + own)
        tokens = tokens + offset[torch.arange(n)[:, None], soft]
        embedded = torch.where(soft[..., None] > 0, tokens, embedded)
        hidden = model.model(inputs_embeds=embedded, attention_mask=(x != 0).long()).last_hidden_state  # right padding
        keep = y[:, 1:] != -100
        return model.lm_head(hidden[:, :-1][keep]), y[:, 1:][keep]

    def loss_at(step):
        mix = (0.15, 0.75, 0.05, 0.0, 0.05) if step < comparing * steps else (0.2, 0.2, 0.25, 0.05, 0.3)
        kinds = rng.choice(KINDS_OF_TEXT, size=96, p=mix)
        x, y, soft = batch(rng, kinds, 96)
        # Noise from the first step on and copying never emerges.
        return F.cross_entropy(*logits_of(x, y, soft, 0.7 * min(1, max(0, step / steps - comparing) / noisy)))

    exact = {}

    @torch.no_grad()
    def report(step):
        model.eval()
        held_out = np.random.default_rng(seed + 1)
        x, y, soft = batch(held_out, ["slots"] * 256, 256)
        logits, truth = logits_of(x, y, soft, 0.0)
        right = (logits.argmax(-1) == truth).view(256, -1)
        exact.update(slots_right=float(right.float().mean()), rows_right=float(right.all(1).float().mean()))
        for kind in ("caption", "some", "request"):
            exact[f"{kind}_loss"] = round(
                float(F.cross_entropy(*logits_of(*batch(held_out, [kind] * 256, 256), 0.0))), 3
            )
        model.train()
        save(model, f"{out}/llama", steps=step, **exact)
        return json.dumps(exact)

    seconds = train("llama", model.parameters(), steps, 1.5e-3, loss_at, report)
    report(steps)
    save(model, f"{out}/llama", seconds=round(seconds), steps=steps, **exact)


def attribute_loss(logits, labels):
    """One softmax over all classes a slot: logits (B, slots, classes), labels (B, slots)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def accuracy(logits, labels) -> dict:
    right = (logits.argmax(-1) == labels).float().mean(0)
    return {k: round(float(v), 3) for k, v in zip(SLOTS, right, strict=True)}


def pretrain_vision(out: str, seed: int, steps: int, pictures, labels, held) -> None:
    model = new_instructblip(len(SLOTS), PIXELS, seed)
    by_cls, by_query = nn.Linear(192, len(SLOTS) * len(CLASSES)), nn.Linear(128, len(CLASSES))

    def logits_of(x):
        tokens = model.vision_model(pixel_values=x).last_hidden_state
        queries = model.qformer(
            input_ids=None, query_embeds=model.query_tokens.expand(len(x), -1, -1), encoder_hidden_states=tokens
        ).last_hidden_state
        return by_cls(tokens[:, 0]).view(len(x), len(SLOTS), -1), by_query(queries)

    def loss_at(step):
        pick = np.random.default_rng((seed, step)).integers(0, len(pictures), 128)
        a, b = logits_of(views(pictures[np.sort(pick)], True))
        y = labels[np.sort(pick)]
        return attribute_loss(a, y) + attribute_loss(b, y)

    scores = {}

    @torch.no_grad()
    def report(step):
        model.eval()
        a, b = zip(*(logits_of(views(held[0][i : i + 100], False)) for i in range(0, len(held[0]), 100)), strict=True)
        scores.update(cls=accuracy(torch.cat(a), held[1]), queries=accuracy(torch.cat(b), held[1]))
        model.train()
        save(model, f"{out}/instructblip", steps=step, held_out=scores)
        return json.dumps(scores["queries"])

    parameters = [
        *model.vision_model.parameters(),
        *model.qformer.parameters(),
        model.query_tokens,
        *by_cls.parameters(),
        *by_query.parameters(),
    ]
    seconds = train("vision", parameters, steps, 8e-4, loss_at, report)
    report(steps)
    save(model, f"{out}/instructblip", seconds=round(seconds), steps=steps, pictures=len(pictures), held_out=scores)
    preprocessor(f"{out}/instructblip", "blip")


def captions_for(garments, picks, step, seed):
    rng = np.random.default_rng((seed, step, 1))
    return [world.caption(garments[i], rng, drop=0.2) for i in picks]


def contrast(a, b, scale):
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    truth = torch.arange(len(a))
    return F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)


def pretrain_clip(out: str, seed: int, steps: int, pictures, garments, labels, held) -> None:
    tok = clip_tokenizer(f"{out}/clip", corpus(np.random.default_rng(seed), 1500))
    model = new_clip(tok, f"{out}/instructblip", PIXELS, seed)
    heads = nn.Linear(128, len(SLOTS) * len(CLASSES))

    def loss_at(step):
        picks = np.sort(np.random.default_rng((seed, step)).integers(0, len(pictures), 128))
        image = model.visual_projection(model.vision_model(pixel_values=views(pictures[picks], True)).pooler_output)
        text = tok(captions_for(garments, picks, step, seed), padding=True, return_tensors="pt")
        words = model.text_projection(model.text_model(**text).pooler_output)
        guide = attribute_loss(heads(image).view(len(image), len(SLOTS), -1), labels[picks])
        return contrast(image, words, model.logit_scale.exp().clamp(max=100)) + guide

    scores = {}

    @torch.no_grad()
    def report(step):
        model.eval()
        images = torch.cat(
            [
                model.visual_projection(
                    model.vision_model(pixel_values=views(held[0][i : i + 100], False)).pooler_output
                )
                for i in range(0, len(held[0]), 100)
            ]
        )
        text = tok(
            [world.caption(g, np.random.default_rng(3), drop=0) for g in held[2]], padding=True, return_tensors="pt"
        )
        words = model.text_projection(model.text_model(**text).pooler_output)
        hits = (F.normalize(words, dim=-1) @ F.normalize(images, dim=-1).T).argmax(1) == torch.arange(len(images))
        scores.update(
            text_to_image_r1=float(hits.float().mean()),
            attributes=accuracy(heads(images).view(len(images), len(SLOTS), -1), held[1]),
        )
        model.train()
        return json.dumps(scores)

    seconds = train("clip", [*model.parameters(), *heads.parameters()], steps, 5e-4, loss_at, report)
    report(steps)
    save(model, f"{out}/clip", seconds=round(seconds), steps=steps, held_out=scores)
    preprocessor(f"{out}/clip", "clip")


def pretrain_blip(out: str, seed: int, steps: int, pictures, garments, held) -> None:
    tok = bert_tokenizer(f"{out}/blip", corpus(np.random.default_rng(seed), 1500))
    vocab = len(tok) + 2  # [DEC] and [ENC] come last, as in the released weights
    model = new_blip(vocab, f"{out}/instructblip", PIXELS, seed)
    guide = nn.Linear(128, len(SLOTS) * len(CLASSES))
    label_of = torch.tensor([label(g) for g in garments])
    scale = nn.Parameter(torch.tensor(2.6))

    def encode(texts, tokens=None):
        words = tok(texts, padding=True, return_tensors="pt")
        if tokens is None:
            return model.text_encoder(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state
        ids = words.input_ids.clone()
        ids[:, 0] = vocab - 1  # [ENC]
        return model.text_encoder(
            input_ids=ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long),
        ).last_hidden_state

    def loss_at(step):
        picks = np.sort(np.random.default_rng((seed, step)).integers(0, len(pictures), 96))
        with torch.no_grad():
            tokens = model.vision_model(pixel_values=views(pictures[picks], True)).last_hidden_state
        texts = captions_for(garments, picks, step, seed)
        image, words = model.vision_proj(tokens[:, 0]), model.text_proj(encode(texts)[:, 0])
        itc = contrast(image, words, scale.exp().clamp(max=100))
        # ALBEF / BLIP: each caption also meets its hardest picture of the batch, each picture its hardest caption.
        with torch.no_grad():
            near = 20 * F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T
            near.fill_diagonal_(-1e4)
            hard_text = torch.multinomial(near.softmax(1), 1)[:, 0]
            hard_image = torch.multinomial(near.T.softmax(1), 1)[:, 0]
        both = encode(texts * 2 + [texts[i] for i in hard_text], torch.cat([tokens, tokens[hard_image], tokens]))
        truth = torch.cat([torch.ones(96), torch.zeros(192)]).long()
        attributes = attribute_loss(guide(image).view(len(image), len(SLOTS), -1), label_of[picks])
        return itc + F.cross_entropy(model.itm_head(both[:, 0]), truth) + attributes

    scores = {}

    @torch.no_grad()
    def report(step):
        tokens = torch.cat(
            [
                model.vision_model(pixel_values=views(held[0][i : i + 100], False)).last_hidden_state
                for i in range(0, len(held[0]), 100)
            ]
        )
        texts = [world.caption(g, np.random.default_rng(3), drop=0) for g in held[2]]
        words = F.normalize(model.text_proj(encode(texts)[:, 0]), dim=-1)
        images = F.normalize(model.vision_proj(tokens[:, 0]), dim=-1)
        matched = model.itm_head(encode(texts[:200], tokens[:200])[:, 0]).argmax(1).float().mean()
        apart = model.itm_head(encode(texts[1:201], tokens[:200])[:, 0]).argmax(1).float().mean()
        scores.update(
            text_to_image_r1=float(((words @ images.T).argmax(1) == torch.arange(len(images))).float().mean()),
            matched=float(matched),
            mismatched_as_matched=float(apart),
        )
        return json.dumps(scores)

    seconds = train("blip", [*model.parameters(), *guide.parameters(), scale], steps, 1e-3, loss_at, report)
    report(steps)
    save(model, f"{out}/blip", seconds=round(seconds), steps=steps, held_out=scores)
    preprocessor(f"{out}/blip", "blip")


def pretrain_resnet(out: str, seed: int, steps: int, pictures, labels, held) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            num_labels=len(SLOTS) * len(CLASSES),
        )
    )

    def logits_of(x):
        return model(pixel_values=x).logits.view(len(x), len(SLOTS), -1)

    def loss_at(step):
        picks = np.sort(np.random.default_rng((seed, step)).integers(0, len(pictures), 128))
        return attribute_loss(logits_of(views(pictures[picks], True)), labels[picks])

    scores = {}

    @torch.no_grad()
    def report(step):
        model.eval()
        scores.update(
            accuracy(
                torch.cat([logits_of(views(held[0][i : i + 100], False)) for i in range(0, len(held[0]), 100)]), held[1]
            )
        )
        model.train()
        return json.dumps(scores)

    seconds = train("resnet", model.parameters(), steps, 2e-3, loss_at, report)
    report(steps)
    save(model, f"{out}/resnet", seconds=round(seconds), steps=steps, held_out=scores)
    preprocessor(f"{out}/resnet", "resnet")
