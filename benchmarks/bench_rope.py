"""rope: the heads of one sequence as a model lays them out, [B, S, H, D] transposed, and decode steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright import ops

OP = "rope"
DTYPES = (torch.float32, torch.bfloat16)
SHAPES: dict[str, dict] = {
    "train 4096x1920": {"tokens": 4096, "heads": 30, "dim": 64},
    "train 4096x1920 interleaved": {"tokens": 4096, "heads": 30, "dim": 64, "interleaved": True},
    "train 4096x1920 D128": {"tokens": 4096, "heads": 15, "dim": 128},
    "decode 1x768": {"tokens": 1, "heads": 12, "dim": 64},
    "allocator-bound 4096x4096": {"tokens": 4096, "heads": 32, "dim": 128},
}


def inputs(
    dtype: torch.dtype,
    device: str,
    *,
    tokens: int,
    heads: int,
    dim: int,
    interleaved: bool = False,
) -> dict:
    x = torch.randn(1, tokens, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    inv_freq = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
    angles = torch.outer(torch.arange(tokens, device=device), inv_freq)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return {"x": x.requires_grad_(), "cos": cos, "sin": sin, "interleaved": interleaved}


def _tilewright(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor]:
    return (ops.rope(x, cos, sin, interleaved=interleaved),)


def _eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor]:
    """As transformers has it, tables doubled, in x's dtype."""
    if interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        half = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        first, second = x.chunk(2, dim=-1)
        half = torch.cat([-second, first], dim=-1)
    return (x * cos + half * sin,)


# Liger's rope is no rival here: it rotates q and k in place, and has no form that keeps them.
PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "compile": torch.compile(_eager),
}


def cost(
    dtype: torch.dtype, *, tokens: int, heads: int, dim: int, interleaved: bool = False
) -> tuple[int, int]:
    """Forward: x read, y written, each table read once; two products and a sum an element."""
    return tokens * dim * (2 * heads + 1) * dtype.itemsize, 3 * tokens * heads * dim


def backward_cost(
    dtype: torch.dtype, *, tokens: int, heads: int, dim: int, interleaved: bool = False
) -> tuple[int, int]:
    """The rotation back: what the forward costs."""
    return cost(dtype, tokens=tokens, heads=heads, dim=dim, interleaved=interleaved)
