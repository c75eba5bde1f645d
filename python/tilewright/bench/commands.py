"""The commands that measure: `tilewright bench`, `inspect` and `tune`; cli.py registers them."""

import json
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

BENCHMARKS = Path("benchmarks")
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; default: torch's own choice.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DirectoryOption = Annotated[Path, typer.Option(help="Where bench_<name>.py are.")]


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Such as rms_norm or generate; default: all. Or: compare OLD.json NEW.json"
        ),
    ] = None,
    directory: DirectoryOption = BENCHMARKS,
    output: Annotated[
        Path | None, typer.Option(help="Results go to OUTPUT/<device>/; default: results/ there.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and rounds.")] = False,
    against: Annotated[
        str | None, typer.Option(help="Rivals beside eager, as compile,liger; default: all.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Time our kernels beside their rivals in one run and record it; or compare two records."""
    from tilewright.bench import harness

    if names and names[0] == "compare":
        _compare(names[1:])
        return
    if threads is not None:
        torch.set_num_threads(threads)
    rivals = None if against is None else [name.strip() for name in against.split(",")]
    definitions = harness.discover(directory, names or [])
    known = {name for d in definitions for name in getattr(d, "PROVIDERS", {})}
    unknown = sorted(set(rivals or ()) - known)
    if unknown:
        raise ValueError(
            f"--against: no rival {', '.join(unknown)}; there are {', '.join(sorted(known))} "
            "(others need tilewright[peers] and a GPU)"
        )
    console = Console()
    for definition in definitions:
        try:
            report = harness.measure(definition, quick=quick, against=rivals)
        except AssertionError as wrong:  # ours fail the tolerance rule
            typer.echo(f"tilewright: {definition.OP} is wrong and was not timed: {wrong}", err=True)
            raise typer.Exit(1) from None
        console.print(harness.table(report))
        where = harness.write(report, output or directory / "results")
        console.print(f"written to {where}", markup=False)


def _compare(paths: Sequence[str]) -> None:
    """Print what changed between two records; exit 1 on a loss."""
    from tilewright.bench import compare

    if len(paths) != 2:
        raise ValueError(f"bench compare takes two files, not {len(paths)}")
    old, new = (compare.read(Path(path)) for path in paths)
    changes = compare.compare(old, new)
    table = Table("row", "over eager, old", "new", "slower by", "noise", "", title=new["name"])
    for c in changes:
        verdict = "LOSS" if c.lost else "not judged" if c.allocator_bound else ""
        table.add_row(
            c.row, f"{c.old:.2f}", f"{c.new:.2f}", f"{c.change:+.1%}", f"{c.noise:.1%}", verdict
        )
    Console().print(table)
    if any(c.lost for c in changes):
        raise typer.Exit(1)


class Arch(str, Enum):
    sm_80 = "sm_80"
    sm_86 = "sm_86"
    sm_89 = "sm_89"
    sm_90 = "sm_90"
    sm_100 = "sm_100"
    sm_120 = "sm_120"


class ShortDType(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def inspect(
    op: Annotated[str, typer.Argument(help="Such as rms_norm.")],
    shape: Annotated[
        str, typer.Option(help="Sizes in the op's order, 8192x4096; flags as ,packed=1.")
    ],
    arch: Annotated[Arch, typer.Option(help="Architecture to compile for.")] = Arch.sm_90,
    dtype: Annotated[ShortDType, typer.Option()] = ShortDType.bf16,
    backward: Annotated[bool, typer.Option("--backward", help="The gradient's kernels.")] = False,
    programs: Annotated[
        int | None, typer.Option(min=1, help="Of a larger grid, interpret so many.")
    ] = None,
    directory: DirectoryOption = BENCHMARKS,
    as_json: JsonOption = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="Print the PTX instead.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Print the SASS instead.")] = False,
) -> None:
    """What an op's kernels move, compile to and could at best take, without a GPU."""
    from tilewright.bench import harness, inspection

    (definition,) = harness.discover(directory, [op])
    if not hasattr(definition, "OP"):
        raise ValueError(f"{op} is a measurement, not an op")
    if ptx + sass + as_json > 1:
        raise ValueError("--ptx, --sass and --json exclude each other")
    wanted: dict[str, Any] = {
        "sizes": inspection.sizes_of(definition, shape),
        "dtype": dtype.value,
        "arch": int(arch.value.removeprefix("sm_")),
        "backward": backward,
        "programs": programs or inspection.PROGRAMS,
    }
    if ptx or sass:
        typer.echo(inspection.code(definition, "ptx" if ptx else "sass", **wanted))
        return
    report = inspection.inspect(definition, **wanted)
    if as_json:
        typer.echo(json.dumps(report))
        return
    console = Console()
    for table in inspection.tables(report):
        console.print(table)


def tune(
    names: Annotated[
        list[str] | None, typer.Argument(help="Ops, such as rms_norm; default: all.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Sizes of one op, as inspect takes; default: its benchmarks'."),
    ] = None,
    dtype: Annotated[ShortDType | None, typer.Option(help="Default: the benchmarks'.")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Begin nothing after so many.")] = 9.0,
    again: Annotated[bool, typer.Option("--again", help="Also what the tables have.")] = False,
    ship: Annotated[
        bool, typer.Option("--ship", help="Write the tables this checkout ships.")
    ] = False,
    directory: DirectoryOption = BENCHMARKS,
) -> None:
    """Find the fastest launch configurations on this GPU; later launches use them."""
    from tilewright.bench import harness, inspection
    from tilewright.bench import tune as tuning

    definitions = [d for d in harness.discover(directory, names or []) if hasattr(d, "OP")]
    if not definitions:
        raise ValueError(f"{', '.join(names or [])}: measurements, not ops")
    if shape is not None and len(definitions) != 1:
        raise ValueError(f"--shape {shape}: of one op, not of {len(definitions)}")
    shapes = None if shape is None else {shape: inspection.sizes_of(definitions[0], shape)}
    if not torch.cuda.is_available():
        raise ValueError("tune measures on a GPU, and PyTorch finds none")
    from tilewright.kernels import _tune

    end, folder = time.monotonic() + 60 * minutes, _tune.SHIPPED if ship else _tune.OWN
    for definition in definitions:
        found = tuning.tune(
            definition,
            folder,
            shapes=shapes,
            dtypes=None if dtype is None else (inspection.DTYPES[dtype.value],),
            again=again,
            deadline=end,
        )
        for t in found:
            gain = t.heuristic_microseconds / t.microseconds
            config = " ".join(f"{name}={value}" for name, value in t.config.items())
            typer.echo(
                f"{t.kernel} {t.bucket}: {config}, {t.microseconds:.1f} us, {gain:.2f} x the "
                f"heuristic's ({t.tried} tried, {t.refused} refused)"
            )
    typer.echo(f"tables: {folder}")
    if time.monotonic() > end:
        typer.echo("the time is up: the same command goes on where this one ended")
