"""Where csrc/cuda/quant_linear.cu serves quant_linear: where it was built, and, until its tests have passed on
a GPU, only where TILEWRIGHT_CUDA is 1."""

import functools
import os

import torch
from torch import Tensor

from ._quant_weight import CODEBOOK

ROWS = 16  # of x at most: csrc/cuda/quant_linear.h's INT4_ROWS
COLUMNS = 1 << 21  # K is below: its INT4_COLUMNS


@functools.cache
def is_chosen() -> bool:
    built = torch.cuda.is_available() and hasattr(torch.ops.tilewright, "linear_int4_rows")
    return built and os.environ.get("TILEWRIGHT_CUDA") == "1"


def serves(x: Tensor, bits: int, group: int, M: int, kind: int, is_nested: bool) -> bool:
    """Whether it takes x [M, K] and a weight of bits, in groups, of _quant_weight's kind."""
    fits = bits == 4 and M <= ROWS and group % 32 == 0 and x.shape[-1] < COLUMNS
    plain = kind != CODEBOOK and not is_nested and x.dtype != torch.float32
    return fits and plain and x.is_cuda and is_chosen()


def linear(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, minima: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [M, K], the weight as _linear takes it, bias [N] of x's dtype -> [M, N]."""
    y: Tensor = torch.ops.tilewright.linear_int4_rows(x, qweight, scales, zeros, minima, bias)
    return y
