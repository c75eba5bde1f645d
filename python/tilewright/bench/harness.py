"""Finds benchmark definitions, times them, and writes what it found.

A file benchmarks/bench_<name>.py defines one of two things:

- an op: OP, SHAPES (name -> sizes), DTYPES, inputs(dtype, device, **sizes) -> kwargs,
  PROVIDERS (name -> fn(**inputs), with "tilewright" and "eager" among them), cost(dtype, **sizes) ->
  (least bytes moved, FLOPs) of the forward pass, and backward_cost of the backward.  Inputs that
  require a gradient make the harness time forward and backward too.  TENSOR_CORES where the FLOPs
  are matrix products: what a GPU's roofline is then.  ROUTE, the op whose kernels serve it, where
  that is another;
- a measurement of its own: measure(quick) -> rows.

A row is verified before it is timed: ours by the tolerance rule against eager in float64, else
nothing is measured; a rival that fails it, or fails to run, is named in the row.
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

from tilewright.bench.correctness import verified
from tilewright.bench.facts import facts
from tilewright.bench.memory import peak_bytes
from tilewright.bench.timing import MMAP_BYTES, call_seconds, interleaved, spread
from tilewright.lab.roofline import named

COPY = "copy"  # the CPU's roofline: as many bytes moved by torch's copy, in the same rounds
BANDWIDTH_BOUND = 10  # FLOPs a byte below which a CPU waits for memory


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
    return [load(found[name]) for name in (names or found)]


def load(path: Path) -> ModuleType:
    """A file of benchmarks/, which is no package, as a module."""
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


def outsider(package: str) -> bool:
    """Whether a rival that runs on GPUs alone can be timed: installed (extra `peers`), a GPU here."""
    return torch.cuda.is_available() and importlib.util.find_spec(package) is not None


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


def _copy(count: int, place: str) -> Callable[[], object]:
    """A copy that moves `count` bytes in all, read and written."""
    source = torch.empty(max(1, count // 2), dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _cost(
    definition: ModuleType, dtype: torch.dtype, mode: str, sizes: dict[str, Any]
) -> tuple[int, int]:
    moved, flops = definition.cost(dtype, **sizes)
    if mode == "fwd":
        return moved, flops
    more, work = definition.backward_cost(dtype, **sizes)
    return moved + more, flops + work


def chosen(definition: ModuleType, against: Sequence[str] | None) -> dict[str, Callable]:
    """Ours, eager, and the rivals named; all where none is."""
    rivals = definition.PROVIDERS
    if against is None:
        return dict(rivals)
    return {n: fn for n, fn in rivals.items() if n in {"tilewright", "eager", *against}}


def row(
    definition: ModuleType,
    shape: str,
    dtype: torch.dtype,
    mode: str,
    seconds: float,
    against: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One line of an op's results: every provider at one shape, dtype and mode."""
    sizes = definition.SHAPES[shape]
    place = device()
    inputs = drawn(definition, shape, dtype)
    torch.compiler.reset()  # a shape seen before must not make the compiled rival's sizes dynamic
    providers = chosen(definition, against)
    wrong = verified(providers, inputs, dtype, grad=mode != "fwd")
    prepare = forward if mode == "fwd" else forward_backward
    rivals: dict[str, Callable[[], object]] = {}
    for name, fn in providers.items():
        try:
            rivals[name] = prepare(fn, inputs)
            rivals[name]()
        except Exception as error:
            if name in ("tilewright", "eager"):
                raise
            wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rivals.pop(name, None)
    moved, flops = _cost(definition, dtype, mode, sizes)
    on_cpu = place == "cpu"
    copied = on_cpu and mode == "fwd" and flops < BANDWIDTH_BOUND * moved
    timed = {**rivals, COPY: _copy(moved, place)} if copied else rivals
    samples = interleaved(timed, seconds=seconds)
    times = {name: spread(seconds) for name, seconds in samples.items()}
    ours = times["tilewright"].p50
    ratios = {
        name: spread([t / o for t, o in zip(samples[name], samples["tilewright"], strict=True)])
        for name in rivals
        if name != "tilewright"
    }
    peaks = {name: peak_bytes(fn) for name, fn in rivals.items()}
    largest = _largest(inputs, _outputs(forward(definition.PROVIDERS["tilewright"], inputs)()))
    line: dict[str, Any] = {
        "shape": shape,
        "sizes": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "milliseconds": {name: times[name].p50 * 1e3 for name in rivals},
        "milliseconds_p20": {name: times[name].p20 * 1e3 for name in rivals},
        "milliseconds_p80": {name: times[name].p80 * 1e3 for name in rivals},
        "speedup_over": {name: times[name].p50 / ours for name in ratios},
        "speedup_over_p20": {name: ratio.p20 for name, ratio in ratios.items()},
        "speedup_over_p80": {name: ratio.p80 for name, ratio in ratios.items()},
        # on a CPU a call is over when it returns
        "call_microseconds": (ours if on_cpu else call_seconds(rivals["tilewright"])) * 1e6,
        "bytes": moved,
        "flops": flops,
        "gb_per_second": moved / ours / 1e9,
        "gflop_per_second": flops / ours / 1e9,
        # the time is the page faults', not the kernel's
        "allocator_bound": on_cpu and largest >= MMAP_BYTES,
        "outside_tolerance": {name: why for name, why in wrong.items() if why},
        "peak_bytes": peaks["tilewright"],
        "peak_bytes_of_rivals": {name: peaks[name] for name in ratios},
    }
    if copied:
        line["copy_milliseconds"] = times[COPY].p50 * 1e3
        line["percent_of_roofline"] = 100 * times[COPY].p50 / ours
    elif not on_cpu:
        gpu = named(torch.cuda.get_device_name())
        kind = (
            {torch.float32: None}.get(dtype, "bf16")
            if hasattr(definition, "TENSOR_CORES")
            else None
        )
        line["percent_of_roofline"] = gpu and 100 * gpu.seconds(moved, flops, kind) / ours
    return line


