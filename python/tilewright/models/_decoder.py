"""What decoders share: the cache, and a layer's first half, its attention.

B batch, S new positions, T positions so far, L layers, H query heads, G kv heads, D head dim, E model dim.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright import nn, ops
from tilewright.models._config import LlamaConfig
from tilewright.models._weights import GGUF, Folder


class Cache:
    """Rotated keys, and values, of the positions so far: [L, 2, B, G, capacity, D]."""

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        c = config
        shape = (c.layers, 2, batch, c.kv_heads, capacity, c.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self._slots: tuple[Tensor, ...] = ()
        self._windows: tuple[Tensor, ...] = ()

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def extend(self, count: int) -> None:
        """Make room for `count` positions: views of all layers at once, not 4 slices a layer."""
        start, self.length = self.length, self.length + count
        by_layer = self.kv.flatten(0, 1)
        self._slots = by_layer[..., start : self.length, :].unbind()
        self._windows = by_layer[..., : self.length, :].unbind()

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v [B, G, S, D] in the room made; all keys and values of the layer."""
        at = 2 * layer
        self._slots[at].copy_(k)
        self._slots[at + 1].copy_(v)
        return self._windows[at], self._windows[at + 1]


class Attending(torch.nn.Module):
    """The first half of a layer, its attention, and the norm before the second, which is a subclass's."""

    def __init__(self, config: LlamaConfig, source: Folder | GGUF, index: int) -> None:
        super().__init__()
        c, at = config, f"model.layers.{index}"
        self.index, self.heads, self.kv_heads, self.head_dim = (
            index,
            c.heads,
            c.kv_heads,
            c.head_dim,
        )
        seen = c.windows[index] if c.windows else 0
        self.window = (seen - 1, -1) if seen else None
        self.eps, self.rotated, self.scale = c.norm_eps, c.rope.dim, c.head_dim**-0.5
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.input_norm = norm(source, f"{at}.input_layernorm", c.hidden_size, c.norm_eps)
        self.qkv = source.linear(
            [f"{at}.self_attn.{n}_proj" for n in "qkv"], [q, kv, kv], c.hidden_size,
            [c.heads, c.kv_heads, 0],
        )  # fmt: skip
        self.register_parameter("qk_norm", None)
        if c.qk_norm:  # one norm's weight for every query head, another's for every key head
            norms = [source.tensor(f"{at}.self_attn.{n}_norm.weight", (c.head_dim,)) for n in "qk"]
            each = [norms[0].expand(c.heads, -1), norms[1].expand(c.kv_heads, -1)]
            self.qk_norm = torch.nn.Parameter(torch.cat(each).unsqueeze(1), requires_grad=False)
        self.o = source.linear([f"{at}.self_attn.o_proj"], [c.hidden_size], q)
        self.post_norm = norm(source, f"{at}.post_attention_layernorm", c.hidden_size, c.norm_eps)

    def project(self, n: Any) -> Tensor:
        """n [B, S, E] -> queries, keys and values [B, S, (H + 2 G) D]."""
        parts: Any = self._modules
        return parts["qkv"](n)

    def attend(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, S, E], what the layer before adds to residual [B, S, E] -> the same two, attention's."""
        # straight from the dictionaries: Module.__getattr__ costs a decode step 1 us a time, 180 times
        parts: Any = self._modules
        input_weight = parts["input_norm"]._parameters["weight"]
        B, S, _ = x.shape
        n, residual = _normed(parts["qkv"], x, residual, input_weight, self.eps)
        H, G = self.heads, self.kv_heads
        qkv = self.project(n).view(B, S, H + 2 * G, self.head_dim).transpose(1, 2)
        qk, v = qkv[:, : H + G], qkv[:, H + G :]
        qk_weight = self._parameters["qk_norm"]
        if qk_weight is not None:
            qk = ops.rms_norm(qk, None, self.eps) * qk_weight
        qk = ops.rope(qk, cos, sin)
        q, k = qk[:, :H], qk[:, H:]
        if cache is not None:
            k, v = cache.store(self.index, k, v)
        a = ops.attention(q, k, v, causal=True, window=self.window, scale=self.scale)
        return parts["o"](a.transpose(1, 2).reshape(B, S, -1)), residual

    def normed(self, reader: str, x: Tensor, residual: Tensor) -> tuple[Any, Tensor]:
        """x + residual, and its norm as the second half's part of that name takes it."""
        parts: Any = self._modules
        weight = parts["post_norm"]._parameters["weight"]
        return _normed(parts[reader], x, residual, weight, self.eps)


def _normed(
    linear: torch.nn.Module, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Any, Tensor]:
    """rms_norm of x + residual as `linear` takes it, and the sum; as int8 at once where it takes that."""
    if linear.__dict__.get("activations") == "int8_token":
        given = (x, weight) if residual is None else (x, weight, residual)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
            return ops.rms_norm_int8(x, weight, eps, residual=residual)
    if residual is None:
        return ops.rms_norm(x, weight, eps), x
    return ops.add_rms_norm(x, residual, weight, eps)


def norm(source: Folder | GGUF, name: str, size: int, eps: float) -> torch.nn.RMSNorm:
    made = nn.RMSNorm(size, eps)
    weight = source.tensor(f"{name}.weight", (size,))
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made
