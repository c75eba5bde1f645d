"""The experts of mixtures, quantised: nn.Experts into nn.QuantExperts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilewright import nn
from tilewright.quant_tensor import QuantTensor


def stacks(module: torch.nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Experts]:
    """The nn.Experts of a module by name, but those whose names end in one of `skip`.  Raises ValueError on experts
    of another library, which would stay floats unseen."""
    found: dict[str, nn.Experts] = {}
    for name, layer in module.named_modules():
        if name.endswith(tuple(skip)):
            continue
        if isinstance(layer, nn.Experts):
            found[name] = layer
        elif holds_experts(layer):
            raise ValueError(
                f"quantize: {name or 'the model'}: {type(layer).__name__} has experts of its own, which stay as they"
                " are only where skip names them; interop.experts.own_experts(model) makes them nn.Experts"
            )
    return found


def holds_experts(module: torch.nn.Module) -> bool:
    """Whether a module has weights of experts stacked, under the names that nn.Experts and transformers use."""
    weights = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    return all(w is not None and w.dim() == 3 for w in weights)


def matrices(name: str, experts: nn.Experts) -> dict[str, Tensor]:
    """Weights [E, N, K] by their names in the model."""
    return {f"{name}.{part}": getattr(experts, part) for part in ("gate_up_proj", "down_proj")}


def stacked(name: str, weight: Tensor, quantise: Callable[[Tensor], QuantTensor]) -> QuantTensor:
    """A weight [E, N, K], each expert's by `quantise`, as one [E N, K].  Raises ValueError, with its name, where one
    does not take it."""
    try:
        whole = QuantTensor.stacked([quantise(w) for w in weight])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    assert whole is not None, "one method makes one kind of weight"
    return whole


def of(experts: nn.Experts, gate_up_proj: QuantTensor, down_proj: QuantTensor) -> nn.QuantExperts:
    """The same experts with these weights."""
    made = nn.QuantExperts(
        gate_up_proj, down_proj, len(experts.gate_up_proj), activation=experts.activation, limit=experts.limit,
        gate_up_proj_bias=experts.gate_up_proj_bias, down_proj_bias=experts.down_proj_bias,
    )  # fmt: skip
    return made.train(experts.training)
