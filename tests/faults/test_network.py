"""No stage reaches for a network: all of them and search.py, run as from a shell under strace on tiny models and data.

HF_HUB_OFFLINE is taken out of their environment: it is the stages that must not ask the hub. What counts is the system
call: a socket of AF_INET or AF_INET6, made at all. Only search.py's page may make one, and binds it to 127.0.0.1."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from test_train_cir import world  # noqa: F401
from test_vdg_align import chat

ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')


def traces_of(folder: Path) -> bool:
    """Whether there is strace, and it may trace: a container can forbid it."""
    command = ["strace", "-f", "-o", folder / "probe", "true"]
    return bool(shutil.which("strace")) and subprocess.run(command, capture_output=True).returncode == 0


def started(log: Path, words: list) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = ["strace", "-f", "-qq", "-e", "trace=network", "-o", log, sys.executable, *words]
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent / "no hub")}
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def traced(log: Path, *words) -> list[str]:
    """A command to its end -> the lines of its calls that name the internet."""
    process = started(log, words)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-2000:]
    return calls_of(log)


def calls_of(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "AF_INET" in line]


def flags(**given) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def logs(tmp_path) -> Path:
    if not traces_of(tmp_path):
        pytest.skip("needs strace, and leave to trace: apt-get install strace")
    return tmp_path


def test_the_check_sees_a_socket(logs):
    assert traced(logs / "none", "-c", "import socket; socket.socketpair()") == []
    assert traced(logs / "four", "-c", "import socket; socket.socket()")
    assert traced(logs / "six", "-c", "import socket; socket.socket(socket.AF_INET6)")
    assert traced(logs / "name", "-c", "import socket\ntry: socket.getaddrinfo('example.org', 80)\nexcept OSError: 0")


def test_six_stages_make_no_socket(logs, zoo, world):  # noqa: F811
    """Training, mining, generation, and the evaluation of what was trained."""
    here, cpu = logs, {"device": "cpu", "workers": 1}
    chat(here / "chat", 4)
    one = cpu | {"batch": 4}
    cirr = {"root": world / "cirr", "images": world / "img_raw"}
    captions = {"chat": here / "chat/chat.json", "images": here / "chat/images"}
    models = {"vision": zoo / "instructblip", "llm": zoo / "llama"}
    pairs = {"pairs": here / "mined/pairs.jsonl", "images": world / "aux"}
    pseudo = {"pseudo": here / "pseudo/pseudo.jsonl", "pseudo_images": world / "aux"}
    mining = {"images": world / "aux", "encoder": zoo / "resnet", "max_score": 0.9999, "min_gap": 0.0001}
    commands = {
        "vdg_align": one | models | captions | {"out": here / "aligned"},
        "vdg_tune": one | cirr | {"aligned": here / "aligned", "lora_rank": 2, "epochs": 1, "out": here / "vdg"},
        "mine_pairs": one | mining | {"out": here / "mined"},
        "gen_deltas": one | pairs | {"vdg": here / "vdg", "max_new": 4, "out": here / "pseudo"},
        "train_cir": one
        | cirr
        | pseudo
        | {"model": "blip_tdm", "backbone": zoo / "blip", "steps": 2, "out": here / "cir"},
        "eval_cir": one | cirr | {"checkpoint": here / "cir", "official": False, "out": here / "eval"},
    }
    for stage, given in commands.items():
        assert traced(here / f"{stage}.strace", f"{stage}.py", *flags(**given)) == [], stage
    assert (here / "eval/metrics.json").exists()


def test_the_page_listens_at_home_and_calls_nobody(logs, zoo, world):  # noqa: F811
    pytest.importorskip("uvicorn", reason="the page needs requirements-search.txt")
    given = {"backbone": zoo / "clip", "gallery": world / "aux", "out": logs / "site", "port": 0, "device": "cpu"}
    process = started(logs / "page", ["search.py", *flags(**given)])
    address = ""
    for line in process.stdout:
        if address := "".join(re.findall(r"http://\S+", line)):
            break
    assert address.startswith("http://127.0.0.1:")
    assert b"<title>" in urllib.request.urlopen(address, timeout=60).read()
    (python,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(python), signal.SIGINT)
    process.communicate(timeout=60)
    calls = calls_of(logs / "page")
    assert len([line for line in calls if " socket(" in line]) == 1 and not [
        line for line in calls if " connect(" in line
    ]
    found = {"".join(pair) for line in calls for pair in ADDRESS.findall(line)}
    assert found == {"127.0.0.1"}, found
