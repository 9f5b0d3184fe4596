"""common/flags.py and common/console.py: constants as flags, --help, and mistakes in one line, from a real shell."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.console import UserError
from common.flags import constants_of, early_help, override, read_flags

ROOT = Path(__file__).parent.parent


SCRIPT = '''"""Stage 9: a script for the tests.

Reads nothing."""

from common.flags import early_help

early_help(__name__, __file__)
import json  # a stage imports torch here

from common.console import UserError, run
from common.flags import constants_of, override

# ---- data ----
ROOT = "data/cirr"  # annotation root [S6.1]
SPLIT = "val"  # which split
NAMES = ()  # names to leave out
EXTRA = None  # anything
# ---- optimiser ----
LR = 2e-4  # learning rate, peak [S6.1]
STEPS = 100  # optimiser steps
BETA = 0.5  # HN-NCE's beta
SCALE = (0.8, 1.0)  # area kept by the crop, from and to: a long explanation which is
#   never indented, so it is no part of the help
WIDE = (
    "q_proj",
    "v_proj",
)  # layers with LoRA [Fig. 3]
    # and this goes on
CHECK = False  # count the inputs and stop
SPLASH = True  # on by default
COMPUTED = len("no flag")  # computed
TABLE = {"no": "flag"}  # a dict
lower = 3  # no flag


def main():
    print(json.dumps(constants_of(globals())))
    if SPLIT == "gone":
        raise FileNotFoundError("image x.png is missing\\nin two lines")
    if SPLIT == "open":
        open("/nowhere/at all")
    if SPLIT == "bug":
        raise ValueError("a bug")
    if SPLIT == "mistake":
        raise UserError("found \\x1b[31mred, wanted blue")


if __name__ == "__main__":
    override(globals())
    run(main)
'''.replace("    # and this goes on", "# not indented")


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "stage.py"
    path.write_text(SCRIPT)
    return path


def call(script, *argv, env_more=None):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(env_more or {})}
    return subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, env=env)


def overridden(script, *argv) -> dict:
    space = {"__file__": str(script), "__name__": "stage"}
    exec(compile(script.read_text(), str(script), "exec"), space)
    override(space, list(argv))
    return space


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lr", "1e-4"], "LR", 1e-4),
        (["--LR=1e-4"], "LR", 1e-4),
        (["--lr", "3"], "LR", 3.0),
        (["--beta", "-0.5"], "BETA", -0.5),
        (["--beta=-1e38"], "BETA", -1e38),
        (["--steps", "-1"], "STEPS", -1),
        (["--steps", "1e5"], "STEPS", 100_000),
        (["--steps", "1234567890123456789"], "STEPS", 1234567890123456789),
        (["--split", "test"], "SPLIT", "test"),
        (["--split", ""], "SPLIT", ""),
        (["--split=--x=y"], "SPLIT", "--x=y"),
        (["--names", "a.png,b c.png"], "NAMES", ("a.png", "b c.png")),
        (["--scale", "0.5,1"], "SCALE", (0.5, 1.0)),
        (["--scale", "(0.5, 1)"], "SCALE", (0.5, 1.0)),
        (["--wide", ""], "WIDE", ()),
        (["--extra", "7"], "EXTRA", 7),
        (["--extra", "word"], "EXTRA", "word"),
        (["--check"], "CHECK", True),
        (["--check", "false"], "CHECK", False),
        (["--check=true"], "CHECK", True),
        (["--splash=false"], "SPLASH", False),
        (["--check", "--lr", "1"], "CHECK", True),
        (["--lr", "1", "--lr", "2"], "LR", 2.0),
    ],
)
def test_override_sets(script, argv, name, value):
    space = overridden(script, *argv)
    assert space[name] == value and type(space[name]) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--leaning_rate", "1"], "unknown flag --leaning_rate; the nearest is --lr"),
        (["--step", "1"], "the nearest is --steps"),
        (["--computed", "1"], "unknown flag --computed"),
        (["--table", "1"], "unknown flag --table"),
        (["--lower", "1"], "unknown flag --lower"),
        (["--lr", "fast"], "--lr wants a number, found 'fast'"),
        (["--lr", "nan"], "--lr wants a number"),
        (["--lr", "inf"], "--lr wants a number below 1.7e+38, found 'inf'"),
        (["--beta=-inf"], "--beta wants a number below"),
        (["--beta", "1e300"], "--beta wants a number below"),
        (["--steps", str(2**63)], "--steps wants a whole number below 9.2e"),
        (["--steps", "1.5"], "--steps wants a whole number, found '1.5'"),
        (["--steps", "inf"], "--steps wants a whole number"),
        (["--steps", ""], "--steps wants a whole number"),
        (["--scale", "0.1,b"], "--scale wants a list such as 0.8,1.0 (a number each), found '0.1,b'"),
        (["--check", "maybe"], "--check wants true or false, found 'maybe'"),
        (["--lr"], "--lr wants a value"),
        (["--lr", "--steps", "3"], "--lr wants a value"),
        (["lr", "3"], "unexpected 'lr'"),
        (["-lr", "3"], "unexpected '-lr'"),
    ],
)
def test_override_refuses(script, argv, message):
    with pytest.raises(UserError) as caught:
        overridden(script, *argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_is_fast_grouped_and_complete(script):
    text = SCRIPT.replace("import json ", "import json, torch ").replace("# not indented", "    # and this goes on")
    script.write_text(text)
    times = []
    for _ in range(3):  # the best of three: the machine may be busy with other things
        start = time.perf_counter()
        done = call(script, "--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5, times  # importing torch alone takes longer
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "Stage 9: a script for the tests."
    assert lines.index("data") < lines.index("optimiser")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.startswith("  --")}
    assert rows["--lr"] == "0.0002 learning rate, peak [S6.1]"
    assert rows["--names"] == '"" names to leave out' or rows["--names"] == "names to leave out"
    assert rows["--split"] == "val which split"
    assert rows["--check"] == "false count the inputs and stop"
    assert rows["--wide"] == "q_proj,v_proj layers with LoRA [Fig. 3] and this goes on"
    assert rows["--scale"].endswith("a long explanation which is")
    assert len(rows) == 11 and max(map(len, lines)) <= 120
    # `-h` too; and the constants in the help are those that override knows
    assert call(script, "-h").stdout == done.stdout
    assert {"--" + name.lower() for name in constants_of(overridden(script))} == set(rows)


def test_mistakes_end_a_script_with_one_line(script):
    # (the first two are found by early_help, before the heavy imports)
    for argv, line in [
        (["--leaning_rate", "1"], "error: unknown flag --leaning_rate; the nearest is --lr (--help lists all)"),
        (["--steps", "x"], "error: --steps wants a whole number, found 'x'; its default is 100"),
        (["--split", "gone"], "error: image x.png is missing in two lines"),
        (["--split", "open"], "error: No such file or directory: /nowhere/at all"),
        (["--split", "mistake"], "error: found \ufffd[31mred, wanted blue"),
    ]:
        done = call(script, *argv)
        assert (done.returncode, done.stderr) == (1, line + "\n")
    late = script.with_name("late.py")  # without early_help
    late.write_text(SCRIPT.replace("early_help(__name__, __file__)\n", ""))
    done = call(late, "--step", "1")
    assert done.returncode == 1 and done.stderr.startswith("error: unknown flag --step;")
    assert done.stderr.count("\n") == 1
    done = call(script, "--split", "bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: a bug" in done.stderr
    done = call(script, "--lr", "1", "--check")
    assert done.returncode == 0 and json.loads(done.stdout)["LR"] == 1.0


def test_early_help_leaves_an_imported_script_alone(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "--help", "--nonsense"])
    early_help("stage", str(script))


def test_torchrun_gets_the_reason(script, tmp_path):
    """torchrun prints what it finds in the file it names; a worker that leaves it empty is just an exit code."""
    reason = tmp_path / "reason.json"
    done = call(script, "--split", "mistake", env_more={"TORCHELASTIC_ERROR_FILE": str(reason)})
    assert done.returncode == 1 and done.stderr == "error: found \ufffd[31mred, wanted blue\n"
    assert "wanted blue" in reason.read_text()


STAGES = ("vdg_align.py", "vdg_tune.py", "mine_pairs.py", "gen_deltas.py", "train_cir.py", "eval_cir.py")


@pytest.mark.parametrize("stage", STAGES)
def test_torchrun_leaves_every_flag_to_the_stage(stage):
    """torchrun takes the beginning of one of its own options for that option, behind the script's name too."""
    from torch.distributed.run import get_args_parser

    flags = [f"--{flag.name.lower()}" for flag in read_flags(ROOT / stage)]
    assert len(flags) > 10
    for flag in flags:
        for words in ([flag, "x"], [f"{flag}=x"]):
            found = get_args_parser().parse_args(["--nproc_per_node", "2", stage, *words])
            assert (found.training_script, found.training_script_args) == (stage, words)
