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
from ._moe_products import (
    Lora,
    Placed,
    Term,
    across,
    lora_grads,
    low_rank,
    of_rows,
    rank_block,
    term_of,
)
from ._tune import Tunable, fitted, row_warps, split
from .moe_combine import combined

BIAS_BLOCK = 2048  # features of bias2 that a program takes at once


@triton.jit
def _moe_experts_dh_kernel(
    dout_ptr, weights_ptr, h_ptr, order_ptr, offsets_ptr, w_ptr, v_ptr, b_ptr, dh_ptr, a_ptr, parts_ptr,
    stride_dm, stride_we, stride_wn, stride_pm,
    P, E, N, K, R, TOP_K, limit,
    ACT: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dh [P, 2 N], a [P, N] and parts [P, blocks] of dweights, by slot; w [E, K, N], v [P, R], b [E, R, N]."""
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
        if BLOCK_R > 0:
            b = b_ptr + expert * R * N + n
            g = low_rank(g, v_ptr + rows * R, mask_m, 1, b, n < N, N, R, "ieee", BLOCK_R)
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


DH = Tunable("moe_experts_dh", ("moe_experts",), KEYS, heuristic, space)


def moe_experts_bwd(
    dout: Tensor, x: Tensor, h: Tensor, weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, w13: Tensor,
    w2: Tensor, bias13: Tensor | None, bias2: Tensor | None, a13: Tensor | None, b13: Tensor | None, a2: Tensor | None,
    b2: Tensor | None, activation: str, limit: float, scale: float, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, weights, w13, w2, the biases and the adapters, empty where not wanted or there is none."""
    E, D, I = w2.shape
    P, k = order.numel(), rows.shape[-1]
    of_x, of_weights, of_w13, of_w2, of_bias13, of_bias2, *of_lora = wanted
    none = lambda: x.new_empty(0)  # noqa: E731
    if P == 0 or D == 0:
        inputs = x, weights, w13, w2, bias13, bias2, a13, b13, a2, b2
        return tuple(
            none() if t is None else t.new_zeros(t.shape if want else 0)
            for t, want in zip(inputs, wanted, strict=True)
        )
    lora = Lora.of(a13, b13, a2, b2, scale)
    flat, grad, w13, w2 = dense(x.reshape(-1, D)), dense(dout.reshape(-1, D)), dense(w13), dense(w2)
    placed, weights = Placed(order.contiguous(), offsets.contiguous(), k), weights.contiguous()
    a, dh = x.new_empty(P, I), x.new_empty(P, 2 * I)
    config = fitted(DH(x.device, *key_of(x, P, E, I, D)), D)
    blocks = triton.cdiv(I, config["BLOCK_N"])
    of_bias = bias2 is not None and of_weights
    parts = x.new_zeros(P, blocks + of_bias, dtype=torch.float32)
    if bias2 is not None and of_weights:
        bias_parts(grad, placed, bias2, parts[:, blocks:])
    v2 = term = None
    if lora.a2 is not None and lora.b2 is not None:
        v2 = across(grad, lora.b2, placed, tokens=True, scale=scale)
        term = Term(v2, lora.a2)
    (v, b), R, block = term_of(term, x)
    _moe_experts_dh_kernel[(most_tiles(P, E, config["BLOCK_M"]) * blocks,)](
        grad, weights, h, placed.order, placed.offsets, w2, v, b, dh, a, parts,
        grad.stride(0), w2.stride(0), w2.stride(1), parts.stride(0),
        P, E, I, D, R, k, limit,
        ACT=ACTS[activation],
        BLOCK_E=block_of(E), BLOCK_R=block, **config, enable_fp_fusion=True,
    )  # fmt: skip
    v13 = term = None
    if lora.a13 is not None and lora.b13 is not None and (of_x or of_lora[0]):
        v13 = across(dh, lora.b13, placed, scale=scale)
        term = Term(v13, lora.a13)
    dx = none()
    if of_x:
        each = across(dh, w13, placed, term=term)
        dx = combined(each, torch.ones_like(weights), rows, placed.offsets[E:]).view(x.shape)
    dw13, dw2, dbias13, dbias2 = (none() for _ in range(4))
    sums13, sums2 = of_bias13 and bias13 is not None, of_bias2 and bias2 is not None
    if of_w13 or sums13:
        dw13, dbias13 = of_rows(dh, flat, placed, right_tokens=True, bias=sums13)
    if of_w2 or sums2:
        dw2, dbias2 = of_rows(grad, a, placed, weights, left_tokens=True, bias=sums2)
    dweights = (
        parts.sum(1).view(rows.shape).to(weights.dtype) if of_weights else weights.new_empty(0)
    )
    of_adapters = lora_grads(lora, placed, weights, flat, grad, a, dh, v13, v2, of_lora)
    return (
        dx, dweights, dw13 if of_w13 else none(), dw2 if of_w2 else none(), dbias13, dbias2, *of_adapters,
    )  # fmt: skip


def bias_parts(dout: Tensor, placed: Placed, bias2: Tensor, parts: Tensor) -> None:
    """The part of dweights that is of bias2, by slot: dout [T, D], parts [P, 1] of a wider tensor."""
    E, D = bias2.shape
    wide = min(BIAS_BLOCK, triton.next_power_of_2(D))
    _moe_experts_bias_kernel[(len(parts),)](
        dout, placed.order, placed.offsets, bias2.contiguous(), parts,
        dout.stride(0), parts.stride(0),
        len(parts), E, D, placed.k,
        BLOCK_E=block_of(E), BLOCK_N=wide, num_warps=row_warps(wide), enable_fp_fusion=True,
    )  # fmt: skip


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
        tile, options = split(DH.heuristic(DTYPES[t], M, 1024, 2048))
        tile = fitted(tile, 2048 if plain else 2040) | {
            "BLOCK_E": 128,
            "BLOCK_R": rank_block(DTYPES[t], R),
        }
        dh = {"dout_ptr": t, "weights_ptr": "*fp32", "h_ptr": t, "dh_ptr": t, "a_ptr": t}
        dh |= {"w_ptr": t, "v_ptr": t, "b_ptr": t, "parts_ptr": "*fp32", "limit": "fp32"}
        dh |= {"order_ptr": "*i64", "offsets_ptr": "*i64"}
        sizes = (
            "stride_dm",
            "stride_we",
            "stride_wn",
            "stride_pm",
            "P",
            "E",
            "N",
            "K",
            "R",
            "TOP_K",
        )
        given = {"ACT": "silu" if plain else "gelu_tanh"}
        found.append(
            (_moe_experts_dh_kernel, dh | dict.fromkeys(sizes, "i32"), tile | given, options)
        )
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
