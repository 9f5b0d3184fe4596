"""common/files.py: strict JSON, jsonl that goes on, checkpoints under kills and bit flips, the lock of a folder."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.console import UserError
from common.files import (
    JSON_LIMIT,
    JsonlAppender,
    _locks,
    _write_manifest,
    load_state,
    load_tensors,
    lock_folder,
    read_csv,
    read_json,
    read_jsonl,
    save_folder,
    save_state,
    whole,
    write_json,
    write_text,
)

ROOT = Path(__file__).parent.parent


def test_write_text_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"text": "snow\u2028man"}, indent=2)
    assert read_json(path) == {"text": "snow\u2028man"}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "half")
    monkeypatch.undo()
    assert read_json(path) == {"text": "snow\u2028man"}
    write_text(path, "{}")  # over the stray .tmp
    assert [p.name for p in path.parent.iterdir()] == ["a.json"] and path.read_text() == "{}"


def test_whole_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "deep" / "a.bin"
    with whole(path) as aside:
        aside.write_bytes(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), whole(path) as aside:
        aside.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999 is not JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        (b'{"a": 1,\n "b"', "line 2, column 5"),
        (b"", "line 1, column 1"),
        (b"[1] [2]", "Extra data"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "not usable JSON"),
        (b"9" * 5000, "not usable JSON"),
        (b" " * 300, "300 bytes, more than the limit of 256"),
    ],
)
def test_read_json_is_strict(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_json(path, limit=256 if b"  " in data else JSON_LIMIT)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_read_json_wants_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "."):
        with pytest.raises(UserError, match="not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text",
    [
        'a,b\n1,"x, y"\n\n2,"say ""z"""\n',
        '\ufeffa;b\r\n1;x, y\r\n2;"say ""z"""\r\n',  # as Excel writes it where a comma is decimal
        'a\tb\n1\tx, y\n2\t"say ""z"""',
    ],
)
def test_read_csv(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert read_csv(tmp_path / "a.csv") == [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'say "z"'}]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"a,b\n1,x, y\n", "line 2: wanted 2 fields; a text that holds ','"),
        (b"a,b\n1\n", "line 2: wanted 2 fields"),
        (b"a,b\n1,\xe9\n", "byte 6 is not UTF-8"),
        (b'a,b\n1,"x\n', "line 2: unexpected end"),
        (b"a,a\n1,2\n", "names a column twice"),
    ],
)
def test_a_wrong_table_stops(tmp_path, data, words):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_csv(tmp_path / "a.csv")


def test_read_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"a": "x\u2028y\u0085z"}\n\n{"a": 2}\r\n{"a": 3}'.encode())
    assert read_jsonl(path) == [{"a": "x\u2028y\u0085z"}, {"a": 2}, {"a": 3}]
    for bad, message in [(b'{"a": 1}\n{"a": \n', "line 2: not JSON"), (b"[1]\n", "line 1: wanted a JSON object")]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=message):
            read_jsonl(path)


# ---- jsonl that is appended to ----


def test_appender_cuts_torn_tails_and_goes_on(tmp_path, capsys):
    path = tmp_path / "parts" / "pseudo.jsonl"
    records = [{"id": 0, "delta": "is\u2028red"}, {"id": 1, "delta": 'a "quoted"\nline'}]
    appender = JsonlAppender(path, {"seed": (1, 2)})
    assert appender.done == []
    for record in records:
        appender.append(record)
    whole = path.read_bytes()
    third = '{"id": 2, "delta": "ünfinished\u2028"}\n'.encode()
    for cut in range(len(third)):  # every place a kill can tear the line, in the middle of a character too
        path.write_bytes(whole + third[:cut])
        again = JsonlAppender(path, {"seed": [1, 2]})
        assert again.done == records and path.read_bytes() == whole
        assert ("cut" in capsys.readouterr().err) == (cut > 0)
    for tail in (b"\0" * 700 + b"\n", b"[1]\n{\n", b'{"id": NaN}\n'):  # a power cut leaves zeros
        path.write_bytes(whole + tail)
        assert JsonlAppender(path, {"seed": [1, 2]}).done == records and path.read_bytes() == whole
    path.write_bytes(b"{\n" + whole)  # damage that no kill makes
    with pytest.raises(UserError, match="line 1"):
        JsonlAppender(path, {"seed": [1, 2]})


