"""common/decoders.py: other processes make the bytes that this one would, and neither outlive it nor hang it."""

import functools
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transforms
from conftest import ROOT
from pictures import noise
from ranks import run_ranks
from transforms import SIDE, numbers_of

from common import decoders
from common.console import UserError
from common.decoders import fill_rows
from common.images import ImageStore

NINE = tuple(range(9))


@pytest.fixture
def store(tmp_path):
    for i in range(9):
        noise(20 + i, 30, i).save(tmp_path / f"{i}.png")
    return ImageStore(str(tmp_path))


def made(store: ImageStore, transform, workers: int = 2, names=NINE) -> np.ndarray:
    rows = np.zeros((len(names), SIDE, SIDE, 3), np.uint8)
    fill_rows(rows, [(store, str(name), transform) for name in names], workers)
    return rows


def alive(pid: int) -> bool:
    """Not one that ended and that nobody waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(store: ImageStore, workers: int = 2) -> set[int]:
    return {int(numbers_of(row)[0]) for row in made(store, transforms.process_number, workers)}


def test_other_processes_make_the_bytes_of_this_one(store):
    alone = made(store, transforms.small, 0)
    for i, row in enumerate(alone):
        assert (row == transforms.small(store.open(str(i)))).all()
    for workers in (1, 2, 64):
        for _ in range(2):
            assert (made(store, transforms.small, workers) == alone).all()
    assert (made(store, transforms.small, 2, [8, 0, 8]) == alone[[8, 0, 8]]).all()


@pytest.mark.parametrize("workers, cpus, count", [(1, 2, 1), (2, 2, 2), (64, 2, 2), (3, 1, 1)])
def test_as_many_as_asked_for_and_as_there_are_cpus(store, monkeypatch, workers, cpus, count):
    monkeypatch.setattr(decoders, "cpus_of_rank", lambda: cpus)
    found = pids(store, workers)
    assert len(found) == count and os.getpid() not in found
    assert pids(store, workers) == found, "they stay"


def test_cpus_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    for cpus, ranks, share in [(2, 1, 2), (64, 1, 64), (64, 8, 8), (4, 8, 1)]:
        found = SimpleNamespace(sched_getaffinity=lambda _, cpus=cpus: range(cpus), environ=os.environ)
        monkeypatch.setattr(decoders, "os", found)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert decoders.cpus_of_rank() == share


def test_a_process_holds_its_socket_and_no_stage(store, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    decoders._threads.cache_clear()
    with open(ROOT / "README.md") as _:  # as the lock of a folder would be
        for row in made(store, transforms.holding):
            files, libraries, threads = numbers_of(row)[:3]
            assert files == 5, "in, out, errors, the socket, and the lock of big pictures"
            assert not libraries and threads == 1


def test_the_first_fault_is_raised_and_what_comes_after_is_made(store, tmp_path):
    (tmp_path / "3.png").write_bytes(b"")
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"3\.png: is empty"):
            made(store, transforms.small, workers)
        with pytest.raises(FileNotFoundError, match="'none'"):
            made(store, transforms.small, workers, ["none", 3])
        with pytest.raises(MemoryError, match="no room"):
            made(store, transforms.out_of_memory, workers, [0])
        assert made(store, transforms.small, workers, [1]).any()
    with pytest.raises(ValueError, match="3 bytes of 1 pictures, 48 wanted"):
        made(store, transforms.too_few, 2, [0])
    with pytest.raises(AssertionError):
        fill_rows(np.zeros((2, SIDE, SIDE, 3), np.uint8), [(store, "0", transforms.small)], 2)


def test_another_takes_the_place_of_a_process_that_is_killed(store, tmp_path):
    before = pids(store)
    assert (made(store, transforms.KilledOnce(str(tmp_path / "x"))) == made(store, transforms.small, 0)).all()
    after = pids(store)
    assert len(before - after) == 1 and not any(alive(pid) for pid in before - after)
    with pytest.raises(UserError, match=r"one of 1 pictures, first .*0\.png: .* killed twice \(signal 9\); take fewer"):
        made(store, transforms.killed, 2, [0, 1, 2])
    assert (made(store, transforms.small) == made(store, transforms.small, 0)).all()


def test_a_bug_keeps_its_traceback(store, capfd):
    decoders._threads.cache_clear()  # those that are there write to another file
    with pytest.raises(RuntimeError, match=r"0\.png ended with status 1: its fault is above"):
        made(store, transforms.mistaken, 2, [0])
    assert "KeyError: 'a bug'" in capfd.readouterr().err
    assert made(store, transforms.small).any()


def test_no_process_is_one_line(store, monkeypatch, capsys):
    monkeypatch.setattr(decoders.sys, "executable", "/nonexistent")
    decoders._threads.cache_clear()
    with pytest.raises(UserError, match=r"no process could be started .*No such file.*fewer --workers, or 0"):
        made(store, transforms.small)
    monkeypatch.undo()
    assert made(store, transforms.small).any() and not capsys.readouterr().err


def test_the_decoders_are_this_repositorys_wherever_the_stage_is_started(store, tmp_path):
    """In a folder with modules of the same names, by a path with a colon in it."""
    here = tmp_path / "a:b"
    (here / "common").mkdir(parents=True)
    (here / "repository").symlink_to(ROOT)
    for name in ("common/__init__.py", "pickle.py", "numpy.py"):
        (here / name).write_text("raise ImportError('not this one')")
    ours = [str(here / "repository"), str(here / "repository/tests")]
    code = f"import sys; sys.path[:1] = {ours!r}; import test_decoders, transforms; "
    code += "store = test_decoders.ImageStore(sys.argv[1]); print(test_decoders.made(store, transforms.small).sum())"
    found = subprocess.run([sys.executable, "-c", code, *store.roots], cwd=here, capture_output=True, text=True)
    assert found.stdout.strip() == str(made(store, transforms.small, 0).sum()), found.stderr


def test_nothing_is_left_of_earlier_processes(store):
    for workers in (1, 2, 1, 2, 1):
        made(store, transforms.small, workers)
    decoders._threads.cache_clear()
    files = len(list(Path("/proc/self/fd").iterdir()))
    for workers in (1, 2, 1, 2, 1):
        made(store, transforms.small, workers)
    decoders._threads.cache_clear()
    time.sleep(0.2)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if "common import decoders" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_signals_are_for_the_stage(store):
    assert (made(store, transforms.signalled) == 7).all()
    for pid in pids(store):
        assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C goes to a group"


STAGE = """
import sys, threading, time
sys.path.insert(0, {tests!r})
import transforms
from test_decoders import made, pids
from common.images import ImageStore
store = ImageStore(sys.argv[1])
found = pids(store)
if {busy}:
    threading.Thread(target=made, args=(store, transforms.asleep, 2, (0, 1)), daemon=True).start()
    time.sleep(0.2)
