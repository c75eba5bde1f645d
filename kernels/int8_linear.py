"""W8A8:  y[m, n] = (sum_k codes[m, k] (q[n, k] - 128)) row_scales[m] scales[n] + bias[n], the sum exact in int32.

M rows (tokens), N output features, K < 2^17 input features.  The weight's codes are unsigned, and are made signed
in registers; the product is formed transposed, as quant_linear.py's, whose left operand Hopper's tensor cores
take from there.  int8_rows makes the codes of x, a scale a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._int8 import codes_of, row_scale, size_of
from ._tune import Config, Tunable, bucket, fitted, grid, row_warps, split
from .rms_norm import rows_of

ROWS_BLOCK = 4096  # columns of a row that a program of int8_rows takes at once
MOST_ROWS = 4096  # rows, and
MOST_FEATURES = 32768  # features, from which more make no difference


@triton.jit
def _int8_rows_kernel(
    x_ptr, codes_ptr, scale_ptr,
    stride_xm,
    K,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row, tile by tile: its largest, then its codes."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    codes_ptr += row * K
    largest = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, size_of(x))
    scale, inverse = row_scale(tl.max(largest, axis=0))
    tl.store(scale_ptr + row, scale)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        tl.store(codes_ptr + cols, codes_of(x, inverse), mask=cols < K)


@triton.jit
def _int8_linear_kernel(
    x_ptr, x_scale_ptr, q_ptr, s_ptr, bias_ptr, y_ptr,
    stride_xm, stride_qn,
    M, N, K,
    HAS_BIAS: tl.constexpr, FULL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A BLOCK_N x BLOCK_M tile of w x^T.  FULL: BLOCK_K divides K."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    q_rows = q_ptr + n[:, None] * stride_qn + j[None, :]
    x_cols = x_ptr + m[None, :] * stride_xm + j[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for start in range(0, K, BLOCK_K):
        q_mask, x_mask = (n < N)[:, None], (m < M)[None, :]
        if not FULL:
            q_mask = q_mask & (start + j < K)[None, :]
            x_mask = x_mask & (start + j < K)[:, None]
        q = tl.load(q_rows + start, mask=q_mask, other=128)
        x = tl.load(x_cols + start, mask=x_mask, other=0)
        acc = tl.dot((q ^ 128).to(tl.int8, bitcast=True), x, acc, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    scale = tl.load(s_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = acc.to(tl.float32) * scale[:, None] * x_scale[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = y_ptr + m[:, None] * N + n[None, :]
    tl.store(to, tl.trans(y), mask=(m < M)[:, None] & (n < N)[None, :])


def _heuristic(dtype: torch.dtype, M: int, N: int, K: int) -> Config:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    if M <= 32:
        chosen = (16 if M <= 16 else 32, 64, 128, 4, 4)
    elif M <= 128:
        chosen = (64, 64, 128, 4, 4)
    else:
        chosen = (128, 128, 64, 8, 4)
    return dict(zip(names, chosen, strict=True))


def _space(dtype: torch.dtype, M: int, N: int, K: int) -> list[Config]:
    """Tiles of which a thread holds 128 sums at most, and whose stages fit the smallest shared memory."""
    found = grid(
        BLOCK_M=(16, 32, 64, 128, 256), BLOCK_N=(32, 64, 128, 256), BLOCK_K=(64, 128),
        num_warps=(4, 8), num_stages=(2, 3, 4, 5),
    )  # fmt: skip
    return [
        c
        for c in found
        if c["BLOCK_M"] <= max(64, M)
        if c["BLOCK_M"] * c["BLOCK_N"] <= 4096 * c["num_warps"]
        if (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * c["num_stages"] <= 96 << 10
    ]


KEYS = ("dtype", "M", "N", "K")
PRODUCT = Tunable("int8_linear", ("int8_linear",), KEYS, _heuristic, _space)


def _rows_block(K: int) -> Config:
    block = min(ROWS_BLOCK, triton.next_power_of_2(K))
    return {"BLOCK_K": block, "num_warps": row_warps(block)}


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes [..., K] int8, contiguous, scales [...] float32."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel() == 0:
        return codes, torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = rows_of(x)
    M, K = rows.shape
    _int8_rows_kernel[(M,)](
        rows, codes, scales,
        rows.stride(0),
        K,
        **_rows_block(K), enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scales


def int8_linear(
    codes: Tensor, row_scales: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """codes [..., K] int8, row_scales [...], qweight [N, K], scales [N, 1], bias [N] -> [..., N] of dtype."""
    N, K = qweight.shape
    y = codes.new_empty(*codes.shape[:-1], N, dtype=dtype)
    M = row_scales.numel()
    if M == 0 or N == 0:
        return y
    if K == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(y.shape))
    x, qweight = rows_of(codes), qweight.contiguous()
    sizes = bucket(M, MOST_ROWS), bucket(N, MOST_FEATURES), bucket(K, MOST_FEATURES)
    config = fitted(PRODUCT(codes.device, dtype, *sizes), K)
    programs = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])
    _int8_linear_kernel[programs](
        x, row_scales.contiguous(), qweight, scales.contiguous(),
        scales if bias is None else bias.contiguous(), y,
        x.stride(0), qweight.stride(0),
        M, N, K,
        HAS_BIAS=bias is not None,
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    signature = {"x_ptr": "*i8", "x_scale_ptr": "*fp32", "q_ptr": "*u8", "s_ptr": "*fp16"}
    signature |= {"bias_ptr": "*bf16", "y_ptr": "*bf16"}
    signature |= dict.fromkeys(("stride_xm", "stride_qn", "M", "N", "K"), "i32")
    for M, K in ((1, 4096), (64, 4096), (512, 4096), (512, 1000)):
        block, options = split(fitted(PRODUCT.heuristic(torch.bfloat16, M, 4096, 4096), K))
        constants = {"HAS_BIAS": True, **block}
        found.append((_int8_linear_kernel, signature, constants, options))
    rows = {
        "x_ptr": "*bf16",
        "codes_ptr": "*i8",
        "scale_ptr": "*fp32",
        "stride_xm": "i32",
        "K": "i32",
    }
    for K in (576, 4096):
        block, options = split(_rows_block(K))
        found.append((_int8_rows_kernel, rows, block, options | {"enable_fp_fusion": False}))
    return found
