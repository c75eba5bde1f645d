"""attention_varlen: validate, and attention's operators on ranges of keys.

Tq, Tk packed queries and keys, N sequences, H query heads, G kv heads, D head dim.
"""

import torch
from torch import Tensor

from tilewright import _op
from tilewright.ops.attention import (
    MAX_D,
    attend,
    check_dropout,
    checked_window,
    of_one_width,
    under_autocast,
)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.dim() == k.dim() == v.dim() == 3
        and v.shape[:2] == k.shape[:2]
        and v.size(2) > 0
        and k.size(2) == q.size(2) > 0
        and k.size(1) > 0
        and q.size(1) % k.size(1) == 0
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.device == k.device == v.device
    )


def _check_starts(starts: Tensor, name: str, x: Tensor, sequences: int) -> None:
    """Raises unless starts say where `sequences` sequences of x begin and end."""
    if (
        starts.dtype not in (torch.int32, torch.int64)
        or starts.device != x.device
        or starts.shape != (sequences + 1,)
        or sequences < 1
    ):
        raise ValueError(
            f"attention_varlen: {name} {tuple(starts.shape)} {starts.dtype} on {starts.device} does"
            f" not fit {tuple(x.shape)} on {x.device}: int32 or int64 [N + 1], N of both the same"
        )
    if torch.compiler.is_compiling() or not starts.is_cpu:
        return
    values = starts.tolist()
    if values[0] != 0 or values != sorted(values) or values[-1] > x.size(0):
        raise ValueError(
            f"attention_varlen: {name} {values} does not rise from 0 to at most {x.size(0)}"
        )


def _ranges(
    starts_q: Tensor, starts_k: Tensor, Tq: int, Tk: int, left: int, right: int
) -> tuple[Tensor, Tensor]:
    """Of each packed query the keys it sees: begin, end, int32 [1, Tq].  Sequence n's last query
    stands at its last key."""
    # what is more overflows, and hides no more
    left, right = min(left, Tq + Tk), min(right, Tq + Tk)
    starts_q, starts_k = starts_q.long(), starts_k.long()
    row = torch.arange(Tq, device=starts_q.device)
    n = torch.searchsorted(starts_q[1:].contiguous(), row, right=True)  # sequences that end before
    inside = n < starts_q.numel() - 1
    n = n.clamp(max=starts_q.numel() - 2)
    begin, end = starts_k[n], starts_k[n + 1]
    here = row + end - starts_q[n + 1]
    begin = torch.maximum(begin, here - left) if left >= 0 else begin
    seen = torch.minimum(end, here + right + 1) if right >= 0 else end
    seen = torch.where(inside, seen, begin)
    begin, end = (x.clamp(0, Tk).to(torch.int32).unsqueeze(0) for x in (begin, seen))
    return begin, end


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """attention_varlen, and the natural logarithm of the softmax's denominator, the sink included.

    -> out [Tq, H, Dv] of q's dtype, lse [H, Tq] of float32 (float64 of float64 inputs), both
    differentiable.  Arguments and errors are attention_varlen's.
    """
    q, k, v = under_autocast(q, k, v)
    if not _fits(q, k, v):
        raise ValueError(
            f"attention_varlen: q {tuple(q.shape)} {q.dtype} on {q.device}, k {tuple(k.shape)} {k.dtype}"
            f" on {k.device}, v {tuple(v.shape)} {v.dtype} on {v.device} are not [Tq, H, D], [Tk, G, D]"
            " and [Tk, G, Dv] of one floating-point dtype, H a multiple of G"
        )
    sequences = cu_seqlens_q.numel() - 1
    _check_starts(cu_seqlens_q, "cu_seqlens_q", q, sequences)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    _check_starts(cu_seqlens_k, "cu_seqlens_k", k, sequences)
    left, right = checked_window("attention_varlen", q, causal, window, softcap, sinks)
    check_dropout("attention_varlen", dropout_p)
    if max(q.size(2), v.size(2)) > MAX_D or not _op.serves("attention", q):
        return _op.twin("attention_varlen_with_lse")(
            q, k, v, cu_seqlens_q, cu_seqlens_k,
            window=(left, right), softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
        )  # fmt: skip
    begin, end = _ranges(cu_seqlens_q, cu_seqlens_k, q.size(0), k.size(0), left, right)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    width = v.size(3)
    q, k, v, scale = of_one_width(q, k, v, scale)
    out, lse = attend(q, k, v, sinks, None, begin, end, -1, -1, softcap, scale, dropout_p)
    return out[..., :width].squeeze(0).transpose(0, 1), lse.squeeze(0)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of sequences packed one after another, each to itself.

    q [Tq, H, D], k [Tk, G, D], v [Tk, G, Dv] with H a multiple of G -> [Tq, H, Dv].  Sequence n is queries
    cu_seqlens_q[n] to cu_seqlens_q[n + 1] - 1 and keys cu_seqlens_k[n] to cu_seqlens_k[n + 1] - 1
    (without cu_seqlens_k, the same): int32 or int64 [N + 1], rising from 0; a sequence may be empty.
    They stay on the device, where a kernel serves (head dims to 256, no float64), and no longest length is
    asked for.  Queries past the last sequence give 0.

    `causal`, `window`, `softcap`, `sinks`, `scale`, `dropout_p` and gradients are attention's, within a sequence:
    its last query stands at its last key.  ValueError on shapes, dtypes, devices or options that do not
    fit, and on the CPU on cu_seqlens that fall or pass the end (on a GPU such rows see the keys there
    are).
    """
    return attention_varlen_with_lse(
        q, k, v, cu_seqlens_q, cu_seqlens_k,
        causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
    )[0]  # fmt: skip
