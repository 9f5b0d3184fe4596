"""Trains the stand-in models of the embedded world from scratch and saves them as ordinary Hugging Face folders.

    python demo/pretrain.py --out demo/models            # everything, about two hours on 2 CPU cores
    python demo/pretrain.py --only llama                 # one of llama, vision, clip, blip, resnet

What each stand-in is shown (never an image pair, a triplet, a human-like delta as training text, or a picture of the
world that a stage reads; the pictures here are drawn from seeds of their own):
- llama         text only (demo/texts.py): captions of described garments ("tags"), comparisons of two *described*
                garments, worded otherwise than the human-like deltas are, and requests about things of other kinds;
- instructblip  pictures and their attributes: the ViT by its cls token, Q-Former query k by attribute k;
- clip, blip    pictures and captions (contrast; BLIP also matching); their vision towers start from the ViT above;
- resnet        pictures and attributes.
Tokenizers know the words of the deltas, as those of the real models do.
"""

import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common.console import UserError, run
from common.flags import override
from demo import standins

# ---- what ----
OUT = "demo/models"  # where the folders go
ONLY = "all"  # all, or one of llama, vision (= instructblip), clip, blip, resnet
SEED = 7777  # of pictures, texts and weights
PICTURES = 24000  # pictures drawn for the vision models
BANK = "out/pretrain"  # the drawn pictures are kept here between parts
THREADS = 2  # CPU threads

# ---- steps (batch 128) ----
LLAMA_STEPS = 2600  # steps of 96 documents
COMPARING = 0.27  # share of these steps that mostly compare slot by slot: the skill the rest stands on shows up first
NOISY = 0.15  # share of the steps after them over which the described words turn into something like image tokens
VISION_STEPS = 2000  # ViT and Q-Former together
CLIP_STEPS = 1000  # vision tower, text tower
BLIP_STEPS = 800  # text encoder; the vision tower is the one already trained
RESNET_STEPS = 1000  # the image encoder of mine_pairs.py


def main() -> None:
    torch.set_num_threads(THREADS)
    models = ("llama", "vision", "clip", "blip", "resnet")
    wanted = models if ONLY == "all" else tuple(ONLY.split(","))
    if unknown := sorted(set(wanted) - set(models)):
        raise UserError(f"--only {unknown[0]}: wanted all, or some of {', '.join(models)}")
    if "llama" in wanted:
        standins.pretrain_llama(OUT, SEED, LLAMA_STEPS, COMPARING, NOISY)
    if set(wanted) <= {"llama"}:
        return
    pictures, garments = standins.bank(BANK, PICTURES, SEED)
    shown, drawn = standins.bank(BANK, 1000, SEED + 1)
    labels = torch.tensor([standins.label(garment) for garment in garments])
    held = shown, torch.tensor([standins.label(garment) for garment in drawn]), drawn
    if "vision" in wanted:
        standins.pretrain_vision(OUT, SEED, VISION_STEPS, pictures, labels, held)
    if "resnet" in wanted:
        standins.pretrain_resnet(OUT, SEED, RESNET_STEPS, pictures, labels, held)
    if "clip" in wanted:
        standins.pretrain_clip(OUT, SEED, CLIP_STEPS, pictures, garments, labels, held)
    if "blip" in wanted:
        standins.pretrain_blip(OUT, SEED, BLIP_STEPS, pictures, garments, held)


if __name__ == "__main__":
    override(globals())
    run(main)
