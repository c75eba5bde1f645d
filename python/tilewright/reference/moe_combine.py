"""The specification of moe_combine, in eager PyTorch."""

import torch
from torch import Tensor

from tilewright.expert_rows import ExpertRows


def moe_combine(y: Tensor, weights: Tensor, placed: ExpertRows) -> Tensor:
    """y [P, D], weights [..., k] -> [..., D]."""
    wide = torch.promote_types(y.dtype, torch.float32)
    out = y.new_zeros((*weights.shape[:-1], y.shape[-1]), dtype=wide)
    for rows, weight in zip(placed.rows.unbind(-1), weights.to(wide).unbind(-1), strict=True):
        here = ((rows >= 0) & (rows < len(y)))[..., None]
        found = y.to(wide)[rows.where(here[..., 0], 0)].masked_fill(~here, 0.0)
        out = out + found * weight[..., None].masked_fill(~here, 0.0)
    return out.to(y.dtype)
