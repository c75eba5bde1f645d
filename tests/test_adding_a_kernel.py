"""docs/adding-a-kernel.md, followed to the letter in a scratch copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = "build/temp"  # objects, which ninja takes as they are in a copy of the tree
BLOCK = re.compile(
    r"(?:^`(?P<path>[\w./]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


def copy_tree(target: Path) -> None:
    """The files git knows or would add, links kept, and what is compiled of them."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listing.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    if (ROOT / OBJECTS).is_dir():
        shutil.copytree(ROOT / OBJECTS, target / OBJECTS)


@pytest.mark.slow
def test_the_page_adds_an_op(tmp_path: Path):
    copy_tree(tmp_path)
    page = (ROOT / "docs/adding-a-kernel.md").read_text()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(tmp_path / "python"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    written = []
    for block in BLOCK.finditer(page):
        if block["path"]:
            path = tmp_path / block["path"]
            assert not path.exists(), f"{block['path']} is there already"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"])
            written.append(block["path"])
            continue
        assert block["kind"] == "bash", f"a {block['kind']} block names no file"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block["text"]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block['text']}\n{done.stdout}\n{done.stderr}"
    assert len(written) == 9, written
