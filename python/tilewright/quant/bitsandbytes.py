"""bitsandbytes' weights: NF4 and FP4 (Dettmers et al. 2023, arXiv:2305.14314) and LLM.int8.

A 4-bit layer, of blocks over the flattened weight:

    weight [N K / 2, 1] uint8            two codes a byte, the first in the high nibble
    weight.absmax [blocks]               float32, or uint8 under double quantisation
    weight.quant_map [16] float32        what the codes stand for
    weight.nested_absmax, weight.nested_quant_map [256] float32
    weight.quant_state.bitsandbytes__nf4 (or fp4)  uint8: JSON of shape, blocksize, dtype, nested_offset ...

    w = absmax quant_map[code]

LLM.int8:  weight [N, K] int8, SCB [N] float32, weight_format [] uint8, 0,  w = weight SCB / 127.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from tilewright.quant._words import Tensors, fits, taken, usable
from tilewright.quant_tensor import NESTED_BLOCK, Nested, QuantTensor

STATE = "weight.quant_state.bitsandbytes__"
NAMES = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    f"{STATE}nf4", f"{STATE}fp4", "SCB", "weight_format",
)  # fmt: skip
NAME = "bitsandbytes"


def _state(tensors: Tensors) -> dict[str, Any]:
    """The layer's settings."""
    names = [name for name in tensors if name.startswith(STATE)]
    if len(names) != 1:
        raise ValueError(f"{NAME}: one {STATE}nf4 or fp4 is needed, not {names}")
    try:
        state = json.loads(bytes(taken(NAME, tensors, names[0], (torch.uint8,), 1).tolist()))
        shape, blocksize = tuple(state["shape"]), state["blocksize"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{NAME}: {names[0]} is no quant state: {error}") from error
    whole = all(isinstance(n, int) and n > 0 for n in (*shape, blocksize))
    if len(shape) != 2 or not whole or shape[0] * shape[1] % 2:
        raise ValueError(f"{NAME}: a weight of shape {list(shape)} in blocks of {blocksize}")
    return state


def read(tensors: Tensors, config: Mapping[str, Any] | None = None) -> QuantTensor:
    """A layer's weight; its settings are its own.  Blocks that end within a row become as many equal groups
    as it takes.  Raises ValueError where a tensor or a setting does not fit."""
    if "SCB" in tensors:
        form = tensors.get("weight_format")
        if form is not None and form.tolist() not in (0, [0]):
            raise ValueError(f"{NAME}: weight_format is {form.tolist()}; readable is 0, by row")
        codes = taken(NAME, tensors, "weight", (torch.int8,), 2)
        absmax = taken(NAME, tensors, "SCB", (torch.float32,), 1)
        fits(NAME, "SCB", usable(NAME, "SCB", absmax, zero=True), (codes.shape[0],))
        return QuantTensor(codes.view(torch.uint8) ^ 128, absmax[:, None] / 127.0, bits=8)
    state = _state(tensors)
    (N, K), blocksize = state["shape"], state["blocksize"]
    octets = taken(NAME, tensors, "weight", (torch.uint8,), 2)
    fits(NAME, "weight", octets, (N * K // 2, 1))
    book = taken(NAME, tensors, "weight.quant_map", (torch.float32,), 1)
    fits(NAME, "weight.quant_map", usable(NAME, "weight.quant_map", book, zero=True), (16,))
    qweight = ((octets >> 4) | (octets << 4)).view(-1)
    group = math.gcd(K, blocksize)
    if K % 2 or (group % 2 and group != K):
        raise ValueError(f"{NAME}: rows of {K} in blocks of {blocksize} end within a byte")
    blocks = -(-N * K // blocksize)
    absmax = taken(NAME, tensors, "weight.absmax", (torch.float32, torch.uint8), 1)
    fits(NAME, "weight.absmax", absmax, (blocks,))
    nested = None
    if absmax.dtype == torch.uint8:
        nested = _nested(tensors, state, blocks)
        if group != blocksize:  # a block of scales no longer holds 256 groups
            absmax, nested = nested(absmax[None])[0], None
    else:
        usable(NAME, "weight.absmax", absmax, zero=True)
    first = torch.arange(0, N * K, group, device=octets.device) // blocksize
    scales = absmax[first].view(N, K // group)
    return QuantTensor(qweight.view(N, K // 2), scales, codebook=book, nested=nested, bits=4)


def _nested(tensors: Tensors, state: Mapping[str, Any], blocks: int) -> Nested:
    names = ("weight.nested_quant_map", "weight.nested_absmax")
    code, absmax = (
        usable(NAME, n, taken(NAME, tensors, n, (torch.float32,), 1), zero=True) for n in names
    )
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if size != NESTED_BLOCK or not isinstance(offset, float) or not math.isfinite(offset):
        raise ValueError(
            f"{NAME}: nested blocks of {size} with offset {offset!r}; readable are {NESTED_BLOCK}"
        )
    fits(NAME, names[0], code, (256,))
    fits(NAME, names[1], absmax, (-(-blocks // NESTED_BLOCK),))
    return Nested(code, absmax, torch.tensor(offset, dtype=torch.float32, device=code.device))
