"""attention_varlen: packed causal documents of unlike lengths, against a call a document and a mask.

N documents of S queries on average (S / N, 3 S / N, 5 S / N, ... of them), H query heads, G kv heads,
D head dim.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops

OP = "attention_varlen"
ROUTE = "attention"  # whose kernels serve it
TENSOR_CORES = True
SHAPES: dict[str, dict] = {
    "8 documents of 128": {"N": 8, "H": 9, "G": 3, "S": 128, "D": 64},
    "4 documents of 512": {"N": 4, "H": 9, "G": 3, "S": 512, "D": 64},
}
DTYPES = [torch.float32, torch.bfloat16]


def starts_of(N: int, S: int) -> list[int]:
    """[N + 1]: where documents begin and end, N S tokens in all."""
    return [S * n * n // N for n in range(N + 1)]


def inputs(dtype: torch.dtype, device: str, *, N: int, H: int, G: int, S: int, D: int) -> dict:
    # as projections give them, all heads of a token a row: of the hundreds of rows that see two keys, some
    # head's gradient always cancels, and what is left of it is luck, eager's too
    q, k, v = (
        torch.randn(N * S, heads * D, device=device, dtype=dtype, requires_grad=True)
        for heads in (H, G, G)
    )
    starts = starts_of(N, S)
    packed = torch.tensor(starts, device=device, dtype=torch.int32)
    return {"q": q, "k": k, "v": v, "cu_seqlens": packed, "starts": starts, "D": D}


def _by_head(attend: Callable) -> Callable:
    """A provider of attend, which takes q [T, H, D] and k, v [T, G, D]."""

    def provider(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, starts: list[int], D: int
    ) -> tuple[Tensor]:
        q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
        return (attend(q, k, v, cu_seqlens, starts).flatten(1),)

    return provider


def _ours(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, starts: list[int]) -> Tensor:
    return ops.attention_varlen(q, k, v, cu_seqlens, causal=True)


def _dense(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return out.squeeze(0).transpose(0, 1)


def _calls(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, starts: list[int]) -> Tensor:
    """A call a document: the lengths must be on the host."""
    parts = [_dense(q[a:b], k[a:b], v[a:b], is_causal=True) for a, b in itertools.pairwise(starts)]
    return torch.cat(parts)


def _mask(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, starts: list[int]) -> Tensor:
    """One call on a mask of all tokens by all."""
    token = torch.arange(q.shape[0], device=q.device)
    document = torch.searchsorted(cu_seqlens, token, right=True)
    seen = (document[:, None] == document) & (token[:, None] >= token)
    return _dense(q, k, v, attn_mask=seen)


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, starts: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(b - a for a, b in itertools.pairwise(starts))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
    return out[0] if isinstance(out, tuple) else out


PROVIDERS: dict[str, Callable] = {
    "tilewright": _by_head(_ours),
    "eager": _by_head(_calls),
    "compile": torch.compile(_by_head(_calls)),
    "mask": _by_head(_mask),
}
if torch.cuda.is_available():
    PROVIDERS["varlen_attn"] = _by_head(_varlen_attn)


def _pairs(N: int, S: int) -> int:
    """Queries and keys that meet."""
    lengths = [b - a for a, b in itertools.pairwise(starts_of(N, S))]
    return sum(n * (n + 1) // 2 for n in lengths)


def cost(dtype: torch.dtype, *, N: int, H: int, G: int, S: int, D: int) -> tuple[int, int]:
    """Least bytes moved, and FLOPs of what the documents' causal masks leave."""
    return (2 * N * S * H * D + 2 * N * S * G * D) * dtype.itemsize, 4 * H * _pairs(N, S) * D


def backward_cost(dtype: torch.dtype, *, N: int, H: int, G: int, S: int, D: int) -> tuple[int, int]:
    """q, k, v, dout read, dq, dk, dv written; five products of what the masks leave."""
    return (3 * N * S * H * D + 4 * N * S * G * D) * dtype.itemsize, 10 * H * _pairs(N, S) * D
