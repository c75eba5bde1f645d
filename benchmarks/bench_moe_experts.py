"""moe_experts: Qwen3-30B's layer (2048, 768, 128 experts, 8 of them).

T tokens, E experts, K of them each, D features, I intermediate ones.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops
from tilewright.expert_rows import ExpertRows

OP = "moe_experts"
LAYER = {"E": 128, "K": 8, "D": 2048, "I": 768}
SHAPES: dict[str, dict] = {
    "small 64": {"T": 64, "E": 8, "K": 2, "D": 512, "I": 256},  # what `make demo` times: the first
    "Qwen3-30B 1 token": {"T": 1, **LAYER},
    "Qwen3-30B 16": {"T": 16, **LAYER},
    "Qwen3-30B 256": {"T": 256, **LAYER},
}
DTYPES = (torch.bfloat16,)


def inputs(dtype: torch.dtype, device: str, *, T: int, E: int, K: int, D: int, I: int) -> dict:
    """Every expert as likely as another; weights that keep the scale."""
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=g).argsort(-1)[:, :K].to(device)
    weights = torch.rand(T, K, generator=g).softmax(-1).to(device)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=g, dtype=torch.float32)
        return (numbers / shape[-1] ** 0.5).to(device, dtype).requires_grad_()

    x = normal(T, D)
    return {
        "x": x, "weights": weights.requires_grad_(), "placed": ops.moe_dispatch(ids, E),
        "w13": normal(E, 2 * I, D), "w2": normal(E, D, I), "ids": ids,
    }  # fmt: skip


def _tilewright(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor
) -> tuple[Tensor]:
    """Dispatch too, as the others find their tokens."""
    return (ops.moe_experts(x, weights, ops.moe_dispatch(ids, len(w13)), w13, w2),)


def _eager(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor
) -> tuple[Tensor]:
    """As transformers' eager experts: those that have tokens, one by one."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, j = (ids == e).nonzero().unbind(-1)
        gate, up = F.linear(x[token], w13[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[e]) * weights[token, j, None]
        out.index_add_(0, token, y.to(out.dtype))
    return (out,)


def _grouped(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor
) -> tuple[Tensor]:
    """As transformers' grouped experts: sorted, torch's grouped products, brought back."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=len(w13)).cumsum(0).to(torch.int32)
    h = torch._grouped_mm(x[order // ids.shape[-1]], w13.transpose(-1, -2), offs=ends)
    gate, up = h.chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(gate) * up, w2.transpose(-1, -2), offs=ends)
    y = (y * weights.flatten()[order, None])[torch.argsort(order)]
    return (y.view(*ids.shape, -1).sum(-2).to(x.dtype),)


PROVIDERS: dict[str, Callable] = {"tilewright": _tilewright, "eager": _eager, "grouped": _grouped}


def _experts(T: int, E: int, K: int) -> int:
    """Experts with tokens, about."""
    return min(E, round(E * (1 - (1 - K / E) ** T)))


def cost(dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int) -> tuple[int, int]:
    """Forward: tokens read and written, their weights and experts, the experts' matrices once; three products."""
    matrices = _experts(T, E, K) * 3 * D * I
    return (2 * T * D + matrices) * dtype.itemsize + 12 * T * K, 6 * T * K * D * I


def backward_cost(dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int) -> tuple[int, int]:
    """Tokens, their gradients and h read, the tokens' gradients written; the matrices read, theirs written whole."""
    matrices = (_experts(T, E, K) + E) * 3 * D * I
    kept = 2 * T * K * I
    return (3 * T * D + kept + matrices) * dtype.itemsize + 16 * T * K, 12 * T * K * D * I
