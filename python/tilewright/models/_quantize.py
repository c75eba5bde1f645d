"""A Llama quantised layer by layer, into a Hugging Face folder or a GGUF: one layer is in memory at a time, and
each is on disk once it is done, so that what was interrupted goes on where it stopped.

Of a layer quantised already the next ones see its outputs: their calibration is what they will get.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.models import _to_gguf
from tilewright.models._config import LlamaConfig
from tilewright.models._rope import RopeTables
from tilewright.models._to_folder import Writer, dense, description, whole_file
from tilewright.models._weights import GGUF, Folder
from tilewright.models.llama import Layer, opened
from tilewright.quant import apply
from tilewright.quant.apply import Fold, QuantConfig

FORMATS = ("compressed-tensors", "gptq", "hqq", "gguf")
PLAN = "quantize.json"  # what the folder is being made of, until it is whole
SEQUENCES = 4  # that go through a layer at once
PAGES = 1 << 20  # bytes of a file, at either end, that tell it from another


@torch.no_grad()
def quantize(
    path: Path,
    out: Path,
    config: QuantConfig,
    *,
    calibration: Tensor | None = None,
    format: str = "compressed-tensors",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The model at `path`, a folder or a GGUF, quantised into the folder `out`, or the file where format is gguf,
    whose layers are in the folder `out`.layers until all are there.

    calibration [n, S] ids is needed by gptq, awq and smoothquant.  progress is called with layers done and in
    all.  Raises ValueError where settings do not fit the model, or `out` holds something else.
    """
    if format not in FORMATS:
        raise ValueError(f"quantize: format {format!r} is none of {', '.join(FORMATS)}")
    if format == "gguf":
        _to_gguf.check(config)
    if config.method == "hqq" and format != "hqq":
        raise ValueError(
            f"quantize: hqq's zero-points are no whole numbers, which {format} holds: format hqq"
        )
    if config.act_order and format in ("hqq", "compressed-tensors"):
        raise ValueError(f"quantize: format {format} has no act_order; gptq has")
    if config.method == "smoothquant" and format != "compressed-tensors":
        raise ValueError(
            f"quantize: format {format} cannot say that inputs are rounded, as smoothquant's are:"
            " compressed-tensors can"
        )
    if config.embeddings and format != "gguf":
        raise ValueError(f"quantize: format {format} leaves embeddings as they are: gguf does not")
    if (config.method in apply.WITH_INPUTS) and calibration is None:
        raise ValueError(f"quantize: {config.method} needs a calibration text")
    c, source, tokenizer = opened(path, torch.float32, torch.device("cpu"), "float")
    _check(c, config, calibration, format)
    target = None
    if format == "gguf":
        target, described = _to_gguf.Target(path, out, c, source, tokenizer, config), {}
        if out.exists() and not (target.folder / PLAN).is_file():
            raise ValueError(f"{out}: is there, and was not begun by this command")
        out = target.folder
    else:
        described = description(c, source)
    for module in ("model.embed_tokens", "lm_head") if config.embeddings else ():
        if source.has_linear(module):
            weight = dense(source.linear([module], [c.vocab_size], c.hidden_size)).weight
            apply.check_finite(module, weight)
            del weight
    _begin(out, path, source, config, calibration, format)
    writer = Writer(out, c, config, format)
    tables = RopeTables(c.rope, torch.float32, torch.device("cpu"))
    hidden: Tensor | None = None
    if config.method in apply.WITH_INPUTS:
        assert calibration is not None
        embedding = dense(source.linear(["model.embed_tokens"], [c.vocab_size], c.hidden_size))
        hidden = torch.nn.functional.embedding(calibration, embedding.weight)
        del embedding
    for i in range(c.layers):
        if progress is not None:
            progress(i, c.layers)
        if hidden is None:
            if not writer.has(i):
                layer = _dense_layer(Layer(c, source, i))
                apply.replace(layer, config, {})
                writer.layer(i, layer, source)
            continue
        cos, sin = tables.rows(0, hidden.shape[1])
        if writer.has(i):
            layer = Layer(c, writer.folder(i), i)
        else:
            layer = _dense_layer(Layer(c, source, i))
            folds = _folds(layer, c)
            run = partial(_through, layer, hidden, cos, sin)
            seen = apply.gather(layer, config, run, folds)
            if config.method in ("awq", "smoothquant"):
                apply.fold(layer, config, seen, folds)
            apply.replace(layer, config, seen)
            writer.layer(i, layer, source)
        hidden = _through(layer, hidden, cos, sin)
    if target is not None:
        target.write(writer.folder)
        for file in out.iterdir():  # the plan last: without it what is left would be no one's
            if file.name != PLAN:
                file.unlink()
        shutil.rmtree(out)
    else:
        writer.rest(source, c)
        writer.finish(described, path, tokenizer)
        (out / PLAN).unlink()
    if progress is not None:
        progress(c.layers, c.layers)


