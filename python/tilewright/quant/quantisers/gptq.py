"""GPTQ: column by column, each one's rounding error made up for by those still to come.

With H the sum of x xᵀ over what the layer saw and U the upper Cholesky factor of H^-1, rounding column j by
e_j changes the columns k after it by -e_j U[j, k] / U[j, j].  Frantar et al. 2022, arXiv:2210.17323,
algorithm 1.
"""

import torch
from torch import Tensor

from tilewright.quant.quantisers import _grid
from tilewright.quant.quantisers.rtn import of_codes
from tilewright.quant_tensor import QuantTensor

BLOCK = 128  # columns that are updated at once
TRIES = 4  # at ten times the damping each
LEAST = 1e-6  # of damping, after a first try without


def _inverse_factor(H: Tensor, damping: float, mean: float) -> Tensor:
    """U [K, K]; mean is of H's diagonal.  Raises ValueError where H is not positive definite under 1000 times
    the damping either."""
    for i in range(TRIES):
        share = damping if i == 0 else max(damping, LEAST) * 10**i
        damped = H + torch.eye(len(H), device=H.device) * (share * mean)
        lower, fault = torch.linalg.cholesky_ex(damped)
        if not fault:
            upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not fault and bool(upper.isfinite().all()):
                return upper
    raise ValueError(
        f"gptq: hessian {list(H.shape)} is not positive definite under a damping of {damping}"
    )


def gptq(
    w: Tensor, hessian: Tensor, *, bits: int = 4, group: int = 128, symmetric: bool = True,
    act_order: bool = False, damping: float = 0.01, scale_dtype: torch.dtype = torch.float16,
) -> QuantTensor:  # fmt: skip
    """w [N, K], hessian [K, K], the sum of x xᵀ of the layer's inputs -> codes; group -1 is a whole row.

    act_order takes the columns of the largest inputs first, which then share groups; damping, a share of
    the hessian's mean diagonal, is added to it.  Raises ValueError as rtn does, and where the hessian
    does not fit, is not finite, or stays singular, or damping is negative.
    """
    size = _grid.check("gptq", w, bits, group)
    N, K = w.shape
    if hessian.shape != (K, K) or not bool(hessian.isfinite().all()):
        raise ValueError(
            f"gptq: hessian {list(hessian.shape)} does not fit w {[N, K]}, or is not finite"
        )
    if not 0 <= damping < torch.inf:
        raise ValueError(f"gptq: damping must be 0 or more, not {damping}")
    W, H = w.detach().float().clone(), hessian.detach().float().clone()
    unseen = H.diagonal() == 0  # inputs that are always 0: their weights say nothing
    mean = 1.0 if bool(unseen.all()) else float(H.diagonal()[~unseen].mean())
    H[unseen, unseen] = mean
    W[:, unseen] = 0.0
    order = None
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
        W, H = W[:, order], H[order][:, order]
    importance = H.diagonal()
    U = _inverse_factor(H, damping, mean)
    codes = torch.empty_like(W)
    scales, zeros = (torch.empty(N, K // size, 1, device=W.device) for _ in range(2))
    for first in range(0, K, BLOCK):
        last = min(first + BLOCK, K)
        errors = torch.empty(N, last - first, device=W.device)
        for j in range(first, last):
            g = j // size
            if j % size == 0:  # of the weights as the columns before leave them
                ahead = W[:, j : j + size]
                if (
                    j + size > last
                ):  # beyond the block, which the block's own errors have not reached
                    late = errors[:, : j - first] @ U[first:j, last : j + size]
                    ahead = torch.cat((W[:, j:last], W[:, last : j + size] - late), 1)
                grid = _grid.fitted(ahead, bits, symmetric, scale_dtype, importance[j : j + size])
                scales[:, g], zeros[:, g] = grid.scales, grid.zeros
            grid = _grid.Grid(scales[:, g], zeros[:, g], bits)
            column = W[:, j : j + 1]
            codes[:, j : j + 1] = grid.codes(column)
            error = (column - grid.values(codes[:, j : j + 1])) / U[j, j]
            W[:, j:last] -= error * U[j, j:last]
            errors[:, j - first : j - first + 1] = error
        W[:, last:] -= errors @ U[first:last, last:]
    whole = _grid.Grid(scales, zeros, bits)
    if order is not None:  # within a group columns keep their order, as a file gives them back
        at = (
            order.view(-1, size).argsort(1) + torch.arange(0, K, size, device=order.device)[:, None]
        )
        order, codes = order[at.flatten()], codes[:, at.flatten()]
    kept = None if order is None or size == K else order.to(torch.int32)
    return of_codes(codes.unflatten(1, (-1, size)), whole, symmetric, scale_dtype, kept)
