"""add_rms_norm: bandwidth-bound.  M rows (tokens), N columns (features)."""

from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.bench.harness import outsider

OP = "add_rms_norm"
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
    """x, residual [M, N], weight [N]: seeded normals that require gradients."""
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (M, N), "residual": (M, N), "weight": (N,)}
    return {
        name: torch.randn(shape, generator=g).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return ops.add_rms_norm(x, residual, weight, EPS)


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The formula as model code writes it (transformers' LlamaRMSNorm after the addition)."""
    h = x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype), h


def _liger(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)


def _quack(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from quack import rmsnorm

    return rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)


PROVIDERS = {
    "tilewright": ours,
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
}
if outsider("liger_kernel"):
    PROVIDERS["liger"] = _liger
if outsider("quack"):
    PROVIDERS["quack"] = _quack


def cost(dtype: torch.dtype, *, M: int, N: int) -> tuple[int, int]:
    """Least bytes (x, residual, weight read; y, h written) and FLOPs of the forward pass."""
    return (4 * M * N + N) * dtype.itemsize, 5 * M * N


def backward_cost(dtype: torch.dtype, *, M: int, N: int) -> tuple[int, int]:
    """Least bytes (dy, dh, h, weight and a float32 statistic a row read; dx, dw written) and FLOPs."""
    return (4 * M * N + 2 * N) * dtype.itemsize + 4 * M, 9 * M * N
