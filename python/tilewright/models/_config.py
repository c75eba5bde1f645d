"""Sizes of a Llama, from a Hugging Face config.json or a GGUF's metadata."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from tilewright.models._rope import MOST, Rope, real, whole
from tilewright.models._tokenizer import read_json
from tilewright.quant.gguf import GGUFFile

MAX_LAYERS = 1 << 16
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
WINDOWED = ("mistral", "mixtral")  # where sliding_window alone says so


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

    name: ClassVar[str] = "llama"  # in messages
    model_types: ClassVar[tuple[str, ...]] = MODEL_TYPES

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
                raise ValueError(
                    f"{self.name}: {name} must be 1 or more, not {getattr(self, name)}"
                )
        sizes = {*self.windows, 0}
        if (
            (self.windows and len(self.windows) != self.layers)
            or min(sizes) < 0
            or max(sizes) > MOST
        ):
            raise ValueError(
                f"{self.name}: {len(self.windows)} windows of {min(sizes)} to {max(sizes)} keys do not fit"
                f" {self.layers} layers"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: {self.heads} heads do not divide into {self.kv_heads} kv heads"
            )
        if self.rope.dim > self.head_dim:
            raise ValueError(
                f"{self.name}: rope dim {self.rope.dim} is above head dim {self.head_dim}"
            )

    @classmethod
    def from_folder(cls, config: Mapping[str, Any], path: Path) -> "LlamaConfig":
        """From a Hugging Face config.json."""
        kind = config.get("model_type")
        if kind not in cls.model_types:
            known = ", ".join(cls.model_types)
            raise ValueError(f"{path}: unknown architecture {kind!r}; known are {known}")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"{path}: hidden_act {config['hidden_act']!r} is not silu")
        try:
            return cls(**cls._sizes(config, path))
        except KeyError as error:
            raise ValueError(f"{path / 'config.json'}: {error.args[0]} is missing") from error
        except ValueError as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from error

    @classmethod
    def _sizes(cls, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The fields.  Raises KeyError where a size is missing, ValueError where it is none."""
        kind = config["model_type"]
        heads, hidden = count(config, "num_attention_heads"), count(config, "hidden_size")
        head_dim = count(config, "head_dim", hidden // max(heads, 1))
        eos = config.get("eos_token_id")
        if (path / "generation_config.json").is_file():
            eos = read_json(path / "generation_config.json").get("eos_token_id", eos)
        return {
            "layers": count(config, "num_hidden_layers"),
            "hidden_size": hidden,
            "ffn_size": count(config, "intermediate_size"),
            "heads": heads,
            "kv_heads": count(config, "num_key_value_heads", heads),
            "head_dim": head_dim,
            "vocab_size": count(config, "vocab_size"),
            "norm_eps": real("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            "context": count(config, "max_position_embeddings"),
            "rope": Rope.from_config(config, head_dim),
            "qk_norm": kind in ("qwen3", "qwen3_moe"),
            "windows": _windows(config, kind),
            "eos": tuple(
                whole("eos_token_id", i)
                for i in (eos if isinstance(eos, list) else [eos])
                if i is not None
            ),
        }

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

        def count(name: str, default: Any = None) -> int:
            return whole(f"metadata {kind}.{name}", get(name, default))

        def number(name: str, default: Any = None) -> float:
            return real(f"metadata {kind}.{name}", get(name, default))

        if get("expert_count", 0):
            raise ValueError(f"{file.path}: a mixture of experts is not a Llama")
        try:
            heads, hidden = count("attention.head_count"), count("embedding_length")
            head_dim = count("attention.key_length", hidden // max(heads, 1))
            context = count("context_length")
            rule = str(get("rope.scaling.type", "default"))
            divisors: tuple[float, ...] = ()
            if "rope_freqs.weight" in file.tensors:
                divisors = tuple(file.dense("rope_freqs.weight", torch.float32).tolist())
            rope = Rope(
                dim=count("rope.dimension_count", head_dim),
                theta=number("rope.freq_base", 10000.0),
                rule="default" if rule == "none" else rule,
                context=context,
                original_context=count("rope.scaling.original_context_length", context),
                factor=number("rope.scaling.factor", 1.0),
                divisors=divisors,
            )
            ends = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
            eos = {key: file.metadata.get(key) for key in ends}
            vocab_size = math.prod(file.info("token_embd.weight").shape[:1])
            tokens = file.metadata.get("tokenizer.ggml.tokens")
            if isinstance(tokens, list) and len(tokens) != vocab_size:
                raise ValueError(
                    f"tensor token_embd.weight has {vocab_size} rows for {len(tokens)} tokens"
                )
            return cls(
                layers=count("block_count"),
                hidden_size=hidden,
                ffn_size=count("feed_forward_length"),
                heads=heads,
                kv_heads=count("attention.head_count_kv", heads),
                head_dim=head_dim,
                vocab_size=vocab_size,
                norm_eps=number("attention.layer_norm_rms_epsilon"),
                context=context,
                rope=rope,
                qk_norm=kind == "qwen3",
                eos=tuple(
                    sorted({whole(f"metadata {k}", i) for k, i in eos.items() if i is not None})
                ),
            )
        except ValueError as error:
            told = str(error).removeprefix(f"{file.path}: ")
            raise ValueError(f"{file.path}: {told}") from error


def count(config: Mapping[str, Any], name: str, default: Any = None) -> int:
    """A whole number of a config.json; the default where it is not there, or 0."""
    value = config.get(name)
    if not value and default is not None:
        return default
    return whole(name, config[name])


def _windows(config: Mapping[str, Any], kind: str) -> tuple[int, ...]:
    """Each layer's window, as transformers has it: of the layers that layer_types names, else of those that the
    family has them on."""
    window = whole("sliding_window", config.get("sliding_window") or 0)
    layers = whole("num_hidden_layers", config["num_hidden_layers"])
    if not window or not config.get("use_sliding_window", kind in WINDOWED):
        return ()
    if layers > MAX_LAYERS:  # before each gets a number
        raise ValueError(f"num_hidden_layers {layers} is more than {MAX_LAYERS}")
    kinds = config.get("layer_types")
    if kinds is None:
        edge = whole("max_window_layers", config.get("max_window_layers", 0))
        if kind == "qwen2_moe":  # every other one of the first
            return tuple(window if i < edge and i % 2 == 0 else 0 for i in range(layers))
        first = edge if kind in ("qwen2", "qwen3") else 0
        return tuple(window if i >= first else 0 for i in range(layers))
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types must be a list, not {kinds!r}")
    return tuple(window if each == "sliding_attention" else 0 for each in kinds)
