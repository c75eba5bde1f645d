"""attention_decode: validate, tilewright::attention_decode_fwd, attention where queries are many; and
attention_decode_append_: tilewright::attention_append_ before it.

B batch, H query heads, G kv heads, S queries, T keys that a cache has room for, D head dim.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tilewright import _op
from tilewright.ops.attention import MAX_D, attend, checked_window

ONE_BYTE = (torch.int8, torch.float8_e4m3fn)
MOST_ROWS = 64  # queries a kv head that the split over keys serves; more fill attention's own tiles


def _fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, sinks: Tensor | None,
    added: int, left: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _heads_last(q: Tensor) -> Tensor:
    B, H, S, D = q.shape
    return q.new_empty(B, S, H, D).transpose(1, 2)


def _append_fake(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    return q.new_empty(0) if cos is None else _heads_last(q)


_fwd = _op.register(
    "attention_decode",
    "attention_decode_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? k_scale, Tensor? v_scale, Tensor? sinks,"
    " int added, int left, float softcap, float scale) -> (Tensor, Tensor)",
    _fake,
)
# -> q turned, or nothing where there are no tables
_append = _op.register(
    "attention_decode",
    "attention_append_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor cache_seqlens, Tensor? block_table, Tensor? cos, Tensor? sin, bool interleaved,"
    " Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _append_fake,
)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"attention_decode: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache"
            f" {tuple(v_cache.shape)} are not [B, H, S, D] and two of [B, G, T, D] or [P, G, page, D]"
        )
    B, H, _, D = q.shape
    G = k_cache.size(1)
    if (
        k_cache.size(3) != D
        or D == 0
        or G == 0
        or H % G
        or (block_table is None and k_cache.size(0) != B)
    ):
        raise ValueError(
            f"attention_decode: k_cache {tuple(k_cache.shape)} does not fit q {tuple(q.shape)}"
        )
    device = q.device
    if (
        not q.is_floating_point()
        or k_cache.dtype != v_cache.dtype
        or (k_cache.dtype != q.dtype and k_cache.dtype not in ONE_BYTE)
        or k_cache.device != device
        or v_cache.device != device
    ):
        raise ValueError(
            f"attention_decode: k_cache {k_cache.dtype} on {k_cache.device}, v_cache {v_cache.dtype} on"
            f" {v_cache.device} are not both of q's {q.dtype}, or int8 or float8_e4m3fn, on {device}"
        )
    whole = (torch.int32, torch.int64)
    if (
        cache_seqlens.shape != (B,)
        or cache_seqlens.dtype not in whole
        or cache_seqlens.device != device
    ):
        raise ValueError(
            f"attention_decode: cache_seqlens {tuple(cache_seqlens.shape)} {cache_seqlens.dtype} on"
            f" {cache_seqlens.device} is not int32 or int64 [{B}] on {device}"
        )
    if block_table is not None and (
        block_table.dim() != 2
        or block_table.size(0) != B
        or block_table.dtype not in whole
        or block_table.device != device
    ):
        raise ValueError(
            f"attention_decode: block_table {tuple(block_table.shape)} {block_table.dtype} on"
            f" {block_table.device} is not int32 or int64 [{B}, pages] on {device}"
        )
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None and (x.shape != (G,) or not x.is_floating_point() or x.device != device):
            raise ValueError(
                f"attention_decode: {name} {tuple(x.shape)} {x.dtype} on {x.device} is not a float a kv"
                f" head of k_cache {tuple(k_cache.shape)} on {device}"
            )


def _under_autocast(x: Tensor, cache: Tensor) -> Tensor:
    """A query, or new key or value, of the dtype that a cache gives it: its own, or autocast's where that
    is one byte.  A cache is not cast: it would be copied."""
    low = _op.autocast_dtype(_op.device_type(x))
    if low is None:
        return x
    return _op.autocast(x, low if cache.dtype in ONE_BYTE else cache.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _check_values(
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_cache: Tensor,
    S: int,
    added: int,
    left: int,
) -> None:
    """Raises where a length, to which `added` keys come, or a page that is used lies outside of the cache;
    a GPU is not asked."""
    if not cache_seqlens.is_cpu or torch.compiler.is_compiling():
        return
    pages, page = k_cache.size(0), k_cache.size(2)
    room = page if block_table is None else page * block_table.size(1)
    for b, length in enumerate(cache_seqlens.tolist()):
        if not 0 <= length <= room - added:
            raise ValueError(
                f"attention_decode: cache_seqlens[{b}] is {length}, not 0 to {room - added}, what k_cache"
                f" {tuple(k_cache.shape)} has room for"
            )
        length += added
        if block_table is None or length == 0:
            continue
        first = (
            max(length - S - left, 0) if left >= 0 else 0
        )  # what lies before a window is not read
        read = block_table[b, first // page : -(-length // page)].tolist()
        if read and not 0 <= min(read) <= max(read) < pages:
            raise ValueError(
                f"attention_decode: block_table[{b}] has pages {min(read)} to {max(read)}, not those of"
                f" k_cache {tuple(k_cache.shape)}"
            )


def _gathered(
    cache: Tensor, block_table: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[B, G, T, D]: a cache whose pages are brought together, in q's dtype."""
    if block_table is not None:
        pages = block_table.clamp(0, max(cache.size(0) - 1, 0)).long()
        cache = cache[pages].transpose(1, 2).flatten(2, 3)
    if scale is not None:
        return (cache.to(torch.float32) * scale[:, None, None]).to(dtype)
    return cache.to(dtype)


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
    """attention_decode, and the natural logarithm of the softmax's denominator, the sink included.

    -> out [B, H, S, D] of q's dtype, lse [B, H, S] of float32 (float64 of float64 inputs).  Arguments
    and errors are attention_decode's.
    """
    q = _under_autocast(q, k_cache)
    _check(q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale)
    left, _ = checked_window("attention_decode", q, True, window, softcap, sinks)
    _check_values(cache_seqlens, block_table, k_cache, q.size(2), 0, left)
    floats = [x for x in (q, k_cache, v_cache, k_scale, v_scale, sinks) if x is not None]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in floats)
    if trains or q.size(3) > MAX_D or not _op.serves("attention_decode", q):
        with _without_autocast(q):
            return _op.twin("attention_decode_with_lse")(
                q, k_cache, v_cache, cache_seqlens, block_table=block_table, k_scale=k_scale,
                v_scale=v_scale, window=(left, 0), softcap=softcap, sinks=sinks, scale=scale,
            )  # fmt: skip
    return _decode(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        k_scale,
        v_scale,
        sinks,
        0,
        left,
        softcap,
        scale,
    )


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, sinks: Tensor | None,
    added: int, left: int, softcap: float | None, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator, or attention's where queries are many; all is checked."""
    S = q.size(2)
    scale = q.size(3) ** -0.5 if scale is None else scale
    if S * (q.size(1) // k_cache.size(1)) <= MOST_ROWS or k_cache.numel() == 0:
        return _fwd(
            q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale, sinks,
            added, left, 0.0 if softcap is None else softcap, scale,
        )  # fmt: skip
    k = _gathered(k_cache, block_table, k_scale, q.dtype)
    v = _gathered(v_cache, block_table, v_scale, q.dtype)
    T = k.size(2)
    here = (
        (cache_seqlens.long() + added).clamp(0, T)[:, None] - S + torch.arange(S, device=q.device)
    )
    begin = (here - min(left, S + T)).clamp(min=0) if left >= 0 else torch.zeros_like(here)
    if (
        left >= 0 and S
    ):  # what lies before the window may be nan, and attention's tiles start before it
        unseen = torch.arange(T, device=q.device) < begin[:, :1]
        v = v.masked_fill(unseen[:, None, :, None], 0.0)
    begin, end = (x.to(torch.int32) for x in (begin, here + 1))
    return attend(q, k, v, sinks, None, begin, end, -1, -1, softcap, scale)


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
    """Attention of a few new queries to a KV cache, split over its keys (flash decoding).

    q [B, H, S, D] -> [B, H, S, D], lying as [B, S, H, D].  k_cache, v_cache are [B, G, T, D], room for T
    keys; or pages [P, G, page, D] of any size, where block_table [B, n], int32 or int64, says which page
    holds keys page j to page (j + 1) - 1 of a batch.  Any strides: what vLLM and FlashAttention keep as
    [P, page, G, D] comes transposed.  H is a multiple of G.

    cache_seqlens [B], int32 or int64, counts the keys that a batch's cache holds, the S new ones, which are
    written before this is called, among them: query i stands at key cache_seqlens - S + i and sees the keys
    up to it, and from window[0] before it where a window (left, right) is given.  Nothing else is read: not
    what lies past the last key, nor pages before a window.  A query that sees nothing gives 0.

    The caches are of q's dtype; or int8 or float8_e4m3fn, whose numbers are k_scale [G] and v_scale [G]
    (1 without) times themselves.  softcap, sinks and scale are attention's.

    Lengths and tables stay on the device and nothing is planned by them, so a CUDA graph may replay it as
    they change.  On a GPU a length or page outside of the cache takes the nearest; on a CPU it is a
    ValueError, as shapes, dtypes and devices that do not fit are.  Gradients come from the reference.
    Under autocast q takes the caches' dtype; autocast's, where they hold one byte a number.
    Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    return attention_decode_with_lse(
        q, k_cache, v_cache, cache_seqlens, block_table=block_table, k_scale=k_scale, v_scale=v_scale,
        window=window, softcap=softcap, sinks=sinks, scale=scale,
    )[0]  # fmt: skip


def _check_new(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    cos: Tensor | None, sin: Tensor | None, others: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Raises unless k and v are new keys of the caches, and the tables turn them; q and caches are
    checked."""
    B, _, S, D = q.shape
    new = (B, k_cache.size(1), S, D)
    if not k.shape == v.shape == new or not k.dtype == v.dtype == q.dtype:
        raise ValueError(
            f"attention_decode: k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype} are not"
            f" {new} of q's {q.dtype}"
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"attention_decode: k on {k.device}, v on {v.device}, q on {q.device}")
    floats = (q, k, v, k_cache, v_cache, *others)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats):
        raise ValueError(
            "attention_decode: attention_decode_append_ has no gradient, and an input requires one:"
            " call it under torch.no_grad()"
        )
    if cos is None and sin is None:
        return
    if (
        cos is None
        or sin is None
        or cos.dim() != 2
        or cos.shape != sin.shape
        or cos.size(1) > D
        or (2 * cos.size(1) > D and cos.size(1) % 2)
        or cos.size(0) == 0
        or cos.dtype != sin.dtype
        or cos.dtype not in (torch.float32, q.dtype)
        or cos.device != q.device
        or sin.device != q.device
    ):
        told = [None if x is None else (tuple(x.shape), x.dtype, str(x.device)) for x in (cos, sin)]
        raise ValueError(
            f"attention_decode: cos {told[0]} and sin {told[1]} are not both [rows, R / 2 or R] of"
            f" float32 or q's {q.dtype} on {q.device}, R to {D}"
        )
    if cache_seqlens.is_cpu and not torch.compiler.is_compiling():
        longest = max(cache_seqlens.tolist(), default=0)
        if S and B and longest + S > cos.size(0):
            raise ValueError(
                f"attention_decode: cos {tuple(cos.shape)} has no row for position {longest + S - 1}"
            )


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
    """Append new keys and values to a KV cache, in place, and attend to it: a decoding step.

    q [B, H, S, D], k, v [B, G, S, D] -> [B, H, S, D].  Here cache_seqlens [B] counts the keys the caches
    hold before: the new ones take places cache_seqlens to cache_seqlens + S - 1 of k_cache and v_cache
    (divided by k_scale and v_scale and rounded where those are int8 or float8_e4m3fn, what is beyond
    them to the nearest), and the queries stand there.  cache_seqlens itself is not changed.

    With tables cos and sin [rows, R / 2 or R], ops.rope's, queries and keys are turned by the row of their
    place before.  All else, and errors, is attention_decode's.  On a GPU what a cache has no room for the
    kernels do not write; on a CPU nothing is before the ValueError.  No gradient: ValueError where one is wanted.
    """
    q, k, v = (_under_autocast(x, k_cache) for x in (q, k, v))
    _check(q, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale)
    left, _ = checked_window("attention_decode", q, True, window, softcap, sinks)
    S = q.size(2)
    _check_values(cache_seqlens, block_table, k_cache, S, S, left)
    _check_new(q, k, v, k_cache, v_cache, cache_seqlens, cos, sin, (k_scale, v_scale, sinks))
    if q.size(3) > MAX_D or not _op.serves("attention_decode", q):
        with _without_autocast(q):
            return _op.twin("attention_decode_append_")(
                q, k, v, k_cache, v_cache, cache_seqlens, cos=cos, sin=sin, interleaved=interleaved,
                block_table=block_table, k_scale=k_scale, v_scale=v_scale, window=(left, 0),
                softcap=softcap, sinks=sinks, scale=scale,
            )  # fmt: skip
    turned = _append(
        q,
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        cos,
        sin,
        interleaved,
        k_scale,
        v_scale,
    )
    if not torch.compiler.is_compiling():  # so that autograd notices a cache it had saved
        changed = [x for x in (k_cache, v_cache) if not x.is_inference()]
        torch.autograd.graph.increment_version(changed)
    return _decode(
        q if cos is None else turned, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale,
        sinks, S, left, softcap, scale,
    )[0]  # fmt: skip
