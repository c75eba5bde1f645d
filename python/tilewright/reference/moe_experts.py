"""The specification of moe_experts, in eager PyTorch."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import linear

from tilewright.expert_lora import ExpertLora
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


def _product(
    x: Tensor, e: int, w: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:  # fmt: skip
    """x [M, K] times expert e's w [E, N, K] and its adapter's a [E, R, K] and b [E, N, R] -> [M, N]."""
    y = linear(x, w[e], None if bias is None else bias[e])
    return y if a is None or b is None else y + scale * linear(linear(x, a[e]), b[e])


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
    lora: ExpertLora | None = None,
) -> Tensor:
    """x [..., D], weights [..., k], w13 [E, 2 I, D], w2 [E, D, I] -> [..., D]."""
    rows = x.reshape(-1, x.shape[-1])[placed.order // max(1, weights.shape[-1])]
    edges = placed.offsets.tolist()
    found = []
    a13, b13, a2, b2, scale = lora or ExpertLora()
    for e, (begin, end) in enumerate(itertools.pairwise(edges)):
        h = _product(rows[begin:end], e, w13, bias13, a13, b13, scale)
        found.append(_product(_glu(h, activation, limit), e, w2, bias2, a2, b2, scale))
    found.append(torch.zeros_like(rows[edges[-1] :]))  # of no expert
    return moe_combine(torch.cat(found), weights, placed)
