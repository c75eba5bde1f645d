"""`tilewright inspect`: what one op moves, compiles to, and could at best take, with no GPU.

Traffic comes from interpreting the op's launches in a process of its own (this module run as
`python -m tilewright.bench.inspection` under TRITON_INTERPRET=1: one process cannot both interpret
and compile); instructions and occupancy from compiling the very same launches; times from the
roofline of lab/roofline.py.
"""

import importlib
import inspect as signatures
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tilewright import _native
from tilewright.bench import harness
from tilewright.lab.roofline import GPUS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROGRAMS = 16384  # of a larger grid so many are interpreted: half a minute
COUNTS = ("bytes_loaded", "bytes_stored", "atomics", "dot_flops")


def sizes_of(definition: ModuleType, text: str) -> dict[str, Any]:
    """ "8192x4096" or "8192x4096,interleaved=1" as the sizes of an op's inputs, in their order.

    ValueError where they do not fit.
    """
    parameters = [
        p
        for p in signatures.signature(definition.inputs).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    names = [p.name for p in parameters]
    wanted = "x".join(names)
    by_order, *named = text.split(",")
    found: dict[str, str] = dict(zip(names, by_order.split("x"), strict=False))
    if len(by_order.split("x")) > len(names):
        raise ValueError(f"--shape {text}: {definition.OP} takes {wanted}")
    for item in named:
        name, _, value = item.partition("=")
        if name not in names:
            raise ValueError(
                f"--shape {text}: {definition.OP} has no size {name}; it takes {wanted}"
            )
        found[name] = value
    flags = {p.name for p in parameters if p.annotation is bool}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name not in found and p.name not in flags
    ]
    if missing:
        raise ValueError(
            f"--shape {text} lacks {', '.join(missing)}: {definition.OP} takes {wanted}"
        )
    for name in flags:
        found.setdefault(name, "0")
    if not all(value.isdecimal() for value in found.values()):
        raise ValueError(f"--shape {text}: sizes are whole numbers, {wanted}")
    sizes = {name: bool(int(v)) if name in flags else int(v) for name, v in found.items()}
    if any(not isinstance(size, bool) and size < 1 for size in sizes.values()):
        raise ValueError(f"--shape {text}: a size is below 1")
    return sizes


def launches(
    definition: ModuleType, dtype: torch.dtype, backward: bool, sizes: dict[str, Any], programs: int
) -> list[dict[str, Any]]:
    """Interpret the op once; JSON-ready records of its launches.  Under TRITON_INTERPRET=1 only."""
    from tilewright.lab import interpreter

    interpreter.install()
    inputs = definition.inputs(dtype, "cpu", **sizes)
    ours = definition.PROVIDERS["tilewright"]
    with interpreter.sampling(programs):
        if backward:
            leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
            for x in leaves:
                x.requires_grad_()
            # what torch knows no gradient of (rope's tables) gets none
            outputs = [y for y in ours(**inputs) if y.requires_grad]
            with interpreter.recording() as launches:
                torch.autograd.grad(
                    outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True
                )
        else:
            with interpreter.recording() as launches, torch.no_grad():
                ours(**inputs)
    records = []
    for launch in launches:
        record = asdict(launch)
        record["constants"] = {k: _named(v) for k, v in launch.constants.items()}
        records.append(record)
    return records


def _named(constant: Any) -> Any:
    """JSON of a constexpr: a Triton dtype by its name."""
    import triton.language as tl

    value = getattr(constant, "value", constant)
    return {"dtype": value.name} if isinstance(value, tl.dtype) else value


def _constant(value: Any) -> Any:
    import triton.language as tl

    return tl.dtype(value["dtype"]) if isinstance(value, dict) else value


