"""Forwards on our ops for the layers of transformers' models, and what of a module each asks.

Each is a method for a module of theirs, and reads its weights and settings under their names.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright import ops
from tilewright.interop._probe import INNER, SMALL, Probe, drawn, is_linear, tokens

TOKENS = 9  # of a probe


@dataclass(frozen=True)
class Layer:
    """One kind of layer: which modules may be one, our forwards to choose among, how to try them, and what of
    their outputs is compared."""

    name: str
    fits: Callable[[torch.nn.Module], bool]
    probe: Callable[[Any], Probe]
    forwards: tuple[Callable, ...]
    told: Callable[[Any], Any] = lambda outputs: outputs


def _children(module: torch.nn.Module) -> set[str]:
    return {name for name, child in module._modules.items() if child is not None}


def _parameters(module: torch.nn.Module) -> dict[str, int]:
    """Dimensions of each."""
    return {name: p.dim() for name, p in module._parameters.items() if p is not None}


# RMSNorm


def _eps(norm: Any) -> float | None:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return ops.rms_norm(hidden_states, self.weight, _eps(self))


def rms_norm_from_zero(self: Any, hidden_states: Tensor) -> Tensor:
    """Gemma's, whose weights are stored less 1."""
    return ops.rms_norm(hidden_states, self.weight, _eps(self), offset=1.0)


def _is_norm(module: torch.nn.Module) -> bool:
    named = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return named and _parameters(module) == {"weight": 1} and not _children(module)


def _norm_probe(norm: Any) -> Probe:
    return Probe((tokens(TOKENS, norm.weight.shape[0]),))


# the feed-forward


def swiglu(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


def geglu(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x), approximate="none"))


def geglu_tanh(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x), approximate="tanh"))


def swiglu_packed(self: Any, hidden_states: Tensor) -> Tensor:
    """Phi-3's, whose gates and ups are one matrix."""
    return self.down_proj(ops.swiglu(self.gate_up_proj(hidden_states)))


def _is_mlp(module: torch.nn.Module) -> bool:
    linears = {
        name for name, child in module._modules.items() if child is not None and is_linear(child)
    }
    return linears in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def _mlp_probe(mlp: Any) -> Probe:
    linears = {
        "gate_proj": (INNER, SMALL), "up_proj": (INNER, SMALL), "gate_up_proj": (2 * INNER, SMALL),
        "down_proj": (SMALL, INNER),
    }  # fmt: skip
    return Probe((tokens(TOKENS, SMALL)[None],), linears=linears)


# attention


def attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Q, K and V, normalised or clipped where the model does, turned, kept, and attended to as the model's
    configuration says."""
    given = hidden_states.shape[:-1]

    def heads(name: str) -> Tensor:
        x = getattr(self, f"{name}_proj")(hidden_states)
        norm: Any = getattr(self, f"{name}_norm", None)
        by_head = norm is not None and norm.weight.shape[0] == self.head_dim
        if norm is not None and not by_head:  # OLMoE's
            x = norm(x)
        clip = getattr(self.config, "clip_qkv", None)
        if clip is not None:
            x = x.clamp(-clip, clip)
        x = x.view(*given, -1, self.head_dim)
        return (norm(x) if by_head else x).transpose(1, 2)

    q, k, v = heads("q"), heads("k"), heads("v")
    cos, sin, positions = _table(*position_embeddings, q)
    q = ops.rope(q, cos, sin, position_ids=positions)
    k = ops.rope(k, cos, sin, position_ids=positions)
    if past_key_values is not None:
        at = kwargs.get("cache_position")  # which the first 5.x give, and their static caches read
        more = () if at is None else ({"cache_position": at},)
        k, v = past_key_values.update(k, v, self.layer_idx, *more)
    told = {
        name: getattr(self, attribute)
        for name, attribute in (("softcap", "attn_logit_softcapping"), ("s_aux", "sinks"))
        if getattr(self, attribute, None) is not None
    }
    out, probabilities = _attend(self)(
        self, q, k, v, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling, sliding_window=getattr(self, "sliding_window", None), **told, **kwargs,
    )  # fmt: skip
    return self.o_proj(out.reshape(*given, -1)), probabilities


def _table(cos: Tensor, sin: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """transformers' angles [1 or B, S, R], each twice, as tables of ops.rope, and the positions to read them at."""
    B, S, R = cos.shape
    if q.shape[-1] > R:  # of a few features: ops.rope tells from half a table
        cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    if B == 1:
        return cos[0], sin[0], None
    return cos.flatten(0, 1), sin.flatten(0, 1), torch.arange(B * S, device=q.device).view(B, S)


def _attend(module: Any) -> Callable:
    from transformers import AttentionInterface

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(module.config._attn_implementation, eager)


