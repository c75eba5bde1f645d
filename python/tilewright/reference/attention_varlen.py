"""The specification of attention_varlen, in eager PyTorch: attention of one sequence after another.

Tq, Tk packed queries and keys, N sequences, H query heads, G kv heads, D head dim.
"""

import torch
from torch import Tensor

from tilewright.reference.attention import attend, drawn_seed, keeps


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
    """q [Tq, H, D], k, v [Tk, G, D], cu_seqlens [N + 1] -> [Tq, H, D], [H, Tq].

    Queries past the last sequence see no key.
    """
    starts_q = [*cu_seqlens_q.tolist(), q.size(0)]
    starts_k = [*(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()]
    starts_k.append(starts_k[-1])
    kept = None
    if dropout_p > 0:
        seed, (Tq, H, _), Tk = drawn_seed(q.device), q.shape, k.size(0)
        kept = keeps(seed, H * Tq, Tk, dropout_p).view(1, H, Tq, Tk)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    outs, lses = [], []
    for n in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        left = None if kept is None else kept[:, :, rows, keys]
        out, lse = attend(
            q[:, :, rows], k[:, :, keys], v[:, :, keys],
            causal, window, None, None, None, softcap, sinks, scale, dropout_p, left,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


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
    """attention_varlen_with_lse's first result."""
    return attention_varlen_with_lse(
        q, k, v, cu_seqlens_q, cu_seqlens_k,
        causal=causal, window=window, softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
    )[0]  # fmt: skip
