"""Linear with 4- or 8-bit weights:  y[m, n] = sum_k x[m, k] w[n, k] + bias[n], and dx = dy w.

With q the unsigned code and g = k // group,

    w[n, k] = scales[n, g] * (q[n, k] - zeros[n, g])      zero-points
    w[n, k] = scales[n, g] * q[n, k] + minima[n, g]       minima
    w[n, k] = scales[n, g] * codebook[q[n, k]]            a code book, of 4 bits
    w[n, k] = scales[n, g] * (q[n, k] - 2^(bits-1))       symmetric

Nested scales are codes of their own, looked up as they are read.

M rows (tokens), N output features, K input features, G = K / group groups in a row.  4-bit codes
lie two a byte along K, the even k in the low nibble.  The codes become float32 weights in
registers, as QuantTensor.dequantize makes them; sums are float32.  A few rows (is_gemv) multiply in
float32, a run of codes with x before their scale; above, the tensor cores take w and x in x's dtype
(float32 as three TF32 products).  Few
tiles share out K, and a second kernel adds their sums.  Where rows are many (DENSE), w is written in
x's dtype, and torch multiplies, unless torch.use_deterministic_algorithms asks it not to.

With activations "int8", x is replaced by sx * round(x / sx) in float32, sx = max|x| / 127 over each
32 columns of a row (over the group where that is no multiple of 32), ties to even: the integer dot
product of the CPU kernel up to float32 rounding.  On a GPU it exists to give the CPU's numbers.

Every sum of these kernels has a fixed order: results repeat bit for bit.  Torch's product repeats on one
stream, and adds as torch.backends.cuda.matmul lets it.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _quant_cuda
from ._quant_tiles import (
    DENSE,
    DENSE_DGRAD,
    DGRAD,
    GEMM,
    GEMV,
    MOST_FEATURES,
    MOST_ROWS,
    is_gemv,
)
from ._quant_weight import (
    CODEBOOK,
    MINIMA,
    SYMMETRIC,
    ZEROS,
    by_columns,
    by_rows,
    offset_of,
    plain_scales,
    tile_columns,
    weight_parts,
    weight_tile,
)
from ._tune import Tunable, bucket, split

ADDED = 1024  # outputs whose shares a program adds
DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _gemv_kernel(
    x_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, bias_ptr, y_ptr,
    stride_xm, stride_qn, stride_sn, stride_ym,
    M, N, group, tiles_per_group, tiles,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, FULL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of all M <= BLOCK_M rows, walking SPLIT tiles of BLOCK_K columns at a time."""
    R: tl.constexpr = BLOCK_N * SPLIT
    r = tl.arange(0, R)
    n_r = tl.program_id(0).to(tl.int64) * BLOCK_N + r // SPLIT
    m = tl.arange(0, BLOCK_M)[:, None, None]
    x_rows = x_ptr + m.to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_N, SPLIT), tl.float32)
    for step in range(0, tl.cdiv(tiles, SPLIT)):
        tile = step * SPLIT + r % SPLIT
        g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
        w, s = weight_parts(
            q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, n_r, (n_r < N) & (tile < tiles), g, k, k_end,
            stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
        )  # fmt: skip

        tile_x = step * SPLIT + tl.arange(0, SPLIT)
        _, start, end = tile_columns(tile_x, tiles_per_group, group, BLOCK_K, FULL)
        col = (start[:, None] + tl.arange(0, BLOCK_K)[None, :])[None, :, :]
        mask = (m < M) & (tile_x < tiles)[None, :, None]
        if not FULL:
            mask = mask & (col < end[None, :, None])
        x = tl.load(x_rows + col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, SPLIT, BLOCK_K]
        w = tl.reshape(w, (1, BLOCK_N, SPLIT, BLOCK_K))
        part = tl.sum(w * x[:, None, :, :], axis=3)  # [BLOCK_M, BLOCK_N, SPLIT]
        acc += tl.reshape(s, (1, BLOCK_N, SPLIT)) * part
    y = tl.sum(acc, axis=2)  # [BLOCK_M, BLOCK_N]

    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    m = tl.arange(0, BLOCK_M)
    to = y_ptr + m.to(tl.int64)[:, None] * stride_ym + n[None, :]
    tl.store(to, y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _gemm_kernel(
    x_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, bias_ptr, y_ptr,
    stride_xm, stride_qn, stride_sn, stride_ym,
    M, N, group, tiles_per_group, tiles,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, FULL: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """A BLOCK_N x BLOCK_M tile of w x^T: Hopper's tensor cores take their left operand from
    registers, where the weight has just been decoded, so the product is formed transposed.

    Of SHARES > 1, program_id(2) says which of K; y is [SHARES, M, N] then, without the bias.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    one = tl.zeros((1,), tl.int32)
    x_cols = x_ptr + m[None, :] * stride_xm + j[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, last = 0, tiles
    if SHARES > 1:
        share = tl.cdiv(tiles, SHARES)
        first = tl.program_id(2) * share
        last = tl.minimum(first + share, tiles)
        y_ptr += tl.program_id(2).to(tl.int64) * M * stride_ym
    for tile in range(first, last):
        g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
        w = weight_tile(
            q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, n, n < N, one + g, one + k, one + k_end,
            stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
        )  # fmt: skip
        mask = (m < M)[None, :]
        if not FULL:
            mask = mask & (k + j < k_end)[:, None]
        x = tl.load(x_cols + k, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_M]
        acc = tl.dot(w.to(DOT_DTYPE), x.to(DOT_DTYPE), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = y_ptr + m[:, None] * stride_ym + n[None, :]
    tl.store(to, tl.trans(acc), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _add_shares_kernel(
    shares_ptr, bias_ptr, y_ptr,
    M, N,
    SHARES: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK outputs of a row of y [M, N]: the sums [SHARES, M, N] in their order, and the bias."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    y = tl.zeros((BLOCK,), tl.float32)
    for share in tl.static_range(SHARES):
        y += tl.load(shares_ptr + (m + share * M) * N + n, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * N + n, y, mask=mask)


@triton.jit
def _dgrad_kernel(
    dy_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, dx_ptr,
    stride_dym, stride_qn, stride_sn, stride_dxm,
    M, N, group, tiles_per_group,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr, FULL: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M x BLOCK_K tile of dx = dy w, its columns in one group, walking N."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
    j = tl.arange(0, BLOCK_N)
    one = tl.zeros((1,), tl.int32)
    dy_rows = dy_ptr + m[:, None] * stride_dym + j[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        mask_n = start + j < N
        w = weight_tile(
            q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, start + j.to(tl.int64), mask_n, one + g, one + k, one + k_end,
            stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
        )  # fmt: skip
        dy = tl.load(dy_rows + start, mask=(m < M)[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(dy.to(DOT_DTYPE), w.to(DOT_DTYPE), acc, input_precision=PRECISION)
    col = k + tl.arange(0, BLOCK_K)
    to = dx_ptr + m[:, None] * stride_dxm + col[None, :]
    tl.store(to, acc, mask=(m < M)[:, None] & (col < k_end)[None, :])


@triton.jit
def _round_activations_kernel(
    x_ptr, out_ptr,
    stride_xm,
    rows, K, width, blocks_per_row,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x as its int8 codes times their scale, float32, for ROWS runs of `width` columns."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m, b = r // blocks_per_row, r % blocks_per_row
    mask_r = (r < rows)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    x_runs = x_ptr + (m * stride_xm + b * width)[:, None] + j
    out_runs = out_ptr + (m * K + b * width)[:, None] + j
    top = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(x_runs + start, mask=mask_r & (start + j < width), other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.abs(x), axis=1))
    scale = tl.div_rn(top, tl.full((ROWS,), 127.0, tl.float32))[:, None]
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)  # 2^-126: below, 1 / scale is inf
    safe = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, width, BLOCK):
        mask = mask_r & (start + j < width)
        x = tl.load(x_runs + start, mask=mask, other=0.0).to(tl.float32)
        # adding and taking away 1.5 * 2^23 leaves the nearest integer, ties to even
        code = (tl.div_rn(x, tl.broadcast_to(safe, x.shape)) + 12582912.0) - 12582912.0
        tl.store(out_runs + start, code * scale, mask=mask)


def _config(
    tunable: Tunable, x: Tensor, bits: int, group: int, M: int, N: int, K: int
) -> dict[str, Any]:
    """The tunable's choice, and FULL, which follows from it."""
    sizes = bucket(M, MOST_ROWS), bucket(N, MOST_FEATURES), bucket(K, MOST_FEATURES)
    config = tunable(x.device, x.dtype, bits, group, *sizes)
    return {**config, "FULL": group % config["BLOCK_K"] == 0}


def _narrow(config: dict[str, Any], kind: int) -> dict[str, Any]:
    """config, with half the rows of w where each weight is a load of its own, whose addresses would spill."""
    rows = config["BLOCK_N"]
    wide = (
        config["BLOCK_M"] * rows >= 128 * 128
        or rows * config.get("SPLIT", 0) * config["BLOCK_K"] > 8192
    )
    return {**config, "BLOCK_N": rows // 2} if wide and kind == CODEBOOK else config


def _rows(t: Tensor, M: int) -> Tensor:
    """t [..., C] as [M, C] with a last stride of 1."""
    t = t.reshape(M, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def _round_activations(x: Tensor, group: int) -> Tensor:
    """x [M, K] -> its int8-rounded value, float32 [M, K]."""
    M, K = x.shape
    width = 32 if group % 32 == 0 else group
    rows = M * (K // width)
    out = x.new_empty(M, K, dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(width))
    per_program = max(1, 1024 // block)
    _round_activations_kernel[(triton.cdiv(rows, per_program),)](
        x, out,
        x.stride(0),
        rows, K, width, K // width,
        BLOCK=block, ROWS=per_program,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _dot(dtype: torch.dtype) -> dict[str, Any]:
    precision = "tf32x3" if dtype == torch.float32 else "tf32"
    return {"DOT_DTYPE": DOT_DTYPES[dtype], "PRECISION": precision}


def _is_dense(way: Tunable, x: Tensor, bits: int, group: int, M: int, N: int, K: int) -> bool:
    few = M <= 8  # as many as no choice is worth a look-up for
    if few or not N or not K or torch.are_deterministic_algorithms_enabled():
        return False
    sizes = bucket(M, MOST_ROWS), bucket(N, MOST_FEATURES), bucket(K, MOST_FEATURES)
    return bool(way(x.device, x.dtype, bits, group, *sizes)["DENSE"])


def _linear(
    bits: int, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None,
    minima: Tensor | None, codebook: Tensor | None, nested: list[Tensor], bias: Tensor | None,
    activations: str,
) -> Tensor:  # fmt: skip
    """x [..., K], qweight [N, K * bits / 8], scales, zeros or minima [N, G], codebook [16], nested empty or
    Nested's three, bias [N] -> [..., N] of x's dtype.  activations is "float" or "int8"."""
    K, (N, G) = x.shape[-1], scales.shape
    y = x.new_empty(*x.shape[:-1], N)
    M = x.numel() // K if K else y.numel() // max(N, 1)
    if M == 0 or N == 0:
        return y
    group = K // G
    x, qweight, scales = _rows(x, M), qweight.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    offset, kind = offset_of(scales, zeros, minima, codebook)
    if activations == "int8" and K:
        x = _round_activations(x, group)
    if _quant_cuda.serves(x, bits, qweight, scales, offset, kind, bool(nested)):
        return _quant_cuda.linear(x, qweight, scales, zeros, minima, bias).view(y.shape)
    if _is_dense(DENSE, x, bits, group, M, N, K):
        scales = plain_scales(scales, nested) if nested else scales
        for rows, w in by_rows(bits, qweight, scales, offset, kind, group, x.dtype):
            out = y.view(M, N)[:, rows]
            if bias is None:
                torch.mm(x, w.t(), out=out)
            else:
                torch.addmm(bias[rows], x, w.t(), out=out)
            del w, out  # before the next is made
        return y
    constants: dict[str, Any] = {"BITS": bits, "OFFSET": kind, "NESTED": bool(nested)}
    programs: tuple[int, ...]
    to = y
    if is_gemv(x.dtype, M):
        config = _config(GEMV, x, bits, group, M, N, K)
        config = _narrow({**config, "BLOCK_M": triton.next_power_of_2(M)}, kind)
        programs = (triton.cdiv(N, config["BLOCK_N"]),)
        kernel = _gemv_kernel
    else:
        config = _narrow(_config(GEMM, x, bits, group, M, N, K), kind)
        blocks = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])
        programs = (*blocks, config["SHARES"])
        kernel = _gemm_kernel
        if config["SHARES"] > 1:
            to = x.new_empty(config["SHARES"], M, N, dtype=torch.float32)
        constants |= _dot(x.dtype)
    constants["HAS_BIAS"] = bias is not None and to is y  # else who adds the shares adds it
    per_group = triton.cdiv(group, config["BLOCK_K"])
    kernel[programs](
        x, qweight, scales, offset, *(nested or [scales] * 3), scales if bias is None else bias, to,
        x.stride(0), qweight.stride(0), scales.stride(0), N,
        M, N, group, per_group, G * per_group,
        **constants, **config, enable_fp_fusion=True,
    )  # fmt: skip
    if to is not y:
        _add_shares_kernel[(M, triton.cdiv(N, ADDED))](
            to, scales if bias is None else bias, y, M, N,
            SHARES=config["SHARES"], HAS_BIAS=bias is not None, BLOCK=ADDED, num_warps=4,
        )  # fmt: skip
    return y


def _dgrad(
    bits: int, dy: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None,
    minima: Tensor | None, codebook: Tensor | None, nested: list[Tensor],
) -> Tensor:  # fmt: skip
    """dy [..., N], the weight as _linear takes it -> dx [..., K] of dy's dtype."""
    N, G = scales.shape
    K = qweight.shape[1] * (8 // bits)
    dx = dy.new_empty(*dy.shape[:-1], K)
    M = dx.numel() // K if K else 0
    if M == 0 or K == 0:
        return dx
    group = K // G
    dy, qweight, scales = _rows(dy, M), qweight.contiguous(), scales.contiguous()
    offset, kind = offset_of(scales, zeros, minima, codebook)
    if _is_dense(DENSE_DGRAD, dy, bits, group, M, N, K):
        scales = plain_scales(scales, nested) if nested else scales
        for columns, w in by_columns(bits, qweight, scales, offset, kind, group, dy.dtype):
            torch.mm(dy, w, out=dx.view(M, K)[:, columns])
            del w
        return dx
    config = _config(DGRAD, dy, bits, group, M, N, K)
    per_group = triton.cdiv(group, config["BLOCK_K"])
    _dgrad_kernel[(triton.cdiv(M, config["BLOCK_M"]), G * per_group)](
        dy, qweight, scales, offset, *(nested or [scales] * 3), dx,
        dy.stride(0), qweight.stride(0), scales.stride(0), K,
        M, N, group, per_group,
        BITS=bits, OFFSET=kind, NESTED=bool(nested), **_dot(dy.dtype), **config, enable_fp_fusion=True,
    )  # fmt: skip
    return dx


linear_int4, linear_int8 = partial(_linear, 4), partial(_linear, 8)
linear_int4_dgrad, linear_int8_dgrad = partial(_dgrad, 4), partial(_dgrad, 8)


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    tables = ("code_ptr", "block_ptr", "shift_ptr")
    sizes = dict.fromkeys(("stride_qn", "stride_sn", "M", "N", "group", "tiles_per_group"), "i32")
    found: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = []
    for M, N, dtype, bits, kind, group, *rest in (
        (1, 4096, bf16, 4, ZEROS, 128),
        (1, 8192, bf16, 4, SYMMETRIC, 128),
        (2, 4096, bf16, 4, ZEROS, 128),
        (8, 4096, fp32, 8, MINIMA, 100),  # masked tiles
        (1, 8192, bf16, 4, CODEBOOK, 64),
        (1, 4096, bf16, 4, CODEBOOK, 64, True),
        (8, 4096, bf16, 4, SYMMETRIC, 32),
        (16, 4096, bf16, 4, ZEROS, 128),
        (64, 4096, fp16, 8, SYMMETRIC, 4096),
        (512, 4096, bf16, 4, ZEROS, 128),
        (512, 4096, bf16, 4, MINIMA, 32),
        (512, 4096, bf16, 4, CODEBOOK, 64),
        (512, 4096, bf16, 4, CODEBOOK, 64, True),
        (512, 4096, fp32, 4, SYMMETRIC, 32),
    ):
        t = f"*{names[dtype]}"
        nested = bool(rest)
        fixed: dict[str, Any] = {"BITS": bits, "OFFSET": kind, "NESTED": nested}
        weight = {"q_ptr": "*u8", "s_ptr": "*u8" if nested else "*fp16"}
        weight |= {"o_ptr": "*fp32" if kind == CODEBOOK else "*fp16"}
        weight |= dict.fromkeys(tables, "*fp32" if nested else weight["s_ptr"])
        forward = {"x_ptr": t, **weight, "bias_ptr": t, "y_ptr": t, **sizes}
        forward |= {"stride_xm": "i32", "stride_ym": "i32", "tiles": "i32"}
        sizes_of = dtype, bits, group, M, N, 4096
        if is_gemv(dtype, M):
            block, options = split(GEMV.heuristic(*sizes_of))
            block = _narrow({**block, "BLOCK_M": M}, kind)
            block["FULL"] = group % block["BLOCK_K"] == 0
            found.append((_gemv_kernel, forward, {**fixed, "HAS_BIAS": True, **block}, options))
            continue
        block, options = split(_narrow(GEMM.heuristic(*sizes_of), kind))
        block["FULL"] = group % block["BLOCK_K"] == 0
        fixed |= _dot(dtype)
        own = {"y_ptr": "*fp32"} if block["SHARES"] > 1 else {}
        fixed_to = {**fixed, "HAS_BIAS": block["SHARES"] == 1, **block}
        found.append((_gemm_kernel, forward | own, fixed_to, options))
        if M in (8, 64) or (M == 512 and group == 32):
            continue
        block, options = split(DGRAD.heuristic(*sizes_of))
        block["FULL"] = group % block["BLOCK_K"] == 0
        backward = {"dy_ptr": t, **weight, "dx_ptr": t, **sizes}
        backward |= {"stride_dym": "i32", "stride_dxm": "i32"}
        found.append((_dgrad_kernel, backward, {**fixed, **block}, options))
    rounding = {"x_ptr": "*bf16", "out_ptr": "*fp32"}
    rounding |= dict.fromkeys(("stride_xm", "rows", "K", "width", "blocks_per_row"), "i32")
    adding = {"shares_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32", "N": "i32"}
    constants = {"SHARES": 4, "HAS_BIAS": True, "BLOCK": ADDED}
    found.append((_add_shares_kernel, adding, constants, {"num_warps": 4}))
    options = {"num_warps": 4, "enable_fp_fusion": False}
    found.append((_round_activations_kernel, rounding, {"BLOCK": 32, "ROWS": 32}, options))
    return found
