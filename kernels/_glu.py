"""The gated linear units' rows:  y = f(gate) up,  dgate = dy up f'(gate),  dup = dy f(gate).

M rows (tokens), N columns (features).  Arithmetic is float32 whatever the dtype.  gate and up may be
the halves of one packed tensor: only their rows are strided.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, Tunable, bucket, grid

TILE = 2048  # elements a program: narrow rows are batched, wide rows are split
MAX_BLOCK_N = 1024
MOST = 16384  # rows, and columns, from which more make no difference


@triton.jit
def _act(g, ACT: tl.constexpr):
    """f(g) and f'(g)."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        value = g * s
        slope = s * (1.0 + g * (1.0 - s))
    elif ACT == "gelu_tanh":
        # g/2 (1 + tanh z) = g s(2z), z = sqrt(2/pi) (g + 0.044715 g^3).  s(1 - s) is 0 well inside
        # +-64, and g^2 there finite: no 0 * inf for a large finite g; comparisons keep a nan
        near = tl.where(g > 64.0, 64.0, tl.where(g < -64.0, -64.0, g))
        square = near * near
        z = near * (1.5957691216057308 + 0.07135481627260025 * square)
        s = tl.sigmoid(z)
        value = g * s
        # s(-z), not 1 - s: no cancellation
        slope = s + g * s * tl.sigmoid(-z) * (1.5957691216057308 + 0.21406444881780076 * square)
    else:
        phi = 0.5 * (1.0 + tl.math.erf(g * 0.7071067811865476))
        value = g * phi
        slope = phi + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    return value, slope


@triton.jit
def _glu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr,
    stride_gm, stride_um, stride_ym,
    M, N,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # int64: row * stride passes 2^31 for long, wide activations
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    gate = tl.load(gate_ptr + rows * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = _act(gate, ACT)
    y = value * up
    tl.store(y_ptr + rows * stride_ym + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    stride_dym, stride_gm, stride_um, stride_dgm, stride_dum,
    M, N,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    dy = tl.load(dy_ptr + rows * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = _act(gate, ACT)
    dgate, dup = dy * up * slope, dy * value
    tl.store(dgate_ptr + rows * stride_dgm + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + rows * stride_dum + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def _rows(x: Tensor) -> Tensor:
    """x as [M, N] with unit stride along N: a view where one stride steps through the rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _halves(packed: Tensor) -> tuple[Tensor, Tensor]:
    half = packed.shape[-1] // 2
    return packed[..., :half], packed[..., half:]


def _heuristic(dtype: torch.dtype, M: int, N: int) -> Config:
    BLOCK_N = min(N, MAX_BLOCK_N)
    return {"BLOCK_M": TILE // BLOCK_N, "BLOCK_N": BLOCK_N, "num_warps": 4}


def _space(dtype: torch.dtype, M: int, N: int) -> list[Config]:
    """Tiles of 1024 to 8192 elements."""
    found = []
    for BLOCK_N in sorted({min(N, width) for width in (256, 512, 1024, 2048, 4096)}):
        rows = tuple(tile // BLOCK_N for tile in (1024, 2048, 4096, 8192) if tile >= BLOCK_N)
        found += grid(BLOCK_M=rows, BLOCK_N=(BLOCK_N,), num_warps=(2, 4, 8))
    return found


KEYS = ("dtype", "M", "N")
FWD = Tunable("glu_fwd", ("swiglu", "geglu"), KEYS, _heuristic, _space)
BWD = Tunable("glu_bwd", ("swiglu", "geglu"), KEYS, _heuristic, _space)


def _launch(kernel: triton.JITFunction, tunable: Tunable, tensors: list[Tensor], act: str) -> None:
    first = tensors[0]
    tensors = [_rows(t) for t in tensors]
    M, N = tensors[0].shape
    config = tunable(first.device, first.dtype, bucket(M, MOST), bucket(N, MOST))
    kernel[(triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]))](
        *tensors,
        *(t.stride(0) for t in tensors),
        M, N,
        ACT=act, **config, enable_fp_fusion=True,
    )  # fmt: skip


def glu_fwd(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """gate, up [..., N], or gate [..., 2 N] -> y [..., N]."""
    g, u = _halves(gate) if up is None else (gate, up)
    y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    if y.numel():
        _launch(_glu_fwd_kernel, FWD, [g, u, y], act)
    return y


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dy, gate, up [..., N] -> dgate, dup [..., N]."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dy.numel():
        _launch(_glu_bwd_kernel, BWD, [dy, gate, up, dgate, dup], act)
    return dgate, dup


def glu_packed_bwd(dy: Tensor, gate_up: Tensor, act: str) -> Tensor:
    """dy [..., N], gate_up [..., 2 N] -> dgate_up [..., 2 N]."""
    d = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if dy.numel():
        _launch(_glu_bwd_kernel, BWD, [dy, *_halves(gate_up), *_halves(d)], act)
    return d


def glu_variants(act: str) -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    found = []
    for dtype in ("*bf16", "*fp32"):
        for block_n in (64, MAX_BLOCK_N):
            const = {"ACT": act, "BLOCK_M": TILE // block_n, "BLOCK_N": block_n}
            for kernel in (_glu_fwd_kernel, _glu_bwd_kernel):
                names = [n for n in kernel.arg_names if n not in const]
                signature = {
                    n: dtype if n.endswith("_ptr") else "i64" if n.startswith("stride") else "i32"
                    for n in names
                }
                found.append((kernel, signature, const, {"num_warps": 4, "enable_fp_fusion": True}))
    return found
