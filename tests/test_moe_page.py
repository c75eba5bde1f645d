"""docs/moe.md: its programs run, one after another."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parent.parent / "docs/moe.md"


def test_the_page_runs():
    names: dict[str, Any] = {}
    programs = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(programs) == 5
    for program in programs:
        exec(program, names)
    assert names["y"].shape == (names["T"], names["D"]) and names["y"].isfinite().all()
    assert names["counts"].sum() == names["T"] * names["k"]
    assert isinstance(names["loss"], torch.Tensor)
