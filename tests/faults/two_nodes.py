"""Two machines equal one: every stage by torchrun over two network namespaces, each with its own loopback and address.

    sudo python tests/faults/two_nodes.py                  # prints a table; exit status 1 where a byte differs
    sudo python tests/faults/two_nodes.py --kinds mining,blip_tdm

Of each kind a run with two ranks on one node, and one with a rank on each of two nodes (torchrun --nnodes 2), which see
each other through a veth pair alone; the last bytes are compared. The nodes share a disk. Of the kinds in KILLED the
second node is killed in the middle as well: the first must end by itself, and the same command must then end with the
same bytes. Models and data are tiny and drawn (soak.py); making namespaces needs root and iproute2.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from soak import ROOT, Kind, build, file_of, words_of

KINDS = ("align", "tune", "combiner", "blip_tdm", "generation", "mining")
KILLED = ("blip_tdm", "align")  # kinds of which a node dies
PORT, PATIENCE = 29511, 300  # of torchrun's meeting; seconds until a run must have ended
STARTED: list[subprocess.Popen] = []  # every torchrun, so that none outlives this
NODES = {"vdg-a": "10.77.0.1", "vdg-b": "10.77.0.2"}  # namespace -> address


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def make_nodes() -> None:
    drop_nodes()
    for name in NODES:
        ip("netns", "add", name)
    ip("link", "add", "vdg0", "netns", "vdg-a", "type", "veth", "peer", "name", "vdg0", "netns", "vdg-b")
    for name, address in NODES.items():
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "vdg0")
        for device in ("lo", "vdg0"):
            ip("-n", name, "link", "set", device, "up")


def drop_nodes() -> None:
    for name in NODES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def started(kind: Kind, out: Path, node: int | None) -> subprocess.Popen:
    """A torchrun: both ranks here, or the one of a node."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if node is None:
        words = [*torchrun, "--standalone", "--nproc_per_node", "2"]
    else:
        meeting = ["--master_addr", NODES["vdg-a"], "--master_port", str(PORT)]
        words = [
            "ip",
            "netns",
            "exec",
            list(NODES)[node],
            *torchrun,
            "--nnodes",
            "2",
            "--node_rank",
            str(node),
            *meeting,
        ]
        environment |= {"GLOO_SOCKET_IFNAME": "vdg0"}
    log = open(f"{out}-{'here' if node is None else node}.log", "a")
    words += [str(ROOT / f"{kind.stage}.py"), *words_of(kind, out, {})]
    STARTED.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True))
    return STARTED[-1]


def finished(runs: list[subprocess.Popen], out: Path) -> None:
    for run in runs:
        try:
            code = run.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = f"none within {PATIENCE} s"
        if code:
            logs = "".join(path.read_text(errors="replace")[-1500:] for path in out.parent.glob(f"{out.name}-*.log"))
            sys.exit(f"{out.name}: exit status {code}\n{logs}")


def killed(kind: Kind, out: Path) -> float:
    """Both nodes started, the second killed after some steps -> seconds until the first has ended."""
    runs = [started(kind, out, node) for node in (0, 1)]
    log, until = out / "log.jsonl", time.monotonic() + PATIENCE
    while not (log.exists() and log.read_text().count("\n") >= 2):
        if time.monotonic() > until or runs[0].poll() is not None:
            sys.exit(f"{out.name}: no step was made before the kill")
        time.sleep(0.05)
    pids = subprocess.run(["ip", "netns", "pids", "vdg-b"], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-9", *pids])
    at = time.monotonic()
    for run in runs:
        run.wait(PATIENCE)
    if not runs[0].returncode:
        sys.exit(f"{out.name}: the first node ended well, though the second was killed")
    return time.monotonic() - at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default all)")
    chosen, different = parser.parse_args().kinds.split(","), 0
    if unknown := set(chosen) - set(KINDS):
        parser.error(f"--kinds {', '.join(unknown)}: of {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="vdg-nodes-") as folder:
        root = Path(folder)
        kinds = build(root)
        make_nodes()
        try:
            print(f"{'run':12} {'two nodes':14} a node killed: first ended after, then")
            for name in chosen:
                kind = kinds[name]
                one, two, again = (root / f"{name}-{how}" for how in ("one", "two", "again"))
                finished([started(kind, one, None)], one)
                finished([started(kind, two, node) for node in (0, 1)], two)
                results = {two: "", again: ""}
                seconds = killed(kind, again) if name in KILLED else None
                if seconds is not None:
                    finished([started(kind, again, node) for node in (0, 1)], again)
                for out in results if seconds is not None else (two,):
                    same = all(file_of(one, f).read_bytes() == file_of(out, f).read_bytes() for f in kind.results)
                    results[out], different = "the same bytes" if same else "OTHER BYTES", different + (not same)
                after = f"{seconds:.1f} s, {results[again]}" if seconds is not None else ""
                print(f"{name:12} {results[two]:14} {after}", flush=True)
        finally:
            for run in STARTED:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
            drop_nodes()
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
