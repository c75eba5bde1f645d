"""quantization_config=TilewrightConfig(...) for the models of transformers: their linear layers as nn.QuantLinear.

transformers builds a model on the meta device and fills it tensor by tensor.  A layer stays torch.nn.Linear
until its tensors are there, and becomes nn.QuantLinear then: of a float weight by rounding it, of a quantised
folder by reading what lies there.  So which layers are quantised and how is what the tensors say, and a layer
that a folder lacks is initialised as any other.
"""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tilewright import nn
from tilewright.interop.transformers import NAME
from tilewright.quant import apply, checkpoint
from tilewright.quant.apply import WITH_INPUTS, QuantConfig
from tilewright.quant_tensor import ACTIVATIONS, NAMES, QuantTensor, check_order

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"TilewrightConfig needs transformers 5.0 or newer: {error}") from error

# of from_pretrained, that say which folder is meant
HUB = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "revision", "subfolder",
    "token", "trust_remote_code",
)  # fmt: skip


@register_quantization_config(NAME)
class TilewrightConfig(QuantizationConfigMixin):
    """How from_pretrained quantises, and what config.json says of a folder that save_pretrained wrote.

    bits, group, method, symmetric, scale_dtype (a dtype or its name) are quant.apply.QuantConfig's; method is
    rtn or hqq, which need no calibration, or None: the layers are quantised already.
    modules_to_not_convert: ends of layers' names, or names of modules whose layers stay as they are; by default
    lm_head and what else the model has for output embeddings.  activations is nn.QuantLinear's.  Layers with a tied weight always stay, and those
    that transformers keeps in float32.
    Raises ValueError where settings do not go together.
    """

    def __init__(
        self,
        bits: int = 4,
        group: int = 128,
        method: str | None = "rtn",
        symmetric: bool | None = None,
        *,
        scale_dtype: str | torch.dtype = "float16",
        modules_to_not_convert: Sequence[str] | None = None,
        activations: str = "float",
        source: dict[str, Any] | None = None,
        quant_method: str = NAME,
    ) -> None:
        """source is load_quantized's: the quantization_config of a folder in another format."""
        if quant_method != NAME:
            raise ValueError(f"TilewrightConfig: quant_method must be {NAME}, not {quant_method!r}")
        if method in WITH_INPUTS:
            raise ValueError(
                f"TilewrightConfig: method {method!r} needs a calibration: make a folder with `tilewright"
                f" quantize --method {method}` and read it with load_quantized"
            )
        skip = modules_to_not_convert
        if skip is not None and (
            isinstance(skip, str) or not all(isinstance(name, str) and name for name in skip)
        ):
            raise ValueError(
                f"TilewrightConfig: modules_to_not_convert must be names, not {skip!r}"
            )
        self.quant_method = NAME  # type: ignore[assignment]  # transformers' own are an enum
        self.bits, self.group, self.method = bits, group, method
        self.symmetric = method != "hqq" if symmetric is None else symmetric
        self.scale_dtype = str(scale_dtype).removeprefix("torch.")
        if activations not in ACTIVATIONS:
            raise ValueError(
                f"TilewrightConfig: activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}"
            )
        self.activations = activations
        self.modules_to_not_convert = None if skip is None else list(skip)
        self.source = source
        self.settings()

    def settings(self) -> QuantConfig:
        """As quant.apply has them.  Raises ValueError where they do not go together."""
        scale_dtype: Any = getattr(torch, self.scale_dtype, self.scale_dtype)
        return QuantConfig(
            method="rtn" if self.method is None else self.method,
            bits=self.bits,
            group=self.group,
            symmetric=self.symmetric,
            scale_dtype=scale_dtype,
            skip=(),
        )

    def to_dict(self) -> dict[str, Any]:
        """What config.json says; nothing of bits and groups where the layers have their own."""
        said = super().to_dict()
        known = (
            said if self.method is not None else ("quant_method", "method", "activations", "source")
        )
        return {k: said[k] for k in known if k != "source" or said[k] is not None}


