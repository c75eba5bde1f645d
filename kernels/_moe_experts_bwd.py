"""The experts' backward, from x and h = gate, up alone.  With g = dout_t w2 of each row, by which nothing of y is
needed:  dw_tj = <g, a>,  dh = w_tj g df(gate) up,  dx_t = sum_j w13^T dh_tj,  dw13 = dh^T x,  dw2 = (w dout)^T a.

P rows, a slot of k of a token each, by expert; D features, I intermediate ones.  No sum is by atomics: the parts of
dw_tj by columns are added up afterwards, rows of dx by moe_combine's kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moe import (
    ACTS,
    DTYPES,
    KEYS,
    block_of,
    dense,
    heuristic,
    key_of,
    most_tiles,
    slots_of,
    space,
    store_slopes,
    tile_of,
)
from ._tune import Config, Tunable, fitted, grid, row_warps, split
from .moe_combine import combined

BIAS_BLOCK = 2048  # features of bias2 that a program takes at once


@triton.jit
def _moe_experts_dh_kernel(
    dout_ptr, weights_ptr, h_ptr, order_ptr, offsets_ptr, w_ptr, dh_ptr, a_ptr, parts_ptr,
    stride_dm, stride_we, stride_wn, stride_pm,
    P, E, N, K, TOP_K, limit,
    ACT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dh [P, 2 N], a [P, N] and parts [P, blocks] of dweights, by slot; w [E, K, N]."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    slots, known = slots_of(order_ptr, rows, mask_m, P)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    d_rows = dout_ptr + (slots // TOP_K)[:, None] * stride_dm + j[None, :]
    w_ptr += expert * stride_we
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, K, BLOCK_K):
            d_mask, w_mask = known[:, None], (n < N)[None, :]
            if not FULL:
                d_mask = d_mask & (start + j < K)[None, :]
                w_mask = w_mask & (start + j < K)[:, None]
            d = tl.load(d_rows + start, mask=d_mask, other=0.0)
            w_rows = (start + j).to(tl.int64)[:, None] * stride_wn + n[None, :]
            w = tl.load(w_ptr + w_rows, mask=w_mask, other=0.0)
            g = tl.dot(d, w, g, input_precision="ieee")
        mask = mask_m[:, None] & (n < N)[None, :]
        a = store_slopes(
            g, rows, n, mask, slots, known, h_ptr, weights_ptr, dh_ptr, parts_ptr + pid % blocks, stride_pm, N,
            limit, ACT,
        )  # fmt: skip
        tl.store(a_ptr + rows[:, None] * N + n[None, :], a, mask=mask)


@triton.jit
def _moe_experts_bias_kernel(
    dout_ptr, order_ptr, offsets_ptr, bias_ptr, parts_ptr,
    stride_dm, stride_pm,
    P, E, N, TOP_K,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The part of dweights that is of bias2 [E, N]: <dout, bias>, of one row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order_ptr + row)
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets_ptr + 1 + e, mask=e < E, other=0)
    expert = tl.sum(((ends <= row) & (e < E)).to(tl.int64), axis=0)  # E: of none
    known = (slot >= 0) & (slot < P) & (expert < E)
    dout_ptr += slot // TOP_K * stride_dm
    bias_ptr += expert * N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        d = tl.load(dout_ptr + n, mask=known & (n < N), other=0.0).to(tl.float32)
        total += d * tl.load(bias_ptr + n, mask=known & (n < N), other=0.0).to(tl.float32)
    tl.store(parts_ptr + slot * stride_pm, tl.sum(total, axis=0), mask=known)


@triton.jit
def _moe_experts_dx_kernel(
    dh_ptr, offsets_ptr, w_ptr, dx_ptr,
    stride_we, stride_wn,
    P, E, N, K,
    FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx [P, N] of each row = dh [P, K] w [E, K, N]."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    d_rows = dh_ptr + rows[:, None] * K + j[None, :]
    w_ptr += expert * stride_we
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, K, BLOCK_K):
            d_mask, w_mask = mask_m[:, None], (n < N)[None, :]
            if not FULL:
                d_mask = d_mask & (start + j < K)[None, :]
                w_mask = w_mask & (start + j < K)[:, None]
            d = tl.load(d_rows + start, mask=d_mask, other=0.0)
            w_rows = (start + j).to(tl.int64)[:, None] * stride_wn + n[None, :]
            w = tl.load(w_ptr + w_rows, mask=w_mask, other=0.0)
            dx = tl.dot(d, w, dx, input_precision="ieee")
        tl.store(
            dx_ptr + rows[:, None] * N + n[None, :], dx, mask=mask_m[:, None] & (n < N)[None, :]
        )


@triton.jit
def _moe_experts_dw_kernel(
    left_ptr, right_ptr, weights_ptr, order_ptr, offsets_ptr, dw_ptr, dbias_ptr,
    stride_lm, stride_rm,
    P, N, K, TOP_K,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw [E, N, K] = left^T right over an expert's rows, dbias [E, N] = left's sums.

    Of each row: left's own, and right's token's; where SCALED left's token's times its weight, and right's own.
    """
    blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    expert = tl.program_id(1).to(tl.int64)
    n = (pid // blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    begin = tl.maximum(tl.load(offsets_ptr + expert), 0)
    stop = tl.minimum(tl.load(offsets_ptr + expert + 1), P)
    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, stop, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        slots, known = slots_of(order_ptr, rows, rows < stop, P)
        of_left, of_right = rows, slots // TOP_K
        if SCALED:
            of_left, of_right = slots // TOP_K, rows
        at = left_ptr + of_left[:, None] * stride_lm + n[None, :]
        left = tl.load(at, mask=known[:, None] & (n < N)[None, :], other=0.0)
        if SCALED:
            scale = tl.load(weights_ptr + slots, mask=known, other=0.0).to(tl.float32)
            left = (left.to(tl.float32) * scale[:, None]).to(left_ptr.dtype.element_ty)
        at = right_ptr + of_right[:, None] * stride_rm + k[None, :]
        right = tl.load(at, mask=known[:, None] & (k < K)[None, :], other=0.0)
        dw = tl.dot(tl.trans(left), right, dw, input_precision="ieee")
        if HAS_BIAS:
            dbias += tl.sum(left.to(tl.float32), axis=0)
    to = dw_ptr + (expert * N + n[:, None]) * K + k[None, :]
    tl.store(to, dw, mask=(n < N)[:, None] & (k < K)[None, :])
    if HAS_BIAS:  # of the first columns' programs
        tl.store(dbias_ptr + expert * N + n, dbias, mask=(n < N) & (pid % blocks == 0))


DH = Tunable("moe_experts_dh", ("moe_experts",), KEYS, heuristic, space)
DX = Tunable("moe_experts_dx", ("moe_experts",), KEYS, heuristic, space)


def _dw_heuristic(dtype: torch.dtype, M: int, N: int, K: int) -> Config:
    """Tiles of dw, M rows at a time."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    rows = 32 if M <= 32 else 64
    # so few rows are one step: a third stage would only spill on sm_120
    stages = 2 if M <= 32 else 3
    return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": stages}


def _dw_space(dtype: torch.dtype, M: int, N: int, K: int) -> list[Config]:
    """Tiles of which a thread holds 128 sums at most, whose stages fit the smallest shared memory."""
    found = grid(
        BLOCK_M=(32, 64), BLOCK_N=(32, 64, 128, 256), BLOCK_K=(32, 64, 128, 256),
        num_warps=(4, 8), num_stages=(2, 3, 4),
    )  # fmt: skip
    return [
        c
        for c in found
        if c["BLOCK_N"] * c["BLOCK_K"] <= 4096 * c["num_warps"]
        if (c["BLOCK_N"] + c["BLOCK_K"]) * c["BLOCK_M"] * dtype.itemsize * c["num_stages"]
        <= 96 << 10
    ]


DW = Tunable("moe_experts_dw", ("moe_experts",), KEYS, _dw_heuristic, _dw_space)


def moe_experts_bwd(
    dout: Tensor, x: Tensor, h: Tensor, weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, w13: Tensor,
    w2: Tensor, bias13: Tensor | None, bias2: Tensor | None, activation: str, limit: float, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, weights, w13, w2, bias13 and bias2, empty where not wanted or there is none."""
    E, D, I = w2.shape
    P, k = order.numel(), rows.shape[-1]
    of_x, of_weights, of_w13, of_w2, of_bias13, of_bias2 = wanted
    none = lambda: x.new_empty(0)  # noqa: E731
    if P == 0 or D == 0:
        inputs = x, weights, w13, w2, x if bias13 is None else bias13, x if bias2 is None else bias2
        there = *wanted[:4], of_bias13 and bias13 is not None, of_bias2 and bias2 is not None
        return tuple(
            t.new_zeros(t.shape if want else 0) for t, want in zip(inputs, there, strict=True)
        )
    flat, grad, w13, w2 = dense(x.reshape(-1, D)), dense(dout.reshape(-1, D)), dense(w13), dense(w2)
    order, offsets, weights = order.contiguous(), offsets.contiguous(), weights.contiguous()
    a, dh = x.new_empty(P, I), x.new_empty(P, 2 * I)
    config = fitted(DH(x.device, *key_of(x, P, E, I, D)), D)
    blocks = triton.cdiv(I, config["BLOCK_N"])
    of_bias = bias2 is not None and of_weights
    parts = x.new_zeros(P, blocks + of_bias, dtype=torch.float32)
    if of_bias:
        wide = min(BIAS_BLOCK, triton.next_power_of_2(D))
        _moe_experts_bias_kernel[(P,)](
            grad, order, offsets, bias2.contiguous(), parts[:, blocks:],
            grad.stride(0), parts.stride(0),
            P, E, D, k,
            BLOCK_E=block_of(E), BLOCK_N=wide, num_warps=row_warps(wide), enable_fp_fusion=True,
        )  # fmt: skip
    _moe_experts_dh_kernel[(most_tiles(P, E, config["BLOCK_M"]) * blocks,)](
        grad, weights, h, order, offsets, w2, dh, a, parts,
        grad.stride(0), w2.stride(0), w2.stride(1), parts.stride(0),
        P, E, I, D, k, limit,
        ACT=ACTS[activation],
        BLOCK_E=block_of(E), **config, enable_fp_fusion=True,
    )  # fmt: skip
    dx = none()
    if of_x:
        config = fitted(DX(x.device, *key_of(x, P, E, D, 2 * I)), 2 * I)
        each = x.new_empty(P, D)
        tiles = most_tiles(P, E, config["BLOCK_M"])
        _moe_experts_dx_kernel[(tiles * triton.cdiv(D, config["BLOCK_N"]),)](
            dh, offsets, w13, each,
            w13.stride(0), w13.stride(1),
            P, E, D, 2 * I,
            BLOCK_E=block_of(E), **config, enable_fp_fusion=True,
        )  # fmt: skip
        dx = combined(each, torch.ones_like(weights), rows, offsets[E:]).view(x.shape)

    def product(
        left: Tensor, right: Tensor, scaled: bool, want: bool, want_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """dw [E, N, K] and dbias [E, N]."""
        if not (want or want_bias):
            return none(), none()
        N, K = left.shape[1], right.shape[1]
        dw, dbias = x.new_empty(E, N, K), x.new_empty((E, N) if want_bias else 0)
        config = DW(x.device, *key_of(x, P, E, N, K))
        blocks = triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(K, config["BLOCK_K"])
        _moe_experts_dw_kernel[(blocks, E)](
            left, right, weights, order, offsets, dw, dbias,
            left.stride(0), right.stride(0),
            P, N, K, k,
            SCALED=scaled, HAS_BIAS=want_bias, **config, enable_fp_fusion=True,
        )  # fmt: skip
        return dw if want else none(), dbias

    dw13, dbias13 = product(dh, flat, False, of_w13, of_bias13 and bias13 is not None)
    dw2, dbias2 = product(grad, a, True, of_w2, of_bias2 and bias2 is not None)
    dweights = (
        parts.sum(1).view(weights.shape).to(weights.dtype) if of_weights else weights.new_empty(0)
    )
    return dx, dweights, dw13, dw2, dbias13, dbias2


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launcher uses, to compile offline: Qwen3-30B's layer."""
    found = []
    cases = [
        (16, "*bf16", True),
        (1024, "*bf16", True),
        (1024, "*fp32", True),
        (1024, "*bf16", False),
    ]
    for M, t, plain in cases:
        tile, options = split(DH.heuristic(DTYPES[t], M, 1024, 2048))
        tile = fitted(tile, 2048 if plain else 2040) | {"BLOCK_E": 128}
        sizes = {"P": "i32", "E": "i32", "N": "i32", "K": "i32"}
        weight = {"w_ptr": t, "stride_we": "i32", "stride_wn": "i32"}
        rows = {"order_ptr": "*i64", "offsets_ptr": "*i64"}
        dh = {
            "dout_ptr": t,
            "weights_ptr": "*fp32",
            "h_ptr": t,
            "dh_ptr": t,
            "a_ptr": t,
        }
        dh |= {"parts_ptr": "*fp32", "stride_dm": "i32", "TOP_K": "i32", "limit": "fp32"}
        dh |= {"stride_pm": "i32"}
        given = {"ACT": "silu" if plain else "gelu_tanh"}
        found.append((_moe_experts_dh_kernel, dh | rows | weight | sizes, tile | given, options))
        dx = {"dh_ptr": t, "offsets_ptr": "*i64", "dx_ptr": t}
        found.append((_moe_experts_dx_kernel, dx | weight | sizes, tile, options))
        tile, options = split(DW.heuristic(DTYPES[t], M, 1024, 2048))
        dw = {"left_ptr": t, "right_ptr": t, "weights_ptr": "*fp32", "dw_ptr": t, "dbias_ptr": t}
        dw |= {name: "i32" for name in ("stride_lm", "stride_rm", "P", "N", "K", "TOP_K")}
        for scaled in (False, True):
            given = {"SCALED": scaled, "HAS_BIAS": not plain}
            found.append((_moe_experts_dw_kernel, dw | rows, tile | given, options))
    bias = {
        "dout_ptr": "*bf16",
        "order_ptr": "*i64",
        "offsets_ptr": "*i64",
        "bias_ptr": "*bf16",
        "parts_ptr": "*fp32",
    }
    bias |= {name: "i32" for name in ("stride_dm", "stride_pm", "P", "E", "N", "TOP_K")}
    options = {"num_warps": row_warps(BIAS_BLOCK), "enable_fp_fusion": True}
    found.append((_moe_experts_bias_kernel, bias, {"BLOCK_E": 128, "BLOCK_N": BIAS_BLOCK}, options))
    return found
