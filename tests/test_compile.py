"""What the compilers make of every variant that kernels/*.py ships and of csrc/cuda/*.cu, without a
GPU: no spills, shared memory within the smallest chip's limit, matrix instructions where there is a
tl.dot, 16-byte loads, no wgmma held up.  sm_90; in the slow tests, every chip, and attention in float32, whose
tl.dot is scalar code that takes minutes."""

import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from tilewright.bench import harness
from tilewright.lab.compile import CHIPS

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
FILES = [
    p.stem for p in sorted((ROOT / "kernels").glob("*.py")) if "def variants(" in p.read_text()
]
if shutil.which("nvcc"):
    FILES += sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu"))
# A tile of fewer than 64 rows is not wgmma's or tcgen05's: the older mma.sync serves it there.


def archs_of(name: str) -> tuple[int, ...]:
    """What a file's kernels are for; most for all."""
    if name.endswith(".cu"):
        return tuple(CHIPS)
    return getattr(importlib.import_module(f"tilewright.kernels.{name}"), "ARCHS", tuple(CHIPS))


def shared(name: str) -> int:
    """Bytes that one block may take on every chip that a file's kernels are for."""
    return 1024 * min(CHIPS[arch].block_shared for arch in archs_of(name))


# Bytes spilled that stand: (kernel, operands of tl.dot, head dim, options) -> by architecture.  A few
# registers a thread, outside the products: the next smaller tile would read every key and value, or
# query, twice as often.  In float32, where tl.dot is scalar code, ptxas stops short of the registers it
# may take.
SPILLS: dict[tuple[str, str, int, str], dict[int, int]] = {
    ("_attention_fwd_kernel", "bf16", 128, "all"): {100: 8, 120: 8},
    ("_attention_fwd_kernel", "bf16", 128, "ranges"): {120: 64},
    ("_attention_fwd_kernel", "bf16", 256, "ranges"): {120: 40},
    ("_attention_fwd_kernel", "bf16", 256, "bias"): {100: 8},
    ("_attention_fwd_kernel", "f32", 64, "ranges"): {80: 8, 86: 20, 89: 20},
    ("_attention_fwd_kernel", "f32", 256, "ranges"): {90: 16, 100: 16, 120: 24},
    ("_attention_dkv_kernel", "bf16", 128, "plain"): {90: 8},
    ("_attention_dkv_kernel", "bf16", 128, "all"): {90: 32},
    ("_attention_dkv_kernel", "bf16", 128, "bias"): {100: 40},
    ("_attention_dkv_kernel", "bf16", 128, "dropout"): {90: 48},
    ("_attention_dkv_kernel", "f32", 64, "plain"): {86: 24, 89: 24},
    ("_attention_dkv_kernel", "f32", 64, "all"): {86: 16, 89: 16, 90: 72, 120: 88},
    ("_attention_dkv_kernel", "f32", 64, "dropout"): {86: 56, 89: 56, 90: 40, 100: 40},
    ("_attention_dkv_kernel", "f32", 64, "blocks"): {86: 8, 89: 8},
    ("_attention_dkv_kernel", "f32", 128, "ranges"): {86: 8, 89: 8, 90: 16, 100: 16},
    ("_attention_dkv_kernel", "f32", 128, "bias"): {80: 24, 100: 32},
    ("_attention_dkv_kernel", "f32", 128, "dropout"): {86: 40, 89: 40},
    ("_attention_dkv_kernel", "f32", 128, "blocks"): {86: 8, 89: 8, 120: 8},
    ("_attention_dkv_kernel", "f32", 256, "all"): {100: 40},
    ("_attention_dkv_kernel", "f32", 256, "ranges"): {100: 16},
    ("_attention_dkv_kernel", "f32", 256, "dropout"): {86: 216, 89: 216},
    ("_attention_dq_kernel", "bf16", 64, "bias"): {120: 56},
    ("_attention_dq_kernel", "bf16", 256, "all"): {86: 8, 89: 8},
    ("_attention_dq_kernel", "bf16", 256, "ranges"): {86: 48, 89: 48, 120: 40},
    ("_attention_dq_kernel", "f32", 128, "plain"): {120: 40},
    ("_attention_dq_kernel", "f32", 128, "all"): {120: 88},
    ("_attention_dq_kernel", "f32", 128, "ranges"): {120: 32},
    ("_attention_dq_kernel", "f32", 128, "bias"): {90: 8, 100: 32},
    ("_attention_dq_kernel", "f32", 128, "dropout"): {86: 40, 89: 40, 120: 24},
    ("_attention_dq_kernel", "f32", 256, "ranges"): {80: 64, 90: 24, 100: 40, 120: 24},
    ("_attention_dq_kernel", "f32", 256, "bias"): {100: 40},
    ("_attention_dq_kernel", "f32", 256, "dropout"): {100: 40},
    # sums of ds k and of p k, and a tile's scores twice: 224 of a thread's 240 registers
    ("_attention_hopper_dq_kernel", "bf16", 128, "plain"): {90: 144},
    ("_attention_hopper_dkv_kernel", "bf16", 128, "plain"): {90: 32},
}


def options(constants: dict) -> str:
    """Which of kernels/_tile.py's VARIANTS one of attention is."""
    names = {
        "RANGES": "ranges",
        "SOFTCAP": "all",
        "HAS_BIAS": "bias",
        "DROPOUT": "dropout",
        "SIZE": "blocks",
    }
    return next((name for flag, name in names.items() if constants.get(flag)), "plain")


