"""HQQ's layers (Badri and Shaji 2023, Half-Quadratic Quantization), groups along the inputs (axis 1).

A layer of N outputs, K inputs and R = N K / group_size groups, one after another:

    W_q     [R / 2, group_size] uint8, R / 2 high nibbles first (4bit_u8); [R, group_size] (8bit_u8)
    scale, zero [R, 1] float16, bfloat16 or float32
    nbits, group_size, axis, shape, packing   numbers, or tensors of them as safetensors holds them

    w = scale (code - zero), zero no whole number
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilewright.quant._words import fits, usable
from tilewright.quant_tensor import SCALE_DTYPES, QuantTensor, packed

NAMES = (
    "W_q", "scale", "zero", "nbits", "group_size", "axis", "shape", "packing", "view_as_float",
    "quant_scale", "quant_zero",
)  # fmt: skip
PACKINGS = {"4bit_u8": 4, "8bit_u8": 8}


def _plain(value: Any) -> Any:
    """A number, list, or text, which safetensors holds as a tensor."""
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8 and value.dim() == 1:
        return bytes(value.tolist()).decode("ascii", "replace")
    return value.tolist()


def read(layer: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> QuantTensor:
    """A layer's weight; its settings are its own.  Raises ValueError where a tensor or a setting does not
    fit, or where groups lie along the outputs (axis 0), scales are quantised too, or bits are not 4 or 8."""
    missing = [n for n in ("W_q", "scale", "zero", "shape", "packing") if n not in layer]
    if missing:
        raise ValueError(f"hqq: {', '.join(missing)} missing; there are {', '.join(sorted(layer))}")
    said = {name: _plain(layer[name]) for name in NAMES[3:] if name in layer}
    if said["packing"] not in PACKINGS:
        raise ValueError(f"hqq: packing {said['packing']!r}; readable are {', '.join(PACKINGS)}")
    for name, wanted in (("axis", 1), ("quant_scale", 0), ("quant_zero", 0), ("view_as_float", 0)):
        if said.get(name, wanted) != wanted:
            raise ValueError(f"hqq: {name} is {said[name]!r}; readable is {wanted}")
    bits, shape = PACKINGS[said["packing"]], said["shape"]
    whole = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or len(shape) != 2:
        raise ValueError(f"hqq: shape {shape} is no matrix's")
    N, K = shape
    codes, scale, zero = layer["W_q"], layer["scale"], layer["zero"]
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"hqq: W_q must be 2-D uint8, not {codes.dtype} {list(codes.shape)}")
    group = codes.shape[1]
    if group == 0 or K % group:
        raise ValueError(f"hqq: groups of {group} do not divide {K} inputs")
    R = N * K // group
    if bits == 4:
        fits("hqq", "W_q", codes, (R // 2, group))
        codes = torch.cat((codes >> 4, codes & 15))
    fits("hqq", "W_q", codes, (R, group))
    if scale.dtype not in SCALE_DTYPES or zero.dtype != scale.dtype:
        raise ValueError(f"hqq: scale {scale.dtype} and zero {zero.dtype} must be floats alike")
    for name, t in (("scale", scale), ("zero", zero)):
        usable("hqq", name, fits("hqq", name, t, (R, 1)), zero=True)
    scales, zeros = scale.reshape(N, K // group), zero.reshape(N, K // group)
    return QuantTensor(packed(codes.reshape(N, K), bits), scales, zeros, bits=bits)


def write(w: QuantTensor) -> dict[str, Tensor]:
    """A layer as safetensors holds it: read's inverse.  Raises ValueError where HQQ cannot say it: a code
    book, minima, an order of columns, an odd number of groups of 4 bits."""
    N, K = w.shape
    if w.codebook is not None or w.minima is not None or w.order is not None:
        raise ValueError("hqq: a weight with minima, a code book or an order has no HQQ form")
    codes = w.codes().reshape(-1, w.group)
    if w.bits == 4:
        if len(codes) % 2:
            raise ValueError(f"hqq: {len(codes)} groups of {w.group} of a weight {[N, K]} are odd")
        high, low = codes.chunk(2)
        codes = high << 4 | low
    zeros = torch.full_like(w.scales, 1 << (w.bits - 1)) if w.zeros is None else w.zeros

    settings: dict[str, Any] = {
        "nbits": w.bits, "group_size": w.group, "axis": 1, "packing": f"{w.bits}bit_u8",
        "channel_wise": True, "optimize": True, "round_zero": False, "view_as_float": False,
        "quant_scale": False, "quant_zero": False, "offload_meta": False,
        "unpack_view_dtype": "torch.uint8", "compute_dtype": str(w.scales.dtype),
        "encoded_state_dict": True, "stores_quant_config": True,
    }  # fmt: skip
    tensors = {
        "W_q": codes,
        "scale": w.scales.reshape(-1, 1),
        "zero": zeros.reshape(-1, 1),
        "shape": torch.tensor([N, K]),
    }
    return tensors | {name: _encoded(value) for name, value in settings.items()}


def _encoded(value: Any) -> Tensor:
    """_plain's inverse, of the dtypes that HQQ gives each kind."""
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    dtype = torch.uint8 if isinstance(value, bool) else torch.int32
    return torch.tensor(int(value), dtype=dtype)
