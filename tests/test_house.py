"""The rules of the house that a linter cannot hold: docs/architecture.md gives their reasons."""

import ast
import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import tilewright
from tilewright import _native, _op, ops, reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python/tilewright"
MAX_LINES = 450  # a kernel and its backward, or a model, told whole; past that, two things

# What the modules of each part may import from tilewright, and from outside beyond the standard
# library.  A part may always import its own modules.
BASE = {"torch"}
SHARED = {"_native", "_op", "expert_lora", "expert_rows", "quant_tensor", "testing"}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "kernels": (set(), {"torch", "triton"}),
    "expert_lora": (set(), BASE),
    "expert_rows": (set(), BASE),
    "quant_tensor": (set(), BASE),
    "masks": (set(), BASE),
    "reference": ({"expert_lora", "expert_rows", "quant_tensor"}, BASE),
    "_native": ({"_C"}, BASE),
    "_op": ({"_native", "reference", "kernels", "lab"}, BASE),  # lab: under the interpreter
    "ops": (
        {"_op", "_native", "expert_lora", "expert_rows", "kernels", "masks", "quant_tensor"},
        BASE,
    ),
    "testing": ({"ops", "reference", "quant_tensor"}, BASE),
    "nn": ({"masks", "ops", "quant_tensor"}, BASE),
    "quant": ({"nn", "ops", "quant_tensor"}, BASE | {"gguf", "numpy", "safetensors"}),
    "models": (
        {"nn", "ops", "quant", "quant_tensor"},
        BASE | {"gguf", "jinja2", "numpy", "safetensors", "tokenizers"},
    ),
    "lab": ({"kernels"}, BASE | {"numpy", "triton"}),
    "doctor": ({"", "_native"}, BASE),
    "": ({"interop", "masks", "models", "nn", "ops", "quant", *SHARED}, BASE),  # __init__.py
}
# These stand on top: any part but each other, any package of their extra.
TOP = {"bench", "cli", "interop"}

# The files that tell an op, and where an op is told in another's file.
TOLD_IN = {
    "reference": "python/tilewright/reference/{}.py",
    "kernels": "kernels/{}.py",
    "cpu": "csrc/cpu/{}.cpp",
    "bind": "csrc/bind/{}.cpp",
    "tests": "tests/test_{}.py",
    "benchmarks": "benchmarks/bench_{}.py",
}
# attention_varlen is attention's operators on ranges of keys; moe_dispatch's loops have no vectors
INSTEAD: dict[tuple[str, str], str] = {
    ("attention_varlen", "kernels"): "kernels/attention.py",
    ("attention_varlen", "cpu"): "csrc/cpu/attention.cpp",
    ("attention_varlen", "bind"): "csrc/bind/attention.cpp",
    ("moe_dispatch", "cpu"): "csrc/bind/moe_dispatch.cpp",
}


def tracked(*patterns: str) -> list[Path]:
    """Files of the tree that git does not ignore; outside a git checkout, all but build output."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z", *patterns]
    if (ROOT / ".git").exists():
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [ROOT / name for name in listing.split("\0") if name]
    else:
        found = [p for pattern in patterns or ("*",) for p in ROOT.rglob(pattern)]
    return [p for p in found if p.is_file() and not p.is_symlink()]


def imports(source: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in a file, import_module("...") included."""
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, name.value


def modules() -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        dotted = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield path, dotted.removesuffix(".__init__")
    for path in sorted((ROOT / "kernels").glob("*.py")):
        yield path, f"tilewright.kernels.{path.stem}"


def part_of(dotted: str) -> str:
    return (dotted.split(".") + [""])[1]


def test_imports_keep_to_the_house():
    parts = {part_of(module) for _, module in modules()}
    faults = []
    for path, module in modules():
        part = part_of(module)
        for line, name in imports(path, module):
            root, target = name.split(".")[0], part_of(name)
            if root == "tilewright":
                # `from tilewright import __version__`: a name of the package itself
                target = target if target in parts or target == "_C" else ""
                if part in TOP:
                    allowed = target == part or target not in TOP or part == "cli"
                elif part not in ALLOWED:
                    raise AssertionError(f"{module}: say in ALLOWED what {part} may import")
                else:
                    allowed = target == part or target in ALLOWED[part][0]
            else:
                outside = ALLOWED.get(part, (set(), set()))[1]
                allowed = part in TOP or root in outside or root in sys.stdlib_module_names
            if not allowed:
                faults.append(
                    f"{path.relative_to(ROOT)}:{line}: {part or 'package'} imports {name}"
                )
    assert not faults, "\n".join(faults)


def test_package_calls_ops_by_attribute():
    """`from tilewright.ops import x` would hide the call from eager()."""
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, module in modules()
        for line, name in imports(path, module)
        if name.startswith("tilewright.ops.") and part_of(module) != "ops"
    ]
    assert not faults, "\n".join(faults)


def test_twins_have_the_same_names():
    assert sorted(ops.__all__) == sorted(reference.__all__)
    assert len(set(ops.__all__)) == len(ops.__all__)


def test_twins_have_the_same_signatures():
    for name in ops.__all__:
        ours, twin = getattr(ops, name), getattr(reference, name)
        assert inspect.signature(ours) == inspect.signature(twin), name


def test_every_public_name_is_documented():
    for name in ops.__all__:
        assert inspect.getdoc(getattr(ops, name)), f"ops.{name} has no docstring"


