"""Mixtures' experts of transformers' models as nn.Experts, which quantize_ and TilewrightConfig can quantise."""

from collections.abc import Callable
from typing import Any

import torch

from tilewright import nn
from tilewright.interop._layers import ACTIVATION_OF, LAYERS
from tilewright.interop.patch import forward_for

BIASES = ("gate_up_proj_bias", "down_proj_bias")


def own_experts(
    model: torch.nn.Module, which: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """Put nn.Experts in the places of model's experts, on the same parameters under the same names.

    which: of a module's name, whether it is meant.  Only experts that a trial shows to compute the same are replaced:
    returns name of a module -> why it was left, for the others.  unpatch does not take this back.
    """
    (layer,) = (each for each in LAYERS if each.name == "experts")
    left, made = {}, {}
    tried: dict[Any, tuple[Any, str]] = {}
    for name, module in model.named_modules():
        if not layer.fits(module) or isinstance(module, nn.Experts) or not which(name):
            continue
        forward, why = forward_for(module, layer, tried)
        if forward is None:
            left[name] = why
        else:
            made[name] = _experts(module, ACTIVATION_OF[forward])
    for name, experts in made.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, experts)
    return left


def _experts(module: Any, activation: str) -> nn.Experts:
    E, D, I = module.down_proj.shape
    made = nn.Experts(E, D, I, activation=activation, device="meta")
    made.gate_up_proj, made.down_proj = module.gate_up_proj, module.down_proj
    for name in BIASES:
        setattr(made, name, getattr(module, name, None))
    return made.train(module.training)
