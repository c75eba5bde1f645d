"""Whether a forward of ours computes what a module's own does: both run on a small stand-in for it.

The stand-in is of the module's class, with its settings and with drawn weights, on the CPU in float32, wherever and
in whatever form the module's own weights are.  So a family needs no entry in a list of names, and one whose layer
differs in one line is found out.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALL, INNER = 16, 24  # features where a layer's own number of them does not matter
TORCHS = frozenset(vars(torch.nn.Module()))  # what torch keeps in every module
HOOKS = frozenset({"forward", "_hf_hook", "_old_forward"})  # accelerate's


class Probe(NamedTuple):
    """A trial of one module.

    inputs, named: of a call, by place and by name.  shapes: of parameters, and linears: of linear children (out, in),
    where they are not the module's own.  settings: attributes that say those shapes.
    """

    inputs: tuple[Any, ...] = ()
    named: Mapping[str, Any] = {}
    shapes: Mapping[str, tuple[int, ...]] = {}
    linears: Mapping[str, tuple[int | None, int | None]] = {}
    settings: Mapping[str, Any] = {}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normals from a generator of their own: nobody else's numbers change."""
    with torch.device("cpu"):
        return torch.randn(
            shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed)
        )


def tokens(count: int, features: int) -> Tensor:
    """Of many sizes, so that what is clamped, or small beside an eps, shows."""
    x = drawn(count, features, seed=7)
    return x * torch.logspace(-3, 1, count, device="cpu")[:, None]


def is_linear(module: torch.nn.Module) -> bool:
    """A linear layer of any library: quantised, adapted."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def stand_in(module: torch.nn.Module, probe: Probe) -> torch.nn.Module:
    """A module of the same class and settings in evaluation, its weights drawn and of probe's shapes."""
    twin = type(module).__new__(type(module))
    torch.nn.Module.__init__(twin)
    own = {k: v for k, v in vars(module).items() if k not in TORCHS | HOOKS}
    vars(twin).update(own | {k: v for k, v in probe.settings.items() if k in own})
    if "config" in own:
        config = copy.copy(own["config"])
        for kind in ("attn", "experts"):
            name = f"_{kind}_implementation_internal"
            if name in vars(config):
                vars(config)[name] = "eager"
        vars(twin)["config"] = config
    for at, (name, parameter) in enumerate(module._parameters.items()):
        drew = None
        if parameter is not None:
            drew = torch.nn.Parameter(drawn(*probe.shapes.get(name, parameter.shape), seed=at))
        twin.register_parameter(name, drew)
    for at, (name, buffer) in enumerate(module._buffers.items()):
        if buffer is not None:
            buffer = drawn(*buffer.shape, seed=50 + at).to(dtype=buffer.dtype)
        twin.register_buffer(name, buffer)
    for at, (name, child) in enumerate(module._modules.items()):
        if child is not None and is_linear(child):
            out, into = probe.linears.get(name, (None, None))
            child = _linear(child, out, into, seed=100 + 2 * at)
        elif child is not None:
            child = stand_in(child, Probe())
        twin.register_module(name, child)
    return twin.eval()


def _linear(like: Any, out: int | None, into: int | None, seed: int) -> torch.nn.Linear:
    out, into = out or like.out_features, into or like.in_features
    biased = getattr(like, "bias", None) is not None
    twin = torch.nn.utils.skip_init(
        torch.nn.Linear, into, out, bias=biased, device="cpu", dtype=torch.float32
    )
    twin.weight = torch.nn.Parameter(drawn(out, into, seed=seed) / into**0.5)
    if biased:
        twin.bias = torch.nn.Parameter(drawn(out, seed=seed + 1))
    return twin


def difference(ours: Any, theirs: Any) -> float:
    """The greatest error of a row of ours, in sqrt(eps) of the row's greatest element; inf where kinds differ.

    Rounding is a small part of 1, a difference of meaning more.
    """
    if isinstance(theirs, tuple) and isinstance(ours, tuple) and len(ours) == len(theirs):
        return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
        return 0.0 if ours is None and theirs is None else torch.inf
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return torch.inf
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else torch.inf
    if theirs.numel() == 0:
        return 0.0
    info = torch.finfo(theirs.dtype)
    wrong, most = (t.double().abs().amax(-1) for t in (ours - theirs, theirs))
    found = (wrong / (most * info.eps**0.5 + info.tiny)).max().item()
    return found if found == found else torch.inf


def trial(
    module: torch.nn.Module,
    forward: Callable,
    probe: Probe,
    told: Callable[[Any], Any] = lambda outputs: outputs,
) -> tuple[float, str]:
    """How far forward is from module's own, by what told makes of their outputs, and why it may not stand for it;
    "" where it may.
    """
    found = 0.0
    for dtype, training in (
        (torch.float32, False), (torch.bfloat16, False), (torch.float32, True),
    ):  # fmt: skip
        results = []
        for what, each in (("tried", type(module).forward), ("met by our kernels", forward)):
            # whatever a stranger's code raises on a stand-in is a reason to leave it alone, and is told
            try:
                twin = stand_in(module, probe).to(dtype).train(training)
                results.append(told(_called(each, twin, probe)))
            except Exception as error:
                return torch.inf, f"its forward cannot be {what}: {type(error).__name__}: {error}"
        found = max(found, difference(*reversed(results)))
    return found, "" if found <= 1 else "its forward computes something else"


def _called(forward: Callable, twin: torch.nn.Module, probe: Probe) -> Any:
    """What it gives; where it drops, by the same numbers each time, and nobody else's change."""
    dtype = next((t.dtype for t in (*twin.parameters(), *twin.buffers())), torch.float32)
    named = {name: _cast(x, dtype) for name, x in probe.named.items()}
    with torch.random.fork_rng(devices=()), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.default_generator.manual_seed(0)
        return forward(twin, *_cast(probe.inputs, dtype), **named)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """A copy of every tensor in x, floats in dtype."""
    if isinstance(x, tuple):
        return tuple(_cast(each, dtype) for each in x)
    if not isinstance(x, Tensor):
        return x
    return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()
