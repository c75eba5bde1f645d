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
import sysconfig
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

# as torch's extensions have it, but without debug information, which takes as long again
BIND_FLAGS = shlex.split(
    "-std=c++20 -O2 -DNDEBUG -fwrapv -fPIC -fopenmp -fvisibility=hidden -Wall -DTORCH_API_INCLUDE_EXTENSION_H"
    " -DTORCH_EXTENSION_NAME=_C"
)

SANITIZE = os.environ.get("TILEWRIGHT_SANITIZE")
SANITIZE_FLAGS = (
    f"-fsanitize={SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    if SANITIZE
    else ""
)


def compiled(build_dir: Path, units: list[tuple[str, Path, str]]) -> list[str]:
    """Object, source and flags of each: compiled with ninja, in build_dir; the objects.

    Its file names no folder of the tree but by the way from build_dir, so that a copy of the tree with its objects
    compiles nothing.
    """
    lines = [
        f"rule cc\n  command = {os.environ.get('CXX', 'g++')} $flags -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n"
    ]
    for target, source, flags in units:
        way = os.path.relpath(source, build_dir)
        lines.append(f"build {target}: cc {way}\n  flags = {flags} {SANITIZE_FLAGS}\n")
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines))
    ninja = shutil.which("ninja") or str(Path(sys.executable).with_name("ninja"))
    jobs = shlex.split(f"-j {os.environ['MAX_JOBS']}" if "MAX_JOBS" in os.environ else "")
    subprocess.run([ninja, "-C", str(build_dir), *jobs], check=True, stdout=sys.stderr)
    return [str(build_dir / target) for target, _, _ in units]


def unit_objects(build_dir: Path) -> list[str]:
    """The objects of each csrc/cpu/*.cpp, once per instruction set."""
    units = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        levels = {"": ""} if source.stem == "isa" else LEVELS
        for level, flags in levels.items():
            define = f"-DTW_ISA={level}" if level else ""
            name = f"{source.stem}.{level or 'base'}.o"
            units.append((name, source, f"{UNIT_FLAGS} {define} {flags}"))
    return compiled(build_dir, units)


def bind_objects(build_dir: Path) -> list[str]:
    """The objects of each csrc/bind/*.cpp, which read torch's headers: more than half of the work."""
    device = "cuda" if torch.version.cuda and cpp_extension.CUDA_HOME else "cpu"
    paths = [*cpp_extension.include_paths(device), sysconfig.get_path("include")]
    flags = shlex.join([*BIND_FLAGS, *(f"-I{path}" for path in paths)])
    sources = sorted((CSRC / "bind").glob("*.cpp"))
    return compiled(build_dir, [(f"{source.stem}.o", source, flags) for source in sources])


def extension():
    """CPU kernels always; the CUDA sources too where nvcc and a CUDA torch are here."""
    cuda = sorted(str(p.relative_to(ROOT)) for p in (CSRC / "cuda").glob("*.cu"))
    sanitize = shlex.split(SANITIZE_FLAGS)
    flags = {"cxx": ["-g0", "-O2", "-std=c++20", "-fopenmp", "-fvisibility=hidden", *sanitize]}
    kind, sources = cpp_extension.CppExtension, ["csrc/module.cpp"]
    if torch.version.cuda and cpp_extension.CUDA_HOME and cuda:
        arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a")]
        flags["nvcc"] = ["-O3", "-std=c++20", *arch]
        bind = [str(p.relative_to(ROOT)) for p in sorted((CSRC / "bind/cuda").glob("*.cpp"))]
        kind, sources = cpp_extension.CUDAExtension, sources + cuda + bind
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
                temp = Path(self.build_temp).resolve()
                objects = unit_objects(temp / "units") + bind_objects(temp / "bind")
                for ext in self.extensions:
                    ext.extra_objects = objects
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
