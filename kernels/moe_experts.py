"""Experts over sorted rows:  h = w13 x + bias13,  a = f(gate) up,  y = w2 a + bias2,  out_t = sum_j w_tj y_tj;
with adapters h += b13 u13,  y += b2 u2  of  u13 = scale a13 x,  u2 = scale a2 a, rounded.

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
from ._moe_products import Lora, Placed, Term, by_rows, low_rank, rank_block, term_of
from ._tune import Tunable, fitted, split
from .moe_combine import combined

__all__ = ["moe_experts_bwd", "moe_experts_fwd", "variants"]


@triton.jit
def _moe_experts_up_kernel(
    x_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr, u_ptr, b_ptr, h_ptr, a_ptr,
    stride_xm, stride_we, stride_wn,
    P, E, N, K, R, TOP_K, limit,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [P, 2 N] where SAVE, a [P, N]; w [E, 2 N, K], u [P, R], b [E, 2 N, R].  FULL: BLOCK_K divides K."""
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
        if BLOCK_R > 0:
            u, b = u_ptr + rows * R, b_ptr + (expert * 2 * N + n) * R
            gate = low_rank(gate, u, mask_m, 1, b, n < N, 1, R, "ieee", BLOCK_R)
            up = low_rank(up, u, mask_m, 1, b + N * R, n < N, 1, R, "ieee", BLOCK_R)
        if HAS_BIAS:
            bias = bias_ptr + expert * 2 * N + n
            gate += tl.load(bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias + N, mask=n < N, other=0.0).to(tl.float32)[None, :]
        mask = mask_m[:, None] & (n < N)[None, :]
        store_gated(gate, up, rows, n, mask, h_ptr, a_ptr, N, limit, ACT, SAVE)


UP = Tunable("moe_experts_up", ("moe_experts",), KEYS, heuristic, space)


def moe_experts_fwd(
    x: Tensor, weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, w13: Tensor, w2: Tensor,
    bias13: Tensor | None, bias2: Tensor | None, a13: Tensor | None, b13: Tensor | None, a2: Tensor | None,
    b2: Tensor | None, activation: str, limit: float, scale: float, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [..., D], weights [..., k], w13 [E, 2 I, D], w2 [E, D, I] -> out [..., D], h [P, 2 I] where save."""
    E, D, I = w2.shape
    P, k = order.numel(), rows.shape[-1]
    h = x.new_empty(P if save else 0, 2 * I)
    if P == 0 or D == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), h
    lora = Lora.of(a13, b13, a2, b2, scale)
    placed = Placed(order.contiguous(), offsets.contiguous(), k)
    a = x.new_empty(P, I)
    flat, w13, w2 = dense(x.reshape(-1, D)), dense(w13), dense(w2)
    term = None
    if lora.a13 is not None and lora.b13 is not None:
        term = Term(by_rows(flat, lora.a13, placed, tokens=True, scale=scale), lora.b13)
    (u, b), R, block = term_of(term, x)
    config = fitted(UP(x.device, *key_of(x, P, E, I, D)), D)
    tiles = most_tiles(P, E, config["BLOCK_M"])
    _moe_experts_up_kernel[(tiles * triton.cdiv(I, config["BLOCK_N"]),)](
        flat, placed.order, placed.offsets, w13, w13 if bias13 is None else bias13.contiguous(), u, b, h, a,
        flat.stride(0), w13.stride(0), w13.stride(1),
        P, E, I, D, R, k, limit,
        HAS_BIAS=bias13 is not None, ACT=ACTS[activation], SAVE=save,
        BLOCK_E=block_of(E), BLOCK_R=block, **config, enable_fp_fusion=True,
    )  # fmt: skip
    term = None
    if lora.a2 is not None and lora.b2 is not None:
        term = Term(by_rows(a, lora.a2, placed, scale=scale), lora.b2)
    y = by_rows(a, w2, placed, bias=bias2, term=term)
    return combined(y, weights, rows, placed.offsets[E:]), h


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launcher uses, to compile offline: Qwen3-30B's layer."""
    found = []
    cases = [
        (16, "*bf16", True, 0),
        (1024, "*bf16", True, 0),
        (1024, "*fp32", True, 0),
        (1024, "*bf16", False, 0),
        (1024, "*bf16", True, 16),
        (1024, "*fp32", True, 16),
    ]
    for M, t, plain, R in cases:
        tile, options = split(UP.heuristic(DTYPES[t], M, 1024, 2048))
        tile = fitted(tile, 2048 if plain else 2040) | {"BLOCK_E": 128, "HAS_BIAS": not plain}
        tile["BLOCK_R"] = rank_block(DTYPES[t], R)
        up = {"x_ptr": t, "order_ptr": "*i64", "offsets_ptr": "*i64", "h_ptr": t, "a_ptr": t}
        up |= {"stride_xm": "i32", "TOP_K": "i32", "limit": "fp32"}
        up |= {"w_ptr": t, "bias_ptr": t, "stride_we": "i32", "stride_wn": "i32"}
        up |= {"u_ptr": t, "b_ptr": t, "P": "i32", "E": "i32", "N": "i32", "K": "i32", "R": "i32"}
        given = {"ACT": "silu" if plain else "gelu_erf", "SAVE": plain}
        found.append((_moe_experts_up_kernel, up, tile | given, options))
    return found
