"""GeGLU as a module without parameters."""

import torch
from torch import Tensor

from tilewright import ops


class GeGLU(torch.nn.Module):
    """gelu(gate) up: gate and up [..., I], or both packed in gate [..., 2 I] -> [..., I]."""

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
