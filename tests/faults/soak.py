"""Kills runs of every stage at random moments, starts each again, and compares the last bytes with an undisturbed run.

    python tests/faults/soak.py                                 # the kills of KILLS, dealt to 1, 2 and 3 ranks
    python tests/faults/soak.py --kills 20 --ranks 1,2          # so many of each kind on each number of ranks
    python tests/faults/soak.py --kinds generation --seed 7

Each round is a new output folder: the stage is started on its ranks, and after a random part of the time that an
undisturbed run takes all of them (or, of several, now and then one alone) get SIGKILL, up to four times; then the same
command ends. Training goes on with the same ranks; generation and mining with other ranks each time, generation with
other batches too; an index of search.py has one process. Prints a table; exit status 1 if a pair was lost or written
twice, a byte differs, or a saved checkpoint does not verify. Models and data are tiny and drawn here; the processes
are forks of this one, so that a start costs no import.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gen_deltas  # noqa: I001  (sets MKL's summation order before torch computes)
import mine_pairs
import search
import torch
import torch.distributed as dist
import train_cir
import vdg_align
import vdg_tune
import zoo
from common import console, files
from common.flags import constants_of, override

STAGES = {module.__name__: module for module in (vdg_align, vdg_tune, mine_pairs, gen_deltas, train_cir, search)}
DEFAULTS = {name: constants_of(vars(module)) for name, module in STAGES.items()}
PATIENCE = 60  # seconds that the other ranks have to end after one was killed
AT_ONCE = 4  # kills of one round at most
KILLS = {"align": 21, "tune": 21, "combiner": 21, "blip_tdm": 21, "generation": 102, "mining": 30, "search": 24}


class Kind(NamedTuple):
    """A run that is killed."""

    stage: str
    flags: dict
    results: tuple[str, ...]  # files whose bytes are compared; a * stands for what the run names by itself
    moves: bool = False  # whether a restart may take other ranks
    records: str = ""  # the jsonl whose ids are counted, and those of the parts it was made of
    most: int = 3  # ranks that it can have


class Found(NamedTuple):
    """What became of the kills of one kind on so many ranks."""

    kills: int
    lost: int
    doubled: int
    different: int
    checkpoints: int
    bad: int  # of the checkpoints, those that do not verify


# ---- what is run ----


def build(root: Path) -> dict[str, Kind]:
    """Tiny models and data below root -> the runs."""
    from test_gen_deltas import tiny_vdg
    from test_vdg_align import chat

    zoo.build(root / "zoo")
    models = root / "zoo"
    chat(root / "chat", 24)
    names = zoo.draw(root / "images", 24, seed=1)
    lines = []
    for i in range(48):
        line = {"id": i, "reference": names[i % 24], "target": names[(5 * i + 1 + i // 24) % 24]}
        lines.append(line | {"delta": "make it red" + " and long" * (i % 3)})
    pairs = [{key: line[key] for key in ("id", "reference", "target")} for line in lines]
    for name, records in (("triplets", lines), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "vdg").mkdir()
    tiny_vdg(models, root / "vdg")

    here = {"device": "cpu", "workers": 1}
    train = here | {"save_every": 1}
    both = {"vision": models / "instructblip", "llm": models / "llama"}
    own = {"dataset": "jsonl", "root": root / "triplets.jsonl", "images": root / "images"}
    align = Kind(
        "vdg_align",
        train | both | {"chat": root / "chat/chat.json", "images": root / "chat/images", "epochs": 3, "batch": 2},
        ("projection.safetensors", "config.json"),
    )
    run(align, root / "aligned", 1)
    tune = {"aligned": root / "aligned", "epochs": 2, "batch": 2, "lora_rank": 4, "warmup": 2, "held_out": 0.1}
    cir = {"batch": 4, "steps": 12, "lr": 1e-3, "tau": 0.1, "learn_tau": True, "bidirectional": 0.1}
    combiner = {"model": "combiner", "backbone": models / "clip", "combiner_dropout": 0.5}
    blip = {"model": "blip_tdm", "backbone": models / "blip"}
    deltas = {"vdg": root / "vdg/vdg", "pairs": root / "pairs.jsonl", "images": root / "images", "show": 2}
    deltas |= {"temperature": 1.0, "max_new": 10, "batch": 2, "encode_batch": 4}
    mining = {"images": root / "images", "encoder": models / "resnet", "batch": 2, "show": 2}
    mining |= {"max_score": 0.9999, "min_gap": 0.0001, "group": 4}
    zoo.draw(root / "pictures", 60, seed=2)
    queries = [{"reference": f"2-{i:03d}.png", "delta": "make it red"} for i in range(0, 60, 7)]
    (root / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    looking = {"gallery": root / "pictures", "backbone": models / "clip", "queries": root / "queries.jsonl"}
    indexed = ("index-*/features.npy", "index-*/index.jsonl", "results.jsonl")
    mined = ("embeddings.npy", "names.json", "subgroups.jsonl", "pairs.jsonl", "stats.json")
    return {
        "align": align,
        "tune": Kind("vdg_tune", train | own | tune, ("projection.safetensors", "adapter_model.safetensors")),
        "combiner": Kind("train_cir", train | own | cir | combiner, ("model.safetensors",)),
        "blip_tdm": Kind("train_cir", train | own | cir | blip, ("model.safetensors",)),
        "generation": Kind("gen_deltas", here | deltas, ("pseudo.jsonl",), True, "pseudo.jsonl"),
        "mining": Kind("mine_pairs", here | mining, mined, True),
        "search": Kind("search", here | looking | {"batch": 3}, indexed, records="index-*/index.jsonl", most=1),
    }


def words_of(kind: Kind, out: Path, more: dict) -> list[str]:
    places = {"index": out, "out": out / "results.jsonl"} if kind.stage == "search" else {"out": out}
    return [word for name, value in (kind.flags | places | more).items() for word in (f"--{name}", str(value))]


# ---- a run on its ranks ----


def child(rank: int, size: int, folder: str, kind: Kind, argv: list[str]) -> None:
    """One rank: the stage as its file would run it, with what it says in folder/said-RANK."""
    with open(f"{folder}/said-{rank}", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    code = 1
    try:
        if size > 1:
            store, wait = f"file://{folder}/store", timedelta(seconds=PATIENCE)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=wait)
            Path(folder, f"met-{rank}").touch()
        module = STAGES[kind.stage]
        vars(module).update(DEFAULTS[kind.stage])
        override(vars(module), argv)
        console.run(module.main)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException as fault:
        print(repr(fault))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(kind: Kind, out: Path, size: int, folder: str, **more) -> list:
    context = multiprocessing.get_context("fork")
    argv = words_of(kind, out, more)
    ranks = [context.Process(target=child, args=(rank, size, folder, kind, argv)) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def run(kind: Kind, out: Path, size: int, **more) -> float:
    """The run to its end -> its seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ranks = start(kind, out, size, folder, **more)
        for process in ranks:
            process.join(300)
        if any(process.exitcode != 0 for process in ranks):
            said = "".join(path.read_text(errors="replace") for path in sorted(Path(folder).glob("said-*")))
            for process in ranks:
                process.kill()
            raise RuntimeError(f"{kind.stage} ended with {[process.exitcode for process in ranks]}: {said[-2000:]}")
    return time.monotonic() - began


