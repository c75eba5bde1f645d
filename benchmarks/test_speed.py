"""The ops' definitions under pytest-benchmark, each provider at each case, forward:

    pytest benchmarks --benchmark-group-by=group -k "rms_norm and decode"

`tilewright bench` writes the record; this is for pytest-benchmark's own tables, comparisons and storage.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewright.bench import harness
from tilewright.bench.correctness import verified
from tilewright.bench.timing import clock

DEFINITIONS = [d for d in harness.discover(Path(__file__).parent) if hasattr(d, "OP")]


def cases() -> Iterator[Any]:
    for definition in DEFINITIONS:
        for shape in definition.SHAPES:
            for dtype in definition.DTYPES:
                for provider in definition.PROVIDERS:
                    case = f"{definition.OP} {shape} {str(dtype).removeprefix('torch.')}"
                    mark = pytest.mark.benchmark(group=case, timer=clock)
                    yield pytest.param(
                        definition, shape, dtype, provider, id=f"{case} {provider}", marks=mark
                    )


@pytest.mark.parametrize("definition, shape, dtype, provider", cases())
def test_speed(definition, shape, dtype, provider, benchmark):
    inputs = harness.drawn(definition, shape, dtype)
    torch.compiler.reset()
    wrong = verified(harness.chosen(definition, [provider]), inputs, dtype, grad=False)
    benchmark.extra_info["outside_tolerance"] = wrong[provider]
    moved, flops = definition.cost(dtype, **definition.SHAPES[shape])
    benchmark.extra_info |= {"bytes": moved, "flops": flops}
    benchmark(harness.forward(definition.PROVIDERS[provider], inputs))