def own_attention(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A stand-in's own forward, attending by our kernels."""
    vars(self.config)["_attn_implementation_internal"] = "tilewright"
    return type(self).forward(self, *args, **kwargs)


def _is_attention(module: torch.nn.Module) -> bool:
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    return projections <= _children(module) and hasattr(module, "head_dim")


def attention_probe(layer: Any, angles_twice: bool = True) -> Probe:
    linears: dict[str, tuple[int | None, int | None]] = {
        "q_proj": (None, SMALL), "k_proj": (None, SMALL), "v_proj": (None, SMALL), "qkv_proj": (None, SMALL),
        "o_proj": (SMALL, None),
    }  # fmt: skip
    angles = drawn(1, TOKENS, layer.head_dim // 2, seed=3)
    if angles_twice:
        angles = angles.repeat(1, 1, 2)
    with torch.device("cpu"):
        mask = torch.full((1, 1, TOKENS, TOKENS), -torch.inf).triu(1)
    named = {
        "hidden_states": drawn(1, TOKENS, SMALL), "attention_mask": mask,
        "position_embeddings": (angles.cos(), angles.sin()),
    }  # fmt: skip
    return Probe(named=named, linears=linears)


# a mixture's router


def _softmax(router: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = hidden_states.reshape(-1, router.weight.shape[1])
    logits = torch.nn.functional.linear(x, router.weight, getattr(router, "bias", None))
    renormalise = getattr(router, "norm_topk_prob", True)
    return logits, *ops.moe_route(logits, router.top_k, renormalise=renormalise)


def softmax_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtral's, whose weights stay float32."""
    return _softmax(self, hidden_states)


def softmax_router_rounded(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Qwen's and OLMoE's, whose weights are of the logits' dtype."""
    logits, weights, ids = _softmax(self, hidden_states)
    return logits, weights.to(logits.dtype), ids


def sigmoid_router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3's: by groups, with a bias that only chooses, in float32."""
    x = hidden_states.reshape(-1, self.weight.shape[1])
    logits = torch.nn.functional.linear(x.float(), self.weight.float())
    weights, ids = ops.moe_route(
        logits, self.top_k, scores="sigmoid", bias=self.e_score_correction_bias, groups=self.num_group,
        group_k=self.topk_group, renormalise=self.norm_topk_prob, scale=self.routed_scaling_factor,
    )  # fmt: skip
    return logits, weights, ids


def _is_router(module: torch.nn.Module) -> bool:
    return (
        hasattr(module, "top_k")
        and _parameters(module).get("weight") == 2
        and not _children(module)
    )


def _router_probe(router: Any) -> Probe:
    shapes = {"weight": (router.weight.shape[0], SMALL)}
    sizes = {"hidden_dim": SMALL, "hidden_size": SMALL}
    return Probe((tokens(TOKENS, SMALL),), shapes=shapes, settings=sizes)


def _chosen(outputs: Any) -> Any:
    """Whatever the order of a token's experts, and however ties of rounded logits are broken."""
    logits, weights, ids = outputs
    told = logits, weights.sort(-1).values, torch.empty_like(ids[:0])
    if logits.dtype != torch.float32:
        return told
    return *told, torch.zeros(logits.shape, dtype=weights.dtype).scatter(-1, ids, weights)


# experts


def experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, activation: str
) -> Tensor:
    """x [T, D], ids and weights [T, k] -> [T, D]; an id of num_experts or more is of experts on other devices."""
    w13, w2 = self.gate_up_proj, self.down_proj
    placed = ops.moe_dispatch(top_k_index.where(top_k_index < len(w13), -1), len(w13))
    return ops.moe_experts(
        hidden_states, top_k_weights, placed, w13, w2, activation=activation,
        bias13=getattr(self, "gate_up_proj_bias", None), bias2=getattr(self, "down_proj_bias", None),
    )  # fmt: skip


def silu_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return experts(self, hidden_states, top_k_index, top_k_weights, "silu")


def gelu_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return experts(self, hidden_states, top_k_index, top_k_weights, "gelu")


def gelu_tanh_experts(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return experts(self, hidden_states, top_k_index, top_k_weights, "gelu_tanh")


ACTIVATION_OF = {silu_experts: "silu", gelu_experts: "gelu", gelu_tanh_experts: "gelu_tanh"}


def _is_experts(module: torch.nn.Module) -> bool:
    found = _parameters(module)
    return found.get("gate_up_proj") == found.get("down_proj") == 3


def _experts_probe(module: Any) -> Probe:
    E = 4
    shapes = {
        "gate_up_proj": (E, 2 * INNER, SMALL), "gate_up_proj_bias": (E, 2 * INNER),
        "down_proj": (E, SMALL, INNER), "down_proj_bias": (E, SMALL),
    }  # fmt: skip
    if getattr(
        module, "is_transposed", False
    ):  # so that theirs can be tried, and is found to differ
        shapes |= {"gate_up_proj": (E, SMALL, 2 * INNER), "down_proj": (E, INNER, SMALL)}
    sizes = {
        "num_experts": E, "hidden_dim": SMALL, "hidden_size": SMALL, "intermediate_dim": INNER,
        "intermediate_size": INNER, "expert_dim": INNER,
    }  # fmt: skip
    ids = torch.arange(2 * TOKENS, device="cpu").view(TOKENS, 2) % (E - 1)  # one is asked by none
    weights = drawn(TOKENS, 2, seed=11).softmax(-1)
    return Probe((tokens(TOKENS, SMALL), ids, weights), shapes=shapes, settings=sizes)


LAYERS = (
    Layer("RMSNorm", _is_norm, _norm_probe, (rms_norm, rms_norm_from_zero)),
    Layer("attention", _is_attention, attention_probe, (attention,)),
    Layer("experts", _is_experts, _experts_probe, (silu_experts, gelu_experts, gelu_tanh_experts)),
    Layer(
        "router",
        _is_router,
        _router_probe,
        (softmax_router, softmax_router_rounded, sigmoid_router),
        _chosen,
    ),
    Layer("MLP", _is_mlp, _mlp_probe, (swiglu, geglu, geglu_tanh, swiglu_packed)),
)
FORWARDS = frozenset(forward for layer in LAYERS for forward in layer.forwards)
