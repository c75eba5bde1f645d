"""benchmarks/bench_moe_training.py: a small mixture trains on our kernels as on the references."""

from pathlib import Path

import pytest
import torch

from tilewright.bench import harness
from tilewright.testing import assert_within

bench = harness.load(Path(__file__).parent.parent / "benchmarks/bench_moe_training.py")
STEPS = 40


@pytest.fixture(scope="module")
def runs():
    return {balanced: bench.train(STEPS, balanced=balanced) for balanced in (True, False)}


def test_it_learns(runs):
    for run in runs.values():
        assert run.losses[-5:].mean() < 0.7 * run.losses[0]


def test_as_its_eager_twin_does():
    """The first steps, before rounding parts the two."""
    ours, eager, truth = (
        bench.train(4, balanced=True, **how).losses.double()
        for how in ({}, {"eager": True}, {"eager": True, "dtype": torch.float64})
    )
    assert_within(ours, eager, truth, torch.finfo(torch.float32).eps, "losses")


def test_the_losses_balance(runs):
    busiest = {balanced: run.counts.max(1).values.sum() for balanced, run in runs.items()}
    assert busiest[True] < busiest[False]
    tokens = STEPS // 10 * bench.BATCH * bench.LENGTH
    for run in runs.values():
        assert run.counts.sum(1).tolist() == [tokens * bench.TAKEN] * bench.LAYERS


def test_repeats_to_the_bit(runs):
    again = bench.train(STEPS, balanced=True)
    assert torch.equal(again.losses, runs[True].losses)
    assert torch.equal(again.counts, runs[True].counts)
