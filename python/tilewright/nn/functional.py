"""Functions of torch.nn.functional, under its names and with its arguments, on our ops.

What no kernel of ours does goes to torch's own.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright import ops

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
    and else G.  is_causal lets query i see keys up to i, from the first on, as torch has it (ops.attention's
    causal counts from the last).  Any gradient; arguments and errors are torch's, whose own attention takes
    what no kernel of ours does: a mask, dropout, float64, head dims above 256, values of another width
    than keys, batches that broadcast.
    """
    if attn_mask is not None or dropout_p != 0.0 or not _ours(query, key, value, enable_gqa):
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
    out = ops.attention(q, k, v, causal=is_causal and S == T, ranges=ranges, scale=scale)
    return out.reshape(query.shape)


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
