"""What from_pretrained does with the tensors of a layer, or of a mixture's experts, that are quantised or are to be."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from tilewright import nn
from tilewright.quant import apply, checkpoint
from tilewright.quant.apply import QuantConfig
from tilewright.quant_tensor import QuantTensor, check_order

PARTS = ("gate_up_proj", "down_proj")  # of experts, and
EACH = {  # of what matrices of each expert they are stacked in a folder, by the one name or the other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",)),
}  # fmt: skip
HELD = "_tilewright_held"  # on experts: those of their weights that are there, quantised


@dataclass
class Quantise(ConversionOps):
    """A float weight that has been loaded, into a layer."""

    config: QuantConfig
    planned: frozenset[str]
    activations: str

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **told: Any
    ) -> dict[str, Any]:
        rest = {}  # a conversion of the model's may make several weights of one tensor
        for key, found in input_dict.items():
            tensor, (name, _, last) = _only(found), key.rpartition(".")
            if name not in self.planned or last not in ("weight", *PARTS):
                rest[key] = tensor
            elif last == "weight":
                weight = apply.quantised(tensor, self.config, None)
                _put(told["model"], name, weight, self.activations, told["missing_keys"])
            else:
                weight = apply.quantised_experts(key, tensor, self.config)
                _put_experts(told["model"], key, weight, told["missing_keys"])
        return rest


@dataclass
class Read(ConversionOps):
    """The tensors of a layer in a folder, by pattern; read is None where they are nn.QuantLinear's own."""

    patterns: dict[str, str]
    read: checkpoint.Read | None
    activations: str

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **told: Any
    ) -> dict[str, Any]:
        tensors = {self.patterns[pattern]: _only(found) for pattern, found in input_dict.items()}
        if tensors.keys() == {"weight"} and tensors["weight"].is_floating_point():
            return {told["full_layer_name"]: tensors["weight"]}  # others call their codes weight
        model, name = told["model"], told["full_layer_name"].removesuffix(".weight")
        owner, _, last = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, nn.Experts):
            columns = getattr(layer, last).shape[-1]
        elif type(layer := model.get_submodule(name)) is torch.nn.Linear:
            columns = layer.in_features
        else:
            raise ValueError(f"{name} is quantised, and a {type(layer).__name__}, not a Linear")
        if self.read is not None:
            weight = self.read(name, tensors)
        else:
            lacking = [part for part in ("qweight", "scales") if part not in tensors]
            if lacking:
                raise ValueError(f"{name}: {', '.join(lacking)} missing beside {sorted(tensors)}")
            check_order(f"{name}.order", tensors.get("order"))
            weight = QuantTensor.of(tensors, 8 * tensors["qweight"].shape[-1] // columns)
        if isinstance(layer, nn.Experts):
            _put_experts(model, name, weight, told["missing_keys"])
        else:
            _put(model, name, weight, self.activations, told["missing_keys"])
        return {}


@dataclass
class ReadExperts(ConversionOps):
    """One of the two weights of experts, of each expert's tensors in a folder, by pattern: the matrix and the name."""

    patterns: dict[str, tuple[str, str]]
    part: str
    read: checkpoint.Read

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **told: Any
    ) -> dict[str, Any]:
        key = told["full_layer_name"]
        tensors: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, found in input_dict.items():
            matrix, name = self.patterns[pattern]
            tensors.setdefault(matrix, {})[name] = found if isinstance(found, list) else [found]
        E = len(getattr(told["model"].get_submodule(key.rpartition(".")[0]), self.part))
        family = next((each for each in EACH[self.part] if tensors.keys() == set(each)), None)
        counts = {len(found) for each in tensors.values() for found in each.values()}
        if family is None or counts != {E}:
            raise ValueError(
                f"{key}: {E} experts have tensors {sorted(tensors)} in numbers of {sorted(counts)}"
            )
        floats, weights = [], []
        for e, matrix in ((e, matrix) for e in range(E) for matrix in family):
            own = {name: found[e] for name, found in tensors[matrix].items()}
            if own.keys() == {"weight"} and own["weight"].is_floating_point():
                floats.append(own["weight"])
            else:
                weights.append(self.read(f"{key.rpartition('.')[0]}.{e}.{matrix}", own))
        if not weights:
            return {key: torch.cat(floats).unflatten(0, (E, -1))}
        stacked = None if floats else QuantTensor.stacked(weights)
        if stacked is None:
            raise ValueError(
                f"{key}: the experts are not quantised alike, with one order of the columns"
            )
        _put_experts(told["model"], key, stacked, told["missing_keys"])
        return {}


def _only(found: Any) -> Tensor:
    return found[0] if isinstance(found, list) else found


def _put(model: Any, name: str, weight: QuantTensor, activations: str, missing_keys: Any) -> None:
    apply.put(model, name, weight, activations)
    # some models initialise a layer's weight by its name: it says that there is nothing to do
    object.__setattr__(weight, "_is_hf_initialized", True)
    missing_keys.discard(f"{name}.weight")


def _put_experts(model: Any, name: str, weight: QuantTensor, missing_keys: Any) -> None:
    """One of the two weights of experts: nn.QuantExperts takes their place when both are there."""
    at, _, part = name.rpartition(".")
    experts = model.get_submodule(at)
    held = vars(experts).setdefault(HELD, {})
    held[part] = weight
    missing_keys.discard(name)
    if len(held) == len(PARTS):
        apply.put_experts(model, at, *(held[part] for part in PARTS))


def is_ours(conversion: Any) -> bool:
    return any(isinstance(op, Read | ReadExperts) for op in getattr(conversion, "operations", ()))


def is_experts(conversion: Any) -> bool:
    """Whether it makes the weights of experts of each expert's."""
    return isinstance(conversion, WeightConverter) and any(
        target.endswith(PARTS) for target in conversion.target_patterns
    )