def _interpreted(
    definition: ModuleType, dtype: str, backward: bool, sizes: dict[str, Any], programs: int
) -> list[dict[str, Any]]:
    """_launches, in a process of its own."""
    assert definition.__file__ is not None
    wanted = [
        str(Path(definition.__file__).parent),
        definition.OP,
        dtype,
        backward,
        sizes,
        programs,
    ]
    command = [sys.executable, "-m", "tilewright.bench.inspection", json.dumps(wanted)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"{definition.OP} could not be interpreted: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def inspect(
    definition: ModuleType,
    *,
    sizes: dict[str, Any],
    dtype: str = "bf16",
    arch: int = 90,
    backward: bool = False,
    programs: int = PROGRAMS,
) -> dict[str, Any]:
    """Traffic, code and roofline of every kernel an op launches, JSON-ready.

    Counts are those of the whole launch; of a grid beyond `programs` only as many, evenly apart,
    are interpreted and the counts scaled up, without distinct bytes.  Bytes, FLOPs, seconds.
    """
    from tilewright.lab import compile as offline

    if _native.INTERPRET:
        raise ValueError("TRITON_INTERPRET=1: what it jits cannot be compiled")
    if backward and not hasattr(definition, "backward_cost"):
        raise ValueError(f"{definition.OP} has no backward kernels")
    kind = DTYPES[dtype]
    kernels = []
    for launch in _interpreted(definition, dtype, backward, sizes, programs):
        built = offline.build(
            launch["module"].rsplit(".", 1)[-1], _variant(launch), arch, launch["divisible"]
        )
        if built.error:
            raise ValueError(f"{launch['kernel']} on sm_{arch}: {built.error}")
        kernels.append(_kernel(launch, asdict(built)))
    cost = definition.backward_cost if backward else definition.cost
    least_bytes, least_flops = cost(kind, **sizes)
    report = {
        "op": definition.OP,
        "sizes": sizes,
        "dtype": dtype,
        "pass": "backward" if backward else "forward",
        "arch": arch,
        "least_bytes": least_bytes,
        "least_flops": least_flops,
        "kernels": kernels,
    }
    return report | {"roofline": _roofline(report)}


def _variant(launch: dict[str, Any]) -> tuple[Any, ...]:
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    constants = {name: _constant(value) for name, value in launch["constants"].items()}
    return kernel, launch["signature"], constants, launch["options"]


def _kernel(launch: dict[str, Any], built: dict[str, Any]) -> dict[str, Any]:
    count = launch["grid"][0] * launch["grid"][1] * launch["grid"][2]
    scale = count / max(1, launch["programs"])
    found = {
        "kernel": launch["kernel"],
        "grid": launch["grid"],
        "interpreted_programs": launch["programs"],
        **{name: round(launch[name] * scale) for name in COUNTS},
        "distinct_bytes": launch["distinct_bytes_loaded"] + launch["distinct_bytes_stored"],
    }
    if scale != 1:
        found["distinct_bytes"] = None
    kept = ("constants", "options", "types", "registers", "spills", "stack", "shared",
            "resident_warps", "dot", "matrix", "loads", "wide_loads", "warnings")  # fmt: skip
    return found | {name: built[name] for name in kept}


def _roofline(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds on each GPU: the mathematics' least, and its kernels with a perfect and no cache."""
    from tilewright.lab.compile import CHIPS

    rows = []
    kernels = report["kernels"]
    # arithmetic outside tl.dot is float32; inside, what the kernels' products are made of
    kind = next((k["dot"] for k in kernels if k["dot"]), None)
    for name, gpu in GPUS.items():
        perfect, uncached, bound = 0.0, 0.0, "bytes"
        for k in kernels:
            moved = k["bytes_loaded"] + k["bytes_stored"]
            distinct = k["distinct_bytes"]
            perfect += gpu.seconds(
                moved if distinct is None else distinct, k["dot_flops"], k["dot"]
            )
            uncached += gpu.seconds(moved, k["dot_flops"], k["dot"])
        least = gpu.seconds(report["least_bytes"], report["least_flops"], kind)
        if least > gpu.seconds(report["least_bytes"]):
            bound = "FLOPs"
        row = {
            "gpu": name,
            "least": least,
            "bound": bound,
            "perfect_cache": perfect,
            "no_cache": uncached,
        }
        if any(k["distinct_bytes"] is None for k in kernels):
            row["perfect_cache"] = None
        chip = CHIPS[gpu.arch]
        warps = [
            chip.resident_warps(k["options"].get("num_warps", 4), k["registers"], k["shared"])
            for k in kernels
        ]
        at_once = [
            w // k["options"].get("num_warps", 4) * gpu.multiprocessors
            for w, k in zip(warps, kernels, strict=True)
        ]
        row["waves"] = [
            k["grid"][0] * k["grid"][1] * k["grid"][2] / n if n else None
            for k, n in zip(kernels, at_once, strict=True)
        ]
        rows.append(row)
    return rows


def code(definition: ModuleType, kind: str, **wanted: Any) -> str:
    """PTX or SASS ("ptx", "sass") of every kernel the op launches; arguments as inspect's."""
    from tilewright.lab import compile as offline

    arch = wanted["arch"]
    launches = _interpreted(
        definition, wanted["dtype"], wanted["backward"], wanted["sizes"], wanted["programs"]
    )
    texts = []
    for launch in launches:
        built = offline.compiled(_variant(launch), arch, launch["divisible"])
        head = f"// {launch['kernel']} {launch['constants']} {launch['options']} sm_{arch}"
        texts.append(f"{head}\n{built.asm[kind]}")
    return "\n".join(texts)


def _si(value: float | None, unit: str) -> str:
    if value is None:
        return "sampled"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.4g} µs"


