"""A mixture of experts, the feed-forward part of a layer.

E experts, D features, I intermediate ones, k experts a token.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright.nn._shared_expert import SharedExpert
from tilewright.nn.experts import Experts
from tilewright.nn.moe_router import MoERouter


class MoE(torch.nn.Module):
    """The weighted sum of each token's k experts, and of one that all tokens share.

    The state dict is that of transformers' Mixtral, Qwen and OLMoE blocks: `gate.weight` [E, D],
    `experts.gate_up_proj` [E, 2 I, D], `experts.down_proj` [E, D, I]; with bias `experts.gate_up_proj_bias` and
    `experts.down_proj_bias`; with correction_bias `gate.e_score_correction_bias` [E]; with a shared_size
    `shared_expert.{gate_proj,up_proj,down_proj}.weight`, and with shared_gate `shared_expert_gate.weight` [1, D],
    whose sigmoid scales the shared expert (Qwen2-MoE).

    The routing's options and jitter are MoERouter's, activation, limit and bias Experts'; the shared expert has the
    activation alone.  Nothing waits for a GPU.  ValueError where sizes or options do not fit.  Shazeer et al. 2017,
    arXiv:1701.06538; Dai et al. 2024, arXiv:2401.06066, eq. 9 (shared experts).
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        k: int,
        *,
        scores: str = "softmax",
        renormalise: bool = True,
        scale: float = 1.0,
        correction_bias: bool = False,
        groups: int = 1,
        group_k: int = 1,
        group_top: int = 2,
        activation: str = "silu",
        limit: float | None = None,
        bias: bool = False,
        shared_size: int = 0,
        shared_gate: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared_size < 0:
            raise ValueError(f"MoE: shared_size must be 0 or more, not {shared_size}")
        if shared_gate and not shared_size:
            raise ValueError(f"MoE: a shared_gate needs a shared_size, not {shared_size}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = MoERouter(
            hidden_size, num_experts, k, scores=scores, renormalise=renormalise, scale=scale,
            correction_bias=correction_bias, groups=groups, group_k=group_k, group_top=group_top,
            jitter=jitter, **made,
        )  # fmt: skip
        self.experts = Experts(
            num_experts, hidden_size, ffn_size, activation=activation, limit=limit, bias=bias, **made
        )  # fmt: skip
        self.shared_expert = (
            SharedExpert(hidden_size, shared_size, activation, **made) if shared_size else None
        )
        self.shared_expert_gate: torch.nn.Module | None = (
            torch.nn.Linear(hidden_size, 1, bias=False, **made) if shared_gate else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.routed(x)[0]

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> y [..., D], and what losses that balance the experts need: the router's logits [..., E] and
        the ids [..., k] of the experts taken."""
        logits, weights, ids = self.gate(x)
        y = self.experts(x, ids, weights)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
            y = y + shared
        return y, logits, ids