def kill(kind: Kind, out: Path, size: int, after: float, alone: bool, **more) -> bool:
    """Starts the run and kills its ranks, or one of them alone; False if it ended before. All must be gone in time."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = start(kind, out, size, folder, **more)
        time.sleep(after)
        # a rank lost before all have met is missed when the meeting's own time limit ends, under torchrun by its agent
        while alone and len(list(Path(folder).glob("met-*"))) < size and any(p.exitcode is None for p in ranks):
            time.sleep(0.01)
        running = [process for process in ranks if process.exitcode is None]
        for process in running[:1] if alone else running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        until = time.monotonic() + PATIENCE
        for process in ranks:
            process.join(max(0.1, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                raise RuntimeError(f"{kind.stage}: a rank waited {PATIENCE} s for one that was killed")
        return bool(running) and any(process.exitcode == -signal.SIGKILL for process in ranks)


# ---- what is left of it ----


def bad_checkpoints(out: Path) -> tuple[int, int]:
    """-> training states that a killed run left, and how many of them do not verify."""
    states = [path for path in (out / "last").glob("step-*") if path.suffix != ".tmp"]
    bad = 0
    for path in states:
        try:
            files._load_step(path)
        except (console.UserError, OSError):
            bad += 1
    return len(states), bad


def file_of(out: Path, name: str) -> Path:
    (path,) = out.glob(name)
    return path


def ids_of(path: Path) -> list:
    """Of pairs the ids; of an index the content of every picture and the name of every file."""
    ids = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        names = [name for name, *_ in record.get("files", ())]
        ids += [record["id"]] if "id" in record else record["pictures"] + names
    return ids


def soak(kind: Kind, root: Path, kills: int, size: int, draw: random.Random) -> Found:
    """So many kills of one kind, beginning on `size` ranks."""
    truth = root / "truth"
    seconds = run(kind, truth, size)
    done = lost = doubled = different = checkpoints = bad = rounds = 0
    while done < kills:
        rounds += 1
        out, ranks, more = root / f"round-{rounds}", size, {}
        for _ in range(min(AT_ONCE, kills - done)):
            killed = kill(kind, out, ranks, draw.uniform(0.02, seconds), size > 1 and draw.random() < 0.2, **more)
            done += killed
            states, harmed = bad_checkpoints(out)
            checkpoints, bad = checkpoints + states, bad + harmed
            if kind.moves:
                ranks = draw.choice((1, 2, 3))
                more = {"batch": draw.choice((1, 2, 3, 7))} if kind.stage == "gen_deltas" else {}
            if not killed:
                break
        run(kind, out, ranks, **more)
        different += sum(file_of(out, n).read_bytes() != file_of(truth, n).read_bytes() for n in kind.results)
        if kind.records:
            wanted, found = (ids_of(file_of(folder, kind.records)) for folder in (truth, out))
            parts = [id for path in (out / "parts").glob("*.jsonl") for id in ids_of(path)]
            lost += len(set(wanted) - set(found))
            doubled += len(parts) - len(set(parts)) + len(found) - len(set(found))
        shutil.rmtree(out)
    return Found(done, lost, doubled, different, checkpoints, bad)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="of each kind on each number of ranks; 0: those of KILLS")
    parser.add_argument("--ranks", default="1,2,3", help="numbers of ranks")
    parser.add_argument("--kinds", default="", help=f"{','.join(KILLS)}; empty: all")
    parser.add_argument("--seed", type=int, default=0, help="fixes when the kills come")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = build(Path(folder) / "data")
        print(f"{'run':12}{'ranks':>6}{'kills':>7}{'lost':>6}{'twice':>7}{'different':>11}{'checkpoints verified':>22}")
        for name in given.kinds.split(",") if given.kinds else kinds:
            sizes = [size for size in map(int, given.ranks.split(",")) if size <= kinds[name].most]
            for size in sizes:
                draw = random.Random(f"{given.seed} {name} {size}")
                kills = given.kills or -(-KILLS[name] // len(sizes))
                found = soak(kinds[name], Path(folder) / f"{name}-{size}", kills, size, draw)
                counts = f"{found.kills:7}{found.lost:6}{found.doubled:7}{found.different:11}"
                verified = f"{found.checkpoints - found.bad} of {found.checkpoints}" if found.checkpoints else ""
                print(f"{name:12}{size:6}{counts}{verified:>22}", flush=True)
                failed += found.lost + found.doubled + found.different + found.bad
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
