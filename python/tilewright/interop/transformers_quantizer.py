"""quantization_config=TilewrightConfig(...) for the models of transformers: their linear layers as nn.QuantLinear,
their mixtures' experts as nn.QuantExperts.

transformers builds a model on the meta device and fills it tensor by tensor.  A layer stays torch.nn.Linear
until its tensors are there, and becomes nn.QuantLinear then: of a float weight by rounding it, of a quantised
folder by reading what lies there.  So which layers are quantised and how is what the tensors say, and a layer
that a folder lacks is initialised as any other.  Experts are nn.Experts until both their weights are there.
"""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tilewright import nn
from tilewright.interop.experts import own_experts
from tilewright.interop.transformers import NAME
from tilewright.quant import apply, checkpoint
from tilewright.quant.apply import WITH_INPUTS, QuantConfig
from tilewright.quant_tensor import ACTIVATIONS, NAMES

try:
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers import (
        HfQuantizer,
        register_quantization_config,
        register_quantizer,
    )
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from tilewright.interop._conversions import (
        EACH,
        HELD,
        PARTS,
        Quantise,
        Read,
        ReadExperts,
        is_experts,
        is_ours,
    )
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
    lm_head and what else the model has for output embeddings.  A mixture's experts are quantised too, each alone; what
    of them cannot be is warned of.  activations is nn.QuantLinear's.  Layers with a tied weight always stay, and those
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
        self.mixtures: frozenset[str] = frozenset()

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
            if f"{name}.weight" not in tied and not _skipped(name, skip)
        }
        self.planned = frozenset(layers)
        left = own_experts(model, lambda name: not _skipped(name, skip))
        self.mixtures = frozenset(n for n, m in model.named_modules() if isinstance(m, nn.Experts))
        if self.pre_quantized:
            return
        for name, why in left.items():
            warnings.warn(f"TilewrightConfig: {name} stays as it is: {why}", stacklevel=2)
        apply.check(layers, config.settings())
        for name in self.mixtures:
            apply.check_experts(name, model.get_submodule(name), config.settings())
        if not layers and not self.mixtures:
            warnings.warn(
                f"TilewrightConfig: {type(model).__name__} has no torch.nn.Linear to quantise",
                stacklevel=2,
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and self._is_planned(param_name)

    def _is_planned(self, param_name: str) -> bool:
        name, _, last = param_name.rpartition(".")
        return name in self.planned if last == "weight" else last in PARTS and name in self.mixtures

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

    def get_quantize_ops(self) -> Quantise:
        config = self.quantization_config
        return Quantise(config.settings(), self.planned | self.mixtures, config.activations)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        source = self.quantization_config.source
        activations = self.quantization_config.activations
        if source is not None:
            activations = checkpoint.activations(source)
        names = NAMES if source is None else checkpoint.names(source)
        read = None if source is None else checkpoint.reader(source)
        lasts = sorted({name.rpartition(".")[2] for name in self.mixtures})
        # of one tensor's conversions only the first is done
        found: list[tuple[Any, str, Any]] = []
        for last, part in ((last, part) for last in lasts for part in PARTS):
            if read is None:
                patterns = {rf"\.{last}\.{part}\.{re.escape(name)}$": name for name in names}
                found.append((patterns, f".{last}.{part}", Read(patterns, read, activations)))
                continue
            each = {
                rf"\.{last}\.*.{own}\.{re.escape(name)}$": (own, name)
                for own in (own for family in EACH[part] for own in family)
                for name in names
            }
            found.append((each, f".{last}.{part}", ReadExperts(each, part, read)))
        patterns = {rf"\.{re.escape(name)}$": name for name in names}
        found.append((patterns, ".weight", Read(patterns, read, activations)))
        return [WeightConverter(list(of), to, operations=[op]) for of, to, op in found]

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Ours first: the model's own would take the tensors of an expert's weight for the weight."""
        return self.get_weight_conversions() + weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers asks about the first of the weights that it makes of one tensor: others may be left
        for name in () if self.pre_quantized else self.planned:
            weight = model.get_submodule(name).weight
            if isinstance(weight, Tensor) and getattr(weight, "_is_hf_initialized", False):
                quantised = apply.quantised(weight, self.quantization_config.settings(), None)
                apply.put(model, name, quantised, self.quantization_config.activations)
        for name, module in model.named_modules():
            if HELD in vars(module):
                raise ValueError(
                    f"{name}: of the experts' weights only {', '.join(vars(module)[HELD])} is quantised"
                )
            bias = module.bias if isinstance(module, nn.QuantLinear) else None
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                torch.nn.init.zeros_(bias)  # as transformers does a torch.nn.Linear's
            if isinstance(module, nn.QuantExperts):
                module.requires_grad_(False)  # biases that came after their weights
        # save_pretrained would undo the reading, and the layers are saved as they are
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            mixtures = any(isinstance(m, nn.QuantExperts) for m in model.modules())
            model._weight_conversions = [
                c for c in conversions if not (is_ours(c) or (mixtures and is_experts(c)))
            ]
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


def _skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether skip has an end of a module's name, or the name of one that it is within."""
    return any(f".{each}." in f".{name}." or name.endswith(each) for each in skip)


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
