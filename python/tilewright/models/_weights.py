"""Where a model's weights come from: a Hugging Face folder or a GGUF file, behind one face.

Both answer to Hugging Face's names (`model.layers.0.self_attn.q_proj`), and make packed linear
layers out of them, one matrix at a time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright import nn
from tilewright.models._tokenizer import read_json
from tilewright.quant import checkpoint
from tilewright.quant._gguf_blocks import KINDS
from tilewright.quant.gguf import GGUFFile
from tilewright.quant_tensor import QuantTensor, activations_for


class Concat(torch.nn.ModuleList):
    """Linear layers of one input whose weights cannot be stacked; their outputs, side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], dim=-1)


def frozen(t: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(t, requires_grad=False)


def _dense(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    linear = torch.nn.Linear(1, 1, bias=False, device="meta")  # no initialisation to throw away
    linear.out_features, linear.in_features = weight.shape
    # a parameter stays the same one, which ties an embedding's
    linear.weight = weight if isinstance(weight, torch.nn.Parameter) else frozen(weight)
    linear.bias = None if bias is None else frozen(bias)  # type: ignore[assignment]
    return linear


def _quant_linear(w: QuantTensor, bias: Tensor | None, activations: str) -> nn.QuantLinear:
    return nn.QuantLinear(w, bias, activations=activations_for(w, activations))


def _embedding(linear: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The embedding of a linear layer's weight."""
    if isinstance(linear, nn.QuantLinear):
        return nn.QuantEmbedding(linear.weight, dtype=dtype)
    assert isinstance(linear, torch.nn.Linear)
    V, E = linear.weight.shape
    return torch.nn.Embedding(V, E, _weight=linear.weight, _freeze=True)


def tied(embedding: torch.nn.Module, activations: str) -> torch.nn.Module:
    """The head over an embedding's own weight."""
    if isinstance(embedding, nn.QuantEmbedding):
        taken = activations_for(embedding.weight, activations)
        return nn.QuantLinear(embedding, activations=taken)
    assert isinstance(embedding, torch.nn.Embedding)
    return _dense(embedding.weight, None)


class Folder:
    """A Hugging Face folder: config.json and model.safetensors, or its shards.

    Layers that its quantization_config names stay quantised.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        activations: str | None,
        config: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
    ) -> None:
        """activations None is what the configuration says; config and files, by tensor, where the folder does
        not have its own yet."""
        self.path, self.dtype, self.device = path, dtype, device
        self.config = read_json(path / "config.json") if config is None else config
        self._open: dict[str, Any] = {}
        self._files = self._index() if files is None else files
        self._read_layer: checkpoint.Read | None = None
        self._layer_names: tuple[str, ...] = ()
        settings = self.config.get("quantization_config")
        self.activations = activations or "float"
        if settings:
            try:
                self._read_layer, self._layer_names = (
                    checkpoint.reader(settings),
                    checkpoint.names(settings),
                )
                self.activations = activations or checkpoint.activations(settings)
            except ValueError as error:
                raise ValueError(f"{path / 'config.json'}: {error}") from error

    def _index(self) -> dict[str, str]:
        """Tensor name -> file."""
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise ValueError(f"{index}: weight_map is missing")
            for name, file in files.items():
                if not isinstance(file, str):
                    raise ValueError(f"{index}: weight_map names no file for {name}: {file!r}")
            return files
        if not single.is_file():
            raise FileNotFoundError(f"{single}: no such file, and no model.safetensors.index.json")
        return dict.fromkeys(self._file(single.name).keys(), single.name)

    def _file(self, name: str) -> Any:
        import safetensors

        if name not in self._open:
            path = self.path / name
            if Path(name).name != name or not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            try:
                self._open[name] = safetensors.safe_open(path, framework="pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
        return self._open[name]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.path / name).stat().st_size for name in set(self._files.values()))

    @property
    def files(self) -> list[Path]:
        """config.json, where it is there, and the weight files."""
        names = ["config.json", *sorted(set(self._files.values()))]
        return [self.path / name for name in names if (self.path / name).is_file()]

    def has(self, name: str) -> bool:
        return name in self._files

    def has_linear(self, name: str) -> bool:
        """Whether there is a linear layer of that name, quantised or not."""
        return self.has(f"{name}.weight") or self._is_quantised(name)

    def kind(self, name: str) -> str:
        """The dtype of tensor `name` as safetensors spells it: F32, BF16."""
        return self._slice(name).get_dtype()

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """Tensor `name` of a known shape, in the model's dtype."""
        return self._read(name, shape).to(self.device, self.dtype)

    def _read(self, name: str, shape: Sequence[int]) -> Tensor:
        self._check(name, shape)
        t = self._whole(name)
        if not t.is_floating_point() or t.dtype.itemsize == 1:
            raise ValueError(
                f"{self.path}: tensor {name} is {t.dtype}, not a float this model reads"
            )
        return t

    def _slice(self, name: str) -> Any:
        """What safetensors knows of tensor `name` without reading it."""
        return self._asked(name, "get_slice")

    def _whole(self, name: str) -> Tensor:
        return self._asked(name, "get_tensor")

    def _asked(self, name: str, how: str) -> Any:
        import safetensors

        if name not in self._files:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        file = self._file(self._files[name])
        try:
            return getattr(file, how)(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.path / self._files[name]}: tensor {name}: {error}") from error

    def _check(self, name: str, shape: Sequence[int]) -> None:
        _check_shape(self.path, name, self._slice(name).get_shape(), shape)

    def linear(
        self, names: Sequence[str], outs: Sequence[int], in_features: int, heads: Sequence[int] = ()
    ) -> torch.nn.Module:
        """One linear of the matrices `names` stacked, `outs` rows each, with their biases."""
        quantised = [self._is_quantised(name) for name in names]
        if any(quantised):
            return self._quantised(names, outs, in_features, all(quantised))
        N = sum(outs)
        for name, n in zip(names, outs, strict=True):  # before a wrong size is allocated
            self._check(f"{name}.weight", (n, in_features))
        weight = torch.empty(N, in_features, dtype=self.dtype, device=self.device)
        bias = None
        if any(self.has(f"{name}.bias") for name in names):
            bias = torch.zeros(N, dtype=self.dtype, device=self.device)
        first = 0
        for name, n in zip(names, outs, strict=True):
            weight[first : first + n] = self._read(f"{name}.weight", (n, in_features))
            if bias is not None and self.has(f"{name}.bias"):
                bias[first : first + n] = self._read(f"{name}.bias", (n,))
            first += n
        return _dense(weight, bias)

    def embedding(self, name: str, rows: int, columns: int) -> torch.nn.Module:
        """The embedding `name`, [rows, columns]."""
        return _embedding(self.linear([name], [rows], columns), self.dtype)

    def experts(
        self, name: str, parts: Sequence[str], packed: str, shape: Sequence[int]
    ) -> Tensor | QuantTensor:
        """Matrices of E experts, [E, len(parts) rows, columns] for shape [E, rows, columns]: `name`.packed where it
        is there, else `name`.e.part of each part and expert e, stacked; quantised ones one below the other."""
        E, rows, columns = shape
        whole = (E, len(parts) * rows, columns)
        if self.has(f"{name}.{packed}"):
            return self.tensor(f"{name}.{packed}", whole)
        every = [(f"{name}.{e}.{part}", e, i) for e in range(E) for i, part in enumerate(parts)]
        quantised = [self._is_quantised(each) for each, _, _ in every]
        if any(quantised):
            if not all(quantised):
                one = every[quantised.index(False)][0]
                raise ValueError(f"{self.path}: {one} is not quantised, and other experts are")
            return self._quantised_experts([each for each, _, _ in every], (rows, columns))
        for each, _, _ in every:  # before a wrong size is allocated
            self._check(f"{each}.weight", (rows, columns))
        stacked = torch.empty(whole, dtype=self.dtype, device=self.device)
        for each, e, i in every:
            weight = self._read(f"{each}.weight", (rows, columns))
            stacked[e, i * rows : (i + 1) * rows] = weight
        return stacked

    def _quantised_experts(self, names: Sequence[str], shape: Sequence[int]) -> QuantTensor:
        weights = []
        for name in names:
            w = self._quant_tensor(name)
            _check_shape(self.path, name, w.shape, shape)
            weights.append(w)
        stacked = QuantTensor.stacked(weights)
        if stacked is None:
            raise ValueError(
                f"{self.path}: {names[0]} to {names[-1]} are not quantised alike, with one order of the columns"
            )
        return stacked

    def _is_quantised(self, name: str) -> bool:
        """Whether layer `name` is; one whose weight is a plain float is not."""
        if self._read_layer is None:
            return False
        weight = f"{name}.weight"
        if weight not in self._files:
            return any(self.has(f"{name}.{part}") for part in self._layer_names)
        return self.kind(weight) in ("I8", "U8")

    def _quantised(
        self, names: Sequence[str], outs: Sequence[int], in_features: int, whole: bool
    ) -> torch.nn.Module:
        weights = []
        if whole:
            for name, n in zip(names, outs, strict=True):
                w = self._quant_tensor(name)
                _check_shape(self.path, name, w.shape, (n, in_features))
                weights.append(w)
            stacked = QuantTensor.stacked(weights) if len(weights) > 1 else weights[0]
            if stacked is not None:
                bias = self._biases(names, outs)
                return _quant_linear(stacked, bias, self.activations).to(self.device)
        return Concat(
            [self.linear([name], [n], in_features) for name, n in zip(names, outs, strict=True)]
        )

    def _quant_tensor(self, name: str) -> QuantTensor:
        found = {}
        for part in self._layer_names:
            whole = f"{name}.{part}"
            if self.has(whole):
                found[part] = self._whole(whole)
        assert self._read_layer is not None
        try:
            return self._read_layer(name, found)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def _biases(self, names: Sequence[str], outs: Sequence[int]) -> Tensor | None:
        if not any(self.has(f"{name}.bias") for name in names):
            return None
        parts = [
            self.tensor(f"{name}.bias", (n,))
            if self.has(f"{name}.bias")
            else torch.zeros(n, dtype=self.dtype, device=self.device)
            for name, n in zip(names, outs, strict=True)
        ]
        return torch.cat(parts)


def half_split(n: int, heads: int) -> Tensor:
    """The order in which to take n rows (head, i, half), as interleaved rotation has them, for ours, (head,
    half, i)."""
    return torch.arange(n).view(heads, -1, 2).transpose(1, 2).reshape(-1)


class GGUF:
    """A GGUF file; `names` maps Hugging Face's module names to GGUF's.

    Quantised matrices stay quantised.  interleaved says that query and key rows are ordered for
    interleaved rotation, as llama.cpp's converter leaves them: they are put back in half-split order.
    """

    def __init__(
        self,
        file: GGUFFile,
        names: Mapping[str, str],
        dtype: torch.dtype,
        device: torch.device,
        *,
        interleaved: bool,
        activations: str,
    ) -> None:
        self.file, self.names, self.dtype, self.device = file, names, dtype, device
        self.interleaved, self.activations = interleaved, activations

    def _name(self, name: str) -> str:
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        if parts[:2] == ["model", "layers"]:
            return f"blk.{parts[2]}.{self.names['.'.join(parts[3:])]}.{kind}"
        return f"{self.names[module]}.{kind}"

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.file.path.stat().st_size

    @property
    def files(self) -> list[Path]:
        return [self.file.path]

    def has(self, name: str) -> bool:
        return self._name(name) in self.file.tensors

    def has_linear(self, name: str) -> bool:
        """Whether there is a linear layer of that name."""
        return self.has(f"{name}.weight")

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """Tensor `name` of a known shape, in the model's dtype."""
        return self._read(name, shape, None).to(self.device)

    def _read(self, name: str, shape: Sequence[int], rows: Tensor | None) -> Tensor:
        theirs = self._name(name)
        _check_shape(self.file.path, theirs, self.file.info(theirs).shape, shape)
        return self.file.dense(theirs, self.dtype, rows)

    def linear(
        self, names: Sequence[str], outs: Sequence[int], in_features: int, heads: Sequence[int] = ()
    ) -> torch.nn.Module:
        """One linear of the matrices `names` stacked, `outs` rows each, with their biases.

        heads[i], where given and not 0, is the number of rotated heads in names[i].
        """
        theirs = [self._name(f"{name}.weight") for name in names]
        for name, n in zip(theirs, outs, strict=True):
            _check_shape(self.file.path, name, self.file.info(name).shape, (n, in_features))
        kinds = [self.file.info(name).type for name in theirs]
        rows = [self._order(n, h) for n, h in zip(outs, heads or [0] * len(outs), strict=True)]
        is_quantised = [kind in KINDS for kind in kinds]
        if len(set(kinds)) > 1 and any(is_quantised):
            heads = heads or [0] * len(names)
            parts = zip(names, outs, heads, strict=True)
            return Concat([self.linear([name], [n], in_features, [h]) for name, n, h in parts])
        bias = self._bias(names, outs, rows)
        if all(is_quantised):
            weight = self.file.quantised(theirs, rows)
            return _quant_linear(weight, bias, self.activations).to(self.device)
        stacked = torch.empty(sum(outs), in_features, dtype=self.dtype, device=self.device)
        first = 0
        for name, n, order in zip(theirs, outs, rows, strict=True):
            stacked[first : first + n] = self.file.dense(name, self.dtype, order)
            first += n
        return _dense(stacked, bias)

    def embedding(self, name: str, rows: int, columns: int) -> torch.nn.Module:
        """The embedding `name`, [rows, columns]."""
        return _embedding(self.linear([name], [rows], columns), self.dtype)

    def _order(self, n: int, heads: int) -> Tensor | None:
        """The rows of theirs in our order."""
        if not self.interleaved or not heads:
            return None
        return half_split(n, heads)

    def _bias(
        self, names: Sequence[str], outs: Sequence[int], rows: Sequence[Tensor | None]
    ) -> Tensor | None:
        if not any(self.has(f"{name}.bias") for name in names):
            return None
        parts = [
            self._read(f"{name}.bias", (n,), order)
            if self.has(f"{name}.bias")
            else torch.zeros(n, dtype=self.dtype)
            for name, n, order in zip(names, outs, rows, strict=True)
        ]
        return torch.cat(parts).to(self.device)


def _check_shape(where: Path, name: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(f"{where}: tensor {name} has shape {list(got)}, not {list(wanted)}")
