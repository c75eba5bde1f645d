"""quant_moe_experts: validate, tilewright::quant_moe_experts_{fwd,bwd}, autograd for x, the router's weights and
adapters.

P slots, T tokens with k each; E experts, D features, I intermediate ones.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op
from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows
from tilewright.ops import _moe
from tilewright.ops.moe_route import MOST_EXPERTS
from tilewright.quant_tensor import QuantTensor

_PLACED = "Tensor weights, Tensor order, Tensor rows, Tensor offsets"
# nested: none, or code [256], scales and offset [] of scales that are uint8; order2 [I] int32, of w2's columns, in
# which a2's are
_WEIGHTS = ", ".join(
    f"Tensor qweight{n}, Tensor scales{n}, Tensor? zeros{n}, Tensor? minima{n}, Tensor? codebook{n},"
    f" Tensor[] nested{n}, int bits{n}"
    for n in (13, 2)
)
_ARGS = f"{_PLACED}, {_WEIGHTS}, Tensor? order2"


def _fwd_fake(x: Tensor, weights: Tensor, order: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    offsets, qweight13, save = args[1], args[2], args[-1]
    width = qweight13.shape[0] // (offsets.shape[0] - 1)
    return x.new_empty(x.shape), x.new_empty(order.shape[0] if save else 0, width)


def _bwd_fake(
    dout: Tensor, x: Tensor | None, h: Tensor, weights: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *_, a13, b13, a2, b2, _, _, _, wanted = args
    return tuple(
        dout.new_empty(0) if t is None else t.new_empty(t.shape if want else 0)
        for t, want in zip((dout, weights, a13, b13, a2, b2), wanted, strict=True)
    )


_fwd = _op.register(
    "quant_moe_experts",
    f"quant_moe_experts_fwd(Tensor x, {_ARGS}, Tensor? bias13, Tensor? bias2, {_moe.ADAPTERS}, str activation,"
    " float limit, float scale, bool save) -> (Tensor, Tensor)",
    fake=_fwd_fake,
)
_bwd = _op.register(
    "quant_moe_experts",
    f"quant_moe_experts_bwd(Tensor dout, Tensor? x, Tensor h, {_ARGS}, Tensor? bias2, {_moe.ADAPTERS},"
    " str activation, float limit, float scale, bool[6] wanted)"
    f" -> ({', '.join(['Tensor'] * 6)})",
    fake=_bwd_fake,
)


class _How(NamedTuple):
    activation: str
    limit: float  # inf: none
    scale: float  # of the adapters
    bits: tuple[int, int]  # of w13 and of w2
    nested: tuple[bool, bool]


def _parts(w: QuantTensor) -> tuple[list[Tensor | None], list[Tensor]]:
    """The weight as the operators take one, and its nested scales."""
    scales, nested = w.scales, [] if w.nested is None else [*w.nested]
    if nested and (w.zeros is not None or w.minima is not None):  # uint8 as the scales are
        scales, nested = w.plain_scales(), []
    return [w.qweight, scales, w.zeros, w.minima, w.codebook], nested


def _weights(how: _How, parts: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Operators' arguments of order2, five tensors of w13 and of w2, and what nested scales they have."""
    order2, *rest = parts
    fives, nested = (rest[:5], rest[5:10]), rest[10:]
    mid = 3 * how.nested[0]
    (five13, five2), (bits13, bits2) = fives, how.bits
    return *five13, nested[:mid], bits13, *five2, nested[mid:], bits2, order2


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: _How, placed: ExpertRows, x: Tensor, weights: Tensor, a13: Tensor | None, b13: Tensor | None,
        a2: Tensor | None, b2: Tensor | None, bias13: Tensor | None, bias2: Tensor | None, *parts: Tensor | None,
    ) -> Tensor:  # fmt: skip
        given, adapters = _weights(how, parts), (a13, b13, a2, b2)
        out, h = _fwd(x, weights, *placed, *given, bias13, bias2, *adapters, *how[:3], True)
        kept = x if any(ctx.needs_input_grad[4:6]) else None  # of which da13 and db13 are
        ctx.save_for_backward(kept, h, weights, *placed, bias2, *adapters, *parts)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        how, wanted = ctx.how, ctx.needs_input_grad[2:8]
        x, h, weights, order, rows, offsets, bias2, *rest = ctx.saved_tensors
        adapters, parts = rest[:4], rest[4:]
        grads = _bwd(
            dout, x, h, weights, order, rows, offsets, *_weights(how, parts), bias2, *adapters, *how[:3], wanted
        )  # fmt: skip
        given = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return None, None, *given, *[None] * (2 + len(parts))