def run(*arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "python"), "TRITON_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-m", "tilewright.lab.compile", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def faults(row: dict) -> list[str]:
    if row["error"]:
        return [row["error"]]
    found = []
    constants = row["constants"]
    what = row["kernel"], row["dot"], constants.get("HEAD_DIM"), options(constants)
    stands = SPILLS.get(what, {})
    if row["spills"] > stands.get(row["arch"], 0):
        found.append(f"spills {row['spills']} bytes, {row['registers']} registers")
    if row["shared"] > shared(row["file"]):
        found.append(f"{row['shared']} bytes of shared memory")
    if row["dot"] not in (None, "f32") and not row["matrix"]:
        found.append(f"a tl.dot of {row['dot']} without a matrix instruction")
    # FULL False: groups that no power of two divides, loaded element by element under a mask
    narrow = row["kernel"] in NARROW or not row["constants"].get("FULL", True)
    if not row["wide_loads"] and not narrow:
        found.append(f"none of {row['loads']} global loads is 16 bytes wide")
    return found + [w for w in row["warnings"] if not known(row, w)]


# A number a thread is all there is to load: 128 slots, or experts, to 128 threads.
NARROW = {"_moe_dispatch_count_kernel", "_moe_dispatch_place_kernel"}

# Warnings that stand, each with its reason: (kernel, architecture) -> part of what ptxas says.
KNOWN = {
    # the weight becomes wgmma's register operand inside the loop, decoded: the next one waits
    ("_gemm_kernel", 90): "wgmma.mma_async instructions are serialized due to non wgmma",
    ("_quant_moe_experts_up_kernel", 90): "wgmma.mma_async instructions are serialized due to non",
    (
        "_quant_moe_experts_down_kernel",
        90,
    ): "wgmma.mma_async instructions are serialized due to non",
}


def known(row: dict, warning: str) -> bool:
    return KNOWN.get((row["kernel"], row["arch"]), "?") in warning


@functools.cache
def page() -> ModuleType:
    """benchmarks/kernels.py, which writes what the tests here hold."""
    return harness.load(ROOT / "benchmarks/kernels.py")


def check(name: str, archs: tuple[int, ...], cache: Path, *more: str) -> list[dict]:
    done = run(name, "--arch", *map(str, archs), *more, cache=cache)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"{name}: {done.stderr}"
    told = [
        f"{row['kernel']} {row['constants']} {row['options']} sm_{row['arch']}: {fault}"
        for row in rows
        for fault in faults(row)
    ]
    assert not told, "\n".join(told)
    return rows


def assert_on_the_page(lines: list[str], told: list[str]) -> None:
    if (
        f"on triton {version('triton')};" in page().PAGE.read_text()
    ):  # another's ptxas counts otherwise
        lacking = [line for line in lines if line not in told]
        assert not lacking, "python benchmarks/kernels.py --write:\n" + "\n".join(lacking)


@pytest.mark.parametrize("name", [name for name in FILES if 90 in archs_of(name)])
def test_compiles(name: str, tmp_path: Path):
    more = ("--bf16",) if name in ("attention", "_attention_bwd") else ()
    lines = page().compiled_lines(check(name, (90,), tmp_path, *more))
    told = page().PAGE.read_text().splitlines()
    assert_on_the_page(lines, [page().of_hopper(line) for line in told])


def test_the_page_has_no_other_variants():
    names = [p.stem for p in (ROOT / "kernels").glob("*.py") if p.stem in FILES]
    files = [importlib.import_module(f"tilewright.kernels.{name}") for name in names]
    text = page().PAGE.read_text().split("## Machine code")[1]
    found = re.findall(r"^\| `(\w+)` \| `_", text, re.M)
    for name, file in zip(names, files, strict=True):
        assert found.count(name) == len(file.variants()), name


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_compiles_on_every_chip(name: str, tmp_path: Path):
    rows = check(name, tuple(CHIPS), tmp_path)
    lines = page().compiled_lines([row for row in rows if row["arch"] in page().ARCHS])
    assert_on_the_page(lines, page().PAGE.read_text().splitlines())


def test_every_kernel_file_has_variants():
    jitted = [p for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text()]
    # names that begin with _ hold verbs other kernels call, compiled with them
    lacking = [p.name for p in jitted if p.stem not in FILES and not p.stem.startswith("_")]
    assert not lacking, f"no variants(): {lacking}"


def test_a_table(tmp_path: Path):
    done = run("swiglu", "--arch", "90", "--table", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert head.startswith("| kernel | types | constants | sm | registers |")
    assert rows and all("| 90 |" in row and "KiB" in row for row in rows)


@pytest.mark.parametrize(
    "arguments, environment, told",
    [
        (["warp_drive"], {}, "no kernels/warp_drive.py"),
        (["--arch", "42"], {}, "invalid choice: 42"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET=1"),
    ],
)
def test_a_mistake_exits_2(arguments, environment, told, tmp_path):
    done = run(*arguments, cache=tmp_path, **environment)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_resident_warps():
    h100 = CHIPS[90]
    assert h100.resident_warps(4, 32, 0) == 64  # the warps themselves
    assert h100.resident_warps(8, 128, 0) == 16  # registers: 65536 / (128 * 32) warps
    assert h100.resident_warps(4, 32, 100 * 1024) == 8  # shared memory: two blocks
    assert h100.resident_warps(1, 33, 0) == 32  # blocks
