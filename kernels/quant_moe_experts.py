"""Experts of 4- or 8-bit weights over sorted rows:  h = w13 x + bias13,  a = f(gate) up,  y = w2 a + bias2,
out_t = sum_j w_tj y_tj, as moe_experts.py has it, adapters too, with w13 and w2 decoded as quant_linear.py's are.

P rows, a slot of k of a token each, by expert; D features, I intermediate ones.  The experts' rows of a weight lie one
below the other, G groups of columns in each.  A program has BLOCK_M rows of one expert, which it finds from the
offsets.  As the weight comes from registers, products are formed transposed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moe import ACTS, block_of, dense, most_tiles, slots_of, store_gated, tile_of
from ._moe_products import Lora, Placed, Term, by_rows, low_rank, term_of
from ._quant_moe import KEYS, config_of, experts_of, heuristic, shipped, space, tiles_in
from ._quant_moe_experts_bwd import quant_moe_experts_bwd
from ._quant_weight import MINIMA, tile_columns, weight_tile
from ._tune import Tunable
from .moe_combine import combined

__all__ = ["quant_moe_experts_bwd", "quant_moe_experts_fwd", "variants"]


@triton.jit
def _quant_moe_experts_up_kernel(
    x_ptr, order_ptr, offsets_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, bias_ptr, u_ptr, b_ptr,
    h_ptr, a_ptr,
    stride_xm, stride_qn, stride_sn,
    P, E, N, R, group, tiles_per_group, tiles, TOP_K, limit,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    SAVE: tl.constexpr, FULL: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [P, 2 N] where SAVE, a [P, N]; of the weight [E 2 N, K] a tile has columns of one group; u [P, R],
    b [E, 2 N, R]."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    slots, known = slots_of(order_ptr, rows, mask_m, P)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    one = tl.zeros((1,), tl.int32)
    gates = expert * 2 * N + n
    x_cols = x_ptr + (slots // TOP_K)[None, :] * stride_xm + j[:, None]
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for tile in range(0, tiles):
            g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
            mask = known[None, :]
            if not FULL:
                mask = mask & (k + j < k_end)[:, None]
            x = tl.load(x_cols + k, mask=mask, other=0.0).to(DOT_DTYPE)
            w = weight_tile(
                q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, gates, n < N, one + g, one + k, one + k_end,
                stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
            )  # fmt: skip
            gate = tl.dot(w.to(DOT_DTYPE), x, gate, input_precision=PRECISION)
            w = weight_tile(
                q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, gates + N, n < N, one + g, one + k, one + k_end,
                stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
            )  # fmt: skip
            up = tl.dot(w.to(DOT_DTYPE), x, up, input_precision=PRECISION)
        if BLOCK_R > 0:
            u, b = u_ptr + rows * R, b_ptr + gates * R
            gate = low_rank(gate, b, n < N, 1, u, mask_m, 1, R, PRECISION, BLOCK_R)
            up = low_rank(up, b + N * R, n < N, 1, u, mask_m, 1, R, PRECISION, BLOCK_R)
        if HAS_BIAS:
            gate += tl.load(bias_ptr + gates, mask=n < N, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias_ptr + gates + N, mask=n < N, other=0.0).to(tl.float32)[:, None]
        mask = mask_m[:, None] & (n < N)[None, :]
        store_gated(tl.trans(gate), tl.trans(up), rows, n, mask, h_ptr, a_ptr, N, limit, ACT, SAVE)


@triton.jit
def _quant_moe_experts_down_kernel(
    a_ptr, offsets_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, bias_ptr, u_ptr, b_ptr, y_ptr,
    stride_am, stride_qn, stride_sn,
    P, E, N, R, group, tiles_per_group, tiles,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    FULL: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [P, N] = a [P, K] times the weight [E N, K], and the bias, and u [P, R] b [E, N, R]^T."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    one = tl.zeros((1,), tl.int32)
    w_rows = expert * N + n
    a_cols = a_ptr + rows[None, :] * stride_am + j[:, None]
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for tile in range(0, tiles):
            g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
            mask = mask_m[None, :]
            if not FULL:
                mask = mask & (k + j < k_end)[:, None]
            a = tl.load(a_cols + k, mask=mask, other=0.0).to(DOT_DTYPE)
            w = weight_tile(
                q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, w_rows, n < N, one + g, one + k, one + k_end,
                stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
            )  # fmt: skip
            y = tl.dot(w.to(DOT_DTYPE), a, y, input_precision=PRECISION)
        if BLOCK_R > 0:
            u, b = u_ptr + rows * R, b_ptr + w_rows * R
            y = low_rank(y, b, n < N, 1, u, mask_m, 1, R, PRECISION, BLOCK_R)
        if HAS_BIAS:
            y += tl.load(bias_ptr + w_rows, mask=n < N, other=0.0).to(tl.float32)[:, None]
        to = y_ptr + rows[:, None] * N + n[None, :]
        tl.store(to, tl.trans(y), mask=mask_m[:, None] & (n < N)[None, :])


UP = Tunable("quant_moe_experts_up", ("quant_moe_experts",), KEYS, heuristic, space)
DOWN = Tunable("quant_moe_experts_down", ("quant_moe_experts",), KEYS, heuristic, space)


def quant_moe_experts_fwd(
    x: Tensor, weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor,
    qweight13: Tensor, scales13: Tensor, zeros13: Tensor | None, minima13: Tensor | None, codebook13: Tensor | None,
    nested13: list[Tensor], bits13: int,
    qweight2: Tensor, scales2: Tensor, zeros2: Tensor | None, minima2: Tensor | None, codebook2: Tensor | None,
    nested2: list[Tensor], bits2: int,
    order2: Tensor | None, bias13: Tensor | None, bias2: Tensor | None, a13: Tensor | None, b13: Tensor | None,
    a2: Tensor | None, b2: Tensor | None, activation: str, limit: float, scale: float, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [..., D], weights [..., k], w13 [E 2 I, D], w2 [E D, I] -> out [..., D], h [P, 2 I] where save; a2's columns are
    in the order that w2's are."""
    E, D = offsets.numel() - 1, x.shape[-1]
    I = qweight13.shape[0] // (2 * E)
    P, k = order.numel(), rows.shape[-1]
    h = x.new_empty(P if save else 0, 2 * I)
    if P == 0 or D == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format), h
    w13 = experts_of(qweight13, scales13, zeros13, minima13, codebook13, nested13, bits13)
    w2 = experts_of(qweight2, scales2, zeros2, minima2, codebook2, nested2, bits2)
    a, y = x.new_empty(P, I), x.new_empty(P, D)
    flat, placed = dense(x.reshape(-1, D)), Placed(order.contiguous(), offsets.contiguous(), k)
    lora, term = Lora.of(a13, b13, a2, b2, scale), None
    if lora.a13 is not None and lora.b13 is not None:
        term = Term(by_rows(flat, lora.a13, placed, tokens=True, scale=scale), lora.b13)
    of_term, R, block = term_of(term, x)
    config = config_of(UP, x, w13, P, E, I, D)
    blocks = most_tiles(P, E, config["BLOCK_M"]) * triton.cdiv(I, config["BLOCK_N"])
    each = tiles_in(w13.group, config)
    _quant_moe_experts_up_kernel[(blocks,)](
        flat, placed.order, placed.offsets, *w13.pointers, w13.pointers[1] if bias13 is None else bias13.contiguous(),
        *of_term, h, a,
        flat.stride(0), *w13.strides,
        P, E, I, R, w13.group, each, each * w13.groups, k, limit,
        HAS_BIAS=bias13 is not None, ACT=ACTS[activation], SAVE=save, BLOCK_E=block_of(E), BLOCK_R=block,
        **w13.constants, **config, enable_fp_fusion=True,
    )  # fmt: skip
    a = a if order2 is None else a.index_select(1, order2)
    term = None
    if lora.a2 is not None and lora.b2 is not None:
        term = Term(by_rows(a, lora.a2, placed, scale=scale), lora.b2)
    of_term, R, block = term_of(term, x)
    config = config_of(DOWN, x, w2, P, E, D, I)
    blocks = most_tiles(P, E, config["BLOCK_M"]) * triton.cdiv(D, config["BLOCK_N"])
    each = tiles_in(w2.group, config)
    _quant_moe_experts_down_kernel[(blocks,)](
        a, placed.offsets, *w2.pointers, w2.pointers[1] if bias2 is None else bias2.contiguous(), *of_term, y,
        a.stride(0), *w2.strides,
        P, E, D, R, w2.group, each, each * w2.groups,
        HAS_BIAS=bias2 is not None, BLOCK_E=block_of(E), BLOCK_R=block, **w2.constants, **config, enable_fp_fusion=True,
    )  # fmt: skip
    return combined(y, weights, rows, placed.offsets[E:]), h


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    found = []
    for t, weight, constants, options in shipped():
        plain = constants["OFFSET"] != MINIMA
        up = {"x_ptr": t, "order_ptr": "*i64", "bias_ptr": t, "h_ptr": t, "a_ptr": t}
        up |= {"stride_xm": "i32", "TOP_K": "i32", "limit": "fp32"}
        given = {"HAS_BIAS": not plain, "ACT": "silu" if plain else "gelu_erf", "SAVE": plain}
        found.append((_quant_moe_experts_up_kernel, up | weight, constants | given, options))
        down = {"a_ptr": t, "bias_ptr": t, "y_ptr": t, "stride_am": "i32"}
        given = {"HAS_BIAS": not plain}
        found.append((_quant_moe_experts_down_kernel, down | weight, constants | given, options))
    return found
