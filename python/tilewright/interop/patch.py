"""tilewright.patch(model): a model of transformers on our kernels, layer by layer, and back.

A layer gets a forward of ours, on that instance alone, where a trial shows that it computes what the layer's own
forward does; its weights, its class and its state dict stay.  A model's attention further takes our kernels and
masks, as attn_implementation="tilewright" does, where every layer that attends passed with a forward of ours or with
its own.
"""

import copy
import sys
from collections import Counter
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch

from tilewright.interop._layers import FORWARDS, LAYERS, Layer, attention_probe, own_attention
from tilewright.interop._probe import trial

BEFORE = "_tilewright_attention"  # on a model: what it attended by


@dataclass(frozen=True)
class Patched:
    """What patch did.

    layers: name of a module -> the kind of layer it now is of ours, its forward's name after a colon.  left: name of
    a module of such a kind -> why it runs its own forward still.  attention: what the attention of each model inside
    runs on, by the model's name ("" is the whole).
    """

    model: str
    layers: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    attention: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.layers)} layers on tilewright's kernels"]
        lines += [f"  {n} x {kind}" for kind, n in sorted(Counter(self.layers.values()).items())]
        lines += [
            f"  attention{f' of {name}' if name else ''}: {told}"
            for name, told in self.attention.items()
        ]
        for why, n in sorted(Counter(self.left.values()).items()):
            first = next(name for name, told in self.left.items() if told == why)
            more = f" and {n - 1} more" if n > 1 else ""
            lines.append(f"  left as they were: {first}{more}: {why}")
        return "\n".join(lines)


def patch(model: torch.nn.Module) -> Patched:
    """Put model's experts, routers, RMSNorms, MLPs, RoPE and attention on our kernels, in place.

    model: of transformers, or with layers like its, of any dtype, on any device, adapted by PEFT or not.  Only this
    instance changes, and its parameters and state dict do not: unpatch(model) takes every change back.  Returns
    what was done, which prints; a layer that computes something no kernel of ours does is left as it was, and named
    there with the reason.  Patching again finds what has been added since.  Adapters on parameters of experts (PEFT's
    target_parameters) go on after patch.  TypeError where model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, not {type(model).__name__}")
    done = Patched(type(model).__name__)
    tried: dict[Any, tuple[Any, str]] = {}
    for name, module in model.named_modules():
        layer = next((each for each in LAYERS if each.fits(module)), None)
        if layer is None:
            continue
        forward, why = forward_for(module, layer, tried)
        if forward is None:
            done.left[name] = why
        else:
            _put(module, forward)
            done.layers[name] = f"{layer.name}: {forward.__name__}"
    for name, part in _whole_models(model):
        done.attention[name] = _attend(part, tried)
    return done


def unpatch(model: torch.nn.Module) -> None:
    """Take back all that patch did to model: it computes what it did before, to the bit.

    A model that was not patched stays as it is.  TypeError where model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, not {type(model).__name__}")
    for module in model.modules():
        for name in ("forward", "_old_forward"):
            if _is_ours(vars(module).get(name)):
                del vars(module)[name]
                if name == "_old_forward":  # a hook of accelerate's calls it
                    vars(module)[name] = MethodType(type(module).forward, module)
        before = vars(module).pop(BEFORE, None)
        if before is not None:
            whole: Any = module
            whole.set_attn_implementation(before)


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ in FORWARDS


def _put(module: torch.nn.Module, forward: Any) -> None:
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    vars(module)[name] = MethodType(forward, module)


def forward_for(module: torch.nn.Module, layer: Layer, tried: dict) -> tuple[Any, str]:
    """Which of layer's forwards may stand for module's own, or why none may."""
    current: Any = _own(module)
    if _is_ours(current):
        return current.__func__, ""
    if current is not None and getattr(current, "__func__", None) is not type(module).forward:
        return None, "its forward was replaced before"
    key = (layer.name, type(module), _settings(module))
    if key not in tried:
        probe = layer.probe(module)
        found = [(*trial(module, each, probe, layer.told), each) for each in layer.forwards]
        _, why, best = min(found, key=lambda each: each[0])
        tried[key] = (None, f"{type(module).__name__}: {why}") if why else (best, "")
    return tried[key]


def _settings(module: torch.nn.Module) -> Any:
    """What can tell two modules of a class apart, but not the number of their layer."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and name != "layer_idx"
    }
    shapes = ((name, p.shape) for name, p in module._parameters.items() if p is not None)
    children = (
        (name, type(child), _settings(child))
        for name, child in module._modules.items()
        if child is not None
    )
    config = id(vars(module).get("config"))
    return frozenset(plain.items()), tuple(shapes), tuple(children), config


def _whole_models(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """transformers' models in model, none inside another."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return []
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(
            name.startswith(f"{outer}." if outer else "") for outer, _ in found
        ):
            found.append((name, module))
    return found


def _attend(model: Any, tried: dict) -> str:
    """Select our attention for one of transformers' models; what it runs on now."""
    from tilewright.interop.transformers import NAME, register_attention

    current = model.config._attn_implementation
    layers = [m for m in model.modules() if _attends(m)]
    if current == NAME or not layers:
        return str(current)
    register_attention()
    for layer in layers:
        why = "" if _is_ours(_own(layer)) else _own_forward(layer, tried)
        if why:
            return f"{current}, as {type(layer).__name__} with our kernels: {why}"
    _own_configuration(model)
    before = {"": current}
    for name in model.config.sub_configs:
        part = getattr(model.config, name, None)
        if part is not None:
            before[name] = part._attn_implementation
    model.set_attn_implementation(NAME)
    vars(model)[BEFORE] = before
    return str(model.config._attn_implementation)


def _own(module: torch.nn.Module) -> Any:
    """A forward of this instance's, within a hook of accelerate's."""
    return vars(module).get("_old_forward", vars(module).get("forward"))


def _own_forward(layer: torch.nn.Module, tried: dict) -> str:
    """Why layer's own forward may not attend by our kernels; "" where it may."""
    key = ("own", type(layer), _settings(layer))
    if key not in tried:
        if not hasattr(layer, "head_dim"):
            return "its heads are not known"
        probes = [attention_probe(layer, twice) for twice in (True, False)]
        tried[key] = min(
            trial(layer, own_attention, probe, lambda outputs: outputs[0]) for probe in probes
        )
    return tried[key][1]


def _attends(module: torch.nn.Module) -> bool:
    """A layer that attends, not one that holds such a layer."""
    return type(module).__name__.endswith("Attention") and not any(
        type(child).__name__.endswith("Attention") for child in module.children()
    )


def _own_configuration(model: torch.nn.Module) -> None:
    """Give model a configuration that no other model shares: the name of its attention is kept there."""
    memo: dict[int, Any] = {}
    copy.deepcopy(model.config, memo)
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in memo:
            module.config = memo[id(config)]
