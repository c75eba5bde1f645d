"""h = x + residual, rounded to their dtype;  y = rms_norm(h).

Backward is rms_norm's at h, plus the gradient that reached h: one gradient for x and residual.
M rows (tokens), N columns (features).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Tunable, bucket, row_warps
from .rms_norm import (
    LOOP_BLOCK,
    MOST_COLUMNS,
    MOST_ROWS,
    ROWS_KEYS,
    TILE,
    WHOLE_FWD,
    bwd_rows,
    columns,
    columns_space,
    normalise_rows,
    rows_of,
    scale_tile,
    whole_rows,
    whole_rows_space,
)


@triton.jit
def _add_rms_norm_fwd_kernel(
    x_ptr, res_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr,
    stride_xm, stride_resm,
    M, N, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_W: tl.constexpr,
):  # fmt: skip
    """Add and normalise BLOCK_M whole rows."""
    # int64: row * stride passes 2^31 for long, wide activations
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    res = tl.load(res_ptr + rows[:, None] * stride_resm + cols[None, :], mask=mask, other=0.0)
    h = (x.to(tl.float32) + res.to(tl.float32)).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + rows[:, None] * N + cols[None, :], h, mask=mask)
    h = h.to(tl.float32)
    normalise_rows(h, mask, rows, cols, w_ptr, y_ptr, rstd_ptr, M, N, eps, offset, HAS_W)


@triton.jit
def _add_rms_norm_fwd_loop_kernel(
    x_ptr, res_ptr, w_ptr, y_ptr, h_ptr, rstd_ptr,
    stride_xm, stride_resm,
    N, eps, offset,
    BLOCK_N: tl.constexpr, HAS_W: tl.constexpr,
):  # fmt: skip
    """Add and normalise one row, tile by tile."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    res_ptr += row * stride_resm
    y_ptr += row * N
    h_ptr += row * N
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        res = tl.load(res_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        h = (x + res).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + cols, h, mask=cols < N)
        h = h.to(tl.float32)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        # x and residual again, not h: what other threads stored is not yet theirs to read
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        res = tl.load(res_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        h = (x + res).to(h_ptr.dtype.element_ty).to(tl.float32)
        scale_tile(h, rstd, cols, w_ptr, y_ptr, N, offset, HAS_W)
    tl.store(rstd_ptr + row, rstd)


OP = ("add_rms_norm",)
FWD = Tunable("add_rms_norm_fwd", OP, ROWS_KEYS, whole_rows, whole_rows_space)
FWD_LOOP = Tunable("add_rms_norm_fwd_loop", OP, ("dtype", "N"), columns, columns_space)


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [..., N], weight [N] -> y, h [..., N] contiguous, rstd [...] float32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, h, rstd
    w = x if weight is None else weight.contiguous()
    x, residual = rows_of(x), rows_of(residual)
    M, N = x.shape
    if N <= WHOLE_FWD:
        BLOCK_N = triton.next_power_of_2(N)
        config = FWD(x.device, x.dtype, bucket(M, MOST_ROWS), BLOCK_N)
        _add_rms_norm_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
            x, residual, w, y, h, rstd,
            x.stride(0), residual.stride(0),
            M, N, eps, offset,
            BLOCK_N=BLOCK_N, HAS_W=weight is not None,
            **config, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _add_rms_norm_fwd_loop_kernel[(M,)](
            x, residual, w, y, h, rstd,
            x.stride(0), residual.stride(0),
            N, eps, offset,
            HAS_W=weight is not None,
            **FWD_LOOP(x.device, x.dtype, bucket(N, MOST_COLUMNS)), enable_fp_fusion=True,
        )  # fmt: skip
    return y, h, rstd


def add_rms_norm_bwd(
    dy: Tensor,
    dresidual: Tensor,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dy, dresidual, h [..., N], weight [N], rstd [...] -> dx [..., N] (x's and residual's), dw [N]."""
    return bwd_rows(dy, dresidual, h, weight, rstd, offset, weight_grad)


def variants():
    """Each kernel at its shipped configurations: narrow, middle and widest rows."""
    signature = {"x_ptr": "*bf16", "res_ptr": "*bf16", "w_ptr": "*fp32", "y_ptr": "*bf16"}
    signature |= {"h_ptr": "*bf16", "rstd_ptr": "*fp32", "stride_xm": "i32", "stride_resm": "i32"}
    scalars = {"N": "i32", "eps": "fp32", "offset": "fp32"}
    found = [
        (_add_rms_norm_fwd_kernel, signature | {"M": "i32"} | scalars,
         {"BLOCK_M": m, "BLOCK_N": n, "HAS_W": True},
         {"num_warps": row_warps(m * n), "enable_fp_fusion": True})
        for m, n in [(TILE // 64, 64), (1, 2048), (1, WHOLE_FWD)]
    ]  # fmt: skip
    found.append((_add_rms_norm_fwd_loop_kernel, signature | scalars,
                  {"BLOCK_N": LOOP_BLOCK, "HAS_W": True},
                  {"num_warps": row_warps(LOOP_BLOCK), "enable_fp_fusion": True}))  # fmt: skip
    return found