def test_kernels_is_a_committed_link():
    link = PACKAGE / "kernels"
    if (ROOT / ".git").exists():
        assert link.is_symlink() and os.readlink(link) == "../../kernels"
        entry = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-s", "python/tilewright/kernels"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert entry.startswith("120000 ")
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/__init__.py").exists()


def test_every_op_is_told_in_every_place():
    names = {p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_")}
    missing = []
    for op in sorted(names):
        for place, pattern in TOLD_IN.items():
            where = INSTEAD.get((op, place), pattern.format(op))
            if not (ROOT / where).is_file():
                missing.append(f"{op}: {where}")
    assert not missing, "\n".join(missing)


def test_no_place_tells_an_op_that_is_not_there():
    names = {p.stem for p in (PACKAGE / "ops").glob("*.py")}
    strays = []
    for place in ("reference", "kernels", "bind", "benchmarks"):
        folder, pattern = os.path.split(TOLD_IN[place].format("*"))
        for path in (ROOT / folder).glob(pattern):
            op = path.stem.removeprefix("bench_")
            here = str(path.relative_to(ROOT))
            if place == "benchmarks" and not re.search(r"^OP = ", path.read_text(), re.M):
                continue  # a measurement of its own, such as of a whole model
            if not op.startswith("_") and op not in names and here not in INSTEAD.values():
                strays.append(here)
    assert not strays, "\n".join(strays)


def test_version_is_said_once_in_effect():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.M).group(1) == tilewright.__version__


def test_no_machine_paths():
    machine = re.compile(r"(?<![\w.$}/])/(?:work|root|Users|home/\w+)/")
    faults = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        faults += [
            f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, m.start()) + 1}: {m.group()}"
            for m in machine.finditer(text)
        ]
    assert not faults, "\n".join(faults)


def test_files_stay_readable():
    kinds = (".py", ".cpp", ".cu", ".cuh", ".h")
    sizes = {p: len(p.read_text().splitlines()) for p in tracked() if p.suffix in kinds}
    long = {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n >= MAX_LINES}
    assert not long, f"split these, {MAX_LINES} lines is the most: {long}"


def test_proven_on_gpu_is_what_the_results_say():
    """An op is proven where a results file of a CUDA device records that its tests passed there."""
    proven = set()
    for path in (ROOT / "benchmarks/results").rglob("*.json"):
        record = json.loads(path.read_text())
        if record["gpu"]:
            proven |= set(record.get("tests_passed", ()))
    assert proven == _op.PROVEN_ON_GPU


def run_python(code: str, *args: str, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TILEWRIGHT_")}
    path = environment.pop("PYTHONPATH", str(PACKAGE.parent))
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env=inherited | {"PYTHONPATH": path} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ABSENT = """
import sys

class Without:
    # a finder that sees what `inner` sees, less the packages that are not installed
    def __init__(self, inner):
        self.inner = inner
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in sys.argv[1].split(",")
        return None if absent else self.inner.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""


def test_imports_with_nothing_but_torch():
    code = """
import tilewright
for name in sys.argv[1].split(","):
    assert name not in sys.modules, name
assert tilewright.nn and tilewright.ops
gpu = [route for route in tilewright.explain() if route.device == "cuda"]
assert all(r.implementation.startswith("reference") and "triton" in r.why for r in gpu), gpu
"""
    extras = "triton,gguf,tokenizers,typer,rich,jinja2,safetensors,transformers,pybind11,ninja"
    run_python(ABSENT + code, extras, TRITON_INTERPRET="0")


def test_import_leaves_heavy_packages_alone():
    code = """
import sys, torch
before = set(sys.modules)
import tilewright
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    brought = set(run_python(code, TRITON_INTERPRET="0").split())
    assert not brought - {"tilewright"} - set(sys.stdlib_module_names), brought


def test_import_time():
    """CPU seconds beyond torch's, so that a busy machine does not decide."""
    code = """
import time, torch
start = time.process_time()
import tilewright
print(time.process_time() - start)
"""
    seconds = [float(run_python(code)) for _ in range(3)]
    assert statistics.median(seconds) <= 0.5, seconds


@pytest.fixture
def foreign_build(tmp_path: Path) -> Path:
    """A copy of the package whose _C claims another torch, and would fail if it were loaded."""
    copy = tmp_path / "tilewright"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    (copy / "_build_info.json").write_text('{"torch": "2.0.0", "cuda": null, "levels": []}')
    return tmp_path


def test_extension_of_another_torch_is_not_used(foreign_build: Path):
    code = """
import tilewright
from tilewright import _native
assert _native.C is None, _native.C
print(_native.status)
for route in tilewright.explain():
    assert route.device == "cuda" or route.implementation.startswith("reference"), route
"""
    status = run_python(code, PYTHONPATH=str(foreign_build), TRITON_INTERPRET="0")
    assert "built for torch 2.0.0" in status and "not used" in status


def test_doctor_reports_an_extension_of_another_torch(foreign_build: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TILEWRIGHT_")}
    done = subprocess.run(
        [sys.executable, "-c", "from tilewright.cli import main; main()", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(foreign_build), "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 1, done.stderr
    assert "built for torch 2.0.0" in done.stdout
    assert json.loads(done.stdout)["faults"]


def test_extension_is_built_for_these_tests():
    """The suite proves the kernels: without the extension it would prove the references."""
    wanted = "not loaded" if _native.INTERPRET else "loaded"
    assert _native.status.startswith(wanted), _native.status
