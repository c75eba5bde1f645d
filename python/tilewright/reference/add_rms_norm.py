"""The specification of add_rms_norm, in eager PyTorch."""

from torch import Tensor

from .rms_norm import rms_norm


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x, residual [..., D], weight [D] -> y, h [..., D]: h = x + residual, y = rms_norm(h).

    h is rounded to the dtype torch gives x + residual before it is normalised.
    """
    h = x + residual
    return rms_norm(h, weight, eps, offset=offset), h
