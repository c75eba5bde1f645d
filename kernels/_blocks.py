"""Attention's block-sparse masks as its kernels read them: for each block of queries the keys' blocks it
meets, in turn, and for each block of keys the queries'.  Blocks that no one sees are neither read nor computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks:
    """A block-sparse mask, bool [B or 1, H or 1, ceil(S / size), ceil(T / size)], size a power of two."""

    def __init__(self, mask: Tensor, size: int) -> None:
        self.mask, self.size = mask, size

    def met(
        self, S: int, T: int, left: int, right: int, ranges: tuple[Tensor | None, Tensor | None]
    ) -> "Blocks":
        """Those that some query of theirs still sees a key of, with left and right, -1 without end, or ranges
        [B, S]."""
        size, device = self.size, self.mask.device
        rows, cols = (
            torch.arange(n, device=device) * size for n in self.mask.shape[2:]
        )  # the first of each
        begin, end = ranges
        if begin is not None and end is not None:
            padding = (0, len(rows) * size - S)
            pad = torch.nn.functional.pad
            lo = (
                pad(begin, padding, value=T)
                .unflatten(1, (len(rows), size))
                .amin(2)[:, None, :, None]
            )
            hi = (
                pad(end, padding, value=0).unflatten(1, (len(rows), size)).amax(2)[:, None, :, None]
            )
            return Blocks(self.mask & (cols + size > lo) & (cols < hi), size)
        mask, here = self.mask, rows[:, None] + (T - S)
        if left >= 0:
            mask = mask & (cols + size > here - left)
        if right >= 0:
            mask = mask & (cols < here + size + right)
        return Blocks(mask, size)

    def transposed(self) -> "Blocks":
        """The blocks of queries of each block of keys."""
        return Blocks(self.mask.mT, self.size)

    def bytes(self) -> tuple[Tensor, int, int, int]:
        """The mask, of bytes, and its strides by batch, head and block of queries, 0 where they share."""
        mask = self.mask.contiguous().view(torch.uint8)
        B, H, n, m = mask.shape
        return mask, (B > 1) * H * n * m, (H > 1) * n * m, m

    def lists(self) -> tuple[Tensor, int, int, int]:
        """int32 [.., .., n, 1 + m]: of each block how many others it meets and which, rising; the strides by
        batch and head, 0 where they share; and 1 + m."""
        count = self.mask.sum(-1, keepdim=True, dtype=torch.int32)
        order = torch.argsort(~self.mask, dim=-1, stable=True).to(torch.int32)
        found = torch.cat((count, order), -1)
        B, H, n, width = found.shape
        return found, (B > 1) * H * n * width, (H > 1) * n * width, width


@triton.jit
def met_blocks(blocks_ptr, b, h, first, stride_lb, stride_lh, stride_ln, SIZE: tl.constexpr):
    """Of the block of `first`: where its list begins, and how many it names."""
    at = b * stride_lb + h * stride_lh + (first // SIZE).to(tl.int64) * stride_ln
    return blocks_ptr + at + 1, tl.load(blocks_ptr + at)


@triton.jit
def tile_start(list_ptr, n, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where tile n, BLOCK long, of a list of blocks starts."""
    PER: tl.constexpr = SIZE // BLOCK
    return tl.load(list_ptr + n // PER) * SIZE + n % PER * BLOCK
