"""Launch configurations measured on this GPU, for the tables of kernels/_tune.py.

The kernels that an op launches at a benchmark's shape are tuned one by one, from the heuristic's
configuration: each parameter in turn takes every value that the kernel's space has for it, the
fastest stays, until a turn changes nothing.  A candidate is checked by the tolerance rule, gradients
too, before it is timed.  The winner replaces the heuristic's if, in rounds of one run, it is faster
in four of five.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from tilewright.bench import harness
from tilewright.bench.correctness import check, expected
from tilewright.bench.facts import facts
from tilewright.bench.timing import interleaved, spread

Call = Callable[[], object]
Timer = Callable[[dict[str, Call], float], dict[str, list[float]]]  # rivals, seconds -> samples
CANDIDATE_SECONDS, FINAL_SECONDS = 0.02, 0.3


class Tuned(NamedTuple):
    """One bucket's result."""

    kernel: str
    bucket: str
    config: dict[str, int]
    microseconds: float
    heuristic_microseconds: float
    tried: int
    refused: int  # candidates that did not compile, did not fit, or were wrong


def _timer(rivals: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    return interleaved(rivals, seconds=seconds)


def _neighbours(config: dict[str, int], space: list[dict[str, int]]) -> Iterator[list[dict]]:
    """For each parameter, the configurations that differ from `config` in it alone."""
    for name in config:
        rest = {key: value for key, value in config.items() if key != name}
        yield [
            c for c in space if c != config and {k: v for k, v in c.items() if k != name} == rest
        ]


def search(tunable: Any, key: tuple, call: Call, right: Call, timer: Timer = _timer) -> Tuned:
    """The best configuration of one kernel at one key.

    `call` runs the op; `right` raises AssertionError where its results are wrong.
    """

    def under(config: dict[str, int]) -> Call:
        def run() -> object:
            with tunable.forced(config):
                return call()

        return run

    seconds: dict[tuple, float] = {}

    def measure(config: dict[str, int]) -> float:
        at = tuple(config.values())
        if at not in seconds:
            try:
                with tunable.forced(config):
                    right()
                samples = timer({"candidate": under(config)}, CANDIDATE_SECONDS)["candidate"]
                seconds[at] = spread(samples).p50
            except Exception:  # whatever Triton, ptxas or the tolerance have against it
                seconds[at] = inf
        return seconds[at]

    heuristic = best = tunable.heuristic(*key)
    space, changed = tunable.space(*key), True
    if measure(best) == inf:
        right(), call()  # the heuristic's own fault is an error, not a candidate refused
    while changed:
        changed = False
        for index in range(len(best)):
            line = list(_neighbours(best, space))[index]
            fastest = min(line, key=measure, default=best)
            if measure(fastest) < measure(best):
                best, changed = fastest, True
    rivals = {"best": under(best), "heuristic": under(heuristic)}
    samples = timer(rivals, FINAL_SECONDS)
    ratios = [b / h for b, h in zip(samples["best"], samples["heuristic"], strict=True)]
    if spread(ratios).p80 >= 1:
        best, samples["best"] = heuristic, samples["heuristic"]
    micro = {name: spread(times).p50 * 1e6 for name, times in samples.items()}
    return Tuned(
        tunable.name, tunable.bucket(*key), best, micro["best"], micro["heuristic"],
        len(seconds), sum(t == inf for t in seconds.values()),
    )  # fmt: skip


def _launched(tunables: dict[str, Any], call: Call) -> dict[str, list[tuple]]:
    """The keys each kernel was launched with, by one call."""
    for tunable in tunables.values():
        tunable.made.clear()
    call()
    return {
        name: [tuple(key) for _, *key in tunable.made]
        for name, tunable in tunables.items()
        if tunable.made
    }


def _each(tunables: dict[str, Any], call: Call) -> Iterator[tuple[str, list[tuple]]]:
    """What _launched finds of one call, whichever way it goes: the kernels of each way, while that is forced, and
    at the end the choices between ways."""
    ways = {n: keys for n, keys in _launched(tunables, call).items() if tunables[n].is_way}
    spaces = [tunables[name].space(*keys[0]) for name, keys in ways.items()]
    for chosen in product(*spaces):
        with ExitStack() as stack:
            for name, config in zip(ways, chosen, strict=True):
                stack.enter_context(tunables[name].forced(config))
            for name, keys in _launched(tunables, call).items():
                if name not in ways:
                    yield name, keys
    yield from ways.items()


def tune(
    definition: ModuleType,
    folder: Path,
    *,
    shapes: dict[str, dict[str, Any]] | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    again: bool = False,
    deadline: float = inf,
    timer: Timer = _timer,
) -> Iterator[Tuned]:
    """Tune the kernels an op launches, forward and backward, writing each result as it is found.

    Buckets that folder's tables have are passed over, unless `again`.  Ends when time.monotonic()
    passes `deadline`, between two buckets.
    """
    from tilewright.kernels._tune import TUNABLES, gpu_name

    fn, eager = definition.PROVIDERS["tilewright"], definition.PROVIDERS["eager"]
    gpu = gpu_name(torch.device(harness.device()))
    done: set[tuple[str, str]] = set()
    for sizes in (shapes or definition.SHAPES).values():
        for dtype in dtypes or definition.DTYPES:
            inputs = definition.inputs(dtype, harness.device(), **sizes)
            for mode in harness.modes(inputs):
                grad = mode != "fwd"
                call = (harness.forward_backward if grad else harness.forward)(fn, inputs)
                call()  # imports the kernels
                wanted = None
                for name, keys in _each(TUNABLES, call):
                    tunable = TUNABLES[name]
                    # a kernel launched at two keys in one call cannot be forced at one
                    if len(keys) > 1 or (name, tunable.bucket(*keys[0])) in done:
                        continue
                    if time.monotonic() > deadline:
                        return
                    done.add((name, tunable.bucket(*keys[0])))
                    path = tunable.path(gpu, folder)
                    if not again and tunable.bucket(*keys[0]) in _table(path)["buckets"]:
                        continue
                    wanted = wanted or expected(eager, inputs, grad)

                    def right(inputs=inputs, dtype=dtype, grad=grad, wanted=wanted) -> None:
                        check(fn, inputs, dtype, grad, wanted)

                    found = search(tunable, keys[0], call, right, timer)
                    write(path, gpu, found, definition)
                    tunable.forget()
                    yield found


def _table(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"buckets": {}}


def write(path: Path, gpu: str, found: Tuned, definition: ModuleType) -> None:
    """Add a result to its table, whole or not at all."""
    assert definition.__file__ is not None
    about = facts(Path(definition.__file__).parent)
    buckets = _table(path)["buckets"]
    buckets[found.bucket] = {
        "config": found.config,
        "microseconds": round(found.microseconds, 2),
        "heuristic_microseconds": round(found.heuristic_microseconds, 2),
    }
    kept = ("torch", "triton", "tilewright", "commit", "date")
    table = {"gpu": gpu, "kernel": found.kernel, **{name: about[name] for name in kept}}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(
        json.dumps(table | {"buckets": dict(sorted(buckets.items()))}, indent=1) + "\n"
    )
    draft.replace(path)
