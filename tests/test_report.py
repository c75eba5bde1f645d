import json
from pathlib import Path
from types import ModuleType

import pytest

from tilewright.bench import harness

ROOT = Path(__file__).resolve().parent.parent
ABOUT = {
    "quick": False,
    "device": "a-cpu",
    "cpu": "A CPU",
    "gpu": None,
    "instruction_set": "avx2",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "date": "2026-01-02T03:04:05+00:00",
}
OP_ROW = {
    "shape": "4096x1920",
    "dtype": "bfloat16",
    "mode": "fwd",
    "milliseconds": {"tilewright": 1.234, "eager": 2.468},
    "speedup_over": {"eager": 2.0},
    "allocator_bound": True,
    "gb_per_second": 25.5,
}


@pytest.fixture
def report() -> ModuleType:
    return harness.load(ROOT / "benchmarks/report.py")


def record(folder: Path, name: str, rows: list[dict], **more: object) -> None:
    (folder / "a-cpu").mkdir(exist_ok=True)
    text = json.dumps({**ABOUT, "name": name, "rows": rows, **more})
    (folder / f"a-cpu/{name}.json").write_text(text)


def test_speed_shows_what_is_on_record(report: ModuleType, tmp_path: Path):
    record(tmp_path, "rms_norm", [OP_ROW])
    record(tmp_path, "generate", [{"engine": "ours", "decode": 250.0, "prefill": None}])
    record(tmp_path, "rope", [OP_ROW], quick=True)
    text = report.speed(tmp_path)
    assert "| 4096x1920 (allocator-bound) | bf16 | fwd | 1.23 | 25.5 | 2.00× |" in text
    assert "| engine | decode | prefill |" in text and "| ours | 250 |  |" in text
    assert "A CPU, avx2, 2 threads, torch 2.13.0, 012345678, 2026-01-02" in text
    assert "rope" not in text


def test_nothing_on_record_is_said(report: ModuleType, tmp_path: Path):
    assert report.speed(tmp_path) == "Not yet measured."


def test_fill_replaces_only_between_the_markers(report: ModuleType):
    page = "before\n<!-- report: speed -->\nold\n<!-- /report: speed -->\nafter\n"
    once = report.fill(page, {"speed": r"new \1 table"})
    assert "old" not in once and once.startswith("before\n") and once.endswith("\nafter\n")
    assert report.fill(once, {"speed": r"new \1 table"}) == once
    with pytest.raises(ValueError, match="no section marked 'report: other'"):
        report.fill(page, {"other": ""})


def test_readme_has_every_section(report: ModuleType):
    report.fill((ROOT / "README.md").read_text(), {"support": "", "speed": ""})
