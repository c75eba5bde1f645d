"""Llama: LLaMA 2 and 3, SmolLM2, Mistral, Qwen2 and 2.5 (QKV bias), Qwen3 (QK-norm).

A layer of this decoder (Touvron et al. 2023, arXiv:2302.13971; Ainslie et al. 2023, arXiv:2305.13245):
    x = x + O attention(rope(Q n), rope(K n), V n),  n = rms_norm(x)
    x = x + Down swiglu(GateUp n),                   n = rms_norm(x)
Q, K and V are one matrix, gate and up another, packed at load.

B batch, S new positions, T positions so far, L layers, H query heads, G kv heads, D head dim,
E model dim, V vocabulary.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tilewright import nn, ops
from tilewright.models._config import LlamaConfig
from tilewright.models._decoder import Attending, Cache, norm
from tilewright.models._rope import RopeTables
from tilewright.models._sampling import Sampler
from tilewright.models._tokenizer import TextStream, Tokenizer
from tilewright.models._weights import GGUF, Folder, tied
from tilewright.quant.gguf import GGUFFile
from tilewright.quant_tensor import ACTIVATIONS

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

L = TypeVar("L", bound="Llama")


@dataclass(frozen=True)
class Generation:
    """What generate made: new ids without the end token, their text up to a stop string, its times.

    prefill_seconds is the prompt's pass and yields the first token, decode_seconds the rest;
    finish is "eos", "stop" or "length"; activations names how quantised layers took theirs.
    """

    tokens: list[int]
    text: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish: str
    activations: str


class Layer(Attending):
    def __init__(self, config: LlamaConfig, source: Folder | GGUF, index: int) -> None:
        super().__init__(config, source, index)
        c, at = config, f"model.layers.{index}.mlp"
        self.gate_up = source.linear(
            [f"{at}.gate_proj", f"{at}.up_proj"], [c.ffn_size] * 2, c.hidden_size
        )
        self.down = source.linear([f"{at}.down_proj"], [c.hidden_size], c.ffn_size)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """x [B, S, E], what the layer before adds to residual [B, S, E] -> the same two."""
        x, residual = self.attend(x, residual, cos, sin, cache)
        n, residual = self.normed("gate_up", x, residual)
        parts: Any = self._modules
        return parts["down"](ops.swiglu(parts["gate_up"](n))), residual


def opened(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    activations: str | None,
    config_type: type[LlamaConfig] = LlamaConfig,
) -> tuple[LlamaConfig, Folder | GGUF, Tokenizer | None]:
    """Sizes, weights and tokeniser of a Hugging Face folder or a GGUF file; raises as from_pretrained does."""
    source: Folder | GGUF
    tokenizer: Tokenizer | None = None
    if path.is_dir():
        source = Folder(path, dtype, device, activations=activations)
        config = config_type.from_folder(source.config, path)
        if not source.has_linear("lm_head") and source.config.get("tie_word_embeddings") is False:
            raise ValueError(f"{path}: tensor lm_head.weight is missing")
        if (path / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_folder(path)
    else:
        file = GGUFFile(path)
        config = config_type.from_gguf(file)
        is_interleaved = file.metadata["general.architecture"] == "llama"
        if "tokenizer.ggml.model" in file.metadata:
            tokenizer = Tokenizer.from_gguf(file.metadata, path)
        file.metadata.clear()  # lists of every token and merge
        source = GGUF(
            file, GGUF_NAMES, dtype, device,
            interleaved=is_interleaved, activations=activations or "float",
        )  # fmt: skip
    return config, source, tokenizer


class Llama(torch.nn.Module):
    """The model; from_pretrained makes one.  `tokenizer` is None where the files hold none.

    Mixtral has other sizes, and makes other layers of them.
    """

    config: LlamaConfig
    config_type: ClassVar[type[LlamaConfig]] = LlamaConfig

    def __init__(
        self,
        config: LlamaConfig,
        source: Folder | GGUF,
        tokenizer: Tokenizer | None = None,
        *,
        max_context: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        if max_context is not None and max_context < 1:
            raise ValueError(f"{c.name}: max_context must be 1 or more, not {max_context}")
        self.context = c.context if max_context is None else min(max_context, c.context)
        self.tokenizer = tokenizer
        self.activations = getattr(source, "activations", "float")
        self.embedding = source.embedding("model.embed_tokens", c.vocab_size, c.hidden_size)
        self.head = (
            source.linear(["lm_head"], [c.vocab_size], c.hidden_size)
            if source.has_linear("lm_head")
            else tied(self.embedding, self.activations)
        )
        layers = []
        for i in range(c.layers):
            if progress is not None:
                progress(source.nbytes * i // c.layers, source.nbytes)
            layers.append(self.make_layer(source, i))
        self.layers = torch.nn.ModuleList(layers)
        self.norm = norm(source, "model.norm", c.hidden_size, c.norm_eps)
        if progress is not None:
            progress(source.nbytes, source.nbytes)
        taken = {m.activations for m in self.modules() if isinstance(m, nn.QuantLinear)}
        if self.activations == "int8_token" and "int8_token" not in taken:
            self.activations = "int8"
        self._tables: RopeTables | None = None

    def make_layer(self, source: Folder | GGUF, index: int) -> torch.nn.Module:
        return Layer(self.config, source, index)

    @classmethod
    def from_pretrained(
        cls: type[L],
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_context: int | None = None,
        activations: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> L:
        """Load a Hugging Face folder or a GGUF file; quantised weights stay quantised.

        dtype (float32 on a CPU, bfloat16 on a GPU where None) is that of activations and of weights
        that are not quantised.  max_context bounds the context below the model's own.
        activations is nn.QuantLinear's: "int8" and "int8_token" round what enters a quantised layer (the latter as
        "int8" does where the weight is not of 8 bits by row); None is what a
        folder's configuration says, else "float".  progress is
        called with bytes done and bytes in all.  Raises FileNotFoundError where a file is missing,
        ValueError where one is corrupt, of an unknown architecture or type, or lacks a tensor.
        """
        path, place = Path(path), torch.device(device or "cpu")
        if dtype is None:
            dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{cls.config_type.name}: dtype must be float32, bfloat16 or float16, not {dtype}"
            )
        if activations not in (None, *ACTIVATIONS):
            raise ValueError(
                f"{cls.config_type.name}: activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
            )
        config, source, tokenizer = opened(path, dtype, place, activations, cls.config_type)
        return cls(config, source, tokenizer, max_context=max_context, progress=progress).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `capacity` positions."""
        return Cache(self.config, batch, capacity, self.dtype, self.device)

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids [B, S] int, the positions after cache's -> normalised states [B, S, E]."""
        S = ids.shape[1]
        start = 0 if cache is None else cache.length
        if start + S > self.context:
            raise ValueError(
                f"{self.config.name}: {start + S} tokens are more than the context of {self.context}"
            )
        if cache is not None:
            if start + S > cache.capacity:
                raise ValueError(
                    f"{self.config.name}: {start + S} tokens are more than the cache's {cache.capacity}"
                )
            cache.extend(S)
        tables = self._tables
        if tables is None or (tables.dtype, tables.device) != (self.dtype, self.device):
            tables = self._tables = RopeTables(self.config.rope, self.dtype, self.device)
        cos, sin = tables.rows(start, start + S)
        x = self.embedding(ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin, cache)
        assert residual is not None  # a model has layers: the configuration says how many
        return ops.add_rms_norm(x, residual, self.norm.weight, self.config.norm_eps)[0]

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids [B, S] int, the positions after cache's -> logits [B, S, V]."""
        return self.head(self.hidden(ids, cache))

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        stream: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue prompt_ids [S] until an end token, a stop string, max_new_tokens or the context.

        temperature 0 is greedy; see Sampler for the other options.  stream is called with each piece
        of text as it settles.  Raises ValueError for an empty prompt, one that leaves no room in the
        context, an id outside the vocabulary, or an option out of its range.
        """
        ids = [int(i) for i in prompt_ids]
        V, eos = self.config.vocab_size, () if ignore_eos else self._eos()
        if not ids:
            raise ValueError("generate: the prompt is empty")
        if min(ids) < 0 or max(ids) >= V:
            wrong = next(i for i in ids if not 0 <= i < V)
            raise ValueError(f"generate: prompt id {wrong} is outside the vocabulary of {V}")
        if len(ids) >= self.context:
            raise ValueError(
                f"generate: a prompt of {len(ids)} tokens leaves no room in a context of {self.context}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"generate: max_new_tokens must be 1 or more, not {max_new_tokens}")
        sampler = Sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, device=self.device,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        stops = [stop] if isinstance(stop, str) else list(stop)
        if self.tokenizer is None and (stops or stream is not None):
            raise ValueError("generate: stop strings and streaming need a tokenizer; there is none")
        text = None if self.tokenizer is None else TextStream(self.tokenizer, stops)

        room = min(max_new_tokens, self.context - len(ids))
        cache = self.new_cache(1, len(ids) + room)
        pieces: list[str] = []
        finish, n_prompt, began = "length", len(ids), time.perf_counter()

        def emit(piece: str) -> None:
            if piece:
                pieces.append(piece)
                if stream is not None:
                    stream(piece)

        token = self._next(ids, cache, sampler, ids)
        prefilled = time.perf_counter()
        while True:
            if token in eos:
                finish = "eos"
                break
            ids.append(token)
            if text is not None:
                emit(text.push(token))
                if text.stopped is not None:
                    finish = "stop"
                    break
            if len(ids) - n_prompt == room:
                break
            token = self._next([token], cache, sampler, ids)
        decoded = time.perf_counter() - prefilled
        if text is not None:
            emit(text.close())
        return Generation(
            tokens=ids[n_prompt:],
            text="".join(pieces),
            prompt_tokens=n_prompt,
            prefill_seconds=prefilled - began,
            decode_seconds=decoded,
            finish=finish,
            activations=self.activations,
        )

    def _next(self, new: list[int], cache: Cache, sampler: Sampler, context: list[int]) -> int:
        states = self.hidden(torch.tensor([new], device=self.device), cache)
        return sampler(self.head(states[:, -1:])[0, 0], context)

    def _eos(self) -> tuple[int, ...]:
        if self.config.eos or self.tokenizer is None or self.tokenizer.eos is None:
            return self.config.eos
        return (self.tokenizer.eos,)
