"""The backward of experts whose weights are frozen, from h = gate, up alone.  With g = dout_t w2 of each row:
dw_tj = <g, a> + <dout_t, bias2>,  dh = w_tj g df(gate) up,  dx_t = sum_j w13^T dh_tj.
With adapters  g += v2 a2  of  v2 = scale dout_t b2,  dx += v13 a13  of  v13 = scale dh b13.

P rows, a slot of k of a token each, by expert; D features, I intermediate ones.  A program has BLOCK_M rows of one
expert and BLOCK_K columns of one group, and walks the weight's rows.  No sum is by atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moe import ACTS, block_of, dense, most_tiles, slots_of, store_slopes, tile_of
from ._moe_experts_bwd import bias_parts
from ._moe_products import Lora, Placed, Term, across, lora_grads, low_rank, term_of
from ._quant_moe import KEYS, config_of, experts_of, heuristic, shipped, space, tiles_in
from ._quant_weight import MINIMA, tile_columns, weight_tile
from ._tune import Tunable
from .moe_combine import combined


@triton.jit
def _quant_moe_experts_dh_kernel(
    dout_ptr, weights_ptr, h_ptr, order_ptr, offsets_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr,
    u_ptr, b_ptr, dh_ptr, a_ptr, parts_ptr,
    stride_dm, stride_qn, stride_sn, stride_pm,
    P, E, N, K, R, group, tiles_per_group, tiles, TOP_K, limit,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr, ACT: tl.constexpr,
    FULL: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh [P, 2 K] and parts [P, tiles] of dweights, by slot, of the weight [E N, K]; and with an adapter, u [P, R] and
    b [E, R, K], whose gradients ask for it, a [P, K]."""
    pid = tl.program_id(0)
    tile = pid % tiles
    expert, rows, mask_m = tile_of(offsets_ptr, pid // tiles, P, E, BLOCK_E, BLOCK_M)
    slots, known = slots_of(order_ptr, rows, mask_m, P)
    g, k, k_end = tile_columns(tile, tiles_per_group, group, BLOCK_K, FULL)
    j = tl.arange(0, BLOCK_N)
    one = tl.zeros((1,), tl.int32)
    d_rows = dout_ptr + (slots // TOP_K)[:, None] * stride_dm + j[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, N, BLOCK_N):
            mask_n = start + j < N
            w = weight_tile(
                q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, expert * N + start + j, mask_n, one + g, one + k,
                one + k_end, stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
            )  # fmt: skip
            d = tl.load(d_rows + start, mask=known[:, None] & mask_n[None, :], other=0.0)
            acc = tl.dot(d.to(DOT_DTYPE), w.to(DOT_DTYPE), acc, input_precision=PRECISION)
        cols = k + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (cols < k_end)[None, :]
        if BLOCK_R > 0:
            b = b_ptr + expert * R * K + cols
            acc = low_rank(
                acc, u_ptr + rows * R, mask_m, 1, b, cols < k_end, K, R, PRECISION, BLOCK_R
            )
        a = store_slopes(
            acc, rows, cols, mask, slots, known, h_ptr, weights_ptr, dh_ptr, parts_ptr + tile, stride_pm, K,
            limit, ACT,
        )  # fmt: skip
        if BLOCK_R > 0:
            tl.store(a_ptr + rows[:, None] * K + cols[None, :], a, mask=mask)


@triton.jit
def _quant_moe_experts_dx_kernel(
    dh_ptr, offsets_ptr, q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, u_ptr, b_ptr, dx_ptr,
    stride_qn, stride_sn,
    P, E, N, K, R, group, tiles_per_group, tiles,
    BITS: tl.constexpr, OFFSET: tl.constexpr, NESTED: tl.constexpr,
    FULL: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx [P, K] of each row = dh [P, N] times the weight [E N, K], and u [P, R] b [E, R, K]."""
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // tiles, P, E, BLOCK_E, BLOCK_M)
    g, k, k_end = tile_columns(pid % tiles, tiles_per_group, group, BLOCK_K, FULL)
    j = tl.arange(0, BLOCK_N)
    one = tl.zeros((1,), tl.int32)
    d_rows = dh_ptr + rows[:, None] * N + j[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, N, BLOCK_N):
            mask_n = start + j < N
            w = weight_tile(
                q_ptr, s_ptr, o_ptr, code_ptr, block_ptr, shift_ptr, expert * N + start + j, mask_n, one + g, one + k,
                one + k_end, stride_qn, stride_sn, BITS, OFFSET, NESTED, BLOCK_K, FULL,
            )  # fmt: skip
            d = tl.load(d_rows + start, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
            dx = tl.dot(d.to(DOT_DTYPE), w.to(DOT_DTYPE), dx, input_precision=PRECISION)
        cols = k + tl.arange(0, BLOCK_K)
        if BLOCK_R > 0:
            b = b_ptr + expert * R * K + cols
            dx = low_rank(
                dx, u_ptr + rows * R, mask_m, 1, b, cols < k_end, K, R, PRECISION, BLOCK_R
            )
        to = dx_ptr + rows[:, None] * K + cols[None, :]
        tl.store(to, dx, mask=mask_m[:, None] & (cols < k_end)[None, :])


DH = Tunable("quant_moe_experts_dh", ("quant_moe_experts",), KEYS, heuristic, space)
DX = Tunable("quant_moe_experts_dx", ("quant_moe_experts",), KEYS, heuristic, space)


def quant_moe_experts_bwd(
    dout: Tensor, x: Tensor | None, h: Tensor, weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor,
    qweight13: Tensor, scales13: Tensor, zeros13: Tensor | None, minima13: Tensor | None, codebook13: Tensor | None,
    nested13: list[Tensor], bits13: int,
    qweight2: Tensor, scales2: Tensor, zeros2: Tensor | None, minima2: Tensor | None, codebook2: Tensor | None,
    nested2: list[Tensor], bits2: int,
    order2: Tensor | None, bias2: Tensor | None, a13: Tensor | None, b13: Tensor | None, a2: Tensor | None,
    b2: Tensor | None, activation: str, limit: float, scale: float, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, weights and the adapters, empty where not wanted; x for those of a13 and b13 alone."""
    of_x, of_weights, *of_lora = wanted
    E, D = offsets.numel() - 1, dout.shape[-1]
    P, I, k = order.numel(), h.shape[1] // 2, rows.shape[-1]
    none = lambda: dout.new_empty(0)  # noqa: E731
    if P == 0 or D == 0:
        inputs = dout, weights, a13, b13, a2, b2
        return tuple(
            none() if t is None else t.new_zeros(t.shape if want else 0)
            for t, want in zip(inputs, wanted, strict=True)
        )
    w13 = experts_of(qweight13, scales13, zeros13, minima13, codebook13, nested13, bits13)
    w2 = experts_of(qweight2, scales2, zeros2, minima2, codebook2, nested2, bits2)
    lora = Lora.of(a13, b13, a2, b2, scale)
    grad, flat = dense(dout.reshape(-1, D)), None if x is None else dense(x.reshape(-1, D))
    placed, weights = Placed(order.contiguous(), offsets.contiguous(), k), weights.contiguous()
    v2 = term = None
    if lora.a2 is not None and lora.b2 is not None:
        v2 = across(grad, lora.b2, placed, tokens=True, scale=scale)
        term = Term(v2, lora.a2)
    of_term, R, block = term_of(term, dout)
    dh, a = dout.new_empty(P, 2 * I), dout.new_empty(0 if term is None else P, I)
    config = config_of(DH, dout, w2, P, E, I, D)
    each = tiles_in(w2.group, config)
    tiles = each * w2.groups
    of_bias = bias2 is not None and of_weights
    parts = dout.new_zeros(P, tiles + of_bias, dtype=torch.float32)
    if bias2 is not None and of_weights:
        bias_parts(grad, placed, bias2, parts[:, tiles:])
    _quant_moe_experts_dh_kernel[(most_tiles(P, E, config["BLOCK_M"]) * tiles,)](
        grad, weights, _reordered(h.contiguous(), order2), placed.order, placed.offsets, *w2.pointers, *of_term,
        dh, a, parts,
        grad.stride(0), *w2.strides, parts.stride(0),
        P, E, D, I, R, w2.group, each, tiles, k, limit,
        ACT=ACTS[activation], BLOCK_E=block_of(E), BLOCK_R=block, **w2.constants, **config, enable_fp_fusion=True,
    )  # fmt: skip
    dweights = (
        parts.sum(1).view(weights.shape).to(weights.dtype) if of_weights else weights.new_empty(0)
    )
    dh = _reordered(dh, None if order2 is None else order2.argsort())
    v13 = term = None
    if lora.a13 is not None and lora.b13 is not None and (of_x or of_lora[0]):
        v13 = across(dh, lora.b13, placed, scale=scale)
        term = Term(v13, lora.a13)
    of_adapters = lora_grads(lora, placed, weights, flat, grad, a, dh, v13, v2, of_lora)
    if not of_x:
        return none(), dweights, *of_adapters
    of_term, R, block = term_of(term, dout)
    config = config_of(DX, dout, w13, P, E, D, 2 * I)
    each = tiles_in(w13.group, config)
    tiles = each * w13.groups
    dx = dout.new_empty(P, D)
    _quant_moe_experts_dx_kernel[(most_tiles(P, E, config["BLOCK_M"]) * tiles,)](
        dh, placed.offsets, *w13.pointers, *of_term, dx,
        *w13.strides,
        P, E, 2 * I, D, R, w13.group, each, tiles,
        BLOCK_E=block_of(E), BLOCK_R=block, **w13.constants, **config, enable_fp_fusion=True,
    )  # fmt: skip
    dx = combined(dx, torch.ones_like(weights), rows, placed.offsets[E:])
    return dx.view(dout.shape), dweights, *of_adapters


def _reordered(h: Tensor, order: Tensor | None) -> Tensor:
    """h [P, 2 I], the columns of each half in another order."""
    if order is None:
        return h
    return h.view(len(h), 2, -1).index_select(2, order).view(h.shape)


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launcher uses, to compile offline."""
    found = []
    for t, weight, constants, options in shipped():
        weight = weight | {"K": "i32"}
        dh = {"dout_ptr": t, "weights_ptr": "*fp32", "h_ptr": t, "order_ptr": "*i64", "dh_ptr": t}
        dh |= {"a_ptr": t}
        dh |= {"parts_ptr": "*fp32", "stride_dm": "i32", "stride_pm": "i32", "TOP_K": "i32"}
        act = "gelu_tanh" if constants["OFFSET"] == MINIMA else "silu"
        dh |= {"limit": "fp32"}
        found.append((_quant_moe_experts_dh_kernel, dh | weight, constants | {"ACT": act}, options))
        dx = {"dh_ptr": t, "dx_ptr": t}
        found.append((_quant_moe_experts_dx_kernel, dx | weight, constants, options))
    return found
