"""What every stage promises from the shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.flags import read_flags

ROOT = Path(__file__).parent.parent
STAGES = ("vdg_align", "vdg_tune", "mine_pairs", "gen_deltas", "train_cir", "eval_cir")


def run(stage: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"{stage}.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)


def time_of_children() -> float:
    """Seconds of CPU that finished processes took: on a busy machine the clock says nothing of a stage."""
    used = os.times()
    return used.children_user + used.children_system


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_constant_at_once(stage):
    best = 9.0
    for _ in range(3):  # the best of three
        start = time_of_children()
        done = run(stage, "--help")
        best = min(best, time_of_children() - start)
    assert done.returncode == 0 and best < 0.5
    flags = read_flags(ROOT / f"{stage}.py")
    assert len(flags) > 10
    for flag in flags:
        assert f"--{flag.name.lower()} " in done.stdout
        assert flag.help, f"{flag.name} says nothing of itself"


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_flag_names_the_nearest(stage):
    done = run(stage, "--leaning_rate", "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    known = {f"--{flag.name.lower()}" for flag in read_flags(ROOT / f"{stage}.py")}
    nearest = done.stderr.split("the nearest is ")[1].split()[0]
    assert nearest in known
    if stage in ("vdg_align", "vdg_tune", "train_cir"):
        assert nearest == "--lr"


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_of_nothing_is_one_line(stage):
    done = run(stage, "--batch", "0", "--device", "cpu")
    assert done.returncode == 1 and done.stderr == "error: --batch 0: wanted 1 or more\n"
