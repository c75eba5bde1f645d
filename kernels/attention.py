"""Attention:  out = P v,  P = softmax(scale q kᵀ).

Dao 2023, arXiv:2307.08691, algorithm 1.  B batch, H query heads, G kv heads (GROUP = H / G),
S queries, T keys, D head dim padded to BLOCK_D.  Under CAUSAL query i sees keys j <= i + T - S.
Softmax and sums are float32 in base 2.  The backward is in _attention_bwd.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd import attention_bwd
from ._tile import (
    KEYS,
    LOG2E,
    LOWEST,
    by_head_dim,
    dense_rows,
    divisor,
    heads_last,
    key,
    load_rows,
    padded,
    signature,
    space,
    spans,
    store_rows,
    visible,
)
from ._tune import Config, Tunable, split

__all__ = ["attention_bwd", "attention_fwd", "variants"]


@triton.jit
def _fwd_step(
    acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running output, maximum and sum."""
    cols = start + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, cols, stride_kt, T, HEAD_DIM, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASK:
        s = tl.where(visible(rows[:, None], cols[None, :], S, T, CAUSAL), s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    v = load_rows(v_ptr, cols, stride_vt, T, HEAD_DIM, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, top, l * alpha + tl.sum(p, 1)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, S, T, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
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
    factor = scale * LOG2E

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, end = spans(first, S, T, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        acc, m, l = _fwd_step(
            acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
            HEAD_DIM, CAUSAL, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        acc, m, l = _fwd_step(
            acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
            HEAD_DIM, CAUSAL, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    out = acc / divisor(l, rows, S, T, CAUSAL)[:, None]
    # out lies as [B, S, H, D]
    out_ptr += (b * S * H + h) * HEAD_DIM
    store_rows(out_ptr, out.to(out_ptr.dtype.element_ty), rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D)


# BLOCK_M, BLOCK_N, num_warps, num_stages by padded head dim: what fits 99 KiB of shared memory,
# which every GPU from sm_80 on has.  BLOCK_M 128 spills with 4 warps.
_HALF = {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)}
_FLOAT32 = {64: (32, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)}


def _heuristic(dtype: torch.dtype, BLOCK_D: int, causal: bool, S: int) -> Config:
    config = by_head_dim(_FLOAT32 if dtype == torch.float32 else _HALF, BLOCK_D)
    return config | {"BLOCK_M": 16, "num_warps": 4} if S <= 16 else config


FWD = Tunable("attention_fwd", ("attention",), KEYS, _heuristic, space)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """q [B, H, S, D], k, v [B, G, T, D] -> out [B, H, S, D], lying as [B, S, H, D]."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    q, k, v, out = dense_rows(q), dense_rows(k), dense_rows(v), heads_last(q)
    if out.numel() == 0:
        return out
    config = FWD(q.device, *key(q, causal))
    _attention_fwd_kernel[(triton.cdiv(S, config["BLOCK_M"]), B * H)](
        q, k, v, out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H, S, T, scale,
        GROUP=H // G, HEAD_DIM=D, CAUSAL=causal, BLOCK_D=padded(D),
        **config, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        types = signature(dict.fromkeys(("q", "k", "v", "out"), dtype))
        for D in (64, 128, 256):
            fixed = {"GROUP": 4, "HEAD_DIM": D, "CAUSAL": True, "BLOCK_D": D}
            for S in (16, 4096):
                blocks, options = split(_heuristic(dtype, D, True, S))
                found.append((_attention_fwd_kernel, types, fixed | blocks, options))
    return found
