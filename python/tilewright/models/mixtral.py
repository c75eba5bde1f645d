"""Mixtral: Mixtral itself, Qwen1.5- and Qwen2-MoE (a shared expert), Qwen3-MoE, OLMoE (norms over all heads).

Llama's decoder, where the second half of a layer is a mixture of experts (Jiang et al. 2024, arXiv:2401.04088):
    x = x + O attention(rope(Q n), rope(K n), V n),            n = rms_norm(x)
    x = x + sum_j w_j Down_e swiglu(GateUp_e n),  e = ids_j,   n = rms_norm(x)
with w and ids the router's k best.  Some of Qwen's layers may be Llama's.

B batch, S new positions, H query heads, G kv heads, D head dim, E model dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tilewright import nn
from tilewright.models._config import MAX_LAYERS, LlamaConfig, count
from tilewright.models._decoder import Attending, Cache, norm
from tilewright.models._rope import real, whole
from tilewright.models._weights import GGUF, Folder, frozen
from tilewright.models.llama import Layer, Llama
from tilewright.nn.moe_router import MOST_CHOSEN, MOST_EXPERTS
from tilewright.quant.gguf import GGUFFile
from tilewright.quant_tensor import QuantTensor

QWEN = ("qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(LlamaConfig):
    """Sizes of a Mixtral: `experts` of `expert_size`, `chosen` of them a token, in the layers that are `sparse`.

    renormalise has their weights sum to 1; shared_size is the shared expert's, 0 for none; wide_norm has one norm
    over all query heads and one over all key heads; clip bounds queries, keys and values.  ffn_size is that of the
    layers that are not sparse.  Raises ValueError where the sizes do not fit each other.
    """

    experts: int
    expert_size: int
    chosen: int
    renormalise: bool
    sparse: tuple[bool, ...]
    shared_size: int = 0
    wide_norm: bool = False
    clip: float | None = None

    name: ClassVar[str] = "mixtral"
    model_types: ClassVar[tuple[str, ...]] = ("mixtral", *QWEN, "olmoe")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_size < 1:
            raise ValueError(f"mixtral: expert_size must be 1 or more, not {self.expert_size}")
        if not 1 <= self.experts <= MOST_EXPERTS:
            raise ValueError(
                f"mixtral: experts must be from 1 to {MOST_EXPERTS}, not {self.experts}"
            )
        if not 1 <= self.chosen <= min(self.experts, MOST_CHOSEN):
            raise ValueError(
                f"mixtral: {self.chosen} experts a token do not fit {self.experts} experts, or are more"
                f" than {MOST_CHOSEN}"
            )
        if self.shared_size < 0:
            raise ValueError(f"mixtral: shared_size must be 0 or more, not {self.shared_size}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"mixtral: clip_qkv must be above 0, not {self.clip}")
        if len(self.sparse) != self.layers:
            raise ValueError(f"mixtral: sparse is of {len(self.sparse)} layers, not {self.layers}")

    @classmethod
    def _sizes(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        kind = config["model_type"]
        experts = "num_experts" if "num_experts" in config else "num_local_experts"
        clip = config.get("clip_qkv") if kind == "olmoe" else None
        return super()._sizes(config, path) | {
            "experts": count(config, experts),
            "expert_size": count(
                config, "moe_intermediate_size" if kind in QWEN else "intermediate_size"
            ),
            "chosen": count(config, "num_experts_per_tok"),
            "renormalise": kind == "mixtral" or bool(config.get("norm_topk_prob", False)),
            "sparse": _sparse(config, kind),
            "shared_size": (
                count(config, "shared_expert_intermediate_size") if kind == "qwen2_moe" else 0
            ),
            "wide_norm": kind == "olmoe",
            "clip": None if clip is None else real("clip_qkv", clip),
        }

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "LlamaConfig":
        """Raises ValueError: experts are not read from a GGUF yet."""
        raise ValueError(
            f"{file.path}: a GGUF of a mixture of experts is not read: give its Hugging Face folder"
        )


def _sparse(config: Mapping[str, Any], kind: str) -> tuple[bool, ...]:
    """Which layers are mixtures: of Qwen's, each decoder_sparse_step-th that mlp_only_layers does not name."""
    layers = whole("num_hidden_layers", config["num_hidden_layers"])
    if layers > MAX_LAYERS:  # before each gets a mark
        raise ValueError(f"num_hidden_layers {layers} is more than {MAX_LAYERS}")
    if kind not in QWEN:
        return (True,) * layers
    step = whole("decoder_sparse_step", config.get("decoder_sparse_step", 1))
    if step < 1:
        raise ValueError(f"decoder_sparse_step must be 1 or more, not {step}")
    given = config.get("mlp_only_layers") or []
    if not isinstance(given, list):
        raise ValueError(f"mlp_only_layers must be a list, not {given!r}")
    dense = {whole("mlp_only_layers", i) for i in given}
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