def _check(c: LlamaConfig, config: QuantConfig, calibration: Tensor | None, format: str) -> None:
    """Raises ValueError where the model's sizes, or the calibration, do not fit."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    for K in (c.hidden_size, q, c.ffn_size):
        if config.group != -1 and K % config.group:
            raise ValueError(
                f"quantize: groups of {config.group} do not divide the model's {K} inputs"
            )
    if format == "gptq":
        for N in (c.hidden_size, q, kv, c.ffn_size):
            if N * config.bits % 32:
                raise ValueError(
                    f"quantize: {N} outputs of {config.bits} bits are no whole words, as gptq packs them"
                )
    if calibration is None:
        return
    shape, dtype = list(calibration.shape), calibration.dtype
    if calibration.dim() != 2 or not all(shape) or dtype not in (torch.int32, torch.int64):
        raise ValueError(f"quantize: calibration must be ids [n, S], not {dtype} {shape}")
    if shape[1] > c.context:
        raise ValueError(
            f"quantize: calibration of {shape[1]} tokens is more than the context of {c.context}"
        )
    low, high = (int(x) for x in calibration.aminmax())
    if low < 0 or high >= c.vocab_size:
        raise ValueError(
            f"quantize: calibration ids {low} to {high} are outside the vocabulary of {c.vocab_size}"
        )


def _fingerprint(source: Folder | GGUF) -> str:
    """Of the files that are read: their names, sizes, and first and last pages."""
    found = hashlib.sha256()
    for file in source.files:
        size = file.stat().st_size
        found.update(f"{file.name} {size} ".encode())
        with file.open("rb") as f:
            found.update(f.read(PAGES))
            f.seek(max(0, size - PAGES))
            found.update(f.read())
    return found.hexdigest()


def _begin(
    out: Path,
    path: Path,
    source: Folder | GGUF,
    config: QuantConfig,
    calibration: Tensor | None,
    format: str,
) -> None:
    """A folder that is new, or was begun by the same call.  Raises ValueError on any other."""
    ids = b""
    if calibration is not None:
        ids = (
            f"{list(calibration.shape)} ".encode()
            + calibration.long().contiguous().numpy().tobytes()
        )
    plan = {
        "model": path.resolve().name, "weights": _fingerprint(source), "format": format,
        "calibration": hashlib.sha256(ids).hexdigest(),
        "settings": {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in asdict(config).items()},
    }  # fmt: skip
    file = out / PLAN
    if file.is_file():
        try:
            theirs = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}: not readable: {error}; remove {out} to begin anew"
            ) from error
        unlike = sorted(name for name in plan if theirs.get(name) != plan[name])
        if unlike:
            raise ValueError(
                f"{out}: was begun with another {', '.join(unlike)}; remove it to begin anew"
            )
        return
    # a file of ours that was not finished is none
    if out.exists() and (not out.is_dir() or any(f.name != f"{PLAN}.part" for f in out.iterdir())):
        raise ValueError(f"{out}: is there, and is whole or was not begun by this command")
    out.mkdir(parents=True, exist_ok=True)
    whole_file(file, lambda part: part.write_text(json.dumps(plan, indent=1)))


def _through(layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """hidden [n, S, E] after the layer."""
    outs = []
    for part in hidden.split(SEQUENCES):
        x, residual = layer(part, None, cos, sin, None)
        outs.append(x + residual)
    return torch.cat(outs)


def _dense_layer(layer: Layer) -> Layer:
    for name in ("qkv", "o", "gate_up", "down"):
        setattr(layer, name, dense(getattr(layer, name)))
    return layer


def _folds(layer: Layer, c: LlamaConfig) -> list[Fold]:
    """Where factors of a layer's inputs go: norms' weights, and the rows of what is before."""
    wide = c.heads * c.head_dim

    def of_norm(norm: Any) -> Callable[[Tensor], None]:
        return lambda factors: norm.weight.div_(factors)

    def of_rows(linear: Any, first: int) -> Callable[[Tensor], None]:
        def divide(factors: Tensor) -> None:
            rows = slice(first, first + factors.numel())
            linear.weight[rows].div_(factors[:, None])
            if linear.bias is not None:
                linear.bias[rows].div_(factors)

        return divide

    folds = [
        Fold(("qkv",), of_norm(layer.input_norm)),
        Fold(("gate_up",), of_norm(layer.post_norm)),
        Fold(("down",), of_rows(layer.gate_up, c.ffn_size)),  # swiglu is linear in up
    ]
    if c.heads == c.kv_heads:  # else heads share what a factor would be divided out of
        folds.append(Fold(("o",), of_rows(layer.qkv, 2 * wide)))
    return folds
