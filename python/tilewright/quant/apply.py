"""Modules quantised in place: their linear layers become nn.QuantLinear, mixtures' experts nn.QuantExperts, and
embeddings, where they are to, nn.QuantEmbedding.

What gptq, awq and smoothquant need of a layer's inputs, `Inputs` gathers as the module runs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright import nn
from tilewright.quant import _experts, quantisers
from tilewright.quant_tensor import SCALE_DTYPES, QuantTensor, activations_for

METHODS = ("rtn", "gptq", "awq", "hqq", "smoothquant")
WITH_INPUTS = ("gptq", "awq", "smoothquant")


@dataclass(frozen=True)
class QuantConfig:
    """How weights are quantised.  Raises ValueError where settings do not go together.

    method: rtn, gptq, awq, hqq, or smoothquant (8 bits by row, inputs rounded to int8 as they come)
    bits: 4 or 8; 0 is the method's: 8 for smoothquant, else 4
    group: columns that share a scale, -1 for a whole row; it must divide every layer's inputs; 0 is the
        method's: -1 for smoothquant, else 128
    symmetric: no zero-points; hqq has none such; None is the method's: True but for hqq
    act_order, damping: gptq's
    skip: ends of the names of layers, and of mixtures' experts, that stay as they are
    embeddings: 4 or 8 bits for embeddings, by rtn, and for what is tied to one, a head, whatever `skip` says of
        that; 0 leaves both as they are
    """

    method: str = "rtn"
    bits: int = 0
    group: int = 0
    symmetric: bool = None  # type: ignore[assignment]
    act_order: bool = False
    damping: float = 0.01
    scale_dtype: torch.dtype = torch.float16
    skip: tuple[str, ...] = ("lm_head",)
    embeddings: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"quantize: method {self.method!r} is none of {', '.join(METHODS)}")
        by_row = self.method == "smoothquant"
        for name, own in (("bits", 8 if by_row else 4), ("group", -1 if by_row else 128)):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, own)
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.method != "hqq")
        if self.bits not in (4, 8):
            raise ValueError(f"quantize: bits must be 4 or 8, not {self.bits}")
        if self.group < 1 and self.group != -1:
            raise ValueError(
                f"quantize: group must be 1 or more, or -1 for a row, not {self.group}"
            )
        if self.bits == 4 and self.group > 0 and self.group % 2:
            raise ValueError(f"quantize: group must be even for 4 bits, not {self.group}")
        if not 0 <= self.damping < torch.inf:
            raise ValueError(f"quantize: damping must be 0 or more, not {self.damping}")
        if by_row and (self.bits, self.group, self.symmetric) != (8, -1, True):
            told = f"{self.bits} bits, group {self.group}, symmetric {self.symmetric}"
            raise ValueError(f"quantize: smoothquant takes 8 bits by row, symmetric, not {told}")
        if self.method == "hqq" and self.symmetric:
            raise ValueError("quantize: hqq has zero-points: symmetric must be False")
        if self.act_order and self.method != "gptq":
            raise ValueError(f"quantize: act_order is gptq's, not {self.method}'s")
        if self.embeddings not in (0, 4, 8):
            raise ValueError(f"quantize: embeddings must be 0, 4 or 8 bits, not {self.embeddings}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"quantize: scale_dtype {self.scale_dtype} is none of {SCALE_DTYPES}")

    @property
    def activations(self) -> str:
        """nn.QuantLinear's option."""
        return "int8_token" if self.method == "smoothquant" else "float"


class Fold(NamedTuple):
    """Layers that share their inputs, by name, and what divides these by factors [K] where they come from."""

    layers: tuple[str, ...]
    divide: Callable[[Tensor], None]


