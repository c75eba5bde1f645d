"""`tilewright bench compare OLD.json NEW.json`: what became slower, beyond noise.

Times of two runs are not compared: machines drift.  What is compared is each row's speed-up over
eager, taken in turns within each run.  Noise is that of a difference of two: the root of the sum of the
squares of their spans from the 20th to the 80th percentile of that ratio, as shares of it.

Rows whose buffers are fresh mmaps at every call (`allocator_bound`, on a CPU) are shown and not judged: what
they time is how the kernel of the system gives pages to a process, threefold faster to one than to the
next of the same code, which no spread within a run tells of.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

LOSS = 0.05
BUSY = 0.5  # cores at work before a measurement: above it the machine was not ours


class Change(NamedTuple):
    """One row of both runs; change and noise as shares: 0.1 is 10 % slower."""

    row: str
    old: float
    new: float
    change: float
    noise: float
    allocator_bound: bool

    @property
    def lost(self) -> bool:
        return not self.allocator_bound and self.change > LOSS + self.noise


def read(path: Path) -> dict[str, Any]:
    """A report that `tilewright bench` wrote; ValueError where it is none."""
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(report, dict) or "rows" not in report or "device" not in report:
        raise ValueError(f"{path} is no report of tilewright bench")
    if not all("speedup_over_p80" in row for row in report["rows"]) or not report["rows"]:
        raise ValueError(f"{path} holds no rows of an op with their spread")
    busy = report.get("busy_cores_before")
    if busy is not None and busy > BUSY:
        raise ValueError(
            f"{path}: {busy:.1f} cores were busy before it; measure on a machine at rest"
        )
    return report


def _key(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['dtype']} {row['mode']}"


def _span(row: dict[str, Any]) -> float:
    """From the 20th to the 80th percentile of the speed-up over eager, as a share of it."""
    p20, p50, p80 = (row[f"speedup_over{p}"]["eager"] for p in ("_p20", "", "_p80"))
    return (p80 - p20) / p50


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Rows that both have.  ValueError where they are of unlike devices or ops, or share no row to judge."""
    for what in ("name", "device", "threads", "instruction_set"):
        if old.get(what) != new.get(what):
            raise ValueError(f"unlike {what}: {old.get(what)} and {new.get(what)}")
    before = {_key(row): row for row in old["rows"]}
    changes = []
    for row in new["rows"]:
        was = before.get(_key(row))
        if was is None:
            continue
        before_ratio, ratio = was["speedup_over"]["eager"], row["speedup_over"]["eager"]
        noise = math.hypot(_span(was), _span(row))
        bound = bool(was.get("allocator_bound")) or bool(row.get("allocator_bound"))
        changes.append(
            Change(_key(row), before_ratio, ratio, before_ratio / ratio - 1, noise, bound)
        )
    if not changes:
        raise ValueError("the two share no row")
    if all(change.allocator_bound for change in changes):
        raise ValueError("every row that the two share is bound by the allocator: nothing to judge")
    return changes
