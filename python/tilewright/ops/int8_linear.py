"""int8_linear: validate, tilewright::int8_rows and int8_linear, autograd for x and bias.

N output features, K input features.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright import _op
from tilewright.quant_tensor import Int8Rows, QuantTensor

# columns from which a sum of products of int8, each up to 2^14, may pass int32
_MOST = 1 << 17

_rows = _op.register(
    "int8_linear",
    "int8_rows(Tensor x) -> (Tensor, Tensor)",
    fake=lambda x: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    ),
)
_linear = _op.register(
    "int8_linear",
    "int8_linear(Tensor codes, Tensor row_scales, Tensor qweight, Tensor scales, Tensor? bias,"
    " ScalarType dtype) -> Tensor",
    fake=lambda codes, row_scales, qweight, scales, bias, dtype: codes.new_empty(
        *codes.shape[:-1], qweight.shape[0], dtype=dtype
    ),
)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(qweight, scales)
        return _linear(*_rows(x), qweight, scales, bias, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        dx = dbias = None
        if ctx.needs_input_grad[0]:  # straight through the rounding of x
            dgrad = torch.ops.tilewright.linear_int8_dgrad.default
            dx = dgrad(dy, *ctx.saved_tensors, None, None, None, [])
        if ctx.needs_input_grad[3]:
            dbias = dy.sum_to_size(dy.shape[-1])
        return dx, None, None, dbias


class _Int8LinearOfRows(torch.autograd.Function):
    """For the bias alone."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, *args: Any) -> Tensor:
        codes, row_scales, qweight, scales, dtype = args
        return _linear(codes, row_scales, qweight, scales, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy.sum_to_size(dy.shape[-1]), None, None, None, None, None


def int8_rows(x: Tensor) -> Int8Rows:
    """Activations rounded to int8, a scale a row.  x [..., K] -> codes [..., K], scales [...].

    scale = max|row| / 127 and code = round(x / scale), ties to even, in float32: the dynamic scales by token of W8A8
    (Xiao et al. 2023, arXiv:2211.10438, table 1).  A row whose scale is below float32's smallest normal
    number becomes zeros, one with nan or infinity nan.  No gradient passes: int8_linear of x itself has
    one.  Raises ValueError where x is not floating point or has no dimension, or autograd would record it.
    """
    if not x.is_floating_point() or not x.dim():
        raise ValueError(
            f"int8_rows: x must be floating point with at least one dimension, "
            f"not {x.dtype} {list(x.shape)}"
        )
    no_gradient("int8_rows", "int8_linear of x", x)
    if not _op.serves("int8_linear", x):
        return _op.twin("int8_rows")(x)
    codes, scales = _rows(x)
    return Int8Rows(codes, scales, x.dtype)


def no_gradient(op: str, instead: str, *inputs: Tensor | None) -> None:
    """Raises ValueError where autograd would record op, whose codes have no gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError(f"{op}: codes have no gradient: take {instead}, or torch.no_grad()")


def int8_linear(x: Tensor | Int8Rows, w: QuantTensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of int8 weights and int8 activations, W8A8: x [..., K], w [N, K], bias [N] -> [..., N].

    y = (sum_k codes[k] q[n, k]) scale scales[n] + bias[n], the sum exact below 2^17 columns, with x's codes and scale as int8_rows
    makes them (or rms_norm_int8 did) and q the weight's codes less 128.  w has 8 bits, a scale a row
    and no offsets.  x and bias are float32, bfloat16 or float16, alike, and so is y; of Int8Rows their
    dtype.  Gradients reach x, as though it had not been rounded, and bias, never w.  Under autocast x and
    bias are cast as torch.nn.functional.linear's are.  Raises ValueError where a shape, dtype or device does
    not fit.
    """
    given = x.codes if isinstance(x, Int8Rows) else x
    if given.device != w.device:
        raise ValueError(f"int8_linear: x is on {given.device}, the weight on {w.device}")
    kind, dtype = _op.device_type(given), x.dtype
    wanted = _op.autocast_dtype(kind)
    if wanted is not None and dtype.is_floating_point and dtype != torch.float64:
        dtype = wanted
        bias = None if bias is None else _op.autocast(bias, dtype)
        x = Int8Rows(x.codes, x.scales, dtype) if isinstance(x, Int8Rows) else x.to(dtype)
    check_weight("int8_linear", w)
    N, K = w.shape
    if not given.dim() or given.shape[-1] != K:
        raise ValueError(
            f"int8_linear: x {list(given.shape)} does not fit a weight of shape {[N, K]}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"int8_linear: x must be a floating dtype, not {dtype}")
    if isinstance(x, Int8Rows):
        _check_rows(x)
    if bias is not None and (
        bias.shape != (N,) or bias.dtype != dtype or bias.device != given.device
    ):
        raise ValueError(
            f"int8_linear: bias {bias.dtype} {list(bias.shape)} on {bias.device} does not fit "
            f"x {dtype} on {given.device} and a weight of shape {[N, K]}"
        )
    if K >= _MOST or dtype not in _op.FLOATS or not _op.serves("int8_linear", w.scales):
        return _op.twin("int8_linear")(x, w, bias)
    records = bias is not None and bias.requires_grad
    if isinstance(x, Int8Rows):
        if torch.is_grad_enabled() and records:
            return _Int8LinearOfRows.apply(bias, x.codes, x.scales, w.qweight, w.scales, dtype)
        return _linear(x.codes, x.scales, w.qweight, w.scales, bias, dtype)
    if torch.is_grad_enabled() and (records or x.requires_grad):
        return _Int8Linear.apply(x, w.qweight, w.scales, bias)
    return _linear(*_rows(x), w.qweight, w.scales, bias, dtype)


def check_weight(op: str, w: QuantTensor) -> None:
    """Raises ValueError where int8_linear does not take w."""
    if not w.by_row:
        parts = ", ".join(sorted(w.tensors()))
        raise ValueError(
            f"{op}: the weight must have 8 bits, a scale a row and no offsets or order, not {w.bits} bits, "
            f"scales {list(w.scales.shape)} and {parts}"
        )


def _check_rows(x: Int8Rows) -> None:
    codes, scales = x.codes, x.scales
    if codes.dtype != torch.int8 or scales.dtype != torch.float32:
        raise ValueError(
            f"int8_linear: rows are int8 and their scales float32, not {codes.dtype} and {scales.dtype}"
        )
    if scales.shape != codes.shape[:-1] or scales.device != codes.device:
        raise ValueError(
            f"int8_linear: scales {list(scales.shape)} on {scales.device} do not fit codes "
            f"{list(codes.shape)} on {codes.device}"
        )
