"""Trains the stand-in models of product photographs from scratch and saves them as ordinary Hugging Face folders.

    python demo/pretrain_photos.py --data FOLDER                   # everything, about an hour on one CPU core
    python demo/pretrain_photos.py --data FOLDER --only clip       # some of resnet, vision, clip, blip

FOLDER holds "Fashion Product Images (Small)" (demo/products.py reads both of its forms). Stopped, the same command goes
on. What each stand-in is shown (the pretraining photographs alone, which no stage reads; never a pair or a triplet):
- resnet        photographs and their attributes (article, colour, usage, gender, pattern, neck, sleeves, brand);
- instructblip  the same, and what the resnet says of each view: the ViT by its cls token, Q-Former query k by slot k;
- clip, blip    photographs and shop titles (contrast; BLIP also matching); their vision towers start from the ViT.
Tokenizers know the words of the human-like deltas, as those of the real models do.
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.console import UserError, run, say
from common.files import read_json
from common.flags import override
from demo import photo_models, wordings

# ---- what ----
DATA = ""  # folder of the catalogue: styles.csv + images/, or products.jsonl + photos.zip
OUT = "demo/models_photos"  # where the folders go
STATES = "out/pretrain_photos"  # where a stopped part goes on from
ONLY = "all"  # all, or some of resnet, vision (= instructblip), clip, blip, with commas between
SEED = 7777  # of weights, order and views
THREADS = 1  # CPU threads

# ---- steps (batch 128; blip 96) ----
RESNET_STEPS = 1600  # the image encoder of mine_pairs.py, first: it teaches the ViT
VISION_STEPS = 1500  # ViT and Q-Former together
CLIP_STEPS = 500  # vision tower, text tower
BLIP_STEPS = 600  # text encoder; the vision tower is the one already trained


def main() -> None:
    torch.set_num_threads(THREADS)
    steps = {"resnet": RESNET_STEPS, "vision": VISION_STEPS, "clip": CLIP_STEPS, "blip": BLIP_STEPS}
    wanted = tuple(steps) if ONLY == "all" else tuple(ONLY.split(","))
    if unknown := sorted(set(wanted) - set(steps)):
        raise UserError(f"--only {unknown[0]}: wanted all, or some of {', '.join(steps)}")
    if not DATA:
        raise UserError("--data: name the folder of the catalogue")
    os.makedirs(STATES, exist_ok=True)
    slots, shown, held = photo_models.read_shelves(DATA)
    say(f"{len(shown.pictures):,} photographs to train on, {len(held.pictures):,} held out")
    train = {
        "resnet": photo_models.pretrain_resnet,
        "vision": photo_models.pretrain_vision,
        "clip": photo_models.pretrain_clip,
        "blip": photo_models.pretrain_blip,
    }
    for name, function in train.items():
        if name not in wanted or is_done(name, steps[name]):
            continue
        more = (wordings.corpus(SEED),) if name in ("clip", "blip") else ()
        function(OUT, STATES, SEED, steps[name], slots, shown, held, *more)


def is_done(name: str, steps: int) -> bool:
    """Whether its folder is there, of as many steps."""
    facts = f"{OUT}/{'instructblip' if name == 'vision' else name}/pretraining.json"
    if not os.path.exists(facts) or read_json(facts).get("steps") != steps:
        return False
    say(f"{name}: done before, {facts}")
    return True


if __name__ == "__main__":
    override(globals())
    run(main)
