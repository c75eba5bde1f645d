"""Common attention masks, as ranges of keys for ops.attention's `ranges`, or as its `blocks` or `bias`.

Ranges are (begin, end), integers that broadcast to [B, S]: query i of batch b sees keys begin[b, i] to
end[b, i] - 1, or none where end <= begin; they cost no memory and skip what no one sees.  `additive` and
`alibi` make a bias.  B batch, H heads, S queries, T keys.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def padding(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Keys that are no padding, which lies left or right of them: attention_mask [B, T], nonzero where a
    key is real -> [B, 1] each.

    ValueError on other shapes, and on the CPU where a row has padding between its keys (on a GPU the
    queries see that padding too).
    """
    if attention_mask.dim() != 2:
        raise ValueError(f"padding: attention_mask {tuple(attention_mask.shape)} is not [B, T]")
    return from_mask((attention_mask != 0).unsqueeze(1))


def prefix(lengths: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """A prefix that all see, then causal: lengths [B] -> [B, S] each, of S queries at S keys."""
    seen = torch.arange(1, S + 1, device=lengths.device)
    end = torch.maximum(seen, lengths[:, None])
    return torch.zeros_like(end), end


def documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each document to itself: ids [B, S] or [S], equal through a document and no other beside it ->
    [B, S] or [S] each.  With causal=True a document's own causal mask."""
    S = ids.size(-1)
    here = torch.arange(S, device=ids.device).expand(ids.shape)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[..., 1:] = ids[..., 1:] != ids[..., :-1]
    begin = torch.where(starts, here, 0).cummax(-1).values
    stops = torch.ones_like(starts)
    stops[..., :-1] = starts[..., 1:]
    end = torch.where(stops, here + 1, S).flip(-1).cummin(-1).values.flip(-1)
    return begin, end


def from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of a mask [B, S, T] or [S, T], true where query i sees key j -> [B, S] or [S] each.

    ValueError on other shapes and dtypes, and on the CPU where a query's keys are not neighbours (on a
    GPU it sees those between them too).
    """
    if mask.dtype != torch.bool or mask.dim() not in (2, 3):
        raise ValueError(f"from_mask: mask {tuple(mask.shape)} {mask.dtype} is no bool [S, T]")
    begin, end, whole = hull(mask)
    if mask.is_cpu and not torch.compiler.is_compiling() and not bool(whole.all()):
        raise ValueError(
            f"from_mask: {int((~whole).sum())} queries of mask {tuple(mask.shape)} see keys with others"
            " between them"
        )
    return begin, end


def blocks(mask: Tensor, size: int = 128) -> tuple[Tensor, int]:
    """Blocks for ops.attention's `blocks`, of a bool mask [B or 1, H or 1, S, T], true where query i sees
    key j: those of size x size of which anything is seen.

    Where one is seen in part, ops.attention needs what says the rest too: ranges, a window, a bias.
    ValueError on other shapes and dtypes, and sizes below 1.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or size < 1:
        raise ValueError(
            f"blocks: mask {tuple(mask.shape)} {mask.dtype} is no bool [B, H, S, T], or size {size} < 1"
        )
    S, T = mask.shape[2:]
    padded = torch.nn.functional.pad(mask, (0, -T % size, 0, -S % size))
    return padded.unflatten(3, (-1, size)).any(-1).unflatten(2, (-1, size)).any(3), size


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bias [..., S, T] of dtype: 0 where the bool mask is true, a key seen, and -inf where it is not.

    For masks that leave holes, which ranges cannot say; one by batch is [B, 1, S, T].  ValueError on another
    dtype of mask.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"additive: mask {tuple(mask.shape)} {mask.dtype} is no bool")
    # what is broadcast stays so
    once = mask[tuple(slice(1) if step == 0 else slice(None) for step in mask.stride())]
    bias = torch.zeros(once.shape, dtype=dtype, device=mask.device).masked_fill(~once, -torch.inf)
    return bias.expand(mask.shape)


def alibi(H: int, T: int, *, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's bias [H, 1, T] of float32: slope times a key's place, counted from the last key.

    That is slope (j - p) of key j and query p but for a number that a query's keys share: it changes no
    probability, and lse by that number.  It changes the share of a sink, which it does not reach, and costs
    a query bits of float32, the more the farther it is before the last key.  Slopes are the paper's, and between two powers of two heads those of its code.  ValueError where H or T are below 1 or
    0.  Press et al. 2022, arXiv:2108.12409.
    """
    if H < 1 or T < 0:
        raise ValueError(f"alibi: {H} heads and {T} keys are none")
    whole = 2 ** math.floor(math.log2(H))
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    slopes += [2 ** (-4 * i / whole) for i in range(1, 2 * (H - whole), 2)]
    places = torch.arange(1 - T, 1, dtype=torch.float32, device=device)
    return torch.tensor(slopes, dtype=torch.float32, device=device)[:, None, None] * places


def hull(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a bool mask [..., T]: the least range that holds its keys, begin and end, and whether it holds no
    others."""
    T = mask.size(-1)
    if T == 0:
        nothing = torch.zeros(mask.shape[:-1], dtype=torch.int64, device=mask.device)
        return nothing, nothing, nothing == 0
    keys = torch.arange(T, device=mask.device)
    begin = torch.where(mask, keys, T).amin(-1)
    end = torch.where(mask, keys + 1, 0).amax(-1)
    return begin, end, (end - begin).clamp(min=0) == mask.sum(-1)


def broadcasts(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether `shape` broadcasts to `whole`, which has as many dimensions or more."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    # `in` of a tuple leaves torch.compile no guard, and a symbolic size no number's equal
    return all(a == 1 or a == b for a, b in pairs)
