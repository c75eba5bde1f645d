"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them (Frantar et al. 2022, arXiv:2210.17323).

A layer of K inputs, N outputs and G groups:

    qweight [K bits / 32, N] int32   codes, the lowest bits the first row
    qzeros [G, N bits / 32] int32    zero-points, the lowest bits the first column
    scales [G, N] float16, bfloat16 or float32
    g_idx [K] int32                  of which group each input is; may be missing: k // group

    w = scales (code - zero)

Version 1 stores each zero-point less 1, and 0 so as 2^bits - 1; version 2 as it is.  Files lie about theirs
(vLLM #38966 is one): where all zero-points are alike and the file says that it is symmetric, what is
stored tells.
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
from tilewright.quant_tensor import SCALE_DTYPES, QuantTensor

NAMES = ("qweight", "qzeros", "scales", "g_idx")


def _version(stored: Tensor, bits: int, config: Mapping[str, Any]) -> int:
    """1 or 2, by the zero-points where they tell and by what the file says where not."""
    told = config.get("checkpoint_format", config.get("format", "gptq"))
    if told not in ("gptq", "gptq_v2"):
        raise ValueError(f"gptq: checkpoint_format must be gptq or gptq_v2, not {told!r}")
    middle = 1 << (bits - 1)
    if config.get("sym", True) and stored.numel():
        low, high = (int(x) for x in stored.aminmax())
        if low == high and low in (middle - 1, middle):
            return 1 if low == middle - 1 else 2
    return 2 if told == "gptq_v2" else 1


def read(tensors: Tensors, config: Mapping[str, Any]) -> QuantTensor:
    """A layer's weight; config is the checkpoint's quantization_config: bits, group_size, sym,
    checkpoint_format.  Raises ValueError where a tensor or a setting does not fit."""
    bits = number("gptq", config, "bits", (4, 8))
    words = taken("gptq", tensors, "qweight", (torch.int32,), 2)
    scales = usable("gptq", "scales", taken("gptq", tensors, "scales", SCALE_DTYPES, 2))
    K, N = words.shape[0] * 32 // bits, words.shape[1]
    G = scales.shape[0]
    size = number("gptq", config, "group_size")
    wanted = 1 if size == -1 else -(-K // size) if size > 0 else 0
    if wanted != G:
        raise ValueError(
            f"gptq: group_size {size} of {K} inputs does not make scales {list(scales.shape)}"
        )
    fits("gptq", "scales", scales, (G, N))
    if N * bits % 32:
        raise ValueError(f"gptq: {N} outputs of {bits} bits are no whole words of zero-points")
    stored = taken("gptq", tensors, "qzeros", (torch.int32,), 2)
    stored = from_words(fits("gptq", "qzeros", stored, (G, N * bits // 32)), bits)
    zeros = stored
    if _version(stored, bits, config) == 1:
        zeros = (stored + 1) & ((1 << bits) - 1)
    # the words of a column are its codes, two a byte, the even one low: ours
    qweight = words.t().contiguous().view(torch.uint8)
    scales, zeros = scales.t().contiguous(), zeros.t().contiguous().to(scales.dtype)
    middle = 1 << (bits - 1)
    offsets = None if bool((zeros == middle).all()) else zeros
    if "g_idx" in tensors:
        g_idx = fits("gptq", "g_idx", taken("gptq", tensors, "g_idx", INTEGERS, 1), (K,))
    elif K % G:
        g_idx = torch.arange(K, dtype=torch.int32, device=words.device) // size
    else:
        return QuantTensor(qweight, scales, offsets, bits=bits)
    return QuantTensor.by_group(qweight, scales, offsets, g_idx, bits)


def write(w: QuantTensor) -> dict[str, Tensor]:
    """A layer as version 2 has it: read's inverse.  Raises ValueError where GPTQ cannot say it: a code book,
    minima, zero-points that are no codes, outputs that fill no words."""
    N, K = w.shape
    most = (1 << w.bits) - 1
    if w.codebook is not None or w.minima is not None:
        raise ValueError("gptq: a weight with minima or a code book has no GPTQ form")
    if N * w.bits % 32 or K * w.bits % 32:
        raise ValueError(f"gptq: {N} outputs of {K} inputs of {w.bits} bits are no whole words")
    zeros = torch.full_like(w.scales, 1 << (w.bits - 1)) if w.zeros is None else w.zeros
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= most)).all()):
        raise ValueError(f"gptq: zero-points must be whole numbers from 0 to {most}")
    codes, g_idx = w.codes(), torch.arange(K, dtype=torch.int32, device=w.device) // w.group
    if w.order is not None:
        back = w.order.argsort()
        codes, g_idx = codes[:, back], g_idx[back]
    return {
        "qweight": to_words(codes, w.bits).t().contiguous(),
        "qzeros": to_words(zeros.to(torch.uint8).t().contiguous(), w.bits),
        "scales": w.scales.t().contiguous(),
        "g_idx": g_idx,
    }
