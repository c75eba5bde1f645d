"""A quantised Llama as a Hugging Face folder: a file a layer, one of the rest, then the index and config.json."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright import nn
from tilewright.models._config import LlamaConfig
from tilewright.models._tokenizer import Tokenizer
from tilewright.models._weights import GGUF, Folder
from tilewright.models.llama import Layer
from tilewright.quant import compressed_tensors, gptq, hqq
from tilewright.quant.apply import QuantConfig
from tilewright.quant_tensor import QuantTensor

COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
)  # fmt: skip
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SCALES = (".weight_scale", ".scales", ".scale", ".zero")  # which keep the dtype they were made in


def whole_file(path: Path, write: Callable[[Path], object]) -> None:
    """The file that `write` makes, whole or not at all, on the disk when this returns."""
    part = path.with_name(path.name + ".part")
    write(part)
    in_place(part, path)


def in_place(part: Path, path: Path) -> None:
    """A finished file under its name, on the disk when this returns."""
    with part.open("rb+") as f:
        os.fsync(f.fileno())
    os.replace(part, path)
    if os.name == "posix":  # the name is the folder's
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _text(path: Path, value: dict[str, Any]) -> None:
    whole_file(path, lambda part: part.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def dense(layer: torch.nn.Module) -> torch.nn.Linear:
    """A linear layer of floats, of one that may be quantised."""
    if isinstance(layer, nn.QuantLinear):
        weight, bias = layer.weight.dequantize(), layer.bias
    elif isinstance(layer, torch.nn.ModuleList):  # side by side
        parts = [dense(part) for part in layer]
        weight = torch.cat([part.weight for part in parts])
        bias = None
        if parts[0].bias is not None:
            whole = torch.cat([part.bias for part in parts])
            bias = torch.nn.Parameter(whole, requires_grad=False)
    else:
        assert isinstance(layer, torch.nn.Linear)
        return layer
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear


class Writer:
    """The folder's files: one a layer, one of the rest, then the index and the configuration."""

    def __init__(self, out: Path, c: LlamaConfig, config: QuantConfig, format: str) -> None:
        self.out, self.c, self.config, self.format = out, c, config, format
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self.parts = {
            "qkv": [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
            "o": [("self_attn.o_proj", c.hidden_size)],
            "gate_up": [("mlp.gate_proj", c.ffn_size), ("mlp.up_proj", c.ffn_size)],
            "down": [("mlp.down_proj", c.hidden_size)],
        }

    def name(self, i: int) -> str:
        return f"model-{i + 1:05d}-of-{self.c.layers + 1:05d}.safetensors"

    def has(self, i: int) -> bool:
        """Whether a layer is there, whole: one that cannot be read is made again."""
        import safetensors

        try:
            self.files(i)
        except (safetensors.SafetensorError, OSError):
            return False
        return True

    def files(self, i: int) -> dict[str, str]:
        """Tensor -> file, of one that is there."""
        import safetensors

        with safetensors.safe_open(self.out / self.name(i), framework="pt") as file:
            return dict.fromkeys(file.keys(), self.name(i))

    def folder(self, i: int) -> Folder:
        """A layer that is there."""
        return Folder(self.out, torch.float32, torch.device("cpu"), activations=self.config.activations,
                      config=self.settings({}), files=self.files(i))  # fmt: skip

    def _save(self, i: int, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        whole = {name: t.detach().contiguous() for name, t in tensors.items()}
        whole_file(self.out / self.name(i), lambda part: save_file(whole, part, {"format": "pt"}))

    def _tensors(self, w: QuantTensor) -> dict[str, Tensor]:
        if self.format == "gptq":
            return gptq.write(w)
        if self.format == "hqq":
            return hqq.write(w)
        if self.config.method == "smoothquant":
            codes = (w.codes() ^ 128).view(torch.int8)
            return {"weight": codes, "weight_scale": w.scales}
        return compressed_tensors.write(w)

    def _dtype(self, name: str, source: Folder | GGUF) -> torch.dtype:
        """Of what is not quantised: tensor `name`'s in a folder, float32 of a GGUF's and in one."""
        if self.format == "gguf" or isinstance(source, GGUF) or not source.has(name):
            return torch.float32
        return FLOATS.get(source.kind(name), torch.float32)

    def layer(self, i: int, layer: Layer, source: Folder | GGUF) -> None:
        """Write a layer, and round what of it is not quantised to the dtype that it has there."""
        at = f"model.layers.{i}"
        dtype = self._dtype(f"{at}.input_layernorm.weight", source)
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(dtype))
        found: dict[str, Tensor] = {
            f"{at}.input_layernorm.weight": layer.input_norm.weight,
            f"{at}.post_attention_layernorm.weight": layer.post_norm.weight,
        }
        if layer.qk_norm is not None:
            weight = layer.qk_norm.squeeze(1)
            found[f"{at}.self_attn.q_norm.weight"] = weight[0]
            found[f"{at}.self_attn.k_norm.weight"] = weight[-1]
        for name, parts in self.parts.items():
            module, first = getattr(layer, name), 0
            for part, rows in parts:
                w = module.weight.part(first, first + rows)
                found |= {f"{at}.{part}.{n}": t for n, t in self._tensors(w).items()}
                if module.bias is not None:
                    found[f"{at}.{part}.bias"] = module.bias[first : first + rows]
                first += rows
        self._save(i, {n: t.to(dtype) if t.dtype == torch.float32 and not n.endswith(SCALES) else t
                       for n, t in found.items()})  # fmt: skip

    def rest(self, source: Folder | GGUF, c: LlamaConfig) -> None:
        """Embeddings, the last norm and the head, in the source's own dtype where it has one."""
        embedding = source.linear(["model.embed_tokens"], [c.vocab_size], c.hidden_size)
        found: dict[str, Tensor] = {
            "model.embed_tokens.weight": dense(embedding).weight,
            "model.norm.weight": source.tensor("model.norm.weight", (c.hidden_size,)),
        }
        if source.has_linear("lm_head"):
            head = source.linear(["lm_head"], [c.vocab_size], c.hidden_size)
            found["lm_head.weight"] = dense(head).weight
        self._save(c.layers, {n: t.to(self._dtype(n, source)) for n, t in found.items()})

    def settings(self, described: dict[str, Any]) -> dict[str, Any]:
        """config.json."""
        q = self.config
        if self.format == "gptq":
            settings: dict[str, Any] = {
                "quant_method": "gptq", "bits": q.bits, "group_size": q.group, "sym": q.symmetric,
                "desc_act": q.act_order, "checkpoint_format": "gptq_v2", "damp_percent": q.damping,
            }  # fmt: skip
        elif self.format == "hqq":
            params = {"nbits": q.bits, "group_size": q.group, "axis": 1}
            settings = {"quant_method": "hqq", "quant_config": {"weight_quant_params": params}}
        else:
            dynamic = q.method == "smoothquant"
            weights: dict[str, Any] = {
                "num_bits": q.bits, "type": "int", "symmetric": q.symmetric, "dynamic": False,
                "strategy": "channel" if q.group == -1 else "group",
                "group_size": None if q.group == -1 else q.group,
            }  # fmt: skip
            kind = compressed_tensors.INT if dynamic else compressed_tensors.PACKED
            rows = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "dynamic": True,
                "strategy": "token",
            }
            group = {"targets": ["Linear"], "weights": weights, "input_activations": rows if dynamic else None,
                     "output_activations": None, "format": kind}  # fmt: skip
            settings = {
                "quant_method": compressed_tensors.NAME, "format": kind, "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "quantization_status": "compressed",
            }  # fmt: skip
        return described | {"quantization_config": settings}

    def finish(self, described: dict[str, Any], path: Path, tokenizer: Tokenizer | None) -> None:
        files: dict[str, str] = {}
        for i in range(self.c.layers + 1):
            files |= self.files(i)
        total = sum((self.out / self.name(i)).stat().st_size for i in range(self.c.layers + 1))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        _text(self.out / "model.safetensors.index.json", index)
        if path.is_dir():
            for name in COPIED:
                if (path / name).is_file():
                    whole_file(self.out / name, partial(shutil.copyfile, path / name))
        elif tokenizer is not None:
            _write_tokenizer(tokenizer, self.out)
        _text(self.out / "config.json", self.settings(described))


