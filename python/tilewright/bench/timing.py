"""Rivals timed in turns, so that a slow moment of the machine falls on all of them alike.

On a GPU a sample is one call between two events on the stream, after the L2 cache was overwritten
and queued while the device sleeps: the device's time, whatever the host took to launch it.  On a
CPU it is the mean of as many calls as last a millisecond, caches warm.
"""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

SAMPLE_SECONDS = 1e-3  # a sample is as many calls as last this long: far above the clock's grain
L2_BYTES = 256 << 20  # more than any GPU's L2
SLEEP_CYCLES = 1_000_000  # about half a millisecond, in which the host queues a whole call
MMAP_BYTES = 32 << 20  # of a buffer, from which glibc makes each a fresh mmap, whatever it is told
QUEUED = 20  # calls in a row whose launching alone is timed: less than a stream's queue holds


class Spread(NamedTuple):
    """The 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """Percentiles of at least one sample."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Spread(cuts[1], statistics.median(samples), cuts[7])


def keep_pages() -> bool:
    """From now on glibc keeps what a process frees below MMAP_BYTES; whether it is glibc, and does.

    Left alone it gives the top of its heap back to the system and takes it again, with a fault a page, or
    not, by what else the process happens to hold: the same code takes twice as long in one run as in the
    next.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(mmap_threshold, MMAP_BYTES)) and bool(mallopt(trim_threshold, -1))


def clock() -> float:
    """Seconds, once the device has done all it was given: a timer for pytest-benchmark."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def call_seconds(fn: Callable[[], object]) -> float:
    """Median seconds the host spends in one call, not waiting for the device."""
    fn(), fn()
    samples = []
    for _ in range(QUEUED):
        clock()
        start = time.perf_counter()
        for _ in range(QUEUED):
            fn()
        samples.append((time.perf_counter() - start) / QUEUED)
    return statistics.median(samples)


def _cpu_sample(fn: Callable[[], object], calls: int) -> float:
    """Mean seconds a call, after two untimed ones, which fault in this one's own pages."""
    fn(), fn()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def _cuda_sample(fn: Callable[[], object], flush: torch.Tensor) -> float:
    """Seconds of one call on the device, its L2 cold."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    fn()
    flush.zero_()
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    fn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    rivals: Mapping[str, Callable[[], object]], *, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds a call of each rival, one sample a round; a round times every one of them in turn.

    Rounds go on for about `seconds`, `least` of them at any rate; each round starts with another
    rival.  On a CPU the process keeps its pages from then on.
    """
    names, on_cuda = list(rivals), torch.cuda.is_available()
    if not on_cuda:
        keep_pages()
    calls: dict[str, int] = {}
    for name, fn in rivals.items():
        fn()  # the first call compiles; the sample's settles
        if not on_cuda:
            calls[name] = max(1, round(SAMPLE_SECONDS / max(_cpu_sample(fn, 1), 1e-7)))
    flush = torch.empty(
        L2_BYTES if on_cuda else 0, dtype=torch.uint8, device="cuda" if on_cuda else "cpu"
    )
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < least or time.perf_counter() < end:
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            fn = rivals[name]
            sample = _cuda_sample(fn, flush) if on_cuda else _cpu_sample(fn, calls[name])
            samples[name].append(sample)
        turn += 1
    return samples
