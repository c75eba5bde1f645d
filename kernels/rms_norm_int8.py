"""h = x + residual, rounded to their dtype;  rms_norm(h) in float32, as int8 codes and a scale a row.

M rows (tokens), N columns (features).  Rows up to WHOLE_FWD columns stay in registers and are read once; wider
rows are walked in tiles, and read three times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._int8 import codes_of, row_scale, size_of
from ._tune import Tunable, bucket, row_warps
from .rms_norm import (
    LOOP_BLOCK,
    MOST_COLUMNS,
    MOST_ROWS,
    ROWS_KEYS,
    TILE,
    WHOLE_FWD,
    columns,
    columns_space,
    rows_of,
    whole_rows,
    whole_rows_space,
)


@triton.jit
def _rms_norm_int8_kernel(
    x_ptr, res_ptr, w_ptr, codes_ptr, scale_ptr, h_ptr,
    stride_xm, stride_resm,
    M, N, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_W: tl.constexpr, HAS_RES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows."""
    # int64: row * stride passes 2^31 for long, wide activations
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    h = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    if HAS_RES:
        res = tl.load(res_ptr + rows[:, None] * stride_resm + cols[None, :], mask=mask, other=0.0)
        h = (h.to(tl.float32) + res.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * N + cols[None, :], h, mask=mask)
    h = h.to(tl.float32)
    y = h * tl.rsqrt(tl.sum(h * h, axis=1) / N + eps)[:, None]
    if HAS_W:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
        y = y * w[None, :]
    scale, inverse = row_scale(tl.max(size_of(y), axis=1))
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    codes = codes_of(y, inverse[:, None])
    tl.store(codes_ptr + rows[:, None] * N + cols[None, :], codes, mask=mask)


@triton.jit
def _sum_tile(x_ptr, res_ptr, cols, N, HAS_RES: tl.constexpr):
    """h of one row's tile, in its dtype.  Each pass adds again: what other threads stored is not yet
    theirs to read."""
    h = tl.load(x_ptr + cols, mask=cols < N, other=0.0)
    if HAS_RES:
        res = tl.load(res_ptr + cols, mask=cols < N, other=0.0)
        h = (h.to(tl.float32) + res.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return h


@triton.jit
def _normed_tile(
    x_ptr, res_ptr, w_ptr, rstd, cols, N, offset, HAS_W: tl.constexpr, HAS_RES: tl.constexpr
):
    y = _sum_tile(x_ptr, res_ptr, cols, N, HAS_RES).to(tl.float32) * rstd
    if HAS_W:
        y *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
    return y


@triton.jit
def _rms_norm_int8_loop_kernel(
    x_ptr, res_ptr, w_ptr, codes_ptr, scale_ptr, h_ptr,
    stride_xm, stride_resm,
    N, eps, offset,
    BLOCK_N: tl.constexpr, HAS_W: tl.constexpr, HAS_RES: tl.constexpr,
):  # fmt: skip
    """One row, tile by tile: its squares, its largest, its codes."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    res_ptr += row * stride_resm
    codes_ptr += row * N
    h_ptr += row * N
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        h = _sum_tile(x_ptr, res_ptr, cols, N, HAS_RES)
        if HAS_RES:
            tl.store(h_ptr + cols, h, mask=cols < N)
        h = h.to(tl.float32)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        y = _normed_tile(x_ptr, res_ptr, w_ptr, rstd, cols, N, offset, HAS_W, HAS_RES)
        largest = tl.maximum(largest, size_of(y))
    scale, inverse = row_scale(tl.max(largest, axis=0))
    tl.store(scale_ptr + row, scale)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        y = _normed_tile(x_ptr, res_ptr, w_ptr, rstd, cols, N, offset, HAS_W, HAS_RES)
        tl.store(codes_ptr + cols, codes_of(y, inverse), mask=cols < N)


OP = ("rms_norm_int8",)
WHOLE = Tunable("rms_norm_int8", OP, ROWS_KEYS, whole_rows, whole_rows_space)
LOOP = Tunable("rms_norm_int8_loop", OP, ("dtype", "N"), columns, columns_space)


def rms_norm_int8(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [..., N], weight [N] -> codes [..., N] int8, scales [...] float32, and h [..., N], or [0]
    without a residual; all contiguous."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    h = x.new_empty(0 if residual is None else x.shape)
    if x.numel() == 0:
        return codes, torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device), h
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    w = x if weight is None else weight.contiguous()
    x = rows_of(x)
    res = x if residual is None else rows_of(residual)
    M, N = x.shape
    given = {"HAS_W": weight is not None, "HAS_RES": residual is not None}
    if N <= WHOLE_FWD:
        BLOCK_N = triton.next_power_of_2(N)
        config = WHOLE(x.device, x.dtype, bucket(M, MOST_ROWS), BLOCK_N)
        _rms_norm_int8_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
            x, res, w, codes, scales, h,
            x.stride(0), res.stride(0),
            M, N, eps, offset,
            BLOCK_N=BLOCK_N, **given, **config, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        _rms_norm_int8_loop_kernel[(M,)](
            x, res, w, codes, scales, h,
            x.stride(0), res.stride(0),
            N, eps, offset,
            **given, **LOOP(x.device, x.dtype, bucket(N, MOST_COLUMNS)), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales, h


def variants():
    """Each kernel at its shipped configurations: narrow, middle and widest rows."""
    signature = {"x_ptr": "*bf16", "res_ptr": "*bf16", "w_ptr": "*fp32", "codes_ptr": "*i8"}
    signature |= {"scale_ptr": "*fp32", "h_ptr": "*bf16", "stride_xm": "i32", "stride_resm": "i32"}
    scalars = {"N": "i32", "eps": "fp32", "offset": "fp32"}
    given = {"HAS_W": True, "HAS_RES": True}
    found = [
        (_rms_norm_int8_kernel, signature | {"M": "i32"} | scalars,
         {"BLOCK_M": m, "BLOCK_N": n, **given},
         {"num_warps": row_warps(m * n), "enable_fp_fusion": False})
        for m, n in [(TILE // 64, 64), (1, 4096), (1, WHOLE_FWD)]
    ]  # fmt: skip
    found.append((_rms_norm_int8_loop_kernel, signature | scalars,
                  {"BLOCK_N": LOOP_BLOCK, **given},
                  {"num_warps": row_warps(LOOP_BLOCK), "enable_fp_fusion": False}))  # fmt: skip
    return found
