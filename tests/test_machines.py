"""Real machines: full disks, disks without locks or fsync, links and pipes in the way, other CPUs, ranks, logs."""

import ast
import contextlib
import errno
import fcntl
import io
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import console, disk, files, flags
from common.console import UserError, progress
from common.disk import whole
from common.files import (
    JsonlAppender,
    file_sha256,
    load_state,
    load_tensors,
    lock_folder,
    read_json,
    read_jsonl,
    save_folder,
    save_state,
    write_json,
    write_tensors,
    write_text,
)

ROOT = Path(__file__).parent.parent
SPACE = {
    "BATCH": 4,
    "HELD_OUT": 0.1,
    "DROPOUT": 0.5,
    "BETAS": (0.9, 0.99),
    "MODEL": "combiner",
    "NAN": float("nan"),
    "DATASET": "CIRR",
    "OUT": "",
}


@contextlib.contextmanager
def within_seconds(n: int):
    """What hangs ends the test instead."""

    class Late(Exception):  # a TimeoutError is an OSError, which a reader may take for damage
        pass

    def late(*_):
        raise Late(f"nothing after {n} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(n)
    try:
        yield
    finally:
        signal.alarm(0)


# ---- flags ----


@pytest.mark.parametrize(
    "check, bounds, message",
    [
        (flags.within, {"HELD_OUT": (0, 1), "BETAS": (0, 1)}, None),
        (flags.within, {"HELD_OUT": (0.1, 0.1)}, None),  # both ends allowed
        (flags.within, {"BATCH": (1, 3)}, "--batch 4: wanted 1 to 3"),
        (flags.within, {"BETAS": (0, 0.95)}, "--betas 0.9,0.99: wanted 0 to 0.95 each"),
        (flags.within, {"NAN": (0, 1)}, "--nan nan: wanted 0 to 1"),
        (flags.below, {"DROPOUT": 1, "BETAS": 1}, None),
        (flags.below, {"DROPOUT": 0.5}, "--dropout 0.5: wanted less than 0.5"),
        (flags.below, {"BETAS": 0.99}, "--betas 0.9,0.99: wanted less than 0.99 each"),
        (flags.below, {"NAN": 1}, "--nan nan: wanted less than 1"),
        (flags.at_least, {"BATCH": 4, "BETAS": 0.9}, None),
        (flags.at_least, {"BETAS": 0.95}, "--betas 0.9,0.99: wanted 0.95 or more each"),
        (flags.at_least, {"NAN": 0}, "--nan nan: wanted 0 or more"),
        (flags.one_of, {"MODEL": ("combiner", "blip_tdm", "sum")}, None),
        (flags.one_of, {"MODEL": ("Combiner", "sum")}, "--model combiner: wanted Combiner or sum; meant Combiner?"),
        (flags.one_of, {"DATASET": ("cirr", "fashioniq")}, "--dataset CIRR: wanted cirr or fashioniq; meant cirr?"),
        (flags.one_of, {"OUT": ("", "int8", "nf4")}, None),
        (flags.one_of, {"MODEL": ("", "int8", "nf4")}, '--model combiner: wanted "", int8 or nf4'),
    ],
)
def test_bounds_and_choices_name_the_flag(check, bounds, message):
    if message is None:
        check(SPACE, **bounds)
        return
    with pytest.raises(UserError) as caught:
        check(SPACE, **bounds)
    assert str(caught.value) == message


def test_a_tuple_of_numbers_wants_as_many_as_its_default(tmp_path):
    (tmp_path / "stage.py").write_text('BETAS = (0.9, 0.99)  # betas\nNAMES = ("q", "v")  # names\nFREE = ()  # free\n')
    known = flags.read_flags(tmp_path / "stage.py")
    assert flags.parse_flags(known, ["--betas", "0.5", "0.6"]) == {"BETAS": (0.5, 0.6)}
    assert flags.parse_flags(known, ["--names", "a", "--free", "a,b,c"]) == {"NAMES": ("a",), "FREE": ("a", "b", "c")}
    for values in ("0.9", "0.9,0.99,0.999", ""):
        with pytest.raises(UserError) as caught:
            flags.parse_flags(known, [f"--betas={values}"])
        assert str(caught.value).startswith(f"--betas wants 2 numbers such as 0.9,0.99, found {values!r}")


@pytest.mark.parametrize("stage", ["vdg_align", "vdg_tune", "train_cir"])
def test_one_beta_is_one_line(stage):
    command = [sys.executable, f"{stage}.py", "--betas", "0.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: --betas wants 2 numbers such as 0.9,0.99, found '0.9'"
    )
    assert done.stderr.count("\n") == 1


# ---- ranks and bars ----

TWO_RANKS = """
import sys
from common.console import UserError, run
def main():
    raise UserError("found red, wanted blue") if sys.argv[1] == "mistake" else ZeroDivisionError("a bug")
run(main)
"""


def torchrun(tmp_path, *argv: str) -> list[str]:
    script = tmp_path / "stage.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *argv], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1
    return done.stderr.splitlines()


def test_a_mistake_on_every_rank_is_one_line_before_torchruns_own(tmp_path):
    lines = torchrun(tmp_path, "mistake")
    assert [line for line in lines if line.startswith("error")] == ["error: found red, wanted blue"]
    assert sum("found red" in line for line in lines) <= 3  # torchrun's summary quotes it once a rank
    assert not any("stage.py" in line and "line" in line for line in lines)  # no traceback of ours
    assert len(lines) < 60


def test_a_rank_speaks_for_itself_only_where_the_first_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "PATIENCE", 0.2)
    own, first = (tmp_path / rank / "error.json" for rank in ("1", "0"))
    for path in (own, first):
        path.parent.mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def said() -> str:
        with pytest.raises(SystemExit, match="1"):
            console.fail(UserError("found red"))
        assert json.loads(own.read_text())["message"]["message"] == "found red"
        return capsys.readouterr().err

    assert said() == "error (rank 1): found red\n"
    first.write_text('{"message": {"message": "found green"}}')
    assert said() == "error (rank 1): found red\n"
    first.write_text('{"message": {"message": "found red"}}')
    assert said() == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first rank of another machine: its terminal is another too
    first.unlink()
    assert said() == "error (rank 1): found red\n"


