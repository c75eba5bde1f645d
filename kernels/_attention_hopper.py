"""Attention's forward on Hopper, dense, causal or not: a warp brings keys and values (TMA), two groups of
four attend to 64 queries each (wgmma), as Shah et al. 2024, arXiv:2407.08608, section 3.

In Gluon, whose API moves between releases: all of it that we use is here.  The portable kernel of
attention.py serves what this one does not, and everything under TILEWRIGHT_HOPPER=0.  Without a GPU its
arithmetic and barriers are tested in lab/gluon.py, its machine code by lab/compile.py.
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

from ._tile import LOG2E as LOG2_OF_E

ARCHS = (90,)  # what variants() are compiled for
LOWEST = gl.constexpr(-3.4028234e38)  # a running maximum that -inf minus it is not nan
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _bring(desc, b, head, i, count, ring, full, empty, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Block i, counted from the last, into its place in a ring once that is free."""
    stage, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    at = [b, head, (count - 1 - i) * BLOCK_N, 0]
    tma.async_copy_global_to_shared(desc, at, full.index(stage), ring.index(stage))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q, k, v, q_full, k_full, k_empty, v_full, v_empty, b, h, g, first, count,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: queries once, keys and values from the last block to the first, keys one ahead."""
    for part in gl.static_range(2):
        mbarrier.expect(q_full.index(part), q_desc.block_type.nbytes)
        at = [b, h, first + part * ROWS, 0]
        tma.async_copy_global_to_shared(q_desc, at, q_full.index(part), q.index(part))
    _bring(k_desc, b, g, 0, count, k, k_full, k_empty, BLOCK_N, STAGES)
    for i in range(1, count):
        _bring(k_desc, b, g, i, count, k, k_full, k_empty, BLOCK_N, STAGES)
        _bring(v_desc, b, g, i - 1, count, v, v_full, v_empty, BLOCK_N, STAGES)
    _bring(v_desc, b, g, count - 1, count, v, v_full, v_empty, BLOCK_N, STAGES)


@gluon.jit
def _softmax(
    s, m, l, rows, start, S, T, scale,
    CAUSAL: gl.constexpr, MASK: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """A block's probabilities, the maximum (base 2) and the sum with it, and what came before is times."""
    if MASK:
        cols = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        seen = (cols < T)[None, :]
        if CAUSAL:
            seen = seen & (cols[None, :] <= (rows + (T - S))[:, None])
        s = gl.where(seen, s, -float("inf"))
    top = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - top[:, None])
    alpha = gl.exp2(m - top)
    return p, top, l * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _step(
    acc, m, l, p, i, count, q, k, v, k_full, k_empty, v_full, v_empty, rows, S, T, scale,
    CAUSAL: gl.constexpr, MASK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Block i's scores and softmax, while the values of the block before are summed."""
    ROWS: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    stage, phase = i % STAGES, i // STAGES & 1
    before, phase_before = (i - 1) % STAGES, (i - 1) // STAGES & 1
    mbarrier.wait(k_full.index(stage), phase)
    keys = k.index(stage).reshape((BLOCK_N, HEAD_DIM)).permute((1, 0))
    s = gl.zeros((ROWS, BLOCK_N), gl.float32, s_layout)
    s = warpgroup_mma(q, keys, s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), phase_before)
    values = v.index(before).reshape((BLOCK_N, HEAD_DIM))
    acc = warpgroup_mma(p, values, acc, is_async=True)
    s = warpgroup_mma_wait(1, (s,))
    mbarrier.arrive(k_empty.index(stage))
    start = (count - 1 - i) * BLOCK_N
    e, m, l, alpha = _softmax(s, m, l, rows, start, S, T, scale, CAUSAL, MASK, BLOCK_N, s_layout)
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    p = gl.convert_layout(e.to(q.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return acc, m, l, p


@gluon.jit
def _consumer(
    part: gl.constexpr, out_desc, lse_ptr, q, k, v, q_full, k_full, k_empty, v_full, v_empty,
    b, h, H, first, count, edge, S, T, scale,
    CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: ROWS queries against count blocks of keys, of which the edge that come first are masked."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows = first + part * ROWS + gl.arange(0, ROWS, row_layout)
    m = gl.full((ROWS,), LOWEST, gl.float32, row_layout)
    l = gl.zeros((ROWS,), gl.float32, row_layout)
    acc = gl.zeros((ROWS, HEAD_DIM), gl.float32, o_layout)
    mine = q.index(part).reshape((ROWS, HEAD_DIM))
    mbarrier.wait(q_full.index(part), 0)
    mbarrier.wait(k_full.index(0), 0)
    keys = k.index(0).reshape((BLOCK_N, HEAD_DIM)).permute((1, 0))
    s = gl.zeros((ROWS, BLOCK_N), gl.float32, s_layout)
    s = warpgroup_mma(mine, keys, s, use_acc=False)
    mbarrier.arrive(k_empty.index(0))
    start = (count - 1) * BLOCK_N
    e, m, l, _ = _softmax(s, m, l, rows, start, S, T, scale, CAUSAL, True, BLOCK_N, s_layout)
    p = gl.convert_layout(e.to(q.dtype), gl.DotOperandLayout(0, o_layout, 2))
    for i in range(1, edge):
        acc, m, l, p = _step(
            acc, m, l, p, i, count, mine, k, v, k_full, k_empty, v_full, v_empty, rows, S, T, scale,
            CAUSAL, True, BLOCK_N, STAGES, s_layout, o_layout,
        )  # fmt: skip
    for i in range(max(edge, 1), count):
        acc, m, l, p = _step(
            acc, m, l, p, i, count, mine, k, v, k_full, k_empty, v_full, v_empty, rows, S, T, scale,
            CAUSAL, False, BLOCK_N, STAGES, s_layout, o_layout,
        )  # fmt: skip
    last, phase = (count - 1) % STAGES, (count - 1) // STAGES & 1
    mbarrier.wait(v_full.index(last), phase)
    acc = warpgroup_mma(p, v.index(last).reshape((BLOCK_N, HEAD_DIM)), acc)
    acc = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, o_layout))[:, None]
    head = (b * H + h).to(gl.int64)
    gl.store(lse_ptr + head * S + rows, (m + gl.log2(l)) * LN2, mask=rows < S)
    mine.store(acc.to(q.dtype))  # where the queries were
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, h, first + part * ROWS, 0], q.index(part))
    tma.store_wait(0)


