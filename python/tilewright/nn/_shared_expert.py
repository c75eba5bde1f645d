"""The expert that every token takes."""

from typing import Any

import torch
from torch import Tensor

from tilewright import ops


class SharedExpert(torch.nn.Module):
    """down_proj(f(gate_proj x) up_proj x), f of Experts' activations.  x [..., D] -> [..., D]."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        activation: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, ffn_size, **made)
        self.up_proj = torch.nn.Linear(hidden_size, ffn_size, **made)
        self.down_proj = torch.nn.Linear(ffn_size, hidden_size, **made)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation == "silu":
            return self.down_proj(ops.swiglu(gate, up))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        return self.down_proj(ops.geglu(gate, up, approximate=approximate))
