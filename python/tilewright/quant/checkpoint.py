"""Which format a Hugging Face checkpoint's quantization_config names, and its layers read by that.

`reader(config)(module, tensors)` gives the QuantTensor of a layer from its tensors, by their names within it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tilewright.quant import awq, bitsandbytes, compressed_tensors, gptq, hqq
from tilewright.quant_tensor import QuantTensor

Read = Callable[[str, Mapping[str, Tensor]], QuantTensor]
FORMATS: dict[str, Any] = {
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
    compressed_tensors.NAME: compressed_tensors,
}


def method(config: Mapping[str, Any]) -> str:
    """The format's name.  Raises ValueError where none of ours is named."""
    if not isinstance(config, Mapping):
        raise ValueError(f"quantization_config must be an object, not {config!r}")
    named = config.get("quant_method")
    if not isinstance(named, str) or named not in FORMATS:
        raise ValueError(
            f"quantization_config: quant_method {named!r}; readable are {', '.join(FORMATS)}"
        )
    if config.get("dynamic"):
        raise ValueError("quantization_config: dynamic, settings by layer, is not read")
    return named


def names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a layer's tensors may be called, within it."""
    return FORMATS[method(config)].NAMES


def activations(config: Mapping[str, Any]) -> str:
    """nn.QuantLinear's option, by what config says of the layers' inputs: "int8_token" where they are rounded to
    eight bits by token and the weights by row (W8A8), "int8" where to eight bits otherwise, else "float"; one answer
    for all groups, of which each layer takes what its weight does (activations_for)."""
    groups = config.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        inputs = group.get("input_activations") if isinstance(group, dict) else None
        if isinstance(inputs, dict) and (inputs.get("num_bits"), inputs.get("type")) == (8, "int"):
            by_token = (inputs.get("strategy"), inputs.get("dynamic")) == ("token", True)
            by_token = by_token and inputs.get("symmetric", True) is True
            found.add("int8_token" if by_token and _is_by_row(group.get("weights")) else "int8")
    return found.pop() if len(found) == 1 else "int8" if found else "float"


def _is_by_row(weights: Any) -> bool:
    if not isinstance(weights, dict):
        return False
    told = weights.get("num_bits"), weights.get("strategy"), weights.get("symmetric", True)
    return told == (8, "channel", True)


def reader(config: Mapping[str, Any]) -> Read:
    """Of quantization_config.  Raises ValueError where it names no format of ours, and the reader where a
    layer does not fit it, with the layer's name."""
    named = method(config)
    groups = _groups(config) if named == compressed_tensors.NAME else None

    def read(module: str, tensors: Mapping[str, Tensor]) -> QuantTensor:
        try:
            settings = config if groups is None else _group_of(groups, module)
            return FORMATS[named].read(tensors, settings)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error

    return read


def _groups(config: Mapping[str, Any]) -> list[tuple[list[str], Mapping[str, Any]]]:
    """compressed-tensors' groups: whom each is for, and its weights' settings."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("quantization_config: config_groups is missing")
    found: list[tuple[list[str], Mapping[str, Any]]] = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise ValueError(f"quantization_config: {name} is {group!r}, no settings of ours")
        kind = group.get("format") or config.get("format")
        weights, targets = group.get("weights"), group.get("targets") or []
        if kind not in (compressed_tensors.PACKED, compressed_tensors.INT):
            raise ValueError(
                f"quantization_config: {name} is of format {kind!r}; readable are"
                f" {compressed_tensors.PACKED} and {compressed_tensors.INT}"
            )
        if not isinstance(weights, dict):
            raise ValueError(f"quantization_config: {name} says nothing of weights")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"quantization_config: {name} is for {targets!r}, no list of names")
        found.append((targets, weights))
    return found


def _group_of(groups: list[tuple[list[str], Mapping[str, Any]]], module: str) -> Mapping[str, Any]:
    """The settings of the first group that names the module, or else linear layers."""
    for targets, weights in groups:
        for target in targets:
            if target.startswith("re:") and _matches(target[3:], module):
                return weights
            if target == module or module.endswith(f".{target}"):
                return weights
    for targets, weights in groups:
        if "Linear" in targets:
            return weights
    raise ValueError("no group of quantization_config is for it")


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"quantization_config: target {pattern!r}: {error}") from error
