"""out_t = sum_j w_tj y[rows_tj] over the k slots of a token, in float32; rows of -1 add nothing.

T tokens, K slots each, P = T K rows of y, N columns.  The forward is a program for a token's block of columns; the
backward one for a row of y, which only one slot reads:  dy = w dout,  dw = <dout, y>.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, Tunable, grid, row_warps, split

WHOLE = 4096  # columns of a program at most


@triton.jit
def _moe_combine_fwd_kernel(
    y_ptr, weights_ptr, rows_ptr, here_ptr, out_ptr, stride_y,
    P, N, TOP_K,
    HAS_HERE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.zeros((BLOCK_N,), tl.float32)
    most = P
    if HAS_HERE:
        most = tl.minimum(tl.load(here_ptr), P)
    for j in range(TOP_K):
        row = tl.load(rows_ptr + token * TOP_K + j)
        here = (row >= 0) & (row < most)
        w = tl.load(weights_ptr + token * TOP_K + j, mask=here, other=0.0).to(tl.float32)
        out += w * tl.load(y_ptr + row * stride_y + cols, mask=here & (cols < N), other=0.0).to(
            tl.float32
        )
    tl.store(out_ptr + token * N + cols, out, mask=cols < N)


@triton.jit
def _moe_combine_bwd_kernel(
    dout_ptr, y_ptr, weights_ptr, order_ptr, here_ptr, dy_ptr, dweights_ptr,
    stride_dout, stride_y, P, N, TOP_K, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order_ptr + row)
    known = (slot >= 0) & (slot < P)
    here = known & (row < tl.load(here_ptr))
    w = tl.load(weights_ptr + slot, mask=here, other=0.0).to(tl.float32)
    dout_ptr += slot // TOP_K * stride_dout
    y_ptr += row * stride_y
    dy_ptr += row * N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dout = tl.load(dout_ptr + cols, mask=here & (cols < N), other=0.0).to(tl.float32)
        total += dout * tl.load(y_ptr + cols, mask=here & (cols < N), other=0.0).to(tl.float32)
        tl.store(dy_ptr + cols, w * dout, mask=cols < N)
    tl.store(dweights_ptr + slot, tl.sum(total, axis=0), mask=known)


def _heuristic(BLOCK_N: int) -> Config:
    """The whole of a row: its numbers are many loads in flight."""
    return {"num_warps": row_warps(BLOCK_N)}


def _space(BLOCK_N: int) -> list[Config]:
    return [
        c
        for c in grid(num_warps=(1, 2, 4, 8, 16))
        if 32 * c["num_warps"] <= BLOCK_N or c["num_warps"] == 1
    ]


SUMS = ("moe_combine", "moe_experts", "quant_moe_experts")  # who sums a token's rows
FWD = Tunable("moe_combine_fwd", SUMS, ("BLOCK_N",), _heuristic, _space)
BWD = Tunable("moe_combine_bwd", ("moe_combine",), ("BLOCK_N",), _heuristic, _space)


def _config(tunable: Tunable, y: Tensor) -> dict[str, Any]:
    block = max(16, min(WHOLE, triton.next_power_of_2(y.shape[1])))
    return {**tunable(y.device, block), "BLOCK_N": block}


def _columns(t: Tensor) -> Tensor:
    """t [M, D] with a last stride of 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def moe_combine_fwd(y: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """y [P, D], weights [..., k], rows [..., k] -> [..., D]."""
    return combined(y, weights, rows, None)


def combined(y: Tensor, weights: Tensor, rows: Tensor, here: Tensor | None) -> Tensor:
    """Of rows up to here [1] alone, where it is given: the rest of y need not be written."""
    P, D = y.shape
    out = y.new_empty((*rows.shape[:-1], D))
    if out.numel() == 0:
        return out
    y, config = _columns(y), _config(FWD, y)
    tokens = out.numel() // D
    _moe_combine_fwd_kernel[(tokens, triton.cdiv(D, config["BLOCK_N"]))](
        y, weights.contiguous(), rows.contiguous(), rows if here is None else here, out, y.stride(0),
        P, D, rows.shape[-1],
        HAS_HERE=here is not None, **config, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def moe_combine_bwd(
    dout: Tensor, y: Tensor, weights: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """dout [..., D], y [P, D], weights [..., k] -> dy [P, D], dweights [..., k]."""
    P, D = y.shape
    # zeros: of an order that is not one, a slot may be no row's
    dy, dweights = y.new_empty(y.shape), weights.new_zeros(weights.shape)
    if P == 0 or D == 0:
        return dy, dweights
    y, dout = _columns(y), _columns(dout.reshape(-1, D))
    _moe_combine_bwd_kernel[(P,)](
        dout, y, weights.contiguous(), order.contiguous(), offsets[-1:], dy, dweights,
        dout.stride(0), y.stride(0), P, D, weights.shape[-1], **_config(BWD, y), enable_fp_fusion=True,
    )  # fmt: skip
    return dy, dweights


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    found = []
    for N, t in ((2048, "*bf16"), (4096, "*bf16"), (2048, "*fp32")):
        tile, options = split(FWD.heuristic(N))
        tile |= {"BLOCK_N": N}
        sizes = {"P": "i32", "N": "i32", "TOP_K": "i32"}
        forward = {
            "y_ptr": t,
            "weights_ptr": "*fp32",
            "rows_ptr": "*i64",
            "here_ptr": "*i64",
            "out_ptr": t,
            "stride_y": "i32",
        }
        found.append((_moe_combine_fwd_kernel, forward | sizes, tile | {"HAS_HERE": True}, options))
        backward = {
            "dout_ptr": t,
            "y_ptr": t,
            "weights_ptr": "*fp32",
            "order_ptr": "*i64",
            "here_ptr": "*i64",
        }
        backward |= {"dy_ptr": t, "dweights_ptr": "*fp32", "stride_dout": "i32", "stride_y": "i32"}
        found.append((_moe_combine_bwd_kernel, backward | sizes, tile, options))
    return found
