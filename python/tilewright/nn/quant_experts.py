"""The experts of a mixture, their weights quantised.

E experts, D features, I intermediate ones, k experts a token.
"""

import torch
from torch import Tensor

from tilewright import ops
from tilewright.nn._quant_weight import QuantWeight
from tilewright.nn.experts import Experts
from tilewright.quant_tensor import QuantTensor


class QuantExperts(torch.nn.Module):
    """ops.quant_moe_experts over weights of 4 or 8 bits, called as Experts are.

    gate_up_proj: QuantTensor [E 2 I, D], the experts' rows one below the other, in each the gates' and then the ups';
    down_proj: QuantTensor [E D, I]; biases [E, 2 I] and [E, D].  Weights and biases are frozen; gradients pass to x
    and to the routing's weights.  State dict: of each of `gate_up_proj` and `down_proj` the tensors that QuantLinear
    has of its weight, and Experts' biases.  `.to(dtype)` and the like cast the biases alone.  ValueError where sizes
    do not fit each other, or activation or limit are none.
    """

    gate_up_proj_bias: torch.nn.Parameter | None
    down_proj_bias: torch.nn.Parameter | None

    def __init__(
        self,
        gate_up_proj: QuantTensor,
        down_proj: QuantTensor,
        num_experts: int,
        *,
        activation: str = "silu",
        limit: float | None = None,
        gate_up_proj_bias: Tensor | None = None,
        down_proj_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"QuantExperts: num_experts must be 1 or more, not {num_experts}")
        E, (N, D), (M, I) = num_experts, gate_up_proj.shape, down_proj.shape
        if (N, M) != (2 * E * I, E * D):
            raise ValueError(
                f"QuantExperts: gate_up_proj {[N, D]} and down_proj {[M, I]} are not [{E} 2 I, D] and"
                f" [{E} D, I] of {E} experts"
            )
        # Experts checks activation and limit; on meta it has no weights
        like = Experts(E, D, I, activation=activation, limit=limit, device="meta")
        self.activation, self.limit = like.activation, like.limit
        self.num_experts = num_experts
        self.gate_up_proj, self.down_proj = QuantWeight(gate_up_proj), QuantWeight(down_proj)
        biases = (
            ("gate_up_proj_bias", gate_up_proj_bias, (E, 2 * I)),
            ("down_proj_bias", down_proj_bias, (E, D)),
        )
        for name, bias, shape in biases:
            if bias is not None and bias.shape != shape:
                raise ValueError(f"QuantExperts: {name} {list(bias.shape)} must be {list(shape)}")
            held = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
            self.register_parameter(name, held)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [..., D], ids [..., k] int64 and weights [..., k] -> [..., D] of x's dtype; an id of -1 adds nothing."""
        placed = ops.moe_dispatch(ids, self.num_experts)
        return ops.quant_moe_experts(
            x, weights, placed, self.gate_up_proj.weight, self.down_proj.weight,
            activation=self.activation, limit=self.limit,
            bias13=self.gate_up_proj_bias, bias2=self.down_proj_bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        return (
            f"num_experts={self.num_experts}, hidden_size={gate_up.in_features}, ffn_size={down.in_features}, "
            f"bits={gate_up.bits}, group={gate_up.group}, activation={self.activation}, limit={self.limit}, "
            f"bias={self.down_proj_bias is not None}"
        )
