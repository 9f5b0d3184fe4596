"""One training step of BLIP_tdm at the size of blip-itm-large-coco, random weights: does it fit and run?

    python bench/real_step.py                    # 446 M parameters, 384 px, B = B' = 2; writes 1.8 GB, removes it
    python bench/real_step.py --device cuda --batch 64 --steps 10       # and triplets per second
    ... --views 2               # augmented views of each picture encoded once and kept: what pictures cost a step
    python bench/real_step.py --small 6 --steps 3                       # layers and side divided by 6: does it run?

Prints the seconds of the whole command, its largest resident memory, the losses, and how many images went through the
vision encoder: two references and two targets of B, as many of B', once each. Any other count is an error.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import generation  # beside this file
import measure  # first of ours: it puts the repository on the path

from common.files import read_jsonl, write_json, write_jsonl
from demo import world

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = "is has red blue green longer shorter sleeves dots stripes and more less with no darker dog sits".split()


def write_blip(folder: Path, small: int, device: str = "cpu") -> int:
    """The configuration of Salesforce/blip-itm-large-coco with random weights, drawn on the device -> number of
    parameters."""
    import torch
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig

    torch.manual_seed(0)
    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072,
        num_hidden_layers=12 // small, num_attention_heads=12, max_position_embeddings=512, bos_token_id=30522,
        eos_token_id=2, sep_token_id=102, pad_token_id=0,
    )  # fmt: skip
    vision = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24 // small, num_attention_heads=16,
        image_size=384 // small, patch_size=16,
    )  # fmt: skip
    config = BlipConfig(image_text_hidden_size=256, text_config=text.to_dict(), vision_config=vision.to_dict())
    with torch.device(device):
        model = BlipForImageTextRetrieval(config)
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS), *".,!?'-"]
    words += WORDS
    words += [f"[unused{i}]" for i in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", tokenizer)
    pictures = {
        "image_processor_type": "BlipImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "size": {"height": 384 // small, "width": 384 // small},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", pictures)
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    found = measure.arguments(__doc__, batch=2, steps=1, small=1, views=0)
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        sizes = {"train": 4, "dev": 1, "val": 1, "test": 1, "queries": 1, "chat": 1, "aux": 1, "fashioniq": 1}
        sizes |= {"train": max(4, 2 * found.batch), "aux": found.batch}  # aux is a number of families
        world.write_world(str(here / "world"), 0, **sizes)
        aux = sorted(path.name for path in (here / "world" / "aux").iterdir())
        pairs = [{"reference": a, "target": b, "delta": "is red"} for a, b in zip(aux, aux[1:], strict=False)]
        write_jsonl(here / "pseudo.jsonl", pairs)
        parameters = write_blip(here / "blip", found.small, found.device)
        began = time.time()
        words = f"train_cir.py --model blip_tdm --backbone {here}/blip --root {here}/world/cirr --out {here}/run"
        words += f" --pseudo {here}/pseudo.jsonl --pseudo_images {here}/world/aux"
        words += (
            f" --batch {found.batch} --steps {found.steps} --log_every 1 --device {found.device} --views {found.views}"
        )
        subprocess.run([sys.executable, *words.split()], cwd=measure.ROOT, check=True)
        seconds = time.time() - began
        lines = list(read_jsonl(here / "run" / "log.jsonl"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    losses = f"L_tcc {lines[0]['tcc']:.3f}, L_tdm {lines[0]['tdm']:.3f}"
    print(f"{parameters / 1e6:.0f} M parameters, {seconds:.0f} s, {peak:.1f} GiB of host memory at most; {losses}")
    done = [(i + 1) / line["items_per_s"] for i, line in enumerate(lines)]  # it counts from the first step
    pace = sorted(1 / (b - a) for a, b in zip(done, done[1:], strict=False))
    if pace:
        floor = generation.peak_flops(found.device, torch_dtype(found.device)) / 1e12  # TFLOP of a triplet
        size = f"{parameters / 1e6:.0f} M parameters, {384 // found.small} px, B = B' = {found.batch}"
        pictures = f"{found.views} views of each picture kept" if found.views else "decoding and augmentation"
        note = f"{found.steps} steps, {pictures}; floor: 1.0 TFLOP a triplet"
        row = measure.row("CIR step: BLIP_tdm", size, found.device, pace[len(pace) // 2], "triplets/s", floor, note)
        measure.publish([row])
    if found.batch == 2 and not found.views:
        assert lines[0]["images"] == 8, f"{lines[0]['images']} images through the vision encoder; 8 are there"
        print("8 images through the vision encoder: 4 references and 4 targets, once each")


def torch_dtype(device: str):
    import torch

    return torch.bfloat16 if device == "cuda" else torch.float32


if __name__ == "__main__":
    main()
