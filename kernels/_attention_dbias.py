"""The gradient of attention's bias:  dS = P (dP - rowsum(P dP) + dlse), summed over what the bias is broadcast
over: batches, heads, queries, keys.

One program owns each tile of the bias and goes through all that share it in turn: no atomics, and no dS in
memory but where the bias itself is as large.  Statistics of the rows come from _attention_bwd.py's dq kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import Blocks
from ._tile import (
    BIASED,
    Options,
    add_bias,
    by_head_dim,
    given,
    kept_share,
    key_range,
    load_rows,
    padded,
    plane,
    range_spans,
    row_words,
    scores,
    signature,
    spans,
    undropped,
    visible,
    within,
)
from ._tune import Config, split

PART = tl.constexpr(64)


@triton.jit
def _products(
    a_ptr, rows, stride_a, S, b_ptr, cols, stride_b, T, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """a bᵀ [rows, cols], by few dims at a time: a whole head's of float32 leave no registers."""
    DIMS: tl.constexpr = min(BLOCK_D, PART)
    sums = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for d in tl.static_range(0, HEAD_DIM, DIMS):
        a = load_rows(a_ptr + d, rows, stride_a, S, HEAD_DIM - d, DIMS)
        b = load_rows(b_ptr + d, cols, stride_b, T, HEAD_DIM - d, DIMS)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    return sums


