"""Products of rows sorted by expert with a weight of their expert's, which moe_experts and quant_moe_experts share:
y = x w^T + bias + u b^T,  y = x w + u b  and  dw = left^T right.

P rows, a slot of k of a token each, by expert; E experts; R the rank of u b, what an adapter (LoRA) adds.  A program
has BLOCK_M rows of one expert, which it finds from the offsets.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._moe import (
    DTYPES,
    KEYS,
    block_of,
    heuristic,
    key_of,
    most_tiles,
    slots_of,
    space,
    tile_of,
)
from ._tune import Config, Tunable, fitted, grid, split


@triton.jit
def low_rank(
    acc, left, mask_l, stride_l, right, mask_r, stride_r, R, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """acc [M, N] plus the products of R numbers at left [M] with R at right [N], pointers, which lie strides apart."""
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        r = start + tl.arange(0, BLOCK_R)
        at = left[:, None] + (r * stride_l)[None, :]
        a = tl.load(at, mask=mask_l[:, None] & (r < R)[None, :], other=0.0)
        at = right[None, :] + (r * stride_r)[:, None]
        b = tl.load(at, mask=(r < R)[:, None] & mask_r[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _moe_experts_down_kernel(
    a_ptr, order_ptr, offsets_ptr, w_ptr, bias_ptr, u_ptr, b_ptr, y_ptr,
    stride_am, stride_we, stride_wn,
    P, E, N, K, R, TOP_K, scale,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [P, N] = a [P, K] w [E, N, K]^T + bias + u [P, R] b [E, N, R]^T; TOKENS: of a the row's token's."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    if TOKENS:
        slots, known = slots_of(order_ptr, rows, mask_m, P)
        a_rows = a_ptr + (slots // TOP_K)[:, None] * stride_am + j[None, :]
    else:
        known = mask_m
        a_rows = a_ptr + rows[:, None] * K + j[None, :]
    w_rows = w_ptr + expert * stride_we + n.to(tl.int64)[:, None] * stride_wn + j[None, :]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, K, BLOCK_K):
            a_mask, w_mask = known[:, None], (n < N)[:, None]
            if not FULL:
                a_mask = a_mask & (start + j < K)[None, :]
                w_mask = w_mask & (start + j < K)[None, :]
            a = tl.load(a_rows + start, mask=a_mask, other=0.0)
            w = tl.load(w_rows + start, mask=w_mask, other=0.0)
            y = tl.dot(a, tl.trans(w), y, input_precision="ieee")
        if BLOCK_R > 0:
            b = b_ptr + (expert * N + n) * R
            y = low_rank(y, u_ptr + rows * R, mask_m, 1, b, n < N, 1, R, "ieee", BLOCK_R)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * N + n, mask=n < N, other=0.0)
            y += bias.to(tl.float32)[None, :]
        if SCALED:
            y *= scale
        tl.store(y_ptr + rows[:, None] * N + n[None, :], y, mask=mask_m[:, None] & (n < N)[None, :])


@triton.jit
def _moe_experts_dx_kernel(
    dh_ptr, order_ptr, offsets_ptr, w_ptr, u_ptr, b_ptr, dx_ptr,
    stride_dm, stride_we, stride_wn,
    P, E, N, K, R, TOP_K, scale,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, FULL: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx [P, N] of each row = dh [P, K] w [E, K, N] + u [P, R] b [E, R, N]; TOKENS: of dh the row's token's."""
    blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert, rows, mask_m = tile_of(offsets_ptr, pid // blocks, P, E, BLOCK_E, BLOCK_M)
    n = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.arange(0, BLOCK_K)
    if TOKENS:
        slots, known = slots_of(order_ptr, rows, mask_m, P)
        d_rows = dh_ptr + (slots // TOP_K)[:, None] * stride_dm + j[None, :]
    else:
        known = mask_m
        d_rows = dh_ptr + rows[:, None] * K + j[None, :]
    w_ptr += expert * stride_we
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.sum(mask_m.to(tl.int32), axis=0) > 0:
        for start in range(0, K, BLOCK_K):
            d_mask, w_mask = known[:, None], (n < N)[None, :]
            if not FULL:
                d_mask = d_mask & (start + j < K)[None, :]
                w_mask = w_mask & (start + j < K)[:, None]
            d = tl.load(d_rows + start, mask=d_mask, other=0.0)
            w_rows = (start + j).to(tl.int64)[:, None] * stride_wn + n[None, :]
            w = tl.load(w_ptr + w_rows, mask=w_mask, other=0.0)
            dx = tl.dot(d, w, dx, input_precision="ieee")
        if BLOCK_R > 0:
            b = b_ptr + expert * R * N + n
            dx = low_rank(dx, u_ptr + rows * R, mask_m, 1, b, n < N, N, R, "ieee", BLOCK_R)
        if SCALED:
            dx *= scale
        tl.store(
            dx_ptr + rows[:, None] * N + n[None, :], dx, mask=mask_m[:, None] & (n < N)[None, :]
        )


@triton.jit
def _moe_experts_dw_kernel(
    left_ptr, right_ptr, weights_ptr, order_ptr, offsets_ptr, dw_ptr, dbias_ptr,
    stride_lm, stride_rm,
    P, N, K, TOP_K,
    LEFT_TOKENS: tl.constexpr, RIGHT_TOKENS: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw [E, N, K] = left^T right over an expert's rows, dbias [E, N] = left's sums.

    Of each row: its own, or its token's where TOKENS; left's times the row's weight where SCALED.
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
        of_left, of_right = rows, rows
        if LEFT_TOKENS:
            of_left = slots // TOP_K
        if RIGHT_TOKENS:
            of_right = slots // TOP_K
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


DOWN = Tunable("moe_experts_down", ("moe_experts",), KEYS, heuristic, space)
DX = Tunable("moe_experts_dx", ("moe_experts",), KEYS, heuristic, space)
DW = Tunable("moe_experts_dw", ("moe_experts",), KEYS, _dw_heuristic, _dw_space)


class Placed(NamedTuple):
    """Which slot each row is, and whose."""

    order: Tensor  # [P]
    offsets: Tensor  # [E + 1]
    k: int  # slots of a token


class Term(NamedTuple):
    """What an adapter adds to a product."""

    u: Tensor  # [P, R]
    b: Tensor  # [E, N, R] or [E, R, N]


class Lora(NamedTuple):
    """Adapters of w13 and w2, contiguous, either or both: scale b a, of weights b a stands beside."""

    a13: Tensor | None  # [E, R, D]
    b13: Tensor | None  # [E, 2 I, R]
    a2: Tensor | None  # [E, R, I]
    b2: Tensor | None  # [E, D, R]
    scale: float

    @classmethod
    def of(cls, *parts: Any) -> "Lora":
        return cls(*(t.contiguous() if isinstance(t, Tensor) else t for t in parts))


def rank_block(dtype: torch.dtype, R: int) -> int:
    """Of R numbers, how many are multiplied at once; 0: there is no adapter."""
    return min(triton.next_power_of_2(max(16, R)), 64 if dtype != torch.float32 else 32) if R else 0


def term_of(term: Term | None, x: Tensor) -> tuple[tuple[Tensor, Tensor], int, int]:
    """What kernels are given of a term: u and b, R and BLOCK_R."""
    if term is None:
        return (x, x), 0, 0
    R = term.u.shape[1]
    return (term.u, term.b), R, rank_block(x.dtype, R)


def narrowed(config: dict[str, Any], **sizes: int) -> dict[str, Any]:
    """config with tiles no wider than the product is: a rank's."""
    fit = {name: max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}
    return config | {name: min(config[name], most) for name, most in fit.items()}


def thin_tile(config: dict[str, Any], N: int, K: int) -> dict[str, Any]:
    """config for the gradient [N, K] of an adapter: eight warps of so few sums spill on sm_80 and stall on sm_90."""
    tile = narrowed(config, BLOCK_N=N, BLOCK_K=K)
    few = tile["BLOCK_N"] * tile["BLOCK_K"] <= 64 * 128
    return tile | {"num_warps": 4} if few else tile


def by_rows(
    x: Tensor, w: Tensor, placed: Placed, *, bias: Tensor | None = None, term: Term | None = None,
    tokens: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """x [P, K] (or [T, K], of tokens), w [E, N, K], last stride 1 -> [P, N]; with a scale w is an adapter's."""
    E, N, K = w.shape
    P = placed.order.numel()
    y = x.new_empty(P, N)
    (u, b), R, block = term_of(term, x)
    config = fitted(DOWN(x.device, *key_of(x, P, E, N, K)), K)
    if scale is not None:
        config = narrowed(config, BLOCK_N=N)
    blocks = most_tiles(P, E, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    _moe_experts_down_kernel[(blocks,)](
        x, placed.order, placed.offsets, w, w if bias is None else bias.contiguous(), u, b, y,
        x.stride(0), w.stride(0), w.stride(1),
        P, E, N, K, R, placed.k, 1.0 if scale is None else scale,
        TOKENS=tokens, SCALED=scale is not None, HAS_BIAS=bias is not None,
        BLOCK_E=block_of(E), BLOCK_R=block, **config, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def across(
    x: Tensor, w: Tensor, placed: Placed, *, term: Term | None = None, tokens: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """x [P, K] (or [T, K], of tokens), w [E, K, N], last stride 1 -> [P, N]; with a scale w is an adapter's."""
    E, K, N = w.shape
    P = placed.order.numel()
    y = x.new_empty(P, N)
    (u, b), R, block = term_of(term, x)
    config = fitted(DX(x.device, *key_of(x, P, E, N, K)), K)
    if scale is not None:
        config = narrowed(config, BLOCK_N=N)
    blocks = most_tiles(P, E, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    _moe_experts_dx_kernel[(blocks,)](
        x, placed.order, placed.offsets, w, u, b, y,
        x.stride(0), w.stride(0), w.stride(1),
        P, E, N, K, R, placed.k, 1.0 if scale is None else scale,
        TOKENS=tokens, SCALED=scale is not None,
        BLOCK_E=block_of(E), BLOCK_R=block, **config, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def of_rows(
    left: Tensor, right: Tensor, placed: Placed, weights: Tensor | None = None, *, left_tokens: bool = False,
    right_tokens: bool = False, bias: bool = False, thin: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """left [P, N] and right [P, K] (or their tokens') -> dw [E, N, K] and, if bias, dbias [E, N]; left's times the
    weights [P], by slot, where there are any.  thin: of an adapter."""
    P, E, N, K = placed.order.numel(), placed.offsets.numel() - 1, left.shape[1], right.shape[1]
    dw, dbias = left.new_empty(E, N, K), left.new_empty((E, N) if bias else 0)
    config = DW(left.device, *key_of(left, P, E, N, K))
    if thin:
        config = thin_tile(config, N, K)
    blocks = triton.cdiv(N, config["BLOCK_N"]) * triton.cdiv(K, config["BLOCK_K"])
    _moe_experts_dw_kernel[(blocks, E)](
        left, right, left if weights is None else weights, placed.order, placed.offsets, dw, dbias,
        left.stride(0), right.stride(0),
        P, N, K, placed.k,
        LEFT_TOKENS=left_tokens, RIGHT_TOKENS=right_tokens, SCALED=weights is not None, HAS_BIAS=bias,
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return dw, dbias


def lora_grads(
    lora: Lora, placed: Placed, weights: Tensor, x: Tensor | None, dout: Tensor, a: Tensor, dh: Tensor,
    v13: Tensor | None, v2: Tensor | None, wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of a13, b13, a2 and b2, empty where not wanted or there is none: x and dout [T, D], a [P, I],
    dh [P, 2 I], v13 = scale dh b13 and v2 = scale dout b2 [P, R]."""
    of_a13, of_b13, of_a2, of_b2 = wanted
    found = [dout.new_empty(0) for _ in wanted]
    if v13 is not None and x is not None and of_a13:
        found[0], _ = of_rows(v13, x, placed, right_tokens=True, thin=True)
    if lora.a13 is not None and x is not None and of_b13:
        u13 = by_rows(x, lora.a13, placed, tokens=True, scale=lora.scale)
        found[1], _ = of_rows(dh, u13, placed, thin=True)
    if v2 is not None and of_a2:
        found[2], _ = of_rows(v2, a, placed, weights, thin=True)
    if lora.a2 is not None and of_b2:
        u2 = by_rows(a, lora.a2, placed, scale=lora.scale)
        found[3], _ = of_rows(dout, u2, placed, weights, left_tokens=True, thin=True)
    return tuple(found)


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline: Qwen3-30B's layer, and
    with adapters of rank 16 what they add and what is theirs alone."""
    found = []
    for M, t, plain, R in (
        (16, "*bf16", True, 0),
        (1024, "*bf16", True, 0),
        (1024, "*fp32", True, 0),
        (1024, "*bf16", False, 0),
        (1024, "*bf16", True, 16),
        (1024, "*fp32", True, 16),
    ):
        dtype = DTYPES[t]
        tile, options = split(heuristic(dtype, M, 1024, 2048))
        tile = fitted(tile, 2048 if plain else 2040) | {
            "BLOCK_E": 128,
            "BLOCK_R": rank_block(dtype, R),
        }
        rows = {"order_ptr": "*i64", "offsets_ptr": "*i64"}
        common = rows | {"w_ptr": t, "u_ptr": t, "b_ptr": t, "stride_we": "i32", "stride_wn": "i32"}
        common |= dict.fromkeys(("P", "E", "N", "K", "R", "TOP_K"), "i32") | {"scale": "fp32"}
        down = {"a_ptr": t, "bias_ptr": t, "y_ptr": t, "stride_am": "i32", **common}
        dx = {"dh_ptr": t, "dx_ptr": t, "stride_dm": "i32", **common}
        dw = {"left_ptr": t, "right_ptr": t, "weights_ptr": "*fp32", "dw_ptr": t, "dbias_ptr": t}
        dw |= rows | dict.fromkeys(("stride_lm", "stride_rm", "P", "N", "K", "TOP_K"), "i32")
        own = {"TOKENS": False, "SCALED": False}
        found.append(
            (_moe_experts_down_kernel, down, tile | own | {"HAS_BIAS": not plain}, options)
        )
        found.append((_moe_experts_dx_kernel, dx, tile | own, options))
        if R:
            thin = narrowed(tile, BLOCK_N=R) | {"BLOCK_R": 0, "TOKENS": True, "SCALED": True}
            found.append((_moe_experts_down_kernel, down, thin | {"HAS_BIAS": False}, options))
            found.append((_moe_experts_dx_kernel, dx, thin, options))
        for scaled in (False, True):
            config = _dw_heuristic(dtype, M, 1024, 2048)
            if R:  # db2, whose columns are few, and da13, whose rows are
                config = thin_tile(config, *((2048, R) if scaled else (R, 2048)))
            tile, options = split(config)
            flags = {"LEFT_TOKENS": scaled, "RIGHT_TOKENS": not scaled, "SCALED": scaled}
            flags |= {"HAS_BIAS": not plain}
            found.append((_moe_experts_dw_kernel, dw, tile | flags, options))
    return found
