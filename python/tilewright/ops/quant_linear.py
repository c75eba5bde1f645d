"""quant_linear: validate, tilewright::linear_int{4,8}, autograd for x and bias.

N output features, K input features, G groups in a row of the weight.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright import _op
from tilewright.quant_tensor import QuantTensor

_ACTIVATIONS = ("float", "int8")
# nested: none, or code [256], scales [ceil(N G / 256)] and offset [] of scales that are uint8
_ARGS = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? minima, Tensor? codebook, Tensor[] nested"


def _fake(x: Tensor, qweight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


_linear = {
    bits: _op.register(
        "quant_linear",
        f"linear_int{bits}(Tensor x, {_ARGS}, Tensor? bias, str activations) -> Tensor",
        _fake,
    )
    for bits in (4, 8)
}
_dgrad = {
    bits: _op.register(
        "quant_linear",
        f"linear_int{bits}_dgrad(Tensor dy, {_ARGS}) -> Tensor",
        lambda dy, qweight, *_, codes=8 // bits: dy.new_empty(
            *dy.shape[:-1], qweight.shape[1] * codes
        ),
    )
    for bits in (4, 8)
}


_direct = _op.direct("quant_linear")


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, bits, activations, qweight, scales, zeros, minima, codebook, *nested):
        ctx.save_for_backward(qweight, scales, zeros, minima, codebook, *nested)
        ctx.bits = bits
        weight = qweight, scales, zeros, minima, codebook, nested
        return _linear[bits](x, *weight, bias, activations)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx = dbias = None
        saved = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = _dgrad[ctx.bits](dy, *saved[:5], saved[5:])
        if ctx.needs_input_grad[1]:
            dbias = dy.sum_to_size(dy.shape[-1])
        return dx, dbias, *[None] * (2 + len(saved))


def quant_linear(
    x: Tensor, w: QuantTensor, bias: Tensor | None = None, *, activations: str = "float"
) -> Tensor:
    """A linear layer over a quantised weight: x [..., K], w [N, K], bias [N] -> [..., N].

    x and bias are float32, bfloat16 or float16, alike; accumulation is float32.  Weights are rounded to x's dtype
    where tensor cores multiply them, and for bfloat16's input gradient; many rows of 16 bits are torch's
    product on a GPU.  activations="int8" rounds x to int8 in blocks of 32 columns first (the
    scheme of llama.cpp's Q8_0 activations), which integer units multiply faster and which costs
    accuracy; its gradient is the float one.  Gradients reach x and bias, never w.  Under autocast
    x and bias are cast as torch.nn.functional.linear's are.  Raises ValueError where a shape,
    dtype, device or option does not fit.
    """
    if _direct is not None and x.is_cpu and w.plain and not torch.compiler.is_compiling():
        y = _direct(x, bias, w.qweight, w.scales, w.zeros, w.minima, w.bits, activations)
        if y is not None:
            return y
    dtype = _op.autocast_dtype(_op.device_type(x))
    if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(dtype)
        bias = None if bias is None else _op.autocast(bias, dtype)
    N, K = w.shape
    if not x.dim() or x.shape[-1] != K:
        raise ValueError(f"quant_linear: x {list(x.shape)} does not fit a weight of shape {[N, K]}")
    if x.device != w.qweight.device:
        raise ValueError(f"quant_linear: x is on {x.device}, the weight on {w.qweight.device}")
    if bias is not None and (
        bias.shape != (N,) or bias.dtype != x.dtype or bias.device != x.device
    ):
        raise ValueError(
            f"quant_linear: bias {bias.dtype} {list(bias.shape)} on {bias.device} does not fit "
            f"x {x.dtype} on {x.device} and a weight of shape {[N, K]}"
        )
    if activations not in _ACTIVATIONS:
        raise ValueError(
            f"quant_linear: activations must be 'float' or 'int8', not {activations!r}"
        )
    wide_book = w.codebook is not None and w.bits == 8
    if wide_book or not _op.serves("quant_linear", x):
        if not x.is_floating_point():
            raise ValueError(f"quant_linear: x must be a floating dtype, not {x.dtype}")
        return _op.twin("quant_linear")(x, w, bias, activations=activations)
    if w.order is not None:
        x = x.index_select(-1, w.order)
    scales, nested = w.scales, [] if w.nested is None else [*w.nested]
    if nested and (w.zeros is not None or w.minima is not None):  # uint8 as the scales are
        scales, nested = w.plain_scales(), []
    weight = w.qweight, scales, w.zeros, w.minima, w.codebook
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _QuantLinear.apply(x, bias, w.bits, activations, *weight, *nested)
    return _linear[w.bits](x, *weight, nested, bias, activations)
