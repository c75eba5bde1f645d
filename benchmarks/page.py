"""One self-contained HTML page of the ops on record: losses first, tables, plots over sizes, rooflines; then
training runs.

python benchmarks/page.py OUT.html [RESULTS]    RESULTS: a folder of <device>/<name>.json; quick runs too
"""

import base64
import html
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tilewright.lab.roofline import named

RESULTS = Path(__file__).resolve().parent / "results"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .loss { background: #fbd5d0; font-weight: 600 }
img { max-width: 100%; display: block; margin: 1em 0 } .about { color: #666 }
"""
# for whoever looks without eyes: how many plots the browser could draw
SCRIPT = """
addEventListener("load", () => {
  document.documentElement.dataset.drawn = [...document.images].filter((i) => i.naturalWidth > 0).length;
});
"""


def op_reports(results: Path) -> list[dict[str, Any]]:
    """Reports of ops whose rows carry bytes and FLOPs, by device and name; make gpu's file is one of each
    op that its rows name."""
    found = []
    for report in _all(results):
        ops = dict.fromkeys(row.get("op") for row in report.get("rows", ()))
        for op in ops:
            rows = [row for row in report["rows"] if row.get("op") == op]
            named = {} if op is None else {"name": op, "command": "make gpu"}
            found.append({**report, **named, "rows": rows})
    return [r for r in found if all("flops" in row for row in r["rows"])]


def training_reports(results: Path) -> list[dict[str, Any]]:
    """Reports whose rows are training runs."""
    return [
        r for r in _all(results) if r.get("rows") and all("loss_at" in row for row in r["rows"])
    ]


def _all(results: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(results.rglob("*.json"))]


def case(row: dict[str, Any]) -> str:
    """What a row measured, in words."""
    note = " (allocator-bound)" if row["allocator_bound"] else ""
    return f"{row['shape']} {row['dtype']} {row['mode']}{note}"


def _image(draw: Callable[[Axes], None], height: float, label: str) -> str:
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    draw(axes)
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{html.escape(label)}" src="data:image/svg+xml;base64,{data}">'


def _logarithms(axes: Axes, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _rivals(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in report["rows"] for name in row["speedup_over"]))


def ratios(report: dict[str, Any]) -> str:
    """How many times longer each rival takes, row by row, with the 20th to the 80th percentile."""
    rows = report["rows"][::-1]

    def draw(axes: Axes) -> None:
        for i, name in enumerate(_rivals(report)):
            at = [(y, row) for y, row in enumerate(rows) if name in row["speedup_over"]]
            middle = [row["speedup_over"][name] for _, row in at]
            low = [
                max(0, m - row["speedup_over_p20"][name])
                for m, (_, row) in zip(middle, at, strict=True)
            ]
            high = [
                max(0, row["speedup_over_p80"][name] - m)
                for m, (_, row) in zip(middle, at, strict=True)
            ]
            shift = 0.12 * (i - 0.5 * (len(_rivals(report)) - 1))
            axes.errorbar(
                middle, [y + shift for y, _ in at], xerr=[low, high], fmt="o", ms=5, label=name
            )
        axes.axvline(1, color="#c0392b", lw=1)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [case(row) for row in rows])
        axes.set_xlabel("times as long as ours; left of the line we lose")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return _image(draw, 1.2 + 0.35 * len(rows), f"{report['name']}: rivals over ours")


def sizes(report: dict[str, Any]) -> str:
    """Time against bytes moved, every provider, both in logarithms."""
    modes = list(dict.fromkeys(row["mode"] for row in report["rows"]))

    def draw(axes: Axes) -> None:
        for mode in modes:
            for name in ("tilewright", *_rivals(report)):
                points = sorted(
                    (row["bytes"], row["milliseconds"][name])
                    for row in report["rows"]
                    if row["mode"] == mode and name in row["milliseconds"]
                )
                line = "-" if name == "tilewright" else ":"
                axes.plot(*zip(*points, strict=True), marker="o", ls=line, label=f"{name} {mode}")
        _logarithms(axes, "least bytes moved", "milliseconds")

    return _image(draw, 4.5, f"{report['name']}: time over sizes")


def roofline(report: dict[str, Any]) -> str:
    """GFLOP/s against FLOPs a byte, under the line of the bandwidth: a GPU's data sheet, or what a
    copy of as many bytes reached on the CPU."""
    gpu = named(report["gpu"] or "")

    def draw(axes: Axes) -> None:
        found = [row for row in report["rows"] if row["mode"] == "fwd" and row["flops"]]
        x = [row["flops"] / row["bytes"] for row in found]
        axes.scatter(x, [row["gflop_per_second"] for row in found], zorder=3, label="ours, forward")
        speeds = [
            row["bytes"] / row["copy_milliseconds"] / 1e6
            for row in found
            if "copy_milliseconds" in row
        ]
        if gpu is not None:
            speeds = [gpu.bandwidth]
        ends = [min(x) / 2, max(x) * 2]
        for speed in {min(speeds), max(speeds)} if speeds else ():
            axes.plot(
                ends, [speed * e for e in ends], color="#888", lw=1, label=f"{speed:.0f} GB/s"
            )
        _logarithms(axes, "FLOPs a byte", "GFLOP/s")

    return _image(draw, 4, f"{report['name']}: roofline")


def curves(report: dict[str, Any]) -> str:
    """Loss over steps of every training run, and how evenly its experts were taken, layer by layer."""

    def loss(axes: Axes) -> None:
        for i, row in enumerate(report["rows"]):
            steps = [int(step) for step in row["loss_at"]]
            axes.plot(
                steps, [*row["loss_at"].values()], ls="-" if i % 2 == 0 else ":", label=row["run"]
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats")
        axes.legend(fontsize=8)

    def load(axes: Axes) -> None:
        rows = report["rows"]
        for i, row in enumerate(rows):
            shares = [share for layer in row["load"] for share in layer]
            at = [x + (i - (len(rows) - 1) / 2) * 0.2 for x in range(len(shares))]
            axes.bar(at, shares, width=0.2, label=row["run"])
        axes.axhline(1, color="#888", lw=1)
        axes.set_xlabel("expert, the layers one after another")
        axes.set_ylabel("times its share")
        axes.legend(fontsize=8)

    name = report["name"]
    return _image(loss, 4, f"{name}: loss") + _image(load, 4, f"{name}: balance of experts")


def table(report: dict[str, Any]) -> str:
    """Every row; a rival that was faster is marked."""
    rivals = _rivals(report)
    head = [
        "case",
        "ours, ms (p20 to p80)",
        *(f"over {name}" for name in rivals),
        "GB/s",
        "% of roofline",
    ]
    lines = ["".join(f"<th>{html.escape(text)}</th>" for text in head)]
    for row in report["rows"]:
        ours, low, high = (row[f"milliseconds{p}"]["tilewright"] for p in ("", "_p20", "_p80"))
        cells = [
            f"<td>{html.escape(case(row))}</td>",
            f"<td>{ours:.4g} ({low:.4g} to {high:.4g})</td>",
        ]
        for name in rivals:
            ratio = row["speedup_over"].get(name)
            kind = ' class="loss"' if ratio is not None and ratio < 1 else ""
            cells.append(f"<td{kind}>{'' if ratio is None else f'{ratio:.2f}'}</td>")
        roof = row.get("percent_of_roofline")
        cells += [
            f"<td>{row['gb_per_second']:.3g}</td>",
            f"<td>{'' if roof is None else f'{roof:.0f}'}</td>",
        ]
        lines.append("".join(cells))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def losses(reports: Sequence[dict[str, Any]]) -> str:
    """Every row a rival won."""
    told = [
        f"{r['name']}, {case(row)}: {name} takes {ratio:.2f} of our time"
        for r in reports
        for row in r["rows"]
        for name, ratio in row["speedup_over"].items()
        if ratio < 1
    ]
    lost = [f"<li>{html.escape(text)}</li>" for text in told]
    return f"<h2>Where we lose: {len(lost)} rows</h2><ul>{''.join(lost)}</ul>"


def about(report: dict[str, Any]) -> str:
    """Where a report comes from and how to repeat it."""
    commit = (report["commit"] or "no commit")[:9] + ("+" if report["uncommitted_changes"] else "")
    text = (
        f"{report['gpu'] or report['cpu']}, {report['instruction_set']}, {report['threads']} threads, "
        f"torch {report['torch']}, triton {report['triton']}, {commit}, {report['date']}: {report['command']}"
    )
    return f'<p class="about">{html.escape(text)}</p>'


def page(reports: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]] = ()) -> str:
    """The whole page: ops, then training runs."""
    parts = [losses(reports)]
    for report in reports:
        title = f"{report['name']} on {report['device']}"
        parts += [f"<h2>{html.escape(title)}</h2>", about(report), table(report)]
        parts.append(ratios(report))
        if len({row["bytes"] for row in report["rows"] if row["mode"] == "fwd"}) > 1:
            parts.append(sizes(report))
        parts.append(roofline(report))
    for report in trained:
        title = f"{report['name']} on {report['device']}"
        parts += [f"<h2>{html.escape(title)}</h2>", about(report), curves(report)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tilewright: measured</title>'
        f"<style>{STYLE}</style><script>{SCRIPT}</script></head><body><h1>tilewright: measured</h1>"
        f"{''.join(parts)}</body></html>\n"
    )


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2) or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    results = Path(arguments[1]) if len(arguments) == 2 else RESULTS
    reports = op_reports(results)
    if not reports:
        print(f"no op on record under {results}", file=sys.stderr)
        return 2
    out = Path(arguments[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(out.name + ".part")
    draft.write_text(page(reports, training_reports(results)))
    draft.replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
