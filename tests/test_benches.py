"""The bench programs that bench/gpu.sh does not rehearse still run, at small sizes: each compares its answers first."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def bench(tmp_path: Path, line: str) -> tuple[str, list[dict]]:
    """What a program prints, and the rows that it adds to the results."""
    results = tmp_path / "results.csv"
    environment = os.environ | {"BENCH_RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    program, *flags = line.split()
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / program, *flags],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, list(csv.DictReader(results.open())) if results.exists() else []


@pytest.mark.parametrize(
    "line, measured",
    [
        ("loading.py --shape tiny", 1),  # NF4: peak
        ("pictures.py --count 4 --rounds 1", 3),  # plain, augmented, decoding alone
        ("reversed.py --b 24 --d 16 --p 24 --h 32 --peer_b 8", 4),  # seconds and memory of two forms
        ("search.py --n 2000 --width 32 --rounds 2", 2),  # seconds, memory
    ],
)
def test_a_bench_measures(tmp_path, line, measured):
    _, rows = bench(tmp_path, line)
    rows = [row for row in rows if "torchvision" not in row["what"]]  # which need not be there
    assert len(rows) == measured
    assert all(math.isfinite(float(row["value"])) and float(row["value"]) > 0 for row in rows)
    assert all(row["commit"] and row["date"] and row["device"] for row in rows)


def test_mining_in_a_quarter_of_the_memory(tmp_path):
    said, _ = bench(tmp_path, "mining_memory.py --pictures 60000 --width 256 --rows 500 --columns 10000 --anchors 500")
    assert "the same bytes" in said
