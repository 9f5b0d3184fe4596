"""common/ranks.py: collectives against one process, seeds, the log, stop signals."""

import hashlib
import inspect
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed import init_process_group

from common import ranks as ranks_module
from common.console import UserError, rank_size, run
from common.files import (
    read_jsonl,
)
from common.ranks import (
    Log,
    all_reduce_gradients,
    all_sum,
    any_rank,
    barrier,
    gather,
    gather_objects,
    init_world,
    pick_dtype,
)
from common.seeds import _seed, seed_step, seeded_generator, seeded_rng

ROOT = Path(__file__).parent.parent


def test_a_stopwatch_leaves_out_what_is_paused(monkeypatch):
    now = iter([100.0, 103.0, 110.0, 112.0])  # begins, pauses after 3 s for 7, is asked after 2 more
    monkeypatch.setattr(ranks_module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    watch = ranks_module.Stopwatch()
    with watch.paused():
        pass
    assert watch.seconds() == 5.0


def gather_rank(x, weights, sizes):
    """A loss over all pairs of rows: each rank takes its own rows' share of it."""
    world = init_world("cpu")
    start = sum(sizes[: world.rank])
    rows = x[start : start + sizes[world.rank]]
    weights = weights.clone().requires_grad_()
    mine = (rows @ weights).tanh()
    everything = gather(mine.detach())
    assert everything.shape[0] == len(x)
    loss = mine.square().sum() / len(x)
    idle = torch.zeros(3, requires_grad=True)
    if world.rank == 0:
        (idle * 2).sum().backward()
    loss.backward()
    all_reduce_gradients([weights, idle])
    return {
        "mine": mine.detach(),
        "gathered": everything.detach(),
        "grad": weights.grad,
        "idle": idle.grad,
        "loss": all_sum(loss.item()),
        "tensor": all_sum(torch.tensor([world.rank, 1])),
        "any": any_rank(world.rank == 1),
        "none": any_rank(False),
        "objects": gather_objects({"rank": world.rank}),
        "rank": world.rank,
    }


def test_what_has_no_gradient_has_zeros_on_one_rank_too():
    """Weight decay touches it on several ranks, so it must on one."""
    idle, frozen = torch.zeros(3, requires_grad=True), torch.zeros(3)
    all_reduce_gradients([idle, frozen])
    assert torch.equal(idle.grad, torch.zeros(3)) and frozen.grad is None


@pytest.mark.parametrize("sizes", [(3, 3), (5, 2), (4, 0)])
def test_shares_and_what_is_gathered_equal_one_process(sizes):
    make = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 4, generator=make, dtype=torch.float64)
    weights = torch.randn(4, 5, generator=make, dtype=torch.float64)
    alone = weights.clone().requires_grad_()
    features = (x @ alone).tanh()
    loss = features.square().sum() / len(x)
    loss.backward()
    results = run_ranks(2, gather_rank, x, weights, sizes)
    rows = torch.cat([found["mine"] for found in results])
    torch.testing.assert_close(rows, features.detach(), rtol=1e-13, atol=1e-13)  # fewer rows: rounded anew
    for rank, found in enumerate(results):
        assert torch.equal(found["gathered"], rows)
        torch.testing.assert_close(found["grad"], alone.grad, rtol=1e-13, atol=1e-13)
        assert found["loss"] == pytest.approx(loss.item(), abs=1e-13)
        assert found["idle"].tolist() == [2, 2, 2] and found["tensor"].tolist() == [1, 2]
        assert found["any"] and not found["none"] and found["rank"] == rank
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]


def test_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = init_world("cpu")
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    x = torch.ones(2, 3, requires_grad=True)
    assert gather(x) is x
    assert all_sum(2.5) == 2.5 and gather_objects("a") == ["a"] and any_rank(True) is True
    barrier()
    with pytest.raises(UserError, match="wanted auto, cpu or cuda"):
        init_world("gpu")
    assert pick_dtype("auto", world.device) is torch.float32
    assert pick_dtype("auto", "cuda") is torch.bfloat16
    with pytest.raises(UserError, match="fp8"):
        pick_dtype("fp8", "cpu")


