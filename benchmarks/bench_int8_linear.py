"""int8_linear, W8A8: a decode step and prefills; beside it the same weight with activations of 32 columns a scale."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tilewright import QuantTensor, ops, reference

OP = "int8_linear"
TENSOR_CORES = True
DTYPES = (torch.float32, torch.bfloat16)
SHAPES: dict[str, dict[str, int]] = {
    "decode 1x576 -> 3072": {"M": 1, "N": 3072, "K": 576},
    "prefill 512x576 -> 3072": {"M": 512, "N": 3072, "K": 576},
    "prefill 512x1536 -> 576": {"M": 512, "N": 576, "K": 1536},
    "64x4096 -> 4096": {"M": 64, "N": 4096, "K": 4096},
}


def inputs(dtype: torch.dtype, device: str, *, M: int, N: int, K: int) -> dict:
    """x [M, K], seeded normals that require gradients, w [N, K]."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, K), generator=g, dtype=torch.uint8).to(device)
    scales = (torch.rand(N, 1, generator=g) * 0.01 + 0.01).to(device)
    x = torch.randn(M, K, generator=g).to(device, dtype).requires_grad_()
    return {"x": x, "w": QuantTensor(codes, scales, bits=8)}


def _tilewright(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (ops.int8_linear(x, w),)


def _by_block(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (ops.quant_linear(x, w, activations="int8"),)


def _eager(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (reference.int8_linear(x, w),)


@lru_cache(maxsize=1)
def _floats(w: QuantTensor, dtype: torch.dtype) -> Tensor:
    return w.dequantize(dtype)


def _dense(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    """The layer before it was quantised."""
    return (F.linear(x, _floats(w, x.dtype)),)


@lru_cache(maxsize=1)
def _signed(w: QuantTensor) -> Tensor:
    return (w.codes() ^ 128).view(torch.int8).t()


def _torch_int8(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    """What torchao's int8 dynamic calls; forward alone."""
    codes, scales, dtype = reference.int8_rows(x)
    if x.is_cuda and len(x) <= 16:
        raise ValueError("torch's own product takes more than 16 rows")
    sums = torch._int_mm(codes, _signed(w))
    return ((sums * scales[:, None] * w.scales[:, 0]).to(dtype),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "tilewright int8 by block": _by_block,
    "eager": _eager,
    "compile": torch.compile(_eager, dynamic=False),
    "dense": _dense,
    "torch int8": _torch_int8,
}


def cost(dtype: torch.dtype, *, M: int, N: int, K: int) -> tuple[int, int]:
    """Forward: codes and scales read once, x read, y written."""
    return N * K + 4 * N + M * (K + N) * dtype.itemsize, 2 * M * N * K


def backward_cost(dtype: torch.dtype, *, M: int, N: int, K: int) -> tuple[int, int]:
    """dx alone: what the forward costs, dy in y's place and dx in x's."""
    return cost(dtype, M=M, N=N, K=K)
