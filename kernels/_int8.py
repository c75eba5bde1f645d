"""Rows of float32 as int8 codes and one scale, max|row| / 127, codes to the nearest even.

Zeros where the scale is below float32's smallest normal number; where a number is not finite the scale is nan
and the codes are 0.  To be launched without fp fusion, which would round a product with the sum behind it.
"""

import triton
import triton.language as tl


@triton.jit
def size_of(x):
    """|x|, infinity for nan, which a maximum would lose."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def row_scale(largest):
    """The scale of rows whose largest size is `largest`, and what their numbers are multiplied with: 0 where
    they have no codes."""
    scale = tl.div_rn(largest, tl.zeros_like(largest) + 127.0)
    usable = (scale >= 1.1754943508222875e-38) & (largest < float("inf"))
    safe = tl.where(usable, largest, 127.0)
    inverse = tl.where(usable, tl.div_rn(tl.zeros_like(largest) + 127.0, safe), 0.0)
    scale = tl.where(usable, scale, 0.0)
    return tl.where(largest < float("inf"), scale, float("nan")), inverse


@triton.jit
def codes_of(x, inverse):
    """x inverse to the nearest int8; 0 where inverse is."""
    x = tl.where(inverse == 0.0, 0.0, x)
    # adding and taking away 1.5 * 2^23 leaves the nearest integer, ties to even
    code = (x * inverse + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8)
