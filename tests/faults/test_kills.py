"""Kills, in their short forms: the soak with one kill of each stage, and torchrun's ranks stopped and killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import soak
import torch
from conftest import ROOT
from ranks import run_ranks
from safetensors.torch import load_file
from test_train_cir import arguments, clean, log_of, train, world  # noqa: F401


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return soak.build(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("kind, size", [("tune", 1), ("combiner", 1), ("generation", 2), ("mining", 2)])
def test_a_kill_of_each_stage(kinds, tmp_path, kind, size):
    found = soak.soak(kinds[kind], tmp_path, 1, size, random.Random(f"{kind}"))
    assert (found.kills, found.lost, found.doubled, found.different, found.bad) == (1, 0, 0, 0, 0)


def torchrun(argv: list[str], said) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(ROOT / "train_cir.py"), *argv], stdout=said, stderr=said, env=environment)


def wait_for(process: subprocess.Popen, happened) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks below torchrun."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    return [int(pid) for pid in open(children).read().split()]


def test_torchrun_is_stopped_killed_and_goes_on(world, zoo, tmp_path):  # noqa: F811
    """SIGTERM to torchrun: both ranks save and end. SIGKILL of one rank: the other ends too, and soon. Then the same
    command ends with the weights of a run that nobody disturbed."""
    out = tmp_path / "out"
    argv = arguments(world, zoo, out, "sum", batch=3, steps=120, save_every=10, log_every=1)

    def lines() -> int:
        return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0

    with open(tmp_path / "said", "w+") as said:
        run = torchrun(argv, said)
        wait_for(run, lambda: lines() >= 3)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) != 0
        reached = log_of(out)[-1]["step"]
        states = sorted(int(path.name[5:]) for path in (out / "last").glob("step-*"))
        assert states and states[-1] == reached < 120
        assert "Traceback" not in (tmp_path / "said").read_text().split("stopped after step")[0]

        run = torchrun(argv, said)
        wait_for(run, lambda: lines() >= reached + 3)
        other, killed = sorted(ranks_of(run))
        os.kill(killed, signal.SIGKILL)
        assert run.wait(60) != 0
        assert not os.path.exists(f"/proc/{other}")

    assert not (out / "model.safetensors").exists()
    run_ranks(2, train, argv)
    run_ranks(2, train, arguments(world, zoo, tmp_path / "alone", "sum", batch=3, steps=120, log_every=1))
    one, two = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "alone"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert [record["step"] for record in log_of(out)] == list(range(1, 121))
