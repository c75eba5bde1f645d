"""Attention's backward:  dP = dout vᵀ, dS = P (dP - rowsum(P dP) + dlse), dq = scale dS k,
dk = scale dSᵀ q, dv = Pᵀ dout.

Dao 2023, arXiv:2307.08691, algorithm 2, with no atomics: one kernel owns dq's rows, another those of
dk and dv.  There P = e^(s - lse) and rowsum(P dP) = rowsum(dout out), both rounded: at scores of
1000 lse is off by 3e-5 and P with it, and where one probability is near 1, all that is left of dS is
the rounding.  Here the dq kernel finds the statistics of a row again, as it goes: m, the maximum
score (base 2); norm = 1 / sum of p = 2^(s - m), negative for rows that see one key at most; mean, near
dP's mean under P, from which dP is measured; drift, what the mean is off by, less dlse.  A sink is a key whose dP is 0; a cap multiplies
dS by its slope on the way to q and k.  Shapes are attention.py's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_dbias import attention_dbias
from ._blocks import met_blocks, tile_start
from ._tile import (
    KEYS,
    LOG2E,
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
    seen_by,
    signature,
    space,
    spans,
    store_rows,
    undropped,
    visible,
)
from ._tune import Config, Tunable, split


@triton.jit
def _dq_step(
    dq, pk, m, l, mean, excess, many, q, dout, k_ptr, v_ptr, bias, words,
    stride_kt, stride_vt, rows, S, lo, hi, start, end, softcap, scale, dropout,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    COUNTED: tl.constexpr, MASK: tl.constexpr, BEGINS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the sums of ds k and p k, and the rows' statistics."""
    cols = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, cols, stride_kt, end, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, cols, stride_vt, end, HEAD_DIM, BLOCK_D)
    s, slope = scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
    s = add_bias(s, bias, rows, cols, S, end, False, HAS_BIAS)
    if MASK:
        seen = visible(cols[None, :], lo[:, None], hi[:, None], end, BEGINS)
        s = tl.where(seen, s, -float("inf"))
    if COUNTED:
        many += tl.sum((s > -float("inf")).to(tl.float32), 1)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        dp = undropped(dp * kept_share(dropout), words, cols, dropout, False, DROPOUT)
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    kept = l * alpha
    total = kept + tl.sum(p, 1)
    # a row that saw nothing yet has total 0, and mean 0
    now = (mean * kept + tl.sum(p * dp, 1)) / tl.where(total == 0, 1.0, total)
    ds = p * (dp - now[:, None])
    shift = now - mean
    excess = excess * alpha - shift * kept + tl.sum(ds, 1)
    dq = dq * alpha[:, None] - pk * (shift * alpha)[:, None]
    dq = tl.dot((ds * slope).to(k.dtype), k, dq, input_precision="ieee")
    pk = tl.dot((p * slope).to(k.dtype), k, pk * alpha[:, None], input_precision="ieee")
    return dq, pk, top, total, now, excess, many


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, bias_ptr, begin_ptr, end_ptr, blocks_ptr, seed_ptr,
    dout_ptr, dlse_ptr, stats_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_lb, stride_lh, stride_ln,
    H, S, T, left, right, softcap, scale, dropout,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    RANGES: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SIZE: tl.constexpr, HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and the statistics of their rows for the dk, dv kernel."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    base = (b * S * H + h) * HEAD_DIM  # dout and dq lie as [B, S, H, D]
    rows = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, stride_qs, S, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr + base, rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D)
    bias = plane(bias_ptr, b, h, stride_bb, stride_bh, stride_bs, stride_bt, HAS_BIAS)
    words = row_words(seed_ptr, bh * S + rows, DROPOUT)

    m0, l0 = first_score(sinks_ptr, h, HAS_SINKS)
    m = tl.zeros((BLOCK_M,), tl.float32) + m0
    l = tl.zeros((BLOCK_M,), tl.float32) + l0
    mean = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    many = tl.zeros((BLOCK_M,), tl.float32)  # keys that a bias or blocks leave
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    lo, hi = key_range(rows, b, begin_ptr, end_ptr, S, T, left, right, LEFT, RIGHT, RANGES)
    if SIZE:
        begin, open, whole, end = 0, 0, 0, 0
        listed, count = met_blocks(blocks_ptr, b, h, first, stride_lb, stride_lh, stride_ln, SIZE)
        for n in range(count * (SIZE // BLOCK_N)):
            start = tile_start(listed, n, SIZE, BLOCK_N)
            dq, pk, m, l, mean, excess, many = _dq_step(
                dq, pk, m, l, mean, excess, many, q, dout, k_ptr, v_ptr, bias, words,
                stride_kt, stride_vt, rows, S, lo, hi, start, T, softcap, scale, dropout,
                HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, True, True, LEFT or RANGES, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    elif RANGES:
        begin, open, whole, end = range_spans(lo, hi, rows, S, T, BLOCK_N)
    else:
        begin, open, whole, end = spans(first, S, T, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
    if LEFT or RANGES:
        for start in range(begin, min(open, end), BLOCK_N):
            dq, pk, m, l, mean, excess, many = _dq_step(
                dq, pk, m, l, mean, excess, many, q, dout, k_ptr, v_ptr, bias, words,
                stride_kt, stride_vt, rows, S, lo, hi, start, end, softcap, scale, dropout,
                HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, HAS_BIAS or SIZE, True, LEFT or RANGES, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    for start in range(open, whole, BLOCK_N):
        dq, pk, m, l, mean, excess, many = _dq_step(
            dq, pk, m, l, mean, excess, many, q, dout, k_ptr, v_ptr, bias, words,
            stride_kt, stride_vt, rows, S, lo, hi, start, end, softcap, scale, dropout,
            HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, HAS_BIAS or SIZE, False, LEFT or RANGES, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        dq, pk, m, l, mean, excess, many = _dq_step(
            dq, pk, m, l, mean, excess, many, q, dout, k_ptr, v_ptr, bias, words,
            stride_kt, stride_vt, rows, S, lo, hi, start, end, softcap, scale, dropout,
            HEAD_DIM, SOFTCAP, HAS_BIAS, DROPOUT, HAS_BIAS or SIZE, True, LEFT or RANGES, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    norm = 1.0 / divisor(l, lo, hi, T, HAS_SINKS, HAS_BIAS or SIZE)
    # one key at most: P = 1 whatever the score, which dP - mean only approaches
    still = (seen_by(lo, hi, T) <= 1) & (not HAS_SINKS)
    if HAS_BIAS or SIZE:
        still = (many <= 1) & (not HAS_SINKS)
    drift = tl.where(still, 0.0, excess * norm)
    dq = tl.where(still[:, None], 0.0, dq)
    if HAS_DLSE:
        drift -= tl.load(dlse_ptr + bh * S + rows, mask=rows < S, other=0.0)
    dq = (dq - drift[:, None] * pk) * (scale * norm)[:, None]
    store_rows(
        dq_ptr + base, dq.to(dq_ptr.dtype.element_ty), rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D
    )
    stats_ptr += bh * 4 * S + rows
    tl.store(stats_ptr, m, mask=rows < S)
    tl.store(stats_ptr + S, tl.where(still, -norm, norm), mask=rows < S)
    tl.store(stats_ptr + 2 * S, mean, mask=rows < S)
    tl.store(stats_ptr + 3 * S, drift, mask=rows < S)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_ptr, bias, begin_ptr, end_ptr, seed_ptr, dout_ptr, stats_ptr,
    stride_qs, stride_dos, b, head, cols, start, S, T, left, right, softcap, scale, dropout,
    HEAD_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, RANGES: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries into dk and dv; scores are transposed, [keys, queries]."""
    rows = start + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, stride_qs, S, HEAD_DIM, BLOCK_D)
    dout = load_rows(dout_ptr, rows, stride_dos, S, HEAD_DIM, BLOCK_D)
    stats_ptr += rows
    m = tl.load(stats_ptr, mask=rows < S, other=0.0)
    norm = tl.load(stats_ptr + S, mask=rows < S, other=0.0)
    mean = tl.load(stats_ptr + 2 * S, mask=rows < S, other=0.0)
    drift = tl.load(stats_ptr + 3 * S, mask=rows < S, other=0.0)
    s, slope = scores(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, SOFTCAP)
    s = add_bias(s, bias, rows, cols, S, T, True, HAS_BIAS)
    if MASK:
        lo, hi = key_range(rows, b, begin_ptr, end_ptr, S, T, left, right, LEFT, RIGHT, RANGES)
        seen = visible(cols[:, None], lo[None, :], hi[None, :], T, LEFT or RANGES)
        s = tl.where(seen, s, -float("inf"))
    p = tl.exp2(s - m[None, :]) * tl.abs(norm)[None, :]
    words = row_words(seed_ptr, head * S + rows, DROPOUT)
    kept = undropped(p, words, cols, dropout, True, DROPOUT)
    dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if DROPOUT:
        dp = tl.where(kept == 0, 0.0, dp * kept_share(dropout))
    ds = p * slope * (tl.where((norm < 0)[None, :], 0.0, dp - mean[None, :]) - drift[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, begin_ptr, end_ptr, first_ptr, last_ptr,
    blocks_ptr, seed_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_bb, stride_bh, stride_bs, stride_bt, stride_lb, stride_lh, stride_ln,
    G, S, T, left, right, softcap, scale, dropout,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    RANGES: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, summed in turn over the GROUP heads that share them."""
    first = tl.program_id(0) * BLOCK_N
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    H = G * GROUP
    cols = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + b * stride_kb + g * stride_kh, cols, stride_kt, T, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + b * stride_vb + g * stride_vh, cols, stride_vt, T, HEAD_DIM, BLOCK_D)

    if SIZE:
        begin, open, whole, end = 0, 0, 0, 0
    elif RANGES:  # who sees a key need not be neighbours: none of their blocks goes unmasked
        earliest = tl.load(first_ptr + b * T + cols, mask=cols < T, other=S)
        latest = tl.load(last_ptr + b * T + cols, mask=cols < T, other=0)
        begin, end = tl.min(earliest, 0) // BLOCK_M * BLOCK_M, tl.max(latest, 0)
        open, whole = begin, begin
    else:
        begin, open, whole, end = spans(first, T, S, right, left, RIGHT, LEFT, BLOCK_N, BLOCK_M)
        if not LEFT:
            # queries past S add nothing and keys past T are not stored: no mask
            whole = max(open, end)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for r in range(GROUP):
        h = g * GROUP + r
        q_h = q_ptr + b * stride_qb + h * stride_qh
        dout_h = dout_ptr + (b * S * H + h) * HEAD_DIM
        head = b * H + h
        stats = stats_ptr + head * 4 * S
        bias = plane(bias_ptr, b, h, stride_bb, stride_bh, stride_bs, stride_bt, HAS_BIAS)
        if SIZE:
            listed, count = met_blocks(
                blocks_ptr, b, h, first, stride_lb, stride_lh, stride_ln, SIZE
            )
            for n in range(count * (SIZE // BLOCK_M)):
                start = tile_start(listed, n, SIZE, BLOCK_M)
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_h, bias, begin_ptr, end_ptr, seed_ptr, dout_h, stats,
                    stride_qs, H * HEAD_DIM, b, head, cols, start, S, T, left, right, softcap, scale, dropout,
                    HEAD_DIM, LEFT, RIGHT, RANGES, SOFTCAP, HAS_BIAS, DROPOUT, True, BLOCK_M, BLOCK_D,
                )  # fmt: skip
        if RIGHT:
            for start in range(begin, min(open, end), BLOCK_M):
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_h, bias, begin_ptr, end_ptr, seed_ptr, dout_h, stats,
                    stride_qs, H * HEAD_DIM, b, head, cols, start, S, T, left, right, softcap, scale, dropout,
                    HEAD_DIM, LEFT, RIGHT, RANGES, SOFTCAP, HAS_BIAS, DROPOUT, True, BLOCK_M, BLOCK_D,
                )  # fmt: skip
        for start in range(open, whole, BLOCK_M):
            dk, dv = _dkv_step(
                dk, dv, k, v, q_h, bias, begin_ptr, end_ptr, seed_ptr, dout_h, stats,
                stride_qs, H * HEAD_DIM, b, head, cols, start, S, T, left, right, softcap, scale, dropout,
                HEAD_DIM, LEFT, RIGHT, RANGES, SOFTCAP, HAS_BIAS, DROPOUT, False, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        if LEFT or RANGES:
            for start in range(whole, end, BLOCK_M):
                dk, dv = _dkv_step(
                    dk, dv, k, v, q_h, bias, begin_ptr, end_ptr, seed_ptr, dout_h, stats,
                    stride_qs, H * HEAD_DIM, b, head, cols, start, S, T, left, right, softcap, scale, dropout,
                    HEAD_DIM, LEFT, RIGHT, RANGES, SOFTCAP, HAS_BIAS, DROPOUT, True, BLOCK_M, BLOCK_D,
                )  # fmt: skip

    base = (b * T * G + g) * HEAD_DIM  # dk and dv lie as [B, T, G, D]
    if DROPOUT:
        dv *= kept_share(dropout)
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    store_rows(dk_ptr + base, dk, cols, G * HEAD_DIM, T, HEAD_DIM, BLOCK_D)
    store_rows(
        dv_ptr + base, dv.to(dv_ptr.dtype.element_ty), cols, G * HEAD_DIM, T, HEAD_DIM, BLOCK_D
    )


# BLOCK_M, BLOCK_N, num_warps, num_stages by padded head dim: the largest that spill on no chip
_DQ = {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)}
_DQ_FLOAT32 = {64: (16, 16, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)}
_DKV = {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)}
_DKV_FLOAT32 = {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 4, 1)}


def _dq_heuristic(dtype: torch.dtype, BLOCK_D: int, causal: bool, S: int) -> Config:
    return by_head_dim(_DQ_FLOAT32 if dtype == torch.float32 else _DQ, BLOCK_D)


def _dkv_heuristic(dtype: torch.dtype, BLOCK_D: int, causal: bool, S: int) -> Config:
    return by_head_dim(_DKV_FLOAT32 if dtype == torch.float32 else _DKV, BLOCK_D)


DQ = Tunable("attention_dq", ("attention",), KEYS, _dq_heuristic, space)
DKV = Tunable("attention_dkv", ("attention",), KEYS, _dkv_heuristic, space)


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    bias: Tensor | None, begin: Tensor | None, end: Tensor | None, blocks: Tensor | None,
    seed: Tensor | None, left: int, right: int, block_size: int, softcap: float, scale: float,
    dropout: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients dq [B, H, S, D], dk, dv [B, G, T, D], lying as [B, S, H, D] and [B, T, G, D], of float32
    dsinks [H] ([0] without sinks) and dbias of bias's shape ([0] where it is not asked for)."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    whole = None if bias is None else bias.expand(B, H, S, T)
    options = Options(
        sinks, whole, begin, end, blocks, seed, left, right, block_size, softcap, scale, dropout
    )  # fmt: skip
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    dout = dout.transpose(1, 2).contiguous()
    dq, dk, dv = heads_last(q), heads_last(k), heads_last(k)
    flags = options.flags(S, T)
    fast = hopper("_attention_hopper_bwd", q.device) if dq.numel() and dk.numel() else None
    if fast is not None and fast.fits(q, k, v, flags, right):
        dlse = None if dlse is None else dlse.contiguous()
        douts = dout.transpose(1, 2)
        fast.attention_hopper_bwd(douts, dlse, q, k, v, dq, dk, dv, flags["RIGHT"], scale)
        return dq, dk, dv, *(q.new_empty(0, dtype=torch.float32) for _ in range(2))
    stats = q.new_empty(B, H, 4, S, dtype=torch.float32)
    sunk = {"HAS_SINKS": flags.pop("HAS_SINKS"), "HAS_DLSE": dlse is not None}
    fixed = {"GROUP": H // G, "HEAD_DIM": D, "BLOCK_D": padded(D), "enable_fp_fusion": True} | flags
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *options.bias_strides())
    scalars = (S, T, *options.scalars(S, T))
    ranges = options.ranges()
    if dq.numel():
        config = config_of(DQ, q, flags)
        lists, *steps = options.lists(S, T)
        _attention_dq_kernel[(triton.cdiv(S, config["BLOCK_M"]), B * H)](
            q, k, v, None if sinks is None else sinks.contiguous(), whole, *ranges, lists, seed,
            dout, None if dlse is None else dlse.contiguous(), stats, dq,
            *strides, *steps, H, *scalars, **sunk, **fixed, **config,
        )  # fmt: skip
    if dk.numel():
        config = config_of(DKV, q, flags)
        lists, *steps = options.lists(S, T, transposed=True)
        _attention_dkv_kernel[(triton.cdiv(T, config["BLOCK_N"]), B * G)](
            q, k, v, whole, *ranges, *_queries(ranges, T), lists, seed, dout, stats, dk, dv,
            *strides, *steps, G, *scalars, **fixed, **config,
        )  # fmt: skip
    dbias = stats.new_empty(0)
    if bias is not None and bias_grad:
        dbias = attention_dbias(dout, q, k, v, bias, stats, options, ranges)
    return dq, dk, dv, _dsinks(sinks, stats), dbias


def _queries(
    ranges: tuple[Tensor | None, Tensor | None], T: int
) -> tuple[Tensor | None, Tensor | None]:
    """For each key [B, T] the first query that may see it, and past the last: the first whose end is
    beyond it, and the last whose begin is not."""
    begin, end = ranges
    if begin is None or end is None:
        return None, None
    keys = torch.arange(T, dtype=torch.int32, device=begin.device).repeat(begin.size(0), 1)
    ends = end.cummax(1).values
    begins = begin.flip(1).cummin(1).values.flip(1)
    first = torch.searchsorted(ends, keys, right=True, out_int32=True)
    last = torch.searchsorted(begins, keys, right=True, out_int32=True)
    return first, last


def _dsinks(sinks: Tensor | None, stats: Tensor) -> Tensor:
    """The sum of a sink's dS over its rows: it is a key whose dP is 0."""
    if sinks is None:
        return stats.new_empty(0)
    m, norm, mean, drift = stats.unbind(2)  # [B, H, S]
    start = (sinks.float() * LOG2E.value)[None, :, None]
    return -((start - m).exp2() * norm * (mean + drift)).sum((0, 2))


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        float32 = dict.fromkeys(("dlse", "stats"), torch.float32)
        dq = signature(
            dict.fromkeys(("q", "k", "v", "sinks", "bias"), dtype)
            | dict.fromkeys(("begin", "end", "blocks"), torch.int32)
            | {"seed": torch.int64, "dout": dtype}
            | float32
            | {"dq": dtype}
        )
        inputs = (
            dict.fromkeys(("q", "k", "v", "bias"), dtype)
            | dict.fromkeys(("begin", "end", "first", "last", "blocks"), torch.int32)
            | {"seed": torch.int64, "dout": dtype, "stats": torch.float32}
        )
        dkv = signature(inputs | {"dk": dtype, "dv": dtype}, "G")
        for D in (64, 128, 256):
            for flags in VARIANTS:
                (dq_blocks, dq_options), (dkv_blocks, dkv_options) = (
                    split(heuristic(dtype, D, True, 4096))
                    for heuristic in (_dq_heuristic, _dkv_heuristic)
                )
                sunk = {"HAS_SINKS": flags["HAS_SINKS"], "HAS_DLSE": flags["HAS_SINKS"]}
                seen = {name: flag for name, flag in flags.items() if name not in sunk}
                fixed = {"GROUP": 4, "HEAD_DIM": D, **seen, "BLOCK_D": D, "stride_bt": 1}
                for kernel, types, constants, options in (
                    (_attention_dq_kernel, dq, fixed | sunk | dq_blocks, dq_options),
                    (_attention_dkv_kernel, dkv, fixed | dkv_blocks, dkv_options),
                ):
                    theirs, none = given(types, constants)
                    found.append((kernel, theirs, constants | none, options))
    return found
