"""RMSNorm:  y[m, n] = x[m, n] rstd[m] (offset + w[n]),  rstd[m] = (mean_n x[m, n]^2 + eps)^(-1/2).

Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.  With xhat = x rstd and g = dy (offset + w),
    dx = rstd (g - xhat mean_n(g xhat)),    dw = sum_m dy xhat.
M rows (tokens), N columns (features).  Arithmetic and statistics are float32 whatever the dtypes;
y and dx have x's dtype, dw the weight's.  Rows up to WHOLE_FWD or WHOLE_BWD columns stay in
registers and are read once; wider rows are walked in tiles, and read twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, Tunable, bucket, grid, row_warps

WHOLE_FWD = 16384  # 32 float32 a thread with 16 warps
WHOLE_BWD = 4096  # backward holds x, dy, w and the dw sum at once: 8192 spills on sm_90
TILE = 2048  # elements a program takes at once where rows are narrow: it takes several
LOOP_BLOCK = 4096  # columns a program takes at once where rows are wide: 8192 spills
# Partial sums of dw.  Fixed, not the number of SMs: dw is the same bit for bit wherever the same
# configuration is chosen.
DW_PROGRAMS = 256


@triton.jit
def normalise_rows(
    x, mask, rows, cols,
    w_ptr, y_ptr, rstd_ptr,
    M, N, eps, offset,
    HAS_W: tl.constexpr,
):  # fmt: skip
    """Store y and rstd of whole rows x [BLOCK_M, BLOCK_N], float32 and 0 where masked."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)  # [BLOCK_M]
    y = x * rstd[:, None]
    if HAS_W:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
        y = y * w[None, :]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def scale_tile(x, rstd, cols, w_ptr, y_ptr, N, offset, HAS_W: tl.constexpr):
    """Store y of one row's tile x [BLOCK_N], float32."""
    y = x * rstd
    if HAS_W:
        y *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr,
    stride_xm,
    M, N, eps, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_W: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK_M whole rows."""
    # int64: row * stride passes 2^31 for long, wide activations
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    normalise_rows(x, mask, rows, cols, w_ptr, y_ptr, rstd_ptr, M, N, eps, offset, HAS_W)


@triton.jit
def _rms_norm_fwd_loop_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr,
    stride_xm,
    N, eps, offset,
    BLOCK_N: tl.constexpr, HAS_W: tl.constexpr,
):  # fmt: skip
    """Normalise one row, tile by tile."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * N
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        scale_tile(x, rstd, cols, w_ptr, y_ptr, N, offset, HAS_W)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, dres_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr,
    stride_dym, stride_dresm, stride_xm,
    M, N, offset, tiles_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_W: tl.constexpr, HAS_DW: tl.constexpr, HAS_DRES: tl.constexpr,
):  # fmt: skip
    """Walk tiles_per_program tiles of BLOCK_M whole rows; keep their sum of dw in registers."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    if HAS_W:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
    if HAS_DW:
        dw = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(tiles_per_program):
        rows = (pid * tiles_per_program + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_xm + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        xhat = x.to(tl.float32) * rstd
        g = dy.to(tl.float32)
        if HAS_DW:
            dw += tl.sum(g * xhat, axis=0)
        if HAS_W:
            g = g * w[None, :]
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1) / N)[:, None])
        if HAS_DRES:
            dres_ptrs = dres_ptr + rows[:, None] * stride_dresm + cols[None, :]
            dx += tl.load(dres_ptrs, mask=mask, other=0.0).to(tl.float32)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * N + cols[None, :], dx, mask=mask)
    if HAS_DW:
        tl.store(dw_ptr + pid * N + cols, dw, mask=cols < N)


@triton.jit
def _rms_norm_dx_loop_kernel(
    dy_ptr, dres_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr,
    stride_dym, stride_dresm, stride_xm,
    N, offset,
    BLOCK_N: tl.constexpr, HAS_W: tl.constexpr, HAS_DRES: tl.constexpr,
):  # fmt: skip
    """dx of one row, tile by tile."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_dym
    dres_ptr += row * stride_dresm
    x_ptr += row * stride_xm
    dx_ptr += row * N
    rstd = tl.load(rstd_ptr + row)
    dots = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.load(dy_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        if HAS_W:
            g *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
        dots += g * (tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) * rstd)
    mean = tl.sum(dots, axis=0) / N
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.load(dy_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        if HAS_W:
            g *= tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
        xhat = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) * rstd
        dx = rstd * (g - xhat * mean)
        if HAS_DRES:
            dx += tl.load(dres_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        tl.store(dx_ptr + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _rms_norm_dw_loop_kernel(
    dy_ptr, x_ptr, rstd_ptr, dw_ptr,
    stride_dym, stride_xm,
    M, N, rows_per_program,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of dw over rows_per_program rows of one tile of columns."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(pid * rows_per_program, min((pid + 1) * rows_per_program, M)):
        x = tl.load(x_ptr + row * stride_xm + cols, mask=cols < N, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=cols < N, other=0.0).to(tl.float32)
        dw += dy * (x * tl.load(rstd_ptr + row))
    tl.store(dw_ptr + pid * N + cols, dw, mask=cols < N)


def rows_of(x: Tensor) -> Tensor:
    """x [..., N] as [M, N] with adjacent columns: a view where its strides allow one."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def row_tile(M: int, N: int) -> tuple[int, int]:
    """BLOCK_M, BLOCK_N of a program that takes whole rows."""
    BLOCK_N = triton.next_power_of_2(N)
    return min(triton.next_power_of_2(M), max(1, TILE // BLOCK_N)), BLOCK_N


def whole_rows(dtype: torch.dtype, M: int, BLOCK_N: int) -> Config:
    """The configuration of a kernel that keeps BLOCK_M whole rows in registers."""
    BLOCK_M, _ = row_tile(M, BLOCK_N)
    return {"BLOCK_M": BLOCK_M, "num_warps": row_warps(BLOCK_M * BLOCK_N)}


def whole_rows_space(dtype: torch.dtype, M: int, BLOCK_N: int) -> list[Config]:
    """Tiles of 512 to 8192 elements, or one row; 1 to 64 elements a thread."""
    rows = {min(M, max(1, tile // BLOCK_N)) for tile in (512, 1024, 2048, 4096, 8192)}
    found = grid(BLOCK_M=tuple(sorted(rows)), num_warps=(1, 2, 4, 8, 16, 32))
    threads = ((c, 32 * c["num_warps"], c["BLOCK_M"] * BLOCK_N) for c in found)
    return [c for c, n, tile in threads if n <= max(32, tile) <= max(32, 64 * n)]


def columns(dtype: torch.dtype, N: int) -> Config:
    """The configuration of a kernel that walks a row, or rows, in tiles of BLOCK_N columns."""
    return {"BLOCK_N": LOOP_BLOCK, "num_warps": row_warps(LOOP_BLOCK)}


def dw_columns(dtype: torch.dtype, N: int) -> Config:
    return {"BLOCK_N": TILE, "num_warps": row_warps(TILE)}


def columns_space(dtype: torch.dtype, N: int) -> list[Config]:
    return grid(BLOCK_N=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16, 32))


MOST_ROWS = 8192  # rows from which more make no difference
MOST_COLUMNS = 1 << 17
ROWS_KEYS = ("dtype", "M", "BLOCK_N")
BOTH = ("rms_norm", "add_rms_norm")
FWD = Tunable("rms_norm_fwd", ("rms_norm",), ROWS_KEYS, whole_rows, whole_rows_space)
FWD_LOOP = Tunable("rms_norm_fwd_loop", ("rms_norm",), ("dtype", "N"), columns, columns_space)
BWD = Tunable("rms_norm_bwd", BOTH, ROWS_KEYS, whole_rows, whole_rows_space)
DX_LOOP = Tunable("rms_norm_dx_loop", BOTH, ("dtype", "N"), columns, columns_space)
DW_LOOP = Tunable("rms_norm_dw_loop", BOTH, ("dtype", "N"), dw_columns, columns_space)


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """x [..., N], weight [N] -> y [..., N] contiguous, rstd [...] float32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, rstd
    rows = rows_of(x)
    w = x if weight is None else weight.contiguous()
    M, N = rows.shape
    if N <= WHOLE_FWD:
        BLOCK_N = triton.next_power_of_2(N)
        config = FWD(x.device, x.dtype, bucket(M, MOST_ROWS), BLOCK_N)
        _rms_norm_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]),)](
            rows, w, y, rstd,
            rows.stride(0),
            M, N, eps, offset,
            BLOCK_N=BLOCK_N, HAS_W=weight is not None,
            **config, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _rms_norm_fwd_loop_kernel[(M,)](
            rows, w, y, rstd,
            rows.stride(0),
            N, eps, offset,
            HAS_W=weight is not None,
            **FWD_LOOP(x.device, x.dtype, bucket(N, MOST_COLUMNS)), enable_fp_fusion=True,
        )  # fmt: skip
    return y, rstd


def bwd_rows(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dx [..., N], plus dresidual where given, and dw [N] (or [0] where not asked for)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    has_dw = weight_grad and weight is not None
    if x.numel() == 0:
        return dx, torch.zeros_like(weight) if has_dw else x.new_empty(0)
    dy, x = rows_of(dy), rows_of(x)
    dres = dy if dresidual is None else rows_of(dresidual)
    w = x if weight is None else weight.contiguous()
    M, N = x.shape
    BLOCK_N, wide = triton.next_power_of_2(N), bucket(N, MOST_COLUMNS)
    config = {"BLOCK_M": 1}
    if N <= WHOLE_BWD:
        config = BWD(x.device, x.dtype, bucket(M, MOST_ROWS), BLOCK_N)
    tiles = triton.cdiv(M, config["BLOCK_M"])
    per_program = triton.cdiv(tiles, DW_PROGRAMS) if has_dw else 1
    programs = triton.cdiv(tiles, per_program)
    partial = rstd
    if has_dw:
        partial = torch.empty((programs, N), dtype=torch.float32, device=x.device)
    if N <= WHOLE_BWD:
        _rms_norm_bwd_kernel[(programs,)](
            dy, dres, x, w, rstd, dx, partial,
            dy.stride(0), dres.stride(0), x.stride(0),
            M, N, offset, per_program,
            BLOCK_N=BLOCK_N,
            HAS_W=weight is not None, HAS_DW=has_dw, HAS_DRES=dresidual is not None,
            **config, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        _rms_norm_dx_loop_kernel[(M,)](
            dy, dres, x, w, rstd, dx,
            dy.stride(0), dres.stride(0), x.stride(0),
            N, offset,
            HAS_W=weight is not None, HAS_DRES=dresidual is not None,
            **DX_LOOP(x.device, x.dtype, wide), enable_fp_fusion=True,
        )  # fmt: skip
        if has_dw:
            config = DW_LOOP(x.device, x.dtype, wide)
            _rms_norm_dw_loop_kernel[(programs, triton.cdiv(N, config["BLOCK_N"]))](
                dy, x, rstd, partial,
                dy.stride(0), x.stride(0),
                M, N, per_program,
                **config, enable_fp_fusion=True,
            )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype) if has_dw else x.new_empty(0)


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """dy, x [..., N], weight [N], rstd [...] -> dx [..., N], dw [N] ([0] where not asked for)."""
    return bwd_rows(dy, None, x, weight, rstd, offset, weight_grad)


def variants():
    """Each kernel at its shipped configurations: narrow, middle and widest rows; every flag."""
    options = lambda block: {"num_warps": row_warps(block), "enable_fp_fusion": True}  # noqa: E731
    shapes = [(TILE // 64, 64), (1, 2048), (1, WHOLE_BWD), (1, WHOLE_FWD)]
    fwd = {"x_ptr": "*bf16", "w_ptr": "*fp32", "y_ptr": "*bf16", "rstd_ptr": "*fp32"}
    fwd |= {"stride_xm": "i32"}
    scalars = {"N": "i32", "eps": "fp32", "offset": "fp32"}
    found = [
        (_rms_norm_fwd_kernel, fwd | {"M": "i32"} | scalars,
         {"BLOCK_M": m, "BLOCK_N": n, "HAS_W": True}, options(m * n))
        for m, n in shapes
    ]  # fmt: skip
    found.append((_rms_norm_fwd_loop_kernel, fwd | scalars,
                  {"BLOCK_N": LOOP_BLOCK, "HAS_W": True}, options(LOOP_BLOCK)))  # fmt: skip
    for dtype in ("fp32", "bf16", "fp16"):
        ptr = f"*{dtype}"
        dx = {"dy_ptr": ptr, "dres_ptr": ptr, "x_ptr": ptr, "w_ptr": ptr, "rstd_ptr": "*fp32"}
        dx |= {"dx_ptr": ptr}
        strides = {"stride_dym": "i32", "stride_dresm": "i32", "stride_xm": "i32"}
        rows = {"M": "i32", "N": "i32", "offset": "fp32", "tiles_per_program": "i32"}
        found += [
            (_rms_norm_bwd_kernel, dx | {"dw_ptr": "*fp32"} | strides | rows,
             {"BLOCK_M": m, "BLOCK_N": n, "HAS_W": True, "HAS_DW": d, "HAS_DRES": not d},
             options(m * n))
            for m, n in shapes[:3] for d in (True, False)
        ]  # fmt: skip
        found.append((_rms_norm_dx_loop_kernel, dx | strides | {"N": "i32", "offset": "fp32"},
                      {"BLOCK_N": LOOP_BLOCK, "HAS_W": True, "HAS_DRES": True},
                      options(LOOP_BLOCK)))  # fmt: skip
        found.append((_rms_norm_dw_loop_kernel,
                      {"dy_ptr": ptr, "x_ptr": ptr, "rstd_ptr": "*fp32", "dw_ptr": "*fp32",
                       "stride_dym": "i32", "stride_xm": "i32", "M": "i32", "N": "i32",
                       "rows_per_program": "i32"}, {"BLOCK_N": TILE}, options(TILE)))  # fmt: skip
    return found
