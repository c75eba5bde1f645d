"""AWQ: inputs that are large make their weights matter; a factor by input, taken over by the layer before,
gives these finer grids.

The factor of input j is mean|x_j|^a, a the one of a grid of twenty with the least error of the layer's
outputs, tr(E H Eᵀ) with H the sum of x xᵀ.  Lin et al. 2023, arXiv:2306.00978, section 3.2.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilewright.quant_tensor import QuantTensor

STEPS = 20
Quantise = Callable[[Tensor], QuantTensor]


def awq(
    weights: Sequence[Tensor], hessian: Tensor, magnitude: Tensor, quantise: Quantise
) -> Tensor:
    """Factors [K] of the inputs that `weights` [N, K] share: w diag(factors) is then quantised, and the inputs
    divided by them.

    hessian [K, K] sums x xᵀ, magnitude [K] is the mean of |x|; quantise is how the weights will be.  Raises
    ValueError where shapes do not fit.
    """
    K = magnitude.numel()
    if hessian.shape != (K, K) or any(w.dim() != 2 or w.shape[1] != K for w in weights):
        shapes = [list(w.shape) for w in weights]
        raise ValueError(
            f"awq: hessian {list(hessian.shape)}, magnitude [{K}] do not fit weights {shapes}"
        )
    H, size = hessian.float(), magnitude.float().clamp_min(1e-6)
    best, least = torch.ones_like(size), torch.inf
    for i in range(STEPS):
        factors = size ** (i / STEPS)
        factors = (factors / (factors.amax() * factors.amin()).sqrt()).clamp(1e-4, 1e4)
        error = 0.0
        for w in weights:
            rounded = quantise(w.float() * factors).dequantize() / factors
            lost = rounded - w.float()
            error += float(((lost @ H) * lost).sum(dtype=torch.float64))
        if error < least:
            best, least = factors, error
    return best
