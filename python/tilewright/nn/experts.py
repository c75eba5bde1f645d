"""The experts of a mixture, their weights stacked.

E experts, D features, I intermediate ones, k experts a token.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright import ops

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")  # ops.moe_experts'


class Experts(torch.nn.Module):
    """ops.moe_experts over parameters, called as transformers' experts are.

    State dict: `gate_up_proj` [E, 2 I, D] (the gates' rows, then the ups'), `down_proj` [E, D, I], and with bias
    `gate_up_proj_bias` [E, 2 I] and `down_proj_bias` [E, D].  They begin as torch.nn.Linear's.  ValueError where
    sizes, activation or limit are none.
    """

    gate_up_proj_bias: torch.nn.Parameter | None
    down_proj_bias: torch.nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "silu",
        limit: float | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "ffn_size": ffn_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Experts: {name} must be 1 or more, not {size}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Experts: activation {activation!r} is none of {', '.join(ACTIVATIONS)}"
            )
        if limit is not None and not limit > 0:
            raise ValueError(f"Experts: limit {limit} must be above 0")
        E, D, I = sizes.values()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_up_proj = torch.nn.Parameter(torch.empty(E, 2 * I, D, **made))
        self.down_proj = torch.nn.Parameter(torch.empty(E, D, I, **made))
        for name, rows in (("gate_up_proj_bias", 2 * I), ("down_proj_bias", D)):
            values = torch.nn.Parameter(torch.empty(E, rows, **made)) if bias else None
            self.register_parameter(name, values)
        self.activation, self.limit = activation, limit
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(inputs), as torch.nn.Linear's."""
        for weight, bias in (
            (self.gate_up_proj, self.gate_up_proj_bias),
            (self.down_proj, self.down_proj_bias),
        ):
            bound = weight.shape[-1] ** -0.5
            torch.nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                torch.nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [..., D], ids [..., k] int64 and weights [..., k] -> [..., D] of x's dtype; an id of -1 adds nothing."""
        placed = ops.moe_dispatch(ids, self.gate_up_proj.shape[0])
        return ops.moe_experts(
            x, weights, placed, self.gate_up_proj, self.down_proj,
            activation=self.activation, limit=self.limit,
            bias13=self.gate_up_proj_bias, bias2=self.down_proj_bias,
        )  # fmt: skip

    def extra_repr(self) -> str:
        E, D, I = self.down_proj.shape
        return (
            f"num_experts={E}, hidden_size={D}, ffn_size={I}, activation={self.activation}, "
            f"limit={self.limit}, bias={self.down_proj_bias is not None}"
        )
