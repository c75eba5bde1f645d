"""moe_combine: Qwen3-30B's and Mixtral's.  T tokens, K experts each, D columns."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright import ops
from tilewright.expert_rows import ExpertRows

OP = "moe_combine"
SHAPES: dict[str, dict] = {
    "decode 1x2048 k8": {"T": 1, "K": 8, "D": 2048},
    "256x2048 k8": {"T": 256, "K": 8, "D": 2048},
    "4096x2048 k8": {"T": 4096, "K": 8, "D": 2048},
    "4096x4096 k2": {"T": 4096, "K": 2, "D": 4096},
}
DTYPES = (torch.float32, torch.bfloat16)
EXPERTS = 128


def inputs(dtype: torch.dtype, device: str, *, T: int, K: int, D: int) -> dict:
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, EXPERTS, generator=g).argsort(-1)[:, :K].to(device)
    y = torch.randn(T * K, D, generator=g).to(device, dtype).requires_grad_()
    weights = torch.rand(T, K, generator=g).to(device).requires_grad_()
    return {"y": y, "weights": weights, "placed": ops.moe_dispatch(ids, EXPERTS)}


def _tilewright(y: Tensor, weights: Tensor, placed: ExpertRows) -> tuple[Tensor]:
    return (ops.moe_combine(y, weights, placed),)


def _eager(y: Tensor, weights: Tensor, placed: ExpertRows) -> tuple[Tensor]:
    """As transformers' grouped experts: weighted where they lie, brought back, summed."""
    weighted = y * weights.flatten()[placed.order, None]
    return (weighted[placed.rows].sum(-2).to(y.dtype),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "compile": torch.compile(_eager, dynamic=False),
}


def cost(dtype: torch.dtype, *, T: int, K: int, D: int) -> tuple[int, int]:
    """Forward: each row, its weight and its place read, each token written; a product and a sum each."""
    return T * D * (K + 1) * dtype.itemsize + 12 * T * K, 2 * T * K * D


def backward_cost(dtype: torch.dtype, *, T: int, K: int, D: int) -> tuple[int, int]:
    """The gradient and each row read, each row's written; a weight and its gradient, and its place."""
    return T * D * (2 * K + 1) * dtype.itemsize + 16 * T * K, 3 * T * K * D
