"""rms_norm: validate, tilewright::rms_norm_{fwd,bwd}, autograd."""

import torch
from torch import Tensor

from tilewright import _op
from tilewright.ops import _norm

_fwd = _op.register(
    "rms_norm",
    "rms_norm_fwd(Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps, offset: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    ),
)
_bwd = _op.register(
    "rms_norm",
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, float offset, bool weight_grad)"
    " -> (Tensor, Tensor)",
    fake=lambda dy, x, weight, rstd, offset, weight_grad: (
        x.new_empty(x.shape),
        x.new_empty(0) if weight is None or not weight_grad else weight.new_empty(weight.shape),
    ),
)

_direct = _op.direct("rms_norm")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        y, rstd = _fwd(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        weight_grad = ctx.needs_input_grad[1]
        dx, dw = _bwd(dy, *ctx.saved_tensors, ctx.offset, weight_grad)
        return dx, dw if weight_grad else None, None, None


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float | None = None, *, offset: float = 0.0
) -> Tensor:
    """Normalise the last dimension by its root mean square.  x [..., D], weight [D] -> [..., D].

    y = x (mean(x^2) + eps)^(-1/2) (offset + weight) in x's dtype (Zhang & Sennrich 2019,
    arXiv:1910.07467, eq. 4), computed in float32, or float64 for float64, and rounded once.  The
    weight may have a dtype of its own; without one the last factor is 1, whatever the offset.  eps
    None is the machine epsilon of the dtype computed in; Gemma's weights take offset=1.
    Autocast changes nothing, as in torch.  Raises ValueError where x is not floating point or has no
    dimension, or weight does not fit it in shape, device or kind of dtype.
    """
    if _direct is not None and x.is_cpu and not torch.compiler.is_compiling():
        y = _direct(x, weight, eps, offset)
        if y is not None:
            return y
    _norm.check_x("rms_norm", x)
    if not _norm.serves("rms_norm", x, weight):
        return _op.twin("rms_norm")(x, weight, eps, offset=offset)
    if eps is None:
        eps = _norm.F32_EPS
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return _RMSNorm.apply(x, weight, eps, offset)
    return _fwd(x, weight, eps, offset)[0]
