"""Each mutant takes one term out of a kernel; its op's tests must fail.  Those of the Triton kernels
run in the interpreter, those of the C++ kernels natively, at the level in use.

mutants.py lists them: a file, a text in it (found once) and what replaces it.  That the texts are there is tested
always, the mutants themselves in the slow tests.  killers.json says which test killed each the last time: it
is tried first, and where it passes or is no more, the op's tests all.  TILEWRIGHT_KILLERS=FILE notes there
what killed whom, and `python tests/mutants.py FILE` keeps it.  A new killer must pass without the mutant.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch needs it
from torch.utils import cpp_extension

from tilewright import _native
from tilewright.bench import harness

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python/tilewright"
CPU = ROOT / "csrc/cpu"


LISTED = harness.load(ROOT / "tests/mutants.py")
Mutant, SURVIVORS = LISTED.Mutant, LISTED.SURVIVORS
KILLERS = LISTED.killers()
NO_SUCH_TEST, NOTHING_CHOSEN = 4, 5  # pytest's


def name(mutant: tuple) -> str:
    return f"{mutant.path.name}: {(mutant.becomes or mutant.was).strip()[:60]}"


def test_survivors_are_still_there():
    files = [*(ROOT / "kernels").glob("*.py"), *CPU.iterdir()]
    texts = "".join(path.read_text() for path in files)
    assert all(texts.count(text) == 1 for text in SURVIVORS)


@pytest.mark.parametrize("mutant", [*LISTED.TRITON, *LISTED.CPP], ids=name)
def test_a_mutant_changes_its_file(mutant: tuple):
    assert mutant.was != mutant.becomes
    assert mutant.path.read_text().count(mutant.was) == 1


def linked(folder: Path, *but: str) -> Path:
    """The package under `folder`, its entries linked, but for those that begin with one of `but`."""
    package = folder / "tilewright"
    package.mkdir()
    for entry in PACKAGE.iterdir():
        if not entry.name.startswith(("__pycache__", *but)):
            (package / entry.name).symlink_to(entry)
    return package


def mutated(mutant: tuple, folder: Path) -> Path:
    """A copy of the mutant's folder, as `folder`, with its one file changed: that file."""
    shutil.copytree(mutant.path.parent, folder)
    path = folder / mutant.path.name
    path.write_text(path.read_text().replace(mutant.was, mutant.becomes))
    return path


def run(wanted: list[str], package: Path, mode: dict[str, str]) -> subprocess.CompletedProcess:
    """These tests on the package under `package`, to the first that fails."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TILEWRIGHT_CPU_ISA")
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *wanted],
        env=clean | {"PYTHONPATH": str(package), "TILEWRIGHT_SHUFFLE": "1"} | mode,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@functools.cache
def failures_without(test: str, mode: tuple[tuple[str, str], ...]) -> str:
    """What pytest says of a test that fails on the package as it is, and so kills nothing."""
    done = run([test], PACKAGE.parent, dict(mode))
    return done.stdout[-2000:] if done.returncode == 1 else ""


def note(key: str, killer: str) -> None:
    """The test that failed, for killers.json."""
    if "TILEWRIGHT_KILLERS" in os.environ:
        with open(os.environ["TILEWRIGHT_KILLERS"], "a") as file:
            file.write(f"{key}\t{killer}\n")


def assert_killed(mutant: tuple, folder: Path, suites: list[list[str]], **mode: str) -> None:
    """One of these choices of tests fails on the package under `folder`; on ours a new one passes."""
    told, key = "", LISTED.key(mutant)
    last = [[KILLERS[key]]] if key in KILLERS else []
    for wanted in last + suites:
        done = run(wanted, folder, mode)
        told += done.stdout[-2000:] + done.stderr[-2000:]
        if done.returncode == 1 or done.returncode < 0:  # below nought: by a signal
            killer = re.search(
                r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", done.stdout, re.MULTILINE
            )
            if killer:
                if wanted not in last:
                    unmutated = failures_without(killer[1], tuple(sorted(mode.items())))
                    assert not unmutated, f"{killer[1]} fails without the mutant:\n{unmutated}"
                note(key, killer[1])
            return
        passed = (0, NOTHING_CHOSEN, *([NO_SUCH_TEST] if wanted in last else []))
        assert done.returncode in passed, told
    pytest.fail(f"survived: {mutant}\n{told}")


def suite_of(op: str) -> list[str]:
    return sorted(str(path) for path in ROOT.glob(f"tests/test_{op}*.py"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("mutant", LISTED.TRITON, ids=name)
def test_a_mutant_is_killed(mutant: tuple, tmp_path: Path):
    mutated(mutant, linked(tmp_path, "kernels") / "kernels")
    # what moves too much is right: the traffic is what tells
    suites = [suite_of(mutant.op), ["tests/test_traffic.py", "-k", mutant.op]]
    assert_killed(mutant, tmp_path, suites, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension's object files, csrc/cpu's in units/: brought up to date by the first worker, for all."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    done = root / "objects.done"
    with FileLock(ROOT / "build/objects.lock"):  # test_extension.py builds there too
        if not done.exists():
            build = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "-b", str(root / "lib")],
                env=os.environ | {"TILEWRIGHT_REQUIRE_EXT": "1"},
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            assert build.returncode == 0, build.stderr[-4000:]
            done.touch()
    return ROOT / "build/temp"


def units_with(path: Path) -> list[Path]:
    """The files of csrc/cpu that are compiled and include `path`, or it itself."""
    if path.suffix == ".cpp":
        return [path]
    users = [p for p in CPU.iterdir() if f'#include "{path.name}"' in p.read_text()]
    return sorted({unit for user in users for unit in units_with(user)})


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="links what a CPU build is made of")
@pytest.mark.parametrize("mutant", LISTED.CPP, ids=name)
def test_a_cpp_mutant_is_killed(mutant: tuple, objects: Path, tmp_path: Path):
    level = _native.cpu_isa()
    folder = mutated(mutant, tmp_path / "cpu").parent
    instead = {}
    for unit in units_with(mutant.path):
        was, becomes = objects / f"units/{unit.stem}.{level}.o", tmp_path / f"{unit.stem}.o"
        ninja = ["ninja", "-C", str(was.parent), "-t", "commands", was.name]
        command = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout.strip()
        command = command.splitlines()[-1].replace(was.name, str(becomes))
        command = command.replace(os.path.relpath(unit, was.parent), str(folder / unit.name))
        command = command.replace("-O3", "-O1")  # in a third of the time
        subprocess.run(command, shell=True, cwd=was.parent, check=True, capture_output=True)
        instead[was] = becomes
    package = linked(tmp_path, "_C.")
    (extension,) = PACKAGE.glob("_C.*.so")
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    there = {path.stem for path in (ROOT / "csrc").rglob("*.cpp")}  # not what an older build left
    made = [path for path in sorted(objects.rglob("*.o")) if path.name.split(".")[0] in there]
    linked_objects = [str(instead.get(path, path)) for path in made]
    subprocess.run(
        ["g++", "-shared", "-fopenmp", *linked_objects, *libraries, "-o", package / extension.name,
         "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"],
        check=True, capture_output=True,
    )  # fmt: skip
    assert_killed(mutant, tmp_path, [suite_of(mutant.op)], TILEWRIGHT_CPU_ISA=level)