def test_a_bar_starts_where_the_run_is_and_shows_the_loss(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal
    monkeypatch.setattr(console, "QUIET", 0)
    bar = progress(range(40, 50), "training", total=50, initial=40)
    for step in bar:
        before = sys.stderr.getvalue()
        bar.set_postfix(loss=step + 0.5)
        assert sys.stderr.getvalue() == before  # shown with the next line, not by one more
    text = sys.stderr.getvalue()
    assert "40/50" in text and "loss=48.5" in text and "50/50" in text
    assert progress(range(40, 50), "training", initial=40).total == 50


def test_a_bar_in_a_file_is_silent_at_first(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress(range(3), "training")
    for step in bar:
        bar.set_postfix(loss=step)
    assert sys.stderr.getvalue() == ""
    monkeypatch.setenv("RANK", "1")
    bar = progress(range(3), "training")
    for step in bar:
        bar.set_postfix(loss=step)  # a bar that is off takes it too
    assert sys.stderr.getvalue() == ""


def test_a_bar_in_a_file_has_lines_of_its_own():
    """A message does not run into the bar, and the last line is the last step's."""
    program = SPEAKS.replace('"x" * 9000', '"said"')
    command = [sys.executable, "-c", program, os.devnull, "bar"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if "said" in line] == [f"line {i} said" for i in range(4)]
    bars = [line for line in lines if line.startswith("steps:")]
    assert "0/4" in bars[0] and "4/4" in bars[-1] and len(bars) + 5 == len(lines)  # and one warning


def test_an_interrupt_before_the_run_is_one_line():
    program = "from common import flags; flags.early_help('__main__', 'eval_cir.py'); raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "error: interrupted\n" and done.returncode != 0


# ---- disks ----


def test_a_disk_without_fsync_or_locks_is_named_once(tmp_path, monkeypatch, capsys):
    def unsupported(code):
        def refuse(*_):
            raise OSError(code, os.strerror(code))

        return refuse

    monkeypatch.setattr(disk, "_warned", set())
    for code in (errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "fsync", unsupported(code))
        write_text(tmp_path / "a.txt", "text")
        write_text(tmp_path / "b.txt", "text")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(f"the disk of {tmp_path} has no fsync" in line for line in said)
    monkeypatch.setattr(os, "fsync", unsupported(errno.EIO))  # a disk that fails is no such case
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "a.txt", "other")
    assert (tmp_path / "a.txt").read_text() == "text"
    monkeypatch.undo()

    for code in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        out = tmp_path / f"out-{code}"
        monkeypatch.setattr(fcntl, "flock", unsupported(code))
        lock_folder(out)
        lock_folder(out)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and f"the disk of {out} has no locks" in said[0]
        files._locks.pop(out).close()
    monkeypatch.setattr(fcntl, "flock", unsupported(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        lock_folder(tmp_path / "out")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_are_readable_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.eye(3).T})
        save_folder(tmp_path / "model", {"b.safetensors": {"b": torch.ones(2)}}, {"config.json": {}})
        save_state(tmp_path, 1, {"w": torch.ones(2)}, {})
    finally:
        os.umask(before)
    found = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(found) == 6 and all(stat.S_IMODE(p.stat().st_mode) == mode for p in found)


def test_nothing_is_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    out = tmp_path / "out"
    (out / "last").mkdir(parents=True)
    for name in ("a.json.tmp", "b.json", "last/step-1.tmp", "last/step-0.old.tmp"):
        (out / name).symlink_to(outside)
    (tmp_path / "model.tmp").symlink_to(out)
    write_json(out / "a.json", [1])
    write_json(out / "b.json", [2])
    save_state(out, 1, {"w": torch.ones(2)}, {})
    save_folder(tmp_path / "model", {}, {"config.json": {}})
    assert outside.read_text() == "precious" and read_json(out / "a.json") == [1] and read_json(out / "b.json") == [2]
    assert not any(p.is_symlink() for p in out.rglob("*")) and sorted(os.listdir(out / "last")) == ["step-1"]
    (out / "log.jsonl").symlink_to(outside)
    (out / "new.jsonl").symlink_to(tmp_path / "made")
    for name in ("log.jsonl", "new.jsonl"):
        with pytest.raises(UserError, match="is a link"):
            JsonlAppender(out / name, {})
        with pytest.raises(OSError, match="symbolic link"):
            files.append_line(out / name, {})
    (out / ".lock").symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        lock_folder(out)
    assert outside.read_text() == "precious" and not (tmp_path / "made").exists()


def test_an_error_in_the_middle_leaves_the_old_file_alone(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError):
        with whole(tmp_path / "a") as aside:
            aside.write_text("half")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    with whole(tmp_path / "a") as aside:
        assert aside.parent == tmp_path  # one disk: a rename is enough
        aside.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 1 MiB, where this user may mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def one_line(error: Exception) -> str:
    return console._one_line(error)


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(tiny_disk):
    """State, result, jsonl, log and JSON in turn: file and disk are named, then space is made."""
    out, constants = tiny_disk / "out", {"LR": 0.1}
    state = {"w": torch.ones(50_000)}  # 0.2 MB
    save_state(out, 5, state, constants)
    appender = JsonlAppender(out / "pseudo.jsonl", {})
    appender.append({"id": 0})
    save_folder(out, {"model.safetensors": {"w": torch.ones(5)}}, {"config.json": {"stage": "cir"}})
    filler = tiny_disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    filler.write_bytes(bytes(filler.stat().st_size - 40_960))  # ten pages are left

    def write_until_full() -> None:
        for i in range(10_000):
            appender.append({"id": i, "text": "x" * 1000})

    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.suffix != ".jsonl"}
    for path, write in [
        ("last/step-10.tmp/state.pt", lambda: save_state(out, 10, {"w": torch.full((50_000,), 2.0)}, constants)),
        ("out.tmp/model.safetensors", lambda: save_folder(out, {"model.safetensors": {"w": torch.ones(50_000)}}, {})),
        ("found.json", lambda: write_json(out / "found.json", ["x" * 90_000])),
        ("cache.safetensors", lambda: write_tensors(out / "cache.safetensors", {"w": torch.ones(50_000)})),
        ("pseudo.jsonl", write_until_full),
    ]:
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        text = one_line(caught.value)
        assert text.startswith("No space left on device: ") and path in text, text
        assert f"disk mounted at {tiny_disk}, 0.0 of 0.0 GB free" in text and "same command" in text
        assert {p: p.read_bytes() for p in before} == before
    assert not list(tiny_disk.rglob("*.tmp"))
    filler.unlink()
    step, found = load_state(out, constants)
    assert step == 5 and found["w"][0] == 1
    save_state(out, 10, {"w": torch.full((50_000,), 2.0)}, constants)
    save_folder(out, {"model.safetensors": {"w": torch.full((50_000,), 2.0)}}, {"config.json": {"stage": "cir"}})
    again = JsonlAppender(out / "pseudo.jsonl", {})
    assert [r["id"] for r in again.done] == [0, *range(len(again.done) - 1)] and len(again.done) > 10
    again.append({"id": "last"})
    assert load_state(out, constants)[1]["w"][0] == 2 and load_tensors(out, "model.safetensors")["w"][0] == 2


