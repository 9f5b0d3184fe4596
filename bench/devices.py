"""The same short road on the CPU and on the GPU: losses of every training stage, mined pairs, greedy texts, recall.

    python bench/devices.py                  # writes below out/devices; prints a table; status 1 if anything differs
    python bench/devices.py --second cpu --divide 5     # the CPU against itself, a fifth of the world: does it run?
    python bench/devices.py --part cpu       # the CPU's alone; then, where a GPU's minutes are few, with out/devices
    python bench/devices.py --part second --rounds 23       # carried there, the GPU's alone, of some rounds

fp32 on both, the same seed, no dropout, no augmentation. What may differ is rounding: losses by --tolerance of
themselves, one pair or text in fifty. The rows in bf16 are for the eye: they differ by more, and so does int8, whose
products bitsandbytes rounds to fp16 on a GPU.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import measure  # first: it puts the repository on the path

from common.files import read_jsonl
from demo import world

ROOT = measure.ROOT / "out/devices"
MODELS = measure.ROOT / "demo/models"
LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SIZES = {"train": 120, "dev": 1, "val": 12, "test": 1, "queries": 4, "chat": 96, "aux": 50, "fashioniq": 1}


def commands(device: str, out: Path) -> list[dict[str, str]]:
    """Rounds of stages that run side by side, name -> command. What a later round reads is the CPU's."""
    w, cpu, cirr = ROOT / "world", ROOT / "cpu", f"--dataset cirr --root {ROOT}/world/cirr"
    vdg = f"gen_deltas.py --vdg {cpu}/tune --triplets cirr/val --root {w}/cirr --temperature 0"
    cir = f"train_cir.py {cirr} --split train --batch 24 --tau 0.05 --steps 4 --log_every 1 --augment false"
    evaluate = f"eval_cir.py {cirr} --split val --official false --dtype fp32 --checkpoint {cpu}"
    align = f"vdg_align.py --vision {MODELS}/instructblip --llm {MODELS}/llama --chat {w}/chat/chat.json"
    tune = f"vdg_tune.py --aligned {cpu}/align {cirr} --split train --held_out 0 --batch 16 --lora_dropout 0 --warmup 1"
    rounds = [
        {
            "align": f"{align} --images {w}/chat/images --keep true --batch 24 --lr 1e-4 --dtype fp32",
            "mine": f"mine_pairs.py --images {w}/aux --encoder {MODELS}/resnet --max_shared 3",
            "combiner": f"{cir} --model combiner --backbone {MODELS}/clip --lr 5e-4 --dtype fp32",
            "blip_tdm": f"{cir} --model blip_tdm --backbone {MODELS}/blip --lr 1e-3 --dtype fp32",
        },
        {
            "tune": f"{tune} --epochs 1 --lr 1e-4 --lora_rank 16 --lora_targets {LINEARS} --dtype fp32",
            "eval-combiner": f"{evaluate}/combiner",
            "eval-blip_tdm": f"{evaluate}/blip_tdm",
        },
        {"texts": f"{vdg} --dtype fp32", "texts-sampled": f"{vdg.replace('--temperature 0', '')} --dtype fp32"},
    ]
    if importlib.util.find_spec("bitsandbytes"):
        rounds[1] |= {f"tune-{kind}": f"{rounds[1]['tune']} --quantize {kind}" for kind in ("nf4", "int8")}
    if device == "cuda":
        rounds[0]["combiner-bf16"] = rounds[0]["combiner"].replace("fp32", "bf16")
        rounds[0]["blip_tdm-bf16"] = rounds[0]["blip_tdm"].replace("fp32", "bf16")
        rounds[0]["align-bf16"] = rounds[0]["align"].replace("fp32", "bf16")
        rounds[1]["tune-bf16"] = rounds[1]["tune"].replace("fp32", "bf16")
        rounds[1]["eval-bf16"] = rounds[1]["eval-blip_tdm"].replace("fp32", "bf16")
        rounds[2]["texts-no-graph"] = f"{vdg} --dtype fp32 --graph false"
        rounds[2]["texts-bf16"] = f"{vdg} --dtype bf16"
        rounds[2]["texts-bf16-no-graph"] = f"{vdg} --dtype bf16 --graph false"
    end = f" --device {device} --workers 2 --seed 0 --out {out}"  # many run side by side
    return [{name: f"{words}{end}/{name}" for name, words in some.items()} for some in rounds]


