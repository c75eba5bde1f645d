"""Finds benchmark definitions, times them, and writes what it found.

A file benchmarks/bench_<name>.py defines one of two things:

- an op: OP, SHAPES (name -> sizes), DTYPES, inputs(dtype, device, **sizes) -> kwargs,
  PROVIDERS (name -> fn(**inputs), with "tilewright" and "eager" among them) and
  cost(dtype, **sizes) -> (least bytes moved, FLOPs) of the forward pass.  Inputs that require a
  gradient make the harness time forward and backward too;
- a measurement of its own: measure(quick) -> rows.
"""

import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tilewright.bench.facts import facts
from tilewright.bench.timing import interleaved

# Buffers from here up are fresh mmaps at every call: the time is the page faults', not the kernel's
MMAP_BYTES = 32 << 20


def discover(directory: Path, names: Sequence[str] = ()) -> list[ModuleType]:
    """The definitions bench_<name>.py in `directory`, all of them or those named.

    ValueError where the directory has none, or not one that was named.
    """
    found = {p.stem.removeprefix("bench_"): p for p in sorted(directory.glob("bench_*.py"))}
    if not found:
        raise ValueError(f"no bench_<name>.py in {directory}: run from a checkout of tilewright")
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"no benchmark {', '.join(unknown)}; there are {', '.join(found)}")
    return [_load(found[name]) for name in (names or found)]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(definition: ModuleType) -> str:
    """rms_norm of bench_rms_norm."""
    return definition.__name__.removeprefix("bench_")


def device() -> str:
    """Where ops are timed: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def forward(fn: Callable, inputs: dict[str, Any]) -> Callable[[], object]:
    """One forward call without autograd."""

    @torch.no_grad()
    def call() -> object:
        return fn(**inputs)

    return call


def forward_backward(fn: Callable, inputs: dict[str, Any]) -> Callable[[], object]:
    """One forward call and the gradient of every input that requires one."""
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    douts = [torch.randn_like(y) for y in _outputs(fn(**inputs))]

    def call() -> object:
        outputs = _outputs(fn(**inputs))
        live = [(y, dy) for y, dy in zip(outputs, douts, strict=True) if y.requires_grad]
        return torch.autograd.grad([y for y, _ in live], leaves, [dy for _, dy in live])

    return call


def _largest(inputs: dict[str, Any], outputs: Iterable[Tensor]) -> int:
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    return max(t.numel() * t.element_size() for t in (*tensors, *outputs))


def row(
    definition: ModuleType, shape: str, dtype: torch.dtype, mode: str, seconds: float
) -> dict[str, Any]:
    """One line of an op's results: every provider at one shape, dtype and mode."""
    sizes = definition.SHAPES[shape]
    inputs = definition.inputs(dtype, device(), **sizes)
    torch.compiler.reset()  # a shape seen before must not make the compiled rival's sizes dynamic
    prepare = forward if mode == "fwd" else forward_backward
    rivals = {name: prepare(fn, inputs) for name, fn in definition.PROVIDERS.items()}
    times = interleaved(rivals, seconds=seconds)
    ours = times["tilewright"]
    largest = _largest(inputs, _outputs(forward(definition.PROVIDERS["tilewright"], inputs)()))
    line: dict[str, Any] = {
        "shape": shape,
        "sizes": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "milliseconds": {name: t * 1e3 for name, t in times.items()},
        "speedup_over": {name: t / ours for name, t in times.items() if name != "tilewright"},
        "allocator_bound": largest >= MMAP_BYTES,
    }
    if mode == "fwd":
        moved, flops = definition.cost(dtype, **sizes)
        line |= {"gb_per_second": moved / ours / 1e9, "gflop_per_second": flops / ours / 1e9}
    return line


def modes(inputs: dict[str, Any]) -> list[str]:
    """Forward; and forward with backward where an input requires a gradient."""
    trains = any(isinstance(x, Tensor) and x.requires_grad for x in inputs.values())
    return ["fwd", "fwd+bwd"] if trains else ["fwd"]


def _op_rows(definition: ModuleType, quick: bool) -> list[dict[str, Any]]:
    shapes = list(definition.SHAPES)[: 1 if quick else None]
    rows = []
    for shape in shapes:
        for dtype in definition.DTYPES[: 1 if quick else None]:
            inputs = definition.inputs(dtype, device(), **definition.SHAPES[shape])
            for mode in modes(inputs):
                rows.append(row(definition, shape, dtype, mode, 0.2 if quick else 1.0))
    return rows


def measure(definition: ModuleType, *, quick: bool = False) -> dict[str, Any]:
    """A whole report: facts about the machine and the run, and the rows."""
    is_op = hasattr(definition, "OP")
    rows = _op_rows(definition, quick) if is_op else definition.measure(quick)
    assert definition.__file__ is not None
    about = {"name": name_of(definition), "quick": quick, **facts(Path(definition.__file__).parent)}
    return {**about, "rows": rows}


def write(report: dict[str, Any], results: Path) -> Path:
    """Write the report to results/<device>/<name>.json, whole or not at all."""
    path = results / report["device"] / f"{report['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    draft.replace(path)
    return path


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "  ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return "" if value is None else str(value)


def table(report: dict[str, Any]) -> Table:
    """The rows as they are, a column for each of their keys."""
    columns = list(dict.fromkeys(key for line in report["rows"] for key in line))
    out = Table(
        *(c.replace("_", " ") for c in columns), title=f"{report['name']} on {report['device']}"
    )
    for line in report["rows"]:
        out.add_row(*(_cell(line.get(c)) for c in columns))
    return out
