"""moe_dispatch: decode and prefill of Qwen3-30B, and Mixtral's.  T tokens, E experts, K of them each."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilewright import ops

OP = "moe_dispatch"
SHAPES: dict[str, dict] = {
    "decode 1x128 k8": {"T": 1, "E": 128, "K": 8},
    "64x128 k8": {"T": 64, "E": 128, "K": 8},
    "4096x128 k8": {"T": 4096, "E": 128, "K": 8},
    "16384x8 k2": {"T": 16384, "E": 8, "K": 2},
}
DTYPES = (torch.float32,)  # of the router: ids have one dtype


def inputs(dtype: torch.dtype, device: str, *, T: int, E: int, K: int) -> dict:
    """ids [T, K], no two of a token alike."""
    g = torch.Generator().manual_seed(0)
    return {"ids": torch.rand(T, E, generator=g).argsort(-1)[:, :K].to(device), "E": E}


def _tilewright(ids: Tensor, E: int) -> tuple[Tensor, ...]:
    return ops.moe_dispatch(ids, E)


def _eager(ids: Tensor, E: int) -> tuple[Tensor, ...]:
    """As transformers' grouped experts sort, and find their way back."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    offsets = torch.zeros(E + 1, dtype=torch.int64, device=ids.device)
    offsets[1:] = torch.cumsum(torch.bincount(flat, minlength=E), 0)
    return order, torch.argsort(order).view(ids.shape), offsets


PROVIDERS: dict[str, Callable] = {"tilewright": _tilewright, "eager": _eager}


def cost(dtype: torch.dtype, *, T: int, E: int, K: int) -> tuple[int, int]:
    """An id read, a slot and a row written of 8 bytes each; the offsets."""
    return 24 * T * K + 8 * (E + 1), 0
