"""moe_experts: validate, tilewright::moe_experts_{fwd,bwd}, autograd.

P slots, T tokens with k each; E experts, D features, I intermediate ones.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op
from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows
from tilewright.ops import _moe
from tilewright.ops.moe_route import MOST_EXPERTS

_ARGS = (
    "Tensor weights, Tensor order, Tensor rows, Tensor offsets, Tensor w13, Tensor w2, Tensor? bias13,"
    f" Tensor? bias2, {_moe.ADAPTERS}, str activation, float limit, float scale"
)


def _fwd_fake(x: Tensor, weights: Tensor, order: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    w13, save = args[2], args[-1]
    return x.new_empty(x.shape), x.new_empty(order.shape[0] if save else 0, w13.shape[1])


def _bwd_fake(
    dout: Tensor, x: Tensor, h: Tensor, weights: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    _, _, _, *parts, _, _, _, wanted = args  # the weights, biases and adapters
    return tuple(
        x.new_empty(0) if t is None else t.new_empty(t.shape if want else 0)
        for t, want in zip((x, weights, *parts), wanted, strict=True)
    )


_fwd = _op.register(
    "moe_experts",
    f"moe_experts_fwd(Tensor x, {_ARGS}, bool save) -> (Tensor, Tensor)",
    fake=_fwd_fake,
)
_bwd = _op.register(
    "moe_experts",
    f"moe_experts_bwd(Tensor dout, Tensor x, Tensor h, {_ARGS}, bool[10] wanted)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    fake=_bwd_fake,
)


class _How(NamedTuple):
    activation: str
    limit: float  # inf: none
    scale: float  # of the adapters


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: _How, placed: ExpertRows, x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor,
        bias13: Tensor | None, bias2: Tensor | None, *adapters: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, h = _fwd(x, weights, *placed, w13, w2, bias13, bias2, *adapters, *how, True)
        ctx.save_for_backward(x, h, weights, *placed, w13, w2, bias13, bias2, *adapters)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[2:]
        grads = _bwd(dout, *ctx.saved_tensors, *ctx.how, wanted)
        return None, None, *(g if want else None for g, want in zip(grads, wanted, strict=True))


def _check(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, bias13: Tensor | None,
    bias2: Tensor | None, lora: ExpertLora,
) -> None:  # fmt: skip
    _moe.check_x("moe_experts", x)
    D = x.shape[-1]
    if (
        w13.dim() != 3
        or w13.shape[1] % 2
        or w13.shape[1] == 0
        or w13.shape[2] != D
        or not 1 <= len(w13) <= MOST_EXPERTS
    ):
        raise ValueError(
            f"moe_experts: w13 {tuple(w13.shape)} must be [E, 2 I, {D}], of 1 to {MOST_EXPERTS} experts"
        )
    E, I = len(w13), w13.shape[1] // 2
    if w2.shape != (E, D, I):
        raise ValueError(f"moe_experts: w2 {tuple(w2.shape)} must be {(E, D, I)}")
    _moe.check_slots("moe_experts", x, weights, placed, E)
    for name, b, shape in (("bias13", bias13, (E, 2 * I)), ("bias2", bias2, (E, D))):
        if b is not None and b.shape != shape:
            raise ValueError(f"moe_experts: {name} {tuple(b.shape)} must be {shape}")
    others = {"w13": w13, "w2": w2, "bias13": bias13, "bias2": bias2}
    _moe.check_devices("moe_experts", x, {**others, "weights": weights, **placed._asdict()})
    for name, t in others.items():
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"moe_experts: {name} {t.dtype}, x {x.dtype}")
    _moe.check_lora("moe_experts", x, lora, E, I)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    placed: ExpertRows,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """Each token's experts, and the weighted sum of what they give.

    x [..., D], weights [..., k] with moe_dispatch's rows, w13 [E, 2 I, D] (the gates' rows, then the ups'),
    w2 [E, D, I] -> [..., D] of x's dtype:  sum_j weights_j (w2_e (f(gate) up) + bias2_e)  with e the j-th expert and
    gate, up the halves of w13_e x + bias13_e.  f is silu, gelu or gelu_tanh; with a limit, gates are at most that and
    ups within it (gpt-oss).  With lora, w13_e is w13_e + scale b13_e a13_e and w2_e likewise, of which neither the
    sum nor the product is formed.  Products are summed in float32.  Weights of any strides but the last.

    Only x and gate, up [P, 2 I] are kept for the backward: 2 T D + 4 P I bytes of bfloat16.  Gradients reach x,
    weights, w13, w2, the biases and adapters; an expert without tokens gets 0, and what wants none costs none, as w13
    and w2 under adapters.  Autocast casts x, the weights w13, w2, the biases and adapters.  ValueError where shapes,
    dtypes or devices do not fit.  Shazeer et al. 2017, arXiv:1701.06538, eq. 1; Shazeer 2020, arXiv:2002.05202;
    SonicMoE 2025, arXiv:2512.14080, what is kept; Hu et al. 2021, arXiv:2106.09685, adapters.
    """
    _moe.check_activation("moe_experts", activation, limit)
    kind = _op.autocast_dtype(_op.device_type(x))
    if kind is not None:
        x, w13, w2 = (_op.autocast(t, kind) for t in (x, w13, w2))
        bias13, bias2 = (None if t is None else _op.autocast(t, kind) for t in (bias13, bias2))
    given = _moe.cast_lora(lora, kind)
    _check(x, weights, placed, w13, w2, bias13, bias2, given)
    if not _op.serves("moe_experts", x) or weights.dtype not in _op.FLOATS:
        return _op.twin("moe_experts")(
            x,
            weights,
            placed,
            w13,
            w2,
            activation=activation,
            limit=limit,
            bias13=bias13,
            bias2=bias2,
            lora=given,
        )
    *adapters, scale = given
    how = _How(activation, float("inf") if limit is None else float(limit), float(scale))
    inputs = x, weights, w13, w2, bias13, bias2, *adapters
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Experts.apply(how, placed, *inputs)
    return _fwd(x, weights, *placed, *inputs[2:], *how, False)[0]
