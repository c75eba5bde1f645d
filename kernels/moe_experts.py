"""Experts over sorted rows:  h = w13 x + bias13,  a = f(gate) up,  y = w2 a + bias2,  out_t = sum_j w_tj y_tj.

P rows, a slot of k of a token each, by expert; D features, I intermediate ones.  A program has BLOCK_M rows of one
expert, which it finds from the offsets, so that the grid is known before they are: programs past the last tile do
nothing.  The gather is in the first product's loads; y is written row by row and summed by moe_combine's kernel,
which costs less than stores from the product to scattered tokens, and repeats.
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
    store_gated,
    tile_of,
)
from ._moe_experts_bwd import moe_experts_bwd
from ._tune import Tunable, fitted, split
from .moe_combine import combined

__all__ = ["moe_experts_bwd", "moe_experts_fwd", "variants"]


@triton.jit
def _moe_experts_up_kernel(
    x_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr, h_ptr, a_ptr,
    stride_xm, stride_we, stride_wn,
    P, E, N, K, TOP_K, limit,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h [P, 2 N] where SAVE, a [P, N]; w [E, 2 N, K].  FULL: BLOCK_K divides K."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    slots, known = slots_of(order_ptr, rows, mask_m, P)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + (slots // TOP_K)[:, None] * stride_xm + j[None, :]
    w_ptr += expert * stride_we
    gates = w_ptr + n.to(tl.int64)[:, None] * stride_wn + j[None, :]
    ups = w_ptr + (n + N).to(tl.int64)[:, None] * stride_wn + j[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, K, BLOCK_K):
            x_mask, w_mask = known[:, None], (n < N)[:, None]
            if not FULL:
                x_mask = x_mask & (start + j < K)[None, :]
                w_mask = w_mask & (start + j < K)[None, :]
            x = tl.load(x_rows + start, mask=x_mask, other=0.0)
            w = tl.load(gates + start, mask=w_mask, other=0.0)
            gate = tl.dot(x, tl.trans(w), gate, input_precision="ieee")
            w = tl.load(ups + start, mask=w_mask, other=0.0)
            up = tl.dot(x, tl.trans(w), up, input_precision="ieee")
        if HAS_BIAS:
            bias = bias_ptr + expert * 2 * N + n
            gate += tl.load(bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + N, mask=n < N, other=0.0).to(tl.float32)[None, :]
        mask = mask_m[:, None] & (n < N)[None, :]
        store_gated(gate, up, rows, n, mask, h_ptr, a_ptr, N, limit, ACT, SAVE)


@triton.jit
def _moe_experts_down_kernel(
    a_ptr, offsets_ptr, w_ptr, bias_ptr, y_ptr,
    stride_we, stride_wn,
    P, E, N, K,
    HAS_BIAS: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [P, N] = a [P, K] w [E, N, K]^T + bias."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    a_rows = a_ptr + rows[:, None] * K + j[None, :]
    w_rows = w_ptr + expert * stride_we + n.to(tl.int64)[:, None] * stride_wn + j[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, K, BLOCK_K):
            a_mask, w_mask = mask_m[:, None], (n < N)[:, None]
            if not FULL:
                a_mask = a_mask & (start + j < K)[None, :]
                w_mask = w_mask & (start + j < K)[None, :]
            a = tl.load(a_rows + start, mask=a_mask, other=0.0)
            w = tl.load(w_rows + start, mask=w_mask, other=0.0)
            y = tl.dot(a, tl.trans(w), y, input_precision="ieee")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0)
            y += bias.to(tl.float32)[None, :]
        tl.store(y_ptr + rows[:, None] * N + n[None, :], y, mask=mask_m[:, None] & (n < N)[None, :])


UP = Tunable("moe_experts_up", ("moe_experts",), KEYS, heuristic, space)
DOWN = Tunable("moe_experts_down", ("moe_experts",), KEYS, heuristic, space)


def moe_experts_fwd(
    x: Tensor, weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, w13: Tensor, w2: Tensor,
    bias13: Tensor | None, bias2: Tensor | None, activation: str, limit: float, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [..., D], weights [..., k], w13 [E, 2 I, D], w2 [E, D, I] -> out [..., D], h [P, 2 I] where save."""
    E, D, I = w2.shape
    P, k = order.numel(), rows.shape[-1]
    h = x.new_empty(P if save else 0, 2 * I)
    if P == 0 or D == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), h
    a, y = x.new_empty(P, I), x.new_empty(P, D)
    flat, w13, w2 = dense(x.reshape(-1, D)), dense(w13), dense(w2)
    order, offsets = order.contiguous(), offsets.contiguous()
    config = fitted(UP(x.device, *key_of(x, P, E, I, D)), D)
    tiles = most_tiles(P, E, config["BLOCK_M"])
    _moe_experts_up_kernel[(tiles * triton.cdiv(I, config["BLOCK_N"]),)](
        flat, order, offsets, w13, w13 if bias13 is None else bias13.contiguous(), h, a,
        flat.stride(0), w13.stride(0), w13.stride(1),
        P, E, I, D, k, limit,
        HAS_BIAS=bias13 is not None, ACT=ACTS[activation], SAVE=save,
        BLOCK_E=block_of(E), **config, enable_fp_fusion=True,
    )  # fmt: skip
    config = fitted(DOWN(x.device, *key_of(x, P, E, D, I)), I)
    tiles = most_tiles(P, E, config["BLOCK_M"])
    _moe_experts_down_kernel[(tiles * triton.cdiv(D, config["BLOCK_N"]),)](
        a, offsets, w2, w2 if bias2 is None else bias2.contiguous(), y,
        w2.stride(0), w2.stride(1),
        P, E, D, I,
        HAS_BIAS=bias2 is not None, BLOCK_E=block_of(E), **config, enable_fp_fusion=True,
    )  # fmt: skip
    return combined(y, weights, rows, offsets[E:]), h


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline: Qwen3-30B's layer."""
    found = []
    cases = [
        (16, "*bf16", True),
        (1024, "*bf16", True),
        (1024, "*fp32", True),
        (1024, "*bf16", False),
    ]
    for M, t, plain in cases:
        tile, options = split(UP.heuristic(DTYPES[t], M, 1024, 2048))
        tile = fitted(tile, 2048 if plain else 2040) | {"BLOCK_E": 128, "HAS_BIAS": not plain}
        sizes = {"P": "i32", "E": "i32", "N": "i32", "K": "i32"}
        weight = {"w_ptr": t, "bias_ptr": t, "stride_we": "i32", "stride_wn": "i32"}
        up = {"x_ptr": t, "order_ptr": "*i64", "offsets_ptr": "*i64", "h_ptr": t, "a_ptr": t}
        up |= {"stride_xm": "i32", "TOP_K": "i32", "limit": "fp32"}
        given = {"ACT": "silu" if plain else "gelu_erf", "SAVE": plain}
        found.append((_moe_experts_up_kernel, up | weight | sizes, tile | given, options))
        down = {"a_ptr": t, "offsets_ptr": "*i64", "y_ptr": t}
        found.append((_moe_experts_down_kernel, down | weight | sizes, tile, options))
    return found
