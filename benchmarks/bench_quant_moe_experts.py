"""quant_moe_experts: Qwen3-30B's layer (2048, 768, 128 experts, 8 of them) of 4 and 8 bits.

T tokens, E experts, K of them each, D features, I intermediate ones; groups of that many columns share a scale.  With a
rank R, adapters of both weights.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import QuantTensor, ops
from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows

OP = "quant_moe_experts"
LAYER = {"E": 128, "K": 8, "D": 2048, "I": 768}
SHAPES: dict[str, dict] = {
    # what `make demo` times: the first
    "small 64, 4 bits": {"T": 64, "E": 8, "K": 2, "D": 512, "I": 256, "bits": 4, "group": 128},
    "Qwen3-30B 1 token, 4 bits": {"T": 1, **LAYER, "bits": 4, "group": 128},
    "Qwen3-30B 1 token, 8 bits": {"T": 1, **LAYER, "bits": 8, "group": 128},
    "Qwen3-30B 16, 4 bits": {"T": 16, **LAYER, "bits": 4, "group": 128},
    "Qwen3-30B 256, 4 bits": {"T": 256, **LAYER, "bits": 4, "group": 128},
    "Qwen3-30B 256, 4 bits, rank 16": {"T": 256, **LAYER, "bits": 4, "group": 128, "R": 16},
}
DTYPES = (torch.bfloat16,)


def inputs(
    dtype: torch.dtype, device: str, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> dict:  # fmt: skip
    """Every expert as likely as another; weights that keep the scale."""
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(T, E, generator=g).argsort(-1)[:, :K].to(device)
    weights = torch.rand(T, K, generator=g).softmax(-1).to(device)

    def quantised(rows: int, columns: int) -> QuantTensor:
        codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, device=device)
        size = 4 / 2**bits / columns**0.5
        scales = (torch.rand(rows, columns // group, device=device) * size + size / 2).half()
        zeros = torch.full_like(scales, 7) if bits == 4 else None
        return QuantTensor(codes, scales, zeros, bits=bits)

    def normal(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=g) / shape[-1] ** 0.5
        return numbers.to(device, dtype).requires_grad_()

    x = normal(T, D)
    given = {
        "x": x, "weights": weights.requires_grad_(), "placed": ops.moe_dispatch(ids, E),
        "w13": quantised(E * 2 * I, D), "w2": quantised(E * D, I), "ids": ids,
    }  # fmt: skip
    if R:
        shapes = {"a13": (E, R, D), "b13": (E, 2 * I, R), "a2": (E, R, I), "b2": (E, D, R)}
        given |= {name: normal(*shape) for name, shape in shapes.items()}
    return given


def _tilewright(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """Dispatch too, as the others find their tokens."""
    placed = ops.moe_dispatch(ids, len(placed.offsets) - 1)
    lora = ExpertLora(**adapters) if adapters else None
    return (ops.quant_moe_experts(x, weights, placed, w13, w2, lora=lora),)


@lru_cache(maxsize=2)
def _dense(w: QuantTensor, E: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([part.dequantize(dtype) for part in _parts(w, E)])


def _parts(w: QuantTensor, E: int) -> list[QuantTensor]:
    each = w.out_features // E
    return [w.part(e * each, (e + 1) * each) for e in range(E)]


def _experts_of_x(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """moe_experts on weights that were dequantised once, which take two or four times the room."""
    E = len(placed.offsets) - 1
    dense13, dense2 = _dense(w13, E, x.dtype), _dense(w2, E, x.dtype)
    lora = ExpertLora(**adapters) if adapters else None
    return (ops.moe_experts(x, weights, ops.moe_dispatch(ids, E), dense13, dense2, lora=lora),)


def _eager(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, ids: Tensor, **adapters: Any
) -> tuple[Tensor]:  # fmt: skip
    """As transformers' eager experts, of which those that have tokens are dequantised, one by one."""
    E = len(placed.offsets) - 1
    parts13, parts2 = _parts(w13, E), _parts(w2, E)
    out = torch.zeros_like(x)

    def linear(x: Tensor, w: QuantTensor, n: str, e: int) -> Tensor:
        y = F.linear(x, w.dequantize(x.dtype))
        if not adapters:
            return y
        return y + F.linear(F.linear(x, adapters[f"a{n}"][e]), adapters[f"b{n}"][e])

    for e in ids.unique().tolist():
        token, j = (ids == e).nonzero().unbind(-1)
        gate, up = linear(x[token], parts13[e], "13", e).chunk(2, dim=-1)
        y = linear(F.silu(gate) * up, parts2[e], "2", e) * weights[token, j, None]
        out.index_add_(0, token, y.to(out.dtype))
    return (out,)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "moe_experts": _experts_of_x,
}


def _experts(T: int, E: int, K: int) -> int:
    """Experts with tokens, about."""
    return min(E, round(E * (1 - (1 - K / E) ** T)))


def _bytes(T: int, E: int, K: int, D: int, I: int, bits: int, group: int) -> int:
    """Of the experts with tokens: codes, scales and zero-points."""
    weights = _experts(T, E, K) * 3 * D * I
    return weights * bits // 8 + weights // group * (4 if bits == 4 else 2)


def cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> tuple[int, int]:
    """Forward: tokens read and written, their weights and experts, the experts' codes and adapters once; their
    products."""
    adapters = R * (2 * D + 3 * I)
    numbers = 2 * T * D + _experts(T, E, K) * adapters
    least = _bytes(T, E, K, D, I, bits, group) + numbers * dtype.itemsize + 12 * T * K
    return least, 2 * T * K * (3 * D * I + adapters)


def backward_cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int, R: int = 0
) -> tuple[int, int]:
    """Gradients and h read, the tokens' gradients written, the experts' codes once; with adapters tokens and those read,
    and theirs written whole."""
    adapters = R * (2 * D + 3 * I)
    numbers = (3 if R else 2) * T * D + 2 * T * K * I + (_experts(T, E, K) + E) * adapters
    least = _bytes(T, E, K, D, I, bits, group) + numbers * dtype.itemsize
    return least + 16 * T * K, 2 * T * K * (3 * D * I + 2 * adapters)
