"""The specification of attention, in eager PyTorch.

B batch, H query heads, G kv heads, S queries, T keys, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_from(
    B: int, S: int, T: int, causal: bool, window: tuple[int, int] | None,
    ranges: tuple[Tensor, Tensor] | None, device: torch.device,
) -> Tensor | None:  # fmt: skip
    """[S, T], or with ranges [B, 1, 1, S, T], true where query i may not see key j; None where each
    sees all."""
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    if left < 0 and right < 0 and ranges is None:
        return None
    keys = torch.arange(T, device=device)
    ahead = keys - torch.arange(S, device=device)[:, None] - (T - S)
    hidden = torch.zeros(S, T, dtype=torch.bool, device=device)
    if right >= 0:
        hidden |= ahead > right
    if left >= 0:
        hidden |= -ahead > left
    if ranges is not None:
        begin, end = (x.expand(B, S)[:, None, None, :, None] for x in ranges)
        hidden = hidden | (keys < begin) | (keys >= end)
    return hidden


HIDDEN = -2.3587e38  # a bias below it hides its key
WORD = 0xFFFFFFFF


def _mixed(x: Tensor, y: Tensor) -> Tensor:
    """32 bits of x, well mixed, and y: two rounds of Wellons' lowbias32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    return (x ^ y ^ (x >> 15)) * 0x846CA68B & WORD


def keeps(seed: Tensor, rows: int, T: int, dropout_p: float) -> Tensor:
    """[rows, T], false where dropout drops: of seed [1], int64, a hash of row and key, as 32 bits."""
    low, high = seed & WORD, seed >> 32 & WORD
    row = torch.arange(rows, device=seed.device)
    a = _mixed(row & WORD, row >> 32)
    a = _mixed((a ^ a >> 16) + low & WORD, high)
    a = a ^ a >> 16
    b = _mixed(a, high)
    key = torch.arange(T, device=seed.device) * 0x9E3779B9
    draw = _mixed(a[:, None] + key & WORD, b[:, None])
    return draw >= int(torch.tensor(dropout_p, dtype=torch.float32).double().item() * 2**32)


def drawn_seed(device: torch.device) -> Tensor:
    """What the draws of one call come from: int64 [1], of torch's generator of the device."""
    return torch.randint(2**63 - 1, (1,), device=device)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int] | None,
    ranges: tuple[Tensor, Tensor] | None, blocks: tuple[Tensor, int] | None, bias: Tensor | None,
    softcap: float | None, sinks: Tensor | None, scale: float | None, dropout_p: float, kept: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """attention_with_lse; kept [B, H, S, T] is what dropout leaves, where the caller has drawn it."""
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
        with torch.autocast(device, enabled=False):
            return attend(
                q, k, v, causal, window, ranges, blocks, bias, softcap, sinks, scale, dropout_p, kept
            )  # fmt: skip
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale
    rows = q.reshape(B, G, H // G, S, D)
    scores = (rows @ k.unsqueeze(2).transpose(-1, -2)).to(wide) * scale  # [B, G, H / G, S, T]
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    hidden = hidden_from(B, S, T, causal, window, ranges, q.device)
    if blocks is not None:
        mask, size = blocks
        unseen = ~mask.repeat_interleave(size, 2)[:, :, :S].repeat_interleave(size, 3)[..., :T]
        unseen = unseen.unflatten(1, (G, H // G)) if mask.size(1) > 1 else unseen.unsqueeze(1)
        hidden = unseen if hidden is None else hidden | unseen
    if bias is not None:
        added = bias.to(wide).expand(B, H, S, T).reshape(B, G, H // G, S, T)
        unseen = added < HIDDEN
        scores = scores + added.masked_fill(unseen, 0.0)
        hidden = unseen if hidden is None else hidden | unseen
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:  # a key of its own score and no value
        sink = sinks.to(wide).reshape(G, H // G, 1, 1).expand(B, G, H // G, S, 1)
        scores = torch.cat((scores, sink), -1)
        probs, lse = scores.softmax(-1)[..., :T], scores.logsumexp(-1)
    elif hidden is not None:
        blind = hidden.all(-1, keepdim=True)  # a row that sees nothing gives 0, not 0 / 0
        scores = scores.masked_fill(blind, 0.0)
        probs = scores.softmax(-1).masked_fill(hidden, 0.0)
        lse = scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    else:
        probs, lse = scores.softmax(-1), scores.logsumexp(-1)
    if dropout_p > 0:
        if kept is None:
            kept = keeps(drawn_seed(q.device), B * H * S, T, dropout_p)
        share = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        probs = torch.where(kept.reshape(probs.shape), probs * share, 0.0)
    out = (probs.to(q.dtype) @ v.unsqueeze(2)).reshape(B, H, S, v.size(3))
    return out, lse.reshape(B, H, S)


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
    """softmax(scale q kᵀ + bias) v and the log of its denominator:

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv] -> [B, H, S, Dv], [B, H, S].  The softmax is at least float32, the
    products of q's dtype.  Under autocast the inputs take its dtype, as torch's do.
    """
    return attend(
        q, k, v, causal, window, ranges, blocks, bias, softcap, sinks, scale, dropout_p, None
    )  # fmt: skip


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
    """attention_with_lse's first result."""
    return attention_with_lse(
        q, k, v, causal=causal, window=window, ranges=ranges, blocks=blocks, bias=bias,
        softcap=softcap, sinks=sinks, scale=scale, dropout_p=dropout_p,
    )[0]  # fmt: skip


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attentions [..., D], [...] over disjoint keys, each weighed by its share of the softmax."""
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    lse = torch.stack([x.to(wide) for x in lses])
    top = lse.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)  # no part sees a key
    shares = (lse - top).exp()
    total = shares.sum(0)
    blind = total == 0
    total = torch.where(blind, 1.0, total)
    out = sum(
        (share / total)[..., None] * x.to(wide) for share, x in zip(shares, outs, strict=True)
    )
    return out.to(outs[0].dtype), torch.where(blind, -torch.inf, top + total.log())
