"""The grid that a group's codes stand on: its scale and zero-point."""

from typing import NamedTuple

import torch
from torch import Tensor

SHRINKS = tuple(1 - i / 40 for i in range(14))  # of a group's range, of which the best is taken


class Grid(NamedTuple):
    """Of groups [..., g]: scales and zeros [..., 1], float32 that scale_dtype holds."""

    scales: Tensor
    zeros: Tensor
    bits: int

    def codes(self, w: Tensor) -> Tensor:
        """Of w [..., g], the nearest codes, as floats."""
        return (w / self.scales + self.zeros).round().clamp(0, (1 << self.bits) - 1)

    def values(self, codes: Tensor) -> Tensor:
        return self.scales * (codes - self.zeros)


def check(name: str, w: Tensor, bits: int, group: int) -> int:
    """The group's size.  Raises ValueError where it does not divide the columns."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"{name}: w must be a float matrix, not {w.dtype} {list(w.shape)}")
    if bits not in (4, 8):
        raise ValueError(f"{name}: bits must be 4 or 8, not {bits}")
    size = w.shape[1] if group == -1 else group
    if size < 1 or w.shape[1] % size or (bits == 4 and size % 2):
        raise ValueError(f"{name}: groups of {group} do not divide {w.shape[1]} columns")
    if not bool(w.isfinite().all()):
        raise ValueError(f"{name}: w holds nan or infinity")
    return size


def _of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    most = (1 << bits) - 1
    if symmetric:
        half = torch.maximum(-low, high)
        low, high = -half, half
    scales = ((high - low) / most).to(dtype).float()
    scales = torch.where(scales > 0, scales, 1.0)  # a group of zeros, or too small for dtype
    if symmetric:
        return Grid(scales, torch.full_like(scales, (most + 1) / 2), bits)
    return Grid(scales, (-low / scales).round().clamp(0, most), bits)


def fitted(
    w: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, weights: Tensor | None = None
) -> Grid:
    """The grid of each group of w [..., g] float32 with the least squared error, each column's counted
    `weights` times (broadcast to w): of its whole range or of a part that clips what is beyond."""
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    best: Grid | None = None
    least = torch.empty(0)
    most = (1 << bits) - 1
    # symmetric codes reach half a step further down than up: one grid of theirs reaches the largest weight
    for shrink in (most / (most - 1), *SHRINKS) if symmetric else SHRINKS:
        grid = _of_range(low * shrink, high * shrink, bits, symmetric, dtype)
        error = (grid.values(grid.codes(w)) - w).square()
        error = (error if weights is None else error * weights).sum(-1, keepdim=True)
        if best is None:
            best, least = grid, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zeros, best.zeros),
            bits,
        )
    assert best is not None
    return best
