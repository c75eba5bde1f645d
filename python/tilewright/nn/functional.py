"""Functions of torch.nn.functional, under its names and with its arguments, on our ops.

What no kernel of ours does goes to torch's own.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright import masks, ops

MOST_HEAD_DIM = 256  # of the kernels; torch's own is faster than our reference
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention on ops.attention.

    query [..., H, S, D], key, value [..., G, T, D] -> [..., H, S, D], H a multiple of G under enable_gqa
    and else G.  attn_mask broadcasts to [..., H, S, T]: bool, true where a key is seen, or floats that are
    added to the scores, and hide a key below -2.36e38; a query that sees no key gives 0.  is_causal lets
    query i see keys up to i, from the first on, as torch has it (ops.attention's causal counts from the
    last).  First derivatives, attn_mask's too; arguments and errors are torch's, whose own attention takes
    what no kernel of ours does: float64, head dims above 256, values of another width than keys, batches
    that broadcast.  Dropout draws otherwise than torch's.
    """
    if (
        not _ours(query, key, value, enable_gqa)
        or not _is_mask(attn_mask, query, key, is_causal)
        or not 0.0 <= dropout_p <= 1.0
    ):
        # of no heads torch's fused CUDA kernels make None
        empty = query.dim() >= 3 and query.size(-3) == 0
        with sdpa_kernel(SDPBackend.MATH) if empty else nullcontext():
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
    S, T = query.size(-2), key.size(-2)
    q, k, v = (x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4) for x in (query, key, value))
    ranges = None
    if is_causal and S != T:
        seen = torch.arange(1, S + 1, device=query.device)
        ranges = (torch.zeros_like(seen), seen)
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = masks.additive(bias, query.dtype)
    out = ops.attention(
        q, k, v, causal=is_causal and S == T, ranges=ranges, bias=bias, scale=scale, dropout_p=dropout_p
    )  # fmt: skip
    return out.reshape(query.shape)


def _is_mask(mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Whether mask is none, or one that torch takes and that broadcasts over heads of one batch dimension."""
    if mask is None:
        return True
    shape = (*query.shape[:-1], key.size(-2))
    most = len(shape) if len(shape) <= 4 else 3
    return (
        not is_causal
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
        and mask.device == query.device
        and 2 <= mask.dim() <= most
        and masks.broadcasts(mask.shape, shape)
    )


def _ours(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether kernels of ours serve tensors that F.scaled_dot_product_attention takes."""
    if query.is_nested or key.is_nested or value.is_nested or query.dim() < 3:
        return False
    heads, kv_heads = query.size(-3), key.size(-3) if key.dim() >= 3 else 0
    return (
        key.shape == value.shape
        and query.dim() == key.dim()
        and query.shape[:-3] == key.shape[:-3]
        and kv_heads > 0
        and (heads == kv_heads or (enable_gqa and heads % kv_heads == 0))
        and 0 < query.size(-1) == key.size(-1) <= MOST_HEAD_DIM
        and query.dtype == key.dtype == value.dtype
        and query.dtype in FLOATS
        and query.device == key.device == value.device
        and (query.is_cpu or query.is_cuda)
    )
