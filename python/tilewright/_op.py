"""Operators: schema, implementations, fake.  The only torch.library code in Python.

Every operator is define/impl, not custom_op, whose wrapper costs microseconds a call
(pytorch#139500).  Autograd stays outside, in a torch.autograd.Function beside the public function.
CPU kernels come from `_C`, which registers them itself; CUDA gets the Triton launcher of the same
name, and under TRITON_INTERPRET=1 that launcher stands in for the CPU.  A public function whose
input no kernel serves runs its reference twin under ordinary autograd.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright import _native, reference

HAS_TRITON = importlib.util.find_spec("triton") is not None
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})

# Operators whose Triton or CUDA kernel has passed its tests on a GPU, as a file under
# benchmarks/results/ records.  tests/test_house.py holds this against those files.
PROVEN_ON_GPU: frozenset[str] = frozenset()

_log = logging.getLogger("tilewright.dispatch")
LOG_DISPATCH = "dispatch" in os.environ.get("TILEWRIGHT_LOG", "").split(",")
if LOG_DISPATCH:
    logging.basicConfig(format="%(name)s: %(message)s")
    _log.setLevel(logging.INFO)


class Route(NamedTuple):
    """Which implementation serves an op on one kind of device.

    `launches`: the configurations this process has launched Triton kernels with, each with the sizes
    it is for and whether a table or the heuristic chose it.
    """

    op: str
    device: str
    implementation: str
    why: str
    launches: tuple[str, ...] = ()


_served: dict[tuple[str, str], frozenset[torch.dtype]] = {}  # (public op, device type) -> dtypes
_routes: dict[tuple[str, str], Route] = {}
_logged: set[tuple[str, str, torch.dtype]] = set()


def _launcher(module: str, name: str) -> Callable:
    """kernels.<module>.<name>, imported at its first call (triton takes long to import)."""
    found: Callable | None = None

    def launch(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"tilewright.kernels.{module}"), name)
            if _native.INTERPRET:
                found = _interpreted(found)
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.type != "cuda":
            return found(*args)
        with torch.cuda.device(device):
            return found(*args)

    return launch


def _interpreted(launcher: Callable) -> Callable:
    """The launcher under an interpreter that catches what a GPU would let pass."""
    from tilewright.lab import interpreter

    interpreter.install()

    def launch(*args: Any) -> Any:
        with interpreter.watching():
            return launcher(*args)

    return launch


def register(
    op: str, schema: str, fake: Callable, *, dtypes: frozenset[torch.dtype] = FLOATS
) -> Callable:
    """Define tilewright::<name> for the public op `op` and return its overload.

    register("rms_norm", "rms_norm_fwd(Tensor x, ...) -> (Tensor, Tensor)", fake): the Triton
    launcher is kernels/rms_norm.py's rms_norm_fwd, the CPU kernel csrc/bind/rms_norm.cpp's.
    `fake` gives empty outputs of the right shape, stride, dtype and device.
    """
    name = schema.split("(", 1)[0]
    qualified = f"tilewright::{name}"
    torch.library.define(qualified, schema[len(name) :])
    torch.library.register_fake(qualified, fake)
    if HAS_TRITON:
        key = "CPU" if _native.INTERPRET else "CUDA"
        torch.library.impl(qualified, key, _launcher(op, name))
        _served[op, key.lower()] = dtypes
    has_cpu = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
    if has_cpu and _native.fault is None:
        _served[op, "cpu"] = dtypes
    _routes[op, "cpu"] = _cpu_route(op, (op, "cpu") in _served)
    _routes[op, "cuda"] = _cuda_route(op)
    return getattr(torch.ops.tilewright, name).default


def _cpu_route(op: str, is_served: bool) -> Route:
    if _native.fault is not None:
        return Route(op, "cpu", "none", _native.fault)
    if not is_served:
        return Route(op, "cpu", "reference (eager PyTorch)", f"extension {_native.status}")
    if _native.INTERPRET:
        return Route(op, "cpu", "Triton interpreter", "TRITON_INTERPRET=1")
    return Route(op, "cpu", f"C++ ({_native.cpu_isa()})", "extension loaded")


def _cuda_route(op: str) -> Route:
    if not HAS_TRITON:
        return Route(op, "cuda", "reference (eager PyTorch)", "triton is not installed")
    why = "passed on a GPU" if op in PROVEN_ON_GPU else "not yet proven on a GPU"
    return Route(op, "cuda", "Triton", why)


def device_type(x: Tensor) -> str:
    """x.device.type, without making a device object where x is on the CPU: 0.1 us, not 0.5."""
    return "cpu" if x.is_cpu else x.device.type


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast, where it is on, asks products on that kind of device to be in."""
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in dtype, as autocast casts: not float64, nor what is no float."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def serves(op: str, x: Tensor) -> bool:
    """Whether a kernel serves `op` for a tensor of x's device and dtype."""
    served = x.dtype in _served.get((op, device_type(x)), ())
    if LOG_DISPATCH and not torch.compiler.is_compiling():
        _log_once(op, x, served)
    return served


def _log_once(op: str, x: Tensor, served: bool) -> None:
    key = (op, x.device.type, x.dtype)
    if key in _logged:
        return
    _logged.add(key)
    route = _routes.get(key[:2])
    if served and route is not None:
        _log.info("%s on %s, %s: %s (%s)", *key, route.implementation, route.why)
    else:
        _log.info("%s on %s, %s: reference (no kernel serves this)", *key)


def direct(op: str) -> Callable | None:
    """`_C`'s own entry of a public op, or None where there is none.

    It does all the public function does for plain CPU tensors, its gradients too, by the operators
    registered here but without Python.  It returns None for what it does not take: bad input,
    another device or dtype, subclasses, modes, transforms.  torch.compile cannot see into it.
    """
    unused = LOG_DISPATCH or _native.fault is not None
    return None if unused else getattr(_native.C, op, None)


def twin(op: str) -> Callable:
    """The reference of the same name and signature, for inputs no kernel serves.

    Raises ValueError where the kernels would serve, were TILEWRIGHT_CPU_ISA not wrong.
    """
    if _native.fault is not None:
        raise ValueError(_native.fault)
    return getattr(reference, op)


def explain() -> list[Route]:
    """Which implementation serves each op on each kind of device, and why."""
    return [_routes[key]._replace(launches=_launches(*key)) for key in sorted(_routes)]


def _launches(op: str, device: str) -> tuple[str, ...]:
    tune = sys.modules.get("tilewright.kernels._tune")  # not imported: nothing was launched
    launching = "cpu" if _native.INTERPRET else "cuda"
    return tuple(tune.choices(op)) if tune is not None and device == launching else ()
