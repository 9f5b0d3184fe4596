"""Bi-directional training, VDG's reversed texts, a bank, re-ranking: what each is worth on the embedded world.

    python demo/claims.py --demos out/demo,out/demo-seed-1,out/demo-seed-2      # after ./demo.sh for each of them

Runs the stages with their public flags on the human triplets of each finished demo folder (its world, its tuned VDG,
its BLIP_tdm checkpoint with auxiliary triplets) and writes OUT/claims.json and OUT/claims.md: mean over the folders,
and the range. Recall is the mean of R@1, R@5 and R@10 in percent on val; the training step is chosen on dev, by
forward queries. A run whose world, VDG and models have not changed is not repeated. Three kinds of queries:

    forward            reference + human text -> target
    backward           target + [BACKWARD] + the same human text -> reference (a model without directions: text alone)
    VDG's text         target + the text that VDG writes for the swapped images -> reference
"""

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from common.console import UserError, run, say
from common.files import file_sha256, read_json, write_json, write_text
from common.flags import override

DEMOS = ("out/demo",)  # folders that demo.sh has finished, one a seed
OUT = "out/claims"  # folder written
MODELS = "demo/models"  # stand-in backbones
JOBS = 2  # runs at a time, one thread each
ALPHA = 0.5  # weight of the reversed loss; [Bi] takes 0.4 and 0.5 on FashionIQ
SIZES = "--steps 80 --batch 48 --lr 5e-4 --tau 0.05 --views 2 --val_split dev --val_every 10"  # of every training run

_BACK = "--bidirectional {alpha} "
_VDG = "--reversed_text delta --same_deltas false --same_pairs {folder}/train/pseudo.jsonl "  # human forward, VDG back
_STAGE2 = "--train_text false --start {folder}/cir/"  # the Combiner behind stage I's text encoder, as in [Bi]
RUNS = {  # row of the table, model, flags; on the human triplets alone
    "sum": ("sum, forward only", "sum", ""),
    "combiner": ("combiner, forward only", "combiner", _STAGE2 + "sum"),
    "combiner-bank": ("combiner, forward only, bank of negatives", "combiner", "--bank " + _STAGE2 + "sum"),
    "sum-token": ("sum, bi-directional, [BACKWARD] + human text", "sum", _BACK),
    "combiner-token": ("combiner, bi-directional, [BACKWARD] + human text", "combiner", _BACK + _STAGE2 + "sum-token"),
    "sum-vdg": ("sum, bi-directional, VDG's reversed text", "sum", _BACK + _VDG),
    "combiner-vdg": ("combiner, bi-directional, VDG's reversed text", "combiner", _BACK + _VDG + _STAGE2 + "sum-vdg"),
}
_CHAINS = [("sum", "combiner", "combiner-bank"), ("sum-token", "combiner-token"), ("sum-vdg", "combiner-vdg")]
QUERIES = {"forward": "", "backward": "--reversed", "vdg": "--reversed --reverse_text {folder}/val/pseudo.jsonl"}
RERANKED = {"plain": "", "reranked": "--rerank 50"}


def stands_on(demo: str, blip: str) -> str:
    """Hash of what a demo's runs follow from (world, VDG, backbone, the runs themselves): the name of their folder."""
    files = [f"{demo}/world/attributes.json", f"{demo}/vdg/manifest.json", f"{blip}/manifest.json"]
    parts = [file_sha256(file) for file in (*files, f"{MODELS}/clip/model.safetensors")]
    return hashlib.sha256(json.dumps([parts, RUNS, QUERIES, RERANKED, ALPHA, SIZES]).encode()).hexdigest()[:8]


def stage(words: list[str], log: str) -> None:
    """One command line with one thread; its output goes to a file, whose end is shown if it fails."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        with open(log) as file:
            raise UserError(f"{' '.join(words)} failed: {file.read()[-600:]}")


def reversed_texts(demo: str, folder: str, seed: str) -> None:
    """VDG's texts for the swapped images of the train and val pairs."""
    root = f"{demo}/world/cirr"
    for split in ("train", "val"):
        if not os.path.exists(f"{folder}/{split}/pseudo.jsonl"):
            words = f"gen_deltas.py --vdg {demo}/vdg --triplets cirr/{split} --root {root} --reverse --seed {seed}"
            stage(f"{words} --out {folder}/{split}".split(), f"{folder}/logs/gen-{split}.log")


