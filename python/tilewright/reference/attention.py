"""The specification of attention, in eager PyTorch.

B batch, H query heads, G kv heads, S queries, T keys, D head dim.
"""

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale q kᵀ) v:  q [B, H, S, D], k, v [B, G, T, D] -> [B, H, S, D].

    The softmax is at least float32, the products of q's dtype.  Under autocast the inputs take its dtype, as torch's do.
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        q, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, k, v))
        with torch.autocast(device, enabled=False):
            return attention(q, k, v, causal=causal, scale=scale)
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if scale is None else scale
    rows = q.reshape(B, G, H // G, S, D)
    scores = (rows @ k.unsqueeze(2).transpose(-1, -2)).to(wide) * scale  # [B, G, H / G, S, T]
    if causal:
        hidden = torch.ones(S, T, dtype=torch.bool, device=q.device).triu(T - S + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        blind = hidden.all(-1, keepdim=True)  # a row that sees nothing gives 0, not 0 / 0
        probs = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    else:
        probs = scores.softmax(-1)
    return (probs.to(q.dtype) @ v.unsqueeze(2)).reshape(B, H, S, D)
