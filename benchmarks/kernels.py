"""docs/kernels.md: what every kernel moves and compiles to, found without a GPU.

python benchmarks/kernels.py --write             run the interpreter and the compilers, write the page
python benchmarks/kernels.py --write rope rms_norm     the lines of these files of kernels/ and ops alone

tests/test_traffic.py and tests/test_compile.py hold every line of it.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from tilewright.bench import harness, inspection
from tilewright.lab import compile as offline

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs/kernels.md"
ARCHS = (80, 90, 100)
DTYPE = "bf16"
DECODE = "1x4x2x1x512x128"
SHAPES = {  # as `tilewright inspect` takes them
    "rms_norm": ("128x4096", "8x32768"),
    "add_rms_norm": ("128x4096", "8x32768"),
    "rms_norm_int8": ("128x4096", "8x32768"),
    "swiglu": ("128x4096",),
    "geglu": ("128x4096,packed=1",),
    "rope": ("256x8x128", "256x8x128,interleaved=1"),
    "attention": ("1x4x2x256x256x128", DECODE),
    "attention_decode": ("1x8x2x1024x128x1024", "4x8x2x256x128x16"),
    "attention_varlen": ("4x4x2x64x128",),
    "quant_linear": ("1x512x512x4", "64x512x512x4", "64x512x512x8"),
    "int8_linear": ("64x512x512",),
    "moe_losses": ("1x64x128x8", "2x64x256x8,sigmoid=1"),
    "moe_route": ("64x128x8", "64x256x8,grouped=1"),
    "moe_dispatch": ("64x128x8",),
    "moe_combine": ("64x8x512",),
    "moe_experts": ("64x8x2x256x128",),
    "quant_moe_experts": ("64x8x2x256x128x4x128",),
}
FORWARD_ONLY = ("attention_decode", "moe_dispatch", "rms_norm_int8")
TRAFFIC = ("op", "pass", "sizes", "least bytes", "distinct", "loaded", "stored", "FLOPs of dots")
COMPILED = ("file", "kernel", "types", "constants", "registers", "spills", "shared KiB", "warps", "matrix",
            "16-byte loads")  # fmt: skip

TEXT = """# Kernels: what they move and compile to

Written by `python benchmarks/kernels.py --write` on triton {triton}; no GPU was asked. The tests hold
every line: `tests/test_traffic.py` counts again, `tests/test_compile.py` compiles again.

## Traffic

