"""The router of a mixture of experts.

E experts, D features, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops

MOST_EXPERTS, MOST_CHOSEN = 1024, 32  # of ops.moe_route
SCORES = ("softmax", "sigmoid")


class MoERouter(torch.nn.Module):
    """A token's logits, and its k experts by ops.moe_route, whose options these are.

    State dict: `weight` [E, D], and with correction_bias the buffer `e_score_correction_bias` [E], float32 and 0 at
    first: what balances the experts may change it, gradients do not.  Logits are of the weight's dtype, so that a
    router left in float32 (`moe.gate.float()`, as DeepSeek-V3's is) gives float32's.

    In training jitter multiplies what the router sees by uniform(1 - jitter, 1 + jitter) (Fedus et al. 2021,
    arXiv:2101.03961, "input jitter"), and only that: transformers' Mixtral has its experts see it too.  ValueError
    where sizes or options do not fit.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
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
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"MoERouter: hidden_size must be 1 or more, not {hidden_size}")
        if not 1 <= num_experts <= MOST_EXPERTS:
            raise ValueError(
                f"MoERouter: num_experts must be from 1 to {MOST_EXPERTS}, not {num_experts}"
            )
        if groups < 1 or num_experts % groups or not 1 <= group_k <= groups or group_top < 1:
            raise ValueError(
                f"MoERouter: groups {groups}, group_k {group_k} and group_top {group_top} do not fit"
                f" {num_experts} experts"
            )
        most = min(MOST_CHOSEN, num_experts // groups * group_k)
        if not 1 <= k <= most:
            raise ValueError(f"MoERouter: k must be from 1 to {most}, not {k}")
        if scores not in SCORES:
            raise ValueError(f"MoERouter: scores {scores!r} are none of {', '.join(SCORES)}")
        if not 0 <= jitter < 1:
            raise ValueError(f"MoERouter: jitter must be from 0 to below 1, not {jitter}")
        self.weight = torch.nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        bias = torch.zeros(num_experts, device=device) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.k, self.scores, self.renormalise, self.scale = k, scores, renormalise, scale
        self.groups, self.group_k, self.group_top, self.jitter = groups, group_k, group_top, jitter
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(D), as torch.nn.Linear's; a bias of 0."""
        bound = self.weight.shape[1] ** -0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.e_score_correction_bias is not None:
            torch.nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] -> logits [..., E], weights [..., k] float32, ids [..., k] int64, best first."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x.to(self.weight.dtype), self.weight)
        weights, ids = ops.moe_route(
            logits, self.k, scores=self.scores, bias=self.e_score_correction_bias,
            groups=self.groups, group_k=self.group_k, group_top=self.group_top,
            renormalise=self.renormalise, scale=self.scale,
        )  # fmt: skip
        return logits, weights, ids

    def extra_repr(self) -> str:
        E, D = self.weight.shape
        return (
            f"hidden_size={D}, num_experts={E}, k={self.k}, scores={self.scores}, "
            f"renormalise={self.renormalise}, scale={self.scale}, groups={self.groups}, "
            f"group_k={self.group_k}, group_top={self.group_top}, jitter={self.jitter}"
        )
