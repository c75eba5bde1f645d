"""The C++ kernels' tests once more, on an extension built under AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OPS = [path.stem for path in (ROOT / "python/tilewright/ops").glob("[a-z]*.py")]
TESTS = sorted(
    str(path.relative_to(ROOT))
    for name in (*OPS, "direct", "properties", "addressing")
    for path in ROOT.glob(f"tests/test_{name}*.py")
)


def runtime(name: str) -> str | None:
    """gcc's lib<name>.so, or None where it is not installed."""
    found = subprocess.run(
        ["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True
    )
    path = Path(found.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA maps memory where ASan keeps its own")
def test_the_cpp_is_clean(tmp_path: Path):
    asan, standard = runtime("asan"), runtime("stdc++")
    assert asan and standard, "gcc has no libasan.so"
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    clean = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
    }
    clean["PYTHONPATH"] = str(tree / "python")
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        env=clean | {"TILEWRIGHT_SANITIZE": "address,undefined", "TILEWRIGHT_REQUIRE_EXT": "1"},
        cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr[-4000:]
    (extension,) = (tree / "python/tilewright").glob("_C*.so")
    content = extension.read_bytes()
    assert b"__asan_report" in content and b"__ubsan_handle" in content
    # torch and Python are not ours to check for leaks, nor for one symbol in two libraries
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *TESTS],
        env=clean | options | {"LD_PRELOAD": f"{asan} {standard}"},
        cwd=tree, capture_output=True, text=True,
    )  # fmt: skip
    assert tests.returncode == 0, (tests.stdout + tests.stderr)[-6000:]
