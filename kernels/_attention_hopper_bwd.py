"""Attention's backward on Hopper, dense, causal or not: the two kernels of _attention_bwd.py, whose formulas
these are, each as _attention_hopper.py lays out the forward.  A warp brings what passes by (TMA), two groups of
four hold 64 rows each: of queries for dq, of keys for dk and dv (wgmma, probabilities in registers).

A row's statistics pass from the first kernel to the second as two numbers: top, so that P = 2^(s - top),
and center, so that dS = P (dP - center).  Of a row that sees one key dP is taken for 0, and center is what a
gradient of lse leaves.  What the mean's rounding is off by, which the portable kernels take back, is nothing
beside bfloat16's.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._attention_hopper import LN2, LOWEST, descriptor, layout_of
from ._attention_hopper import fits as fits_forward
from ._tile import LOG2E as LOG2_OF_E

ARCHS = (90,)  # what variants() are compiled for


@gluon.jit
def _hold(desc, b, head, first, x, full, ROWS: gl.constexpr):
    """Both groups' rows of what stays."""
    for part in gl.static_range(2):
        mbarrier.expect(full.index(part), desc.block_type.nbytes)
        at = [b, head, first + part * ROWS, 0]
        tma.async_copy_global_to_shared(desc, at, full.index(part), x.index(part))


@gluon.jit
def _dq_producer(
    q_desc, dout_desc, k_desc, v_desc, q, dout, k, v, q_full, dout_full, full, empty,
    b, h, g, first, count, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: queries and output gradients once, keys and values from the last block to the first."""
    _hold(q_desc, b, h, first, q, q_full, ROWS)
    _hold(dout_desc, b, h, first, dout, dout_full, ROWS)
    for i in range(count):
        stage, phase = i % STAGES, i // STAGES & 1
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        at = [b, g, (count - 1 - i) * BLOCK_N, 0]
        tma.async_copy_global_to_shared(k_desc, at, full.index(stage), k.index(stage))
        tma.async_copy_global_to_shared(v_desc, at, full.index(stage), v.index(stage))


@gluon.jit
def _dq_step(
    dq, pk, m, l, mean, i, count, q, dout, k, v, full, empty, rows, S, T, scale,
    CAUSAL: gl.constexpr, MASK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """One block of keys into the sums of ds k and p k, and the rows' statistics."""
    ROWS: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    stage, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(full.index(stage), phase)
    keys = k.index(stage).reshape((BLOCK_N, HEAD_DIM))
    values = v.index(stage).reshape((BLOCK_N, HEAD_DIM))
    s = gl.zeros((ROWS, BLOCK_N), gl.float32, s_layout)
    dp = gl.zeros((ROWS, BLOCK_N), gl.float32, s_layout)
    s = warpgroup_mma(q, keys.permute((1, 0)), s, use_acc=False, is_async=True)
    dp = warpgroup_mma(dout, values.permute((1, 0)), dp, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    if MASK:
        start = (count - 1 - i) * BLOCK_N
        cols = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        seen = (cols < T)[None, :]
        if CAUSAL:
            seen = seen & (cols[None, :] <= (rows + (T - S))[:, None])
        s = gl.where(seen, s, -float("inf"))
    top = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - top[:, None])
    alpha = gl.exp2(m - top)
    kept = l * alpha
    total = kept + gl.sum(p, 1)
    dp = warpgroup_mma_wait(0, (dp,))
    # a row that saw nothing yet has total 0, and mean 0
    now = (mean * kept + gl.sum(p * dp, 1)) / gl.where(total == 0, 1.0, total)
    alpha_o = gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))
    shift_o = gl.convert_layout((now - mean) * alpha, gl.SliceLayout(1, o_layout))
    dq = dq * alpha_o[:, None] - pk * shift_o[:, None]
    pk = pk * alpha_o[:, None]
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    pk = warpgroup_mma(gl.convert_layout(p.to(q.dtype), operand), keys, pk, is_async=True)
    ds = p * (dp - now[:, None])
    dq = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), operand), keys, dq, is_async=True)
    dq, pk = warpgroup_mma_wait(0, (dq, pk))
    mbarrier.arrive(empty.index(stage))
    return dq, pk, top, total, now


