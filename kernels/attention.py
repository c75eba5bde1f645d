"""Attention:  out = P v,  P = softmax(scale q kᵀ), with lse = log sum exp(scale q kᵀ) kept per row.

Dao 2023, arXiv:2307.08691, algorithms 1 and 2.  B batch, H query heads, G kv heads (GROUP = H / G),
S queries, T keys, D head dim padded to BLOCK_D.  Under CAUSAL query i sees keys j <= i + T - S.
Softmax and sums are float32 in base 2; lse is a natural logarithm, -inf for a row that sees nothing.
Backward, with no atomics: dP = dout vᵀ, dS = P (dP - delta), dq = scale dS k, dk = scale dSᵀ q,
dv = Pᵀ dout; one kernel owns dq's rows, another those of dk and dv.

WIDE casts dot operands to float32: Triton's interpreter computes nonsense in bfloat16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234e38)  # a running maximum that -inf minus it is not nan
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(
    ptr, rows, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr
):
    """Rows [rows, BLOCK_D], zero beyond length and HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (d < HEAD_DIM)[None, :]
    # int64: row * stride passes 2^31 for long caches
    x = tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _store(ptr, x, rows, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], x, mask=mask)


@triton.jit
def _spans(first, S, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys below `whole` (of BLOCK_N) need no mask for rows first.. ; none below `end` are seen by all."""
    seen, end = T, T
    if CAUSAL:
        seen = min(max(first + T - S + 1, 0), T)
        end = min(max(first + BLOCK_M + T - S, 0), T)
    return seen // BLOCK_N * BLOCK_N, end


@triton.jit
def _visible(rows, cols, S, T, CAUSAL: tl.constexpr):
    """Which of cols [1, N] rows [M, 1] may look at (either may be transposed)."""
    return (cols < T) & (cols <= rows + T - S) if CAUSAL else (cols < T) & (rows < S)


@triton.jit
def _fwd_step(
    acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running output, maximum and sum."""
    cols = start + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, cols, stride_kt, T, HEAD_DIM, BLOCK_D, WIDE)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASK:
        s = tl.where(_visible(rows[:, None], cols[None, :], S, T, CAUSAL), s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - top[:, None])
    alpha = tl.exp2(m - top)
    v = _load(v_ptr, cols, stride_vt, T, HEAD_DIM, BLOCK_D, WIDE)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, top, l * alpha + tl.sum(p, 1)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, S, T, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
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
    q = _load(q_ptr, rows, stride_qs, S, HEAD_DIM, BLOCK_D, WIDE)
    factor = scale * LOG2E

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, end = _spans(first, S, T, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        acc, m, l = _fwd_step(
            acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
            HEAD_DIM, CAUSAL, False, WIDE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        acc, m, l = _fwd_step(
            acc, m, l, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
            HEAD_DIM, CAUSAL, True, WIDE, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    blind = l == 0
    out = acc / tl.where(blind, 1.0, l)[:, None]
    lse = tl.where(blind, -float("inf"), (m + tl.log2(tl.where(blind, 1.0, l))) * LN2)
    # out lies as [B, S, H, D]
    out_ptr += (b * S * H + h) * HEAD_DIM
    _store(out_ptr, out.to(out_ptr.dtype.element_ty), rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + bh * S + rows, lse, mask=rows < S)


@triton.jit
def _attention_delta_kernel(
    out_ptr, dout_ptr, delta_ptr,
    H, S,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out); both lie as [B, S, H, D]."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    base = (b * S * H + h) * HEAD_DIM
    out = _load(out_ptr + base, rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D, True)
    dout = _load(dout_ptr + base, rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D, True)
    tl.store(delta_ptr + bh * S + rows, tl.sum(out * dout, 1), mask=rows < S)


@triton.jit
def _dq_step(
    dq, pk, mass, excess, q, dout, lse, delta,
    k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys into the sums of dS k, P k, P and dS."""
    cols = start + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, cols, stride_kt, T, HEAD_DIM, BLOCK_D, WIDE)
    v = _load(v_ptr, cols, stride_vt, T, HEAD_DIM, BLOCK_D, WIDE)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASK:
        s = tl.where(_visible(rows[:, None], cols[None, :], S, T, CAUSAL), s, -float("inf"))
    p = tl.exp2(s - lse[:, None])
    ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    pk = tl.dot(p.to(k.dtype), k, pk, input_precision="ieee")
    return dq, pk, mass + tl.sum(p, 1), excess + tl.sum(ds, 1)


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, mass_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    H, S, T, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, and what the dk, dv kernel needs to be exact.

    lse is rounded, so P is off by one factor in all of a row: mass = sum P undoes it.  delta was
    summed from an output already rounded; where one probability is near 1, all that is left of
    dP - delta is that rounding.  With e = sum P (dP - delta) / mass, 0 but for it, the exact delta is
    delta + e, and dq loses e sum P k.
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    base = (b * S * H + h) * HEAD_DIM  # dout and dq lie as [B, S, H, D]
    rows = first + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, rows, stride_qs, S, HEAD_DIM, BLOCK_D, WIDE)
    dout = _load(dout_ptr + base, rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D, WIDE)
    lse = tl.load(lse_ptr + bh * S + rows, mask=rows < S, other=0.0)
    # a row that sees nothing has P = 0
    lse = tl.where((lse == -float("inf")) | (rows >= S), float("inf"), lse * LOG2E)
    delta = tl.load(delta_ptr + bh * S + rows, mask=rows < S, other=0.0)
    factor = scale * LOG2E

    mass = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pk = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole, end = _spans(first, S, T, CAUSAL, BLOCK_M, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        dq, pk, mass, excess = _dq_step(
            dq, pk, mass, excess, q, dout, lse, delta,
            k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
            HEAD_DIM, CAUSAL, False, WIDE, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        dq, pk, mass, excess = _dq_step(
            dq, pk, mass, excess, q, dout, lse, delta,
            k_ptr, v_ptr, stride_kt, stride_vt, rows, start, S, T, factor,
            HEAD_DIM, CAUSAL, True, WIDE, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    mass = tl.where(mass == 0, 1.0, mass)
    error = excess / mass
    # a row that sees one key has dS = 0, which dP - delta only approaches
    still = (rows + T - S <= 0) if CAUSAL else (rows * 0 + T <= 1)
    dq = (dq - error[:, None] * pk) * tl.where(still, 0.0, scale / mass)[:, None]
    _store(dq_ptr + base, dq.to(dq_ptr.dtype.element_ty), rows, H * HEAD_DIM, S, HEAD_DIM, BLOCK_D)
    tl.store(delta_ptr + bh * S + rows, delta + error, mask=rows < S)
    tl.store(mass_ptr + bh * S + rows, mass, mask=rows < S)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, mass_ptr,
    stride_qs, stride_dos, cols, start, S, T, factor,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of queries into dk and dv; scores are transposed, [keys, queries]."""
    rows = start + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, rows, stride_qs, S, HEAD_DIM, BLOCK_D, WIDE)
    dout = _load(dout_ptr, rows, stride_dos, S, HEAD_DIM, BLOCK_D, WIDE)
    lse = tl.load(lse_ptr + rows, mask=rows < S, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    delta = tl.load(delta_ptr + rows, mask=rows < S, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * factor
    if MASK:
        s = tl.where(_visible(rows[None, :], cols[:, None], S, T, CAUSAL), s, -float("inf"))
    mass = tl.load(mass_ptr + rows, mask=rows < S, other=1.0)
    p = tl.exp2(s - lse[None, :]) / mass[None, :]
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    still = (rows + T - S <= 0) if CAUSAL else (rows * 0 + T <= 1)
    ds = tl.where(still[None, :], 0.0, p * (dp - delta[None, :]))
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, mass_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    G, S, T, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, summed in turn over the GROUP heads that share them."""
    first = tl.program_id(0) * BLOCK_N
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    H = G * GROUP
    cols = first + tl.arange(0, BLOCK_N)
    k = _load(k_ptr + b * stride_kb + g * stride_kh, cols, stride_kt, T, HEAD_DIM, BLOCK_D, WIDE)
    v = _load(v_ptr + b * stride_vb + g * stride_vh, cols, stride_vt, T, HEAD_DIM, BLOCK_D, WIDE)
    factor = scale * LOG2E

    # queries from `begin` see a key of this block, from `clear` on all of them
    begin, clear = 0, 0
    if CAUSAL:
        begin = max(first - (T - S), 0) // BLOCK_M * BLOCK_M
        clear = max(first + BLOCK_N - 1 - (T - S), 0)
        clear = min(max((clear + BLOCK_M - 1) // BLOCK_M * BLOCK_M, begin), S)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for r in range(GROUP):
        h = g * GROUP + r
        q_h = q_ptr + b * stride_qb + h * stride_qh
        dout_h = dout_ptr + (b * S * H + h) * HEAD_DIM
        row = (b * H + h) * S
        for start in range(begin, clear, BLOCK_M):
            dk, dv = _dkv_step(
                dk, dv, k, v, q_h, dout_h, lse_ptr + row, delta_ptr + row, mass_ptr + row,
                stride_qs, H * HEAD_DIM, cols, start, S, T, factor,
                HEAD_DIM, CAUSAL, True, WIDE, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        # keys beyond T are never stored, so this loop needs no mask
        for start in range(max(begin, clear), S, BLOCK_M):
            dk, dv = _dkv_step(
                dk, dv, k, v, q_h, dout_h, lse_ptr + row, delta_ptr + row, mass_ptr + row,
                stride_qs, H * HEAD_DIM, cols, start, S, T, factor,
                HEAD_DIM, CAUSAL, False, WIDE, BLOCK_M, BLOCK_D,
            )  # fmt: skip

    base = (b * T * G + g) * HEAD_DIM  # dk and dv lie as [B, T, G, D]
    dk = (dk * scale).to(dk_ptr.dtype.element_ty)
    _store(dk_ptr + base, dk, cols, G * HEAD_DIM, T, HEAD_DIM, BLOCK_D)
    _store(dv_ptr + base, dv.to(dv_ptr.dtype.element_ty), cols, G * HEAD_DIM, T, HEAD_DIM, BLOCK_D)


# BLOCK_M, BLOCK_N, num_warps, num_stages by padded head dim (dk, dv swap the first two): what fits
# 99 KiB of shared memory, which every GPU from sm_80 on has.  BLOCK_M 128 spills with 4 warps.
_FWD = {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)}
_FWD_FLOAT32 = {64: (32, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)}
_BWD = {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)}
_BWD_FLOAT32 = {64: (32, 16, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}


def _config(table: dict, D: int) -> tuple[dict, dict]:
    """Constexprs and launch options for head dim D."""
    block_d = max(16, triton.next_power_of_2(D))
    m, n, warps, stages = table[max(64, block_d)]
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": block_d}, {
        "num_warps": warps,
        "num_stages": stages,
    }


def _tables(dtype: torch.dtype) -> tuple[dict, dict]:
    return (_FWD_FLOAT32, _BWD_FLOAT32) if dtype == torch.float32 else (_FWD, _BWD)


def _swap(blocks: dict) -> dict:
    return blocks | {"BLOCK_M": blocks["BLOCK_N"], "BLOCK_N": blocks["BLOCK_M"]}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def _heads_last(x: Tensor) -> Tensor:
    """Empty [B, N, S, D] lying as [B, S, N, D]."""
    B, N, S, D = x.shape
    return x.new_empty(B, S, N, D).transpose(1, 2)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D], k, v [B, G, T, D] -> out [B, H, S, D] (lying as [B, S, H, D]), lse [B, H, S]."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    out, lse = _heads_last(q), q.new_empty(B, H, S, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    blocks, options = _config(_tables(q.dtype)[0], D)
    if S <= 16:
        blocks["BLOCK_M"] = 16
        options["num_warps"] = 4
    _attention_fwd_kernel[(triton.cdiv(S, blocks["BLOCK_M"]), B * H)](
        q, k, v, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H, S, T, scale,
        GROUP=H // G, HEAD_DIM=D, CAUSAL=causal, WIDE=triton.knobs.runtime.interpret,
        **blocks, **options,
    )  # fmt: skip
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq [B, H, S, D], dk, dv [B, G, T, D], lying as [B, S, H, D] and [B, T, G, D]."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    dout, out = (x.transpose(1, 2).contiguous() for x in (dout, out))
    dq, dk, dv = _heads_last(q), _heads_last(k), _heads_last(k)
    lse = lse.contiguous()
    delta, mass = torch.empty_like(lse), torch.empty_like(lse)
    blocks, options = _config(_tables(q.dtype)[1], D)
    fixed = {
        "GROUP": H // G,
        "HEAD_DIM": D,
        "CAUSAL": causal,
        "WIDE": triton.knobs.runtime.interpret,
    }
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    if lse.numel():
        row_grid = (triton.cdiv(S, blocks["BLOCK_M"]), B * H)
        _attention_delta_kernel[row_grid](
            out, dout, delta, H, S,
            HEAD_DIM=D, BLOCK_M=blocks["BLOCK_M"], BLOCK_D=blocks["BLOCK_D"], num_warps=8,
        )  # fmt: skip
        _attention_dq_kernel[row_grid](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            mass,
            dq,
            *strides,
            H,
            S,
            T,
            scale,
            **fixed,
            **blocks,
            **options,
        )
    if dk.numel():
        blocks = _swap(blocks)
        _attention_dkv_kernel[(triton.cdiv(T, blocks["BLOCK_N"]), B * G)](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            mass,
            dk,
            dv,
            *strides,
            G,
            S,
            T,
            scale,
            **fixed,
            **blocks,
            **options,
        )
    return dq, dk, dv


def variants() -> list[tuple]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    strides = {
        f"stride_{x}{axis}": "i32" for x, row in ("qs", "kt", "vt") for axis in ("b", "h", row)
    }
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for D in (64, 128, 256):
            fwd, bwd = (_config(table, D) for table in _tables(dtype))
            fixed = {"GROUP": 4, "HEAD_DIM": D, "CAUSAL": True, "WIDE": False}
            pointers = {f"{x}_ptr": f"*{name}" for x in ("q", "k", "v")}
            saved = {
                "dout_ptr": f"*{name}",
                "lse_ptr": "*fp32",
                "delta_ptr": "*fp32",
                "mass_ptr": "*fp32",
            }
            sizes = {"S": "i32", "T": "i32", "scale": "fp32"}
            found += [
                (
                    _attention_fwd_kernel,
                    pointers
                    | {"out_ptr": f"*{name}", "lse_ptr": "*fp32"}
                    | strides
                    | {"H": "i32"}
                    | sizes,
                    fixed | fwd[0],
                    fwd[1],
                ),
                (
                    _attention_delta_kernel,
                    {
                        "out_ptr": f"*{name}",
                        "dout_ptr": f"*{name}",
                        "delta_ptr": "*fp32",
                        "H": "i32",
                        "S": "i32",
                    },
                    {"HEAD_DIM": D, "BLOCK_M": bwd[0]["BLOCK_M"], "BLOCK_D": bwd[0]["BLOCK_D"]},
                    {"num_warps": 8},
                ),
                (
                    _attention_dq_kernel,
                    pointers | saved | {"dq_ptr": f"*{name}"} | strides | {"H": "i32"} | sizes,
                    fixed | bwd[0],
                    bwd[1],
                ),
                (
                    _attention_dkv_kernel,
                    pointers
                    | saved
                    | {"dk_ptr": f"*{name}", "dv_ptr": f"*{name}"}
                    | strides
                    | {"G": "i32"}
                    | sizes,
                    fixed | _swap(bwd[0]),
                    bwd[1],
                ),
            ]
    return found
