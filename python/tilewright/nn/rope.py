"""Rotary position embedding with its tables.  The rules that make frequencies live with the models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright import ops


class RotaryEmbedding(torch.nn.Module):
    """Turns x [B, H, S, D] by position times frequency.

    inv_freq [R / 2], radians a position, for positions below max_positions; scale multiplies cos
    and sin (YaRN's and longrope's attention factor).  The tables follow the module from device to
    device but stay float32 whatever dtype it is cast to, and are not saved.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        inv_freq: Tensor,
        max_positions: int,
        *,
        scale: float = 1.0,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        positions = torch.arange(max_positions, dtype=torch.float64, device=inv_freq.device)
        angles = torch.outer(positions, inv_freq.double())
        self.register_buffer("cos", (angles.cos() * scale).float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * scale).float(), persistent=False)
        self.interleaved = interleaved

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return ops.rope(
            x, self.cos, self.sin, interleaved=self.interleaved, position_ids=position_ids
        )

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def extra_repr(self) -> str:
        positions, half = self.cos.shape
        return f"rotary={2 * half}, max_positions={positions}, interleaved={self.interleaved}"
