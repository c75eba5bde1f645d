"""SwiGLU as a module without parameters."""

import torch
from torch import Tensor

from tilewright import ops


class SwiGLU(torch.nn.Module):
    """silu(gate) up: gate and up [..., I], or both packed in gate [..., 2 I] -> [..., I]."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.swiglu(gate, up)
