"""torch.nn.MultiheadAttention on ops.attention.

N batch, E embedding, H heads, S queries, T keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import masks, ops
from tilewright.nn import functional


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: its arguments, parameters, state dict and results.

    With need_weights=False the heads attend through our kernels.  Tiles that no query sees are skipped for a
    causal mask that is_causal names, and on the CPU for masks that leave each query neighbouring keys and are
    the same for all heads (padding left or right, windows); other masks are added to the scores.  The rest
    is torch's: weights, which are S T numbers a head, bias_k and bias_v, add_zero_attn, nested tensors,
    float64.

    A query that sees no key, also by masks below -2.36e38, gives out_proj of 0, where torch's gives nan or
    the mean.  Dropout draws otherwise than torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [S, N, E], key, value [T, N, E] ([N, S, E] under batch_first; [S, E] unbatched) -> the same
        of query, and the weights [N, S, T] or None.

        key_padding_mask [N, T] and attn_mask [S, T] or [N H, S, T] are true, or -inf, where a key is
        hidden.  is_causal says that attn_mask is causal.  Errors are torch's.
        """
        ranges = bias = None
        served = not need_weights and self._is_served(query, key, value)
        if attn_mask is None:
            served = served and not is_causal  # torch says what is wrong
        causal = is_causal and key_padding_mask is None
        if served and not causal and (attn_mask is not None or key_padding_mask is not None):
            ranges = self._ranges(query, key, attn_mask, key_padding_mask)
            if ranges is None:
                bias = self._bias(query, key, attn_mask, key_padding_mask)
            served = ranges is not None or bias is not None
        if not served:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        dropout_p = self.dropout if self.training else 0.0
        if causal:
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout_p
            )
        else:
            out = ops.attention(q, k, v, ranges=ranges, bias=bias, dropout_p=dropout_p)
        out = out.transpose(1, 2).flatten(2)  # [N, S, E]
        if query.dim() == 2:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), None

    def _is_served(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether kernels of ours serve this module and these tensors."""
        tensors: Any = (query, key, value)
        batch = 0 if self.batch_first else 1
        return (
            self.bias_k is None
            and not self.add_zero_attn
            and self.head_dim <= functional.MOST_HEAD_DIM
            and not any(x.is_nested for x in tensors)
            and query.dim() in (2, 3)
            and query.dim() == key.dim()
            and query.size(-1) == self.embed_dim
            and key.shape[:-1] == value.shape[:-1]
            and (not self._qkv_same_embed_dim or key.shape == value.shape)
            and (query.dim() == 2 or query.size(batch) == key.size(batch))
            and all(x.dtype in functional.FLOATS for x in tensors)
        )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self._qkv_same_embed_dim and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        bias = self.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(*each) for each in zip(inputs, weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """[N, H, S, D] of projected [S, N, E], [N, S, E] under batch_first, or [S, E]."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _ranges(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """begin, end that broadcast to [N, S], of what both masks leave; None where ranges cannot say it, or
        asking would wait for a GPU."""
        if torch.compiler.is_compiling() or not query.is_cpu:
            return None
        length = 1 if self.batch_first and query.dim() == 3 else 0
        S, T = query.size(length), key.size(length)
        N = query.size(1 - length) if query.dim() == 3 else 1
        begin, end = (torch.tensor([[x]]) for x in (0, T))
        if key_padding_mask is not None and query.dim() == 2:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        for mask, of_keys in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            seen = _seen(mask) if mask.shape == (N if of_keys else S, T) else None
            if seen is None:
                return None
            first, last, whole = masks.hull(seen)
            if not bool(whole.all()):
                return None
            if of_keys:
                first, last = first[:, None], last[:, None]
            begin, end = torch.maximum(begin, first), torch.minimum(end, last)
        return begin, end

    def _bias(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """What both masks add to the scores [N, H, S, T], or broadcasts to that; None where torch says what
        is wrong with them."""
        length = 1 if self.batch_first and query.dim() == 3 else 0
        S, T = query.size(length), key.size(length)
        N = query.size(1 - length) if query.dim() == 3 else 1
        parts = []
        if attn_mask is not None:
            if attn_mask.shape not in ((S, T), (N * self.num_heads, S, T)):
                return None
            heads = (N, self.num_heads) if attn_mask.dim() == 3 else (1, 1)
            parts.append(attn_mask.reshape(*heads, S, T))
        if key_padding_mask is not None:
            if key_padding_mask.shape != ((N, T) if query.dim() == 3 else (T,)):
                return None
            parts.append(key_padding_mask.reshape(N, 1, 1, T))
        bias = None
        for mask in parts:
            if mask.dtype == torch.bool:
                mask = masks.additive(~mask, query.dtype)
            elif mask.dtype not in (torch.float32, query.dtype):
                return None
            bias = mask if bias is None else bias + mask
        return bias


def _seen(mask: Tensor) -> Tensor | None:
    """What a mask leaves visible; None where it adds more than 0 and -inf, or is learned."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point() or mask.requires_grad:
        return None
    seen = mask == 0
    return seen if bool((seen | (mask == -torch.inf)).all()) else None