@gluon.jit
def _dq_consumer(
    part: gl.constexpr, dq_desc, dlse_ptr, top_ptr, center_ptr,
    q, dout, k, v, q_full, dout_full, full, empty, b, h, H, first, count, edge, S, T, stride, scale,
    CAUSAL: gl.constexpr, HAS_DLSE: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: ROWS queries against count blocks of keys, of which the edge that come first are masked."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows = first + part * ROWS + gl.arange(0, ROWS, row_layout)
    m = gl.full((ROWS,), LOWEST, gl.float32, row_layout)
    l = gl.zeros((ROWS,), gl.float32, row_layout)
    mean = gl.zeros((ROWS,), gl.float32, row_layout)
    dq = gl.zeros((ROWS, HEAD_DIM), gl.float32, o_layout)
    pk = gl.zeros((ROWS, HEAD_DIM), gl.float32, o_layout)
    queries = q.index(part).reshape((ROWS, HEAD_DIM))
    douts = dout.index(part).reshape((ROWS, HEAD_DIM))
    mbarrier.wait(q_full.index(part), 0)
    mbarrier.wait(dout_full.index(part), 0)
    for i in range(edge):
        dq, pk, m, l, mean = _dq_step(
            dq, pk, m, l, mean, i, count, queries, douts, k, v, full, empty, rows, S, T, scale,
            CAUSAL, True, BLOCK_N, STAGES, s_layout, o_layout,
        )  # fmt: skip
    for i in range(edge, count):
        dq, pk, m, l, mean = _dq_step(
            dq, pk, m, l, mean, i, count, queries, douts, k, v, full, empty, rows, S, T, scale,
            CAUSAL, False, BLOCK_N, STAGES, s_layout, o_layout,
        )  # fmt: skip
    factor = scale * LN2 / l
    of_dq, center = factor, mean
    # one key: P = 1 whatever the score, and dS what a gradient of lse leaves; fused multiply-adds come near
    if CAUSAL:
        still = rows + (T - S) <= 0
        of_dq = gl.where(still, 0.0, factor)
        center = gl.where(still, 0.0, mean)
    head = (b * H + h).to(gl.int64)
    dq = dq * gl.convert_layout(of_dq, gl.SliceLayout(1, o_layout))[:, None]
    if HAS_DLSE:
        dlse = gl.load(dlse_ptr + head * S + rows, mask=rows < S, other=0.0)
        center = center - dlse
        dq = dq + pk * gl.convert_layout(dlse * factor, gl.SliceLayout(1, o_layout))[:, None]
    at = head * stride + rows
    gl.store(top_ptr + at, m + gl.log2(l), mask=rows < S)
    gl.store(center_ptr + at, center, mask=rows < S)
    queries.store(dq.to(q.dtype))  # where the queries were
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [b, h, first + part * ROWS, 0], q.index(part))
    tma.store_wait(0)


