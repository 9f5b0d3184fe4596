"""What every stage promises from the shell, and the rule that no function another file reaches reads a constant."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.flags import read_flags

ROOT = Path(__file__).parent.parent
STAGES = ("vdg_align", "vdg_tune", "mine_pairs", "gen_deltas", "train_cir", "eval_cir")


def run(stage: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"{stage}.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_constant_at_once(stage):
    best = 9.0
    for _ in range(3):  # the best of three: a busy machine is not the stage's fault
        start = time.perf_counter()
        done = run(stage, "--help")
        best = min(best, time.perf_counter() - start)
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


def names_read(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def names_taken(stage: str) -> set[str]:
    """What other files of the repository name of a stage: `from stage import name`, `stage.name`."""
    taken = set()
    for path in ROOT.rglob("*.py"):
        if path.name == f"{stage}.py" or any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == stage:
                taken |= {name.name for name in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == stage:
                taken.add(node.attr)
    return taken - {"main"}  # tests run it in a copy of the stage that has its own flags


@pytest.mark.parametrize("stage", STAGES)
def test_no_function_that_another_file_reaches_reads_the_flags(stage):
    """An imported stage keeps its own constants: a function that read them would ignore the importer's flags."""
    flags = {flag.name for flag in read_flags(ROOT / f"{stage}.py")}
    fixed = {"eval_cir": {"CIRR_KS", "SUBSET_KS", "FASHIONIQ_KS", "CIRCO_KS", "NEVER"}, "mine_pairs": {"NAME_KEYS"}}
    defined = ast.parse((ROOT / f"{stage}.py").read_text()).body
    reads = {node.name: names_read(node) for node in defined if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    reached, new = set(), names_taken(stage) & reads.keys()
    while new:  # what another file names, and whatever that calls
        reached |= new
        new = {name for caller in new for name in reads[caller] & reads.keys()} - reached
    for name in reached:
        read = reads[name] & flags - fixed.get(stage, set())
        assert not read, f"another file reaches {stage}.{name}, which reads {read}"
    for name in reads.keys() - reached - {"main"}:  # a helper of main(): else nothing would ever set its flags
        callers = {caller for caller in reads if name in reads[caller]}
        assert callers or not reads[name] & flags, f"nobody calls {stage}.{name}"
