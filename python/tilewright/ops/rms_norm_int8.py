"""rms_norm_int8: validate, tilewright::rms_norm_int8.  No autograd: its codes have no gradient."""

import torch
from torch import Tensor

from tilewright import _op
from tilewright.ops import _norm
from tilewright.ops.int8_linear import no_gradient
from tilewright.quant_tensor import Int8Rows

_fwd = _op.register(
    "rms_norm_int8",
    "rms_norm_int8(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, eps, offset: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
        x.new_empty(0 if residual is None else x.shape),
    ),
)


def rms_norm_int8(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Int8Rows, Tensor]:
    """RMSNorm whose output is int8, a scale a row, as int8_linear takes it.

    x, residual [..., D], weight [D] -> (codes [..., D], scales [...]) and h [..., D].  h is x, or x + residual
    as add_rms_norm rounds it; the rows are int8_rows of rms_norm(h, weight, eps, offset=offset) in float32,
    which is not rounded to h's dtype on the way.  No gradient passes: rms_norm and int8_linear have
    one.  Autocast changes nothing.  Raises ValueError where x is not floating point or has no dimension,
    residual or weight does not fit it, or autograd would record it.
    """
    _norm.check_x("rms_norm_int8", x)
    no_gradient("rms_norm_int8", "rms_norm and int8_linear of its output", x, weight, residual)
    if residual is not None:
        x, residual = _norm.alike("rms_norm_int8", x, residual)
    if not _norm.serves("rms_norm_int8", x, weight):
        return _op.twin("rms_norm_int8")(x, weight, eps, residual=residual, offset=offset)
    if eps is None:
        eps = _norm.F32_EPS
    codes, scales, h = _fwd(x, residual, weight, eps, offset)
    return Int8Rows(codes, scales, x.dtype), x if residual is None else h