@triton.jit
def _ds(
    q_ptr, k_ptr, v_ptr, bias, dout_ptr, stats_ptr, words, stride_qs, stride_kt, stride_vt, stride_dos,
    rows, cols, lo, hi, S, T, softcap, scale, dropout,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dS of rows and cols of one head."""
    products = _products(q_ptr, rows, stride_qs, S, k_ptr, cols, stride_kt, T, HEAD_DIM, BLOCK_D)
    s, _ = scores(products, scale, softcap, SOFTCAP)
    s = add_bias(s, bias, rows, cols, S, T, False, True)
    seen = visible(cols[None, :], lo[:, None], hi[:, None], T, True) & (rows < S)[:, None]
    s = tl.where(seen, s, -float("inf"))
    stats_ptr += rows
    m = tl.load(stats_ptr, mask=rows < S, other=0.0)
    norm = tl.load(stats_ptr + S, mask=rows < S, other=0.0)
    mean = tl.load(stats_ptr + 2 * S, mask=rows < S, other=0.0)
    drift = tl.load(stats_ptr + 3 * S, mask=rows < S, other=0.0)
    p = tl.exp2(s - m[:, None]) * tl.abs(norm)[:, None]
    dp = _products(dout_ptr, rows, stride_dos, S, v_ptr, cols, stride_vt, T, HEAD_DIM, BLOCK_D)
    if DROPOUT:
        dp = undropped(dp * kept_share(dropout), words, cols, dropout, False, DROPOUT)
    return p * (tl.where((norm < 0)[:, None], 0.0, dp - mean[:, None]) - drift[:, None])


@triton.jit
def _attention_dbias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, begin_ptr, end_ptr, blocks_ptr, seed_ptr,
    dout_ptr, stats_ptr, dbias_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_lb, stride_lh, stride_ln,
    B, H, S, T, left, right, softcap, scale, dropout, row_blocks, col_blocks,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    RANGES: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SIZE: tl.constexpr,
    OVER_B: tl.constexpr, OVER_H: tl.constexpr, OVER_S: tl.constexpr, OVER_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of dbias, or of its only row or column."""
    program = tl.program_id(0).to(tl.int64)
    at = program // (row_blocks * col_blocks)
    block = (program % (row_blocks * col_blocks)).to(tl.int32)
    first_row, first_col = block // col_blocks * BLOCK_M, block % col_blocks * BLOCK_N
    # the batches, heads, queries and keys that share the tile
    b0, b1, h0, h1 = 0, B, 0, H
    if not OVER_B and not OVER_H:
        b0, h0 = (at // H).to(tl.int32), (at % H).to(tl.int32)
    elif not OVER_B:
        b0 = at.to(tl.int32)
    elif not OVER_H:
        h0 = at.to(tl.int32)
    if not OVER_B:
        b1 = b0 + 1
    if not OVER_H:
        h1 = h0 + 1
    last_row = S if OVER_S else first_row + BLOCK_M
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range((b1 - b0) * (h1 - h0)):
        b = (b0 + n // (h1 - h0)).to(tl.int64)
        h = (h0 + n % (h1 - h0)).to(tl.int64)
        head = b * H + h
        q_h = q_ptr + b * stride_qb + h * stride_qh
        k_h = k_ptr + b * stride_kb + h // GROUP * stride_kh
        v_h = v_ptr + b * stride_vb + h // GROUP * stride_vh
        dout_h = dout_ptr + (b * S * H + h) * HEAD_DIM  # lies as [B, S, H, D]
        stats = stats_ptr + head * 4 * S
        bias = plane(bias_ptr, b, h, stride_bb, stride_bh, stride_bs, stride_bt, True)
        for first in range(first_row, last_row, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            words = row_words(seed_ptr, head * S + rows, DROPOUT)
            lo, hi = key_range(rows, b, begin_ptr, end_ptr, S, T, left, right, LEFT, RIGHT, RANGES)
            if RANGES:
                begin, _, _, end = range_spans(lo, hi, rows, S, T, BLOCK_N)
            else:
                begin, _, _, end = spans(
                    first, S, T, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N
                )  # fmt: skip
            if not OVER_T:  # of the keys that rows see those of this tile
                begin = max(begin, first_col)
                end = min(end, first_col + BLOCK_N)
            for start in range(begin, end, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                met = True
                if SIZE:
                    row = tl.full((), first // SIZE, tl.int64) * stride_ln
                    at_block = blocks_ptr + b * stride_lb + h * stride_lh + row
                    met = tl.load(at_block + start // SIZE) != 0
                if met:
                    acc += _ds(
                        q_h, k_h, v_h, bias, dout_h, stats, words, stride_qs, stride_kt, stride_vt,
                        H * HEAD_DIM, rows, cols, lo, hi, S, T, softcap, scale, dropout,
                        HEAD_DIM, SOFTCAP, DROPOUT, BLOCK_D,
                    )  # fmt: skip

    rows, cols = first_row + tl.arange(0, BLOCK_M), first_col + tl.arange(0, BLOCK_N)
    height, width = S, T
    if OVER_S:
        acc = tl.where((tl.arange(0, BLOCK_M) == 0)[:, None], tl.sum(acc, 0)[None, :], 0.0)
        height = 1
    if OVER_T:
        acc = tl.where((tl.arange(0, BLOCK_N) == 0)[None, :], tl.sum(acc, 1)[:, None], 0.0)
        width = 1
    to = (at * height + rows[:, None]) * width + cols[None, :]
    tl.store(dbias_ptr + to, acc, mask=(rows < height)[:, None] & (cols < width)[None, :])


# BLOCK_M, BLOCK_N, num_warps, num_stages by padded head dim
_HALF = {64: (64, 64, 8, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)}
_FLOAT32 = {64: (32, 16, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}


def heuristic(dtype: torch.dtype, BLOCK_D: int) -> Config:
    """No table has its like: the benchmark that is tuned by has no bias."""
    return by_head_dim(_FLOAT32 if dtype == torch.float32 else _HALF, BLOCK_D)


def attention_dbias(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, stats: Tensor, options: Options,
    ranges: tuple[Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """dbias of bias's shape, float32; dout lies dense as [B, S, H, D], q, k, v with dense rows."""
    (B, H, S, D), T = q.shape, k.shape[2]
    shape = (1,) * (4 - bias.dim()) + bias.shape
    dbias = q.new_zeros(shape, dtype=torch.float32)
    if dbias.numel() == 0 or not stats.numel() or T == 0:
        return dbias.view(bias.shape)
    over = [n == 1 for n in shape]
    flags = options.flags(S, T)
    config = within(heuristic(q.dtype, padded(D)), flags, padded(D))
    blocks, *steps = (None, 0, 0, 0)
    if options.blocks is not None:
        blocks, *steps = Blocks(options.blocks, options.block_size).bytes()
    row_blocks = 1 if over[2] else triton.cdiv(S, config["BLOCK_M"])
    col_blocks = 1 if over[3] else triton.cdiv(T, config["BLOCK_N"])
    kept = {name: flag for name, flag in flags.items() if name not in ("HAS_SINKS", "HAS_BIAS")}
    _attention_dbias_kernel[(shape[0] * shape[1] * row_blocks * col_blocks,)](
        q, k, v, options.bias, *ranges, blocks, options.seed, dout, stats, dbias,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *options.bias_strides(), *steps,
        B, H, S, T, *options.scalars(S, T), row_blocks, col_blocks,
        GROUP=H // k.shape[1], HEAD_DIM=D, BLOCK_D=padded(D), **kept, enable_fp_fusion=True,
        **{f"OVER_{axis}": one for axis, one in zip("BHST", over, strict=True)}, **config,
    )  # fmt: skip
    return dbias.view(bias.shape)


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []
    flags = {x: on for x, on in BIASED.items() if x not in ("HAS_SINKS", "HAS_BIAS")}
    for dtype in (torch.bfloat16, torch.float32):
        inputs = (
            dict.fromkeys(("q", "k", "v", "bias"), dtype)
            | dict.fromkeys(("begin", "end"), torch.int32)
            | {
                "blocks": torch.uint8,
                "seed": torch.int64,
                "dout": dtype,
                "stats": torch.float32,
                "dbias": torch.float32,
            }
        )
        types = signature(inputs) | dict.fromkeys(("B", "row_blocks", "col_blocks"), "i32")
        for D in (64, 128, 256):
            blocks, options = split(heuristic(dtype, D))
            for over in ((True, False, False, False), (True, False, True, False)):
                summed = {f"OVER_{axis}": one for axis, one in zip("BHST", over, strict=True)}
                fixed = {"GROUP": 4, "HEAD_DIM": D, **flags, "BLOCK_D": D, "stride_bt": 1} | summed
                theirs, none = given(types, flags)
                found.append((_attention_dbias_kernel, theirs, fixed | blocks | none, options))
    return found