def test_a_failed_write_is_named_where_no_disk_can_be_mounted(tmp_path, monkeypatch):
    """The same through the functions that fail, one after the other."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = torch.save

    def save(value, file):
        monkeypatch.setattr(file, "file", type("Full", (), {"write": full})())
        real(value, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left") as caught:
        save_state(tmp_path, 5, {"w": torch.ones(3)}, {})
    assert "step-5.tmp/state.pt (disk mounted at /" in one_line(caught.value)
    assert os.listdir(tmp_path / "last") == []
    monkeypatch.undo()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError) as caught:
        files.append_line(tmp_path / "a.jsonl", {})
    assert str(tmp_path / "a.jsonl") in one_line(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a.txt", "text")
    assert str(tmp_path / "a.txt") in one_line(caught.value)


# ---- JSON: bounded memory ----


@pytest.mark.parametrize(
    "data",
    [b"[" + b"[]," * 17_000_000 + b"[]]", b"[" + b"{}," * 10_000_000 + b"{}]", b"[" + b"1," * 30_000_000 + b"1]"],
    ids=["lists", "dicts", "numbers"],
)
def test_json_of_many_small_things_is_refused_before_it_fills_memory(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    before = peak_bytes()
    with pytest.raises(UserError, match="would take about .* GB of memory"):
        read_json(path)
    path.write_bytes(b'{"a":' + data + b"}\n")
    with pytest.raises(UserError, match="would take about .* GB of memory"):
        read_jsonl(path)
    assert peak_bytes() - before < 4 * len(data)


def peak_bytes() -> int:
    """The most that this process ever held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_estimate_of_memory_is_near_what_json_takes():
    """Kept by tracemalloc's own count: within a factor of 2.5 below and above for what annotation files hold."""
    import tracemalloc

    caption = {"id": "GCC_train_1234", "image": "GCC_train_1234.jpg", "conversations": [{"from": "gpt", "value": "a"}]}
    pair = {"reference": "images/a1.jpg", "target": "images/b1.jpg", "delta": "is red", "score": 0.25}
    kinds = [[caption] * 9000, [pair] * 20_000, [["a-name.png", "b-name.png"]] * 30_000, [[]] * 100_000]
    for value in kinds:
        data = json.dumps(value).encode()
        tracemalloc.start()
        kept = files._parse(data, "x")
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept == value and 0.4 < files._memory(data) / taken < 2.5