def test_appender_refuses_another_fingerprint(tmp_path):
    path = tmp_path / "a.jsonl"
    JsonlAppender(path, {"adapter": "x", "seed": 1})
    appender = JsonlAppender(path, {"adapter": "y", "seed": 1})  # nothing was written yet
    appender.append({"id": 0})
    with pytest.raises(UserError, match='adapter: "y" there, "z" now'):
        JsonlAppender(path, {"adapter": "z", "seed": 1})
    assert read_jsonl(path) == [{"id": 0}]
    Path(f"{path}.meta.json").unlink()
    with pytest.raises(UserError, match="absent there"):
        JsonlAppender(path, {"adapter": "y", "seed": 1})


def test_append_on_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    appender = JsonlAppender(tmp_path / "a.jsonl", {})
    appender.append({"id": 0})
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))  # what a full disk does
    with pytest.raises(OSError, match="No space left"):
        appender.append({"id": 1})
    assert appender.path.read_bytes() == b'{"id": 0}\n'


# ---- checkpoints ----

CONSTANTS = {"LR": 0.1, "SCALE": (0.8, 1.0), "DEVICE": "cpu"}


def state_of(step: int) -> dict:
    values = torch.arange(200.0) + step
    return {"weights": {"w": values}, "optimiser": {"state": {0: {"exp_avg": values * 2}}}, "best": 0.5}


def holds(found, step: int) -> bool:
    return found[0] == step and torch.equal(found[1]["weights"]["w"], state_of(step)["weights"]["w"])


def names(out) -> list[str]:
    return sorted(p.name for p in (out / "last").iterdir())


def test_state_round_trip_and_two_are_kept(tmp_path):
    assert load_state(tmp_path, CONSTANTS) is None
    for step in (5, 10, 100):
        save_state(tmp_path, step, state_of(step), CONSTANTS)
    assert names(tmp_path) == ["step-10", "step-100"]
    step, state = load_state(tmp_path, CONSTANTS)
    assert holds((step, state), 100) and state["optimiser"]["state"][0]["exp_avg"][3] == 206
    save_state(tmp_path, 100, state_of(100), CONSTANTS)  # the last step of a run that is repeated
    assert names(tmp_path) == ["step-10", "step-100"]


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    events = []

    def watch(name, show):
        real = getattr(os, name)

        def call(*args, **more):
            events.append((name, show(*args)))
            return real(*args, **more)

        monkeypatch.setattr(os, name, call)

    watch("fsync", lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name)
    for name in ("rename", "replace"):
        watch(name, lambda source, target: Path(target).name)
    save_state(tmp_path, 5, state_of(5), CONSTANTS)
    place = {event: index for index, event in enumerate(events)}
    order = ["fsync state.pt", "replace manifest.json", "fsync step-5.tmp", "rename step-5", "fsync last"]
    places = [place[tuple(event.split())] for event in order]
    assert places == sorted(places) and place["fsync", "manifest.json.tmp"] < place["replace", "manifest.json"]
    events.clear()
    write_text(tmp_path / "a.txt", "text")
    assert events == [("fsync", "a.txt.tmp"), ("replace", "a.txt"), ("fsync", tmp_path.name)]


def test_a_hash_that_a_run_of_before_did_not_keep_refuses_nothing(tmp_path):
    """What is there must be equal; from now on it is kept."""
    save_state(tmp_path, 1, {"x": 1}, {"LR": 1.0})
    assert load_state(tmp_path, {"LR": 1.0, "VALIDATION_SHA256": "a"})[0] == 1
    with pytest.raises(UserError, match="OTHER: absent there"):
        load_state(tmp_path, {"LR": 1.0, "OTHER": "a"})
    save_state(tmp_path, 2, {"x": 1}, {"LR": 1.0, "VALIDATION_SHA256": "b"})
    with pytest.raises(UserError, match="VALIDATION_SHA256: the data changed since"):
        load_state(tmp_path, {"LR": 1.0, "VALIDATION_SHA256": "a"})
    JsonlAppender(tmp_path / "a.jsonl", {"seed": 0}).append({"x": 1})
    assert JsonlAppender(tmp_path / "a.jsonl", {"seed": 0, "llm": "a"}).done == [{"x": 1}]
    for other in ({"seed": 0, "llm": "b"}, {"seed": 1, "llm": "a"}):
        with pytest.raises(UserError, match="other settings"):
            JsonlAppender(tmp_path / "a.jsonl", other)


