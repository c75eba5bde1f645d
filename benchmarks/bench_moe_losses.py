"""moe_losses: the routers of Qwen3-30B and Mixtral, and of DeepSeek-V3, whose balance is by sequence of sigmoids.
B sequences of S tokens, E experts, K of them chosen."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright import ops, reference

OP = "moe_losses"
SHAPES: dict[str, dict] = {
    "64x128 k8": {"B": 1, "S": 64, "E": 128, "K": 8},
    "4096x128 k8": {"B": 1, "S": 4096, "E": 128, "K": 8},
    "4096x8 k2": {"B": 1, "S": 4096, "E": 8, "K": 2},
    "4x1024x256 k8 by sequence": {"B": 4, "S": 1024, "E": 256, "K": 8, "sigmoid": True},
}
DTYPES = (torch.float32, torch.bfloat16)


def inputs(
    dtype: torch.dtype, device: str, *, B: int, S: int, E: int, K: int, sigmoid: bool = False
) -> dict:
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(B, S, E, generator=g).argsort(-1)[..., :K].to(device)
    logits = torch.randn(B, S, E, generator=g).to(device, dtype).requires_grad_()
    return {"logits": logits, "ids": ids, "sigmoid": sigmoid}


def _losses(side: Callable, logits: Tensor, ids: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    scores = "sigmoid" if sigmoid else "softmax"
    balance, z, _ = side(logits, ids, scores=scores, per_sequence=sigmoid)
    return balance, z


def _tilewright(logits: Tensor, ids: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    return _losses(ops.moe_losses, logits, ids, sigmoid)


def _eager(logits: Tensor, ids: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    return _losses(reference.moe_losses, logits, ids, sigmoid)


def _transformers(logits: Tensor, ids: Tensor, sigmoid: bool) -> tuple[Tensor, Tensor]:
    """As its load_balancing_loss_func, but that ids are given; by sequence as DeepSeek's own code has it."""
    E, wide = logits.shape[-1], logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sigmoid:
        s = wide.sigmoid()
        p, to = s / s.sum(-1, keepdim=True), ids.flatten(1)
        chosen = s.new_zeros(len(s), E).scatter_add(1, to, torch.ones_like(to, dtype=s.dtype))
        balance = E * (chosen / s.shape[1] * p.mean(1)).sum(1).mean()
    else:
        p = wide.softmax(-1).flatten(0, -2)
        chosen = torch.bincount(ids.flatten(), minlength=E).to(p.dtype)
        balance = E * (chosen / len(p) * (p.sum(0) / len(p))).sum()
    return balance, wide.logsumexp(-1).square().mean()


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "compile": torch.compile(_eager, dynamic=False),
    "transformers": _transformers,
}


def cost(
    dtype: torch.dtype, *, B: int, S: int, E: int, K: int, sigmoid: bool = False
) -> tuple[int, int]:
    """Forward: logits and ids read, two losses and 8 bytes an expert written; an exponential and two sums an expert, of
    a sigmoid as much again."""
    T = B * S
    return T * E * dtype.itemsize + 8 * T * K + 8 + 8 * E, (6 if sigmoid else 3) * T * E


def backward_cost(
    dtype: torch.dtype, *, B: int, S: int, E: int, K: int, sigmoid: bool = False
) -> tuple[int, int]:
    """Logits read and their gradients written, a slope an expert of each sequence, two gradients and two totals; the
    scores again, and three more an expert."""
    slopes = 4 * E * (B if sigmoid else 1)
    return 2 * B * S * E * dtype.itemsize + slopes + 16, (9 if sigmoid else 6) * B * S * E
