"""Tables of the README, from benchmarks/results/<device>/*.json and tilewright.explain().

python benchmarks/report.py            prints them
python benchmarks/report.py --write    puts them between the README's markers
python benchmarks/report.py --check    exits 1 where the README says otherwise
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tilewright

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def reports(results: Path) -> list[dict[str, Any]]:
    """Every whole run on record, by device and name; `--quick` ones are none."""
    found = [json.loads(path.read_text()) for path in sorted(results.rglob("*.json"))]
    return [report for report in found if "rows" in report and not report.get("quick")]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def op_table(report: dict[str, Any]) -> str:
    """One op: our time, its share of traffic, and how many times longer each rival takes."""
    rows = report["rows"]
    rivals = list(dict.fromkeys(name for row in rows for name in row["speedup_over"]))
    head = ["shape", "dtype", "pass", "ours, ms", "GB/s", *(f"over {name}" for name in rivals)]
    body = []
    for row in rows:
        shape = row["shape"] + (" (allocator-bound)" if row["allocator_bound"] else "")
        traffic = row.get("gb_per_second")
        body.append(
            [
                shape,
                DTYPES.get(row["dtype"], row["dtype"]),
                row["mode"],
                f"{row['milliseconds']['tilewright']:.3g}",
                "" if traffic is None else f"{traffic:.3g}",
                *(_ratio(row["speedup_over"].get(name)) for name in rivals),
            ]
        )
    return markdown(head, body)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return "" if value is None else str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, list) for item in value)


def plain_table(report: dict[str, Any]) -> str:
    """A measurement of its own: its rows as they are, a column for each of their keys but those of tables, which
    benchmarks/page.py draws."""
    tables = {key for row in report["rows"] for key, value in row.items() if _is_table(value)}
    keys = [
        key for key in dict.fromkeys(k for row in report["rows"] for k in row) if key not in tables
    ]
    head = [key.replace("_", " ") for key in keys]
    return markdown(head, [[_cell(row.get(key)) for key in keys] for row in report["rows"]])


def provenance(report: dict[str, Any]) -> str:
    """Where and when a table was measured."""
    where = report["gpu"] or f"{report['cpu']}, {report['instruction_set']}"
    commit = (report["commit"] or "no commit")[:9] + ("+" if report["uncommitted_changes"] else "")
    return (
        f"{where}, {report['threads']} threads, torch {report['torch']}, {commit}, "
        f"{report['date'][:10]}"
    )


def speed(results: Path) -> str:
    """Every report on record, each under its name."""
    parts = []
    for report in reports(results):
        is_op = all("speedup_over" in row for row in report["rows"])
        table = op_table(report) if is_op else plain_table(report)
        parts.append(f"### {report['name']}\n\n{provenance(report)}\n\n{table}")
    return "\n\n".join(parts) or "Not yet measured."


def support(results: Path) -> str:
    """Each op, what serves it on a CPU and a GPU, and whether its speed there is on record."""
    measured = {(r["name"], "cuda" if r["gpu"] else "cpu") for r in reports(results)}
    routes = {(route.op, route.device): route for route in tilewright.explain()}
    rows = []
    for op in sorted({op for op, _ in routes}):
        cells = [f"`{op}`"]
        for device in ("cpu", "cuda"):
            route = routes[op, device]
            # the level is this machine's, the table is for all
            kind = re.sub(r" \(.*", "", route.implementation)
            notes = [route.why] if device == "cuda" else []
            notes.append("measured" if (op, device) in measured else "not yet measured")
            cells.append(f"{kind}: {', '.join(notes)}")
        rows.append(cells)
    return markdown(["op", "CPU", "NVIDIA GPU"], rows) if rows else "No ops."


def fill(readme: str, sections: dict[str, str]) -> str:
    """The README with each section between its markers; ValueError where a marker is missing."""
    for name, text in sections.items():
        marked = re.compile(rf"(<!-- report: {name} -->\n).*?(<!-- /report: {name} -->)", re.S)
        if not marked.search(readme):
            raise ValueError(f"README.md has no section marked 'report: {name}'")
        readme = marked.sub(lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", readme)
    return readme


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - {"--write", "--check"}:
        print(__doc__, file=sys.stderr)
        return 2
    sections = {"support": support(RESULTS), "speed": speed(RESULTS)}
    if not arguments:
        print(*sections.values(), sep="\n\n")
        return 0
    path = ROOT / "README.md"
    old = path.read_text()
    new = fill(old, sections)
    if "--write" in arguments:
        path.write_text(new)
        return 0
    if old != new:
        print("README.md is out of date: python benchmarks/report.py --write", file=sys.stderr)
    return int(old != new)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
