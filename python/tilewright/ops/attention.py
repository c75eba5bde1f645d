"""attention: validate, tilewright::attention_{fwd,bwd}, autograd.

B batch, H query heads, G kv heads, S queries, T keys, D head dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tilewright import _op, masks

MAX_D = 256
MOST_SEED = 2**63 - 1  # as the reference draws it
_direct = _op.direct("attention")


def _heads_last(x: Tensor) -> Tensor:
    """[B, N, S, D] lying in memory as [B, S, N, D]."""
    B, N, S, D = x.shape
    return x.new_empty(B, S, N, D).transpose(1, 2)


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, begin: Tensor | None,
    end: Tensor | None, blocks: Tensor | None, seed: Tensor | None, left: int, right: int,
    block_size: int, softcap: float, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    bias: Tensor | None, begin: Tensor | None, end: Tensor | None, blocks: Tensor | None,
    seed: Tensor | None, left: int, right: int, block_size: int, softcap: float, scale: float,
    dropout: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0 if sinks is None else sinks.shape, dtype=torch.float32)
    dbias = q.new_empty(bias.shape if bias is not None and bias_grad else 0, dtype=torch.float32)
    return _heads_last(q), _heads_last(k), _heads_last(k), dsinks, dbias


# bias broadcasts to [B, H, S, T].  begin and end, int32 [B, S]: query i sees keys begin[i] .. end[i] - 1.
# Without them, left and right are how far back and ahead a query sees, -1 without end.  softcap 0 is none.
# blocks, bool [B or 1, H or 1, ceil(S / block_size), ceil(T / block_size)]: which of keys queries see.
# dropout above 0 drops by the draws of seed, int64 [1].
_OPTIONS = (
    "Tensor? sinks, Tensor? bias, Tensor? begin, Tensor? end, Tensor? blocks, Tensor? seed, int left, int right,"
    " int block_size, float softcap, float scale, float dropout"
)
_fwd = _op.register(
    "attention",
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = _op.register(
    "attention",
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, {_OPTIONS},"
    " bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None,
        begin: Tensor | None, end: Tensor | None, blocks: Tensor | None, seed: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, sinks, bias, begin, end, blocks, seed)
        ctx.options = options
        return _fwd(q, k, v, sinks, bias, begin, end, blocks, seed, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bias, *others = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(q)
        bias_grad = ctx.needs_input_grad[4]
        dq, dk, dv, dsinks, dbias = _bwd(
            dout, dlse, q, k, v, sinks, bias, *others, *ctx.options, bias_grad
        )
        dsinks = None if sinks is None else dsinks.to(sinks.dtype)
        dbias = dbias.to(bias.dtype) if bias_grad else None
        return dq, dk, dv, dsinks, dbias, *(None,) * 10


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    q_shape, k_shape, device = q.shape, k.shape, q.device
    return (
        len(q_shape) == len(k_shape) == v.dim() == 4
        and v.shape[:3] == k_shape[:3]
        and v.size(3) > 0
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
    if v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        return f"v {tuple(v.shape)} does not fit k {tuple(k.shape)}"
    if k.shape[0] != B or k.shape[3] != D:
        return f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}"
    if D == 0 or v.size(3) == 0:
        return f"q {tuple(q.shape)}, v {tuple(v.shape)} have head dim 0"
    if k.shape[1] == 0 or H % k.shape[1]:
        return f"{H} query heads are not a multiple of {k.shape[1]} kv heads"
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        return f"q {q.dtype}, k {k.dtype}, v {v.dtype} are not one floating-point dtype"
    return f"q on {q.device}, k on {k.device}, v on {v.device}"


def of_one_width(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """What attends alike with heads as wide as the wider of keys and values, and its scale."""
    D, Dv = q.size(-1), v.size(-1)
    scale = D**-0.5 if scale is None else scale
    if Dv > D:
        q, k = (pad(x, (0, Dv - D)) for x in (q, k))
    return q, k, pad(v, (0, D - Dv)) if Dv < D else v, scale


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the dtype that F.scaled_dot_product_attention would give them."""
    low = _op.autocast_dtype(_op.device_type(q))
    if low is None:
        return q, k, v
    return _op.autocast(q, low), _op.autocast(k, low), _op.autocast(v, low)


def check_dropout(op: str, dropout_p: float) -> None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be from 0 to 1, not {dropout_p}")


def _check_bias(bias: Tensor, q: Tensor, T: int) -> None:
    """Raises unless it broadcasts to q's scores."""
    B, H, S, _ = q.shape
    if (
        not bias.is_floating_point()
        or bias.device != q.device
        or bias.dim() > 4
        or not masks.broadcasts(bias.shape, (B, H, S, T))
    ):
        raise ValueError(
            f"attention: bias {tuple(bias.shape)} {bias.dtype} on {bias.device} does not fit q"
            f" {tuple(q.shape)} on {q.device}: floats that broadcast to [{B}, {H}, {S}, {T}]"
        )


