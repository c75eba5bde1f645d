"""The specification of rms_norm, in eager PyTorch."""

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, offset: float = 0.0
) -> Tensor:
    """x [..., D], weight [D] -> [..., D]: x rsqrt(mean(x^2) + eps) (offset + weight), in x's dtype.

    Computed in float32 (float64 for float64) and rounded once; without a weight the last factor
    is 1; eps None is the machine epsilon of the dtype computed in, as torch's.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + offset)
    return y.to(x.dtype)