def _check(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, bias13: Tensor | None,
    bias2: Tensor | None, lora: ExpertLora,
) -> None:  # fmt: skip
    op = "quant_moe_experts"
    _moe.check_x(op, x)
    for name, w in (("w13", w13), ("w2", w2)):
        if not isinstance(w, QuantTensor):
            raise ValueError(f"{op}: {name} must be a QuantTensor, not {type(w).__name__}")
        if w.device != x.device:
            raise ValueError(f"{op}: {name} on {w.device}, x on {x.device}")
    D, E = x.shape[-1], placed.offsets.numel() - 1
    if not 1 <= E <= MOST_EXPERTS:
        raise ValueError(
            f"{op}: offsets {tuple(placed.offsets.shape)} must be of 1 to {MOST_EXPERTS} experts"
        )
    N13, K13 = w13.shape
    if K13 != D or N13 % (2 * E) or N13 == 0:
        raise ValueError(f"{op}: w13 {tuple(w13.shape)} must be [2 I, {D}] of each of {E} experts")
    I = N13 // (2 * E)
    if w2.shape != (E * D, I):
        raise ValueError(f"{op}: w2 {tuple(w2.shape)} must be {(E * D, I)}, of {E} experts")
    _moe.check_slots(op, x, weights, placed, E)
    biases = {"bias13": (bias13, (E, 2 * I)), "bias2": (bias2, (E, D))}
    for name, (b, shape) in biases.items():
        if b is not None and (b.shape != shape or b.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name} {b.dtype} {tuple(b.shape)} must be {x.dtype} {shape}, as x"
            )
        if b is not None and b.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} is frozen as the weights are, and has no gradient")
    others = {"bias13": bias13, "bias2": bias2, "weights": weights, **placed._asdict()}
    _moe.check_devices(op, x, others)
    _moe.check_lora(op, x, lora, E, I)


def quant_moe_experts(
    x: Tensor,
    weights: Tensor,
    placed: ExpertRows,
    w13: QuantTensor,
    w2: QuantTensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """Each token's experts, of 4- or 8-bit weights, and the weighted sum of what they give.

    x [..., D], weights [..., k] with moe_dispatch's rows, w13 [E 2 I, D] and w2 [E D, I], the experts' rows one below
    the other, in each of w13's the gates' and then the ups' -> [..., D] of x's dtype: moe_experts of the dequantised
    weights.  Products are summed in float32; weights are rounded to x's dtype where tensor cores multiply them.  An
    order of the columns (act-order) is all experts'.  A code book of 8 bits runs on the reference.  With lora, w13_e is
    w13_e + scale b13_e a13_e and w2_e likewise, neither of which is formed (QLoRA).

    Only gate and up [P, 2 I] are kept for the backward, and x for adapters of w13.  Gradients reach x, weights and
    adapters; w13, w2 and the biases are frozen.  Autocast casts x, the biases and adapters.  ValueError where shapes,
    dtypes or devices do not fit, or a bias asks for a gradient.  Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).
    """
    _moe.check_activation("quant_moe_experts", activation, limit)
    kind = _op.autocast_dtype(_op.device_type(x))
    if kind is not None:
        x = _op.autocast(x, kind)
        bias13, bias2 = (None if t is None else _op.autocast(t, kind) for t in (bias13, bias2))
    lora = _moe.cast_lora(lora, kind)
    _check(x, weights, placed, w13, w2, bias13, bias2, lora)
    wide_book = any(w.codebook is not None and w.bits == 8 for w in (w13, w2))
    served = _op.serves("quant_moe_experts", x) and weights.dtype in _op.FLOATS
    if wide_book or not served:
        return _op.twin("quant_moe_experts")(
            x,
            weights,
            placed,
            w13,
            w2,
            activation=activation,
            limit=limit,
            bias13=bias13,
            bias2=bias2,
            lora=lora,
        )
    a13, b13, a2, b2, scale = lora
    if a13 is not None and w13.order is not None:
        a13 = a13.index_select(-1, w13.order)
    if a2 is not None and w2.order is not None:
        a2 = a2.index_select(-1, w2.order)
    adapters = a13, b13, a2, b2
    if w13.order is not None:
        x = x.index_select(-1, w13.order)
    (five13, nested13), (five2, nested2) = _parts(w13), _parts(w2)
    parts = w2.order, *five13, *five2, *nested13, *nested2
    how = _How(
        activation,
        float("inf") if limit is None else float(limit),
        float(scale),
        (w13.bits, w2.bits),
        (bool(nested13), bool(nested2)),
    )
    inputs = x, weights, *adapters
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Experts.apply(how, placed, *inputs, bias13, bias2, *parts)
    given = _weights(how, parts)
    return _fwd(x, weights, *placed, *given, bias13, bias2, *adapters, *how[:3], False)[0]
