"""own.sh with a python that only writes down how it was called: paths, folders, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from common.files import read_jsonl, write_text

# A stage stands in for itself: mine_pairs and gen_deltas write their file, or one finds nothing, waits or fails.
PYTHON = f"""#!{sys.executable}
import json, os, sys, time
script, words = os.path.basename(sys.argv[1]), sys.argv[2:]
given = dict(zip(words[::2], words[1::2]))
log = open(os.environ["CALLS"], "a")
log.write(json.dumps(given | {{"script": script, "cwd": os.getcwd()}}) + "\\n")
log.flush()
if script == "search.py" and "--check" in given and os.environ.get("MODE") == "busy":
    sys.exit(1)
if script == "mine_pairs.py":
    os.makedirs(given["--out"], exist_ok=True)
    open(given["--out"] + "/pairs.jsonl", "w").write("" if os.environ.get("MODE") == "no pairs" else "{{}}")
if script == "gen_deltas.py":
    mode = os.environ.get("MODE")
    if mode == "wait":
        try:
            print("waits", file=sys.stderr, flush=True)
            time.sleep(60)
        finally:
            log.write('{{"script": "interrupted"}}\\n')
    if mode == "fail":
        sys.exit(1)
    os.makedirs(given["--out"], exist_ok=True)
    open(given["--out"] + "/pseudo.jsonl", "w").write(given["--vdg"])
"""


def hear_signals() -> None:
    """As in a terminal: what nohup or a shell's & made ignored, no trap of bash can hear."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class Place:
    """A copy of the script, two folders of one name, a VDG; and a folder elsewhere from which it is called."""

    def __init__(self, tmp_path: Path):
        self.here, self.calls = tmp_path / "elsewhere", tmp_path / "calls.jsonl"
        self.script = tmp_path / "repository/own.sh"
        self.script.parent.mkdir()
        shutil.copy(ROOT / "own.sh", self.script)
        for name in ("a/photos", "b/photos", "cir"):
            (self.here / name).mkdir(parents=True)
        write_text(self.here / "vdg/config.json", "{}")
        write_text(tmp_path / "bin/python", PYTHON)
        (tmp_path / "bin/python").chmod(0o755)
        self.env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "active"}
        self.env |= {"CALLS": str(self.calls), "VDG": "vdg"}

    def start(self, *argv: str, **more: str) -> subprocess.Popen:
        self.calls.unlink(missing_ok=True)
        argv, pipe = ["bash", str(self.script), *argv], subprocess.PIPE
        env = self.env | more
        heard = {"start_new_session": True, "preexec_fn": hear_signals}
        return subprocess.Popen(argv, cwd=self.here, env=env, stdout=pipe, stderr=pipe, **heard)

    def run(self, *argv: str, **more: str) -> dict[str, dict]:
        """The calls of the stages, by script."""
        assert self.start(*argv, **more).wait(60) == 0
        return {call["script"]: call for call in read_jsonl(self.calls)}

    def path(self, call: dict, flag: str) -> Path:
        return Path(call["cwd"], call[flag]).resolve()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_paths_hold_where_they_were_given(place):
    shutil.copytree(place.here / "cir", place.here / "resnet")
    calls = place.run("a/photos", "--backbone", "clip", CHECKPOINT="cir", ENCODER="resnet")
    found = [place.path(calls["search.py"], flag) for flag in ("--gallery", "--checkpoint", "--backbone")]
    assert found == [place.here / name for name in ("a/photos", "cir", "clip")]
    assert place.path(calls["gen_deltas.py"], "--vdg") == place.here / "vdg"
    assert place.path(calls["mine_pairs.py"], "--encoder") == place.here / "resnet"
    calls = place.run("a/photos", ENCODER="microsoft/resnet-152")
    assert calls["mine_pairs.py"]["--encoder"] == "microsoft/resnet-152" and calls["search.py"]["--checkpoint"] == ""
    assert place.path(calls["search.py"], "--out").is_relative_to(place.script.parent / "out/own")


def test_two_folders_of_one_name_share_nothing(place):
    outs = {name: place.run(name)["search.py"]["--out"] for name in ("a/photos", "b/photos")}
    assert outs["a/photos"] != outs["b/photos"]
    (place.here / "link").symlink_to(place.here / "a/photos")
    for same in (f"{place.here}/a/photos", "./a//photos/", "link"):
        assert place.run(same)["search.py"]["--out"] == outs["a/photos"]


