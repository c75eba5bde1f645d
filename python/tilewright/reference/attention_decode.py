"""The specification of attention_decode, in eager PyTorch: attention on what the caches hold.

B batch, H query heads, G kv heads, S queries, T keys that a cache has room for, D head dim.
"""

import torch
from torch import Tensor

from tilewright.reference.attention import attention_with_lse
from tilewright.reference.rope import rope


def gathered(
    cache: Tensor, begin: Tensor, lengths: Tensor, block_table: Tensor | None, scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[B, G, T, D]: the keys or values begin to lengths of each batch in their order, else 0."""
    if block_table is not None:
        page = cache.size(2)
        first = torch.arange(block_table.size(1), device=cache.device) * page
        used = (first + page > begin[:, None]) & (first < lengths[:, None])
        pages = torch.where(used, block_table, 0).clamp(0, max(cache.size(0) - 1, 0))
        if cache.size(0) == 0:
            pages = pages[:, :0]
        cache = cache[pages.long()].transpose(1, 2).flatten(2, 3)
    place = torch.arange(cache.size(2), device=cache.device)
    held = (place >= begin[:, None]) & (place < lengths[:, None])
    cache = torch.where(held[:, None, :, None], cache.to(dtype), 0.0)
    return cache if scale is None else cache * scale.to(dtype)[:, None, None]


def attention_decode_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D], caches [B, G, T, D] or pages [P, G, page, D] -> [B, H, S, D], [B, H, S]."""
    lengths = cache_seqlens.long()
    S, left = q.size(2), -1 if window is None else window[0]
    here = (lengths[:, None] - S) + torch.arange(S, device=q.device)
    begin = torch.zeros_like(here) if left < 0 else (here - min(left, 1 << 40)).clamp(min=0)
    seen = (begin[:, 0] if S else lengths, lengths, block_table)
    k, v = (gathered(x, *seen, s, q.dtype) for x, s in ((k_cache, k_scale), (v_cache, v_scale)))
    return attention_with_lse(
        q, k, v, ranges=(begin, here + 1), softcap=softcap, sinks=sinks, scale=scale
    )


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """attention_decode_with_lse's first result."""
    return attention_decode_with_lse(
        q, k_cache, v_cache, cache_seqlens, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
        window=window, softcap=softcap, sinks=sinks, scale=scale,
    )[0]  # fmt: skip


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """New keys or values [B, G, S, D] as a cache holds them."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        x = x / scale[:, None, None]
    if dtype == torch.int8:
        x = x.round().clamp(-128, 127)
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)
    return x.to(dtype)


def attention_decode_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """k, v [B, G, S, D], turned where there are tables, into the caches; then attention_decode."""
    S, page = q.size(2), k_cache.size(2)
    at = cache_seqlens.long()[:, None] + torch.arange(S, device=q.device)
    if cos is not None and sin is not None:
        q, k = (rope(x, cos, sin, interleaved=interleaved, position_ids=at) for x in (q, k))
    where = torch.arange(q.size(0), device=q.device)[:, None]
    if block_table is not None:
        where, at = block_table.long().gather(1, at // page), at % page
    for cache, new, factor in ((k_cache, k, k_scale), (v_cache, v, v_scale)):
        new = stored(new, cache.dtype, factor).transpose(1, 2)
        if cache.dtype == torch.float8_e4m3fn:  # which index_put does not know
            cache, new = cache.view(torch.uint8), new.view(torch.uint8)
        cache[where, :, at] = new
    return attention_decode(
        q, k_cache, v_cache, cache_seqlens + S, block_table=block_table, k_scale=k_scale,
        v_scale=v_scale, window=window, softcap=softcap, sinks=sinks, scale=scale,
    )  # fmt: skip