print(*found, flush=True)
{then}
"""


@pytest.mark.parametrize("end, busy", [("killed", True), ("interrupted", True), ("by itself", False)])
def test_they_end_with_the_stage(store, end, busy):
    then = "" if end == "by itself" else "time.sleep(600)"
    code = STAGE.format(tests=str(ROOT / "tests"), busy=busy, then=then)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stage = subprocess.Popen([sys.executable, "-c", code, *store.roots], cwd=ROOT, **how)
    found = [int(word) for word in stage.stdout.readline().split()]
    assert len(found) == 2
    if end != "by itself":
        assert all(map(alive, found))
        stage.send_signal(signal.SIGKILL if end == "killed" else signal.SIGINT)
    stage.wait(30)
    until = time.monotonic() + 10
    while any(map(alive, found)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, found))
    said = stage.stderr.read()
    assert said.count("Traceback") == (end == "interrupted"), said


def test_a_forked_process_has_its_own(store):
    ours = pids(store)
    theirs = run_ranks(1, functools.partial(pids, store))[0]
    assert len(ours) == len(theirs) == 2 and not ours & theirs
    assert pids(store) == ours


def test_big_pictures_are_held_by_one_process_at_a_time(store, tmp_path):
    for name in "abcd":
        noise(40, 40, 0).resize((5000, 4000)).save(tmp_path / f"{name}.jpg")
    times = sorted(numbers_of(row)[:2] for row in made(store, transforms.from_until, 2, "abcd"))
    assert all(until <= began for (_, until), (began, _) in zip(times, times[1:], strict=False))
    assert len(pids(store)) == 2
    times = sorted(numbers_of(row)[:2] for row in made(store, transforms.from_until, 2, range(4)))
    assert any(until > began for (_, until), (began, _) in zip(times, times[1:], strict=False)), "small ones are not"
