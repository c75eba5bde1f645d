"""moe_route: the routers of Mixtral, Qwen3-30B and, grouped, DeepSeek-V3.  T tokens, E experts, K of them chosen."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright import ops

OP = "moe_route"
SHAPES: dict[str, dict] = {
    "decode 1x128 k8": {"T": 1, "E": 128, "K": 8},
    "64x128 k8": {"T": 64, "E": 128, "K": 8},
    "4096x128 k8": {"T": 4096, "E": 128, "K": 8},
    "4096x8 k2": {"T": 4096, "E": 8, "K": 2},
    "64x256 k8 grouped": {"T": 64, "E": 256, "K": 8, "grouped": True},
    "4096x256 k8 grouped": {"T": 4096, "E": 256, "K": 8, "grouped": True},
}
DTYPES = (torch.float32, torch.bfloat16)
GROUPS, GROUP_K, SCALE = 8, 4, 2.5  # DeepSeek-V3's


def inputs(
    dtype: torch.dtype, device: str, *, T: int, E: int, K: int, grouped: bool = False
) -> dict:
    """logits [T, E], each row's in an order of its own; bias [E] where grouped.  No two of a row are alike, so that
    every rival chooses the same: steps of 1/32, exact in each dtype for up to 512 experts."""
    g = torch.Generator().manual_seed(0)
    order = torch.rand(T, E, generator=g).argsort(-1)
    logits = ((order - E // 2) / 32).to(device, dtype).requires_grad_()
    bias = (0.05 * torch.randn(E, generator=g)).to(device) if grouped else None
    return {"logits": logits, "bias": bias, "k": K}


def _tilewright(logits: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor]:
    if bias is None:
        return (ops.moe_route(logits, k)[0],)
    return (
        ops.moe_route(
            logits, k, scores="sigmoid", bias=bias, groups=GROUPS, group_k=GROUP_K, scale=SCALE
        )[0],
    )


def _eager(logits: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor]:
    """As transformers' models have it: torch.topk, which of equals may take any."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is None:
        weights, _ = wide.softmax(-1).topk(k)
        return (weights / weights.sum(-1, keepdim=True),)
    s = wide.sigmoid()
    ranked = s.detach() + bias
    best = ranked.unflatten(-1, (GROUPS, -1)).topk(2).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(GROUP_K).indices, True)
    outside = ~kept.repeat_interleave(ranked.shape[-1] // GROUPS, -1)
    weights = s.gather(-1, ranked.masked_fill(outside, -torch.inf).topk(k).indices)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-20) * SCALE,)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "compile": torch.compile(_eager, dynamic=False),
}


def cost(dtype: torch.dtype, *, T: int, E: int, K: int, grouped: bool = False) -> tuple[int, int]:
    """Forward: logits and the bias read, a weight and an id of 4 and 8 bytes written; an exponential, a sum and a
    quotient an expert."""
    return T * E * dtype.itemsize + 12 * T * K + (4 * E if grouped else 0), 3 * T * E


def backward_cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, grouped: bool = False
) -> tuple[int, int]:
    """Logits, ids and the weights' gradients read, the logits' written; the scores again, and three more an expert."""
    return 2 * T * E * dtype.itemsize + 12 * T * K, 6 * T * E