class Inputs:
    """Of the inputs [..., K] of layers: the sum of x xᵀ (where asked for), and of each input the mean and the
    maximum of |x|."""

    def __init__(self, hessian: bool) -> None:
        self.wants_hessian = hessian
        self.hessian: Tensor | None = None
        self.total: Tensor | None = None
        self.largest: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        size = rows.abs()
        if self.total is None or self.largest is None:
            self.total, self.largest = size.sum(0), size.amax(0)
        else:
            self.total += size.sum(0)
            self.largest = torch.maximum(self.largest, size.amax(0))
        if self.wants_hessian:
            product = rows.t() @ rows
            self.hessian = product if self.hessian is None else self.hessian.add_(product)
        self.count += len(rows)

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x|, [K]."""
        assert self.total is not None, "no input was added"
        return self.total / self.count


def embeddings(module: torch.nn.Module, skip: Sequence[str] = ()) -> dict[str, torch.nn.Embedding]:
    """The embeddings of a module by name, but those whose names end in one of `skip`."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is torch.nn.Embedding and not name.endswith(tuple(skip))
    }


def linears(module: torch.nn.Module, skip: Sequence[str] = ()) -> dict[str, torch.nn.Linear]:
    """The linear layers of a module by name, but those whose names end in one of `skip`, and those that are tied
    to an embedding, whose weight is not theirs to change."""
    tied = {id(layer.weight) for layer in embeddings(module).values()}
    return {
        name: layer
        for name, layer in module.named_modules()
        if type(layer) is torch.nn.Linear
        and not name.endswith(tuple(skip))
        and id(layer.weight) not in tied
    }


def check(layers: Mapping[str, torch.nn.Linear], config: QuantConfig) -> None:
    """Raises ValueError, with the layer's name, where its inputs do not divide into config's groups."""
    for name, layer in layers.items():
        _check_groups(name, layer.in_features, config.bits, config.group)


def _check_groups(name: str, K: int, bits: int, group: int) -> None:
    size = K if group == -1 else group
    if K % size:
        raise ValueError(f"quantize: {name}: groups of {group} do not divide {K} inputs")
    if bits == 4 and size % 2:
        raise ValueError(f"quantize: {name}: groups of {size} inputs of 4 bits end within a byte")


def check_experts(name: str, experts: nn.Experts, config: QuantConfig) -> None:
    """Raises ValueError, with their name, where experts do not take config."""
    if config.method in WITH_INPUTS:
        raise ValueError(
            f"quantize: {name}: experts are quantised by rtn or hqq, not {config.method}, unless skip names them"
        )
    for matrix, weight in _experts.matrices(name, experts).items():
        _check_groups(matrix, weight.shape[-1], config.bits, config.group)


def _check_embeddings(found: Mapping[str, torch.nn.Embedding], config: QuantConfig) -> None:
    for name, layer in found.items():
        _check_groups(name, layer.embedding_dim, config.embeddings, config.group)
        if layer.max_norm is not None:
            raise ValueError(
                f"quantize: {name}: max_norm {layer.max_norm} changes the weight as it is read"
            )
        check_finite(name, layer.weight)


def check_finite(name: str, weight: Tensor) -> None:
    """Raises ValueError, with the layer's name, where its weight is not."""
    if not bool(weight.isfinite().all()):
        raise ValueError(f"quantize: {name}: its weight holds nan or infinity")


def put(
    module: torch.nn.Module, name: str, weight: QuantTensor, activations: str = "float"
) -> nn.QuantLinear:
    """nn.QuantLinear of weight in the place of the module's linear layer, whose bias it takes over.  Raises
    ValueError where the weight is of another shape."""
    layer = module.get_submodule(name)
    assert isinstance(layer, torch.nn.Linear)
    shape = (layer.out_features, layer.in_features)
    if weight.shape != shape:
        raise ValueError(f"quantize: {name}: a weight {list(weight.shape)} is not {list(shape)}")
    new = nn.QuantLinear(weight, activations=activations_for(weight, activations))
    new.bias = layer.bias
    _put(module, name, new)
    return new


def put_experts(
    module: torch.nn.Module, name: str, gate_up_proj: QuantTensor, down_proj: QuantTensor
) -> None:
    """nn.QuantExperts of these weights in the place of the module's nn.Experts, whose biases it takes over."""
    experts = module.get_submodule(name)
    assert isinstance(experts, nn.Experts)
    _put(module, name, _experts.of(experts, gate_up_proj, down_proj))