@gluon.jit
def _attention_hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, H, S, T, scale,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head; scale is in base 2."""
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
    k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(q_full.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)  # both consumers have read it
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                0, out_desc, lse_ptr, q, k, v, q_full, k_full, k_empty, v_full, v_empty,
                b, h, H, first, count, edge, S, T, scale, CAUSAL, HEAD_DIM, ROWS, BLOCK_N, STAGES,
            )),
            (_consumer, (
                1, out_desc, lse_ptr, q, k, v, q_full, k_full, k_empty, v_full, v_empty,
                b, h, H, first, count, edge, S, T, scale, CAUSAL, HEAD_DIM, ROWS, BLOCK_N, STAGES,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, q, k, v, q_full, k_full, k_empty, v_full, v_empty,
                b, h, h // GROUP, first, count, ROWS, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


TILES = {64: (128, 128, 3), 128: (128, 128, 2), 256: (128, 64, 2)}  # BLOCK_M, BLOCK_N, STAGES


def layout_of(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, dtype.itemsize * 8, rank=4)


def fits(q: Tensor, k: Tensor, v: Tensor, flags: dict[str, bool], right: int) -> bool:
    """Whether the kernel can take q [B, H, S, D], k, v [B, G, T, D] with these flags of _tile.Options."""
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] >= 64
        and q.shape[3] in TILES
        and not any(on for name, on in flags.items() if name != "RIGHT")
        and (not flags["RIGHT"] or (right == 0 and q.shape[2] <= k.shape[2]))
        and all(_aligned(x) for x in (q, k, v))
    )


def _aligned(x: Tensor) -> bool:
    """What TMA asks: 16 bytes, and no two indices at one place."""
    strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return (
        x.numel() > 0
        and x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
    )


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    D = x.shape[3]
    strides = [s if n > 1 else D for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, D], layout_of(x.dtype))


def attention_hopper(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> None:
    """out [B, H, S, D] and lse [B, H, S] of what fits()."""
    (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
    M, N, stages = TILES[D]
    _attention_hopper_kernel[(triton.cdiv(S, M), H, B)](
        *(descriptor(x, rows) for x, rows in ((q, M // 2), (k, N), (v, N), (out, M // 2))),
        lse, H, S, T, scale * LOG2_OF_E.value,
        GROUP=H // G, CAUSAL=causal, HEAD_DIM=D, BLOCK_M=M, BLOCK_N=N, STAGES=stages, num_warps=4,
    )  # fmt: skip


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    """(kernel, signature, constexprs, options) of every shipped configuration."""
    found = []
    for D, (M, N, stages) in TILES.items():
        types = {
            f"{x}_desc": f"tensordesc<bf16[1, 1, {rows}, {D}],{layout_of(torch.bfloat16)!r}>"
            for x, rows in (("q", M // 2), ("k", N), ("v", N), ("out", M // 2))
        }
        types |= {"lse_ptr": "*fp32"} | dict.fromkeys(("H", "S", "T"), "i32") | {"scale": "fp32"}
        for causal in (False, True):
            fixed = {"GROUP": 4, "CAUSAL": causal, "HEAD_DIM": D}
            tile = {"BLOCK_M": M, "BLOCK_N": N, "STAGES": stages}
            found.append((_attention_hopper_kernel, types, fixed | tile, {"num_warps": 4}))
    return found
