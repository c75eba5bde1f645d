"""A linear layer over a quantised weight."""

import torch
from torch import Tensor

from tilewright import ops
from tilewright.nn._quant_weight import QuantWeight
from tilewright.quant_tensor import ACTIVATIONS, Int8Rows, QuantTensor


class QuantLinear(QuantWeight):
    """y = x w^T + bias with a QuantTensor w [N, K].  [..., K] -> [..., N].

    State dict: `qweight`, `scales`, and of `zeros`, `minima`, `codebook`, `order` and `nested_code`,
    `nested_scales`, `nested_offset` what the weight has, and `bias`; one with `g_idx` [K], the group of each
    column, is taken too.  `.to(dtype)`, `.half()` and the like cast the bias alone.  `activations` is
    quant_linear's option, or "int8_token": int8_linear, whose weight has 8 bits and a scale a row, and whose
    input may be Int8Rows.  An embedding's head is given the QuantEmbedding in the place of w: it works on that
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
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"QuantLinear: activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
            )
        w = weight.weight if isinstance(weight, QuantWeight) else weight
        if activations == "int8_token" and not w.by_row:
            raise ValueError(
                f"QuantLinear: int8_token takes a weight of 8 bits, a scale a row and no offsets, not {w.bits} "
                f"bits in groups of {w.group} with {', '.join(w.tensors())}"
            )
        super().__init__(weight)
        self.activations = activations
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def forward(self, x: Tensor | Int8Rows) -> Tensor:
        if self.activations == "int8_token":
            return ops.int8_linear(x, self.weight, self._parameters["bias"])
        if isinstance(x, Int8Rows):
            raise ValueError(f"QuantLinear: activations {self.activations!r} do not take Int8Rows")
        return ops.quant_linear(
            x, self.weight, self._parameters["bias"], activations=self.activations
        )

    def extra_repr(self) -> str:
        w = self.weight
        return (
            f"in_features={w.in_features}, out_features={w.out_features}, bits={w.bits}, "
            f"group={w.group}, bias={self.bias is not None}, activations={self.activations}"
        )
