"""The specification of quant_linear, in eager PyTorch."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewright.quant_tensor import QuantTensor


def round_to_int8(x: Tensor, group: int) -> Tensor:
    """x [..., K] rounded as `activations="int8"` does: symmetric int8 in blocks of 32 columns.

    The block is the weight's group where 32 does not divide it.  scale = max|x| / 127, codes to
    the nearest even; a block whose scale is below float32's smallest normal number becomes zeros.
    The arithmetic is float32 whatever x is.
    """
    block = 32 if group % 32 == 0 else group
    blocks = x.to(torch.float32).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127.0
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)  # keeps nan
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    codes = (blocks * inverse).round().clamp(-127, 127)
    return (codes.to(x.dtype) * scale.to(x.dtype)).flatten(-2)


def quant_linear(
    x: Tensor, w: QuantTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    """x [..., K], w [N, K], bias [N] -> [..., N].  Blocks are of columns as they are stored."""
    if w.order is not None:
        x, w = x.index_select(-1, w.order), replace(w, order=None)
    if activations == "int8":
        # straight through: rounding has no gradient of its own
        x = x + (round_to_int8(x, w.group) - x).detach()
    return F.linear(x, w.dequantize(x.dtype), bias)