@gluon.jit
def _attention_hopper_dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, dlse_ptr, top_ptr, center_ptr, H, S, T, stride, scale,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HAS_DLSE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one head, and their statistics; scale is in base 2."""
    # under a causal mask the last rows are the longest: they start first
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * BLOCK_M
    h, b = gl.program_id(1), gl.program_id(2)
    ROWS: gl.constexpr = BLOCK_M // 2
    end, whole = T, T
    if CAUSAL:
        end = min(T, first + BLOCK_M + T - S)
        whole = first + T - S + 1
    count = gl.cdiv(end, BLOCK_N)
    edge = count - min(whole // BLOCK_N, count)
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, HEAD_DIM], dout_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(q_full.index(part), count=1)
        mbarrier.init(dout_full.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both consumers have read it
    fence_async_shared()
    gl.warp_specialize(
        [
            (_dq_consumer, (
                0, dq_desc, dlse_ptr, top_ptr, center_ptr,
                q, dout, k, v, q_full, dout_full, full, empty, b, h, H, first, count, edge,
                S, T, stride, scale, CAUSAL, HAS_DLSE, HEAD_DIM, ROWS, BLOCK_N, STAGES,
            )),
            (_dq_consumer, (
                1, dq_desc, dlse_ptr, top_ptr, center_ptr,
                q, dout, k, v, q_full, dout_full, full, empty, b, h, H, first, count, edge,
                S, T, stride, scale, CAUSAL, HAS_DLSE, HEAD_DIM, ROWS, BLOCK_N, STAGES,
            )),
            (_dq_producer, (
                q_desc, dout_desc, k_desc, v_desc, q, dout, k, v, q_full, dout_full, full, empty,
                b, h, h // GROUP, first, count, ROWS, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _dkv_producer(
    k_desc, v_desc, q_desc, dout_desc, top_desc, center_desc,
    k, v, q, dout, top, center, k_full, v_full, full, empty, b, g, H, first, begin, count,
    GROUP: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: keys and values once, then of each head that shares them count blocks of queries."""
    _hold(k_desc, b, g, first, k, k_full, ROWS)
    _hold(v_desc, b, g, first, v, v_full, ROWS)
    for n in range(GROUP * count):
        stage, phase = n % STAGES, n // STAGES & 1
        h = g * GROUP + n // count
        row = begin + n % count * BLOCK_M
        mbarrier.wait(empty.index(stage), phase ^ 1)
        of_rows: gl.constexpr = q_desc.block_type.nbytes + dout_desc.block_type.nbytes
        of_stats: gl.constexpr = top_desc.block_type.nbytes + center_desc.block_type.nbytes
        mbarrier.expect(full.index(stage), of_rows + of_stats)
        bar = full.index(stage)
        tma.async_copy_global_to_shared(q_desc, [b, h, row, 0], bar, q.index(stage))
        tma.async_copy_global_to_shared(top_desc, [b * H + h, row], bar, top.index(stage))
        tma.async_copy_global_to_shared(dout_desc, [b, h, row, 0], bar, dout.index(stage))
        tma.async_copy_global_to_shared(center_desc, [b * H + h, row], bar, center.index(stage))