def _check_blocks(mask: Tensor, size: int, q: Tensor, T: int) -> None:
    """Raises unless they are blocks of q's scores."""
    B, H, S, _ = q.shape
    if not isinstance(size, int) or size < 16 or size & (size - 1):
        raise ValueError(f"attention: blocks of {size} are not of a power of two from 16 on")
    shape = (B, H, -(-S // size), -(-T // size))
    if (
        mask.dtype != torch.bool
        or mask.device != q.device
        or mask.dim() != 4
        or mask.shape[2:] != shape[2:]
        or not masks.broadcasts(mask.shape[:2], shape[:2])
    ):
        raise ValueError(
            f"attention: blocks {tuple(mask.shape)} {mask.dtype} on {mask.device} do not fit q"
            f" {tuple(q.shape)} on {q.device}: bool {list(shape)}, the first two that or 1"
        )


def checked_window(
    op: str, q: Tensor, causal: bool, window: tuple[int, int] | None,
    softcap: float | None, sinks: Tensor | None,
) -> tuple[int, int]:  # fmt: skip
    """How far back and ahead a query of q, whose heads are dimension 1, sees; -1 without end."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0, not {softcap}")
    if sinks is not None and not (
        sinks.shape == (q.size(1),) and sinks.device == q.device and sinks.is_floating_point()
    ):
        raise ValueError(
            f"{op}: sinks {tuple(sinks.shape)} {sinks.dtype} on {sinks.device} are not a float a"
            f" head of q {tuple(q.shape)} on {q.device}"
        )
    left, right = (-1, -1) if window is None else window
    if left < -1 or right < -1:
        raise ValueError(f"{op}: window {window} is not two counts of keys, -1 for all")
    return left, 0 if causal else right


def _folded(
    ranges: tuple[Tensor, Tensor], q: Tensor, T: int, left: int, right: int
) -> tuple[Tensor, Tensor]:
    """Of each query the keys that its range, left and right leave it: begin, end, int32 [B, S]."""
    B, _, S, _ = q.shape
    for x in ranges:
        if (
            x.dtype not in (torch.int32, torch.int64)
            or x.device != q.device
            or x.dim() > 2
            or not masks.broadcasts(x.shape, (B, S))
        ):
            raise ValueError(
                f"attention: ranges {tuple(x.shape)} {x.dtype} on {x.device} do not fit q"
                f" {tuple(q.shape)} on {q.device}: int32 or int64 that broadcasts to [{B}, {S}]"
            )
    begin, end = (x.clamp(0, T).expand(B, S) for x in ranges)
    if left >= 0 or right >= 0:
        # what is more overflows, and hides no more
        left, right = min(left, S + T), min(right, S + T)
        here = torch.arange(T - S, T, device=q.device)
        if left >= 0:
            begin = torch.maximum(begin, (here - left).clamp(0, T))
        if right >= 0:
            end = torch.minimum(end, (here + right + 1).clamp(0, T))
    return begin.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, begin: Tensor | None,
    end: Tensor | None, left: int, right: int, softcap: float | None, scale: float,
    dropout_p: float = 0.0, blocks: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operators, and their gradients where one is wanted; all is checked."""
    if torch.compiler.is_compiling():  # dynamo takes no tensor twice
        k = k.view_as(k) if k is q else k
        v = v.view_as(v) if v is k or v is q else v
    inputs = (q, k, v, sinks, bias)
    seed = None
    if dropout_p > 0:  # as the reference draws it
        seed = torch.randint(MOST_SEED, (1,), device=q.device)
    mask, size = (None, 0) if blocks is None else blocks
    softcap = 0.0 if softcap is None else softcap
    options = (begin, end, mask, seed, left, right, size, softcap, scale, dropout_p)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Attention.apply(*inputs, *options)
    return _fwd(*inputs, *options)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
    blocks: tuple[Tensor, int] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """attention, and the natural logarithm of the softmax's denominator, the sink included.

    -> out [B, H, S, Dv] of q's dtype, lse [B, H, S] of float32 (float64 of float64 inputs), both
    differentiable: what merges partial attentions over disjoint keys.  A row that sees nothing has
    lse -inf.  Arguments and errors are attention's.
    """
    q, k, v = under_autocast(q, k, v)
    if not _fits(q, k, v) or not q.is_floating_point():
        raise ValueError(f"attention: {_misfit(q, k, v)}")
    left, right = checked_window("attention", q, causal, window, softcap, sinks)
    check_dropout("attention", dropout_p)
    if bias is not None:
        _check_bias(bias, q, k.size(2))
    if blocks is not None:
        _check_blocks(*blocks, q, k.size(2))
    begin = end = None
    if ranges is not None:
        begin, end = _folded(ranges, q, k.size(2), left, right)
        left = right = -1
    if max(q.size(3), v.size(3)) > MAX_D or not _op.serves("attention", q):
        return _op.twin("attention_with_lse")(
            q, k, v, window=(left, right), ranges=None if begin is None else (begin, end), blocks=blocks, bias=bias,
            softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
        )  # fmt: skip
    width = v.size(3)
    q, k, v, scale = of_one_width(q, k, v, scale)
    out, lse = attend(
        q, k, v, sinks, bias, begin, end, left, right, softcap, scale, dropout_p, blocks
    )
    return out if out.size(3) == width else out[..., :width], lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    ranges: tuple[Tensor, Tensor] | None = None,
    blocks: tuple[Tensor, int] | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, softmax(scale q kᵀ) v.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv] with H a multiple of G -> [B, H, S, Dv], of q's dtype
    (any float), lying as [B, S, H, D] so that merging heads is a view (not where Dv is less than D).  Any
    strides; head dims to 256 have kernels, which pad the narrower of keys and values.

    Query i stands at key p = i + T - S, as a KV cache needs.  `causal` lets it see keys up to p;
    `window` (left, right) those from p - left to p + right, -1 for no end; `ranges` (begin, end),
    integers that broadcast to [B, S], keys begin[b, i] to end[b, i] - 1: padding, documents, prefixes
    (tilewright.masks makes them).  It sees the keys that all of these let it see; those before the
    first and past the last that a block of queries sees are not read.  `blocks` (mask, size) leaves whole
    blocks: mask is bool [B or 1, H or 1, ceil(S / size), ceil(T / size)], true where queries
    i size to (i + 1) size - 1 see keys j size to (j + 1) size - 1, size a power of two from 16 on; other
    blocks are neither read nor computed (tilewright.masks.blocks makes them of a mask).  A row that sees
    nothing gives 0, and zero gradients.
    `bias`, floats that broadcast to [B, H, S, T], is added to the scaled, capped scores; where it is -inf
    (or below -2.36e38) it hides a key.  What it is broadcast over is in memory neither of it nor of its
    gradient (tilewright.masks makes masks and ALiBi such).  `dropout_p` drops probabilities and scales the
    others by 1 / (1 - dropout_p); one seed comes of torch's generator of the device, the backward draws
    again from it, and no mask is stored.
    `scale` defaults to D ** -0.5.  `softcap` c bounds the scaled scores s: c tanh(s / c) (Gemma 2).
    `sinks` [H], any float dtype, are scores of one more key a head, whose value is 0: they take
    their share of the softmax (GPT-OSS).  All are differentiable in q, k, v, bias and sinks.

    Under autocast q, k and v take its dtype, as F.scaled_dot_product_attention's do.  ValueError on
    shapes, dtypes, devices or options that do not fit.  Dao 2023, arXiv:2307.08691, algorithms 1, 2.
    """
    if (
        _direct is not None
        and window is None
        and ranges is None
        and blocks is None
        and bias is None
        and softcap is None
        and sinks is None
        and dropout_p == 0
        and q.is_cpu
        and not torch.compiler.is_compiling()
    ):
        out = _direct(q, k, v, causal, scale)
        if out is not None:
            return out
    return attention_with_lse(
        q, k, v, causal=causal, window=window, ranges=ranges, blocks=blocks, bias=bias,
        softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
    )[0]  # fmt: skip


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention of several over disjoint keys: ring attention's steps, a shared prefix and the rest.

    outs [..., D] each, of one float dtype, and lses [...] each, natural logarithms as attention_with_lse
    gives them -> out [..., D] of that dtype, lse [...] of float32 (float64 of float64 outs).  A part that
    sees nothing has lse -inf and does not count; where none sees anything out is 0 and lse -inf.  In torch's
    own operations, in float32, on any device; differentiable in all.  ValueError where parts do not fit.
    (attention_varlen's lse is [H, Tq]: it comes transposed.)
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_attention: {len(outs)} outs and {len(lses)} lses are no parts")
    first = outs[0]
    for out, lse in zip(outs, lses, strict=True):
        if (
            out.shape != first.shape
            or out.dim() == 0
            or lse.shape != first.shape[:-1]
            or out.dtype != first.dtype
            or not (out.is_floating_point() and lse.is_floating_point())
            or not out.device == lse.device == first.device
        ):
            raise ValueError(
                f"merge_attention: out {tuple(out.shape)} {out.dtype} on {out.device} with lse"
                f" {tuple(lse.shape)} {lse.dtype} on {lse.device} does not fit {tuple(first.shape)}"
                f" {first.dtype} on {first.device}"
            )
    wide = torch.promote_types(first.dtype, torch.float32)
    lse = torch.stack([x.to(wide) for x in lses])
    top = lse.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)  # -inf - -inf is nan
    shares = (lse - top).exp()
    total = shares.sum(0)
    blind = total == 0
    total = torch.where(blind, 1.0, total)  # log's slope at 0 is inf
    merged = torch.zeros_like(first, dtype=wide)
    for out, part, share in zip(outs, lse, shares / total, strict=True):
        # a part that sees nothing may hold anything
        merged = merged + share[..., None] * out.masked_fill((part == -torch.inf)[..., None], 0.0)
    return merged.to(first.dtype), torch.where(blind, -torch.inf, top + total.log())
