"""attention: validate, tilewright::attention_{fwd,bwd}, autograd.

B batch, H query heads, G kv heads, S queries, T keys, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright import _op

MAX_D = 256
_direct = _op.direct("attention")


def _heads_last(x: Tensor) -> Tensor:
    """[B, N, S, D] lying in memory as [B, S, N, D]."""
    B, N, S, D = x.shape
    return x.new_empty(B, S, N, D).transpose(1, 2)


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    left: int, right: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    left: int, right: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32)
    return _heads_last(q), _heads_last(k), _heads_last(k), dsinks


# left and right: how far back and ahead a query sees, -1 without end.  softcap 0 is none.
_OPTIONS = "Tensor? sinks, int left, int right, float softcap, float scale"
_fwd = _op.register(
    "attention",
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = _op.register(
    "attention",
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks)
        ctx.options = options
        return _fwd(q, k, v, sinks, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(q)
        dq, dk, dv, dsinks = _bwd(dout, dlse, q, k, v, sinks, *ctx.options)
        return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype), *(None,) * 4


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    q_shape, k_shape, device = q.shape, k.shape, q.device
    return (
        len(q_shape) == len(k_shape) == 4
        and v.shape == k_shape
        and k_shape[0] == q_shape[0]
        and k_shape[3] == q_shape[3] > 0
        and k_shape[1] > 0
        and q_shape[1] % k_shape[1] == 0
        and q.dtype == k.dtype == v.dtype
        and k.device == device
        and v.device == device
    )


def _misfit(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Which rule of _fits the inputs break."""
    if q.dim() != 4 or k.dim() != 4:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)} are not [B, H, S, D] and [B, G, T, D]"
    B, H, _, D = q.shape
    if v.shape != k.shape:
        return f"v {tuple(v.shape)} does not fit k {tuple(k.shape)}"
    if k.shape[0] != B or k.shape[3] != D:
        return f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}"
    if D == 0:
        return f"q {tuple(q.shape)} has head dim 0"
    if k.shape[1] == 0 or H % k.shape[1]:
        return f"{H} query heads are not a multiple of {k.shape[1]} kv heads"
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype} are not one floating-point dtype"
    return f"q on {q.device}, k on {k.device}, v on {v.device}"


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int] | None,
    softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, int, int]:  # fmt: skip
    """q, k, v as autocast wants them, and how far back and ahead a query sees."""
    device = q.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (
            t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (q, k, v)
        )
    if not _fits(q, k, v) or not q.is_floating_point():
        raise ValueError(f"attention: {_misfit(q, k, v)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be above 0, not {softcap}")
    if sinks is not None and not (
        sinks.shape == (q.size(1),) and sinks.device == q.device and sinks.is_floating_point()
    ):
        raise ValueError(
            f"attention: sinks {tuple(sinks.shape)} {sinks.dtype} on {sinks.device} are not a float a"
            f" head of q {tuple(q.shape)} on {q.device}"
        )
    left, right = (-1, -1) if window is None else window
    if left < -1 or right < -1:
        raise ValueError(f"attention: window {window} is not two counts of keys, -1 for all")
    return q, k, v, left, 0 if causal else right


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """attention, and the natural logarithm of the softmax's denominator, the sink included.

    -> out [B, H, S, D] of q's dtype, lse [B, H, S] of float32 (float64 of float64 inputs), both
    differentiable: what merges partial attentions over disjoint keys.  A row that sees nothing has
    lse -inf.  Arguments and errors are attention's.
    """
    q, k, v, left, right = _prepared(q, k, v, causal, window, softcap, sinks)
    D = q.size(3)
    if D > MAX_D or not _op.serves("attention", q):
        twin = _op.twin("attention_with_lse")
        return twin(q, k, v, window=(left, right), softcap=softcap, sinks=sinks, scale=scale)
    options = (
        left,
        right,
        0.0 if softcap is None else softcap,
        D**-0.5 if scale is None else scale,
    )
    inputs = (q, k, v, sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Attention.apply(*inputs, *options)
    return _fwd(*inputs, *options)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention, softmax(scale q kᵀ) v.

    q [B, H, S, D], k, v [B, G, T, D] with H a multiple of G -> [B, H, S, D], of q's dtype (any
    float), lying as [B, S, H, D] so that merging heads is a view.  Any strides; head dims to 256
    have kernels.

    Query i stands at key p = i + T - S, as a KV cache needs.  `causal` lets it see keys up to p;
    `window` (left, right) those from p - left to p + right, -1 for no end.  A row that sees nothing
    gives 0, and zero gradients.
    `scale` defaults to D ** -0.5.  `softcap` c bounds the scaled scores s: c tanh(s / c) (Gemma 2).
    `sinks` [H], any float dtype, are scores of one more key a head, whose value is 0: they take
    their share of the softmax (GPT-OSS).  All are differentiable in q, k, v and sinks.

    Under autocast q, k and v take its dtype, as F.scaled_dot_product_attention's do.  ValueError on
    shapes, dtypes, devices or options that do not fit.  Dao 2023, arXiv:2307.08691, algorithms 1, 2.
    """
    if (
        _direct is not None
        and window is None
        and softcap is None
        and sinks is None
        and q.is_cpu
        and not torch.compiler.is_compiling()
    ):
        out = _direct(q, k, v, causal, scale)
        if out is not None:
            return out
    return attention_with_lse(
        q, k, v, causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale
    )[0]
