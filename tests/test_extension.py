"""The compiled extension: instruction-set levels, what their objects hold, and simd.h's arithmetic."""

import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from filelock import FileLock  # torch needs it

from tilewright import _native

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]
one_worker = pytest.mark.xdist_group(
    "units"
)  # a new clone builds them once, not in two workers alike
NATIVE = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "python")}

# Mnemonics and registers a level must not hold, each with all those of the levels above it.
VNNI = r"v?pdp(?:bu|ws)\w+"
BF16 = r"vdpbf16\w*|vcvtne2?ps2?bf16\w*|vcvtne2ps2bf16"
NEVER = r"v\w+(?<!cvtph2)(?<!cvtps2)ph|v\w+[^t]sh|tdp\w+|vpermb|vperm[it]2b|vpopcnt\w+|vpsh[lr]d\w+|vpmadd52\w+"
BEYOND = {
    "scalar": (r"v\w+", r"%[yz]mm|%k[0-7]"),
    "avx2": (f"{VNNI}|{BF16}|{NEVER}", r"%zmm|%[xy]mm(?:1[6-9]|[23]\d)|%k[0-7]"),
    "avx512": (f"{VNNI}|{BF16}|{NEVER}", None),
    "avx512_vnni": (f"{BF16}|{NEVER}", None),
    "avx512_bf16": (NEVER, None),
}


def built(path: Path) -> dict:
    """The names of setup.py, which is run with setup() doing nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(path))


@pytest.fixture(scope="session")
def setup_py() -> dict:
    return built(ROOT / "setup.py")


@pytest.fixture(scope="session")
def objects(setup_py: dict) -> dict[str, list[Path]]:
    """Level -> its objects, brought up to date where setup.py has them."""
    folder = ROOT / "build/temp/units"
    by_level: dict[str, list[Path]] = {level: [] for level in ("base", *LEVELS)}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(ROOT / "build/objects.lock"):  # test_mutants.py builds there too
        made = setup_py["unit_objects"](folder)
    for name in made:
        by_level[name.split(".")[-2]].append(Path(name))
    return by_level


def output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | NATIVE | environment,
    )


def levels_here() -> list[str]:
    done = python("from tilewright import _native; print(*_native.C.isas())", TILEWRIGHT_CPU_ISA="")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_levels_are_ordered_and_start_at_scalar():
    here = levels_here()
    assert here == LEVELS[: len(here)] and here


def test_each_level_can_be_forced():
    code = """
from tilewright import _native
print(_native.cpu_isa())
for level in _native.C.isas():
    _native.C.set_isa(level)
    assert _native.C.isa() == level
"""
    for level in levels_here():
        done = python(code, TILEWRIGHT_CPU_ISA=level)
        assert done.stdout.strip() == level, done.stderr


def test_default_level_is_the_highest():
    done = python("from tilewright import _native; print(_native.cpu_isa())", TILEWRIGHT_CPU_ISA="")
    assert done.stdout.strip() == levels_here()[-1]


@pytest.mark.parametrize("bad", ["avx1024", "AVX2", " scalar", "5"])
def test_unknown_level_is_a_value_error(bad: str):
    code = """
