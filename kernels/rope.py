"""Rotary position embedding:  (a, b) -> (a cos - b sin, b cos + a sin) for each pair of a head.

Su et al. 2021, arXiv:2104.09864, eq. 34.  B batch, H heads, S sequence, D head dimension, of which
the first R turn.  Pairs are (i, i + R/2), or (2i, 2i + 1) where interleaved.  The backward turns the
other way.  Arithmetic is float32 whatever the dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, Tunable, bucket, grid

TILE = 2048  # elements a program
MOST_ROWS = 1 << 18  # rows from which more make no difference


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, position_ptr, y_ptr,
    stride_xb, stride_xh, stride_xs,
    stride_table, stride_position_b,
    H, S, rows, table_rows,
    D: tl.constexpr, R: tl.constexpr,
    SEQ_MAJOR: tl.constexpr, INTERLEAVED: tl.constexpr, DOUBLED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_M rows, a row being one head of one token, in the order of y's memory."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < rows
    if SEQ_MAJOR:
        h, s = row % H, row // H % S
    else:
        h, s = row // S % H, row % S
    b = row // S // H
    x_ptrs = x_ptr + b * stride_xb + h * stride_xh + s * stride_xs
    y_ptrs = y_ptr + row * D

    if HAS_POSITIONS:
        position = tl.load(position_ptr + b * stride_position_b + s, mask=mask_m, other=0)
        # a kernel cannot raise: a bad position reads the nearest row, not memory that is not ours
        position = tl.minimum(tl.maximum(position, 0), table_rows - 1)
    else:
        position = s
    i = tl.arange(0, BLOCK_HALF)
    mask = mask_m[:, None] & (i < R // 2)[None, :]
    column = i * 2 if INTERLEAVED and DOUBLED else i
    table = (position * stride_table)[:, None] + column[None, :]
    c = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sn = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sn = -sn

    if INTERLEAVED:
        # whole pairs are loaded and split in registers: strided loads would halve the bandwidth
        cols = i[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        mask_pair = mask[:, :, None] & (cols < R)
        x = tl.load(x_ptrs[:, None, None] + cols, mask=mask_pair, other=0.0).to(tl.float32)
        first, second = tl.split(x)
        y = tl.join(first * c - second * sn, second * c + first * sn)
        tl.store(y_ptrs[:, None, None] + cols, y.to(y_ptr.dtype.element_ty), mask=mask_pair)
    else:
        at = x_ptrs[:, None] + i[None, :]
        to = y_ptrs[:, None] + i[None, :]
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + R // 2, mask=mask, other=0.0).to(tl.float32)
        dtype = y_ptr.dtype.element_ty
        tl.store(to, (first * c - second * sn).to(dtype), mask=mask)
        tl.store(to + R // 2, (second * c + first * sn).to(dtype), mask=mask)

    if R < D:
        j = R + tl.arange(0, BLOCK_REST)
        mask_rest = mask_m[:, None] & (j < D)[None, :]
        rest = tl.load(x_ptrs[:, None] + j[None, :], mask=mask_rest, other=0.0)
        tl.store(y_ptrs[:, None] + j[None, :], rest, mask=mask_rest)


def _heuristic(dtype: torch.dtype, rows: int, D: int, R: int) -> Config:
    return {"BLOCK_M": max(1, TILE // triton.next_power_of_2(D)), "num_warps": 4}


def _space(dtype: torch.dtype, rows: int, D: int, R: int) -> list[Config]:
    """Tiles of 512 to 8192 elements."""
    tiles = [tile // triton.next_power_of_2(D) for tile in (512, 1024, 2048, 4096, 8192)]
    return grid(BLOCK_M=tuple(sorted({max(1, m) for m in tiles})), num_warps=(1, 2, 4, 8))


LAUNCH = Tunable("rope", ("rope",), ("dtype", "rows", "D", "R"), _heuristic, _space)


def _blocks(D: int, R: int) -> dict[str, int]:
    """What the head's sizes fix."""
    return {
        "BLOCK_HALF": max(1, triton.next_power_of_2(R // 2)),
        "BLOCK_REST": max(1, triton.next_power_of_2(D - R)),
    }


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:  # fmt: skip
    B, H, S, D = x.shape
    table_rows, C = cos.shape
    R = C if 2 * C > D else 2 * C
    seq_major = x.stride(1) < x.stride(2)
    if seq_major:
        y = torch.empty(B, S, H, D, dtype=x.dtype, device=x.device).transpose(1, 2)
    else:
        y = torch.empty(B, H, S, D, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if x.stride(3) != 1:
        x = x.contiguous()
    if cos.stride(1) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    stride_position_b = 0
    if position_ids is not None:
        position_ids = position_ids.contiguous()
        stride_position_b = S if position_ids.dim() == 2 else 0
    rows = B * H * S
    config = LAUNCH(x.device, x.dtype, bucket(rows, MOST_ROWS), D, R)
    _rope_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
        x, cos, sin, position_ids, y,
        x.stride(0), x.stride(1), x.stride(2),
        cos.stride(0), stride_position_b,
        H, S, rows, table_rows,
        D=D, R=R,
        SEQ_MAJOR=seq_major, INTERLEAVED=interleaved, DOUBLED=2 * C > D,
        HAS_POSITIONS=position_ids is not None, INVERSE=inverse,
        **_blocks(D, R),
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def rope_fwd(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """x [B, H, S, D], cos and sin [rows, R / 2 or R] -> y [B, H, S, D], dense."""
    return _rotate(x, cos, sin, position_ids, interleaved, False)


def rope_bwd(
    dy: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, interleaved: bool
) -> Tensor:
    """dy [B, H, S, D] -> dx [B, H, S, D], dense."""
    return _rotate(dy, cos, sin, position_ids, interleaved, True)


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    found = []
    for dtype, table, D, R, interleaved, positions, inverse in (
        ("*bf16", "*fp32", 64, 64, False, False, False),
        ("*bf16", "*bf16", 128, 128, False, True, True),
        ("*fp32", "*fp32", 80, 32, False, True, False),
        ("*bf16", "*fp32", 128, 128, True, False, False),
        ("*fp16", "*fp32", 96, 48, True, True, True),
    ):
        const = {
            "D": D, "R": R, "SEQ_MAJOR": not interleaved, "INTERLEAVED": interleaved,
            "DOUBLED": inverse, "HAS_POSITIONS": positions, "INVERSE": inverse, **_blocks(D, R),
            "BLOCK_M": TILE // triton.next_power_of_2(D),
        }  # fmt: skip
        signature = {"x_ptr": dtype, "cos_ptr": table, "sin_ptr": table}
        if positions:
            signature["position_ptr"] = "*i64"
        else:
            const["position_ptr"] = None
        signature |= {"y_ptr": dtype}
        signature |= {f"stride_{n}": "i64" for n in ("xb", "xh", "xs", "table", "position_b")}
        signature |= {"H": "i32", "S": "i32", "rows": "i64", "table_rows": "i32"}
        found.append((_rope_kernel, signature, const, {"num_warps": 4, "enable_fp_fusion": True}))
    return found
