"""moe_combine: validate, tilewright::moe_combine_{fwd,bwd}, autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op
from tilewright.expert_rows import ExpertRows

_fwd = _op.register(
    "moe_combine",
    "moe_combine_fwd(Tensor y, Tensor weights, Tensor rows) -> Tensor",
    fake=lambda y, weights, rows: y.new_empty((*rows.shape[:-1], y.shape[-1])),
)
_bwd = _op.register(
    "moe_combine",
    "moe_combine_bwd(Tensor dout, Tensor y, Tensor weights, Tensor order, Tensor offsets) -> (Tensor, Tensor)",
    fake=lambda dout, y, weights, order, offsets: (
        y.new_empty(y.shape),
        weights.new_empty(weights.shape),
    ),
)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, *placed: Tensor) -> Tensor:
        order, rows, offsets = placed
        ctx.save_for_backward(y, weights, order, offsets)
        return _fwd(y, weights, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return *_bwd(dout, *ctx.saved_tensors), None, None, None


def moe_combine(y: Tensor, weights: Tensor, placed: ExpertRows) -> Tensor:
    """Each token's sum of what its experts gave, weighted.

    y [P, D] and weights [..., k], with moe_dispatch's rows -> [..., D] of y's dtype: summed in float32 in the order
    of the weights, rounded once.  Slots of no expert add nothing, whatever their weight, and their rows of y are not
    read.  Gradients reach y and weights; a row of no expert gets 0.  Autocast changes nothing.  ValueError where
    shapes, dtypes or devices do not fit.  Shazeer et al. 2017, arXiv:1701.06538, eq. 1.
    """
    slots = placed.rows.numel()
    if y.dim() != 2 or y.shape[0] != slots or not y.is_floating_point():
        raise ValueError(
            f"moe_combine: y {y.dtype} {tuple(y.shape)} must be floating point [{slots}, D]"
        )
    if weights.shape != placed.rows.shape or not weights.is_floating_point():
        raise ValueError(
            f"moe_combine: weights {weights.dtype} {tuple(weights.shape)} must be floating point"
            f" {tuple(placed.rows.shape)}"
        )
    for name, t in (("weights", weights), *placed._asdict().items()):
        if t.device != y.device:
            raise ValueError(f"moe_combine: {name} on {t.device}, y on {y.device}")
        if name != "weights" and t.dtype != torch.int64:
            raise ValueError(f"moe_combine: {name} {t.dtype} must be int64, as moe_dispatch's")
    if placed.order.shape != (slots,) or placed.offsets.dim() != 1 or not len(placed.offsets):
        raise ValueError(
            f"moe_combine: order {tuple(placed.order.shape)} and offsets {tuple(placed.offsets.shape)} must be"
            f" [{slots}] and [E + 1]"
        )
    if not _op.serves("moe_combine", y) or weights.dtype not in _op.FLOATS:
        return _op.twin("moe_combine")(y, weights, placed)
    if torch.is_grad_enabled() and (y.requires_grad or weights.requires_grad):
        return _Combine.apply(y, weights, *placed)
    return _fwd(y, weights, placed.rows)
