"""Layers of other libraries' checkpoints, packed bit by bit by code of the tests' own."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

RNG = np.random.default_rng


def words(codes: list[int], bits: int) -> list[int]:
    """int32 words of codes one after another, the lowest bits first."""
    whole = sum(code << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    found = [whole >> (32 * i) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def rows_of_words(codes: np.ndarray, bits: int) -> Tensor:
    return torch.tensor([words(row.tolist(), bits) for row in codes], dtype=torch.int32)


class Layer:
    """Codes [N, K], and of group k // group, or g_idx[k], a scale and a zero-point each."""

    def __init__(
        self, bits: int, N: int = 24, K: int = 96, group: int = 32, *,
        symmetric: bool = False, act_order: bool = False, dtype: torch.dtype = torch.float16,
    ) -> None:  # fmt: skip
        rng = RNG(bits * 1000 + N + K + group)
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.codes = rng.integers(0, 1 << bits, (N, K))
        G = -(-K // group)
        self.scales = torch.tensor(rng.uniform(0.01, 0.02, (N, G))).to(dtype)
        self.zeros = rng.integers(0, 1 << bits, (N, G))
        self.zeros[0, 0], self.zeros[1, 0] = 0, (1 << bits) - 1
        if symmetric:
            self.zeros[:] = 1 << (bits - 1)
        self.g_idx = np.arange(K) // group
        if act_order:
            rng.shuffle(self.g_idx)

    @property
    def weight(self) -> Tensor:
        """Each product of a float of the scales' dtype and a small whole number is exact in float64."""
        steps = torch.from_numpy(self.codes - self.zeros[:, self.g_idx]).double()
        return (steps * self.scales[:, self.g_idx].double()).float()


def gptq_layer(x: Layer, version: int = 1) -> tuple[dict[str, Tensor], dict[str, Any]]:
    mask = (1 << x.bits) - 1
    stored = (x.zeros - (version == 1)) & mask
    tensors = {
        "qweight": rows_of_words(x.codes, x.bits).t().contiguous(),
        "qzeros": rows_of_words(stored.T, x.bits),
        "scales": x.scales.t().contiguous(),
        "g_idx": torch.from_numpy(x.g_idx).int(),
    }
    format = "gptq" if version == 1 else "gptq_v2"
    config = {
        "bits": x.bits,
        "group_size": x.group,
        "sym": x.symmetric,
        "checkpoint_format": format,
    }
    return tensors, config


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_layer(x: Layer, version: str = "gemm") -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = {"bits": 4, "group_size": x.group, "version": version, "zero_point": True}
    if version == "gemv":
        G = x.scales.shape[1]
        wide = -(-G // 8) * 8
        zeros, scales = np.zeros((len(x.codes), wide), int), torch.zeros(len(x.codes), wide).half()
        zeros[:, :G], scales[:, :G] = x.zeros, x.scales
        return {
            "qweight": rows_of_words(x.codes, 4),
            "qzeros": rows_of_words(zeros, 4),
            "scales": scales,
        }, config

    def along_outputs(codes: np.ndarray) -> Tensor:
        swapped = codes.T.reshape(codes.shape[1], -1, 8)[..., AWQ_ORDER]
        return rows_of_words(swapped.reshape(codes.shape[1], -1), 4)

    return {
        "qweight": along_outputs(x.codes),
        "qzeros": along_outputs(x.zeros),
        "scales": x.scales.t().contiguous(),
    }, config


def compressed_layer(x: Layer, packing: str = "packed") -> tuple[dict[str, Tensor], dict[str, Any]]:
    half = 1 << (x.bits - 1)
    tensors: dict[str, Tensor] = {"weight_scale": x.scales}
    if packing == "packed":
        tensors["weight_packed"] = rows_of_words(x.codes, x.bits)
        tensors["weight_shape"] = torch.tensor(x.codes.shape)
        zeros = rows_of_words(x.zeros.T, x.bits).t().contiguous()
    else:
        tensors["weight"] = torch.from_numpy(x.codes - half).to(torch.int8)
        zeros = torch.from_numpy(x.zeros - half).to(torch.int8)
    if not x.symmetric:
        tensors["weight_zero_point"] = zeros
    if (x.g_idx != np.arange(len(x.g_idx)) // x.group).any():
        tensors["weight_g_idx"] = torch.from_numpy(x.g_idx).int()
    grouped = x.scales.shape[1] > 1
    config = {
        "num_bits": x.bits, "type": "int", "symmetric": x.symmetric,
        "strategy": "group" if grouped else "channel", "group_size": x.group if grouped else None,
    }  # fmt: skip
    return tensors, config


def bnb_layer(
    N: int = 12, K: int = 96, blocksize: int = 64, nested: bool = False, kind: str = "nf4"
) -> tuple[dict[str, Tensor], Tensor]:
    """A layer's tensors, and the weight they stand for."""
    rng = RNG(N + K + blocksize)
    codes = rng.integers(0, 16, N * K)
    book = torch.tensor(np.sort(rng.uniform(-1, 1, 16)), dtype=torch.float32)
    blocks = -(-N * K // blocksize)
    absmax = torch.tensor(rng.uniform(0.1, 2, blocks), dtype=torch.float32)
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": blocksize, "dtype": "float16", "shape": [N, K],
    }  # fmt: skip
    octets = codes[0::2] << 4 | codes[1::2]
    tensors = {
        "weight": torch.from_numpy(octets).to(torch.uint8)[:, None],
        "weight.quant_map": book,
        "weight.absmax": absmax,
    }
    if nested:
        stored = torch.from_numpy(rng.integers(0, 256, blocks)).to(torch.uint8)
        code = torch.tensor(rng.uniform(-1, 1, 256), dtype=torch.float32)
        more = torch.tensor(rng.uniform(0.1, 1, -(-blocks // 256)), dtype=torch.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.75}
        tensors |= {
            "weight.absmax": stored,
            "weight.nested_quant_map": code,
            "weight.nested_absmax": more,
        }
        each = [code[int(s)] * more[i // 256] + torch.tensor(0.75) for i, s in enumerate(stored)]
        absmax = torch.stack(each)
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(text), dtype=torch.uint8
    )
    whole = book[torch.from_numpy(codes)] * absmax[torch.arange(N * K) // blocksize]
    return tensors, whole.view(N, K)


def hqq_layer(bits: int, encoded: bool = False) -> tuple[dict[str, Any], Tensor]:
    rng = RNG(bits)
    N, K, group = 10, 96, 32
    codes = rng.integers(0, 1 << bits, (N * K // group, group))
    scale = torch.tensor(rng.uniform(0.01, 0.02, (len(codes), 1))).half()
    zero = torch.tensor(rng.uniform(0, (1 << bits) - 1, (len(codes), 1))).half()
    truth = (torch.from_numpy(codes).double() - zero.double()) * scale.double()
    half = len(codes) // 2
    stored = codes[:half] << 4 | codes[half:] if bits == 4 else codes
    said: dict[str, Any] = {
        "nbits": bits, "group_size": group, "axis": 1, "shape": [N, K],
        "packing": f"{bits}bit_u8", "quant_scale": False, "quant_zero": False,
    }  # fmt: skip
    if encoded:
        said |= {
            name: torch.tensor(said[name]) for name in ("nbits", "group_size", "axis", "shape")
        }
        said |= {n: torch.tensor(0, dtype=torch.uint8) for n in ("quant_scale", "quant_zero")}
        said["packing"] = torch.tensor(list(f"{bits}bit_u8".encode()), dtype=torch.uint8)
    tensors = {"W_q": torch.from_numpy(stored).to(torch.uint8), "scale": scale, "zero": zero}
    return tensors | said, truth.float().view(N, K)