def test_constants_differ(tmp_path):
    save_state(tmp_path, 5, state_of(5), CONSTANTS)
    assert holds(load_state(tmp_path, {**CONSTANTS, "DEVICE": "cuda"}), 5)
    with pytest.raises(UserError, match=r"other constants \(LR: 0.1 there, 0.2 now\)"):
        load_state(tmp_path, {**CONSTANTS, "LR": 0.2})
    with pytest.raises(UserError, match="NEW: absent there, 1 now"):
        load_state(tmp_path, {**CONSTANTS, "NEW": 1})
    assert holds(load_state(tmp_path, {**CONSTANTS, "NEW": 1}, may_change={"NEW"}), 5)


def test_every_flipped_bit_is_seen(tmp_path, capsys):
    for step in (5, 10):
        save_state(tmp_path, step, state_of(step), CONSTANTS)
    folder = tmp_path / "last" / "step-10"
    draw = random.Random(0)
    for name, count in (("state.pt", 30), ("manifest.json", 60)):
        whole = (folder / name).read_bytes()
        for _ in range(count):
            bit = draw.randrange(8 * len(whole))
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(data)
            found = load_state(tmp_path, CONSTANTS)
            loud = "does not verify" in capsys.readouterr().err
            # a flip in the manifest's white space or in an unread key may be harmless: then nothing is lost
            assert holds(found, 5) and loud or name == "manifest.json" and holds(found, 10)
        (folder / name).write_bytes(whole)
    assert holds(load_state(tmp_path, CONSTANTS), 10)


def test_damaged_checkpoints(tmp_path, capsys):
    for step in (5, 10):
        save_state(tmp_path, step, state_of(step), CONSTANTS)
    last = tmp_path / "last"
    state = last / "step-10" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    assert holds(load_state(tmp_path, CONSTANTS), 5) and "WARNING" in capsys.readouterr().err
    save_state(tmp_path, 8, state_of(8), CONSTANTS)  # the resumed run: the bad future goes, two good ones stay
    assert names(tmp_path) == ["step-5", "step-8"]
    (last / "step-9.tmp").mkdir()  # stray folders of killed saves
    (last / "step-9.tmp" / "state.pt").write_bytes(b"x")
    assert holds(load_state(tmp_path, CONSTANTS), 8)
    (last / "step-8" / "manifest.json").unlink()
    assert holds(load_state(tmp_path, CONSTANTS), 5)
    (last / "step-5" / "state.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* verifies"):
        load_state(tmp_path, CONSTANTS)
    save_state(tmp_path, 12, state_of(12), CONSTANTS)
    assert "step-9.tmp" not in names(tmp_path)


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    save_state(tmp_path, 5, state_of(5), CONSTANTS)
    folder = tmp_path / "last" / "step-5"
    torch.save({"step": 5, "constants": "{}", "state": Evil()}, folder / "state.pt")
    _write_manifest(folder, {"step": 5})
    with pytest.raises(UserError, match="not a training state"):
        load_state(tmp_path, CONSTANTS)
    assert not (tmp_path / "executed").exists()


def write_for_ever(out: Path, saved: int) -> None:
    """What a stage writes each time it saves, in a forked child until it is killed; a byte in the pipe for each."""
    torch.set_num_threads(1)  # OpenMP's thread pool does not survive a fork: the child would hang in its first tensor
    found = load_state(out, {})
    step = found[0] if found else 0
    while True:
        os.write(saved, b"x")
        step += 1
        save_state(out, step, {"w": torch.full((50_000,), float(step))}, {})
        tensors = {"model.safetensors": {"w": torch.full((9,), float(step))}}
        save_folder(out, tensors, {"config.json": {"step": step}})
        JsonlAppender(out / "a.jsonl", {}).append({"step": step, "text": "x" * 5000})


