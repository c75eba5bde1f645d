"""Rivals timed in turns, so that a slow moment of the machine falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

SAMPLE_SECONDS = 1e-3  # a sample is as many calls as last this long: far above the clock's grain


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _sample(fn: Callable[[], object], calls: int) -> float:
    """Mean seconds a call, after two untimed ones: the first makes the allocator trim what the rival
    before left, the second faults in this one's own pages."""
    fn(), fn()
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    _wait()
    return (time.perf_counter() - start) / calls


def interleaved(
    rivals: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5
) -> dict[str, float]:
    """Median seconds a call of each rival over rounds that time every one of them in turn.

    Rounds go on for about `seconds`, `least` of them at any rate; each round starts with another
    rival.  Caches are left warm.
    """
    names = list(rivals)
    calls = {}
    for name, fn in rivals.items():
        fn()  # the first call compiles; _sample's settles
        calls[name] = max(1, round(SAMPLE_SECONDS / max(_sample(fn, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < least or time.perf_counter() < end:
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            samples[name].append(_sample(rivals[name], calls[name]))
        turn += 1
    return {name: statistics.median(times) for name, times in samples.items()}
