"""Flash decoding:  attention of a few new queries to a KV cache, split over its keys.

Dao et al. 2023, "Flash-Decoding for long-context inference".  B batch, H query heads, G kv heads
(GROUP = H / G), S queries, D head dim padded to BLOCK_D.  The GROUP heads that share keys fill one tile:
row m = i GROUP + r is query i of head g GROUP + r.  Query i stands at key length - S + i.  Each split takes
its share of the keys there are, by the length that it reads; the grid does not know lengths.  What writes
new keys to the cache is in _attention_append.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_append import attention_append_, both_scales
from ._tile import (
    LN2,
    LOWEST,
    dense_rows,
    divisor,
    first_score,
    heads_last,
    padded,
    scores,
)
from ._tune import Config, Tunable, bucket, grid, split

__all__ = ["attention_append_", "attention_decode_fwd", "variants"]

MOST_ROWS = 64  # of a tile
MOST_SPLITS = 64
COMBINED = 8  # splits that the second kernel reads at a time


@triton.jit
def _widened(x, E4M3: tl.constexpr, dtype: tl.constexpr):
    """A cache's numbers as dtype.  float8 e4m3 by its bits, which sm_80 has no instruction for: as a
    float16 it is 2^-8 of itself, subnormals too."""
    if E4M3:
        x = x.to(tl.uint16)
        size = x & 0x7F
        half = (size << 7) | ((x & 0x80) << 8)
        half = tl.where(size == 0x7F, half | 0x7E00, half)
        x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return x.to(tl.float32).to(dtype)


@triton.jit
def _length(ptr, added, T):
    """How many keys there are.  A kernel cannot raise: a length past the cache's room T is that."""
    length = tl.load(ptr).to(tl.int64) + added
    return tl.minimum(tl.maximum(length, 0), T).to(tl.int32)


