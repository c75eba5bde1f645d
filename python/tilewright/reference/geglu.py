"""The specification of geglu, in eager PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """gate and up [..., I], or both packed in gate [..., 2 I] -> [..., I]."""
    high = torch.promote_types(gate.dtype, torch.float32)
    g, u = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return (F.gelu(g.to(high), approximate=approximate) * u.to(high)).to(gate.dtype)
