"""What modules over a quantised weight share: its tensors as buffers, and a view of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.quant_tensor import QuantTensor, check_order


class QuantWeight(torch.nn.Module):
    """A module whose buffers are the tensors of a QuantTensor [N, K], by their names.

    A cast keeps them as they are; a move takes them along.  A state dict with `g_idx` [K], the group of
    each column, is taken too.  Of another such module, which is given in the place of the weight, it has
    none of its own: the weight is that one's, with which it moves, loads and is saved, once.
    """

    qweight: Tensor
    scales: Tensor
    bits: int

    def __init__(self, weight: "QuantTensor | QuantWeight") -> None:
        super().__init__()
        self.bits = weight.bits
        self._weight: QuantTensor | None = None
        # in a tuple, which keeps it from being a module of this one
        self._other = (weight,) if isinstance(weight, QuantWeight) else ()
        if isinstance(weight, QuantTensor):
            self._weight = weight
            for name, tensor in weight.tensors().items():
                self.register_buffer(name, tensor)

    @property
    def weight(self) -> QuantTensor:
        """A view of the buffers as they are now."""
        if self._other:
            return self._other[0].weight
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
