"""What attention's kernels share: tiles of rows, the keys a block of queries sees, launch shapes.

S queries, T keys.  Query i stands at key p = i + T - S and sees keys p - left <= j where LEFT, and
j <= p + right where RIGHT (causal is right = 0); or, under RANGES, those from begin[i] to before
end[i], whatever p.
"""

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._blocks import Blocks
from ._tune import Config, Tunable, bucket, grid

LOWEST = tl.constexpr(-3.4028234e38)  # a running maximum that -inf minus it is not nan
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def key_range(
    rows, b, begin_ptr, end_ptr, S, T, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """The keys that rows of batch b see: from lo to before hi.  But for ranges' they may lie past either
    end: to keep them within costs registers where the backward has none."""
    lo, hi = rows * 0, rows * 0 + T
    if RANGES:
        lo = tl.load(begin_ptr + b * S + rows, mask=rows < S, other=0)
        hi = tl.load(end_ptr + b * S + rows, mask=rows < S, other=0)
        lo, hi = tl.minimum(tl.maximum(lo, 0), T), tl.minimum(tl.maximum(hi, 0), T)
    if LEFT:
        lo = rows + (T - S) - left
    if RIGHT:
        hi = rows + (T - S) + right + 1
    return lo, hi


@triton.jit
def spans(
    first, S, T, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Blocks of keys that rows first.. meet: from begin to open some rows see, from open to whole all
    do, from whole to end some.  begin, open and whole are multiples of BLOCK_N.

    Seen from a key, left and right change places, and so do S and T: the queries it meets.
    """
    here = first + T - S
    begin, open, seen, end = 0, 0, T, T
    if LEFT:
        begin = max(here - left, 0) // BLOCK_N * BLOCK_N
        open = tl.cdiv(max(here + BLOCK_M - 1 - left, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        seen = min(max(here + right + 1, 0), T)
        end = min(max(here + right + BLOCK_M, 0), T)
    return begin, open, max(seen // BLOCK_N * BLOCK_N, open), end


@triton.jit
def range_spans(lo, hi, rows, S, T, BLOCK_N: tl.constexpr):
    """spans of rows that see keys from lo to before hi."""
    begin = tl.min(tl.where(rows < S, lo, T), 0) // BLOCK_N * BLOCK_N
    open = tl.cdiv(tl.max(tl.where(rows < S, lo, 0), 0), BLOCK_N) * BLOCK_N
    seen = tl.min(tl.where(rows < S, hi, T), 0)
    end = tl.max(tl.where(rows < S, hi, 0), 0)
    return begin, open, max(seen // BLOCK_N * BLOCK_N, open), end


@triton.jit
def visible(cols, lo, hi, T, BEGINS: tl.constexpr):
    """Which of cols [1, N] rows may look at that see from lo to before hi [M, 1] (or all transposed).
    Without BEGINS they see from the first key."""
    seen = (cols < T) & (cols < hi)
    if BEGINS:
        seen = seen & (cols >= lo)
    return seen


@triton.jit
def seen_by(lo, hi, T):
    """How many keys rows see that see from lo to before hi; below 0 none."""
    return tl.minimum(hi, T) - tl.maximum(lo, 0)


@triton.jit
def divisor(l, lo, hi, T, HAS_SINKS: tl.constexpr, HAS_BIAS: tl.constexpr = False):
    """The sum l to divide by; inf for rows that see no key, which give 0 and not 0 / 0."""
    if HAS_BIAS:
        l = tl.where(l == 0, float("inf"), l)
    elif not HAS_SINKS:
        l = tl.where(seen_by(lo, hi, T) <= 0, float("inf"), l)
    return l


@triton.jit
def tanh(x):
    """tanh x and its slope, each within a few ulp: below 0.625 Cephes' polynomial, as (1 - e) / (1 + e)
    would cancel; above it 4 e / (1 + e)^2, as 1 - tanh^2 would."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    small = x + x * (z * p)
    size = tl.abs(x)
    e = tl.exp2(size * -2.8853900817779268)  # e^(-2 |x|)
    large = (1.0 - e) / (1.0 + e)
    near = size < 0.625
    slope = tl.where(near, 1.0 - small * small, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return tl.where(near, small, tl.where(x < 0, -large, large)), slope


@triton.jit
def scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Of q kᵀ, in base 2, and the slope of their cap: under SOFTCAP softcap tanh(scale q kᵀ / softcap)."""
    if SOFTCAP:
        t, slope = tanh(products * (scale / softcap))
        s = t * (softcap * LOG2E)
    else:
        s, slope = products * (scale * LOG2E), 1.0
    return s, slope


@triton.jit
def first_score(sinks_ptr, h, HAS_SINKS: tl.constexpr):
    """The maximum, in base 2, and the sum that a row of head h starts with."""
    if HAS_SINKS:
        start, sum = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E, 1.0
        start = tl.where(start < LOWEST, LOWEST, start)  # nan stays
    else:
        start, sum = LOWEST, 0.0
    return start, sum


@triton.jit
def plane(bias_ptr, b, h, stride_bb, stride_bh, stride_bs, stride_bt, HAS_BIAS: tl.constexpr):
    """What add_bias takes of head h: where its scores' biases start, and their strides."""
    at = 0  # no None in a tuple
    if HAS_BIAS:
        at = bias_ptr + b * stride_bb + h * stride_bh
    return at, stride_bs, stride_bt


@triton.jit
def add_bias(s, bias, rows, cols, S, T, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scores [rows, cols], or [cols, rows] where TRANSPOSED, in base 2, with their bias.  What is below
    -2.3587e38 is -inf in base 2: it hides its key."""
    if HAS_BIAS:
        ptr, stride_bs, stride_bt = bias
        row, col = rows[:, None], cols[None, :]
        if TRANSPOSED:
            row, col = rows[None, :], cols[:, None]
        at = row.to(tl.int64) * stride_bs + col.to(tl.int64) * stride_bt
        x = tl.load(ptr + at, mask=(row < S) & (col < T), other=0.0)
        s += x.to(tl.float32) * LOG2E
    return s


@triton.jit
def mixed(x, y):
    """32 bits of x, well mixed, and y (two rounds of Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ y ^ (x >> 15)) * 0x846CA68B


@triton.jit
def row_words(seed_ptr, row, DROPOUT: tl.constexpr):
    """Two words of each row, counted over all heads, that the draws of its keys come from.  The row is
    mixed before the seed comes to it: else seeds that are neighbours share their rows."""
    a, b = 0, 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        a = mixed(row.to(tl.uint32), (row >> 32).to(tl.uint32))
        a = mixed((a ^ (a >> 16)) + low, high)
        a ^= a >> 16
        b = mixed(a, high)
    return a, b


@triton.jit
def undropped(x, words, cols, dropout, TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr):
    """x [rows, cols], or [cols, rows] where TRANSPOSED, zero where the draw is below dropout."""
    if DROPOUT:
        a, b = words
        col = cols.to(tl.uint32) * 0x9E3779B9
        if TRANSPOSED:
            draw = mixed(col[:, None] + a[None, :], b[None, :])
        else:
            draw = mixed(col[None, :] + a[:, None], b[:, None])
        least = tl.full((), dropout * 4294967296.0, tl.float32).to(tl.int64).to(tl.uint32)
        x = tl.where(draw >= least, x, 0.0)
    return x


@triton.jit
def kept_share(dropout):
    """What makes up for what is dropped: 1 / (1 - dropout), and 0 where all is."""
    p = tl.full((), dropout, tl.float32)
    return 1.0 / tl.where(p < 1, 1.0 - p, float("inf"))


KEYS = ("dtype", "BLOCK_D", "causal", "S")
MOST_ROWS = 4096  # queries from which more make no difference


def key(q: Tensor, flags: dict[str, int]) -> tuple[torch.dtype, int, bool, int]:
    """What the configurations go by: of q [B, H, S, D] with S > 0."""
    bounded = bool(flags["LEFT"] or flags["RIGHT"] or flags["RANGES"])
    return q.dtype, padded(q.shape[3]), bounded, bucket(q.shape[2], MOST_ROWS)


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


def within(config: Config, flags: dict[str, int], BLOCK_D: int) -> Config:
    """config with tiles that blocks of a block-sparse mask are made of, and that leave a bias's tile room in
    99 KiB of shared memory."""
    if flags["SIZE"]:
        config = config | {x: min(config[x], flags["SIZE"]) for x in ("BLOCK_M", "BLOCK_N")}
    if flags["HAS_BIAS"] and BLOCK_D == 256:
        config = config | {"num_stages": 1}
    return config


def config_of(tunable: Tunable, q: Tensor, flags: dict[str, int]) -> Config:
    """A launch's.  A bias's tile is not in what tables measure: beside one the heuristic's."""
    sizes, BLOCK_D = key(q, flags), padded(q.size(3))
    plain = tunable.heuristic(*sizes) if flags["HAS_BIAS"] else tunable(q.device, *sizes)
    return within(plain, flags, BLOCK_D)


def dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


def heads_last(x: Tensor) -> Tensor:
    """Empty [B, N, S, D] lying as [B, S, N, D]."""
    B, N, S, D = x.shape
    return x.new_empty(B, S, N, D).transpose(1, 2)


PROVEN = ("_attention_hopper",)  # whose tests passed on a GPU


@functools.cache
def hopper(name: str, device: torch.device) -> ModuleType | None:
    """kernels/<name>.py, of Gluon, where it can run: on a Hopper GPU, unless TILEWRIGHT_HOPPER is 0; what
    has not passed its tests on a GPU only where that is 1."""
    wanted = os.environ.get("TILEWRIGHT_HOPPER", "")
    if device.type != "cuda" or wanted == "0" or not (name in PROVEN or wanted == "1"):
        return None
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        return importlib.import_module(f".{name}", __package__)
    except ImportError:  # another Triton's Gluon
        return None


class Options(NamedTuple):
    """What a call of attention asks of its kernels beside the tensors."""

    sinks: Tensor | None
    bias: Tensor | None  # [B, H, S, T], expanded
    begin: Tensor | None  # int32 [B, S] each, or neither
    end: Tensor | None
    blocks: Tensor | None  # bool, as _blocks.Blocks has them
    seed: Tensor | None  # int64 [1], where dropout is above 0
    left: int  # -1: without end
    right: int
    block_size: int
    softcap: float  # 0: none
    scale: float
    dropout: float

    def flags(self, S: int, T: int) -> dict[str, int]:
        """The constexprs; a limit that hides nothing is none, nor is one beside ranges."""
        ranged = self.begin is not None
        return {
            "LEFT": not ranged and 0 <= self.left < T - 1,
            "RIGHT": not ranged and 0 <= self.right < S - 1,
            "RANGES": ranged,
            "SOFTCAP": self.softcap != 0,
            "HAS_SINKS": self.sinks is not None,
            "HAS_BIAS": self.bias is not None,
            "DROPOUT": self.dropout > 0,
            "SIZE": 0 if self.blocks is None else self.block_size,
        }

    def ranges(self) -> tuple[Tensor | None, Tensor | None]:
        """begin and end, dense."""
        if self.begin is None or self.end is None:
            return None, None
        return self.begin.contiguous(), self.end.contiguous()

    def scalars(self, S: int, T: int) -> tuple[int, int, float, float, float]:
        """left, right, softcap, scale, dropout."""
        flags = self.flags(S, T)  # a limit without end may be no int32
        left, right = self.left * flags["LEFT"], self.right * flags["RIGHT"]
        return left, right, self.softcap, self.scale, self.dropout

    def lists(
        self, S: int, T: int, transposed: bool = False
    ) -> tuple[Tensor | None, int, int, int]:
        """Blocks.lists of what the other options leave."""
        if self.blocks is None:
            return None, 0, 0, 0
        flags = self.flags(S, T)
        left, right = (getattr(self, x.lower()) if flags[x] else -1 for x in ("LEFT", "RIGHT"))
        met = Blocks(self.blocks, self.block_size).met(S, T, left, right, self.ranges())
        return (met.transposed() if transposed else met).lists()

    def bias_strides(self) -> tuple[int, int, int, int]:
        return (0, 0, 0, 0) if self.bias is None else self.bias.stride()  # type: ignore[return-value]


NONE: dict[str, int] = dict.fromkeys(
    ("LEFT", "RIGHT", "RANGES", "SOFTCAP", "HAS_SINKS", "HAS_BIAS", "DROPOUT"), False
) | {"SIZE": 0}
# what variants() compile: causal; with all that goes together; by ranges; with a bias; with dropout; by blocks
PLAIN = NONE | {"RIGHT": True}
FULL = NONE | dict.fromkeys(("LEFT", "RIGHT", "SOFTCAP", "HAS_SINKS"), True)
RANGED = NONE | {"RANGES": True}
BIASED = NONE | {"HAS_BIAS": True}
DROPPED = PLAIN | {"DROPOUT": True}
BLOCKED = PLAIN | {"SIZE": 128}
VARIANTS = (PLAIN, FULL, RANGED, BIASED, DROPPED, BLOCKED)


def signature(pointers: dict[str, torch.dtype], heads: str = "H") -> dict[str, str]:
    """A kernel's argument types: pointers by name, then the strides of q, k, v, and the scalars."""
    names = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    names |= {torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}
    strides = [f"stride_{x}{axis}" for x, row in ("qs", "kt", "vt") for axis in ("b", "h", row)]
    lists = ["stride_lb", "stride_lh", "stride_ln"]
    strides += ["stride_bb", "stride_bh", "stride_bs"]  # stride_bt is 1, a constant
    return (
        {f"{name}_ptr": names[dtype] for name, dtype in pointers.items()}
        | dict.fromkeys([*strides, *lists, heads, "S", "T", "left", "right"], "i32")
        | dict.fromkeys(["softcap", "scale", "dropout"], "fp32")
    )


POINTERS = {
    "HAS_SINKS": ("sinks_ptr",),
    "HAS_BIAS": ("bias_ptr",),
    "RANGES": ("begin_ptr", "end_ptr", "first_ptr", "last_ptr"),
    "DROPOUT": ("seed_ptr",),
    "SIZE": ("blocks_ptr",),
    "HAS_DLSE": ("dlse_ptr",),
}


def given(types: dict[str, str], flags: dict[str, int]) -> tuple[dict[str, str], dict[str, None]]:
    """types without the pointers that a launch under `flags` has none for, and those."""
    lacking = {name for flag, names in POINTERS.items() if not flags.get(flag, 1) for name in names}
    kept = {name: kind for name, kind in types.items() if name not in lacking}
    return kept, dict.fromkeys(name for name in types if name in lacking)