def smallest(definition: ModuleType, dtype: torch.dtype) -> dict[str, Any]:
    """The sizes of an op's benchmark that moves the least."""
    return min(definition.SHAPES.values(), key=lambda sizes: definition.cost(dtype, **sizes)[0])


def drawn(definition: ModuleType, shape: str, dtype: torch.dtype) -> dict[str, Any]:
    """An op's inputs at one of its shapes, on device(): the same numbers each time."""
    torch.manual_seed(0)
    return dict(definition.inputs(dtype, device(), **definition.SHAPES[shape]))


def modes(inputs: dict[str, Any]) -> list[str]:
    """Forward; and forward with backward where an input requires a gradient."""
    trains = any(isinstance(x, Tensor) and x.requires_grad for x in inputs.values())
    return ["fwd", "fwd+bwd"] if trains else ["fwd"]


def _op_rows(
    definition: ModuleType, quick: bool, against: Sequence[str] | None
) -> list[dict[str, Any]]:
    shapes = list(definition.SHAPES)[: 1 if quick else None]
    rows = []
    for shape in shapes:
        for dtype in definition.DTYPES[: 1 if quick else None]:
            inputs = drawn(definition, shape, dtype)
            for mode in modes(inputs):
                seconds = 0.2 if quick else 1.0
                rows.append(row(definition, shape, dtype, mode, seconds, against))
    return rows


def measure(
    definition: ModuleType, *, quick: bool = False, against: Sequence[str] | None = None
) -> dict[str, Any]:
    """A whole report: facts about the machine and the run, and the rows.

    `against` names the rivals of ops, None all.
    """
    assert definition.__file__ is not None
    name, is_op = name_of(definition), hasattr(definition, "OP")
    command = ["tilewright", "bench", name, *(["--quick"] if quick else [])]
    if against is not None:
        command += ["--against", ",".join(against)]
    # the load before, not of, the measurement
    about = {"name": name, "quick": quick, "command": " ".join(command)}
    about |= facts(Path(definition.__file__).parent)
    return {
        **about,
        "rows": _op_rows(definition, quick, against) if is_op else definition.measure(quick),
    }


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
    """The rows: of an op our time and how many times longer each rival takes, of another
    measurement a column for each of their keys."""
    rows, title = report["rows"], f"{report['name']} on {report['device']}"
    if not rows or "speedup_over" not in rows[0]:
        columns = list(dict.fromkeys(key for line in rows for key in line))
        out = Table(*(c.replace("_", " ") for c in columns), title=title)
        for line in rows:
            out.add_row(*(_cell(line.get(c)) for c in columns))
        return out
    rivals = list(dict.fromkeys(name for line in rows for name in line["speedup_over"]))
    notes = list(dict.fromkeys(n for line in rows for n in line["outside_tolerance"].items()))
    out = Table("case", "ours, ms", *(f"over {n}" for n in rivals), "GB/s", "% roof", title=title)
    for line in rows:
        case = f"{line['shape']} {line['dtype']} {line['mode']}"
        ratios = (line["speedup_over"].get(name) for name in rivals)
        out.add_row(
            case + (" (allocator-bound)" if line["allocator_bound"] else ""),
            f"{line['milliseconds']['tilewright']:.4g}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{line['gb_per_second']:.3g}",
            "" if line.get("percent_of_roofline") is None else f"{line['percent_of_roofline']:.0f}",
        )
    out.caption = "; ".join(f"{name}: {why}" for name, why in notes) or None
    return out