def test_a_rank_on_a_gpu_names_it_and_waits_for_hours(monkeypatch):
    asked, cudnn = {}, torch.backends.cuda.cudnn_sdp_enabled()
    for name, value in {"WORLD_SIZE": 4, "RANK": 3, "LOCAL_RANK": 3, "MASTER_ADDR": "here", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: asked.update(set=name))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.update(how, backend=backend))
    try:
        init_world("cuda")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    assert (asked["backend"], asked["set"], asked["device_id"]) == ("nccl", "cuda:3", torch.device("cuda:3"))
    assert asked["timeout"].total_seconds() >= 6 * 3600
    inspect.signature(init_process_group).bind("nccl", timeout=asked["timeout"], device_id=asked["device_id"])
    init_world("cpu")
    assert asked["backend"] == "gloo" and asked["device_id"] is None


def test_a_rank_left_in_the_environment_is_no_run_of_torchrun(monkeypatch):
    """Of a shell in which ranks were started by hand, or a scheduler: a traceback of torch, or a wait for nobody."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")  # without a size it says nothing
    assert rank_size() == (0, 1) and init_world("cpu").rank == 0
    for size, rank, local in (("2", "0", "0"), ("2", "5", "0"), ("1", "1", "0"), ("x", "0", "0"), ("0", "0", "0")):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        with pytest.raises(UserError, match=f"WORLD_SIZE={size} RANK={rank} .*unset WORLD_SIZE RANK LOCAL_RANK"):
            init_world("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun of one
    monkeypatch.setenv("RANK", "0")
    assert init_world("cpu").size == 1


def test_no_rank_leaves_before_the_last_is_done():
    def leave() -> float:
        left, began = [], time.monotonic()
        dist.destroy_process_group = lambda: left.append(time.monotonic() - began)
        run(lambda: time.sleep(1.5 if rank_size()[0] == 0 else 0))
        return left[0]

    assert min(run_ranks(2, leave)) > 1.4


def test_the_kernels_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "kernels-0.1.dist-info").mkdir()
    (tmp_path / "kernels-0.1.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="pip uninstall kernels"):
        init_world("cpu")


def test_seeds_are_functions_of_their_keys():
    drop = torch.nn.Dropout()
    draws = []
    for seed, step, rank in [(0, 1, 0), (0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]:
        seed_step(seed, step, rank)
        draws.append(tuple(drop(torch.ones(64)).tolist()))
    assert draws[0] == draws[1] and len(set(draws)) == 4
    one, same, other = (seeded_rng(1, "epoch", epoch).random() for epoch in (2, 2, 3))
    assert one == same != other
    assert torch.rand(1, generator=seeded_generator(1)) == torch.rand(1, generator=seeded_generator(1))
    digest = hashlib.sha256(b'[0, "a"]').digest()  # spelled out: runs made today must draw the same tomorrow
    assert _seed(0, "a") == int.from_bytes(digest[:8], "little") // 2


LOOP = """
import time
from common.console import run
from common.ranks import stop_requested
def main():
    step = 0
    while not stop_requested():
        if not step:
            print("ready", flush=True)
        step += 1
        time.sleep(0.01)
    time.sleep({wait})
    print("saved", flush=True)
    raise SystemExit(143)
run(main)
"""


def test_signals():
    def start(wait):
        code = textwrap.dedent(LOOP.format(wait=wait))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
        process.stdout.readline()
        return process

    gentle, twice, insistent = start(0), start(0.5), start(30)
    gentle.send_signal(signal.SIGTERM)
    for process in (twice, insistent):
        process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    twice.send_signal(signal.SIGINT)  # torchrun hands the terminal's Ctrl-C on a second time
    time.sleep(1.2)
    insistent.send_signal(signal.SIGINT)
    for process, code, said in [(gentle, 143, b"saved"), (twice, 143, b"saved"), (insistent, 130, b"")]:
        out, err = process.communicate(timeout=20)
        assert process.returncode == code and out.strip() == said
        assert b"stopping after this step" in err and b"Traceback" not in err


def test_log(tmp_path):
    log = Log(tmp_path / "out")
    for step in range(4):
        log.write(step=step, loss=float("nan") if step == 1 else 0.5)
    log.path.open("ab").write(b'{"step": 9')
    Log(tmp_path / "out", resume_step=2).write(step=3, loss=0.25)
    records = read_jsonl(log.path)
    assert [r["step"] for r in records] == [0, 1, 2, 3] and records[1]["loss"] == "nan" and records[3]["loss"] == 0.25