def result(folder: Path, name: str):
    """What a run is compared by: losses, pairs, texts or metrics."""
    kind = name.split("-")[0]
    if kind == "mine":
        return [(r["reference"], r["target"]) for r in read_jsonl(folder / name / "pairs.jsonl")]
    if kind == "texts":
        return [r["delta"] for r in read_jsonl(folder / name / "pseudo.jsonl")]
    if kind == "eval":
        metrics = json.loads((folder / name / "metrics.json").read_text())
        return json.dumps(metrics["metrics"] if "metrics" in metrics else metrics, sort_keys=True)
    return [r["loss"] for r in read_jsonl(folder / name / "log.jsonl") if "loss" in r]


def compare(name: str, wanted, found, tolerance: float) -> tuple[bool, str]:
    kind = name.split("-")[0]
    if kind == "eval":
        return wanted == found, "same metrics" if wanted == found else f"{wanted[:150]} against {found[:150]}"
    if kind in ("mine", "texts"):
        if kind == "mine":
            same = len(set(wanted) & set(found)) / max(1, len(set(wanted) | set(found)))
        else:
            same = sum(a == b for a, b in zip(wanted, found, strict=True)) / len(wanted)
        return same >= 0.98, f"{same:.1%} of {len(wanted)} equal"
    off = [abs(a - b) / abs(a) for a, b in zip(wanted, found, strict=True)]
    losses = " ".join(f"{x:.4f}" for x in found[:4])
    return max(off) <= tolerance, f"losses off by {max(off):.1e} of themselves at most ({losses})"


def main() -> None:
    flags = measure.arguments(__doc__, second="cuda", tolerance=2e-3, divide=1, part="both", rounds="123")
    if flags.part != "second" and "1" in flags.rounds:
        shutil.rmtree(ROOT, ignore_errors=True)
        sizes = {name: max(size // flags.divide, min(size, 24)) for name, size in SIZES.items()}
        world.write_world(str(ROOT / "world"), 0, **sizes)
    plans = {"cpu": commands("cpu", ROOT / "cpu"), "second": commands(flags.second, ROOT / "second")}
    bad = []
    for number, (here, there) in enumerate(zip(plans["cpu"], plans["second"], strict=True), 1):
        if str(number) not in flags.rounds:
            continue
        began, running = time.time(), {}
        for folder, some in (("cpu", here), ("second", there)):
            if flags.part not in ("both", folder):
                continue
            (ROOT / folder).mkdir(exist_ok=True)
            for name, words in some.items():
                shutil.rmtree(ROOT / folder / name, ignore_errors=True)  # or it would be finished already
                log = open(ROOT / folder / f"{name}.log", "w")  # noqa: SIM115
                argv = [sys.executable, *words.split()]
                running[folder, name] = subprocess.Popen(argv, cwd=measure.ROOT, stdout=log, stderr=log)
        for (folder, name), process in running.items():
            if process.wait():
                last = (ROOT / folder / f"{name}.log").read_text().strip().splitlines()[-3:]
                print(f"{folder} {name}: status {process.returncode}: {' | '.join(last)[:300]}", flush=True)
                bad.append(name)
        for name in there if flags.part != "cpu" else ():
            truth = name.split("-bf16")[0].replace("-no-graph", "")
            truth = "eval-blip_tdm" if name == "eval-bf16" else truth
            try:
                wanted, found = result(ROOT / "cpu", truth), result(ROOT / "second", name)
                ok, text = compare(name, wanted, found, flags.tolerance)
            except (OSError, ValueError, KeyError) as error:
                ok, text = False, f"{type(error).__name__}: {error}"
            rounded = "bf16" in name or "int8" in name
            print(f"{name:20} {'ok' if ok else 'differs' if rounded else 'DIFFERS'}: {text}", flush=True)
            if not ok and not rounded:
                bad.append(name)
        print(f"({time.time() - began:.0f} s)", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
