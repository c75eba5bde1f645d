"""Checkpoints of compressed-tensors (llm-compressor, vLLM): pack-quantized and int-quantized weights.

A layer of N outputs, K inputs and G groups (1 by channel or tensor); codes are signed, q - 2^(bits-1):

    pack-quantized  weight_packed [N, ceil(K bits / 32)] int32, unsigned q, the lowest bits the first input;
                    weight_shape [2] (N, K); weight_zero_point [ceil(N bits / 32), G] int32, as packed, or
                    [1] int8 by tensor
    int-quantized   weight [N, K] int8; weight_zero_point [N, G] int8
    both            weight_scale [N, G], [N], [1] or []; weight_g_idx [K] int32 under act-order

    w = weight_scale (code - weight_zero_point)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright.quant._words import (
    INTEGERS,
    Tensors,
    fits,
    from_words,
    number,
    taken,
    to_words,
    usable,
)
from tilewright.quant_tensor import SCALE_DTYPES, QuantTensor, packed

PACKED, INT = "pack-quantized", "int-quantized"
NAMES = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
NAME = "compressed-tensors"


def _by_row(t: Tensor, N: int) -> Tensor:
    """What is [N, G], [N], [1], [1, 1] or [] as [N, G]."""
    t = t.reshape(-1, 1) if t.dim() < 2 else t
    return t.expand(N, -1) if t.shape == (1, 1) else t


def _codes(tensors: Tensors, bits: int) -> Tensor:
    """Unsigned codes [N, K]."""
    if "weight_packed" not in tensors:
        codes = taken(NAME, tensors, "weight", (torch.int8,), 2)
        half = 1 << (bits - 1)
        low, high = (int(x) for x in codes.aminmax()) if codes.numel() else (0, 0)
        if low < -half or high >= half:
            raise ValueError(f"{NAME}: weight holds codes {low} to {high}, more than {bits} bits")
        return (codes.to(torch.int16) + half).to(torch.uint8)
    words = taken(NAME, tensors, "weight_packed", (torch.int32,), 2)
    shape = tuple(taken(NAME, tensors, "weight_shape", INTEGERS, 1).tolist())
    if len(shape) != 2 or shape[0] != words.shape[0] or -(-shape[1] * bits // 32) != words.shape[1]:
        raise ValueError(
            f"{NAME}: weight_shape {list(shape)} of {bits} bits is not weight_packed {list(words.shape)}"
        )
    return from_words(words, bits)[:, : shape[1]]


def _zeros(tensors: Tensors, bits: int, N: int, G: int) -> Tensor:
    """Unsigned zero-points [N, G]; one of a whole tensor is int8 beside packed weights too."""
    if "weight_zero_point" not in tensors:
        raise ValueError(
            f"{NAME}: weight_zero_point is missing; there are {', '.join(sorted(tensors))}"
        )
    if "weight_packed" in tensors and tensors["weight_zero_point"].dtype != torch.int8:
        words = taken(NAME, tensors, "weight_zero_point", (torch.int32,), 2)
        fits(NAME, "weight_zero_point", words, (-(-N * bits // 32), G))
        return from_words(words.t(), bits)[:, :N].t()
    zeros = tensors["weight_zero_point"]
    if zeros.dtype != torch.int8:
        raise ValueError(f"{NAME}: weight_zero_point must be int8, not {zeros.dtype}")
    zeros = fits(NAME, "weight_zero_point", _by_row(zeros, N), (N, G))
    return (zeros.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def read(tensors: Tensors, config: Mapping[str, Any]) -> QuantTensor:
    """A layer's weight; config is the weights' entry of its group in quantization_config: num_bits, type,
    symmetric, strategy, group_size.  Raises ValueError where a tensor or a setting does not fit."""
    bits = number(NAME, config, "num_bits", (4, 8))
    if config.get("type", "int") != "int":
        raise ValueError(f"{NAME}: weights of type {config['type']!r}; readable is int")
    codes = _codes(tensors, bits)
    N, K = codes.shape
    scales = tensors.get("weight_scale")
    if scales is None or scales.dtype not in SCALE_DTYPES or scales.dim() > 2:
        told = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ValueError(f"{NAME}: weight_scale must be floats [{N}, groups], and is {told}")
    scales = _by_row(usable(NAME, "weight_scale", scales), N)
    strategy, G = config.get("strategy", "group"), scales.shape[1]
    if strategy == "group":
        size = number(NAME, config, "group_size")
        wanted = -(-K // size) if size > 0 else 1 if size == -1 else 0
    elif strategy in ("channel", "tensor"):
        size, wanted = K, 1
    else:
        raise ValueError(f"{NAME}: strategy {strategy!r}; readable are group, channel and tensor")
    if wanted != G or scales.shape[0] != N:
        raise ValueError(
            f"{NAME}: weight_scale {list(scales.shape)} does not fit a weight {[N, K]} by {strategy}"
            f" of {config.get('group_size')}"
        )
    zeros = None
    if not config.get("symmetric", True):
        zeros = _zeros(tensors, bits, N, G).to(scales.dtype).contiguous()
    qweight, scales = packed(codes, bits).contiguous(), scales.contiguous()
    if "weight_g_idx" in tensors:
        g_idx = taken(NAME, tensors, "weight_g_idx", INTEGERS, 1)
        if not bool((g_idx == -1).all()):  # which says that there is none
            return QuantTensor.by_group(qweight, scales, zeros, g_idx, bits)
    if K % G:
        g_idx = torch.arange(K, dtype=torch.int32, device=codes.device) // size
        return QuantTensor.by_group(qweight, scales, zeros, g_idx, bits)
    return QuantTensor(qweight, scales, zeros, bits=bits)


def write(w: QuantTensor) -> dict[str, Tensor]:
    """A layer as pack-quantized has it: read's inverse.  Raises ValueError where that cannot say it: a code
    book, minima, zero-points that are no codes, an order of columns (later versions have none)."""
    N, K = w.shape
    most = (1 << w.bits) - 1
    if w.codebook is not None or w.minima is not None:
        raise ValueError(f"{NAME}: a weight with minima or a code book has no {PACKED} form")
    if w.order is not None:
        raise ValueError(f"{NAME}: a weight with an order of columns has no {PACKED} form")
    out = {"weight_scale": w.scales, "weight_shape": torch.tensor([N, K])}
    out["weight_packed"] = to_words(_filled(w.codes(), w.bits), w.bits)
    if w.zeros is not None:
        if not bool(((w.zeros == w.zeros.round()) & (w.zeros >= 0) & (w.zeros <= most)).all()):
            raise ValueError(f"{NAME}: zero-points must be whole numbers from 0 to {most}")
        columns = _filled(w.zeros.to(torch.uint8).t(), w.bits)
        out["weight_zero_point"] = to_words(columns, w.bits).t().contiguous()
    return out


def _filled(codes: Tensor, bits: int) -> Tensor:
    """Rows filled up to whole words."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
