"""Rounding to nearest: each weight to the code nearest it, on the grid of its group that errs least."""

import torch
from torch import Tensor

from tilewright.quant.quantisers import _grid
from tilewright.quant_tensor import QuantTensor, packed


def of_codes(
    codes: Tensor,
    grid: _grid.Grid,
    symmetric: bool,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> QuantTensor:
    """The weight of codes [N, G, g] on a grid [N, G, 1].  Raises ValueError where dtype cannot hold a scale."""
    scales, zeros = (t.squeeze(-1).to(dtype) for t in (grid.scales, grid.zeros))
    bad = ~(scales.isfinite() & zeros.isfinite())
    if bool(bad.any()):
        n, g = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the weights of row {n}, group {g} are too large, or too alike, for scales of {dtype}"
        )
    qweight = packed(codes.to(torch.uint8).flatten(1), grid.bits)
    return QuantTensor(qweight, scales, None if symmetric else zeros, order=order, bits=grid.bits)


def rtn(
    w: Tensor, *, bits: int = 4, group: int = 128, symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantTensor:  # fmt: skip
    """w [N, K] -> its codes; group -1 is a whole row.  Raises ValueError where group does not divide K, bits
    are not 4 or 8, w is not finite, or scale_dtype cannot hold a scale."""
    size = _grid.check("rtn", w, bits, group)
    groups = w.detach().float().unflatten(1, (-1, size))
    grid = _grid.fitted(groups, bits, symmetric, scale_dtype)
    return of_codes(grid.codes(groups), grid, symmetric, scale_dtype)
