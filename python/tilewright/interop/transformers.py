"""attn_implementation="tilewright", experts_implementation="tilewright" and quantization_config=TilewrightConfig(...)
for the models of transformers.

transformers asks an attention implementation for two functions: one makes the mask, once a forward, the
other attends, once a layer.  Ours makes ranges of keys of any mask whose rows each see neighbours: causal,
window, chunk, padding left or right, packed documents.  Other masks (padding between keys) and position
biases are added to the scores.  Quantisation is told in transformers_quantizer, all at once in patch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.interop._layers import experts
from tilewright.masks import additive, hull

if TYPE_CHECKING:
    from tilewright.interop.transformers_quantizer import TilewrightConfig, load_quantized

__all__ = [
    "NAME", "TilewrightConfig", "attention_forward", "attention_mask", "experts_forward", "load_quantized",
    "register_attention", "register_experts", "register_quantizer",
]  # fmt: skip
NAME = "tilewright"
# by the name of an activation's class
ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}  # fmt: skip
PART = 1 << 22  # elements of a mask that are looked at together


def register_attention() -> str:
    """Make attn_implementation="tilewright" known to transformers; returns that name.

    ImportError where transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def register_experts() -> str:
    """Make experts_implementation="tilewright" known to transformers; returns that name.

    ImportError where transformers is not installed, or has no interface of experts.
    """
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, experts_forward)
    return NAME


def register_quantizer() -> str:
    """Make folders that a quantised model was saved to known to transformers; returns their quant_method.

    An import of TilewrightConfig does the same.  ImportError where transformers is not installed, or too old.
    """
    import_module("tilewright.interop.transformers_quantizer")
    return NAME


def __getattr__(name: str) -> Any:
    # the attention above is there without transformers' quantisers
    if name in ("TilewrightConfig", "load_quantized"):
        return getattr(import_module("tilewright.interop.transformers_quantizer"), name)
    raise AttributeError(f"module 'tilewright.interop.transformers' has no attribute {name!r}")


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What each layer gets as its mask: None (every key is seen), ranges as int32 [B, 1, S, 2], or a bool
    mask [B, 1, S, T] where ranges cannot say it.

    Arguments are those of transformers.masking_utils.sdpa_mask.  Whether ranges are enough is asked of the
    device; where it cannot be asked, as under torch.compile, masks stay bool.
    """
    from transformers.masking_utils import sdpa_mask
    from transformers.utils.import_utils import is_tracing

    mask = sdpa_mask(*args, **kwargs)
    if mask is None:
        # left out because a layer knows that it is causal: not every layer that is told so does
        at = kwargs.get("cache_position")  # which the first 5.x give
        S, device = (kwargs["q_length"], kwargs["device"]) if at is None else (len(at), at.device)
        return _causal(device, S) if kwargs.get("allow_is_causal_skip", True) and S > 1 else None
    if is_tracing(mask) or mask.size(1) != 1:
        return mask
    rows = max(1, PART // max(1, mask.size(0) * mask.size(-1)))
    parts = [hull(part) for part in mask.split(rows, 2)]
    if not all(bool(whole.all()) for _, _, whole in parts):
        return mask
    bounds = [torch.stack((begin, end), -1) for begin, end, _ in parts]
    return torch.cat(bounds, 2).to(torch.int32)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """A layer's attention: query [B, H, S, D], key, value [B, G, T, D] -> [B, S, H, D], and None, as no
    probabilities are kept.

    A window is in the mask already.  softcap, s_aux (a sink a head) and dropout are ops.attention's;
    position_bias, that broadcasts to [B, H, S, T], and masks that are no ranges are its bias.  ValueError on a
    mask of ours that the model has changed, and where the layer picks keys of its own.
    """
    name = type(module).__name__
    picked = [k for k in ("indices", "block_indices") if kwargs.get(k) is not None]
    if picked:
        raise ValueError(
            f"tilewright: {name} picks keys by {picked[0]}, which no kernel of ours reads"
        )
    given = None
    if attention_mask is not None and _are_ranges(attention_mask):
        given, attention_mask = attention_mask, None
    if attention_mask is not None and not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        raise ValueError(
            f"tilewright: {name} gives a mask {tuple(attention_mask.shape)} of {attention_mask.dtype}:"
            " the model has changed the ranges that stand for its masks"
        )
    S = query.size(2)
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal) and S > 1
    if given is None and attention_mask is None and causal:
        given = _causal(query.device, S)
    bias = position_bias
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
        bias = attention_mask if bias is None else bias + attention_mask
    begin, end = (None, None) if given is None else given[:, 0].unbind(-1)
    ranges = None if begin is None or end is None else (begin, end)
    out = ops.attention(
        query, key, value, ranges=ranges, bias=bias, softcap=softcap, sinks=s_aux, scale=scaling,
        dropout_p=dropout,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def experts_forward(
    module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """A mixture's experts: hidden_states [T, D], top_k_index and top_k_weights [T, k] -> [T, D].

    module's are gate_up_proj [E, 2 I, D] and down_proj [E, D, I], with biases or without.  An index of E or more is
    of experts on other devices, and adds nothing.  ValueError where experts are laid out otherwise (transposed,
    interleaved, without gates) or gated by something else than silu or gelu.
    """
    name, gate = type(module).__name__, getattr(type(module), "_apply_gate", None)
    act = type(getattr(module, "act_fn", None)).__name__
    faults = {
        "are transposed": getattr(module, "is_transposed", False),
        "are interleaved": not getattr(module, "is_concatenated", True),
        "have no gates": not getattr(module, "has_gate", True),
        "gate in a way of their own": gate is not None and gate.__name__ != "_default_apply_gate",
        f"use {act}": act not in ACTIVATIONS,
    }
    for fault, found in faults.items():
        if found:
            raise ValueError(f"tilewright: experts of {name} {fault}, which no kernel of ours does")
    return experts(module, hidden_states, top_k_index, top_k_weights, ACTIVATIONS[act])


def _causal(device: torch.device | str, S: int) -> Tensor:
    """Ranges [1, 1, S, 2]: query i sees keys up to i, as torch's is_causal has it."""
    end = torch.arange(1, S + 1, dtype=torch.int32, device=device)
    return torch.stack((torch.zeros_like(end), end), -1)[None, None]


def _are_ranges(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.size(3) == 2
