"""attention's dropout: the reference's draws, forward and backward, and what they look like."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tilewright import _op, ops, reference
from tilewright.reference.attention import keeps
from tilewright.testing import assert_matches_reference, run

fwd = torch.ops.tilewright.attention_fwd.default
bwd = torch.ops.tilewright.attention_bwd.default
OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "everything": {"causal": True, "window": (30, -1), "softcap": 2.0, "scale": 0.2},
}


def drawn(device: str, B: int, H: int, G: int, S: int, T: int, D: int) -> list[Tensor]:
    shapes = (B, H, S, D), (B, G, T, D), (B, G, T, D)
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


def check(inputs, dtype, **options):
    def seeded(attend):
        def call(*inputs):
            torch.manual_seed(11)
            return attend(*inputs, **options)

        return call

    ours, theirs = (seeded(side.attention_with_lse) for side in (ops, reference))
    assert_matches_reference(ours, theirs, *inputs, dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("S", [3, 70], ids=["decode", "blocked"])
def test_matches_reference(S, options, dtype, device):
    # eight heads share their keys: of a key that few queries see the gradient's rounding is luck
    check(drawn(device, 1, 8, 1, S, 90, 24), dtype, dropout_p=0.2, **options)


@pytest.mark.parametrize("S", [3, 70], ids=["decode", "blocked"])
def test_all_dropped(S, dtype, device):
    inputs = drawn(device, 2, 4, 2, S, 90, 24)
    check(inputs, dtype, dropout_p=1.0, causal=True)
    assert not ops.attention(*inputs, dropout_p=1.0).any()


def test_with_a_bias_and_sinks(dtype, device):
    def call(side):
        def f(q, k, v, bias, sinks):
            torch.manual_seed(5)
            return side.attention(q, k, v, bias=bias, sinks=sinks, dropout_p=0.3, causal=True)

        return f

    bias = torch.randn(4, 40, 60, device=device, requires_grad=True)
    sinks = torch.linspace(-1, 3, 4, device=device).requires_grad_()
    inputs = (*drawn(device, 2, 4, 2, 40, 60, 16), bias, sinks)
    assert_matches_reference(call(ops), call(reference), *inputs, dtype=dtype)


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_varlen(dropout_p, dtype, device):
    """By places in the pack: sequences alike drop otherwise."""
    starts = torch.tensor([0, 20, 20, 63], device=device)
    q = torch.randn(70, 4, 16, device=device, requires_grad=True)
    k, v = (torch.randn(70, 2, 16, device=device, requires_grad=True) for _ in range(2))

    def given(attend):
        def call(q, k, v):
            torch.manual_seed(7)
            return attend(q, k, v, starts, causal=True, dropout_p=dropout_p)

        return call

    ours, theirs = (given(side.attention_varlen_with_lse) for side in (ops, reference))
    assert_matches_reference(ours, theirs, q, k, v, dtype=dtype)
    with pytest.raises(ValueError, match="attention_varlen: dropout_p must be from 0 to 1, not 2"):
        ops.attention_varlen(q, k, v, starts, dropout_p=2)


def test_each_call_draws_anew(device):
    inputs = [x.detach() for x in drawn(device, 1, 2, 2, 40, 40, 16)]
    torch.manual_seed(0)
    first, second = (ops.attention(*inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = ops.attention(*inputs, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.random.get_rng_state()
    assert torch.equal(ops.attention(*inputs, dropout_p=0.0), ops.attention(*inputs))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_draws_look_like_draws():
    """Shares within five sigma of 1 - p: over all, by row, by key, of neighbours alike, of seeds alike."""
    rows, T = 700, 900
    for p in (0.1, 0.5, 0.9):
        kept = [keeps(torch.tensor([seed]), rows, T, p).double() for seed in (3, 4, 2**40, -1)]
        for x in kept:
            assert abs(float(x.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / (rows * T))
            for axis, n in ((0, rows), (1, T)):
                worst = (x.mean(axis) - (1 - p)).abs().max()
                assert float(worst) < 5.5 * math.sqrt(p * (1 - p) / n)
        both = [(kept[0], x) for x in kept[1:]]
        both += [(kept[0][1:], kept[0][:-1]), (kept[0][:, 1:], kept[0][:, :-1])]
        both += [(kept[0][i:], kept[1][: rows - i]) for i in (1, 2, 5)]
        for a, b in both:
            alike = float((a * b).mean())
            share = (1 - p) ** 2
            assert abs(alike - share) < 6 * math.sqrt(share * (1 - share) / a.numel())


def test_a_checkpoint_draws_the_same(device):
    inputs = drawn(device, 1, 2, 1, 40, 40, 16)

    def f(q, k, v):
        return ops.attention(q, k, v, dropout_p=0.4)

    torch.manual_seed(2)
    expected = run(f, inputs, {})
    torch.manual_seed(2)
    found = run(lambda *x: checkpoint(f, *x, use_reentrant=False), inputs, {})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.triton
@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_opcheck(S, device):
    assert _op.serves("attention", torch.empty(0, device=device))
    q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, S, 33, 16))
    seed = torch.tensor([9], device=device)
    options = (None, None, None, None, None, seed, -1, -1, 0, 0.0, 0.25, 0.3)
    torch.library.opcheck(fwd, (q, k, v, *options))
    torch.library.opcheck(bwd, (torch.randn_like(q), None, q, k, v, *options, False))


def test_compiles_fullgraph(device):
    inputs = drawn(device, 1, 4, 2, 20, 20, 16)
    f = torch.compile(
        lambda q, k, v: ops.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    first, second = f(*inputs), f(*inputs)
    assert first.isfinite().all() and not torch.equal(first, second)
    dout = torch.randn_like(first)
    *_, dv = torch.autograd.grad(first, inputs, dout)
    # out is linear in v, by what the forward has drawn
    torch.testing.assert_close((inputs[2] * dv).sum((1, 2, 3)), (first * dout).sum((1, 2, 3)))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5, math.nan])
def test_bad_input(dropout_p, device):
    with pytest.raises(ValueError, match="attention: dropout_p must be from 0 to 1, not"):
        ops.attention(*drawn(device, 1, 2, 1, 5, 5, 8), dropout_p=dropout_p)
