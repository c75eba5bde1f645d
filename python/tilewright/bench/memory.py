"""How much memory one call needs beside what is there already."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], object]) -> int:
    """What one call adds to the memory allocated through torch, at its height."""
    return _on_cuda(fn) if torch.cuda.is_available() else _on_cpu(fn)


def _on_cuda(fn: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what C++ prints to stderr: the profiler announces each start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _on_cpu(fn: Callable[[], object]) -> int:
    """The running sum of what torch's allocator took and gave back, as its profiler saw it."""
    with _silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fn()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    height = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        height += event.nbytes()
        peak = max(peak, height)
    return peak
