"""Build the extension `tilewright._C`; everything else is in pyproject.toml.

Needs torch in the environment that builds (`pip install --no-build-isolation .`, what the Makefile
does).  Without torch or a C++ compiler the install still succeeds, as pure Python.
TILEWRIGHT_REQUIRE_EXT=1 makes a failed build an error instead; TILEWRIGHT_SANITIZE=address,undefined
builds under those sanitizers (run Python with libasan.so in LD_PRELOAD).
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

if not (ROOT / "python/tilewright/kernels/_tune.py").is_file():
    raise SystemExit(
        "python/tilewright/kernels must link to kernels/: install from git or an sdist, not a zip"
    )

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # an isolated build: pure Python
    torch = None

AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
LEVELS = {"scalar": ""}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": AVX512,
        "avx512_vnni": f"{AVX512} -mavx512vnni",
        "avx512_bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
    }
# No -ffast-math: kernels mean what they say.  -fno-gnu-unique and hidden symbols keep the copies
# of one inline function apart.  gcc 12 warns of its own AVX-512 header's __Y, once a call.
UNIT_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-math-errno -Wall -Wno-unknown-pragmas -Wno-maybe-uninitialized -Wno-uninitialized"

SANITIZE = os.environ.get("TILEWRIGHT_SANITIZE")
SANITIZE_FLAGS = (
    f"-fsanitize={SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    if SANITIZE
    else ""
)


def unit_objects(build_dir: Path) -> list[str]:
    """Compile each csrc/cpu/*.cpp once per instruction set, with ninja; return the objects.

    Its file names no folder outside the tree: a copy of the tree with its objects compiles nothing.
    """
    compiler = os.environ.get("CXX", "g++")
    lines = [
        f"rule cc\n  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n"
    ]
    objects = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        levels = {"": ""} if source.stem == "isa" else LEVELS
        for level, flags in levels.items():
            target = f"{source.stem}.{level or 'base'}.o"
            define = f"-DTW_ISA={level}" if level else ""
            lines.append(
                f"build {target}: cc {os.path.relpath(source, build_dir)}\n  flags = {UNIT_FLAGS} {SANITIZE_FLAGS} {define} {flags}\n"
            )
            objects.append(str(build_dir / target))
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines))
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    jobs = shlex.split(f"-j {os.environ['MAX_JOBS']}" if "MAX_JOBS" in os.environ else "")
    subprocess.run([ninja, "-C", str(build_dir), *jobs], check=True, stdout=sys.stderr)
    return objects


def extension():
    """CPU kernels always; the CUDA sources too where nvcc and a CUDA torch are here."""
    sources = [str(p.relative_to(ROOT)) for p in sorted((CSRC / "bind").glob("*.cpp"))]
    sources.append("csrc/module.cpp")
    cuda = sorted(str(p.relative_to(ROOT)) for p in (CSRC / "cuda").glob("*.cu"))
    sanitize = shlex.split(SANITIZE_FLAGS)
    flags = {"cxx": ["-O2", "-std=c++20", "-fopenmp", "-fvisibility=hidden", *sanitize]}
    if torch.version.cuda and cpp_extension.CUDA_HOME and cuda:
        arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
        flags["nvcc"] = ["-O3", "-std=c++20", *arch]
        flags["cxx"].append("-DTW_CUDA")
        bind = [str(p.relative_to(ROOT)) for p in sorted((CSRC / "bind/cuda").glob("*.cpp"))]
        kind, sources = cpp_extension.CUDAExtension, sources + cuda + bind
    else:
        kind = cpp_extension.CppExtension
    return kind(
        "tilewright._C",
        sources,
        extra_compile_args=flags,
        extra_link_args=["-fopenmp", "-Wl,--exclude-libs,ALL", *sanitize],
    )


def build_command():
    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            # an editable install's own folder is removed after it, and all would be compiled again
            self.build_temp = self.build_temp or str(ROOT / "build/temp")
            super().finalize_options()

        def run(self):
            try:
                units = unit_objects(Path(self.build_temp).resolve() / "units")
                for ext in self.extensions:
                    ext.extra_objects = units
                super().run()
            except Exception as error:  # any compiler failure leaves pure Python
                if os.environ.get("TILEWRIGHT_REQUIRE_EXT") == "1":
                    raise
                print(
                    f"tilewright: no extension, ops run on their references: {error}",
                    file=sys.stderr,
                )
                self.extensions = []
                return
            info = {"torch": torch.__version__, "cuda": torch.version.cuda, "levels": list(LEVELS)}
            home = ROOT / "python" if self.inplace or self.editable_mode else Path(self.build_lib)
            (home / "tilewright/_build_info.json").write_text(json.dumps(info))

        def get_outputs(self):
            return super().get_outputs() if self.extensions else []

    return Build


if torch is None:
    setup()
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": build_command()})
