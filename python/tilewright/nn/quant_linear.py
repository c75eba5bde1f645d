"""A linear layer over a quantised weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.quant_tensor import QuantTensor


class QuantLinear(torch.nn.Module):
    """y = x w^T + bias with a QuantTensor w [N, K].  [..., K] -> [..., N].

    State dict: `qweight`, `scales`, `zeros` or `minima`, `g_idx` where the weight has them, and
    `bias`.  `.to(dtype)`, `.half()` and the like cast the bias and never the scales.  `activations`
    is quant_linear's option.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    minima: Tensor | None
    g_idx: Tensor | None
    bias: torch.nn.Parameter | None

    def __init__(
        self, weight: QuantTensor, bias: Tensor | None = None, *, activations: str = "float"
    ) -> None:
        super().__init__()
        self.bits = weight.bits
        self.activations = activations
        for name in ("qweight", "scales", "zeros", "minima", "g_idx"):
            self.register_buffer(name, getattr(weight, name))
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))
        self._weight: QuantTensor | None = weight

    @property
    def weight(self) -> QuantTensor:
        """A view of the buffers as they are now."""
        # straight from the dictionary: Module.__getattr__ costs a decode step more than the check
        now, w = self._buffers, self._weight
        # rebuilt when a buffer was replaced (load_state_dict(assign=True), .to, functional_call)
        if w is None or w.qweight is not now["qweight"] or w.scales is not now["scales"]:
            w = self._weight = QuantTensor(
                self.qweight, self.scales, self.zeros, self.minima, self.g_idx, self.bits
            )
        return w

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {n: getattr(self, n) for n in ("scales", "zeros", "minima")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if (
                old is not None and new.dtype != old.dtype
            ):  # a cast: keep the values, follow the move
                setattr(self, name, old.to(new.device))
        self._weight = None
        return self

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
