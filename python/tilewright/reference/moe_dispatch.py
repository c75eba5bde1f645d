"""The specification of moe_dispatch, in eager PyTorch."""

import torch
from torch import Tensor

from tilewright.expert_rows import ExpertRows


def moe_dispatch(ids: Tensor, E: int) -> ExpertRows:
    """ids [..., k] of E experts -> order [P], rows [..., k], offsets [E + 1]."""
    flat = ids.reshape(-1)
    here = (flat >= 0) & (flat < E)
    expert, order = flat.where(here, E).sort(stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=ids.device)
    edges = torch.arange(E + 1, device=ids.device)
    return ExpertRows(
        order, rows.where(here, -1).view(ids.shape), torch.searchsorted(expert, edges)
    )
