"""A linear layer over a quantised weight."""

import torch
from torch import Tensor

from tilewright import ops
from tilewright.nn._quant_weight import QuantWeight
from tilewright.quant_tensor import QuantTensor


class QuantLinear(QuantWeight):
    """y = x w^T + bias with a QuantTensor w [N, K].  [..., K] -> [..., N].

    State dict: `qweight`, `scales`, and of `zeros`, `minima`, `codebook`, `order` and `nested_code`,
    `nested_scales`, `nested_offset` what the weight has, and `bias`; one with `g_idx` [K], the group of each
    column, is taken too.  `.to(dtype)`, `.half()` and the like cast the bias alone.  `activations` is
    quant_linear's option.  An embedding's head is given the QuantEmbedding in the place of w: it works on that
    one's weight, where that one is, and has the bias alone.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        weight: QuantTensor | QuantWeight,
        bias: Tensor | None = None,
        *,
        activations: str = "float",
    ) -> None:
        super().__init__(weight)
        self.activations = activations
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def forward(self, x: Tensor) -> Tensor:
        return ops.quant_linear(
            x, self.weight, self._parameters["bias"], activations=self.activations
        )

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"in_features={w.in_features}, out_features={w.out_features}, bits={w.bits}, "
            f"group={w.group}, bias={self.bias is not None}, activations={self.activations}"
        )
