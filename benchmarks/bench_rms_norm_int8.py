"""rms_norm_int8: bandwidth-bound.  M rows (tokens), N columns (features); with a residual, as a layer has it."""

from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.bench.harness import outsider

OP = "rms_norm_int8"
SHAPES: dict[str, dict[str, int]] = {
    "4096x1920": {"M": 4096, "N": 1920},
    "decode 1x576": {"M": 1, "N": 576},
    "decode 1x4096": {"M": 1, "N": 4096},
}
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5


def inputs(dtype: torch.dtype, device: str, *, M: int, N: int) -> dict[str, Any]:
    """x, residual [M, N], weight [N], seeded; (x + residual) weight is whole numbers up to 127, which every way of
    computing rounds alike."""
    g = torch.Generator().manual_seed(0)
    codes, r = (torch.randint(-127, 128, (M, N), generator=g).double() for _ in range(2))
    codes[:, :1] = 127
    weight = 2.0 ** torch.randint(-1, 2, (N,), generator=g)
    given = {"x": (codes - r) / weight, "residual": r / weight, "weight": weight}
    return {name: t.to(device, dtype) for name, t in given.items()}


def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    rows, h = ops.rms_norm_int8(x, weight, EPS, residual=residual)
    return rows.codes, rows.scales, h


def _codes(y: Tensor) -> tuple[Tensor, Tensor]:
    wide = y.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127.0
    return (wide / scales).round().to(torch.int8), scales.squeeze(-1)


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """As model code writes it (transformers' LlamaRMSNorm after the addition), and a dynamic int8 by token."""
    h = x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return *_codes(weight * y.to(x.dtype)), h


def _apart(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Our norm, then our codes."""
    y, h = ops.add_rms_norm(x, residual, weight, EPS)
    rows = ops.int8_rows(y)
    return rows.codes, rows.scales, h


def _liger(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    y, h = liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)
    return *_codes(y), h


PROVIDERS = {
    "tilewright": ours,
    "tilewright in two": _apart,
    "eager": eager,
    "compile": torch.compile(eager, dynamic=False),
}
if outsider("liger_kernel"):
    PROVIDERS["liger"] = _liger


def cost(dtype: torch.dtype, *, M: int, N: int) -> tuple[int, int]:
    """Least bytes (x, residual, weight read; codes, a scale a row, h written) and FLOPs."""
    return (3 * M * N + N) * dtype.itemsize + M * N + 4 * M, 8 * M * N
