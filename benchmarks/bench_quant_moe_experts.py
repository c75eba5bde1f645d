"""quant_moe_experts: Qwen3-30B's layer (2048, 768, 128 experts, 8 of them) of 4 and 8 bits.

T tokens, E experts, K of them each, D features, I intermediate ones; groups of that many columns share a scale.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import QuantTensor, ops
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
}
DTYPES = (torch.bfloat16,)


def inputs(
    dtype: torch.dtype, device: str, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int
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

    x = (torch.randn(T, D, generator=g) / D**0.5).to(device, dtype).requires_grad_()
    return {
        "x": x, "weights": weights.requires_grad_(), "placed": ops.moe_dispatch(ids, E),
        "w13": quantised(E * 2 * I, D), "w2": quantised(E * D, I), "ids": ids,
    }  # fmt: skip


def _tilewright(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, ids: Tensor
) -> tuple[Tensor]:
    """Dispatch too, as the others find their tokens."""
    placed = ops.moe_dispatch(ids, len(placed.offsets) - 1)
    return (ops.quant_moe_experts(x, weights, placed, w13, w2),)


@lru_cache(maxsize=2)
def _dense(w: QuantTensor, E: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([part.dequantize(dtype) for part in _parts(w, E)])


def _parts(w: QuantTensor, E: int) -> list[QuantTensor]:
    each = w.out_features // E
    return [w.part(e * each, (e + 1) * each) for e in range(E)]


def _experts_of_x(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, ids: Tensor
) -> tuple[Tensor]:
    """moe_experts on weights that were dequantised once, which take two or four times the room."""
    E = len(placed.offsets) - 1
    dense13, dense2 = _dense(w13, E, x.dtype), _dense(w2, E, x.dtype)
    return (ops.moe_experts(x, weights, ops.moe_dispatch(ids, E), dense13, dense2),)


def _eager(
    x: Tensor, weights: Tensor, placed: ExpertRows, w13: QuantTensor, w2: QuantTensor, ids: Tensor
) -> tuple[Tensor]:
    """As transformers' eager experts, of which those that have tokens are dequantised, one by one."""
    E = len(placed.offsets) - 1
    parts13, parts2 = _parts(w13, E), _parts(w2, E)
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, j = (ids == e).nonzero().unbind(-1)
        gate, up = F.linear(x[token], parts13[e].dequantize(x.dtype)).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, parts2[e].dequantize(x.dtype)) * weights[token, j, None]
        out.index_add_(0, token, y.to(out.dtype))
    return (out,)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "eager": _eager,
    "moe_experts": _experts_of_x,
}


def _bytes(T: int, E: int, K: int, D: int, I: int, bits: int, group: int) -> int:
    """Of the experts with tokens, about: codes, scales and zero-points."""
    experts = min(E, round(E * (1 - (1 - K / E) ** T)))
    weights = experts * 3 * D * I
    return weights * bits // 8 + weights // group * (4 if bits == 4 else 2)


def cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int
) -> tuple[int, int]:
    """Forward: tokens read and written, their weights and experts, the experts' codes once; three products."""
    least = _bytes(T, E, K, D, I, bits, group) + 2 * T * D * dtype.itemsize + 12 * T * K
    return least, 6 * T * K * D * I


def backward_cost(
    dtype: torch.dtype, *, T: int, E: int, K: int, D: int, I: int, bits: int, group: int
) -> tuple[int, int]:
    """Gradients and h read, the tokens' gradients written, the experts' codes once."""
    least = _bytes(T, E, K, D, I, bits, group) + (2 * T * D + 2 * T * K * I) * dtype.itemsize
    return least + 16 * T * K, 6 * T * K * D * I
