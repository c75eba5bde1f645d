"""AWQ checkpoints, as AutoAWQ writes them (Lin et al. 2023, arXiv:2306.00978).

A layer of K inputs, N outputs and G groups, 4 bits, by the file's `version`:

    gemm   qweight [K, N/8], qzeros [G, N/8] int32, along N; in a word, from the lowest bits on, outputs
           0 2 4 6 1 3 5 7; scales [G, N]
    gemv   qweight [N, K/8], qzeros [N, Z] int32, along K and G, in their order; scales [N, 8 Z], Z words
           that hold G zero-points and more

    w = scales (code - zero), zeros as they are
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright.quant._words import Tensors, fits, from_words, number, taken, usable
from tilewright.quant_tensor import SCALE_DTYPES, QuantTensor, pack_int4

NAMES = ("qweight", "qzeros", "scales")
OUTPUTS = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word of gemm's each output is


def _in_order(words: Tensor) -> Tensor:
    return from_words(words, 4).unflatten(-1, (-1, 8))[..., OUTPUTS].flatten(-2)


def read(tensors: Tensors, config: Mapping[str, Any]) -> QuantTensor:
    """A layer's weight; config is the checkpoint's quantization_config: bits (or w_bit), group_size (or
    q_group_size), version.  Raises ValueError where a tensor or a setting does not fit."""
    config = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size")} | dict(config)
    number("awq", config, "bits", (4,))
    size = number("awq", config, "group_size")
    version = str(config.get("version", "gemm")).lower()
    words = taken("awq", tensors, "qweight", (torch.int32,), 2)
    zeros = taken("awq", tensors, "qzeros", (torch.int32,), 2)
    scales = taken("awq", tensors, "scales", SCALE_DTYPES, 2)
    if version == "gemm":
        K, N = words.shape[0], words.shape[1] * 8
    elif version == "gemv":
        N, K = words.shape[0], words.shape[1] * 8
    else:
        raise ValueError(f"awq: version must be gemm or gemv, not {config['version']!r}")
    size = K if size == -1 else size
    if size <= 0 or K % size:
        raise ValueError(f"awq: group_size {size} does not divide {K} inputs")
    G = K // size
    if version == "gemm":
        fits("awq", "scales", scales, (G, N))
        codes = _in_order(words).t()
        zeros = _in_order(fits("awq", "qzeros", zeros, (G, N // 8))).t()
        scales = usable("awq", "scales", scales).t()
    else:
        if zeros.shape[1] * 8 < G:
            raise ValueError(f"awq: qzeros {list(zeros.shape)} hold no {G} groups")
        fits("awq", "qzeros", zeros, (N, zeros.shape[1]))
        fits("awq", "scales", scales, (N, zeros.shape[1] * 8))
        codes = from_words(words, 4)
        zeros, scales = from_words(zeros, 4)[:, :G], usable("awq", "scales", scales[:, :G])
    scales = scales.contiguous()
    zeros = zeros.contiguous().to(scales.dtype)
    return QuantTensor(pack_int4(codes).contiguous(), scales, zeros, bits=4)
