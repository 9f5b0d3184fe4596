"""A yardstick for deltas: how right a rule is that reads the same image tokens with the catalogue's own labels.

    python demo/ceiling.py --world out/demo-photos/world --vision demo/models_photos/instructblip
    python demo/ceiling.py --world out/demo-photos/world --deltas out/demo-photos/heldout,out/demo-photos/pseudo

A linear probe for each attribute is trained on the Q-Former's outputs of the captioned photographs, with the entries of
the catalogue as labels. Of a held-out pair the rule names the attributes that the probes see change, the surest first,
at most MOST of them; it is judged as a delta is. A model that learns from captions and 300 deltas sees the same tokens
and is told less. (A linear probe is one reader of them, not the best that there can be.)

With DELTAS it says instead how the claims of generated deltas fail: true of the target but no change, or not true.
"""

import os
import sys
from collections import Counter
from typing import NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch
import torch.nn.functional as F
from torch import Tensor

from common.annotations import read_cirr
from common.batches import chunks
from common.console import progress, run, say
from common.files import read_json, read_jsonl
from common.flags import at_least, override
from common.images import ImageStore, load_pixels
from demo.products import VALUES, changed
from demo.wordings import RELATIVE, Claim, verdict, verdicts
from vdg_align import VisionProjector

WORLD = "out/demo-photos/world"  # folder of demo/catalogue.py
VISION = "demo/models_photos/instructblip"  # its ViT and Q-Former
PAIRS = 500  # of val, from the first
MOST = (1, 2, 3)  # claims a pair at most
SURE = (0.0, 0.5, 0.7)  # a change must be so probable: p(new value) of the target times 1 - p(it) of the reference
STEPS = 1500  # of a probe
SEED = 0  # of the probes
DELTAS = ()  # folders that gen_deltas.py wrote; empty: the yardstick


class Judged(NamedTuple):
    right: int
    wrong: int
    named: int  # changes named rightly
    changes: int  # known to the catalogue


@torch.no_grad()
def tokens_of(vision: VisionProjector, images: ImageStore, names: list[str]) -> Tensor:
    """-> (N, Q * width), float32."""
    parts = progress(chunks(names, 64), "seeing", (len(names) + 63) // 64)
    return torch.cat([vision.queries(load_pixels(images, part, vision.preprocess)).flatten(1) for part in parts])


def probe(x: Tensor, labels: list[int], values: int) -> torch.nn.Linear:
    """A linear classifier; AdamW with strong decay, as there are few pictures for many numbers."""
    torch.manual_seed(SEED)
    found, y = torch.nn.Linear(x.shape[1], values), torch.tensor(labels)
    optimizer = torch.optim.AdamW(found.parameters(), 1e-3, weight_decay=0.5)
    for _ in range(STEPS):
        rows = torch.randint(len(y), (256,))
        loss = F.cross_entropy(found(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found.requires_grad_(False)


def named_by_rule(seen: dict[str, Tensor], a: int, b: int, most: int, sure: float) -> list[tuple[str, str]]:
    """(attribute, new value) of the surest changes; seen: attribute -> (N, values) probabilities."""
    candidates = []
    for key, p in seen.items():
        new = int(p[b].argmax())
        how_sure = float(p[b, new] * (1 - p[a, new]))
        if new != int(p[a].argmax()) and how_sure > sure:
            candidates.append((how_sure, key, VALUES[key][new]))
    return [(key, value) for _, key, value in sorted(candidates, reverse=True)[:most]]


def judged(claims: list[tuple[str, str]], a: dict, b: dict) -> Judged:
    """As a text that says this is judged: what the catalogue does not know counts neither way."""
    found = [verdict(Claim(key, value), a, b) for key, value in claims]
    return Judged(found.count(True), found.count(False), found.count(True), len(changed(a, b)))


def is_of_target(claim: Claim, target: dict) -> bool:
    """Whether a claim that is no right change is true of the target, as far as the catalogue knows."""
    if claim.value in RELATIVE or claim.attribute not in target:
        return False
    shown = verdict(claim._replace(denied=False), {}, target) is None  # only what was before is not known
    return shown != claim.denied


def told(records: list[dict], known: dict[str, dict]) -> Counter:
    """(attribute or "all", how it is) of each claim that the catalogue can judge."""
    found = Counter()
    for record in records:
        a, b = known[record["reference"]], known[record["target"]]
        for claim, good in verdicts(record["delta"], a, b).items():
            if good is not None:
                how = "right" if good else "no change" if is_of_target(claim, b) else "not true"
                found.update([(claim.attribute, how), ("all", how)])
    return found


def say_how_claims_fail(known: dict[str, dict]) -> None:
    hows = ("right", "no change", "not true")
    for folder in DELTAS:
        found = told(read_jsonl(f"{folder}/pseudo.jsonl"), known)
        claims = sum(found["all", how] for how in hows)
        say(f"{folder}: {claims:,} claims; percent of them all\nof | right | true of the target, no change | not true")
        for key in (*VALUES, "?", "all"):
            if any(found[key, how] for how in hows):
                say(f"{key} | " + " | ".join(f"{100 * found[key, how] / claims:.1f}" for how in hows))


def main() -> None:
    at_least(globals(), PAIRS=1, STEPS=1)
    known = read_json(f"{WORLD}/attributes.json")
    if DELTAS:
        return say_how_claims_fail(known)
    vision = VisionProjector(VISION, 8)
    benchmark = read_cirr(f"{WORLD}/cirr", "val")
    queries = benchmark.queries[:PAIRS]

    # probes, on photographs of other products
    shown = [name for name in known if name.startswith("chat_")]
    x = tokens_of(vision, ImageStore(f"{WORLD}/chat/images"), shown)
    mean, deviation = x.mean(0), x.std(0) + 1e-5
    x, seen = (x - mean) / deviation, {}
    y = (tokens_of(vision, benchmark.images, list(benchmark.gallery)) - mean) / deviation
    for key, values in VALUES.items():
        # learnt where the catalogue knows the attribute, asked of every picture of val
        rows = [i for i, name in enumerate(shown) if known[name].get(key) in values]
        seen[key] = probe(x[rows], [values.index(known[shown[i]][key]) for i in rows], len(values))(y).softmax(1)
        listed = [(i, known[name][key]) for i, name in enumerate(benchmark.gallery) if key in known[name]]
        right = sum(values[int(seen[key][i].argmax())] == value for i, value in listed)
        say(f"{key:8} {100 * right / max(len(listed), 1):5.1f} % of {len(listed):,} photographs of val right")

    # the rule
    place = {name: i for i, name in enumerate(benchmark.gallery)}
    say("claims at most | as sure as | a pair | precision | recall")
    for most in MOST:
        for sure in SURE:
            # what the rule says of each pair, and how right that is
            judgements = []
            for query in queries:
                claims = named_by_rule(seen, place[query.reference], place[query.target], most, sure)
                judgements.append(judged(claims, known[query.reference], known[query.target]))
            right, wrong, named, changes = map(sum, zip(*judgements, strict=True))
            precision, recall = 100 * right / max(right + wrong, 1), 100 * named / max(changes, 1)
            say(f"{most} | {sure:.1f} | {(right + wrong) / len(queries):.2f} | {precision:.1f} % | {recall:.1f} %")


if __name__ == "__main__":
    override(globals())
    run(main)