@triton.jit
def _load_keys(
    ptr, cols, used, page, stride_b, stride_t,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys or values cols, each on its page, [BLOCK_N, BLOCK_D]; 0 where they are not used."""
    d = tl.arange(0, BLOCK_D)
    row = cols
    if PAGE:
        row = cols % PAGE
    at = page.to(tl.int64) * stride_b + row.to(tl.int64) * stride_t
    mask = used[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + at[:, None] + d[None, :], mask=mask, other=0)


@triton.jit
def _attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, k_scale_ptr, v_scale_ptr, sinks_ptr,
    out_ptr, lse_ptr, partial_ptr, stats_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_tb,
    G, S, T, pages, added, left, softcap, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, E4M3: tl.constexpr,
    HAS_SCALES: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a kv head against one split's share of the keys they see."""
    bg = tl.program_id(0).to(tl.int64)
    share, splits, first_row = tl.program_id(1), tl.num_programs(1), tl.program_id(2) * BLOCK_M
    b, g = bg // G, bg % G
    M = S * GROUP
    rows = first_row + tl.arange(0, BLOCK_M)
    i, h = rows // GROUP, g * GROUP + rows % GROUP
    length = _length(lengths_ptr + b, added, T)
    hi = tl.minimum(length - S + i + 1, length)
    lo = rows * 0
    first, last = 0, tl.minimum(length - S + (first_row + BLOCK_M - 1) // GROUP + 1, length)
    if LEFT:
        lo = tl.maximum(length - S + i - left, 0)
        # not a whole tile: pages before the window may be another's by now
        first = tl.maximum(length - S + first_row // GROUP - left, 0)
    each = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), splits) * BLOCK_N
    begin = first + share * each
    end = tl.minimum(begin + each, last)

    d = tl.arange(0, BLOCK_D)
    mask = (rows < M)[:, None] & (d < HEAD_DIM)[None, :]
    at = b * stride_qb + h * stride_qh + i.to(tl.int64) * stride_qs
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=mask, other=0.0)
    m0, l0 = first_score(sinks_ptr, h, HAS_SINKS)
    # the sink's share is the first split's: beside a maximum of LOWEST the others' sums weigh nothing
    m = tl.where(share == 0, tl.zeros((BLOCK_M,), tl.float32) + m0, LOWEST)
    l = tl.zeros((BLOCK_M,), tl.float32) + l0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    value_scale = 1.0
    if HAS_SCALES:
        scale = scale * tl.load(k_scale_ptr + g)
        value_scale = tl.load(v_scale_ptr + g)
    k_ptr += g * stride_kh
    v_ptr += g * stride_vh
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        used = cols < end
        page = cols * 0 + b
        if PAGE:
            page = tl.load(table_ptr + b * stride_tb + cols // PAGE, mask=used, other=0)
            page = tl.minimum(tl.maximum(page, 0), pages - 1)
        k = _load_keys(k_ptr, cols, used, page, stride_kb, stride_kt, PAGE, HEAD_DIM, BLOCK_D)
        k = _widened(k, E4M3, q.dtype)
        s, _ = scores(tl.dot(q, tl.trans(k), input_precision="ieee"), scale, softcap, SOFTCAP)
        seen = used[None, :] & (cols[None, :] < hi[:, None]) & (cols[None, :] >= lo[:, None])
        s = tl.where(seen, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
        alpha = tl.exp2(m - top)
        v = _load_keys(v_ptr, cols, used, page, stride_vb, stride_vt, PAGE, HEAD_DIM, BLOCK_D)
        v = _widened(v, E4M3, q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m, l = top, l * alpha + tl.sum(p, 1)

    if SPLIT:
        to = (bg * splits + share) * M + rows
        tl.store(partial_ptr + to[:, None] * HEAD_DIM + d[None, :], acc, mask=mask)
        tl.store(stats_ptr + 2 * to, m, mask=rows < M)
        tl.store(stats_ptr + 2 * to + 1, l, mask=rows < M)
    else:
        out = acc * (value_scale / divisor(l, lo, hi, T, HAS_SINKS))[:, None]
        # out lies as [B, S, H, D]
        to = ((b * S + i) * (G * GROUP) + h) * HEAD_DIM
        tl.store(out_ptr + to[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
        lse = tl.where(m == LOWEST, -float("inf"), (m + tl.log2(l)) * LN2)
        tl.store(lse_ptr + (b * (G * GROUP) + h) * S + i, lse, mask=rows < M)


@triton.jit
def _attention_combine_kernel(
    lengths_ptr, v_scale_ptr, partial_ptr, stats_ptr, out_ptr, lse_ptr,
    G, S, T, added, left, splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_SINKS: tl.constexpr,
    LEFT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row's splits, in order."""
    bg, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = bg // G, bg % G
    M = S * GROUP
    i, h = row // GROUP, g * GROUP + row % GROUP
    d = tl.arange(0, BLOCK_D)
    m = LOWEST + 0.0
    l = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)
        there = share < splits
        at = (bg * splits + share) * M + row
        m_part = tl.load(stats_ptr + 2 * at, mask=there, other=LOWEST)
        l_part = tl.load(stats_ptr + 2 * at + 1, mask=there, other=0.0)
        mask = there[:, None] & (d < HEAD_DIM)[None, :]
        part = tl.load(partial_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(m_part, 0))
        weight, alpha = tl.exp2(m_part - top), tl.exp2(m - top)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        l = l * alpha + tl.sum(l_part * weight, 0)
        m = top
    length = _length(lengths_ptr + b, added, T)
    hi = tl.minimum(length - S + i + 1, length)
    lo = 0
    if LEFT:
        lo = tl.maximum(length - S + i - left, 0)
    value_scale = 1.0
    if HAS_SCALES:
        value_scale = tl.load(v_scale_ptr + g)
    out = acc * (value_scale / divisor(l, lo, hi, T, HAS_SINKS))
    to = ((b * S + i) * (G * GROUP) + h) * HEAD_DIM + d
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    lse = tl.where(m == LOWEST, -float("inf"), (m + tl.log2(l)) * LN2)
    tl.store(lse_ptr + (b * (G * GROUP) + h) * S + i, lse)


def _heuristic(dtype: torch.dtype, BLOCK_D: int, M: int) -> Config:
    if dtype == torch.float32:  # whose tl.dot is scalar code: registers
        return {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    if BLOCK_D > 128:
        return {"BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if BLOCK_D > 64 else 3}


def _space(dtype: torch.dtype, BLOCK_D: int, M: int) -> list[Config]:
    """Tiles of which a thread holds 192 scores and sums at most."""
    found = grid(BLOCK_N=(16, 32, 64, 128), num_warps=(2, 4, 8), num_stages=(1, 2, 3, 4))
    rows = block_rows(dtype, M)
    return [
        c
        for c in found
        if rows * (c["BLOCK_N"] + BLOCK_D) <= 6144 * c["num_warps"]
        or c == _heuristic(dtype, BLOCK_D, M)
    ]


LAUNCH = Tunable(
    "attention_decode", ("attention_decode",), ("dtype", "BLOCK_D", "M"), _heuristic, _space
)


def block_rows(dtype: torch.dtype, M: int) -> int:
    """BLOCK_M for M rows a kv head; 16 is the least a tensor core takes, and the most that scalar code
    has registers for."""
    return 16 if dtype == torch.float32 else min(MOST_ROWS, max(16, triton.next_power_of_2(M)))


def splits_for(device: torch.device, tiles: int, T: int, BLOCK_N: int) -> int:
    """Shares of T keys: two waves of programs over the GPU, two blocks of keys each at least."""
    processors = 20  # in the interpreter
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = triton.cdiv(T, 2 * BLOCK_N)
    return max(1, min(triton.cdiv(2 * processors, tiles), most, MOST_SPLITS))


def attention_decode_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, sinks: Tensor | None,
    added: int, left: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, H, S, D], caches [B, G, T, D] or pages [P, G, page, D] -> out [B, H, S, D], lying as
    [B, S, H, D], and lse [B, H, S] of float32."""
    (B, H, S, D), (P, G, page) = q.shape, k_cache.shape[:3]
    GROUP, M = H // G, S * (H // G)
    q, k, v = dense_rows(q), dense_rows(k_cache), dense_rows(v_cache)
    e4m3 = k.dtype == torch.float8_e4m3fn
    if e4m3:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    T = page if block_table is None else page * block_table.size(1)
    T = 0 if P == 0 else T
    out, lse = heads_last(q), q.new_empty(B, H, S, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    table = None if block_table is None else block_table.contiguous()
    lengths = cache_seqlens.contiguous()
    k_scale, v_scale = both_scales(k_scale, v_scale)
    config = LAUNCH(q.device, q.dtype, padded(D), bucket(M, MOST_ROWS))
    BLOCK_M = block_rows(q.dtype, M)
    tiles = triton.cdiv(M, BLOCK_M)
    splits = splits_for(q.device, B * G * tiles, T, config["BLOCK_N"])
    partial = stats = None
    if splits > 1:
        partial = q.new_empty(B * G * splits * M * D, dtype=torch.float32)
        stats = q.new_empty(B * G * splits * M * 2, dtype=torch.float32)
    limited = 0 <= left < T - 1
    fixed = {
        "GROUP": GROUP, "HEAD_DIM": D, "HAS_SCALES": k_scale is not None, "LEFT": limited,
        "HAS_SINKS": sinks is not None, "BLOCK_D": padded(D), "enable_fp_fusion": True,
    }  # fmt: skip
    _attention_decode_kernel[(B * G, splits, tiles)](
        q, k, v, lengths, table, k_scale, v_scale, None if sinks is None else sinks.contiguous(),
        out, lse, partial, stats,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0 if table is None else table.stride(0),
        G, S, T, P, added, left * limited, softcap, scale,
        PAGE=0 if table is None else page, E4M3=e4m3, SOFTCAP=softcap != 0, SPLIT=splits > 1,
        BLOCK_M=BLOCK_M, **fixed, **config,
    )  # fmt: skip
    if splits > 1:
        _attention_combine_kernel[(B * G, M)](
            lengths, v_scale, partial, stats, out, lse,
            G, S, T, added, left * limited, splits,
            BLOCK_S=COMBINED, num_warps=4, **fixed,
        )  # fmt: skip
    return out, lse


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    strides = [f"stride_{x}{axis}" for x, row in ("qs", "kt", "vt") for axis in ("b", "h", row)]
    sizes = ["G", "S", "T", "added", "left"]
    found = []
    for dtype, D in (
        *((torch.bfloat16, D) for D in (64, 128, 256)),
        (torch.float32, 128),
    ):
        t = names[dtype]
        pointers = (
            {
                "lengths_ptr": "*i32",
                "table_ptr": "*i32",
                "k_scale_ptr": "*fp32",
                "v_scale_ptr": "*fp32",
            }
            | {"sinks_ptr": t, "out_ptr": t}
            | dict.fromkeys(("lse_ptr", "partial_ptr", "stats_ptr"), "*fp32")
        )
        scalars = dict.fromkeys([*strides, "stride_tb", *sizes, "pages"], "i32")
        scalars |= dict.fromkeys(["softcap", "scale"], "fp32")
        blocks, options = split(_heuristic(dtype, D, 8))
        # what a cache holds, keys a page, with all that goes together, rows
        for cache, page, whole, rows in (
            (t, 0, False, 16), (t, 16, True, 16), ("*i8", 16, False, 16), ("*u8", 16, False, 16),
            *([(t, 0, False, MOST_ROWS)] if block_rows(dtype, MOST_ROWS) > 16 else []),
        ):  # fmt: skip
            signature = {"q_ptr": t, "k_ptr": cache, "v_ptr": cache} | pointers | scalars
            constants = {
                "GROUP": 8, "HEAD_DIM": D, "PAGE": page, "E4M3": cache == "*u8",
                "HAS_SCALES": cache != t, "LEFT": whole, "SOFTCAP": whole, "HAS_SINKS": whole,
                "SPLIT": True, "BLOCK_M": rows, "BLOCK_D": D,
            }  # fmt: skip
            found.append((_attention_decode_kernel, signature, constants | blocks, options))
        told = ("lengths_ptr", "v_scale_ptr", "partial_ptr", "stats_ptr", "out_ptr", "lse_ptr")
        signature = {name: pointers[name] for name in told} | dict.fromkeys(
            [*sizes, "splits"], "i32"
        )
        constants = {
            "GROUP": 8, "HEAD_DIM": D, "HAS_SCALES": False, "HAS_SINKS": False, "LEFT": False,
            "BLOCK_S": COMBINED, "BLOCK_D": D,
        }  # fmt: skip
        options = {"num_warps": 4, "enable_fp_fusion": True}
        found.append((_attention_combine_kernel, signature, constants, options))
    return found