@gluon.jit
def _dkv_step(
    dk, dv, n, row, k, v, q, dout, top, center, full, empty, cols, S, T, scale,
    MASK: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """One block of queries into dk and dv; scores are transposed, [keys, queries]."""
    ROWS: gl.constexpr = k.shape[0]
    HEAD_DIM: gl.constexpr = k.shape[1]
    stage, phase = n % STAGES, n // STAGES & 1
    mbarrier.wait(full.index(stage), phase)
    queries = q.index(stage).reshape((BLOCK_M, HEAD_DIM))
    douts = dout.index(stage).reshape((BLOCK_M, HEAD_DIM))
    s = gl.zeros((ROWS, BLOCK_M), gl.float32, s_layout)
    dp = gl.zeros((ROWS, BLOCK_M), gl.float32, s_layout)
    s = warpgroup_mma(k, queries.permute((1, 0)), s, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, douts.permute((1, 0)), dp, use_acc=False, is_async=True)
    tops = top.index(stage).load(s_layout)
    s = warpgroup_mma_wait(1, (s,))
    p = gl.exp2(s * scale - tops)
    if MASK:
        here = row + (T - S) + gl.arange(0, BLOCK_M, gl.SliceLayout(0, s_layout))[None, :]
        p = gl.where(cols[:, None] <= here, p, 0.0)
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dv = warpgroup_mma(gl.convert_layout(p.to(k.dtype), operand), douts, dv, is_async=True)
    centers = center.index(stage).load(s_layout)
    dp = warpgroup_mma_wait(1, (dp,))
    if MASK:
        dp = gl.where(here == 0, 0.0, dp)  # of a row that sees one key
    ds = p * (dp - centers)
    dk = warpgroup_mma(gl.convert_layout(ds.to(k.dtype), operand), queries, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, (dk, dv))
    mbarrier.arrive(empty.index(stage))
    return dk, dv


@gluon.jit
def _dkv_consumer(
    part: gl.constexpr, dk_desc, dv_desc, k, v, q, dout, top, center, k_full, v_full, full, empty,
    b, g, first, begin, count, edge, S, T, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: ROWS keys against count blocks of each head's queries, the first edge of them masked."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    cols = first + part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    dk = gl.zeros((ROWS, HEAD_DIM), gl.float32, o_layout)
    dv = gl.zeros((ROWS, HEAD_DIM), gl.float32, o_layout)
    keys = k.index(part).reshape((ROWS, HEAD_DIM))
    values = v.index(part).reshape((ROWS, HEAD_DIM))
    mbarrier.wait(k_full.index(part), 0)
    mbarrier.wait(v_full.index(part), 0)
    for r in range(GROUP):
        for i in range(edge):
            dk, dv = _dkv_step(
                dk, dv, r * count + i, begin + i * BLOCK_M, keys, values,
                q, dout, top, center, full, empty, cols, S, T, scale,
                True, BLOCK_M, STAGES, s_layout, o_layout,
            )  # fmt: skip
        for i in range(edge, count):
            dk, dv = _dkv_step(
                dk, dv, r * count + i, begin + i * BLOCK_M, keys, values,
                q, dout, top, center, full, empty, cols, S, T, scale,
                False, BLOCK_M, STAGES, s_layout, o_layout,
            )  # fmt: skip
    keys.store((dk * (scale * LN2)).to(k.dtype))  # where the keys were
    values.store(dv.to(k.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [b, g, first + part * ROWS, 0], k.index(part))
    tma.async_copy_shared_to_global(dv_desc, [b, g, first + part * ROWS, 0], v.index(part))
    tma.store_wait(0)


@gluon.jit
def _attention_hopper_dkv_kernel(
    k_desc, v_desc, q_desc, dout_desc, top_desc, center_desc, dk_desc, dv_desc, H, S, T, scale,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys, summed in turn over the GROUP heads that share them; scale is in base 2."""
    first = gl.program_id(0) * BLOCK_N
    g, b = gl.program_id(1), gl.program_id(2)
    ROWS: gl.constexpr = BLOCK_N // 2
    begin, edge = 0, 0
    if CAUSAL:
        # the first row that sees a key of these, and the first that sees all of them
        begin = max(first + S - T, 0) // BLOCK_M * BLOCK_M
        edge = gl.cdiv(max(first + BLOCK_N - 1 + S - T, 0), BLOCK_M) - begin // BLOCK_M
    count = gl.cdiv(S - begin, BLOCK_M)
    edge = min(edge, count)
    dtype: gl.constexpr = k_desc.dtype
    k = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, HEAD_DIM], v_desc.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout)
    dout = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], dout_desc.layout)
    top = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], top_desc.layout)
    center = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], center_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(k_full.index(part), count=1)
        mbarrier.init(v_full.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both consumers have read it
    fence_async_shared()
    gl.warp_specialize(
        [
            (_dkv_consumer, (
                0, dk_desc, dv_desc, k, v, q, dout, top, center, k_full, v_full, full, empty,
                b, g, first, begin, count, edge, S, T, scale, GROUP, HEAD_DIM, ROWS, BLOCK_M, STAGES,
            )),
            (_dkv_consumer, (
                1, dk_desc, dv_desc, k, v, q, dout, top, center, k_full, v_full, full, empty,
                b, g, first, begin, count, edge, S, T, scale, GROUP, HEAD_DIM, ROWS, BLOCK_M, STAGES,
            )),
            (_dkv_producer, (
                k_desc, v_desc, q_desc, dout_desc, top_desc, center_desc,
                k, v, q, dout, top, center, k_full, v_full, full, empty,
                b, g, H, first, begin, count, GROUP, ROWS, BLOCK_M, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


DQ_TILES = {64: (128, 64, 4), 128: (128, 64, 3)}  # BLOCK_M, BLOCK_N, STAGES
DKV_TILES = {64: (64, 128, 4), 128: (64, 128, 3)}


def _stats_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, 32, rank=2)


def fits(q: Tensor, k: Tensor, v: Tensor, flags: dict[str, bool], right: int) -> bool:
    """Whether the kernels can take q [B, H, S, D], k, v [B, G, T, D] with these flags of _tile.Options."""
    return fits_forward(q, k, v, flags, right) and q.shape[3] in DQ_TILES and k.shape[2] > 1


def attention_hopper_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, scale: float,
) -> None:  # fmt: skip
    """dq [B, H, S, D], dk, dv [B, G, T, D] of what fits(); dout [B, H, S, D] of any strides TMA takes, dlse
    [B, H, S] dense."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    scale *= LOG2_OF_E.value
    fixed = {"GROUP": H // G, "CAUSAL": causal, "HEAD_DIM": D, "num_warps": 4}
    stride = triton.cdiv(S, 4) * 4  # TMA asks for 16 bytes
    top, center = q.new_empty(2, B * H, stride, dtype=torch.float32)
    M, N, stages = DQ_TILES[D]
    tile = {"BLOCK_M": M, "BLOCK_N": N, "STAGES": stages}
    _attention_hopper_dq_kernel[(triton.cdiv(S, M), H, B)](
        *(descriptor(x, M // 2) for x in (q, dout)), *(descriptor(x, N) for x in (k, v)),
        descriptor(dq, M // 2), dlse, top, center, H, S, T, stride, scale,
        HAS_DLSE=dlse is not None, **tile, **fixed,
    )  # fmt: skip
    M, N, stages = DKV_TILES[D]
    tile = {"BLOCK_M": M, "BLOCK_N": N, "STAGES": stages}
    stats = (
        TensorDescriptor(x, [B * H, S], [stride, 1], [1, M], _stats_layout()) for x in (top, center)
    )
    _attention_hopper_dkv_kernel[(triton.cdiv(T, N), G, B)](
        *(descriptor(x, N // 2) for x in (k, v)), *(descriptor(x, M) for x in (q, dout)), *stats,
        *(descriptor(x, N // 2) for x in (dk, dv)), H, S, T, scale, **tile, **fixed,
    )  # fmt: skip


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []

    def of(rows: int, D: int, *names: str) -> dict[str, str]:
        return {
            f"{x}_desc": f"tensordesc<bf16[1, 1, {rows}, {D}],{layout_of(torch.bfloat16)!r}>"
            for x in names
        }

    for D in DQ_TILES:
        M, N, stages = DQ_TILES[D]
        dq = of(M // 2, D, "q", "dout") | of(N, D, "k", "v") | of(M // 2, D, "dq")
        dq |= dict.fromkeys(("dlse_ptr", "top_ptr", "center_ptr"), "*fp32")
        dq |= dict.fromkeys(("H", "S", "T", "stride"), "i32") | {"scale": "fp32"}
        dq_tile = {"BLOCK_M": M, "BLOCK_N": N, "STAGES": stages}
        M, N, stages = DKV_TILES[D]
        dkv = of(N // 2, D, "k", "v") | of(M, D, "q", "dout")
        dkv |= {
            f"{x}_desc": f"tensordesc<fp32[1, {M}],{_stats_layout()!r}>" for x in ("top", "center")
        }
        dkv |= of(N // 2, D, "dk", "dv") | dict.fromkeys(("H", "S", "T"), "i32") | {"scale": "fp32"}
        dkv_tile = {"BLOCK_M": M, "BLOCK_N": N, "STAGES": stages}
        for causal in (False, True):
            fixed = {"GROUP": 4, "CAUSAL": causal, "HEAD_DIM": D}
            options = {"num_warps": 4}
            found += [
                (_attention_hopper_dq_kernel, dq, fixed | {"HAS_DLSE": causal} | dq_tile, options),
                (_attention_hopper_dkv_kernel, dkv, fixed | dkv_tile, options),
            ]
    return found
