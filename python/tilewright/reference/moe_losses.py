"""The specification of moe_losses, in eager PyTorch."""

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def moe_losses(
    logits: Tensor,
    ids: Tensor,
    *,
    scores: str = "softmax",
    mask: Tensor | None = None,
    per_sequence: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., E], ids [..., k], mask [...] -> balance and z of at least float32, counts [E] int64."""
    *leading, E = logits.shape
    G, S = (prod(leading[:-1]), leading[-1]) if per_sequence else (1, prod(leading))
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(G, S, E)
    counted = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask.reshape(G, S)
    x = x.masked_fill(~counted[..., None], 0.0)  # what is padded may be nan
    # s / sum s, and not 0 / 0 where every s is too small for a float
    p = (x if scores == "softmax" else logsigmoid(x)).softmax(-1)
    given = ids.reshape(G, S, ids.shape[-1])
    here = (given >= 0) & (given < E) & counted[..., None]
    to = given.where(here, E).flatten(1)
    chosen = to.new_zeros(G, E + 1).scatter_add(1, to, torch.ones_like(to))[:, :E]
    n = counted.sum(-1)
    some = n.clamp(min=1).to(x.dtype)[:, None]
    f, P = chosen / some, p.masked_fill(~counted[..., None], 0.0).sum(1) / some
    balance = E * (f * P).sum() / (n > 0).sum().clamp(min=1)
    squares = x.logsumexp(-1).square().masked_fill(~counted, 0.0)
    return balance, squares.sum() / n.sum().clamp(min=1), chosen.sum(0)
