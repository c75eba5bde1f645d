"""The specification of int8_rows and int8_linear, in eager PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewright.quant_tensor import Int8Rows, QuantTensor


def int8_rows(x: Tensor) -> Int8Rows:
    """Each row of x [..., K] as int8 codes and one scale: max|row| / 127, codes to the nearest even.

    The arithmetic is float32 whatever x is.  A row whose scale is below float32's smallest normal number
    becomes zeros; one with nan or infinity has a scale of nan and codes of 0.
    """
    wide = x.to(torch.float32)
    largest = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    most = torch.full_like(largest, 127.0)  # a tensor: torch multiplies with a number's inverse
    scales = largest / most
    usable = (largest < torch.inf) & (scales >= torch.finfo(torch.float32).tiny)
    inverse = torch.where(usable, most / largest, 0.0)
    codes = torch.where(usable, wide * inverse, 0.0).round().to(torch.int8)
    scales = torch.where(largest < torch.inf, torch.where(usable, scales, 0.0), torch.nan)
    return Int8Rows(codes, scales.squeeze(-1), x.dtype)


def int8_linear(x: Tensor | Int8Rows, w: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] or its rows, w [N, K], bias [N] -> [..., N]."""
    if isinstance(x, Tensor):
        # straight through: rounding has no gradient of its own
        rounded = x + (int8_rows(x).dequantize() - x).detach()
    else:
        rounded = x.dequantize()
    return F.linear(rounded, w.dequantize(rounded.dtype), bias)
