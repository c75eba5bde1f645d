"""Is a provider right on a benchmark's inputs?  The tolerance rule, eager in float64 the truth."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright.testing import assert_within, cast, run


class Expected(NamedTuple):
    """Outputs, then gradients where asked for, in float64: the truth, and what eager makes of it."""

    truth: list[Tensor]
    eager: list[Tensor]


def _run(fn: Callable, inputs: dict[str, Any], grad: bool) -> list[Tensor]:
    """Outputs of fn, and with `grad` gradients, in float64; called just as it is when timed, so that
    what is compiled for the one serves the other."""
    if grad:
        return run(
            lambda *given: fn(**dict(zip(inputs, given, strict=True))), [*inputs.values()], {}
        )
    with torch.no_grad():
        outputs = fn(**inputs)
    return [y.double() for y in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def expected(eager: Callable, inputs: dict[str, Any], grad: bool) -> Expected:
    """What `eager` gives for the inputs, with `grad` the gradients of those that require one too."""
    double = {name: cast(x, torch.float64) for name, x in inputs.items()}
    return Expected(_run(eager, double, grad), _run(eager, inputs, grad))


def check(
    fn: Callable, inputs: dict[str, Any], dtype: torch.dtype, grad: bool, wanted: Expected
) -> None:
    """AssertionError, saying which and by how much, where a result leaves the tolerance."""
    eps = torch.finfo(dtype).eps
    results = zip(_run(fn, inputs, grad), *wanted, strict=True)
    for i, (ours, truth, eager) in enumerate(results):
        assert_within(ours, eager, truth, eps, f"result {i}")


def verified(
    providers: dict[str, Callable], inputs: dict[str, Any], dtype: torch.dtype, grad: bool
) -> dict[str, str | None]:
    """What is wrong with each provider's outputs, and with `grad` its gradients; None: nothing.

    AssertionError where "tilewright"'s are wrong; what an outsider raises is what is wrong with it.
    """
    wanted = expected(providers["eager"], inputs, grad)
    found: dict[str, str | None] = {}
    for name, fn in providers.items():
        try:
            check(fn, inputs, dtype, grad, wanted)
        except Exception as error:  # an outsider's may be anything; ours must be right
            if name == "tilewright":
                raise
            said = (
                str(error)
                if isinstance(error, AssertionError)
                else f"{type(error).__name__}: {error}"
            )
            found[name] = said.splitlines()[0][:200]
        else:
            found[name] = None
    return found
