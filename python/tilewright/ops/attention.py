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


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return _heads_last(q)


def _bwd_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_last(q), _heads_last(k), _heads_last(k)


_fwd = _op.register(
    "attention",
    "attention_fwd(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> Tensor",
    _fwd_fake,
)
_bwd = _op.register(
    "attention",
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, bool causal, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal, ctx.scale = causal, scale
        return _fwd(q, k, v, causal, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return (*_bwd(dout, *ctx.saved_tensors, ctx.causal, ctx.scale), None, None)


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


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention, softmax(scale q kᵀ) v.

    q [B, H, S, D], k, v [B, G, T, D] with H a multiple of G -> [B, H, S, D], of q's dtype (any
    float), lying as [B, S, H, D] so that merging heads is a view.  Any strides; head dims to 256
    have kernels.  `causal` lets query i see keys j <= i + T - S, as a KV cache needs; a row that
    sees nothing gives 0, and zero gradients.  `scale` defaults to D ** -0.5.  Under autocast the
    inputs take its dtype, as F.scaled_dot_product_attention's do.  ValueError on shapes, dtypes or
    devices that do not fit.  Dao 2023, arXiv:2307.08691, algorithms 1 and 2.
    """
    if _direct is not None and q.is_cpu and not torch.compiler.is_compiling():
        out = _direct(q, k, v, causal, scale)
        if out is not None:
            return out
    device = q.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (
            t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (q, k, v)
        )
    if not _fits(q, k, v):
        raise ValueError(f"attention: {_misfit(q, k, v)}")
    D = q.size(3)
    if D > MAX_D or not _op.serves("attention", q):
        if not q.is_floating_point():
            raise ValueError(f"attention: {_misfit(q, k, v)}")
        return _op.twin("attention")(q, k, v, causal=causal, scale=scale)
    if scale is None:
        scale = D**-0.5
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, causal, scale)
    return _fwd(q, k, v, causal, scale)