def _put(module: torch.nn.Module, name: str, new: torch.nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    new.train(module.get_submodule(name).training)
    setattr(module.get_submodule(parent), last, new)


def _put_everywhere(module: torch.nn.Module, made: dict[torch.nn.Module, torch.nn.Module]) -> None:
    """Modules in the places of others, by these: in all of them, where one has several."""
    for parent in list(module.modules()):
        for last, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, last, made[child].train(child.training))


@torch.no_grad()
def embedded(name: str, weight: Tensor, config: QuantConfig) -> QuantTensor:
    """An embedding's weight [V, E] by config.  Raises ValueError, with its name, where it does not take config."""
    try:
        return quantisers.rtn(
            weight, bits=config.embeddings, group=config.group, symmetric=config.symmetric,
            scale_dtype=config.scale_dtype,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _replace_embeddings(
    module: torch.nn.Module, weights: Mapping[str, QuantTensor], activations: str
) -> None:
    """The module's embeddings of these names by nn.QuantEmbedding; one that shares another's parameter shares its
    weight, and so does a linear layer, a head."""
    first: dict[int, nn.QuantEmbedding] = {}  # by the parameter
    made: dict[torch.nn.Module, torch.nn.Module] = {}
    found = embeddings(module)
    for name, weight in weights.items():
        layer = found[name]
        made[layer] = new = nn.QuantEmbedding(
            first.get(id(layer.weight), weight), dtype=layer.weight.dtype, padding_idx=layer.padding_idx
        )  # fmt: skip
        first.setdefault(id(layer.weight), new)
    for linear in module.modules():
        if type(linear) is torch.nn.Linear and id(linear.weight) in first:
            tied = first[id(linear.weight)]
            head = nn.QuantLinear(tied, activations=activations_for(tied.weight, activations))
            head.bias = linear.bias
            made[linear] = head
    _put_everywhere(module, made)


@torch.no_grad()
def gather(
    module: torch.nn.Module, config: QuantConfig, run: Callable[[], Any], folds: Iterable[Fold] = ()
) -> dict[str, Inputs]:
    """What each linear layer sees while `run()` runs; the sum of x xᵀ where gptq or a fold of awq's needs it.
    Raises ValueError, with the layer's name, where one sees nothing."""
    found: dict[str, Inputs] = {}
    folded = {one.layers[0] for one in folds} if config.method == "awq" else set()
    with ExitStack() as stack:
        for name, layer in linears(module, config.skip).items():
            seen = found[name] = Inputs(hessian=config.method == "gptq" or name in folded)
            handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0]))
            stack.callback(handle.remove)
        run()
    for name, seen in found.items():
        if not seen.count:
            raise ValueError(f"quantize: {name} saw no input: the calibration does not reach it")
    return found


def quantised(weight: Tensor, config: QuantConfig, seen: Inputs | None) -> QuantTensor:
    """weight [N, K] by config; what awq and smoothquant change beforehand is changed already."""
    common: dict[str, Any] = {
        "bits": config.bits,
        "group": config.group,
        "scale_dtype": config.scale_dtype,
    }
    if config.method == "hqq":
        return quantisers.hqq(weight, **common)
    if config.method == "gptq":
        if seen is None or seen.hessian is None:
            raise ValueError(
                "quantize: gptq needs what the layer sees: the calibration does not reach it"
            )
        return quantisers.gptq(
            weight, seen.hessian, symmetric=config.symmetric, act_order=config.act_order,
            damping=config.damping, **common,
        )  # fmt: skip
    return quantisers.rtn(weight, symmetric=config.symmetric, **common)


@torch.no_grad()
def quantised_experts(name: str, weight: Tensor, config: QuantConfig) -> QuantTensor:
    """Experts' weight [E, N, K] by config, each expert's alone, as one [E N, K]."""
    return _experts.stacked(name, weight, lambda w: quantised(w, config, None))


