"""rms_norm: bandwidth-bound.  M rows (tokens), N columns (features)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewright import ops
from tilewright.bench.harness import outsider

OP = "rms_norm"
SHAPES: dict[str, dict[str, int]] = {
    "4096x1920": {"M": 4096, "N": 1920},
    "decode 1x576": {"M": 1, "N": 576},
    "decode 8x576": {"M": 8, "N": 576},
    "decode 1x4096": {"M": 1, "N": 4096},
    "allocator-bound 4096x8192": {"M": 4096, "N": 8192},
}
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def inputs(dtype: torch.dtype, device: str, *, M: int, N: int) -> dict[str, Any]:
    """x [M, N], weight [N]: seeded normals that require gradients."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(M, N, generator=g), torch.randn(N, generator=g)
    return {
        "x": x.to(device, dtype).requires_grad_(),
        "weight": w.to(device, dtype).requires_grad_(),
    }


def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (ops.rms_norm(x, weight, EPS),)


def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The formula as model code writes it (transformers' LlamaRMSNorm)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * y.to(x.dtype),)


def functional(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (F.rms_norm(x, weight.shape, weight, EPS),)


def _liger(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_rms_norm

    return (liger_rms_norm(x, weight, EPS, in_place=False),)


def _quack(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from quack import rmsnorm

    return (rmsnorm(x, weight, eps=EPS),)


PROVIDERS = {
    "tilewright": ours,
    "eager": eager,
    "F.rms_norm": functional,
    "compile": torch.compile(eager, dynamic=False),
}
if outsider("liger_kernel"):
    PROVIDERS["liger"] = _liger
if outsider("quack"):
    PROVIDERS["quack"] = _quack


def cost(dtype: torch.dtype, *, M: int, N: int) -> tuple[int, int]:
    """Least bytes (x read, y written, weight read) and FLOPs of the forward pass."""
    return (2 * M * N + N) * dtype.itemsize, 4 * M * N


def backward_cost(dtype: torch.dtype, *, M: int, N: int) -> tuple[int, int]:
    """Least bytes (dy, x, weight and a float32 statistic a row read; dx, dw written) and FLOPs."""
    return (3 * M * N + 2 * N) * dtype.itemsize + 4 * M, 8 * M * N
