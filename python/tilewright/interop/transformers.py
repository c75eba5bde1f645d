"""attn_implementation="tilewright" for the models of transformers.

transformers asks an attention implementation for two functions: one makes the mask, once a forward, the
other attends, once a layer.  Ours makes ranges of keys of any mask whose rows each see neighbours: causal,
window, chunk, padding left or right, packed documents.  What the kernels do not do (padding between keys,
a bias, dropout) goes to torch's attention, or where a layer has a softcap or sinks to the model's own.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.masks import hull

NAME = "tilewright"
PART = 1 << 22  # elements of a mask that are looked at together


def register_attention() -> str:
    """Make attn_implementation="tilewright" known to transformers; returns that name.

    ImportError where transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """What each layer gets as its mask: None (causal where the layer is), ranges as int32 [B, 1, S, 2], or
    a bool mask [B, 1, S, T] where ranges cannot say it.

    Arguments are those of transformers.masking_utils.sdpa_mask.  Whether ranges are enough is asked of the
    device once a mask; torch.compile, which cannot ask, gets the bool mask.
    """
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(*args, **kwargs)
    if mask is None or torch.compiler.is_compiling() or mask.size(1) != 1:
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
    """A layer's attention: query [B, H, S, D], key, value [B, G, T, D] -> [B, S, H, D], and None.

    A window is in the mask already.  softcap and s_aux (a sink a head) are ops.attention's.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    given = None if attention_mask is None or not _are_ranges(attention_mask) else attention_mask
    beyond = attention_mask is not None and given is None
    if beyond or dropout or position_bias is not None or kwargs.get("output_attentions"):
        if given is not None:
            attention_mask = _as_mask(given, key.size(2))
        elif attention_mask is None and causal and query.size(2) > 1:
            attention_mask = _causal(query, key)
        other = _torch_attention if softcap is None and s_aux is None else _own_attention(module)
        return other(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=False, softcap=softcap, s_aux=s_aux, position_bias=position_bias, **kwargs,
        )  # fmt: skip
    S, T, D, Dv = query.size(2), key.size(2), query.size(3), value.size(3)
    ranges = None
    if given is not None:
        begin, end = given[:, 0].unbind(-1)
        ranges = (begin, end)
    elif causal and 1 < S < T:  # a static cache still empty: what is past the queries is no key yet
        key, value = key[:, :, :S], value[:, :, :S]
    out = ops.attention(
        *(_padded(x, max(D, Dv)) for x in (query, key, value)),
        causal=causal and S > 1 and given is None, ranges=ranges, softcap=softcap, sinks=s_aux,
        scale=D**-0.5 if scaling is None else scaling,
    )  # fmt: skip
    return out[..., :Dv].transpose(1, 2).contiguous(), None


def _are_ranges(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.size(3) == 2


def _padded(x: Tensor, D: int) -> Tensor:
    return x if x.size(3) == D else torch.nn.functional.pad(x, (0, D - x.size(3)))


def _as_mask(ranges: Tensor, T: int) -> Tensor:
    """Ranges [B, 1, S, 2] as a bool mask [B, 1, S, T]."""
    begin, end = ranges.unsqueeze(-2).unbind(-1)
    keys = torch.arange(T, device=ranges.device)
    return (keys >= begin) & (keys < end)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """The bool mask [1, 1, S, T] that None stands for: query i sees keys up to i."""
    S, T = query.size(2), key.size(2)
    return torch.ones(1, 1, S, T, dtype=torch.bool, device=query.device).tril()


def _torch_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def _own_attention(module: torch.nn.Module) -> Callable:
    """The eager attention of the module's own model, which takes masks that are added to the scores."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"tilewright: {type(module).__name__} asks for attention that no kernel of ours gives"
            " (a mask with holes, a bias or dropout beside a softcap or sinks), and has no own"
        )

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if mask is not None and mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = torch.where(mask, 0.0, lowest).to(query.dtype)
        return eager(module, query, key, value, mask, **kwargs)

    return attend
