"""What quant_moe_experts' kernels share: a weight as they take one, and configurations.

P rows sorted by expert; E experts; M, N, K a product's sizes, M the rows of one expert.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moe import DTYPES, MOST_FEATURES, MOST_ROWS
from ._moe_products import rank_block
from ._quant_tiles import columns_of
from ._quant_weight import CODEBOOK, MINIMA, SYMMETRIC, ZEROS, offset_of
from ._tune import Config, Tunable, bucket, grid, split

KEYS = ("dtype", "bits", "group", "M", "N", "K")
DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Experts(NamedTuple):
    """The weights [E N, K] of all experts, one below the other, as _quant_weight.py's verbs take them."""

    pointers: tuple[Tensor, ...]
    strides: tuple[int, int]
    group: int
    groups: int  # in a row
    constants: dict[str, Any]


def experts_of(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, minima: Tensor | None, codebook: Tensor | None,
    nested: list[Tensor], bits: int,
) -> Experts:  # fmt: skip
    """qweight [E N, K * bits / 8], scales, zeros or minima [E N, G], codebook [16], nested empty or Nested's three."""
    qweight, scales = qweight.contiguous(), scales.contiguous()
    offset, kind = offset_of(scales, zeros, minima, codebook)
    groups = scales.shape[1]
    return Experts(
        (qweight, scales, offset, *(nested or [scales] * 3)),
        (qweight.stride(0), scales.stride(0)),
        qweight.shape[1] * (8 // bits) // groups,
        groups,
        {"BITS": bits, "OFFSET": kind, "NESTED": bool(nested)},
    )


def config_of(
    tunable: Tunable, x: Tensor, w: Experts, P: int, E: int, N: int, K: int
) -> dict[str, Any]:
    """The tunable's choice for P rows of E experts, and what follows from it and from the weight."""
    sizes = (bucket(max(1, size), MOST_FEATURES) for size in (N, K))
    rows = bucket(max(1, P // E), MOST_ROWS)
    config = tunable(x.device, x.dtype, w.constants["BITS"], w.group, rows, *sizes)
    return finished(config, x.dtype, w.group, w.constants["OFFSET"])


def finished(config: Config, dtype: torch.dtype, group: int, kind: int) -> dict[str, Any]:
    """config with what follows from it; less of the weight at once where its loads are a number each, whose addresses
    would spill."""
    is_full = group % config["BLOCK_K"] == 0
    looked_up = kind == CODEBOOK and config["BLOCK_M"] * config["BLOCK_N"] >= 64 * 64
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    more = {"FULL": is_full, "DOT_DTYPE": DOT_DTYPES[dtype], "PRECISION": precision}
    if looked_up or not is_full:
        more["BLOCK_N"] = config["BLOCK_N"] // 2
    if not is_full:
        more["BLOCK_K"] = min(config["BLOCK_K"], 64 // dtype.itemsize)
        more["num_stages"] = 2
    return {**config, **more}


def tiles_in(group: int, config: dict[str, Any]) -> int:
    """Tiles of BLOCK_K columns in a group."""
    return triton.cdiv(group, config["BLOCK_K"])


def heuristic(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> Config:
    """Tiles of an expert's rows, BLOCK_N rows of its weight and BLOCK_K columns, all in one group."""
    rows = 16 if M <= 16 else 32 if M <= 32 or dtype == torch.float32 else 64
    wide = 32 if dtype == torch.float32 else 64
    return {
        "BLOCK_M": rows,
        "BLOCK_N": wide,
        "BLOCK_K": columns_of(group, wide),
        "num_warps": 4,
        "num_stages": 3,
    }


def space(dtype: torch.dtype, bits: int, group: int, M: int, N: int, K: int) -> list[Config]:
    """Tiles of which a thread holds 64 sums at most, of two such products."""
    widest = columns_of(group, 32 if dtype == torch.float32 else 64)
    widths = tuple(k for k in (32, 64, 128) if group % k == 0) or (widest,)
    found = grid(
        BLOCK_M=(16, 32, 64, 128), BLOCK_N=(32, 64, 128), BLOCK_K=widths, num_warps=(4, 8), num_stages=(2, 3, 4),
    )  # fmt: skip
    return [
        c
        for c in found
        if c["BLOCK_M"] <= max(64, 2 * M)
        if c["BLOCK_M"] * max(c["BLOCK_N"], c["BLOCK_K"]) <= 1024 * c["num_warps"]
    ]


def shipped() -> list[tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(x's type, signature of the weight, an adapter and sizes, constexprs, options), to compile offline: Qwen3-30B's
    layer."""
    found = []
    for M, t, bits, kind, group, nested, R in (
        (16, "*bf16", 4, ZEROS, 128, False, 0),
        (1024, "*bf16", 4, ZEROS, 128, False, 0),
        (1024, "*bf16", 4, MINIMA, 32, False, 0),
        (1024, "*bf16", 8, SYMMETRIC, 2048, False, 0),
        (32, "*bf16", 4, CODEBOOK, 64, False, 0),
        (1024, "*bf16", 4, CODEBOOK, 64, True, 0),
        (1024, "*fp32", 4, SYMMETRIC, 32, False, 0),
        (16, "*fp32", 8, MINIMA, 100, False, 0),  # masked tiles
        (1024, "*bf16", 4, ZEROS, 100, False, 0),
        (1024, "*bf16", 4, CODEBOOK, 64, True, 16),  # QLoRA
        (1024, "*fp32", 4, SYMMETRIC, 32, False, 16),
    ):
        dtype = DTYPES[t]
        block = finished(heuristic(dtype, bits, group, M, 1024, 2048), dtype, group, kind)
        block, options = split(block)
        constants = block | {
            "BITS": bits,
            "OFFSET": kind,
            "NESTED": nested,
            "BLOCK_R": rank_block(dtype, R),
        }
        scale = "*u8" if nested else "*fp16"
        signature = {"q_ptr": "*u8", "s_ptr": scale}
        signature |= {"o_ptr": "*fp32" if kind == CODEBOOK else "*fp16"}
        tables = ("code_ptr", "block_ptr", "shift_ptr")
        signature |= dict.fromkeys(tables, "*fp32" if nested else scale)
        sizes = "stride_qn", "stride_sn", "P", "E", "N", "R", "group", "tiles_per_group", "tiles"
        signature |= {"offsets_ptr": "*i64", **dict.fromkeys(sizes, "i32")}
        signature |= {"u_ptr": t, "b_ptr": t}
        found.append((t, signature, constants | {"BLOCK_E": 128}, options))
    return found
