"""Attention:  out = P v,  P = softmax(scale q kᵀ),  lse = log sum exp(scale q kᵀ).

Dao 2023, arXiv:2307.08691, algorithm 1.  B batch, H query heads, G kv heads (GROUP = H / G),
S queries, T keys, D head dim padded to BLOCK_D; which keys a query sees, and what a sink and a cap
do to its scores, is in _tile.py.  Softmax and sums are float32 in base 2.  The backward is in
_attention_bwd.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd import attention_bwd
from ._blocks import met_blocks, tile_start
from ._tile import (
    KEYS,
    LN2,
    LOWEST,
    PLAIN,
    VARIANTS,
    Options,
    add_bias,
    by_head_dim,
    config_of,
    dense_rows,
    divisor,
    first_score,
    given,
    heads_last,
    hopper,
    kept_share,
    key_range,
    load_rows,
    padded,
    plane,
    range_spans,
    row_words,
    scores,
    signature,
    space,
    spans,
    store_rows,
    undropped,
    visible,
    within,
)
from ._tune import Config, Tunable, split

__all__ = ["attention_bwd", "attention_fwd", "variants"]


@triton.jit
def _fwd_step(
    acc, m, l, q, k_ptr, v_ptr, bias, words, stride_kt, stride_vt, rows, S, lo, hi, start, end,
    softcap, scale, dropout,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    MASK: tl.constexpr, BEGINS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running output, maximum and sum."""
    cols = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, cols, stride_kt, end, HEAD_DIM, BLOCK_D)
    s, _ = scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    s = add_bias(s, bias, rows, cols, S, end, False, HAS_BIAS)
    if MASK:
        seen = visible(cols[None, :], lo[:, None], hi[:, None], end, BEGINS)
        s = tl.where(seen, s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    v = load_rows(v_ptr, cols, stride_vt, end, HEAD_DIM, BLOCK_D)
    kept = undropped(p, words, cols, dropout, False, DROPOUT)
    acc = tl.dot(kept.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, top, l * alpha + tl.sum(p, 1)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, bias_ptr, begin_ptr, end_ptr, blocks_ptr, seed_ptr,
    out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_lb, stride_lh, stride_ln,
    H, S, T, left, right, softcap, scale, dropout,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    RANGES: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all the keys they see."""
    # under a causal mask the last rows are the longest: they start first
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, stride_qs, S, HEAD_DIM, BLOCK_D)
    bias = plane(bias_ptr, b, h, stride_bb, stride_bh, stride_bs, stride_bt, HAS_BIAS)
    words = row_words(seed_ptr, bh * S + rows, DROPOUT)

    m0, l0 = first_score(sinks_ptr, h, HAS_SINKS)
    m = tl.zeros((BLOCK_M,), tl.float32) + m0
    l = tl.zeros((BLOCK_M,), tl.float32) + l0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lo, hi = key_range(rows, b, begin_ptr, end_ptr, S, T, left, right, LEFT, RIGHT, RANGES)
    if SIZE:
        begin, open, whole, end = 0, 0, 0, 0
        listed, count = met_blocks(blocks_ptr, b, h, first, stride_lb, stride_lh, stride_ln, SIZE)
        for n in range(count * (SIZE // BLOCK_N)):
            start = tile_start(listed, n, SIZE, BLOCK_N)
            acc, m, l = _fwd_step(
                acc, m, l, q, k_ptr, v_ptr, bias, words, stride_kt, stride_vt, rows, S, lo, hi, start, T,
                softcap, scale, dropout, HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, True, LEFT or RANGES, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    elif RANGES:
        begin, open, whole, end = range_spans(lo, hi, rows, S, T, BLOCK_N)
    else:
        begin, open, whole, end = spans(first, S, T, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    if LEFT or RANGES:
        for start in range(begin, min(open, end), BLOCK_N):
            acc, m, l = _fwd_step(
                acc, m, l, q, k_ptr, v_ptr, bias, words, stride_kt, stride_vt, rows, S, lo, hi, start, end,
                softcap, scale, dropout, HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, True, LEFT or RANGES, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    for start in range(open, whole, BLOCK_N):
        acc, m, l = _fwd_step(
            acc, m, l, q, k_ptr, v_ptr, bias, words, stride_kt, stride_vt, rows, S, lo, hi, start, end,
            softcap, scale, dropout, HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, False, LEFT or RANGES, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        acc, m, l = _fwd_step(
            acc, m, l, q, k_ptr, v_ptr, bias, words, stride_kt, stride_vt, rows, S, lo, hi, start, end,
            softcap, scale, dropout, HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, True, LEFT or RANGES, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    out = acc / divisor(l, lo, hi, T, HAS_SINKS, HAS_BIAS or SIZE)[:, None]
    if DROPOUT:
        out *= kept_share(dropout)
    # out lies as [B, S, H, D]
    out_ptr += (b * S * H + h) * HEAD_DIM
    store_rows(out_ptr, out.to(out_ptr.dtype.element_ty), rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D)
    lse = tl.where(m == LOWEST, -float("inf"), (m + tl.log2(l)) * LN2)
    tl.store(lse_ptr + bh * S + rows, lse, mask=rows < S)


# BLOCK_M, BLOCK_N, num_warps, num_stages by padded head dim: what fits 99 KiB of shared memory,
# which every GPU from sm_80 on has.  BLOCK_M 128 spills with 4 warps.
_HALF = {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)}
_FLOAT32 = {64: (32, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)}


def _heuristic(dtype: torch.dtype, BLOCK_D: int, causal: bool, S: int) -> Config:
    config = by_head_dim(_FLOAT32 if dtype == torch.float32 else _HALF, BLOCK_D)
    return config | {"BLOCK_M": 16, "num_warps": 4} if S <= 16 else config


FWD = Tunable("attention_fwd", ("attention",), KEYS, _heuristic, space)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, begin: Tensor | None,
    end: Tensor | None, blocks: Tensor | None, seed: Tensor | None, left: int, right: int,
    block_size: int, softcap: float, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, H, S, D], k, v [B, G, T, D], sinks [H], bias that broadcasts to [B, H, S, T], begin, end [B, S]
    of int32, blocks as kernels/_blocks.py has them, seed [1] of int64 -> out [B, H, S, D], lying as [B, S, H, D], and lse [B, H, S]."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    bias = None if bias is None else bias.expand(B, H, S, T)
    options = Options(
        sinks, bias, begin, end, blocks, seed, left, right, block_size, softcap, scale, dropout
    )  # fmt: skip
    q, k, v, out = dense_rows(q), dense_rows(k), dense_rows(v), heads_last(q)
    lse = q.new_empty(B, H, S, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    flags = options.flags(S, T)
    fast = hopper("_attention_hopper", q.device)
    if fast is not None and fast.fits(q, k, v, flags, right):
        fast.attention_hopper(q, k, v, out, lse, flags["RIGHT"], scale)
        return out, lse
    config = config_of(FWD, q, flags)
    lists, *steps = options.lists(S, T)
    _attention_fwd_kernel[(triton.cdiv(S, config["BLOCK_M"]), B * H)](
        q, k, v, None if sinks is None else sinks.contiguous(), bias, *options.ranges(), lists, seed, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *options.bias_strides(), *steps,
        H, S, T, *options.scalars(S, T),
        GROUP=H // G, HEAD_DIM=D, **flags, BLOCK_D=padded(D),
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return out, lse


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        types = signature(
            dict.fromkeys(("q", "k", "v", "sinks", "bias"), dtype)
            | dict.fromkeys(("begin", "end", "blocks"), torch.int32)
            | {"seed": torch.int64, "out": dtype, "lse": torch.float32}
        )
        for D in (64, 128, 256):
            for S, flags in ((16, PLAIN), *((4096, flags) for flags in VARIANTS)):
                fixed = {"GROUP": 4, "HEAD_DIM": D, **flags, "BLOCK_D": D, "stride_bt": 1}
                blocks, options = split(within(_heuristic(dtype, D, True, S), flags, D))
                theirs, none = given(types, flags)
                found.append((_attention_fwd_kernel, theirs, fixed | blocks | none, options))
    return found
