"""New keys and values of a decoding step into a KV cache, keys and queries turned before (RoPE).

B batch, H query heads, G kv heads, S new tokens, D head dim, of which the first R turn; T keys that a
cache has room for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tile import dense_rows, heads_last, padded


@triton.jit
def _turned(
    ptr, d, cos_ptr, sin_ptr, at,
    HEAD_DIM: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, DOUBLED: tl.constexpr,
):  # fmt: skip
    """Features d of a head as float32, the first R turned by the angles of row `at` of the tables."""
    x = tl.load(ptr + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    if R:
        turns = d < R
        if INTERLEAVED:
            other, i, sign = d ^ 1, d // 2, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            other = tl.where(d < R // 2, d + R // 2, d - R // 2)
            i, sign = d % (R // 2), tl.where(d < R // 2, -1.0, 1.0)
        column = i * 2 if INTERLEAVED and DOUBLED else i
        c = tl.load(cos_ptr + at + column, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin_ptr + at + column, mask=turns, other=0.0).to(tl.float32)
        x = x * c + sign * tl.load(ptr + other, mask=turns, other=0.0).to(tl.float32) * s
    return x


@triton.jit
def _as_e4m3(x):
    """float8 e4m3 as its bits: rounded to nearest even, 448 at most, nan kept."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 steps are 2^-9: what adding 1.5 * 2^23 leaves at the bottom
    small = (size * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _keep(to, y, kept, KIND: tl.constexpr):
    """y rounded to what the cache holds."""
    if KIND == "e4m3":
        code = _as_e4m3(y)
    elif KIND == "int8":
        near = tl.minimum(tl.maximum(y, -128.0), 127.0) + 12582912.0  # 1.5 * 2^23 rounds to even
        code = (near - 12582912.0).to(tl.int8)
    else:
        code = y.to(to.dtype.element_ty)
    tl.store(to, code, mask=kept)


@triton.jit
def _attention_append_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, cos_ptr, sin_ptr, k_scale_ptr, v_scale_ptr,
    turned_ptr, k_cache_ptr, v_cache_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_kcb, stride_kch, stride_kct, stride_vcb, stride_vch, stride_vct, stride_tb, stride_rows,
    H, G, S, T, pages, rows,
    HEAD_DIM: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, DOUBLED: tl.constexpr,
    PAGE: tl.constexpr, KIND: tl.constexpr, HAS_SCALES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one new token: its query turned, its key turned and kept, or its value kept."""
    token, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, i = token // S, token % S
    at = tl.load(lengths_ptr + b).to(tl.int64) + i
    d = tl.arange(0, BLOCK_D)
    there = d < HEAD_DIM
    # a kernel cannot raise: past the tables the nearest row turns
    row = tl.minimum(tl.maximum(at, 0), rows - 1) * stride_rows
    if n >= 2 * G:
        h = n - 2 * G
        q = q_ptr + b * stride_qb + h * stride_qh + i * stride_qs
        y = _turned(q, d, cos_ptr, sin_ptr, row, HEAD_DIM, R, INTERLEAVED, DOUBLED)
        turned = turned_ptr + (token * H + h) * HEAD_DIM + d
        tl.store(turned, y.to(turned_ptr.dtype.element_ty), mask=there)
    else:
        g = n % G
        # what the cache has no room for is not written
        kept = there & (at >= 0) & (at < T)
        page, place = b, at
        if PAGE:
            page = tl.load(
                table_ptr + b * stride_tb + at // PAGE, mask=(at >= 0) & (at < T), other=-1
            )
            page, place = page.to(tl.int64), at % PAGE
            kept = kept & (page >= 0) & (page < pages)
        if n < G:
            k = k_ptr + b * stride_kb + g * stride_kh + i * stride_ks
            y = _turned(k, d, cos_ptr, sin_ptr, row, HEAD_DIM, R, INTERLEAVED, DOUBLED)
            y = y.to(k_ptr.dtype.element_ty).to(tl.float32)  # as a key that was turned before
            if HAS_SCALES:
                y = tl.div_rn(y, tl.load(k_scale_ptr + g))
            to = k_cache_ptr + page * stride_kcb + g * stride_kch + place * stride_kct + d
            _keep(to, y, kept, KIND)
        else:
            v = v_ptr + b * stride_vb + g * stride_vh + i * stride_vs
            y = tl.load(v + d, mask=there, other=0.0).to(tl.float32)
            if HAS_SCALES:
                y = tl.div_rn(y, tl.load(v_scale_ptr + g))
            to = v_cache_ptr + page * stride_vcb + g * stride_vch + place * stride_vct + d
            _keep(to, y, kept, KIND)


def attention_append_(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """k, v [B, G, S, D] to places cache_seqlens on of the caches; -> q [B, H, S, D] turned as k is, or
    nothing where there are no tables."""
    (B, H, S, D), (P, G, page) = q.shape, k_cache.shape[:3]
    turned = q.new_empty(0) if cos is None else heads_last(q)
    if B * S == 0:
        return turned
    given = k_cache, v_cache
    k_cache, v_cache = dense_rows(k_cache), dense_rows(v_cache)
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}.get(k_cache.dtype, "")
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    table = None if block_table is None else block_table.contiguous()
    R = stride_rows = rows = 0
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
        rows, stride_rows = cos.shape
        R = stride_rows if 2 * stride_rows > D else 2 * stride_rows
    k_scale, v_scale = both_scales(k_scale, v_scale)
    _attention_append_kernel[(B * S, 2 * G + (0 if cos is None else H))](
        q, k, v, cache_seqlens.contiguous(), table, cos, sin, k_scale, v_scale, turned,
        *(x.view(torch.uint8) if kind == "e4m3" else x for x in (k_cache, v_cache)),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        0 if table is None else table.stride(0), stride_rows,
        H, G, S, page if table is None else page * table.size(1), P, rows,
        HEAD_DIM=D, R=R, INTERLEAVED=interleaved, DOUBLED=R > 0 and stride_rows == R,
        PAGE=0 if table is None else page, KIND=kind, HAS_SCALES=k_scale is not None,
        BLOCK_D=padded(D), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    for cache, dense in zip(given, (k_cache, v_cache), strict=True):
        if cache is not dense:  # its features are no neighbours
            cache.copy_(dense)
    return turned


def both_scales(
    k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both or neither, float32."""
    if k_scale is None and v_scale is None:
        return None, None
    given = k_scale if k_scale is not None else v_scale
    one = torch.ones_like(given, dtype=torch.float32)
    k_scale, v_scale = (one if x is None else x.float().contiguous() for x in (k_scale, v_scale))
    return k_scale, v_scale


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []
    strides = [
        f"stride_{x}{axis}"
        for x, row in (("q", "s"), ("k", "s"), ("v", "s"), ("kc", "t"), ("vc", "t"))
        for axis in ("b", "h", row)
    ]
    sizes = dict.fromkeys(
        [*strides, "stride_tb", "stride_rows", "H", "G", "S", "T", "pages", "rows"], "i32"
    )
    for t in ("*bf16", "*fp32"):
        for kind, cache in (("", t), ("int8", "*i8"), ("e4m3", "*u8")):
            pointers = (
                dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), t)
                | {"lengths_ptr": "*i32", "table_ptr": "*i32"}
                | dict.fromkeys(("cos_ptr", "sin_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
                | {"turned_ptr": t, "k_cache_ptr": cache, "v_cache_ptr": cache}
            )
            constants = {
                "HEAD_DIM": 128, "R": 128, "INTERLEAVED": False, "DOUBLED": True, "PAGE": 16,
                "KIND": kind, "HAS_SCALES": bool(kind), "BLOCK_D": 128,
            }  # fmt: skip
            options = {"num_warps": 1, "enable_fp_fusion": True}
            found.append((_attention_append_kernel, pointers | sizes, constants, options))
    return found
