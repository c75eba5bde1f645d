"""Sizes of a Llama, from a Hugging Face config.json or a GGUF's metadata."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewright.models._rope import Rope
from tilewright.models._tokenizer import read_json
from tilewright.quant.gguf import GGUFFile

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; `context` is the most positions it takes, eos the ids that end a text, windows
    how many keys each layer's queries see, 0 for all (none: all see all).

    Raises ValueError where the sizes do not fit each other.
    """

    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    context: int
    rope: Rope
    qk_norm: bool = False
    eos: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "hidden_size",
            "ffn_size",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab_size",
            "context",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"llama: {name} must be 1 or more, not {getattr(self, name)}")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise ValueError(f"llama: windows {self.windows} do not fit {self.layers} layers")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"llama: {self.heads} heads do not divide into {self.kv_heads} kv heads"
            )
        if self.rope.dim > self.head_dim:
            raise ValueError(f"llama: rope dim {self.rope.dim} is above head dim {self.head_dim}")

    @classmethod
    def from_folder(cls, config: Mapping[str, Any], path: Path) -> "LlamaConfig":
        """From a Hugging Face config.json."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ValueError(f"{path}: unknown architecture {kind!r}; known are {known}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: hidden_act {config['hidden_act']!r} is not silu")
        if config.get("quantization_config"):
            raise ValueError(f"{path}: quantization_config is not read yet; use a GGUF")
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            head_dim = int(config.get("head_dim") or hidden // max(heads, 1))
            eos = config.get("eos_token_id")
            if (path / "generation_config.json").is_file():
                eos = read_json(path / "generation_config.json").get("eos_token_id", eos)
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden_size=hidden,
                ffn_size=int(config["intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=head_dim,
                vocab_size=int(config["vocab_size"]),
                norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                context=int(config["max_position_embeddings"]),
                rope=Rope.from_config(config, head_dim),
                qk_norm=kind == "qwen3",
                windows=_windows(config, kind),
                eos=tuple(
                    int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None
                ),
            )
        except KeyError as error:
            raise ValueError(f"{path / 'config.json'}: {error.args[0]} is missing") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from error

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "LlamaConfig":
        """From a GGUF's metadata."""
        kind = file.metadata.get("general.architecture")
        if kind not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ValueError(f"{file.path}: unknown architecture {kind!r}; known are {known}")

        def get(name: str, default: Any = None) -> Any:
            value = file.metadata.get(f"{kind}.{name}", default)
            if value is None:
                raise ValueError(f"{file.path}: metadata {kind}.{name} is missing")
            return value

        if get("expert_count", 0):
            raise ValueError(f"{file.path}: a mixture of experts is not a Llama")
        try:
            heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
            head_dim = int(get("attention.key_length", hidden // max(heads, 1)))
            context = int(get("context_length"))
            rule = str(get("rope.scaling.type", "default"))
            divisors: tuple[float, ...] = ()
            if "rope_freqs.weight" in file.tensors:
                divisors = tuple(file.dense("rope_freqs.weight", torch.float32).tolist())
            rope = Rope(
                dim=int(get("rope.dimension_count", head_dim)),
                theta=float(get("rope.freq_base", 10000.0)),
                rule="default" if rule == "none" else rule,
                context=context,
                original_context=int(get("rope.scaling.original_context_length", context)),
                factor=float(get("rope.scaling.factor", 1.0)),
                divisors=divisors,
            )
            ends = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
            eos: list[Any] = [file.metadata.get(key) for key in ends]
            return cls(
                layers=int(get("block_count")),
                hidden_size=hidden,
                ffn_size=int(get("feed_forward_length")),
                heads=heads,
                kv_heads=int(get("attention.head_count_kv", heads)),
                head_dim=head_dim,
                vocab_size=math.prod(file.info("token_embd.weight").shape[:1]),
                norm_eps=float(get("attention.layer_norm_rms_epsilon")),
                context=context,
                rope=rope,
                qk_norm=kind == "qwen3",
                eos=tuple(sorted({int(i) for i in eos if i is not None})),
            )
        except (TypeError, ValueError) as error:
            told = str(error).removeprefix(f"{file.path}: ")
            raise ValueError(f"{file.path}: {told}") from error


def _windows(config: Mapping[str, Any], kind: str) -> tuple[int, ...]:
    """Each layer's window, as transformers has it: of the layers that layer_types names, else of those from
    max_window_layers on."""
    window, layers = int(config.get("sliding_window") or 0), int(config["num_hidden_layers"])
    if not window or not config.get("use_sliding_window", kind == "mistral"):
        return ()
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", 0)) if kind != "mistral" else 0
        return tuple(window if i >= first else 0 for i in range(layers))
    return tuple(window if each == "sliding_attention" else 0 for each in kinds)