def tables(report: dict[str, Any]) -> list[Table]:
    """The report for a reader: one table of what is asked, one a kernel, one of the rooflines."""
    from tilewright.lab.compile import CHIPS

    sizes = ", ".join(f"{name} {value}" for name, value in report["sizes"].items())
    head = Table("", "", show_header=False)
    head.add_row(report["op"], f"{report['pass']}, {report['dtype']}, sm_{report['arch']}")
    head.add_row("sizes", sizes)
    head.add_row("least bytes", _si(report["least_bytes"], "B"))
    head.add_row("least FLOPs", _si(report["least_flops"], "FLOP"))
    found = [head]
    for k in report["kernels"]:
        one = Table("", "", title=k["kernel"], show_header=False)
        count = k["grid"][0] * k["grid"][1] * k["grid"][2]
        part = (
            ""
            if count == k["interpreted_programs"]
            else f", {k['interpreted_programs']} interpreted"
        )
        one.add_row("grid", f"{'x'.join(map(str, k['grid']))}{part}")
        one.add_row("constants", " ".join(f"{n}={v}" for n, v in k["constants"].items()))
        one.add_row("options", " ".join(f"{n}={v}" for n, v in k["options"].items()))
        one.add_row("loaded", _si(k["bytes_loaded"], "B"))
        one.add_row("stored", _si(k["bytes_stored"], "B"))
        one.add_row("distinct", _si(k["distinct_bytes"], "B"))
        if k["distinct_bytes"]:
            again = (k["bytes_loaded"] + k["bytes_stored"]) / k["distinct_bytes"]
            one.add_row("each byte moved", f"{again:.3g} times")
        one.add_row("atomics", str(k["atomics"]))
        one.add_row(
            "FLOPs of tl.dot", _si(k["dot_flops"], "FLOP") + (f", {k['dot']}" if k["dot"] else "")
        )
        one.add_row("matrix instruction", k["matrix"] or "none")
        one.add_row(
            "registers",
            f"{k['registers']} a thread, {k['spills']} bytes spilled, stack {k['stack']}",
        )
        one.add_row(
            "shared memory", f"{k['shared'] / 1024:.4g} KiB of {CHIPS[report['arch']].block_shared}"
        )
        most = CHIPS[report["arch"]].warps
        one.add_row(
            "occupancy",
            f"{k['resident_warps']} of {most} warps, {100 * k['resident_warps'] / most:.0f} %",
        )
        one.add_row("16-byte global loads", f"{k['wide_loads']} of {k['loads']}")
        for warning in k["warnings"]:
            one.add_row("ptxas", warning)
        found.append(one)
    roof = Table("GPU", "least", "bound by", "perfect cache", "no cache", "waves", title="roofline")
    for row in report["roofline"]:
        waves = ", ".join("does not fit" if w is None else f"{w:.3g}" for w in row["waves"])
        roof.add_row(
            row["gpu"],
            _time(row["least"]),
            row["bound"],
            _time(row["perfect_cache"]),
            _time(row["no_cache"]),
            waves,
        )
    return [*found, roof]


def _main(arguments: Sequence[str]) -> None:
    directory, op, dtype, backward, sizes, programs = json.loads(arguments[0])
    torch.manual_seed(0)
    (definition,) = harness.discover(Path(directory), [op])
    print(json.dumps(launches(definition, DTYPES[dtype], backward, sizes, programs)))


if __name__ == "__main__":
    _main(sys.argv[1:])
