"""The specification of moe_experts, in eager PyTorch."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

from tilewright.expert_rows import ExpertRows
from tilewright.reference.geglu import geglu
from tilewright.reference.moe_combine import moe_combine
from tilewright.reference.swiglu import swiglu


def _glu(h: Tensor, activation: str, limit: float | None) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "silu":
        return swiglu(gate, up)
    return geglu(gate, up, approximate={"gelu": "none", "gelu_tanh": "tanh"}[activation])


def moe_experts(
    x: Tensor,
    weights: Tensor,
    placed: ExpertRows,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
) -> Tensor:
    """x [..., D], weights [..., k], w13 [E, 2 I, D], w2 [E, D, I] -> [..., D]."""
    rows = x.reshape(-1, x.shape[-1])[placed.order // max(1, weights.shape[-1])]
    edges = placed.offsets.tolist()
    found = []
    for e, (begin, end) in enumerate(itertools.pairwise(edges)):
        h = linear(rows[begin:end], w13[e], None if bias13 is None else bias13[e])
        a = _glu(h, activation, limit)
        found.append(linear(a, w2[e], None if bias2 is None else bias2[e]))
    found.append(torch.zeros_like(rows[edges[-1] :]))  # of no expert
    return moe_combine(torch.cat(found), weights, placed)
