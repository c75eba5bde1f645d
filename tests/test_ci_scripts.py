"""The scripts that are run by hand or by CI: what they refuse, and that their parts run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
    }
    env["PYTHONPATH"] = str(ROOT / "python")
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only where there is no GPU")
def test_gpu_says_that_there_is_none():
    done = run(".ci/gpu.py")
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [(["--minutes", "0"], "is no time"), (["--launch", "x"], "invalid choice: 'x'")],
)
def test_gpu_refuses_bad_input(arguments: list[str], said: str):
    done = run(".ci/gpu.py", *arguments)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_gpu_launches_an_op():
    done = run(".ci/gpu.py", "--launch", "rope")
    assert done.returncode == 0, done.stderr


def test_the_benchmarks_run_under_pytest():
    case = "rms_norm and decode and float32 and not bfloat16"
    done = run("-m", "pytest", "-q", "benchmarks", "-k", case, "--benchmark-disable")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
