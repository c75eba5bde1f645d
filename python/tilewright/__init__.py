"""Fused Triton, CUDA and CPU kernels for PyTorch, and the drop-in modules and models on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tilewright import masks, nn, ops
from tilewright._op import explain
from tilewright.quant_tensor import QuantTensor
from tilewright.testing import eager

if TYPE_CHECKING:
    from tilewright import models, quant
    from tilewright.interop.patch import patch, unpatch

__version__ = "0.1.0"
__all__ = [
    "QuantTensor", "__version__", "eager", "explain", "masks", "models", "nn", "ops", "patch", "quant",
    "unpatch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # these need the [models] extra: import tilewright must not
    if name in ("models", "quant"):
        return import_module(f"tilewright.{name}")
    if name in ("patch", "unpatch"):
        return getattr(import_module("tilewright.interop.patch"), name)
    raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
