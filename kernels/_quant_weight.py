"""The weight of quant_linear.py: tiles of it, decoded in registers; and the whole of it in a floating dtype, for
torch's matrix product, where many rows share what that costs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._quant_tiles import columns_of

SYMMETRIC, ZEROS, MINIMA, CODEBOOK = 0, 1, 2, 3
MOST = 1 << 28  # bytes of a dequantised weight at once
RUN = 4096  # columns of a row that a program decodes, at most


@triton.jit
def _codes(packed, opaque, LOW: tl.constexpr, BITS: tl.constexpr, LESS: tl.constexpr):
    """The code whose lowest bit is bit LOW of each of packed, less LESS: float32, exact.

    It becomes low bits of a float whose unit there is 1, and the rest of that float is taken away: a logical
    and a floating-point instruction, where a conversion of integers runs at a fraction of the rate.  opaque is 0,
    though the compiler does not know it: one instruction does not take two constants.
    """
    REST: tl.constexpr = 1 << (23 - LOW)
    bits = (packed & (((1 << BITS) - 1) << LOW)) | (opaque + ((150 - LOW) << 23))  # 150 - 127 = 23
    return bits.to(tl.float32, bitcast=True) - (REST + LESS) * 1.0


@triton.jit
def weight_parts(
    q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr,
    n, mask_n, g, k, k_end,
    stride_qn, stride_sn,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr,
    BLOCK_K: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rows n [R] of w at columns k .. k + BLOCK_K of group g -> float32 [R, BLOCK_K] and [R], whose product
    the weight is; of minima the first alone is, and the second is 1.

    NESTED: scales are codes of code_ptr [256], times block_ptr's, one to 256 of them, plus shift_ptr's; all of
    them lie together, stride_sn = G.

    g, k and k_end (the group's end) are [1] or [R], k even for 4 bits.  Rows masked off are 0; columns at or past
    k_end are unspecified, but finite where the scales are.  FULL: no tile passes its group's end.
    """
    PER: tl.constexpr = 8 // BITS  # codes in a byte
    j = tl.arange(0, BLOCK_K // PER)[None, :]
    mask = mask_n[:, None]
    if not FULL:
        mask = mask & (k[:, None] + j * PER < k_end[:, None])
    packed = tl.load(q_ptr + n[:, None] * stride_qn + (k // PER)[:, None] + j, mask=mask, other=0)
    packed = packed.to(tl.int32)
    opaque = tl.minimum(stride_qn, 0).to(tl.int32)
    at = n * stride_sn + g
    if NESTED:
        code = tl.load(code_ptr + tl.load(s_ptr + at, mask=mask_n, other=0).to(tl.int32))
        s = code * tl.load(block_ptr + at // 256, mask=mask_n, other=0.0) + tl.load(shift_ptr)
        s = tl.where(mask_n, s, 0.0)
    else:
        s = tl.load(s_ptr + at, mask=mask_n, other=0.0).to(tl.float32)
    if OFFSET == 3:
        if BITS == 4:
            packed = tl.interleave(packed & 15, packed >> 4)
        w = tl.load(o_ptr + packed)  # 64 bytes, which stay in L1
    else:
        LESS: tl.constexpr = 1 << (BITS - 1) if OFFSET == 0 else 0
        w = _codes(packed, opaque, 0, BITS, LESS)
        if BITS == 4:
            w = tl.interleave(w, _codes(packed, opaque, 4, BITS, LESS))
    if OFFSET == 1 or OFFSET == 2:
        o = tl.load(o_ptr + at, mask=mask_n, other=0.0).to(tl.float32)[:, None]
        if OFFSET == 1:
            w -= o
        else:
            w = s[:, None] * w + o
            s = tl.where(mask_n, 1.0, 0.0)
    return w, s


@triton.jit
def weight_tile(
    q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr,
    n, mask_n, g, k, k_end,
    stride_qn, stride_sn,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr,
    BLOCK_K: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """weight_parts' arguments -> the weight [R, BLOCK_K], float32."""
    w, s = weight_parts(
        q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, n, mask_n, g, k, k_end,
        stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
    )  # fmt: skip
    if OFFSET != 2:
        w *= s[:, None]
    return w


@triton.jit
def tile_columns(tile, tiles_per_group, group, BLOCK_K: tl.constexpr, FULL: tl.constexpr):
    """(g, k, k_end) of tiles of BLOCK_K columns, as weight_tile takes them."""
    g = tile // tiles_per_group
    k = g * group + (tile % tiles_per_group) * BLOCK_K
    if FULL:
        k = tl.multiple_of(k, BLOCK_K)
    return g, k, (g + 1) * group


@triton.jit
def _dequantize_kernel(
    q_ptr, s_ptr, o_ptr, w_ptr,
    stride_qn, stride_sn,
    K, group, tiles_per_group, tiles,
    BITS: tl.constexpr, OFFSET: tl.constexpr, FULL: tl.constexpr,
    TILES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TILES tiles of BLOCK_K columns of one row of w, each in one group."""
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    n = tl.program_id(0).to(tl.int64) + tl.zeros((TILES,), tl.int64)
    g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
    w = weight_tile(
        q_ptr, s_ptr, o_ptr, s_ptr, s_ptr, s_ptr, n, tile < tiles, g, k, k_end,
        stride_qn, stride_sn, BITS, OFFSET, False, BLOCK_K, FULL,
    )  # fmt: skip
    col = k[:, None] + tl.arange(0, BLOCK_K)[None, :]
    mask = (tile < tiles)[:, None]
    if not FULL:
        mask = mask & (col < k_end[:, None])
    tl.store(w_ptr + n[:, None] * K + col, w, mask=mask)


def offset_of(
    scales: Tensor, zeros: Tensor | None, minima: Tensor | None, codebook: Tensor | None
) -> tuple[Tensor, int]:
    """What o_ptr is given, and which OFFSET it is."""
    if zeros is not None:
        return zeros.contiguous(), ZEROS
    if minima is not None:
        return minima.contiguous(), MINIMA
    if codebook is not None:
        return codebook.contiguous(), CODEBOOK
    return scales, SYMMETRIC


def plain_scales(scales: Tensor, nested: list[Tensor]) -> Tensor:
    """The scales [N, G] that codes of `nested` stand for, float32."""
    code, blocks, shift = nested
    found = code[scales.flatten().int()]
    each = blocks.repeat_interleave(256)[: found.numel()]
    return (found * each + shift).view(scales.shape)


def _dequantize_block(group: int, tiles_of: int) -> dict[str, Any]:
    """Constants of a launch, for a row of tiles_of groups."""
    block = columns_of(group, 128)
    tiles = triton.next_power_of_2(tiles_of * triton.cdiv(group, block))
    return {"BLOCK_K": block, "TILES": min(tiles, RUN // block), "FULL": group % block == 0}


def dequantized(
    bits: int, qweight: Tensor, scales: Tensor, offset: Tensor, kind: int, group: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """qweight [N, G * group * bits / 8] and scales [N, G], their last strides 1, offset_of's two, whose rows are as
    far apart as those of scales -> w [N, G * group], rounded once to dtype."""
    N, G = scales.shape
    w = scales.new_empty(N, G * group, dtype=dtype)
    if w.numel() == 0:
        return w
    block = _dequantize_block(group, G)
    per_group = triton.cdiv(group, block["BLOCK_K"])
    _dequantize_kernel[(N, triton.cdiv(G * per_group, block["TILES"]))](
        qweight, scales, offset, w,
        qweight.stride(0), scales.stride(0),
        w.shape[1], group, per_group, G * per_group,
        BITS=bits, OFFSET=kind, **block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return w


def by_rows(
    bits: int, qweight: Tensor, scales: Tensor, offset: Tensor, kind: int, group: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """(rows of the weight, these dequantised), as many at once as MOST bytes hold, one at least."""
    N, K = scales.shape[0], scales.shape[1] * group
    step = _step(K * dtype.itemsize)
    for n in range(0, N, step):
        rows = slice(n, n + step)
        theirs = offset if kind == CODEBOOK else offset[rows]
        yield (
            rows,
            dequantized(bits, qweight[rows], scales[rows], theirs, kind, group, dtype),
        )


def by_columns(
    bits: int, qweight: Tensor, scales: Tensor, offset: Tensor, kind: int, group: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """(columns of the weight, these dequantised), as many groups at once as MOST bytes hold, or as many columns
    of one group, two at least."""
    N, G = scales.shape
    whole = MOST // (N * group * dtype.itemsize)  # groups
    width = group if whole else max(2, _step(N * dtype.itemsize) // 2 * 2)
    for g in range(0, G, max(1, whole)):
        groups = slice(g, min(g + max(1, whole), G))
        theirs = offset if kind == CODEBOOK else offset[:, groups]
        first, last = g * group, groups.stop * group
        step = last - first if whole else width
        for k in range(first, last, step):
            columns = slice(k, min(k + step, last))
            codes = qweight[:, columns.start * bits // 8 : columns.stop * bits // 8]
            of_group = group if whole else columns.stop - columns.start
            yield (
                columns,
                dequantized(bits, codes, scales[:, groups], theirs, kind, of_group, dtype),
            )


def _step(nbytes: int) -> int:
    """Rows of nbytes that MOST holds: of many a multiple of 128, which keeps tiles whole and addresses even."""
    step = MOST // nbytes
    return step // 128 * 128 if step >= 128 else max(1, step)


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what dequantized launches, to compile offline."""
    sizes = ("stride_qn", "stride_sn", "K", "group", "tiles_per_group", "tiles")
    options = {"num_warps": 4, "enable_fp_fusion": True}
    found = []
    for dtype, bits, kind, group in (
        ("bf16", 4, ZEROS, 128),
        ("bf16", 4, CODEBOOK, 64),
        ("fp16", 8, SYMMETRIC, 4096),
        ("bf16", 4, MINIMA, 32),
    ):
        o = "*fp32" if kind == CODEBOOK else "*fp16"
        signature = {"q_ptr": "*u8", "s_ptr": "*fp16", "o_ptr": o, "w_ptr": f"*{dtype}"}
        signature |= dict.fromkeys(sizes, "i32")
        constants = {"BITS": bits, "OFFSET": kind, **_dequantize_block(group, 4096 // group)}
        found.append((_dequantize_kernel, signature, constants, options))
    return found
