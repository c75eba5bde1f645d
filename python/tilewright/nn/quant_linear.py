"""A linear layer over a quantised weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.quant_tensor import QuantTensor, check_order


class QuantLinear(torch.nn.Module):
    """y = x w^T + bias with a QuantTensor w [N, K].  [..., K] -> [..., N].

    State dict: `qweight`, `scales`, and of `zeros`, `minima`, `codebook`, `order` and `nested_code`,
    `nested_scales`, `nested_offset` what the weight has, and `bias`; one with `g_idx` [K], the group of each
    column, is taken too.  `.to(dtype)`, `.half()` and the like cast the bias alone.  `activations` is
    quant_linear's option.
    """

    qweight: Tensor
    scales: Tensor
    bias: torch.nn.Parameter | None

    def __init__(
        self, weight: QuantTensor, bias: Tensor | None = None, *, activations: str = "float"
    ) -> None:
        super().__init__()
        self.bits = weight.bits
        self.activations = activations
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else torch.nn.Parameter(bias))
        self._weight: QuantTensor | None = weight

    @property
    def weight(self) -> QuantTensor:
        """A view of the buffers as they are now."""
        # straight from the dictionary: Module.__getattr__ costs a decode step more than the check
        now, w = self._buffers, self._weight
        # rebuilt when a buffer was replaced (load_state_dict(assign=True), .to, functional_call)
        if (
            w is None
            or w.qweight is not now["qweight"]
            or w.scales is not now["scales"]
            or w.zeros is not now.get("zeros")
            or w.minima is not now.get("minima")
            or not (w.plain or all(t is now.get(name) for name, t in w.tensors().items()))
        ):
            given = {name: t for name, t in now.items() if t is not None}
            w = self._weight = QuantTensor.of(given, self.bits)
        return w

    @property
    def in_features(self) -> int:
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        return self.weight.out_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            # a cast: keep the values, follow the move
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self._weight = None
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        g_idx = state_dict.get(f"{prefix}g_idx")
        check_order(f"{prefix}order", state_dict.get(f"{prefix}order"))
        if (
            g_idx is not None
            and f"{prefix}qweight" in state_dict
            and f"{prefix}scales" in state_dict
        ):
            qweight, scales = state_dict[f"{prefix}qweight"], state_dict[f"{prefix}scales"]
            zeros = state_dict.get(f"{prefix}zeros")
            w = QuantTensor.by_group(qweight, scales, zeros, g_idx, self.bits)
            del state_dict[f"{prefix}g_idx"]
            state_dict |= {f"{prefix}{name}": t for name, t in w.tensors().items()}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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
