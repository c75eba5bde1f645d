"""quant_linear: a decode step and a prefill of SmolLM2's widest layers, 4 and 8 bits."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from tilewright import QuantTensor, ops, reference
from tilewright.bench.harness import outsider

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


@lru_cache(maxsize=1)
def _tinygemm(w: QuantTensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight as torch's own int4 product takes it: (code - 8) * scale + zero."""
    if w.bits != 4 or w.minima is None:
        raise ValueError("torch's own has 4 bits only")
    zeros = w.minima.float() + 8 * w.scales.float()
    scales = torch.stack([w.scales.float().t(), zeros.t()], -1).to(dtype).contiguous()
    if w.qweight.is_cuda:
        swapped = w.qweight << 4 | w.qweight >> 4  # theirs has the even column in the high bits
        tiles = 8 if w.in_features % 128 == 0 else 2
        return torch.ops.aten._convert_weight_to_int4pack(swapped, tiles), scales
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(w.codes().int(), 1), scales


def _torch_int4(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    """What torchao's int4 weight-only calls; forward alone."""
    packed, scales = _tinygemm(w, x.dtype)
    if x.is_cuda:
        return (torch.ops.aten._weight_int4pack_mm(x, packed, w.group, scales),)
    return (torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, w.group, scales),)


@lru_cache(maxsize=1)
def _gemlite_linear(w: QuantTensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from gemlite.helper import A16W4_HQQ_INT, A16W8_HQQ_INT

    zeros = torch.full_like(w.scales, 2 ** (w.bits - 1))  # theirs too is (code - zero) * scale
    if w.minima is not None:
        zeros = -w.minima / w.scales
    kind = A16W4_HQQ_INT if w.bits == 4 else A16W8_HQQ_INT
    return kind(device=w.qweight.device, dtype=dtype).from_weights(w.codes(), w.scales, zeros)


def _gemlite(x: Tensor, w: QuantTensor) -> tuple[Tensor]:
    return (_gemlite_linear(w, x.dtype)(x),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _tilewright,
    "tilewright int8 activations": _int8,
    "eager": _eager,
    "compile": torch.compile(_eager),
    "torch int4": _torch_int4,
}
if outsider("gemlite"):
    PROVIDERS["gemlite"] = _gemlite


def cost(dtype: torch.dtype, *, M: int, N: int, K: int, bits: int) -> tuple[int, int]:
    """Forward: codes and scales (and minima) read once, x read, y written."""
    weight = N * K * bits // 8 + N * (K // GROUP) * 2 * (2 if bits == 4 else 1)
    return weight + M * (K + N) * dtype.itemsize, 2 * M * N * K


def backward_cost(dtype: torch.dtype, *, M: int, N: int, K: int, bits: int) -> tuple[int, int]:
    """dx alone: what the forward costs, dy in y's place and dx in x's."""
    return cost(dtype, M=M, N=N, K=K, bits=bits)