def one_run(name: str, demo: str, folder: str, seed: str) -> dict[str, float]:
    """Trains a run, at demo.sh's sizes, and asks it the three kinds of queries -> kind -> mean recall."""
    _, model, flags = RUNS[name]
    checkpoint, log = f"{folder}/cir/{name}", f"{folder}/logs/{name}.log"
    if not os.path.exists(f"{checkpoint}/model.safetensors"):
        words = f"train_cir.py --model {model} --backbone {MODELS}/clip --dataset cirr --root {demo}/world/cirr"
        words += f" {SIZES} --seed {seed} --out {checkpoint} " + flags.format(alpha=ALPHA, folder=folder)
        stage(words.split(), log)
    asked = {kind: how.format(folder=folder) for kind, how in QUERIES.items()}
    return {kind: evaluation(checkpoint, demo, f"{folder}/eval/{name}-{kind}", how) for kind, how in asked.items()}


def one_chain(names: tuple[str, ...], demo: str, folder: str, seed: str) -> dict[str, dict[str, float]]:
    """Runs of which the later start from the first."""
    return {name: one_run(name, demo, folder, seed) for name in names}


def evaluation(checkpoint: str, demo: str, out: str, flags: str) -> float:
    """Mean of R@1, R@5 and R@10 on val."""
    if not os.path.exists(f"{out}/metrics.json"):
        words = f"eval_cir.py --checkpoint {checkpoint} --dataset cirr --root {demo}/world/cirr --split val"
        stage(f"{words} --official false --show 0 --out {out} {flags}".split(), f"{out}.log")
    metrics = read_json(f"{out}/metrics.json")["metrics"]
    return (metrics["R@1"] + metrics["R@5"] + metrics["R@10"]) / 3


def cell(values: list[float]) -> str:
    """Mean and range."""
    middle = sum(values) / len(values)
    return f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else f"{middle:.1f}"


def main() -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for demo in DEMOS:
        demo, seed = demo.rstrip("/"), (demo.rstrip("/").rsplit("-seed-", 1) + ["0"])[1]
        blip = f"{demo}/cir/blip_tdm-auxiliary"
        for made in (f"{demo}/vdg", blip):
            if not os.path.exists(f"{made}/manifest.json"):
                raise UserError(f"{demo} is not a finished demo; run ./demo.sh, or ./demo.sh --seed N, first")
        folder = f"{OUT}/{os.path.basename(demo)}-{stands_on(demo, blip)}"
        reversed_texts(demo, folder, seed)
        with ThreadPoolExecutor(JOBS) as pool:
            chains = [pool.submit(one_chain, names, demo, folder, seed) for names in _CHAINS]
            ranked = {
                name: pool.submit(evaluation, blip, demo, f"{folder}/eval/{name}", how)
                for name, how in RERANKED.items()
            }
            done = {name: kinds for job in chains for name, kinds in job.result().items()}
            for name in RUNS:
                for kind, value in done[name].items():
                    found.setdefault(name, {}).setdefault(kind, []).append(value)
            for name, job in ranked.items():
                found.setdefault(name, {}).setdefault("forward", []).append(job.result())
        say(f"{demo}: done")
    rows = {name: row for name, (row, _, _) in RUNS.items()}
    rows |= {"plain": "blip_tdm with auxiliary triplets", "reranked": "the same, first 50 re-ranked by the tdm head"}
    lines = ["| | forward queries | backward, [BACKWARD] + text | backward, VDG's text |", "|---|---|---|---|"]
    for name, row in rows.items():
        if name in found:
            cells = (cell(found[name][kind]) if kind in found[name] else "" for kind in QUERIES)
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    record = {"demos": list(DEMOS), "alpha": ALPHA, "mean of R@1, R@5, R@10": found}
    write_json(f"{OUT}/claims.json", record, indent=1)
    write_text(f"{OUT}/claims.md", "\n".join(lines) + "\n")
    say("\n".join(lines), f"\nwrote {OUT}/claims.md and claims.json")


if __name__ == "__main__":
    override(globals())
    run(main)
