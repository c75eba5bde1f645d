"""The specification of rms_norm_int8, in eager PyTorch."""

import torch
from torch import Tensor

from tilewright.quant_tensor import Int8Rows
from tilewright.reference.int8_linear import int8_rows
from tilewright.reference.rms_norm import rms_norm


def rms_norm_int8(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Int8Rows, Tensor]:
    """x, residual [..., D], weight [D] -> the rows of rms_norm(h) in float32, and h = x + residual."""
    h = x if residual is None else x + residual
    wide = None if weight is None else weight.to(torch.float32)
    rows = int8_rows(rms_norm(h.to(torch.float32), wide, eps, offset=offset))
    return Int8Rows(rows.codes, rows.scales, h.dtype), h
