"""What attention's kernels share: tiles of rows, the keys a block of queries sees, launch shapes.

S queries, T keys.  Under CAUSAL query i sees keys j <= i + T - S.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tune import Config, bucket, grid

LOWEST = tl.constexpr(-3.4028234e38)  # a running maximum that -inf minus it is not nan
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, rows, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [rows, BLOCK_D], zero beyond length and HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (d < HEAD_DIM)[None, :]
    # int64: row * stride passes 2^31 for long caches
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (rows < length)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * stride + d[None, :], x, mask=mask)


@triton.jit
def spans(first, S, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys below `whole` (of BLOCK_N) need no mask for rows first.. ; none below `end` are seen by all."""
    seen, end = T, T
    if CAUSAL:
        seen = min(max(first + T - S + 1, 0), T)
        end = min(max(first + BLOCK_M + T - S, 0), T)
    return seen // BLOCK_N * BLOCK_N, end


@triton.jit
def visible(rows, cols, S, T, CAUSAL: tl.constexpr):
    """Which of cols [1, N] rows [M, 1] may look at (either may be transposed)."""
    return (cols < T) & (cols <= rows + T - S) if CAUSAL else (cols < T) & (rows < S)


@triton.jit
def divisor(l, rows, S, T, CAUSAL: tl.constexpr):
    """The sum l to divide by; inf for rows that see no key, which give 0 and not 0 / 0."""
    blind = (rows + T - S < 0) | (T == 0) if CAUSAL else (rows >= S) | (T == 0)
    return tl.where(blind, float("inf"), l)


KEYS = ("dtype", "BLOCK_D", "causal", "S")
MOST_ROWS = 4096  # queries from which more make no difference


def key(q: Tensor, causal: bool) -> tuple[torch.dtype, int, bool, int]:
    """What the configurations go by: of q [B, H, S, D] with S > 0."""
    return q.dtype, padded(q.shape[3]), causal, bucket(q.shape[2], MOST_ROWS)


def padded(D: int) -> int:
    """BLOCK_D, the head dim as tiles hold it."""
    return max(16, triton.next_power_of_2(D))


def by_head_dim(table: dict[int, tuple[int, int, int, int]], BLOCK_D: int) -> Config:
    """The entry of a table of BLOCK_M, BLOCK_N, num_warps, num_stages by padded head dim."""
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, table[max(64, BLOCK_D)], strict=True))


def space(dtype: torch.dtype, BLOCK_D: int, causal: bool, S: int) -> list[Config]:
    """Tiles of which a thread holds 192 scores and sums at most."""
    found = grid(
        BLOCK_M=(16, 32, 64, 128), BLOCK_N=(16, 32, 64, 128),
        num_warps=(4, 8), num_stages=(1, 2, 3, 4),
    )  # fmt: skip
    return [
        c
        for c in found
        if c["BLOCK_M"] <= max(64, 4 * S)
        if c["BLOCK_M"] * (c["BLOCK_N"] + BLOCK_D) <= 6144 * c["num_warps"]
    ]


def dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def heads_last(x: Tensor) -> Tensor:
    """Empty [B, N, S, D] lying as [B, S, N, D]."""
    B, N, S, D = x.shape
    return x.new_empty(B, S, N, D).transpose(1, 2)


def signature(pointers: dict[str, torch.dtype], heads: str = "H") -> dict[str, str]:
    """A kernel's argument types: pointers by name, then the strides of q, k, v, and the sizes."""
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    strides = [f"stride_{x}{axis}" for x, row in ("qs", "kt", "vt") for axis in ("b", "h", row)]
    return (
        {f"{name}_ptr": names[dtype] for name, dtype in pointers.items()}
        | dict.fromkeys([*strides, heads, "S", "T"], "i32")
        | {"scale": "fp32"}
    )