@torch.no_grad()
def fold(
    module: torch.nn.Module, config: QuantConfig, seen: dict[str, Inputs], folds: Iterable[Fold]
) -> None:
    """awq's and smoothquant's factors, into the layers and what is before them; not where one of the layers is
    skipped, whose weight cannot take its own."""
    layers = linears(module, config.skip)
    for one in folds:
        if any(name not in layers for name in one.layers):
            continue
        weights = [layers[name].weight for name in one.layers]
        inputs = seen[one.layers[0]]
        if config.method == "awq":
            assert inputs.hessian is not None  # gather's, by the same folds
            factors = quantisers.awq(
                weights, inputs.hessian, inputs.magnitude, lambda w: quantised(w, config, None)
            )
        else:
            assert inputs.largest is not None
            factors = quantisers.smoothquant(weights, inputs.largest)
        one.divide(factors)
        for weight in weights:
            weight.mul_(factors.to(weight.dtype))


@torch.no_grad()
def replace(module: torch.nn.Module, config: QuantConfig, seen: dict[str, Inputs]) -> None:
    """The module's linear layers by nn.QuantLinear and its nn.Experts by nn.QuantExperts.  Raises ValueError, with the
    layer's name, where one does not take config, before any is replaced."""
    made: dict[str, QuantTensor] = {}
    for name, layer in linears(module, config.skip).items():
        try:
            weight = quantised(layer.weight, config, seen.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made[name] = weight
    replaced: dict[torch.nn.Module, torch.nn.Module] = {}
    for name, experts in _experts.stacks(module, config.skip).items():
        matrices = _experts.matrices(name, experts).items()
        replaced[experts] = _experts.of(
            experts, *(quantised_experts(matrix, weight, config) for matrix, weight in matrices)
        )
    for name, weight in made.items():
        old = module.get_submodule(name)
        replaced[old] = put(module, name, weight, config.activations)
    _put_everywhere(module, replaced)


def quantize_(
    model: torch.nn.Module,
    config: QuantConfig,
    calibration: Iterable[Any] | None = None,
    folds: Sequence[Fold] = (),
) -> torch.nn.Module:
    """model with its linear layers and nn.Experts quantised, in place, and its embeddings where config says so.

    calibration: what the model is called with, one after another (a tuple's parts, a mapping's by name), which
    gptq, awq and smoothquant need.  folds say where awq's and smoothquant's factors go; without one they
    change nothing but the rounding.  What gptq and awq gather is K² floats a layer of K inputs, at once; a
    model too large for that is quantised layer by layer (`tilewright quantize`).  Experts are quantised by rtn and
    hqq, each expert alone.  Raises ValueError where a layer does not take config or is not reached, or a fold names
    none, before any is changed; and where experts are of another library, or would need a calibration, and skip does
    not name them.
    """
    alone = {torch.nn.Linear: "linear layer", torch.nn.Embedding: "embedding"}.get(type(model))
    if alone is not None:
        raise ValueError(f"quantize: the model is one {alone}: give the module that holds it")
    layers = linears(model, config.skip)
    known = {name for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}
    check(layers, config)
    for name, layer in layers.items():
        check_finite(name, layer.weight)
    for name, experts in _experts.stacks(model, config.skip).items():
        check_experts(name, experts, config)
        for matrix, weight in _experts.matrices(name, experts).items():
            check_finite(matrix, weight)
    found = embeddings(model, config.skip) if config.embeddings else {}
    if config.embeddings and not found:
        raise ValueError(
            f"quantize: embeddings of {config.embeddings} bits: the model has no torch.nn.Embedding"
            " that is not skipped"
        )
    _check_embeddings(found, config)
    made = {name: embedded(name, layer.weight, config) for name, layer in found.items()}
    for one in folds:
        unknown = [name for name in one.layers if name not in known]
        if unknown:
            raise ValueError(f"quantize: a fold names {', '.join(unknown)}, no linear layers")
    seen: dict[str, Inputs] = {}
    if config.method in WITH_INPUTS:
        if calibration is None:
            raise ValueError(f"quantize: {config.method} needs a calibration")

        def run() -> None:
            for given in calibration:
                if isinstance(given, Mapping):
                    model(**given)
                else:
                    model(*(given if isinstance(given, tuple) else (given,)))

        seen = gather(model, config, run, folds)
    if config.method in ("awq", "smoothquant"):
        fold(model, config, seen, folds)
        if folds:  # into embeddings too, where these are what is before
            made = {name: embedded(name, layer.weight, config) for name, layer in found.items()}
    replace(model, config, seen)
    _replace_embeddings(model, made, config.activations)
    return model
