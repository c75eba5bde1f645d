"""The page of results: what it says, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tilewright.bench import harness

pytest.importorskip("matplotlib")
ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page() -> ModuleType:
    return harness.load(ROOT / "benchmarks/page.py")


def row(shape: str, size: int, mode: str, ratio: float) -> dict:
    ours = {"tilewright": 1.0, "eager": ratio}
    return {
        "shape": shape, "dtype": "float32", "mode": mode, "bytes": size, "flops": size // 2,
        "milliseconds": ours, "milliseconds_p20": ours, "milliseconds_p80": ours,
        "speedup_over": {"eager": ratio}, "speedup_over_p20": {"eager": ratio * 0.9},
        "speedup_over_p80": {"eager": ratio * 1.1}, "gb_per_second": 12.0, "gflop_per_second": 6.0,
        "copy_milliseconds": 0.5, "percent_of_roofline": 50.0, "allocator_bound": False,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    about = {
        "name": "rms_norm", "device": "a-cpu", "cpu": "A <CPU>", "gpu": None, "instruction_set": "avx2",
        "threads": 2, "torch": "2.13.0", "triton": "3.6.0", "commit": "0123456789", "date": "2026-01-02",
        "uncommitted_changes": False, "command": "tilewright bench rms_norm",
    }  # fmt: skip
    rows = [
        row("small", 1000, "fwd", 2.0),
        row("large", 9000, "fwd", 0.8),
        row("large", 9000, "fwd+bwd", 3.0),
    ]
    (tmp_path / "a-cpu").mkdir()
    (tmp_path / "a-cpu/rms_norm.json").write_text(json.dumps({**about, "rows": rows}))
    (tmp_path / "a-cpu/generate.json").write_text(json.dumps({**about, "rows": [{"tokens": 1}]}))
    return tmp_path


def test_losses_are_told_first_and_marked(page, results, tmp_path):
    out = tmp_path / "not there yet/page.html"  # as in a fresh clone
    assert page.main([str(out), str(results)]) == 0
    text = out.read_text()
    assert "Where we lose: 1 rows" in text and "eager takes 0.80 of our time" in text
    assert text.index("eager takes") < text.index("<table>")
    assert text.count('<td class="loss">') == 1 and '<td class="loss">0.80</td>' in text
    assert (
        "A &lt;CPU&gt;" in text and "tilewright bench rms_norm" in text and "generate" not in text
    )
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing from elsewhere


def test_training_runs_are_drawn(page, results, tmp_path):
    about = json.loads((results / "a-cpu/rms_norm.json").read_text())
    runs = [
        {"run": name, "loss_at": {"0": 5.5, "25": loss}, "load": [[0.9, 1.1], [1.5, 0.5]]}
        for name, loss in (("ours & co", 2.0), ("eager", 2.1))
    ]
    training = about | {"name": "moe_training", "rows": runs}
    (results / "a-cpu/moe_training.json").write_text(json.dumps(training))
    out = tmp_path / "page.html"
    assert page.main([str(out), str(results)]) == 0
    text = out.read_text()
    assert "<h2>moe_training on a-cpu</h2>" in text
    assert text.count('alt="moe_training: ') == 2
    assert text.index("moe_training on") > text.index("rms_norm on")


def test_what_is_on_record_makes_a_page(page, tmp_path):
    """The project's own results: of each device, and of make gpu's file each op."""
    out = tmp_path / "page.html"
    assert page.main([str(out)]) == 0
    text = out.read_text()
    for path in (ROOT / "benchmarks/results").iterdir():
        assert f" on {path.name}</h2>" in text
    gpu = list((ROOT / "benchmarks/results").glob("*/gpu.json"))
    assert not gpu or "make gpu" in text


def test_nothing_on_record_exits_2(page, tmp_path, capsys):
    assert page.main([str(tmp_path / "page.html"), str(tmp_path)]) == 2
    assert "no op on record" in capsys.readouterr().err and not list(tmp_path.glob("page*"))
    assert page.main([]) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_every_plot_and_complains_of_nothing(page, results, tmp_path):
    out = tmp_path / "page.html"
    page.main([str(out), str(results)])
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
         "--dump-dom", out.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plots = out.read_text().count("<img ")
    assert plots == 3 and f'data-drawn="{plots}"' in done.stdout
    assert "CONSOLE" not in done.stderr
