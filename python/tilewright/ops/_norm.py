"""What the norms ask of x, the residual and the weight."""

import torch
from torch import Tensor

from tilewright import _op

F32_EPS = torch.finfo(torch.float32).eps  # eps None, as torch's for a float32 computation


def check_x(op: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ValueError(
            f"{op}: x must be floating point with at least one dimension, "
            f"not {x.dtype} {tuple(x.shape)}"
        )


def alike(op: str, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes; ValueError where residual does not fit x."""
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual shape {tuple(residual.shape)} does not fit x {tuple(x.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"{op}: residual is on {residual.device}, x on {x.device}")
    if residual.dtype != x.dtype:
        if not residual.is_floating_point():
            raise ValueError(f"{op}: residual must be floating point, not {residual.dtype}")
        wide = torch.promote_types(x.dtype, residual.dtype)
        return x.to(wide), residual.to(wide)
    return x, residual


def serves(op: str, x: Tensor, weight: Tensor | None) -> bool:
    """Whether a kernel serves x and the weight; ValueError where the weight does not fit x."""
    if weight is None:
        return _op.serves(op, x)
    if weight.dim() != 1 or weight.size(0) != x.size(-1):
        raise ValueError(
            f"{op}: weight shape {tuple(weight.shape)} does not fit x {tuple(x.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.device}, x on {x.device}")
    if not weight.is_floating_point():
        raise ValueError(f"{op}: weight must be floating point, not {weight.dtype}")
    return _op.serves(op, x) and _op.serves(op, weight)
