"""Runs tests/triton_kernels.py in Triton's interpreter, in a process of its own: Triton reads the variable once."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def run(*chosen):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-x", "tests/triton_kernels.py", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_kernels_in_the_interpreter():
    run("-k", "not taken_rows")


def test_taken_rows_in_the_interpreter():
    run("-k", "taken_rows")


@pytest.mark.parametrize("asked, left", [("", ""), ("1", "0")])
def test_tests_see_a_gpu_only_where_asked(asked, left):
    env = os.environ | {"VDG_TEST_GPU": asked, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", "import conftest, os; print(os.environ['CUDA_VISIBLE_DEVICES'], end='')"]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == left