def test_kill_9_while_saving(tmp_path):
    out = tmp_path / "out"
    draw = random.Random(1)
    reached, kills, one = 0, 15, 0.05
    for _ in range(kills):
        wait, saved = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(out, saved)
            finally:
                os._exit(1)  # an error in the child: seen as its exit status below
        os.close(saved)
        # By what the child got done, not by the clock alone: a busy machine takes a hundred times as long to save.
        os.read(wait, 1)
        for _ in range(draw.randrange(3)):
            began = time.monotonic()
            os.read(wait, 1)
            one = time.monotonic() - began
        time.sleep(draw.random() * one)  # anywhere within the next save
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(wait)
        found = load_state(out, {})
        assert found is None or bool((found[1]["w"] == found[0]).all())
        assert found is None or found[0] >= reached
        reached = found[0] if found else 0
        if (out / "manifest.json").exists():
            try:  # the old result, the new one, or a word that it is neither; never a mixture
                result = load_tensors(out, "model.safetensors")["w"]
                assert result[0] == read_json(out / "config.json")["step"]
            except UserError as error:
                assert "damaged" in str(error) or "missing" in str(error)
    assert reached >= 8  # the draws above wait for so many saves; none was lost
    steps = {record["step"] for record in JsonlAppender(out / "a.jsonl", {}).done}
    assert len(set(range(1, reached)) - steps) <= kills  # a kill comes between the checkpoint and its line: one a kill


def test_save_folder(tmp_path):
    out = tmp_path / "model"
    for scale in (1.0, 2.0):  # a new folder, then over it
        tensors = {"adapter.safetensors": {"a": torch.eye(3).t() * scale, "b": torch.ones(2, dtype=torch.bfloat16)}}
        save_folder(out, tensors, {"config.json": {"scale": scale}, "README.md": "text"})
        (out / "log.jsonl").write_text("{}\n")
        assert torch.equal(load_tensors(out, "adapter.safetensors")["a"], torch.eye(3) * scale)
        assert read_json(out / "config.json") == {"scale": scale} and (out / "README.md").read_text() == "text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    path = out / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_tensors(out, "adapter.safetensors")
    (out / "manifest.json").unlink()  # a folder from elsewhere has none
    load_tensors(out, "adapter.safetensors")
    path.write_bytes(data[:-7])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_tensors(out, "adapter.safetensors")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_tensors(out, "adapter.safetensors")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("moves", range(4))
def test_a_half_replaced_folder_is_refused(tmp_path, monkeypatch, moves, old):
    def save(scale):
        tensors = {"a.safetensors": {"a": torch.full((3,), scale)}, "b.safetensors": {"b": torch.full((3,), scale)}}
        save_folder(tmp_path / "model", tensors, {"config.json": {"scale": scale}})

    class Killed(Exception):
        pass

    (tmp_path / "model").mkdir()  # a run's folder is there from its first line of log on
    if old:
        save(1.0)
    replace, left = os.replace, [moves]

    def killed_after_some(source, target):
        if Path(target).parent.name == "model":
            if not left[0]:
                raise Killed
            left[0] -= 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_after_some)
    with pytest.raises(Killed):
        save(2.0)
    monkeypatch.undo()
    if moves == 0 and old:  # nothing moved yet: the old result is whole
        assert load_tensors(tmp_path / "model", "b.safetensors")["b"][0] == 1
    else:
        with pytest.raises(UserError, match="damaged|missing"):
            load_tensors(tmp_path / "model", "b.safetensors")
    save(3.0)
    assert load_tensors(tmp_path / "model", "b.safetensors")["b"][0] == 3


def test_lock(tmp_path):
    out = tmp_path / "out"
    lock_folder(out)
    lock_folder(out)  # this process holds it already
    code = "from common.console import run\nfrom common.files import lock_folder\n"
    code += f"def main():\n    lock_folder({str(out)!r})\nrun(main)"
    again = [sys.executable, "-c", code]
    done = subprocess.run(again, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"in use by another run (process {os.getpid()})" in done.stderr
    _locks.pop(out.resolve()).close()
    assert subprocess.run(again, cwd=ROOT).returncode == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        lock_folder(tmp_path / "file")
