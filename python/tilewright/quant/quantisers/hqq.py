"""HQQ: zero-points that are no whole numbers, by half-quadratic steps, of the weights alone.

It lessens the sum of |w - dequantised|^p, p = 0.7, which outliers weigh little in: by turns the errors, shrunk
towards 0, and the zero-points that leave them.  Badri and Shaji 2023, mobiusml.github.io/hqq_blog, eq. 3 to 7.
"""

import torch
from torch import Tensor

from tilewright.quant.quantisers import _grid
from tilewright.quant.quantisers.rtn import of_codes
from tilewright.quant_tensor import QuantTensor

STEPS, NORM = 20, 0.7
BETA, KAPPA = 10.0, 1.01  # the penalty, and what it grows by a step
FAR = 1024  # codes from 0: float16 holds no halves beyond twice as many


def hqq(
    w: Tensor, *, bits: int = 4, group: int = 64, scale_dtype: torch.dtype = torch.float16
) -> QuantTensor:
    """w [N, K] -> its codes, asymmetric; group -1 is a whole row.  Raises ValueError as rtn does."""
    size = _grid.check("hqq", w, bits, group)
    groups = w.detach().float().unflatten(1, (-1, size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    # of weights so alike that scale_dtype could not hold their zero-point, a range from 0 on
    far = torch.maximum(-low, high) * ((1 << bits) - 1) > (high - low) * FAR
    low, high = (
        torch.where(far, t, edge)
        for t, edge in ((low.clamp(max=0), low), (high.clamp(min=0), high))
    )
    scales = ((high - low) / ((1 << bits) - 1)).to(scale_dtype).float()
    scales = torch.where(scales > 0, scales, 1.0)
    grid = _grid.Grid(scales, -low / scales, bits)
    best, least, beta = grid.zeros, torch.full_like(scales, torch.inf), BETA
    for _ in range(STEPS):
        codes = grid.codes(groups)
        error = groups - grid.values(codes)
        size_of_it = error.abs().mean(-1, keepdim=True)
        best = torch.where(size_of_it < least, grid.zeros, best)
        least = torch.minimum(least, size_of_it)
        # of |e|^p + beta / 2 (e - error)^2 the least: a shrinkage of the error
        kept = error.abs() - error.abs().clamp_min(1e-8).pow(NORM - 1) / beta
        error = error.sign() * kept.clamp_min(0)
        zeros = (codes - (groups - error) / scales).mean(-1, keepdim=True)
        grid = _grid.Grid(scales, zeros, bits)
        beta *= KAPPA
    grid = _grid.Grid(scales, best.to(scale_dtype).float(), bits)
    return of_codes(grid.codes(groups), grid, False, scale_dtype)
