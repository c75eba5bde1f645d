"""SmoothQuant: outliers of the inputs moved into the weights, so that both are rounded to eight bits.

The factor of input j is max|x_j|^a / max|w_j|^(1 - a), taken over by the layer before.  Xiao et al. 2022,
arXiv:2211.10438, eq. 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def smoothquant(weights: Sequence[Tensor], largest: Tensor, alpha: float = 0.5) -> Tensor:
    """Factors [K] that the inputs are divided by and the columns of `weights` [N, K] times; largest [K] is the
    maximum of |x|.  Raises ValueError where shapes do not fit or alpha is not from 0 to 1."""
    K = largest.numel()
    if any(w.dim() != 2 or w.shape[1] != K for w in weights) or not 0 <= alpha <= 1:
        shapes = [list(w.shape) for w in weights]
        raise ValueError(f"smoothquant: weights {shapes}, largest [{K}], alpha {alpha} do not fit")
    columns = torch.stack([w.detach().float().abs().amax(0) for w in weights]).amax(0)
    inputs = largest.float().clamp_min(1e-5)
    factors = inputs**alpha / columns.clamp_min(1e-5) ** (1 - alpha)
    return factors.clamp(1e-4, 1e4)
