"""Runs tests/triton_kernels.py in Triton's interpreter, in a process of its own: Triton reads the variable once."""

import os
import subprocess
import sys

from conftest import ROOT


def test_kernels_in_the_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-x", "tests/triton_kernels.py"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
