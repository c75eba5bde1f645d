"""GGUF's blocks of weights as codes, scales and offsets, to the bit (ggml-common.h has the layouts).

With d, m (dmin) float16 and q unsigned:

    Q8_0  32  d (int8 q)                    Q2_K  256  16 groups of 16, q of 2 bits: d s q - dmin t, s, t of 4 bits
    Q4_0  32  d (q - 8)                     Q3_K  256  16 of 16, 3 bits: d (s - 32) (q - 4), s of 6 bits
    Q4_1  32  d q + m                       Q4_K  256  8 of 32, 4 bits: d s q - dmin t, s, t of 6 bits
    Q5_0  32  d (q - 16)                    Q5_K  256  8 of 32, 5 bits: as Q4_K
    Q5_1  32  d q + m                       Q6_K  256  16 of 16, 6 bits: d s (q - 32), s an int8

Codes of 2 and 3 bits take 4 and those of 5 and 6 bits take 8; scales that are products are float32, as
ggml has them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Decoded(NamedTuple):
    """Of rows of blocks: codes [R, K] uint8, below 2^bits, scales [R, G], minima [R, G] or none."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None


class Kind(NamedTuple):
    """A type of block: weights in it and bytes, bits of our codes, and weights that share a scale."""

    weights: int
    nbytes: int
    bits: int
    group: int
    decode: Callable[[Tensor], Decoded]  # of [R, blocks, nbytes]
    minima: bool = False
    scale_dtype: torch.dtype = torch.float16


def _half(x: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, [R, blocks]."""
    return x[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(x: Tensor) -> Tensor:
    """Low nibbles of the last dimension, then its high ones."""
    return torch.cat((x & 15, x >> 4), -1)


def _bits_of(x: Tensor, shifts: range, mask: int) -> Tensor:
    """[..., shifts, n] of [..., n]: at each shift."""
    return torch.stack([x >> shift for shift in shifts], -2) & mask


def _q8_0(x: Tensor) -> Decoded:
    return Decoded((x[..., 2:] ^ 128).flatten(1), _half(x, 0), None)


def _q4_0(x: Tensor) -> Decoded:
    return Decoded(_nibbles(x[..., 2:]).flatten(1), _half(x, 0), None)


def _q4_1(x: Tensor) -> Decoded:
    return Decoded(_nibbles(x[..., 4:]).flatten(1), _half(x, 0), _half(x, 2))


def _fifth(x: Tensor) -> Tensor:
    """Bit i of four bytes, 16 where it is set: [..., 4] -> [..., 32]."""
    return _bits_of(x, range(8), 1).transpose(-1, -2).flatten(-2) << 4


def _q5_0(x: Tensor) -> Decoded:
    codes = _nibbles(x[..., 6:]) | _fifth(x[..., 2:6])
    return Decoded((codes + 112).flatten(1), _half(x, 0), None)


def _q5_1(x: Tensor) -> Decoded:
    codes = _nibbles(x[..., 8:]) | _fifth(x[..., 4:8])
    return Decoded(codes.flatten(1), _half(x, 0), _half(x, 2))


def _products(d: Tensor, factors: Tensor) -> Tensor:
    """[R, G] float32 of d [R, blocks] and whole factors [R, blocks, groups of a block]."""
    return (d.float()[..., None] * factors.float()).flatten(1)


def _quarters(x: Tensor) -> Tensor:
    """2-bit codes [..., 256] of 64 bytes: of each 32 bytes first the lowest bits."""
    return _bits_of(x.unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-3)


def _q2_k(x: Tensor) -> Decoded:
    s = x[..., :16]
    minima = -_products(_half(x, 82), s >> 4)
    return Decoded(_quarters(x[..., 16:80]).flatten(1), _products(_half(x, 80), s & 15), minima)


def _q3_k(x: Tensor) -> Decoded:
    third = _bits_of(x[..., :32], range(8), 1).flatten(-2) << 2
    codes = _quarters(x[..., 32:96]) | third
    low, high = x[..., 96:104], x[..., 104:108]
    s = _nibbles(low) | _bits_of(high, range(0, 8, 2), 3).flatten(-2) << 4
    scales = _products(_half(x, 108), s.to(torch.int16) - 32)
    return Decoded((codes + 4).flatten(1), scales, None)


def _six_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [..., 8] of twelve bytes."""
    a, b, c = x[..., :4], x[..., 4:8], x[..., 8:12]
    scales = torch.cat((a & 63, (c & 15) | (a >> 6) << 4), -1)
    return scales, torch.cat((b & 63, (c >> 4) | (b >> 6) << 4), -1)


def _of_k(x: Tensor, codes: Tensor) -> Decoded:
    s, t = _six_bits(x[..., 4:16])
    return Decoded(codes.flatten(1), _products(_half(x, 0), s), -_products(_half(x, 2), t))


def _fours(x: Tensor) -> Tensor:
    """4-bit codes [..., 8, 32] of 128 bytes: of each 32 bytes first the low nibbles."""
    return _bits_of(x.unflatten(-1, (4, 32)), range(0, 8, 4), 15).flatten(-3, -2)


def _q4_k(x: Tensor) -> Decoded:
    return _of_k(x, _fours(x[..., 16:]))


def _q5_k(x: Tensor) -> Decoded:
    fifth = _bits_of(x[..., 16:48], range(8), 1) << 4
    return _of_k(x, _fours(x[..., 48:]) | fifth)


def _q6_k(x: Tensor) -> Decoded:
    low = _bits_of(x[..., :128].unflatten(-1, (2, 64)), range(0, 8, 4), 15).flatten(-2)
    high = _bits_of(x[..., 128:192].unflatten(-1, (2, 32)), range(0, 8, 2), 3).flatten(-2)
    codes = (low | high << 4) + 96
    scales = x[..., 192:208].contiguous().view(torch.int8)
    return Decoded(codes.flatten(1), _products(_half(x, 208), scales), None)


F32 = torch.float32
KINDS = {
    "Q8_0": Kind(32, 34, 8, 32, _q8_0),
    "Q4_0": Kind(32, 18, 4, 32, _q4_0),
    "Q4_1": Kind(32, 20, 4, 32, _q4_1, minima=True),
    "Q5_0": Kind(32, 22, 8, 32, _q5_0),
    "Q5_1": Kind(32, 24, 8, 32, _q5_1, minima=True),
    "Q2_K": Kind(256, 84, 4, 16, _q2_k, minima=True, scale_dtype=F32),
    "Q3_K": Kind(256, 110, 4, 16, _q3_k, scale_dtype=F32),
    "Q4_K": Kind(256, 144, 4, 32, _q4_k, minima=True, scale_dtype=F32),
    "Q5_K": Kind(256, 176, 8, 32, _q5_k, minima=True, scale_dtype=F32),
    "Q6_K": Kind(256, 210, 8, 16, _q6_k, scale_dtype=F32),
}
