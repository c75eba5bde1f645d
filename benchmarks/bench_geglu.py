"""geglu by tanh: training rows and decode steps, separate and packed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops
from tilewright.bench.harness import outsider

OP = "geglu"
DTYPES = (torch.float32, torch.bfloat16)
SHAPES: dict[str, dict] = {
    "train 4096x1920": {"rows": 4096, "width": 1920, "packed": False},
    "train 4096x960 packed": {"rows": 4096, "width": 960, "packed": True},
    "decode 1x1536 packed": {"rows": 1, "width": 1536, "packed": True},
    "allocator-bound 4096x4864": {"rows": 4096, "width": 4864, "packed": False},
}


def inputs(dtype: torch.dtype, device: str, *, rows: int, width: int, packed: bool) -> dict:
    def draw(columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=dtype, device=device).requires_grad_()

    return {"gate": draw(2 * width)} if packed else {"gate": draw(width), "up": draw(width)}


def _tilewright(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor]:
    return (ops.geglu(gate, up),)


def _eager(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor]:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up,)


def _liger(gate: Tensor, up: Tensor | None = None) -> tuple[Tensor]:
    from liger_kernel.transformers.functional import liger_geglu

    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (liger_geglu(gate, up),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "compile": torch.compile(_eager),
}
if outsider("liger_kernel"):
    PROVIDERS["liger"] = _liger


def cost(dtype: torch.dtype, *, rows: int, width: int, packed: bool) -> tuple[int, int]:
    """Forward: gate and up read, y written; an exponential and a division count as one each."""
    return 3 * rows * width * dtype.itemsize, 9 * rows * width


def backward_cost(dtype: torch.dtype, *, rows: int, width: int, packed: bool) -> tuple[int, int]:
    """dy, gate and up read, their gradients written."""
    return 5 * rows * width * dtype.itemsize, 18 * rows * width
