"""A self-attention layer of today's language models, on ops.attention and a KV cache.

B batch, S tokens, E embedding, H query heads, G kv heads, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.nn.rms_norm import RMSNorm
from tilewright.nn.rope import RotaryEmbedding


class KVCache:
    """One layer's keys and values: room for `room` tokens of each of B sequences, and how many each has.

    k, v [B, G, room, D]; lengths [B], int32, on their device.  int8 and float8_e4m3fn hold numbers that are
    k_scale and v_scale [G] times themselves.
    """

    def __init__(
        self,
        B: int,
        G: int,
        room: int,
        D: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        self.k, self.v = (torch.zeros(B, G, room, D, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(B, dtype=torch.int32, device=device)
        self.k_scale, self.v_scale = k_scale, v_scale

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths.zero_()


class Attention(torch.nn.Module):
    """Projections, norms of queries and keys (Qwen3), RoPE, attention, the output's projection.

    The state dict is that of transformers' layers: q_proj, k_proj, v_proj, o_proj; q_norm and k_norm where
    qk_norm_eps is given; sinks [H] where asked for (GPT-OSS).

    embed_dim E, num_heads H, num_kv_heads G (default H), head_dim D (default E / H).  bias is that of q, k
    and v's projections, out_bias that of the output's.  rotary turns queries and keys.  window (left,
    right), softcap, scale and causal are ops.attention's.  ValueError where G does not divide H.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        rotary: RotaryEmbedding | None = None,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"Attention: {num_heads} heads are not a multiple of {kv_heads} kv heads"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"Attention: embed_dim {embed_dim} is no multiple of {num_heads} heads"
            )
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(embed_dim, num_heads * self.head_dim, bias, **made)
        self.k_proj = torch.nn.Linear(embed_dim, kv_heads * self.head_dim, bias, **made)
        self.v_proj = torch.nn.Linear(embed_dim, kv_heads * self.head_dim, bias, **made)
        self.o_proj = torch.nn.Linear(num_heads * self.head_dim, embed_dim, out_bias, **made)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(self.head_dim, qk_norm_eps, **made)
            self.k_norm = RMSNorm(self.head_dim, qk_norm_eps, **made)
        self.normed = qk_norm_eps is not None
        self.sinks = torch.nn.Parameter(torch.zeros(num_heads, **made)) if sinks else None
        self.rotary = rotary
        self.causal, self.window, self.softcap, self.scale = causal, window, softcap, scale

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        ranges: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [B, S, E] -> [B, S, E].

        position_ids [S] or [B, S] are RoPE's (default 0 on), ranges are ops.attention's (padding, documents:
        tilewright.masks).  With a cache, which is changed, the tokens come after those it holds, at their
        places, under torch.no_grad(); ValueError where position_ids, ranges or a layer that is not causal
        come with one, or it has no room.
        """
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        options: dict[str, Any] = {
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }
        if cache is None:
            if self.rotary is not None:
                q, k = self.rotary(q, position_ids), self.rotary(k, position_ids)
            out = ops.attention(
                q, k, v, causal=self.causal, ranges=ranges, scale=self.scale, **options
            )
            return self.o_proj(out.transpose(1, 2).flatten(2))
        if position_ids is not None or ranges is not None or not self.causal:
            raise ValueError(
                "Attention: a cache takes causal layers, without position_ids and ranges"
            )
        turns: dict[str, Any] = {}
        if self.rotary is not None:
            turns = {"cos": self.rotary.cos, "sin": self.rotary.sin}
            turns["interleaved"] = self.rotary.interleaved
        out = ops.attention_decode_append_(
            q, k, v, cache.k, cache.v, cache.lengths, k_scale=cache.k_scale, v_scale=cache.v_scale,
            scale=self.scale, **turns, **options,
        )  # fmt: skip
        cache.lengths += x.size(1)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, causal={self.causal}, window={self.window}"