import torch, tilewright  # the import succeeds: doctor needs it
tilewright.ops.rms_norm(torch.ones(2, 4))
"""
    done = python(code, TILEWRIGHT_CPU_ISA=bad)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: TILEWRIGHT_CPU_ISA") and f"'{bad}'" in last
    assert "'scalar'" in last  # it names the levels that would do


def test_interpreter_does_not_load_the_extension():
    code = "from tilewright import _native; print(_native.C, _native.status)"
    done = python(code, TRITON_INTERPRET="1")
    assert done.stdout.startswith("None not loaded: TRITON_INTERPRET=1"), done.stderr


def test_build_info_names_this_torch():
    assert _native._INFO.is_file()
    assert f'"torch": "{torch.__version__}"' in _native._INFO.read_text()


@one_worker
@pytest.mark.parametrize("level", LEVELS)
def test_objects_hold_only_their_levels_instructions(level: str, objects: dict[str, list[Path]]):
    mnemonics, registers = BEYOND[level]
    bad = re.compile(rf"(?:{mnemonics})\b")
    worse = re.compile(registers) if registers else None
    for path in objects[level]:
        for line in output("objdump", "-d", "--no-show-raw-insn", path).splitlines():
            parts = line.split("\t")
            if len(parts) < 2:
                continue
            instruction = parts[1].removeprefix("{vex} ").removeprefix("{evex} ")
            assert not bad.match(instruction), f"{path.name}: {instruction}"
            assert not (worse and worse.search(instruction)), f"{path.name}: {instruction}"


@one_worker
def test_wide_levels_are_wide(objects: dict[str, list[Path]]):
    """A level compiled without its flags would pass the test above."""
    higher = (
        "quant_fixed",
        "quant_gemm_bf16",
    )  # of VNNI and of bfloat16 alone: empty at these levels
    for level, register, empty in (
        ("avx2", "%ymm", higher),
        ("avx512", "%zmm", (*higher, "quant_words")),  # of AVX2 alone
    ):
        for path in objects[level]:
            if path.name.startswith(empty):
                continue
            assert register in output("objdump", "-d", "--no-show-raw-insn", path), path.name


@one_worker
def test_baseline_object_is_baseline(objects: dict[str, list[Path]]):
    (base,) = objects["base"]
    assert not re.search(r"%[yz]mm", output("objdump", "-d", base))


@one_worker
def test_units_see_no_torch(objects: dict[str, list[Path]]):
    folder = objects["base"][0].parent
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    seen = output(ninja, "-C", folder, "-t", "deps")
    assert "isa.h" in seen  # the listing is there at all
    assert not re.search(r"/(torch|ATen|c10|pybind11)/", seen)


def test_units_include_only_what_defines_no_function():
    allowed = {"cstddef", "cstdint", "immintrin.h"}
    faults = []
    for path in sorted((ROOT / "csrc/cpu").iterdir()):
        extra = {"cpuid.h", "cstring"} if path.name == "isa.cpp" else set()
        for name in re.findall(r"#\s*include\s*<(.+?)>", path.read_text()):
            if name not in allowed | extra:
                faults.append(f"{path.name}: <{name}>")
    assert not faults, faults


@one_worker
def test_each_symbol_belongs_to_its_level(objects: dict[str, list[Path]]):
    """A symbol two levels share is one copy after linking: the wrong one on an older CPU."""
    for level in LEVELS:
        for path in objects[level]:
            for line in output("nm", "-C", "--defined-only", "--extern-only", path).splitlines():
                _, kind, name = line.split(maxsplit=2)
                assert f"tilewright::cpu::{level}::" in name, f"{path.name}: {kind} {name}"


PROBE = """
#include "simd.h"
#include <cstdio>
using namespace tilewright::cpu;
using namespace tilewright::cpu::TW_ISA;
int main(int argc, char** argv) {
  FILE* in = std::fopen(argv[1], "rb");
  FILE* out = std::fopen(argv[2], "wb");
  float x[W], e[W], wide_bf16[W], wide_f16[W];
  bf16 b[W];
  f16 h[W];
  while (std::fread(x, sizeof(float), W, in) == W) {
    const Vec v = load(static_cast<const float*>(x));
    store(static_cast<float*>(e), exp(v));
    store(static_cast<bf16*>(b), v);
    store(static_cast<f16*>(h), v);
    store(static_cast<float*>(wide_bf16), load(static_cast<const bf16*>(b)));
    store(static_cast<float*>(wide_f16), load(static_cast<const f16*>(h)));
    for (int i = 0; i < W; ++i) {
      const bf16 one_b = from_float<bf16>(x[i]);
      const f16 one_h = from_float<f16>(x[i]);
      const float row[5] = {e[i], wide_bf16[i], wide_f16[i], to_float(one_b), to_float(one_h)};
      std::fwrite(row, sizeof(float), 5, out);
    }
  }
  std::fclose(out);
}
"""


def probe_inputs() -> torch.Tensor:
    """Every float16 and bfloat16, the points halfway between neighbours and one step to each side,
    and exp's whole range of input."""
    bits = torch.arange(65536, dtype=torch.int32)
    half = bits.to(torch.int16).view(torch.float16).float()
    brain = bits.to(torch.int16).view(torch.bfloat16).float()
    edges = []
    for grid in (half, brain):
        values = grid[grid.isfinite()].unique()
        middle = ((values[1:].double() + values[:-1].double()) / 2).float()
        exact = torch.cat([values, middle])
        edges += [grid, exact, exact.nextafter(exact + 1e30), exact.nextafter(exact - 1e30)]
    ramp = torch.linspace(-110, 100, 400_001)
    special = torch.tensor(
        [float("inf"), float("-inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, -0.0]
    )
    x = torch.cat([*edges, ramp, special])
    return torch.nn.functional.pad(x, (0, -len(x) % 16))


@pytest.mark.parametrize("level", LEVELS)
def test_simd_arithmetic(level: str, setup_py: dict, tmp_path: Path):
    """exp within 2 ulp; float16 and bfloat16 rounded as torch does, lanes and scalars alike."""
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text(PROBE)
    flags = f"{setup_py['UNIT_FLAGS']} {setup_py['LEVELS'][level]} -DTW_ISA={level}".split()
    compiler = os.environ.get("CXX", "g++")
    output(
        compiler, *flags, f"-I{ROOT / 'csrc/cpu'}", source, ROOT / "csrc/cpu/isa.cpp", "-o", program
    )
    if level not in levels_here():
        return  # it compiles: no more can be asked of this machine
    x = probe_inputs()
    (tmp_path / "in").write_bytes(x.numpy().tobytes())
    output(program, tmp_path / "in", tmp_path / "out")
    results = torch.frombuffer(bytearray((tmp_path / "out").read_bytes()), dtype=torch.float32)
    exp, bf16, f16, bf16_one, f16_one = results.view(-1, 5).unbind(1)

    truth = x.double().exp()
    rounded = truth.float()
    finite = rounded.isfinite() & x.isfinite()
    ulp = (rounded.abs().nextafter(torch.tensor(float("inf"))) - rounded.abs()).double()
    error = (exp.double() - truth).abs()[finite] / ulp[finite]
    assert error.max() <= 2, x[finite][error.argmax()]
    assert torch.equal(exp[x.isnan()].isnan(), x[x.isnan()].isnan())
    assert (exp[x < -104] == 0).all() and (exp[x > 88.8] == float("inf")).all()

    # vcvtneps2bf16 reads subnormals as zeros, whatever MXCSR says
    tiny = torch.finfo(torch.float32).tiny
    seen = torch.where(x.abs() < tiny, 0.0 * x, x) if level == "avx512_bf16" else x
    same_bits(bf16, seen.to(torch.bfloat16).float(), x)
    same_bits(bf16_one, x.to(torch.bfloat16).float(), x)
    for ours in (f16, f16_one):
        same_bits(ours, x.to(torch.float16).float(), x)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor) -> None:
    assert torch.equal(ours.isnan(), theirs.isnan())
    differ = (ours.view(torch.int32) != theirs.view(torch.int32)) & ~theirs.isnan()
    assert not differ.any(), (
        f"{int(differ.sum())} differ, first x={x[differ][0].item()!r} "
        f"{struct.pack('>f', x[differ][0].item()).hex()}: {ours[differ][0]} not {theirs[differ][0]}"
    )
