"""The scripts that are run by hand or by CI: what they refuse, and that their parts run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, **told: str) -> subprocess.CompletedProcess:
    env = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
    }
    env |= {"PYTHONPATH": str(ROOT / "python")} | told
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


def test_passes_are_chosen_by_name():
    done = run(".ci/test.py", "--only", "native", "warp")
    assert done.returncode == 2 and "warp are none of native" in done.stderr.splitlines()[-1]


def test_gpu_launches_an_op():
    done = run(".ci/gpu.py", "--launch", "rope")
    assert done.returncode == 0, done.stderr


TESTS = """
import pytest
@pytest.mark.parametrize("i", range(3))
def test_numbers(i):
    assert i != 1, "one"
def test_skipped():
    pytest.skip("not here")
@pytest.fixture
def broken():
    raise ValueError("no fixture")
def test_without_its_fixture(broken):
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_outcomes_are_known_as_they_come(workers, tmp_path, monkeypatch):
    (tmp_path / "test_these.py").write_text(TESTS)
    log = tmp_path / "log"
    paths = os.pathsep.join((str(ROOT / "python"), str(ROOT / ".ci")))
    command = ["-m", "pytest", "-q", "-p", "outcomes", "-n", workers, f"--rootdir={tmp_path}"]
    done = run(*command, str(tmp_path), PYTHONPATH=paths, OUTCOMES=str(log))
    assert done.returncode == 1, done.stdout + done.stderr
    monkeypatch.syspath_prepend(ROOT / ".ci")
    import gpu

    lines = log.read_text().splitlines()
    found, not_run = gpu.outcomes(lines, ["test_these.py"])
    assert found["test_these"]["tests"] == 5 and not not_run
    failed = sorted(found["test_these"]["failed"])
    assert [name.split(":")[0] for name in failed] == [
        "test_numbers[1]",
        "test_without_its_fixture",
    ]
    assert "one" in failed[0] and "no fixture" in failed[1]
    # cut short: after some, in the middle of a line, before anything was collected
    assert gpu.outcomes(lines[:3], ["test_these.py"])[1] == {"test_these": 3}
    assert gpu.outcomes([*lines[:2], lines[2][:9]], ["test_these.py"])[1] == {"test_these": 4}
    assert gpu.outcomes([], ["test_these.py"]) == ({}, {"test_these": 1})


def test_the_benchmarks_run_under_pytest():
    case = "rms_norm and decode and float32 and not bfloat16"
    done = run("-m", "pytest", "-q", "benchmarks", "-k", case, "--benchmark-disable")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