def test_small_files_have_a_small_limit(tmp_path):
    out = tmp_path / "out"
    save_folder(out, {"a.safetensors": {"a": torch.ones(2)}}, {"config.json": {}})
    (out / "manifest.json").write_bytes(b" " * (files.SMALL_JSON + 1))
    with pytest.raises(UserError, match="more than the limit of 16,777,216"):
        load_tensors(out, "a.safetensors")


@pytest.mark.parametrize("text", ['["\\ud83d"]', '{"a": "x \\uDE00 y"}', '["\\ude00\\ud83d"]'])
def test_half_a_character_is_refused_when_read(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="half a character"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('["\\ud83d\\ude00", "\\\\ud83d"]')
    assert read_json(tmp_path / "a.json") == ["\U0001f600", "\\ud83d"]
    with pytest.raises(UserError, match="is not Unicode"):
        write_text(tmp_path / "b.txt", os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(UserError, match="is not Unicode"):
        files.append_line(tmp_path / "b.jsonl", {"name": os.fsdecode(b"caf\xe9.jpg")})
    assert os.listdir(tmp_path) == ["a.json"]


# ---- what is no file ----


def test_pipes_devices_and_endless_files_do_not_hang(tmp_path):
    save_state(tmp_path, 5, {"w": torch.ones(2)}, {})
    save_state(tmp_path, 6, {"w": torch.ones(2)}, {})
    state = tmp_path / "last" / "step-6" / "state.pt"
    with within_seconds(10):
        state.unlink()
        os.mkfifo(state)
        assert load_state(tmp_path, {})[0] == 5
        with pytest.raises(UserError, match="not a regular file"):
            file_sha256(state)
        with pytest.raises(UserError, match="not a regular file"):
            file_sha256("/dev/zero")
        with pytest.raises(UserError, match="not a regular file"):
            file_sha256(tmp_path)
        os.mkfifo(tmp_path / "a.jsonl")
        with pytest.raises(UserError, match="not a regular file"):
            JsonlAppender(tmp_path / "a.jsonl", {})
        state.unlink()
        with open(state, "wb") as file:
            file.truncate(1 << 37)  # 128 GB of nothing: its size alone says that it is another
        assert load_state(tmp_path, {})[0] == 5
        with pytest.raises(UserError, match="more than the limit of 1,000"):
            file_sha256(state, limit=1000)
        os.truncate(state, 1 << 40)
        with pytest.raises(UserError, match="1,099,511,627,776 bytes, more than the limit"):
            file_sha256(state)
    (tmp_path / "real").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "real")  # a data set's links are followed
    assert file_sha256(tmp_path / "link")[:8] == "ba7816bf"


# ---- another machine, another stage ----


def test_a_resume_elsewhere_is_said(tmp_path, monkeypatch, capsys):
    save_state(tmp_path, 5, {"w": torch.ones(2)}, {})
    assert load_state(tmp_path, {})[0] == 5 and capsys.readouterr().err == ""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_state(tmp_path, {})[0] == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"threads: {threads} there, {threads + 1} now" in said
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
    assert load_state(tmp_path, {})[0] == 5 and "now" in capsys.readouterr().err
    monkeypatch.undo()
    machine = files._machine
    monkeypatch.setattr(files, "_machine", dict)  # a checkpoint of before: nothing to compare
    save_state(tmp_path, 6, {"w": torch.ones(2)}, {})
    monkeypatch.setattr(files, "_machine", machine)
    assert load_state(tmp_path, {})[0] == 6 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "file, stage",
    [
        ("vdg_align", "align"),
        ("vdg_tune", "tune"),
        ("mine_pairs", "mine"),
        ("gen_deltas", "deltas"),
        ("train_cir", "cir"),
    ],
)
def test_every_stage_says_which_it_is_before_it_writes(file, stage):
    """The one call that makes OUT names the stage, so that the check below is made."""
    calls = [node for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())) if isinstance(node, ast.Call)]
    locks = [call for call in calls if "lock_folder" in ast.unparse(call.func)]
    assert [ast.unparse(call.args[1]) for call in locks if len(call.args) > 1] == [repr(stage)] and len(locks) == 1


