"""`make demo`: SmolLM2 answers a question, then every op and the whole model are checked and timed.

Run from a checkout: python -m tilewright.bench.demo [--quick].  Exits 0 only where every
verification held.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tilewright
from tilewright import testing
from tilewright.bench import harness, peers, verify

QUESTION = "Why does the moon show different phases?"


def answer(console: Console, quick: bool) -> None:
    """Let the model answer on screen."""
    console.rule("SmolLM2-135M-Instruct, Q4_1")
    console.print(QUESTION, style="bold")
    command = [sys.executable, "-m", "tilewright.cli", "generate", QUESTION]
    new = "48" if quick else "160"
    subprocess.run([*command, "--model", str(peers.smollm2()), "--max-new-tokens", new], check=True)


def errors(definition: ModuleType, dtype: torch.dtype, shape: str) -> tuple[float, float, str]:
    """Our largest error against float64 and eager's, over outputs and gradients; why it fails,
    or "" where the tolerance rule holds."""
    inputs = harness.drawn(definition, shape, dtype)
    named = list(inputs)

    def results(kind: torch.dtype) -> list[Tensor]:
        values = [testing.cast(x, kind) for x in inputs.values()]
        return testing.run(lambda *v: fn(**dict(zip(named, v, strict=True))), values, {})

    fn = definition.PROVIDERS["tilewright"]
    ours = results(dtype)
    with tilewright.eager():  # the same call on the reference twins
        truth, eager = results(torch.float64), results(dtype)
    worst = max(range(len(truth)), key=lambda i: testing.errors(ours[i], truth[i])[1])
    failure = ""
    for i, (o, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        try:
            testing.assert_within(o, e, t, torch.finfo(dtype).eps, f"result {i}")
        except AssertionError as error:
            failure = str(error)
    mine, eagers = (testing.errors(x[worst], truth[worst])[1] for x in (ours, eager))
    return mine, eagers, failure


def _cases(definition: ModuleType, quick: bool) -> list[tuple[str, torch.dtype]]:
    """The first shape in every dtype, and the decode shape in the first; only one if quick."""
    first = next(iter(definition.SHAPES))
    dtypes = definition.DTYPES[:2]
    if quick:
        return [(first, dtypes[0])]
    decode = [(name, dtypes[0]) for name in definition.SHAPES if "decode" in name and name != first]
    return [(first, dtype) for dtype in dtypes] + decode[:1]


def op_table(console: Console, directory: Path, quick: bool) -> list[str]:
    """Print table (a); return what failed."""
    table = Table(
        "op",
        "shape",
        "dtype",
        "implementation",
        "error / float64",
        "eager's error",
        "timed",
        "ms",
        "x eager",
        "x compile",
        title=f"Op by op, on {harness.device()} (error: worst row's relative RMS)",
    )
    routes = {(r.op, r.device): r.implementation for r in tilewright.explain()}
    failures = []
    definitions = [d for d in harness.discover(directory) if hasattr(d, "OP")]
    for definition in definitions:
        for shape, dtype in _cases(definition, quick):
            with console.status(f"{definition.OP} {shape} {dtype}"):
                mine, eagers, failure = errors(definition, dtype, shape)
                mode = harness.modes(harness.drawn(definition, shape, dtype))[-1]
                line = harness.row(definition, shape, dtype, mode, 0.2 if quick else 0.6)
            over = line["speedup_over"]
            table.add_row(
                definition.OP,
                shape,
                line["dtype"],
                routes[getattr(definition, "ROUTE", definition.OP), harness.device()],
                f"{mine:.2e}" + (" FAILS" if failure else ""),
                f"{eagers:.2e}",
                mode,
                f"{line['milliseconds']['tilewright']:.3f}",
                *(f"{over[p]:.2f}" if p in over else "-" for p in ("eager", "compile")),
            )
            if failure:
                failures.append(f"{definition.OP} {shape} {line['dtype']}: {failure}")
    console.print(table)
    return failures


def model_table(console: Console, directory: Path, quick: bool) -> None:
    """Print table (b) and write its results file."""
    with console.status("the whole model beside its rivals, in turns"):
        report = harness.measure(harness.discover(directory, ["generate"])[0], quick=quick)
    table = Table(
        "job", "engine", "tokens/s", "ours, float, over it", "ours, int8, over it",
        title=f"Whole model, {report['threads']} threads, median of {report['rows'][0]['rounds']}",
    )  # fmt: skip
    for line in report["rows"]:
        ratios: dict[str, Any] = line["ours_over_it"]
        table.add_row(
            line["job"],
            line["engine"],
            f"{line['tokens_per_second']:.1f}",
            *(f"{ratios[a]:.2f}" if a in ratios else "" for a in ("float", "int8")),
        )
    console.print(table)
    if not quick:
        where = harness.write(report, directory / "results")
        console.print(f"written to {where}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case an op, two rounds")
    parser.add_argument("--directory", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    # a table folds into ribbons below this; a narrower terminal wraps its lines instead
    console = Console(width=max(132, Console().width))
    start = time.perf_counter()
    answer(console, options.quick)
    failures = op_table(console, options.directory, options.quick)
    with console.status("logits beside transformers"):
        found = verify.verify(peers.smollm2(), tokens=64 if options.quick else 256)
    console.print(verify.table(found))
    if not found["passed"]:
        failures.append("the model's logits or greedy tokens differ from transformers'")
    model_table(console, options.directory, options.quick)
    for failure in failures:
        console.print(f"FAILED: {failure}", markup=False)
    verdict = "every verification held" if not failures else f"{len(failures)} failed"
    console.print(f"{verdict}; {time.perf_counter() - start:.0f} s")
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
