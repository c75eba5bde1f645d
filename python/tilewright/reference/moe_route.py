"""The specification of moe_route, in eager PyTorch."""

import torch
from torch import Tensor


def _order(ranked: Tensor) -> Tensor:
    """Indices of the last dimension, largest first, nan last, ties by the lowest."""
    ranked = ranked.masked_fill(ranked.isnan(), -torch.inf)
    return ranked.sort(dim=-1, descending=True, stable=True).indices


def _selected(ranked: Tensor, k: int, groups: int, group_k: int, group_top: int) -> Tensor:
    """ids [..., k] of the largest of ranked [..., E], among the group_k best groups'."""
    order = _order(ranked)
    if group_k < groups:
        size = ranked.shape[-1] // groups
        ranked = ranked.masked_fill(ranked.isnan(), -torch.inf)
        best = ranked.unflatten(-1, (groups, size)).topk(min(group_top, size)).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(-1, _order(best)[..., :group_k], True)
        inside = kept.gather(-1, order // size)
        order = order.gather(-1, _order(inside.float()))  # the other groups' last
    return order[..., :k]


def moe_route(
    logits: Tensor,
    k: int,
    *,
    scores: str = "softmax",
    bias: Tensor | None = None,
    groups: int = 1,
    group_k: int = 1,
    group_top: int = 2,
    renormalise: bool = True,
    scale: float = 1.0,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [..., E] -> weights [..., k] of at least float32, ids [..., k] int64."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    s = wide.softmax(-1) if scores == "softmax" else wide.sigmoid()
    if ids is None:
        ranked = wide.detach()
        if bias is not None or group_k < groups:
            ranked = s.detach() if bias is None else s.detach() + bias.detach().to(s.dtype)
        ids = _selected(ranked, k, groups, group_k, group_top)
    here = (ids >= 0) & (ids < s.shape[-1])
    weights = s.gather(-1, ids.where(here, 0)).masked_fill(~here, 0.0)
    if renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids
