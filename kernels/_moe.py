"""What the experts' kernels share: which rows a program has, the gated activation and its slopes, and configurations.

P rows sorted by expert, each a slot's; E experts; M, N, K a product's sizes, M the rows of one expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._glu import _act
from ._tune import Config, bucket, grid

MOST_ROWS = 1024  # rows of an expert, and
MOST_FEATURES = 16384  # features, from which more make no difference
DTYPES = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
KEYS = ("dtype", "M", "N", "K")
ACTS = {"silu": "silu", "gelu": "gelu_erf", "gelu_tanh": "gelu_tanh"}


@triton.jit
def tile_of(offsets_ptr, tile, P, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's expert, its rows [BLOCK_M] and whether each is that expert's: none, past the last tile."""
    e = tl.arange(0, BLOCK_E)
    # clamped: whatever the offsets are, no tile has two experts and no row is beyond P
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + e, mask=e < E, other=0), 0), P)
    end = tl.minimum(tl.maximum(tl.load(offsets_ptr + 1 + e, mask=e < E, other=0), begin), P)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(tiles, axis=0)
    here = (tile >= after - tiles) & (tile < after)
    expert = tl.sum(tl.where(here, e, 0), axis=0)
    first = tl.sum(tl.where(here, begin + (tile - after + tiles) * BLOCK_M, 0), axis=0)
    stop = tl.sum(tl.where(here, end, 0), axis=0)
    rows = first + tl.arange(0, BLOCK_M)
    return expert.to(tl.int64), rows, rows < stop


@triton.jit
def slots_of(order_ptr, rows, mask, P):
    """The slots of rows, and whether they are any."""
    slots = tl.load(order_ptr + rows, mask=mask, other=0)
    return slots, mask & (slots >= 0) & (slots < P)


@triton.jit
def gated(gate, up, limit, ACT: tl.constexpr):
    """f(gate) up within the limit, and its slopes by gate and by up."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value, slope = _act(g, ACT)
    # past a limit no slope, nor of nan, as torch's clamp has it
    free = limit == float("inf")
    by_gate = tl.where((gate <= limit) | free, u * slope, 0.0)
    by_up = tl.where(((up <= limit) & (up >= -limit)) | free, value, 0.0)
    return value * u, by_gate, by_up


@triton.jit
def store_gated(
    gate, up, rows, n, mask, h_ptr, a_ptr, N, limit, ACT: tl.constexpr, SAVE: tl.constexpr
):
    """a [P, N] = f(gate) up of gates and ups [BLOCK_M, BLOCK_N], rounded first; and where SAVE these as h [P, 2 N]."""
    g, u = gate.to(a_ptr.dtype.element_ty), up.to(a_ptr.dtype.element_ty)
    if SAVE:
        to = h_ptr + rows[:, None] * (2 * N) + n[None, :]
        tl.store(to, g, mask=mask)
        tl.store(to + N, u, mask=mask)
    a, _, _ = gated(g.to(tl.float32), u.to(tl.float32), limit, ACT)
    tl.store(a_ptr + rows[:, None] * N + n[None, :], a, mask=mask)


@triton.jit
def store_slopes(
    da, rows, n, mask, slots, known, h_ptr, weights_ptr, dh_ptr, part_ptr, stride_pm, N, limit, ACT: tl.constexpr
):  # fmt: skip
    """dh [P, 2 N] of da = dout w2 [BLOCK_M, BLOCK_N], and this tile's part of dweights, by slot; a again, as it was
    rounded."""
    at = rows[:, None] * (2 * N) + n[None, :]
    gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + N, mask=mask, other=0.0).to(tl.float32)
    a, by_gate, by_up = gated(gate, up, limit, ACT)
    a = a.to(h_ptr.dtype.element_ty)
    part = tl.sum(tl.where(mask, da * a.to(tl.float32), 0.0), axis=1)
    tl.store(part_ptr + slots * stride_pm, part, mask=known)
    da *= tl.load(weights_ptr + slots, mask=known, other=0.0).to(tl.float32)[:, None]
    tl.store(dh_ptr + at, da * by_gate, mask=mask)
    tl.store(dh_ptr + at + N, da * by_up, mask=mask)
    return a


def most_tiles(P: int, E: int, block: int) -> int:
    """Tiles of `block` rows that E experts may have of P rows, however they are spread."""
    some = min(P, E)
    return (P - some) // block + some


def heuristic(dtype: torch.dtype, M: int, N: int, K: int) -> Config:
    rows = 16 if M <= 16 else 32 if M <= 32 else 64 if M <= 64 else 128
    wide = 64 if dtype != torch.float32 else 32
    return {
        "BLOCK_M": rows if dtype != torch.float32 else min(rows, 64),
        "BLOCK_N": wide,
        "BLOCK_K": wide,
        "num_warps": 4 if rows <= 64 else 8,
        "num_stages": 3,
    }


def space(dtype: torch.dtype, M: int, N: int, K: int) -> list[Config]:
    """Tiles of which a thread holds 128 sums at most, of two such products, whose stages fit the smallest shared
    memory."""
    found = grid(
        BLOCK_M=(16, 32, 64, 128), BLOCK_N=(32, 64, 128), BLOCK_K=(32, 64, 128),
        num_warps=(4, 8), num_stages=(2, 3, 4),
    )  # fmt: skip
    return [
        c
        for c in found
        if c["BLOCK_M"] <= max(64, 2 * M)
        if c["BLOCK_M"] * c["BLOCK_N"] <= 2048 * c["num_warps"]
        if (c["BLOCK_M"] + 2 * c["BLOCK_N"]) * c["BLOCK_K"] * dtype.itemsize * c["num_stages"]
        <= 96 << 10
    ]


def key_of(x: Tensor, P: int, E: int, N: int, K: int) -> tuple[torch.dtype, int, int, int]:
    sizes = (bucket(max(1, size), MOST_FEATURES) for size in (N, K))
    return x.dtype, bucket(max(1, P // E), MOST_ROWS), *sizes


def block_of(E: int) -> int:
    return max(16, triton.next_power_of_2(E))


def dense(t: Tensor) -> Tensor:
    """t [.., K] with a last stride of 1."""
    return t if t.stride(-1) == 1 else t.contiguous()
