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
def is_chosen(device: torch.device) -> bool:
    built = hasattr(torch.ops.tilewright, "linear_int4_rows")
    if not built or os.environ.get("TILEWRIGHT_CUDA") != "1":
        return False
    return torch.cuda.get_device_capability(device)[0] in (
        8,
        9,
    )  # what setup.py has it compiled for


def serves(
    x: Tensor,
    bits: int,
    qweight: Tensor,
    scales: Tensor,
    offset: Tensor,
    kind: int,
    is_nested: bool,
) -> bool:
    """Whether it takes x [M, K], and a weight as _linear and offset_of have it."""
    M, K = x.shape
    group = K // scales.shape[1]
    fits = bits == 4 and M <= ROWS and group % 32 == 0 and K < COLUMNS and x.dtype != torch.float32
    plain = kind != CODEBOOK and not is_nested and offset.dtype == scales.dtype
    return x.is_cuda and fits and plain and qweight.data_ptr() % 16 == 0 and is_chosen(x.device)


def linear(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, minima: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [M, K], the weight as _linear takes it, bias [N] of x's dtype -> [M, N]."""
    y: Tensor = torch.ops.tilewright.linear_int4_rows(x, qweight, scales, zeros, minima, bias)
    return y
