"""Every variant that kernels/*.py ships compiles for sm_80, sm_90 and sm_100 without a GPU, and no
kernel spills.

A function jitted under TRITON_INTERPRET=1 cannot be compiled, so each file compiles in a process of
its own without it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
FILES = [
    p.stem for p in sorted((ROOT / "kernels").glob("*.py")) if "def variants(" in p.read_text()
]
ARCHS = (80, 90, 100)

COMPILE = r"""
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")


def spilled(cubin):
    # bytes of local memory a thread, or None where the tool is not at hand
    if not CUOBJDUMP.is_file():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    return None if usage is None else (int(usage[2]) + int(usage[3]), int(usage[1]))


for i, (kernel, signature, constants, options) in enumerate(
    importlib.import_module(f"tilewright.kernels.{sys.argv[1]}").variants()
):
    # every argument that is not a constant is listed, and nothing else
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    row = {"variant": f"{i} {kernel.__name__} {constants} {options}", "error": None, "results": {}}
    missing = [n for n in kernel.arg_names if n not in signature and n not in constants]
    extra = [n for n in (*signature, *constants) if n not in kernel.arg_names]
    if missing or extra:
        row["error"] = f"variants() lacks {missing} and gives unknown {extra}"
    # pointers 16-byte aligned, and row strides multiples of 16, as torch allocates wide tensors
    wide = {
        (j,): [["tt.divisibility", 16]]
        for j, (name, t) in enumerate(types.items())
        if t.startswith("*") or (name.startswith("stride_") and t != "constexpr")
    }
    for arch in map(int, sys.argv[2:]) if row["error"] is None else ():
        try:
            source = ASTSource(kernel, types, constants, wide)
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            row["results"][arch] = [built.metadata.shared, *(spilled(built.asm["cubin"]) or (None, None))]
        except Exception as error:
            row["error"] = f"sm_{arch}: {type(error).__name__}: {error}"[:2000]
    print(json.dumps(row), flush=True)
"""


@pytest.mark.parametrize("name", FILES)
def test_compiles(name: str, tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "python"), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name, *map(str, ARCHS)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, f"kernels/{name}.py: variants() is empty"
    faults = [f"{row['variant']}: {row['error']}" for row in rows if row["error"]]
    for row in rows:
        for arch, (shared, local, registers) in row["results"].items():
            # 99 KiB: what a block may take on sm_86, sm_89 and sm_120
            if shared > 99 * 1024:
                faults.append(f"{row['variant']}: sm_{arch}: {shared} bytes of shared memory")
            if local:
                faults.append(
                    f"{row['variant']}: sm_{arch}: spills {local} bytes, {registers} registers"
                )
    assert not faults, "\n".join(faults)


def test_every_kernel_file_has_variants():
    jitted = [p for p in (ROOT / "kernels").glob("*.py") if "@triton.jit" in p.read_text()]
    # names that begin with _ hold verbs other kernels call, compiled with them
    lacking = [p.name for p in jitted if p.stem not in FILES and not p.stem.startswith("_")]
    assert not lacking, f"no variants(): {lacking}"
