"""attention_decode: one new query a sequence against its KV cache, whole or in pages.

B batch, H query heads, G kv heads, T keys that the caches hold at most, D head dim, page keys a page (T:
the cache is whole).  Sequence b of B holds T (b + 1) / B keys.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops

OP = "attention_decode"
TENSOR_CORES = True
SHAPES: dict[str, dict] = {
    "4096 keys": {"B": 1, "H": 16, "G": 4, "T": 4096, "D": 128, "page": 4096},
    "4 sequences, pages of 16": {"B": 4, "H": 16, "G": 4, "T": 2048, "D": 128, "page": 16},
    "512 keys": {"B": 1, "H": 9, "G": 3, "T": 512, "D": 64, "page": 512},
}
DTYPES = [torch.float32, torch.bfloat16]


def lengths_of(B: int, T: int) -> list[int]:
    return [T * (b + 1) // B for b in range(B)]


def inputs(
    dtype: torch.dtype, device: str, *, B: int, H: int, G: int, T: int, D: int, page: int
) -> dict:
    q = torch.randn(B, H, 1, D, device=device, dtype=dtype)
    lengths = torch.tensor(lengths_of(B, T), device=device, dtype=torch.int32)
    given = {"q": q, "lengths": lengths, "held": lengths_of(B, T)}
    if page == T:
        k, v = (torch.randn(B, G, T, D, device=device, dtype=dtype) for _ in range(2))
        return given | {"k": k, "v": v, "table": None}
    pages = -(-T // page)
    # as vLLM keeps them, [P, page, G, D], in no order
    k, v = (torch.randn(B * pages, page, G, D, device=device, dtype=dtype) for _ in range(2))
    table = torch.randperm(B * pages, device=device).view(B, pages).to(torch.int32)
    return given | {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "table": table}


def _ours(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, held: list[int], table: Tensor | None
) -> tuple[Tensor]:
    return (ops.attention_decode(q, k, v, lengths, block_table=table),)


def _together(cache: Tensor, table: Tensor) -> Tensor:
    return cache[table].transpose(1, 2).flatten(2, 3)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, held: list[int], table: Tensor | None
) -> tuple[Tensor]:
    """torch's attention, on pages brought together, under a mask where lengths differ."""
    if table is not None:
        k, v = _together(k, table), _together(v, table)
    mask = None
    if q.shape[0] > 1 or k.shape[2] > held[0]:
        mask = (torch.arange(k.shape[2], device=q.device) < lengths[:, None])[:, None, None]
    return (F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _ours,
    "eager": _torch,
    "compile": torch.compile(_torch),
}


def cost(
    dtype: torch.dtype, *, B: int, H: int, G: int, T: int, D: int, page: int
) -> tuple[int, int]:
    """Keys, values and lengths read (of pages their numbers too), queries in and outputs out."""
    keys = sum(lengths_of(B, T))
    told = B + (sum(-(-n // page) for n in lengths_of(B, T)) if page < T else 0)
    return (2 * G * keys + 2 * B * H) * D * dtype.itemsize + 4 * told, 4 * H * keys * D
