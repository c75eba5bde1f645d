"""Quantisers: what they promise of the error, on matrices whose inputs are correlated and of unlike sizes."""

import pytest
import torch
from torch import Tensor

from tilewright import ops, reference
from tilewright.quant import gptq as files
from tilewright.quant.quantisers import awq, gptq, hqq, rtn, smoothquant
from tilewright.quant_tensor import QuantTensor
from tilewright.testing import assert_matches_reference

N, K = 48, 256


def drawn(outliers: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """w [N, K], inputs [512, K] and their hessian."""
    w = torch.randn(N, K) * torch.rand(N, 1).add(0.5)
    x = torch.randn(512, 40) @ torch.randn(40, K) + 0.3 * torch.randn(512, K)
    x *= torch.where(torch.rand(K) < 0.05, outliers, 1.0)
    return w, x, x.t() @ x


def lost(w: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    e = (rounded - w).double()
    return float(((e @ hessian.double()) * e).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_rtn(bits, group, symmetric):
    """No worse than the grid of the whole range, of which a code is half a step away at most."""
    w, _, _ = drawn()
    q = rtn(w, bits=bits, group=group, symmetric=symmetric)
    assert q.shape == w.shape and q.bits == bits and q.symmetric == symmetric
    assert q.group == (K if group == -1 else group)
    groups = w.unflatten(1, (-1, q.group))
    low, high = (
        groups.amin(-1, keepdim=True).clamp(max=0),
        groups.amax(-1, keepdim=True).clamp(min=0),
    )
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    # rounding of a uniform error: a twelfth of a step squared; and scales are float16
    whole = (span / ((1 << bits) - 1)).square() / 12
    error = (q.dequantize().unflatten(1, (-1, q.group)) - groups).square().mean(-1, keepdim=True)
    assert float(error.sum()) <= 1.1 * float(whole.sum())


def test_rtn_of_nothing_and_of_one_value():
    for value in (0.0, 1.5, -2.0, 1e-9):
        w = torch.full((4, 32), value)
        for symmetric in (True, False):
            q = rtn(w, group=32, symmetric=symmetric)
            lost = (q.dequantize() - w).abs()
            if abs(value) < 2**-24:  # float16 has no step so small
                assert bool((lost == abs(value)).all())
            else:  # the largest weight has a code, but for its scale's rounding to float16
                assert bool((lost <= abs(value) * 2**-11).all())


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_loses_less_than_rtn(group, symmetric, act_order):
    w, x, H = drawn(10.0)
    q = gptq(w, H, group=group, symmetric=symmetric, act_order=act_order)
    assert (q.order is not None) == (act_order and group != -1)
    rounded = rtn(w, group=group, symmetric=symmetric).dequantize()
    assert lost(w, q.dequantize(), H) < 0.6 * lost(w, rounded, H)
    assert_matches_reference(
        lambda x: ops.quant_linear(x, q), lambda x: reference.quant_linear(x, q), x,
        dtype=torch.float32,
    )  # fmt: skip
    if q.order is not None:  # as a file gives it back
        settings = {
            "bits": 4,
            "group_size": group,
            "sym": symmetric,
            "checkpoint_format": "gptq_v2",
        }
        assert torch.equal(files.read(files.write(q), settings).order, q.order)


def test_gptq_rounds_as_rtn_where_inputs_are_alike():
    """Where H is a number times the identity no column can make up for another."""
    w, _, _ = drawn()
    found = gptq(w, 3 * torch.eye(K), group=64)
    assert torch.equal(found.qweight, rtn(w, group=64).qweight)


def test_gptq_of_inputs_that_are_always_0():
    w, x, _ = drawn()
    x[:, [3, 77]] = 0
    q = gptq(w, x.t() @ x, group=32)
    assert not q.dequantize()[:, [3, 77]].any() and q.dequantize().isfinite().all()


@pytest.mark.parametrize("damping", [0.01, 0.0])
def test_gptq_of_few_inputs(damping):
    """A hessian of rank 5 takes more damping."""
    w, x, _ = drawn()
    few = x[:5]
    H = few.t() @ few
    found = gptq(w, H, damping=damping).dequantize()
    assert lost(w, found, H) < lost(w, rtn(w).dequantize(), H)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_gptq_whatever_the_inputs_size(size):
    """Half of the inputs always 0, the others of any size: damping is a share of theirs."""
    w, x, _ = drawn()
    x[:, ::2] = 0
    H = (size * x).t() @ (size * x)
    w[:, ::2] = 0
    assert lost(w, gptq(w, H).dequantize(), H) < 0.6 * lost(w, rtn(w).dequantize(), H)


def test_hqq_loses_less_than_rounding():
    w, _, _ = drawn()
    w[::3, ::16] *= 6  # outliers
    q = hqq(w, group=64)
    assert not q.symmetric and not torch.equal(q.zeros, q.zeros.round())
    groups = w.unflatten(1, (-1, 64))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    plain = (((groups / scale + zero).round().clamp(0, 15) - zero) * scale).flatten(1)

    def norm(rounded: Tensor) -> float:
        return float((rounded - w).abs().pow(0.7).sum())

    assert norm(q.dequantize()) < 0.97 * norm(plain)


def test_hqq_of_weights_that_are_almost_alike():
    """Their zero-points would be more than float16 holds."""
    w = 1 + 1e-5 * torch.randn(4, 64)
    q = hqq(w)
    assert q.zeros.isfinite().all()
    assert float((q.dequantize() - w).abs().max()) <= float(q.scales.max())


def test_awq_finds_factors_that_help():
    w, x, H = drawn(20.0)

    def quantise(w: Tensor) -> QuantTensor:
        return rtn(w, group=64)

    factors = awq([w, w[:7]], H, x.abs().mean(0), quantise)
    assert factors.shape == (K,) and bool((factors > 0).all())
    scaled = quantise(w * factors).dequantize() / factors
    assert lost(w, scaled, H) < 0.8 * lost(w, quantise(w).dequantize(), H)


def test_smoothquant_evens_out():
    """Eight bits of a row of inputs each and of a row of weights: the product's error falls."""
    w, x, _ = drawn(50.0)
    factors = smoothquant([w], x.abs().amax(0))

    def product(w: Tensor, x: Tensor) -> Tensor:
        step = x.abs().amax(1, keepdim=True) / 127
        return ((x / step).round() * step) @ rtn(w, bits=8, group=-1).dequantize().t()

    truth = x @ w.t()
    before, after = product(w, x) - truth, product(w * factors, x / factors) - truth
    assert float(after.square().sum()) < 0.5 * float(before.square().sum())
    exact = (x.double() / factors) @ (w.double() * factors).t()
    torch.testing.assert_close(exact, x.double() @ w.double().t())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: rtn(torch.ones(4, 30), group=8), "rtn: groups of 8 do not divide 30 columns"),
        (lambda: rtn(torch.ones(4, 32), bits=3), "rtn: bits must be 4 or 8, not 3"),
        (lambda: rtn(torch.ones(4)), r"rtn: w must be a float matrix, not torch.float32 \[4\]"),
        (lambda: hqq(torch.full((4, 64), torch.nan)), "hqq: w holds nan or infinity"),
        (lambda: gptq(torch.ones(4, 128), torch.eye(64)), r"gptq: hessian \[64, 64\] does not fit"),
        (
            lambda: gptq(torch.ones(4, 128), -torch.eye(128)),
            r"gptq: hessian \[128, 128\] is not positive definite",
        ),
        (
            lambda: awq([torch.ones(2, 8)], torch.eye(9), torch.ones(9), rtn),
            r"awq: hessian \[9, 9\], magnitude \[9\] do not fit weights \[\[2, 8\]\]",
        ),
        (
            lambda: rtn(torch.full((2, 32), 1e6), group=32),
            "row 0, group 0 are too large, or too alike",
        ),
        (lambda: gptq(torch.ones(4, 128), torch.eye(128), damping=-1), "damping must be 0 or more"),
        (lambda: smoothquant([torch.ones(2, 8)], torch.ones(9)), "smoothquant: weights"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