In bfloat16, counted by the interpreter, in bytes. The least is what the mathematics needs (each
benchmark's `cost` and `backward_cost`). Distinct bytes are each launch's own, summed: they exceed the
least by what the forward keeps for the backward, by sums of dw not yet added up, by what both of
attention's backward kernels read, and by what moe_dispatch's, moe_losses' and moe_experts' launches leave each other;
nothing else. Loads beyond them are read again, from the cache where
they fit. FLOPs of dots are those of the matrix units, in percent of what the mathematics needs.

{traffic}

## Machine code

Registers a thread, bytes spilled, KiB of shared memory, resident warps a multiprocessor and the matrix
instruction, on sm_80 / sm_90 / sm_100, one value where all agree; global loads that are 16 bytes wide,
of all, on sm_90. The launch configurations are the heuristics'; `*.cu` is compiled by nvcc.

{compiled}
"""


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---"] * len(names))]


def traffic_line(definition: ModuleType, shape: str, backward: bool) -> str:
    """One op, shape and pass; under TRITON_INTERPRET=1 only."""
    sizes, dtype = inspection.sizes_of(definition, shape), inspection.DTYPES[DTYPE]
    found = inspection.launches(definition, dtype, backward, sizes, inspection.PROGRAMS)
    total = lambda name: sum(launch[name] for launch in found)  # noqa: E731
    least, flops = (definition.backward_cost if backward else definition.cost)(dtype, **sizes)
    distinct = total("distinct_bytes_loaded") + total("distinct_bytes_stored")
    dots = total("dot_flops")
    cells = (
        definition.OP,
        "backward" if backward else "forward",
        shape,
        least,
        f"{distinct} ({distinct / least:.3f})",
        total("bytes_loaded"),
        total("bytes_stored"),
        f"{100 * dots / flops:.0f} %" if dots else "",
    )
    return _line(cells)


def cases() -> list[tuple[str, str, bool]]:
    """(op, shape, backward) of every line of traffic; one query is not trained on, nor a cache."""
    return [
        (op, shape, backward)
        for op, shapes in SHAPES.items()
        for shape in shapes
        for backward in (False, True)
        if not (backward and (shape == DECODE or op in FORWARD_ONLY))
    ]


def traffic(ops: Sequence[str]) -> list[str]:
    found = {d.OP: d for d in harness.discover(HERE) if hasattr(d, "OP")}
    return [traffic_line(found[op], *case) for op, *case in cases() if op in ops]


def _slashed(values: Sequence[object]) -> str:
    """One value for all of ARCHS where they agree, else each one's."""
    return " / ".join(map(str, values if len(set(values)) > 1 else values[:1]))


def compiled_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A line a variant from the rows of lab.compile, those of ARCHS together."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = json.dumps([row["kernel"], row["types"], row["constants"], row["options"]])
        variants.setdefault(name, []).append(row)
    lines = []
    for found in variants.values():
        by_arch = {row["arch"]: row for row in sorted(found, key=lambda row: row["arch"])}
        first, hopper = found[0], by_arch[90]
        options = {k: v for k, v in first["options"].items() if k != "enable_fp_fusion"}
        cells = (
            f"`{first['file']}`",
            f"`{first['kernel']}`",
            first["types"],
            " ".join(f"{k}={v}" for k, v in (first["constants"] | options).items()),
            _slashed([row["registers"] for row in by_arch.values()]),
            _slashed([row["spills"] for row in by_arch.values()]),
            _slashed([f"{row['shared'] / 1024:.1f}" for row in by_arch.values()]),
            _slashed([row["resident_warps"] for row in by_arch.values()]),
            _slashed([row["matrix"] or "none" for row in by_arch.values()]) if first["dot"] else "",
            f"{hopper['wide_loads']} of {hopper['loads']}",
        )
        lines.append(_line(cells))
    return lines


def of_hopper(line: str) -> str:
    """A variant's line as compiled_lines has it of sm_90 alone."""
    at = ARCHS.index(90)
    cells = (cell.split(" / ") for cell in line.split(" | "))
    return " | ".join(cell[at] if len(cell) == len(ARCHS) else " / ".join(cell) for cell in cells)


def _compiled(files: Sequence[str]) -> dict[str, list[str]]:
    """Each file's lines, as many at once as there are processors."""
    command = [sys.executable, "-m", "tilewright.lab.compile"]

    def lines(file: str) -> list[str]:
        asked = [*command, file, "--arch", *map(str, ARCHS)]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        return compiled_lines([json.loads(line) for line in done.stdout.splitlines()])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(files, pool.map(lines, files), strict=True))


def page(names: Sequence[str] = ()) -> str:
    """The page anew, or with the lines of these files and ops anew; the others as they are on it."""
    every = [*offline.files(), *offline.cuda_files()]
    ops = [op for op in SHAPES if not names or op in names]
    files = [file for file in every if not names or file in names]
    unknown = set(names) - set(ops) - set(files)
    if unknown:
        raise ValueError(f"no file of kernels/ and no op: {', '.join(sorted(unknown))}")
    there = PAGE.read_text().splitlines() if names else []
    counted = {op: _of(there, op) for op in SHAPES}
    if ops:
        command = [sys.executable, __file__, "--traffic", *ops]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        counted |= {op: _of(done.stdout.splitlines(), op) for op in ops}
    code = {file: _of(there, f"`{file}`") for file in every} | _compiled(files)
    return TEXT.format(
        triton=version("triton"),
        traffic="\n".join([*_head(TRAFFIC), *chain.from_iterable(counted.values())]),
        compiled="\n".join([*_head(COMPILED), *chain.from_iterable(code.values())]),
    )


def _of(lines: Sequence[str], whose: str) -> list[str]:
    """Those of a table whose first cell is this."""
    return [line for line in lines if line.startswith(f"| {whose} | ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", nargs="*", metavar="NAME", help="write docs/kernels.md")
    action.add_argument("--traffic", nargs="*", metavar="OP", help="print the lines of traffic")
    options = parser.parse_args()
    if options.traffic is not None:
        print("\n".join(traffic(options.traffic or list(SHAPES))))
        return 0
    try:
        text = page(options.write)
    except ValueError as error:
        print(f"kernels.py: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
