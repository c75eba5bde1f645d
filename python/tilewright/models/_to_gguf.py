"""A quantised Llama as one GGUF that llama.cpp reads: linear layers Q4_0 or Q8_0, norms and biases F32, embeddings
and head as its source has them, or Q4_0 or Q8_0 too.

A GGUF's metadata are copied; a Hugging Face folder's are made of its configuration and tokeniser, by the names
that llama.cpp's converter gives.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType
from torch import Tensor

from tilewright import nn
from tilewright.models._config import LlamaConfig
from tilewright.models._rope import Rope, frequencies
from tilewright.models._to_folder import dense, in_place
from tilewright.models._tokenizer import Tokenizer
from tilewright.models._weights import GGUF, Folder, half_split
from tilewright.models.llama import GGUF_NAMES
from tilewright.quant import gguf
from tilewright.quant._gguf_blocks import KINDS
from tilewright.quant.apply import QuantConfig, embedded
from tilewright.quant.gguf import FLOAT_DTYPES, GGUFFile
from tilewright.quant_tensor import QuantTensor

METHODS = ("rtn", "gptq", "awq")
TYPES = {4: "Q4_0", 8: "Q8_0"}
GROUP = 32  # of both types
ROWS = 4096  # of an embedding that are rounded at once
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# what of a GGUF does not hold for one that is made of it
NOT_COPIED = (
    "GGUF.", "general.architecture", "general.file_type", "general.quantization_version",
    "general.alignment", "quantize.", "split.",
)  # fmt: skip

Value = tuple[Any, GGUFValueType, "GGUFValueType | None"]


class Entry(NamedTuple):
    """A tensor to be written: its type, the shape of its bytes, and these."""

    type: str
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]


def check(config: QuantConfig) -> None:
    """Raises ValueError where Q4_0 and Q8_0 do not hold what config asks for."""
    unfit = [
        told
        for fits, told in (
            (config.method in METHODS, f"method {config.method}"),
            (config.group == GROUP, f"group {config.group}"),
            (config.symmetric, "asymmetric"),
            (not config.act_order, "act_order"),
            (config.scale_dtype == torch.float16, f"scale_dtype {config.scale_dtype}"),
        )
        if not fits
    ]
    if unfit:
        raise ValueError(
            f"quantize: format gguf has no {', no '.join(unfit)}; it takes {', '.join(METHODS)},"
            f" group {GROUP}, symmetric, float16 scales"
        )


class Target:
    """The GGUF to be made of a model at `path`, at `out`.

    Raises ValueError where a GGUF of its architecture cannot say what the model is, or there is a file that
    no quantising was going on for.
    """

    def __init__(
        self,
        path: Path,
        out: Path,
        c: LlamaConfig,
        source: Folder | GGUF,
        tokenizer: Tokenizer | None,
        config: QuantConfig,
    ) -> None:
        self.out, self.c, self.source, self.config = out, c, source, config
        self.type = TYPES[config.bits]
        self.divisors: Tensor | None = None
        self.metadata: dict[str, Value]
        if isinstance(source, Folder):
            self.architecture = ARCHITECTURES[source.config["model_type"]]
            self.metadata = {k: _typed(v) for k, v in self._described(path, tokenizer).items()}
        else:
            file = GGUFFile(path)
            self.architecture = str(file.metadata["general.architecture"])
            self.metadata = {
                name: (value, file.types[name][0], next(iter(file.types[name][1:]), None))
                for name, value in file.metadata.items()
                if not name.startswith(NOT_COPIED)
            }

    @property
    def folder(self) -> Path:
        """Where layers are until all are there."""
        return self.out.with_name(self.out.name + ".layers")

    def _described(self, path: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Metadata of a Hugging Face folder."""
        c = self.c
        bound = [window for window in c.windows if 0 < window < c.context]
        if bound:
            raise ValueError(
                f"quantize: {path}: a GGUF has no sliding window, of {bound[0]} keys in a context of {c.context}"
            )
        if tokenizer is None:
            raise ValueError(
                f"quantize: {path}: a GGUF holds a tokeniser; there is no tokenizer.json"
            )
        try:
            tokens = tokenizer.to_gguf(c.vocab_size, c.eos)
        except ValueError as error:
            raise ValueError(f"quantize: {path / 'tokenizer.json'}: {error}") from error
        sizes = {
            "context_length": c.context, "embedding_length": c.hidden_size, "block_count": c.layers,
            "feed_forward_length": c.ffn_size, "attention.head_count": c.heads,
            "attention.head_count_kv": c.kv_heads, "attention.key_length": c.head_dim,
            "attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": c.norm_eps,
            "vocab_size": c.vocab_size, "rope.dimension_count": c.head_dim, "rope.freq_base": c.rope.theta,
        }  # fmt: skip
        sizes |= self._rope(path)
        general = {"general.type": "model", "general.name": path.resolve().name}
        return general | {f"{self.architecture}.{k}": v for k, v in sizes.items()} | tokens

    def _rope(self, path: Path) -> dict[str, Any]:
        """Of a rule other than the plain one; llama3's is a tensor of divisors."""
        r = self.c.rope
        told = Rope(r.dim, r.theta, r.rule, r.context, r.original_context, r.factor)
        rest = r
        if r.rule == "llama3":
            rest = replace(
                r, low_freq_factor=told.low_freq_factor, high_freq_factor=told.high_freq_factor
            )
            plain = frequencies(Rope(r.dim, r.theta))[0]
            self.divisors = plain / frequencies(r)[0]
        if (
            r.rule not in ("default", "linear", "yarn", "llama3")
            or rest != told
            or r.dim != self.c.head_dim
        ):
            raise ValueError(f"quantize: {path}: a GGUF cannot say its rope: {r}")
        if r.rule in ("default", "llama3"):
            return {}
        more = (
            {"rope.scaling.original_context_length": r.original_context} if r.rule == "yarn" else {}
        )
        return {"rope.scaling.type": r.rule, "rope.scaling.factor": r.factor} | more

    def write(self, folder_of: Callable[[int], Folder]) -> None:
        """The file, of layers that folder_of opens; whole or not at all."""
        part = self.out.with_name(self.out.name + ".part")
        writer = GGUFWriter(part, self.architecture)
        for name, (value, kind, inner) in self.metadata.items():
            if value or not isinstance(value, (str, list)):  # the package writes no empty array
                writer.add_key_value(name, value, kind, inner)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.add_file_type(LlamaFileType[f"MOSTLY_{self.type}"])
        try:
            # twice: their sizes, then one after another their bytes
            for name, entry in self._entries(folder_of):
                size = int(np.prod(entry.shape))
                stored = GGMLQuantizationType[entry.type]
                writer.add_tensor_info(
                    name, entry.shape, np.dtype(np.uint8), size, raw_dtype=stored
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, entry in self._entries(folder_of):
                writer.write_tensor_data(entry.data())
            writer.close()
            in_place(part, self.out)
        except BaseException:
            writer.close()
            part.unlink(missing_ok=True)
            raise

    def _entries(self, folder_of: Callable[[int], Folder]) -> Iterator[tuple[str, Entry]]:
        names = set()
        for name, entry in self._layers(folder_of):
            names.add(name)
            yield name, entry
        source, c = self.source, self.c
        for module in ("model.embed_tokens", "lm_head") if self.config.embeddings else ():
            if source.has_linear(module):
                name = f"{GGUF_NAMES[module]}.weight"
                names.add(name)
                yield name, self._embedding(module)
        if isinstance(source, GGUF):
            for name, info in source.file.tensors.items():
                if name not in names:
                    data = functools.partial(source.file.data, name)
                    yield name, Entry(info.type, source.file.data(name).shape, data)
            return
        yield (
            "output_norm.weight",
            _floats(
                "F32",
                (c.hidden_size,),
                lambda: source.tensor("model.norm.weight", (c.hidden_size,)),
            ),
        )
        for module in ("model.embed_tokens", "lm_head"):
            if f"{GGUF_NAMES[module]}.weight" in names or not source.has_linear(module):
                continue  # there already, or tied
            kind = source.kind(f"{module}.weight") if source.has(f"{module}.weight") else ""
            yield (
                f"{GGUF_NAMES[module]}.weight",
                _floats(
                    kind if kind in FLOAT_DTYPES else "F16",
                    (c.vocab_size, c.hidden_size),
                    functools.partial(_matrix, source, module, c.vocab_size, c.hidden_size),
                ),
            )
        if self.divisors is not None:
            divisors = self.divisors
            yield "rope_freqs.weight", _floats("F32", tuple(divisors.shape), lambda: divisors)

    def _layers(self, folder_of: Callable[[int], Folder]) -> Iterator[tuple[str, Entry]]:
        c = self.c
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        linears = {
            "self_attn.q_proj": (q, c.hidden_size, c.heads),
            "self_attn.k_proj": (kv, c.hidden_size, c.kv_heads),
            "self_attn.v_proj": (kv, c.hidden_size, 0),
            "self_attn.o_proj": (c.hidden_size, q, 0),
            "mlp.gate_proj": (c.ffn_size, c.hidden_size, 0),
            "mlp.up_proj": (c.ffn_size, c.hidden_size, 0),
            "mlp.down_proj": (c.hidden_size, c.ffn_size, 0),
        }
        norms = {"input_layernorm": c.hidden_size, "post_attention_layernorm": c.hidden_size}
        if c.qk_norm:
            norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
        block = KINDS[self.type]
        for i in range(c.layers):
            layer = folder_of(i)
            at = f"model.layers.{i}"
            for name, size in norms.items():
                read = functools.partial(layer.tensor, f"{at}.{name}.weight", (size,))
                yield f"blk.{i}.{GGUF_NAMES[name]}.weight", _floats("F32", (size,), read)
            for name, (N, K, heads) in linears.items():
                rows = None
                if heads and self.architecture == "llama":
                    rows = half_split(N, heads).argsort()
                data = functools.partial(self._blocks, layer, f"{at}.{name}", N, K, rows)
                shape = (N, K // block.weights * block.nbytes)
                yield f"blk.{i}.{GGUF_NAMES[name]}.weight", Entry(self.type, shape, data)
                if layer.has(f"{at}.{name}.bias"):
                    read = functools.partial(_vector, layer, f"{at}.{name}.bias", N, rows)
                    yield f"blk.{i}.{GGUF_NAMES[name]}.bias", _floats("F32", (N,), read)

    def _embedding(self, module: str) -> Entry:
        """The embedding or the head, by rtn."""
        c, kind = self.c, TYPES[self.config.embeddings]

        def data() -> np.ndarray:
            whole = dense(self.source.linear([module], [c.vocab_size], c.hidden_size)).weight
            parts = [
                gguf.write(embedded(f"{module} from row {i * ROWS}", rows, self.config))[1]
                for i, rows in enumerate(whole.split(ROWS))
            ]
            return np.concatenate(parts)

        block = KINDS[kind]
        return Entry(kind, (c.vocab_size, c.hidden_size // block.weights * block.nbytes), data)

    def _blocks(self, layer: Folder, name: str, N: int, K: int, rows: Tensor | None) -> np.ndarray:
        linear = layer.linear([name], [N], K)
        assert isinstance(linear, nn.QuantLinear)
        kind, blocks = gguf.write(linear.weight)
        assert kind == self.type
        return blocks if rows is None else blocks[rows.numpy()]


def _typed(value: Any) -> Value:
    """A value with the type that llama.cpp's converter gives it."""
    inner = GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value, GGUFValueType.UINT32 if is_count else GGUFValueType.get_type(value), inner


def _floats(kind: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Entry:
    """A tensor of floats, in the type of that name."""
    dtype = FLOAT_DTYPES[kind]

    def data() -> np.ndarray:
        return read().detach().to(dtype).contiguous().view(torch.uint8).numpy()

    return Entry(kind, (*shape[:-1], shape[-1] * dtype.itemsize), data)


def _vector(layer: Folder, name: str, N: int, rows: Tensor | None) -> Tensor:
    whole = layer.tensor(name, (N,))
    return whole if rows is None else whole[rows]


def _matrix(source: Folder, module: str, N: int, K: int) -> Tensor:
    weight: Any = source.linear([module], [N], K).weight
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight
