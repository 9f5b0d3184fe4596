"""How every bench measures: contestants interleaved in processes of their own, one table, one file of results.

    import measure  # `python bench/X.py` puts bench/ on the path, and measure the repository
    device = measure.arguments(__doc__).device
    rows = [measure.row("mining: ours", "N=20000 D=2048 k=20", device, seconds, "s", floor=floor_seconds)]
    measure.publish(rows)                           # prints the table, appends to bench/results.csv

On a machine that others use as well, OMP_NUM_THREADS=1 BENCH_CLOCK=cpu counts the CPU seconds of one thread instead of
wall time; the rows say so. Nothing here imports torch at the top: a peer's venv has none.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = Path(os.environ.get("BENCH_RESULTS", ROOT / "bench/results.csv"))
CPU_SECONDS = os.environ.get("BENCH_CLOCK") == "cpu"
COLUMNS = "what sizes device torch triton commit date value unit floor percent_of_floor note".split()


def arguments(doc: str, **flags) -> argparse.Namespace:
    """--device (cpu or cuda), and one flag for each further argument, whose value is the default."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, default in flags.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    found = parser.parse_args()
    if found.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit("--device cuda: no GPU found")
    return found


# ---- time ----


def clock(fn, device: str = "cpu", calls: int = 1) -> float:
    """Seconds per call of fn, the GPU's queue empty before and after."""
    now = time.process_time if CPU_SECONDS and device == "cpu" else time.perf_counter
    wait = (lambda: None) if device == "cpu" else __import__("torch").cuda.synchronize
    wait()
    start = now()
    for _ in range(calls):
        fn()
    wait()
    return (now() - start) / calls


def interleave(contestants: dict, repeats: int, warm_up: bool = True) -> dict[str, list[float]]:
    """contestants: name -> function that runs once and returns its seconds -> the seconds of each, round by round.

    One unmeasured round first, unless all are warm. The order turns by one each round, so that no one always follows
    the same neighbour."""
    names, seconds = list(contestants), {name: [] for name in contestants}
    for turn in range(0 if warm_up else 1, repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = contestants[name]()
            if turn:
                seconds[name].append(took)
            time.sleep(0.2)  # OpenMP threads spin for a while after their last job
    return seconds


def ratio(of: list[float], to: list[float]) -> tuple[float, str]:
    """Median of the ratios of two contestants, round by round, and a note with their spread."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    return statistics.median(
        ratios
    ), f"{min(ratios):.2f}-{max(ratios):.2f} in {len(ratios)} rounds" + ", CPU seconds" * CPU_SECONDS


def profile(title: str, fn, most: int = 14) -> None:
    """Prints where one call of fn spends the GPU's time: kernels by their total milliseconds, and how many ran."""
    import torch
    from torch.profiler import ProfilerActivity

    fn()
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        fn()
        torch.cuda.synchronize()
    wall = (time.perf_counter() - began) * 1e3
    kernels = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    count = sum(event.count for event in kernels if event.self_device_time_total)
    print(f"{title}: {busy:.2f} ms of the GPU in {count} kernels and copies ({wall:.1f} ms with the profiler)")
    for event in kernels[:most]:
        print(f"  {event.self_device_time_total / 1e3:9.3f} ms  {event.count:6} x  {event.key[:110]}")
    sys.stdout.flush()


def peak_bytes(fn, device: str = "cpu") -> int:
    """Most memory in use while fn runs, above what was in use before (resident memory of this process on CPU).

    Call it first thing in a fresh process: memory that an earlier run left with the allocator does not count."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = _resident("VmRSS")
    fn()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# ---- contestants in processes of their own (the OpenMP runtimes of two libraries in one process clash) ----


class Contestant:
    """`python SCRIPT ARGS` in a process whose script ends in serve(); calling it runs it once -> its answer."""

    def __init__(self, *args: str, python: str = sys.executable, env: dict | None = None):
        env = os.environ | {"MKL_DYNAMIC": "FALSE"} | (env or {})
        env = {name: value for name, value in env.items() if value is not None}  # None unsets
        self.process = subprocess.Popen(
            [python, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.ready = self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with status {self.process.wait()}")
        return json.loads(line)

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(fn, ready=None, device: str = "cpu") -> None:
    """Runs fn once per line of stdin and prints its seconds; `ready` is printed first. fn must print nothing."""
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        print(json.dumps(clock(fn, device)), flush=True)


def venv(name: str, *packages: str) -> str:
    """The python of out/venv-NAME, which holds `packages` (pip's way of naming them) and nothing of ours."""
    folder = ROOT / f"out/venv-{name}"
    python, done = folder / "bin/python", folder / "packages.json"
    if not done.exists() or json.loads(done.read_text()) != list(packages):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *packages], check=True)
        done.write_text(json.dumps(packages))
    return str(python)


# ---- results ----


def device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """Short hash of HEAD, with + if a tracked file other than the results differs from it; BENCH_COMMIT where a copy
    of the tree has no history."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!bench/results.csv"]).returncode
    return head + "+" * bool(changed) if head else ""


def row(
    what: str, sizes: str, device: str, value: float, unit: str, floor: float | None = None, note: str = ""
) -> dict:
    """A result. floor: the same quantity at the limit of the hardware, in `unit`; percent_of_floor is 100 at the limit,
    whether `unit` is better low (s, MiB) or better high (anything per second: .../s)."""
    import torch

    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = ""
    note += "; CPU seconds" * (CPU_SECONDS and device == "cpu" and unit == "s")
    percent = "" if not floor else round(100 * (value / floor if unit.endswith("/s") else floor / value), 1)
    cells = [what, sizes, device_name(device), torch.__version__, triton, _commit(), date.today().isoformat()]
    cells += [f"{value:.4g}", unit, f"{floor:.4g}" if floor else "", percent, note.removeprefix("; ")]
    return dict(zip(COLUMNS, cells, strict=True))


def pace_rows(what: str, sizes: str, device: str, pace: dict[str, list[float]], unit: str, floor: float) -> list[dict]:
    """A row for each contestant, its middle pace; pace: name -> the pace of each round."""
    middle = {name: sorted(values)[len(values) // 2] for name, values in pace.items()}
    return [row(f"{what}: {name}", sizes, device, value, unit, floor) for name, value in middle.items()]


def publish(rows: list[dict]) -> None:
    """Prints the rows as a table and appends them to bench/results.csv, or to the file BENCH_RESULTS names."""
    shown = ["what", "sizes", "value", "unit", "floor", "percent_of_floor", "note"]
    cells = [shown] + [[str(row[name]) for name in shown] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(shown))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(f"on {rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}, {rows[0]['date']}")
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