def _write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    whole_file(out / "tokenizer.json", lambda part: tokenizer.backend.save(str(part)))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, token in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        if token is not None:
            config[name] = tokenizer.backend.id_to_token(token)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    _text(out / "tokenizer_config.json", config)


def description(c: LlamaConfig, source: Folder | GGUF) -> dict[str, Any]:
    """config.json of the model as it is.  Raises ValueError where a GGUF's rope has no plain form there."""
    if isinstance(source, Folder):
        return {k: v for k, v in source.config.items() if k != "quantization_config"}
    if c.rope.rule != "default" or c.rope.divisors or c.rope.dim != c.head_dim:
        raise ValueError(
            f"quantize: a GGUF with rope {c.rope.rule!r}: give its Hugging Face folder"
        )
    kind = (
        "qwen3"
        if c.qk_norm
        else "qwen2"
        if source.has("model.layers.0.self_attn.q_proj.bias")
        else "llama"
    )
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    eos: Any = list(c.eos) if len(c.eos) > 1 else c.eos[0] if c.eos else None
    return {
        "architectures": [f"{names[kind]}ForCausalLM"], "model_type": kind, "hidden_act": "silu",
        "hidden_size": c.hidden_size, "intermediate_size": c.ffn_size, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps, "max_position_embeddings": c.context,
        "rope_theta": c.rope.theta, "tie_word_embeddings": not source.has_linear("lm_head"),
        "eos_token_id": eos, "dtype": "float32",
    }  # fmt: skip