def test_the_result_of_another_stage_is_not_overwritten(tmp_path):
    save_folder(tmp_path / "out", {}, {"config.json": {"stage": "align"}})
    for stage in ("tune", "cir", "mine"):
        with pytest.raises(UserError, match=f"holds what stage 'align' wrote, this is '{stage}'; use another --out"):
            lock_folder(tmp_path / "out", stage)
    assert not (tmp_path / "out" / ".lock").exists()
    lock_folder(tmp_path / "out", "align")
    files._locks.pop((tmp_path / "out").resolve()).close()
    lock_folder(tmp_path / "new", "tune")
    files._locks.pop((tmp_path / "new").resolve()).close()


SPEAKS = """
import sys, time
from common import console
def main():
    for i in console.progress(range(4), "steps") if "bar" in sys.argv else range(4):
        console.say("line", i, "x" * 9000)
        time.sleep(0.05)
    console.warn("nearly done")
    open(sys.argv[1], "w").write("whole")
    if "wrong" in sys.argv:
        raise console.UserError("no such thing")
console.QUIET = 0
console.run(main)
"""


@pytest.mark.parametrize("where", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", "| true", "2>&1 | true"])
@pytest.mark.parametrize("more", ["", "bar", "wrong"])
def test_a_run_goes_on_where_nobody_reads(tmp_path, where, more):
    """Output closed, on a full disk, or into a pipe whose reader left: days of work do not hang on a line of text."""
    command = f'set -o pipefail; "{sys.executable}" -c "$PROGRAM" {tmp_path / "done"} {more} {where}'
    environment = os.environ | {"PROGRAM": SPEAKS, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "done").read_text() == "whole"
    assert done.returncode == (1 if more == "wrong" else 0) and "Traceback" not in done.stdout + done.stderr
    if where in (">/dev/full", "| true"):
        assert "WARNING: standard output takes no more (" in done.stderr and done.stderr.count("takes no more") == 1
    if where == ">&-":
        assert "WARNING: nearly done" in done.stderr and ("error: no such thing" in done.stderr) == (more == "wrong")


def test_help_may_be_read_in_part(tmp_path):
    command = f'set -o pipefail; "{sys.executable}" {ROOT / "eval_cir.py"} --help | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