class SparseLayer(Attending):
    def __init__(self, config: MixtralConfig, source: Folder, index: int) -> None:
        super().__init__(config, source, index)
        c, at = config, f"model.layers.{index}"
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.widths, self.clip = (q, kv, kv), c.clip
        self.q_norm: torch.nn.Module | None = None
        self.k_norm: torch.nn.Module | None = None
        if c.wide_norm:
            self.q_norm = norm(source, f"{at}.self_attn.q_norm", q, c.norm_eps)
            self.k_norm = norm(source, f"{at}.self_attn.k_norm", kv, c.norm_eps)
        self.moe = _mixture(c, source, at)

    def project(self, n: Any) -> Tensor:
        """n [B, S, E] -> queries, keys and values [B, S, (H + 2 G) D], normed and clipped as OLMoE's."""
        qkv = super().project(n)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.widths, dim=-1)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=-1)
        return qkv if self.clip is None else qkv.clamp(-self.clip, self.clip)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, S, E], what the layer before adds to residual [B, S, E] -> the same two."""
        x, residual = self.attend(x, residual, cos, sin, cache)
        n, residual = self.normed("moe", x, residual)
        return self.moe(n), residual


def _mixture(c: MixtralConfig, source: Folder, at: str) -> nn.MoE:
    """A layer's experts, under Mixtral's names on disk or the others'."""
    gate_up, down = ("gate_proj", "up_proj"), ("down_proj",)
    if source.has(f"{at}.block_sparse_moe.gate.weight"):
        at, gate_up, down = f"{at}.block_sparse_moe", ("w1", "w3"), ("w2",)
    else:
        at = f"{at}.mlp"
    E, D, I, S = c.experts, c.hidden_size, c.expert_size, c.shared_size
    # read before a module of that size is made
    router = source.tensor(f"{at}.gate.weight", (E, D))
    gate_ups = source.experts(f"{at}.experts", gate_up, "gate_up_proj", (E, I, D))
    downs = source.experts(f"{at}.experts", down, "down_proj", (E, D, I))
    shared = {
        name: source.linear([f"{at}.shared_expert.{name}"], [rows], columns)
        for name, rows, columns in (("gate_proj", S, D), ("up_proj", S, D), ("down_proj", D, S))
        if S
    }
    moe = nn.MoE(
        D, I, E, c.chosen, renormalise=c.renormalise, shared_size=S, shared_gate=S > 0,
        device="meta",  # no initialisation to throw away
    )  # fmt: skip
    moe.gate.weight = frozen(router)
    if isinstance(gate_ups, QuantTensor) and isinstance(downs, QuantTensor):
        quantised: Any = nn.QuantExperts(gate_ups, downs, E).to(source.device)
        moe.experts = quantised
    elif isinstance(gate_ups, QuantTensor) or isinstance(downs, QuantTensor):
        raise ValueError(f"{source.path}: {at}.experts are quantised in part")
    else:
        moe.experts.gate_up_proj, moe.experts.down_proj = frozen(gate_ups), frozen(downs)
    for name, linear in shared.items():
        setattr(moe.shared_expert, name, linear)
    if S:
        moe.shared_expert_gate = source.linear([f"{at}.shared_expert_gate"], [1], D)
    return moe


class Mixtral(Llama):
    """The model; from_pretrained makes one, of a Hugging Face folder.

    Experts are stacked as nn.MoE has them, or nn.QuantExperts where the folder has them quantised; so may other
    layers be.
    """

    config: MixtralConfig
    config_type: ClassVar[type[LlamaConfig]] = MixtralConfig

    def make_layer(self, source: Folder | GGUF, index: int) -> torch.nn.Module:
        assert isinstance(source, Folder)  # from_gguf refused the other
        make = SparseLayer if self.config.sparse[index] else Layer
        return make(self.config, source, index)
