"""What is shipped, and what an install gives where torch or a compiler is missing.  No network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = "build/temp"  # objects, which ninja takes as they are in a copy of the tree
IGNORED = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "*.so",
    "__pycache__",
    "_build_info.json",
    ".*_cache",
)


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TILEWRIGHT_") and name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    tree = tmp_path_factory.mktemp("sdist") / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=IGNORED)
    run(sys.executable, "setup.py", "-q", "sdist", cwd=tree)
    (archive,) = (tree / "dist").glob("tilewright-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tree.parent)
    return tree.parent / archive.name.removesuffix(".tar.gz")


def wheel(source: Path, into: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel as pip does, unpack it; the folder, and what the build said."""
    tree = into / "tree"
    shutil.copytree(source, tree)
    if (ROOT / OBJECTS).is_dir():
        shutil.copytree(ROOT / OBJECTS, tree / OBJECTS)
    done = run(sys.executable, "setup.py", "-q", "bdist_wheel", cwd=tree, **environment)
    (built,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(into / "installed")
    (into / "installed" / built.name).touch()
    return into / "installed", done.stdout + done.stderr


WORKS = """
import torch, tilewright
from tilewright import _native
print(_native.status)
for name in tilewright.ops.__all__:
    assert callable(getattr(tilewright.ops, name))
for route in tilewright.explain():
    assert route.device == "cuda" or route.implementation.startswith("reference"), route
if hasattr(tilewright.ops, "rms_norm"):
    x = torch.randn(3, 8, requires_grad=True)
    tilewright.ops.rms_norm(x, torch.ones(8)).sum().backward()
    assert x.grad is not None
"""


def test_sdist_carries_kernels_and_csrc(sdist: Path):
    for folder, pattern in (("kernels", "*.py"), ("csrc", "*.h"), ("csrc", "*.cpp")):
        for path in (ROOT / folder).rglob(pattern):
            assert (sdist / path.relative_to(ROOT)).is_file(), path
    assert (sdist / "python/tilewright/kernels/_tune.py").is_file()
    assert (sdist / "python/tilewright/py.typed").is_file()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"):
        assert (sdist / name).is_file(), name
    assert not list(sdist.rglob("*.so")) and not list(sdist.rglob("_build_info.json"))


def test_without_torch_the_wheel_is_pure_python(sdist: Path, tmp_path: Path):
    """What `pip install .` does: its isolated build has setuptools and no torch."""
    missing = tmp_path / "missing/torch"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text("raise ModuleNotFoundError('torch', name='torch')\n")
    installed, _ = wheel(sdist, tmp_path, PYTHONPATH=str(missing.parent))
    assert list(installed.glob("*-py3-none-any.whl"))
    package = installed / "tilewright"
    assert not list(package.rglob("*.so")) and not (package / "_build_info.json").exists()
    assert {p.name for p in (package / "kernels").glob("*.py")} == {
        p.name for p in (ROOT / "kernels").glob("*.py")
    }
    assert (package / "py.typed").is_file()
    done = run(sys.executable, "-c", WORKS, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.startswith("not built")


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_without_a_compiler_the_install_succeeds(sdist: Path, tmp_path: Path, compiler: str):
    installed, said = wheel(sdist, tmp_path, CXX=compiler)
    assert "tilewright: no extension, ops run on their references" in said
    package = installed / "tilewright"
    assert not list(package.rglob("*.so")) and not (package / "_build_info.json").exists()
    done = run(sys.executable, "-c", WORKS, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.startswith("not built")


def test_without_a_compiler_a_required_extension_is_an_error(sdist: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    shutil.copytree(sdist, tree)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tree,
        env=os.environ | {"CXX": "/bin/false", "TILEWRIGHT_REQUIRE_EXT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0


def test_a_lost_link_is_one_clear_line(tmp_path: Path):
    """A zip from the web turns the link into a text file."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=IGNORED)
    link = tree / "python/tilewright/kernels"
    if link.is_symlink():
        link.unlink()
    else:
        shutil.rmtree(link)
    link.write_text("../../kernels")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("python/tilewright/kernels must link")


@pytest.mark.slow
def test_wheel_with_the_extension(sdist: Path, tmp_path: Path):
    """The whole build from the source distribution, then an op on its C++ kernel."""
    installed, _ = wheel(sdist, tmp_path, TILEWRIGHT_REQUIRE_EXT="1")
    code = "from tilewright import _native; print(_native.status, _native.cpu_isa())"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.startswith("loaded "), done.stdout
