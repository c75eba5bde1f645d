"""quant_linear: a decode step and a prefill of SmolLM2's widest layers, 4 and 8 bits."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright import QuantTensor, ops, reference

OP = "quant_linear"
TENSOR_CORES = True
DTYPES = (torch.float32, torch.bfloat16)
GROUP = 32
SHAPES: dict[str, dict] = {
    "decode 1x576 -> 3072, 4 bits": {"M": 1, "N": 3072, "K": 576, "bits": 4},
    "decode 1x1536 -> 576, 4 bits": {"M": 1, "N": 576, "K": 1536, "bits": 4},
    "prefill 512x576 -> 3072, 4 bits": {"M": 512, "N": 3072, "K": 576, "bits": 4},
    "head 1x576 -> 49152, 8 bits": {"M": 1, "N": 49152, "K": 576, "bits": 8},
}


def inputs(dtype: torch.dtype, device: str, *, M: int, N: int, K: int, bits: int) -> dict:
    codes = torch.randint(0, 256, (N, K * bits // 8), dtype=torch.uint8, device=device)
    scales = (torch.rand(N, K // GROUP, device=device) * 0.01 + 0.01).half()
    minima = -8 * scales if bits == 4 else None
    x = torch.randn(M, K, dtype=dtype, device=device).requires_grad_()
    return {"x": x, "w": QuantTensor(codes, scales, minima=minima, bits=bits)}


def _tilewright(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (ops.quant_linear(x, w),)


def _int8(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (ops.quant_linear(x, w, activations="int8"),)


def _eager(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (reference.quant_linear(x, w),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "tilewright int8 activations": _int8,
    "eager": _eager,
    "compile": torch.compile(_eager),
}


def cost(dtype: torch.dtype, *, M: int, N: int, K: int, bits: int) -> tuple[int, int]:
    """Forward: codes and scales (and minima) read once, x read, y written."""
    weight = N * K * bits // 8 + N * (K // GROUP) * 2 * (2 if bits == 4 else 1)
    return weight + M * (K + N) * dtype.itemsize, 2 * M * N * K


def backward_cost(dtype: torch.dtype, *, M: int, N: int, K: int, bits: int) -> tuple[int, int]:
    """dx alone: what the forward costs, dy in y's place and dx in x's."""
    return cost(dtype, M=M, N=N, K=K, bits=bits)
