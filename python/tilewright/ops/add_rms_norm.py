"""add_rms_norm: validate, tilewright::add_rms_norm_{fwd,bwd}, autograd."""

import torch
from torch import Tensor

from tilewright import _op
from tilewright.ops import _norm

_fwd = _op.register(
    "add_rms_norm",
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, eps, offset: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    ),
)
_bwd = _op.register(
    "add_rms_norm",
    "add_rms_norm_bwd(Tensor dy, Tensor dresidual, Tensor h, Tensor? weight, Tensor rstd,"
    " float offset, bool weight_grad) -> (Tensor, Tensor)",
    fake=lambda dy, dresidual, h, weight, rstd, offset, weight_grad: (
        h.new_empty(h.shape),
        h.new_empty(0) if weight is None or not weight_grad else weight.new_empty(weight.shape),
    ),
)

_direct = _op.direct("add_rms_norm")


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        y, h, rstd = _fwd(x, residual, weight, eps, offset)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset = offset
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dresidual):
        weight_grad = ctx.needs_input_grad[2]
        dx, dw = _bwd(dy, dresidual, *ctx.saved_tensors, ctx.offset, weight_grad)
        return dx, dx, dw if weight_grad else None, None, None


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it.  x, residual [..., D], weight [D] -> y, h [..., D].

    h = x + residual, the new residual, rounded to their dtype (the wider where they differ, as
    torch's sum), and y = rms_norm(h, weight, eps, offset=offset) in h's.  Autocast changes nothing,
    as in torch.  Raises ValueError where x is not floating point or has no dimension, residual does
    not fit it in shape or device, or weight in shape, device or kind of dtype.
    """
    if _direct is not None and x.is_cpu and not torch.compiler.is_compiling():
        found = _direct(x, residual, weight, eps, offset)
        if found is not None:
            return found
    _norm.check_x("add_rms_norm", x)
    x, residual = _norm.alike("add_rms_norm", x, residual)
    if not _norm.serves("add_rms_norm", x, weight):
        return _op.twin("add_rms_norm")(x, residual, weight, eps, offset=offset)
    if eps is None:
        eps = _norm.F32_EPS
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return _AddRMSNorm.apply(x, residual, weight, eps, offset)
    y, h, _ = _fwd(x, residual, weight, eps, offset)
    return y, h