def test_a_better_vdg_has_a_folder_of_its_own(place):
    def label(vdg: str, **more) -> str:
        return place.run("a/photos", VDG=vdg, **more)["search.py"].get("--label", "")

    first = label("vdg")
    assert Path(first).read_text() == "vdg"
    shutil.copytree(place.here / "vdg", place.here / "moved")
    assert label("moved") == first
    for name in ("adapter_config.json", "adapter_model.safetensors", "projection.safetensors"):
        write_text(place.here / "moved" / name, name)
        assert Path(label("moved")).read_text() == "moved" and label("moved") != first
    assert label("vdg", MODE="fail") == first, "what was described before is there to be labelled"
    write_text(place.here / "vdg/config.json", '{"new": 1}')
    assert label("vdg", MODE="fail") == ""


def test_the_vdg_of_the_demo_is_taken_only_by_name(place):
    """It knows the drawn world: of photographs it says next to nothing that is true."""
    demo, usual = (place.script.parent / "out" / name for name in ("demo/vdg", "vdg"))
    write_text(demo / "config.json", "{}")
    run = place.start("a/photos", VDG="")
    assert run.wait(60) == 0 and run.stdout.read().count(b"no pairs to label: no VDG in out/vdg and none named by") == 1
    assert not {"mine_pairs.py", "gen_deltas.py"} & {call["script"] for call in read_jsonl(place.calls)}
    assert place.run("a/photos", VDG=str(demo))["gen_deltas.py"]["--vdg"] == str(demo)
    write_text(usual / "config.json", "{}")
    assert place.run("a/photos", VDG="")["gen_deltas.py"]["--vdg"] == str(usual)


def test_without_pairs_nothing_is_described_and_the_page_comes(place):
    run = place.start("a/photos", MODE="no pairs")
    assert run.wait(60) == 0
    (line,) = [line for line in run.stdout.read().decode().splitlines() if line.startswith("2 ")]
    scripts = {call["script"]: call for call in read_jsonl(place.calls)}
    mined = Path(scripts["mine_pairs.py"]["--out"])
    assert line == f"2 no pairs to label: too few similar pictures; {mined.with_name('mine.txt')} says more"
    assert "gen_deltas.py" not in scripts and "--label" not in scripts["search.py"]


def test_what_the_page_refuses_is_said_before_the_first_step(place):
    """A wrong flag, a port in use, a folder that another page serves: not after hours of mining and describing."""
    assert place.start("a/photos", "--prot", "0", MODE="busy").wait(60) == 1
    asked = [call for call in read_jsonl(place.calls) if call["script"] != "-m"]
    assert [call["script"] for call in asked] == ["search.py"] and asked[0]["--prot"] == "0"
    place.run("a/photos", "--port", "8001")
    first, *_, last = [call for call in read_jsonl(place.calls) if call["script"] != "-m"]
    assert first.pop("--check") == "true" and "--check" not in last
    assert first == {name: value for name, value in last.items() if name != "--label"}


def test_another_encoder_mines_into_a_folder_of_its_own(place):
    """mine_pairs.py refuses a folder that another encoder wrote; and to go back costs no embedding."""
    (place.here / "resnet").mkdir()
    encoders = ("", "resnet", f"{place.here}/resnet", "microsoft/resnet-152", "")
    calls = [place.run("a/photos", ENCODER=encoder) for encoder in encoders]
    outs = [call["mine_pairs.py"]["--out"] for call in calls]
    assert outs[0] == outs[4] and outs[1] == outs[2] and len(set(outs)) == 3
    assert [call["gen_deltas.py"]["--pairs"] for call in calls] == [f"{out}/pairs.jsonl" for out in outs]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_too(place, number, status):
    run = place.start("a/photos", MODE="wait")
    assert run.stderr.readline() == b"waits\n"
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal does
    else:
        run.send_signal(number)
    began = time.monotonic()
    assert run.wait(30) == status and time.monotonic() - began < 20
    run.stderr.read()  # ends when the last process that may write there has ended
    assert time.monotonic() - began < 20
    scripts = [json.loads(line)["script"] for line in place.calls.read_text().splitlines()]
    assert scripts[-1] == ("interrupted" if number == signal.SIGINT else "gen_deltas.py")
