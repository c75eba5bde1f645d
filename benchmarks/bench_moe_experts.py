"""moe_experts: Qwen3-30B's layer (2048, 768, 128 experts, 8 of them).

T tokens, E experts, K of them each, D features, I intermediate ones.  The experts train unless `frozen` is 1; with a
rank R, adapters of theirs do instead.  The gradients of all 128, in float64 to be checked, would take 25 GB: those that
train are 16, with as many tokens each.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops
from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows

OP = "moe_experts"
LAYER = {"E": 128, "K": 8, "D": 2048, "I": 768}
SHAPES: dict[str, dict] = {
    "small 64": {"T": 64, "E": 8, "K": 2, "D": 512, "I": 256},  # what `make demo` times: the first
    "Qwen3-30B 1 token": {"T": 1, **LAYER, "frozen": 1},
    "Qwen3-30B 16": {"T": 16, **LAYER, "frozen": 1},
    "Qwen3-30B 256": {"T": 256, **LAYER, "frozen": 1},
    "16 of its experts, trained, 32": {"T": 32, **LAYER, "E": 16},
    "Qwen3-30B 256, rank 16": {"T": 256, **LAYER, "R": 16},
}
DTYPES = (torch.bfloat16,)
MOST_COPIED = 128  # slots: a GB of matrices


def inputs(
    dtype: torch.dtype, device: str, *, T: int, E: int, K: int, D: int, I: int, R: int = 0, frozen: int = 0
) -> dict:  # fmt: skip
    """Every expert as likely as another; weights that keep the scale."""
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=g).argsort(-1)[:, :K].to(device)
    weights = torch.rand(T, K, generator=g).softmax(-1).to(device)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=g, dtype=torch.float32)
        return (numbers / shape[-1] ** 0.5).to(device, dtype).requires_grad_()

    x, w13, w2 = normal(T, D), normal(E, 2 * I, D), normal(E, D, I)
    for w in (w13, w2):
        w.requires_grad_(not (frozen or R))
    given = {
        "x": x, "weights": weights.requires_grad_(), "placed": ops.moe_dispatch(ids, E),
        "w13": w13, "w2": w2, "ids": ids,
    }  # fmt: skip
    if R:
        shapes = {"a13": (E, R, D), "b13": (E, 2 * I, R), "a2": (E, R, I), "b2": (E, D, R)}
        given |= {name: normal(*shape) for name, shape in shapes.items()}
    return given


def _tilewright(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """Dispatch too, as the others find their tokens."""
    lora = ExpertLora(**adapters) if adapters else None
    return (ops.moe_experts(x, weights, ops.moe_dispatch(ids, len(w13)), w13, w2, lora=lora),)


def _eager(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """As transformers' eager experts: those that have tokens, one by one.  The matrices are unbound first, of which
    the gradient is one stack; indexed, as they are there, each makes one of all experts: minutes."""
    each = {n: w.unbind() for n, w in {"w13": w13, "w2": w2, **adapters}.items()}

    def linear(x: Tensor, n: str, e: int) -> Tensor:
        y = F.linear(x, each[f"w{n}"][e])
        return y + F.linear(F.linear(x, each[f"a{n}"][e]), each[f"b{n}"][e]) if adapters else y

    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, j = (ids == e).nonzero().unbind(-1)
        gate, up = linear(x[token], "13", e).chunk(2, dim=-1)
        y = linear(F.silu(gate) * up, "2", e) * weights[token, j, None]
        out.index_add_(0, token, y.to(out.dtype))
    return (out,)


def _batched(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """As transformers' batched experts: each slot's matrices, copied, in one product.  Of few tokens."""
    if adapters or ids.numel() > MOST_COPIED:
        raise ValueError(f"{ids.numel()} slots' matrices would be copied")
    flat, k = ids.flatten(), ids.shape[-1]
    rows = x.repeat_interleave(k, 0)[..., None]
    gate, up = torch.bmm(w13[flat], rows).squeeze(-1).chunk(2, dim=-1)
    y = torch.bmm(w2[flat], (F.silu(gate) * up)[..., None]).squeeze(-1) * weights.flatten()[:, None]
    return (y.view(*ids.shape, -1).sum(-2).to(x.dtype),)


def _grouped(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: Tensor, w2: Tensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """As transformers' grouped experts: sorted, torch's grouped products, brought back."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=len(w13)).cumsum(0).to(torch.int32)

    def product(x: Tensor, w: Tensor, n: str = "") -> Tensor:
        y = torch._grouped_mm(x, w.transpose(-1, -2), offs=ends)
        return (
            y + product(product(x, adapters[f"a{n}"]), adapters[f"b{n}"]) if adapters and n else y
        )

    gate, up = product(x[order // ids.shape[-1]], w13, "13").chunk(2, dim=-1)
    y = product(F.silu(gate) * up, w2, "2")
    y = (y * weights.flatten()[order, None])[torch.argsort(order)]
    return (y.view(*ids.shape, -1).sum(-2).to(x.dtype),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "batched": _batched,
    "grouped": _grouped,
}


def _experts(T: int, E: int, K: int) -> int:
    """Experts with tokens, about."""
    return min(E, round(E * (1 - (1 - K / E) ** T)))


def cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int, R: int = 0, frozen: int = 0
) -> tuple[int, int]:
    """Forward: tokens read and written, their weights and experts, the experts' matrices once; their products."""
    each = 3 * D * I + R * (2 * D + 3 * I)
    matrices = _experts(T, E, K) * each
    return (2 * T * D + matrices) * dtype.itemsize + 12 * T * K, 2 * T * K * each


def backward_cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int, R: int = 0, frozen: int = 0
) -> tuple[int, int]:
    """Tokens, their gradients and h read, the tokens' gradients written; the matrices read, the gradients of those that
    train written whole."""
    base, adapters = 3 * D * I, R * (2 * D + 3 * I)
    learned = adapters or base * (not frozen)
    matrices = _experts(T, E, K) * (base + adapters) + E * learned
    kept = 2 * T * K * I
    flops = 2 * T * K * (base + adapters + learned)
    return (3 * T * D + kept + matrices) * dtype.itemsize + 16 * T * K, flops
