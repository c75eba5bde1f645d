"""attention: causal prefill and decode at SmolLM2-135M's sizes and at heads of 128, against torch's own.

B batch, H query heads, G kv heads, S queries, T keys, D head dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright import ops
from tilewright.bench.harness import outsider

OP = "attention"
TENSOR_CORES = True
SHAPES: dict[str, dict] = {
    "prefill 512": {"B": 1, "H": 9, "G": 3, "S": 512, "T": 512, "D": 64},
    "prefill 512, heads of 128": {"B": 1, "H": 16, "G": 4, "S": 512, "T": 512, "D": 128},
    "prefill 2048, heads of 128": {"B": 1, "H": 16, "G": 4, "S": 2048, "T": 2048, "D": 128},
    "decode 128": {"B": 1, "H": 9, "G": 3, "S": 1, "T": 128, "D": 64},
    "decode 512": {"B": 1, "H": 9, "G": 3, "S": 1, "T": 512, "D": 64},
}
DTYPES = [torch.float32, torch.bfloat16]


def inputs(
    dtype: torch.dtype, device: str, *, B: int, H: int, G: int, S: int, T: int, D: int
) -> dict:
    # as a projection gives it, all heads of a token a row: of the rows that see two keys some head's
    # gradient cancels, and what is left of it is luck, eager's too
    q = torch.randn(B, S, H * D, device=device, dtype=dtype)
    k, v = (torch.randn(B, G, T, D, device=device, dtype=dtype) for _ in range(2))
    trains = S > 1  # one query is a model that answers
    return {name: x.requires_grad_(trains) for name, x in (("q", q), ("k", k), ("v", v))}


def _by_head(attend: Callable) -> Callable:
    """A provider of attend, which takes q [B, H, S, D] and k, v [B, G, T, D]."""

    def provider(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        q = q.unflatten(-1, (-1, k.size(-1))).transpose(1, 2)
        return (attend(q, k, v).transpose(1, 2).flatten(2),)

    return provider


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, causal=True)


def _torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # torch's is_causal is top-left: one query sees every key only without it
    causal = q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _with(backend: SDPBackend) -> Callable:
    """One of torch's own; eager takes whichever torch chooses."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _torch(q, k, v)

    return call


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn.cute import flash_attn_func

    # [B, S, H, D], and the causal mask aligned to the last key, as ours
    out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


PROVIDERS: dict[str, Callable] = {
    "tilewright": _by_head(_ours),
    "eager": _by_head(_torch),
    "compile": torch.compile(_by_head(_torch)),
}
if torch.cuda.is_available():
    PROVIDERS["cudnn"] = _by_head(_with(SDPBackend.CUDNN_ATTENTION))
    PROVIDERS["flash"] = _by_head(_with(SDPBackend.FLASH_ATTENTION))
if outsider("flash_attn"):
    PROVIDERS["flash-attn 4"] = _by_head(_flash_attn_4)


def cost(dtype: torch.dtype, *, B: int, H: int, G: int, S: int, T: int, D: int) -> tuple[int, int]:
    """Least bytes moved, and FLOPs of the visible half under the causal mask."""
    pairs = S * T - S * (S - 1) // 2
    return (2 * B * H * S * D + 2 * B * G * T * D) * dtype.itemsize, 4 * B * H * pairs * D


def backward_cost(
    dtype: torch.dtype, *, B: int, H: int, G: int, S: int, T: int, D: int
) -> tuple[int, int]:
    """q, k, v, dout read, dq, dk, dv written; five products of the visible half."""
    pairs = S * T - S * (S - 1) // 2
    return (3 * B * H * S * D + 4 * B * G * T * D) * dtype.itemsize, 10 * B * H * pairs * D