@register_quantizer(NAME)
class TilewrightQuantizer(HfQuantizer):
    """What transformers asks for when a model's quantization_config is a TilewrightConfig."""

    requires_calibration = False
    quantization_config: TilewrightConfig

    def __init__(self, quantization_config: TilewrightConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized and quantization_config.method is None:
            raise ValueError("TilewrightConfig: method is None, and the weights are not quantised")
        self.planned: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "TilewrightConfig: device_map puts layers on disk: nn.QuantLinear cannot"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        skip = config.modules_to_not_convert
        if skip is None:
            head = model.get_output_embeddings()
            skip = [*QuantConfig().skip, *(n for n, m in model.named_modules() if m is head)]
        skip = self.get_modules_to_not_convert(model, list(skip), model._keep_in_fp32_modules)
        tied = {key for pair in model.all_tied_weights_keys.items() for key in pair}
        layers = {
            name: layer
            for name, layer in apply.linears(model, skip).items()
            if f"{name}.weight" not in tied and not _within(name, skip)
        }
        self.planned = frozenset(layers)
        if self.pre_quantized:
            return
        apply.check(layers, config.settings())
        if not layers:
            warnings.warn(
                f"TilewrightConfig: {type(model).__name__} has no torch.nn.Linear to quantise",
                stacklevel=2,
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and self._is_planned(param_name)

    def _is_planned(self, param_name: str) -> bool:
        name, _, last = param_name.rpartition(".")
        return last == "weight" and name in self.planned

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes, for device_map="auto"; a byte where the folder's own format says how many bits."""
        config = self.quantization_config
        if not self._is_planned(param_name):
            return super().param_element_size(model, param_name, param)
        if config.method is None:
            return 1.0
        size = param.shape[-1] if config.group == -1 else config.group
        beside = config.settings().scale_dtype.itemsize * (1 if config.symmetric else 2)
        return config.bits / 8 + beside / size

    def get_quantize_ops(self) -> ConversionOps:
        config = self.quantization_config
        return _Quantise(config.settings(), self.planned, config.activations)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        source = self.quantization_config.source
        activations = self.quantization_config.activations
        if source is not None:
            activations = checkpoint.activations(source)
        names = NAMES if source is None else checkpoint.names(source)
        patterns = {rf"\.{re.escape(name)}$": name for name in names}
        read = None if source is None else checkpoint.reader(source)
        return [
            WeightConverter(
                list(patterns), ".weight", operations=[_Read(patterns, read, activations)]
            )
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers asks about the first of the weights that it makes of one tensor: others may be left
        for name in () if self.pre_quantized else self.planned:
            weight = model.get_submodule(name).weight
            if isinstance(weight, Tensor) and getattr(weight, "_is_hf_initialized", False):
                quantised = apply.quantised(weight, self.quantization_config.settings(), None)
                apply.put(model, name, quantised, self.quantization_config.activations)
        for module in model.modules():
            bias = module.bias if isinstance(module, nn.QuantLinear) else None
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                torch.nn.init.zeros_(bias)  # as transformers does a torch.nn.Linear's
        # save_pretrained would undo the reading, and the layers are saved as they are
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            model._weight_conversions = [c for c in conversions if not _is_ours(c)]
        source = self.quantization_config.source
        if source is not None:
            activations = checkpoint.activations(source)
            self.quantization_config = TilewrightConfig(method=None, activations=activations)
            model.config.quantization_config = self.quantization_config
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers, to adapters, norms and embeddings."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


@dataclass
class _Quantise(ConversionOps):
    """A float weight that has been loaded, into a layer."""

    config: QuantConfig
    planned: frozenset[str]
    activations: str

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **told: Any
    ) -> dict[str, Any]:
        rest = {}  # a conversion of the model's may make several weights of one tensor
        for key, found in input_dict.items():
            tensor, name = _only(found), key.removesuffix(".weight")
            if key == name or name not in self.planned:
                rest[key] = tensor
                continue
            weight = apply.quantised(tensor, self.config, None)
            _put(told["model"], name, weight, self.activations, told["missing_keys"])
        return rest


@dataclass
class _Read(ConversionOps):
    """The tensors of a layer in a folder, by pattern; read is None where they are nn.QuantLinear's own."""

    patterns: dict[str, str]
    read: checkpoint.Read | None
    activations: str

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **told: Any
    ) -> dict[str, Any]:
        tensors = {self.patterns[pattern]: _only(found) for pattern, found in input_dict.items()}
        if tensors.keys() == {"weight"} and tensors["weight"].is_floating_point():
            return {told["full_layer_name"]: tensors["weight"]}  # others call their codes weight
        model, name = told["model"], told["full_layer_name"].removesuffix(".weight")
        layer = model.get_submodule(name)
        if type(layer) is not torch.nn.Linear:
            raise ValueError(f"{name} is quantised, and a {type(layer).__name__}, not a Linear")
        if self.read is not None:
            weight = self.read(name, tensors)
        else:
            lacking = [part for part in ("qweight", "scales") if part not in tensors]
            if lacking:
                raise ValueError(f"{name}: {', '.join(lacking)} missing beside {sorted(tensors)}")
            check_order(f"{name}.order", tensors.get("order"))
            weight = QuantTensor.of(tensors, 8 * tensors["qweight"].shape[-1] // layer.in_features)
        _put(model, name, weight, self.activations, told["missing_keys"])
        return {}


def _only(found: Any) -> Tensor:
    return found[0] if isinstance(found, list) else found


def _put(model: Any, name: str, weight: QuantTensor, activations: str, missing_keys: Any) -> None:
    apply.put(model, name, weight, activations)
    # some models initialise a layer's weight by its name: it says that there is nothing to do
    object.__setattr__(weight, "_is_hf_initialized", True)
    missing_keys.discard(f"{name}.weight")


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(f".{module}." in f".{name}." for module in modules)


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(op, _Read) for op in getattr(conversion, "operations", ()))


def load_quantized(path: str | os.PathLike[str], model_class: Any = None, **kwargs: Any) -> Any:
    """The model of a folder in a format that quant.checkpoint reads, its layers as nn.QuantLinear.

    GPTQ, AWQ, compressed-tensors, bitsandbytes and HQQ, without their packages.  model_class is transformers',
    by default AutoModelForCausalLM; kwargs are from_pretrained's.  save_pretrained writes nn.QuantLinear's
    state dict, which from_pretrained reads.  Raises ValueError where the folder is in no such format, or lacks
    a weight of the model.
    """
    transformers = import_module("transformers")
    model_class = transformers.AutoModelForCausalLM if model_class is None else model_class
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    config = transformers.AutoConfig.from_pretrained(path, **hub)
    source = getattr(config, "quantization_config", None)
    if not isinstance(source, dict):
        raise ValueError(f"{path}: config.json has no quantization_config")
    if source.get("quant_method") != NAME:
        try:
            checkpoint.reader(source)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        config.quantization_config = {"quant_method": NAME, "method": None, "source": source}
    model, told = model_class.from_pretrained(
        path, config=config, output_loading_info=True, **kwargs
    )
    missing = sorted(told["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{path}: there is no {', '.join(missing[:3])}{more}")
    return model
