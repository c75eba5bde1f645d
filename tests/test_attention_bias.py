"""attention's additive bias and its gradient against the reference."""

import math

import pytest
import torch
from torch import Tensor

from tilewright import _op, masks, ops, reference
from tilewright.testing import assert_matches_reference

fwd = torch.ops.tilewright.attention_fwd.default
bwd = torch.ops.tilewright.attention_bwd.default
# of B, H, S, T the bias's shape
SHAPES = {
    "whole": lambda B, H, S, T: (B, H, S, T),
    "shared_by_batches": lambda B, H, S, T: (H, S, T),
    "shared_by_heads": lambda B, H, S, T: (B, 1, S, T),
    "one_for_all": lambda B, H, S, T: (S, T),
    "of_heads_and_keys": lambda B, H, S, T: (H, 1, T),
    "of_keys": lambda B, H, S, T: (B, 1, 1, T),
}
# those that are alike for all keys, which change the log-sum-exp alone
ALIKE = {
    "of_queries": lambda B, H, S, T: (1, H, S, 1),
    "of_heads": lambda B, H, S, T: (H, 1, 1),
    "number": lambda B, H, S, T: (),
}
OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (25, 3)},
    "everything": {"causal": True, "window": (30, -1), "softcap": 2.0, "sinks": True, "scale": 0.2},
}


def drawn(device: str, B: int, H: int, G: int, S: int, T: int, D: int) -> list[Tensor]:
    shapes = (B, H, S, D), (B, G, T, D), (B, G, T, D)
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


def with_bias(attend, sinks=None, **options):
    return lambda q, k, v, bias, *more: attend(
        q, k, v, bias=bias, sinks=more[0] if more else None, **options
    )


def check(inputs, bias, dtype, options=None):
    options = dict(options or {})
    more = ()
    if options.pop("sinks", False):
        more = (torch.linspace(-1, 4, inputs[0].size(1), device=bias.device).requires_grad_(),)
    ours, theirs = (with_bias(side.attention_with_lse, **options) for side in (ops, reference))
    assert_matches_reference(ours, theirs, *inputs, bias, *more, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(shape, dtype, device):
    B, H, S, T = sizes = 2, 4, 50, 75
    bias = torch.randn(shape(*sizes), device=device, requires_grad=True)
    check(drawn(device, B, H, 2, S, T, 24), bias, dtype)


@pytest.mark.parametrize("shape", ALIKE.values(), ids=ALIKE.keys())
def test_alike_for_all_keys(shape, dtype, device):
    """Its gradient is lse's own: the output's share cancels, to rounding, which no rule can bound."""
    B, H, S, T = sizes = 2, 4, 50, 75
    inputs = [x.detach().to(dtype) for x in drawn(device, B, H, 2, S, T, 24)]
    bias = torch.randn(shape(*sizes), device=device, requires_grad=True)
    out, lse = ops.attention_with_lse(*inputs, bias=bias)
    plain, plain_lse = ops.attention_with_lse(*inputs)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse + bias.detach().expand(B, H, S, 1)[..., 0])
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (grad,) = torch.autograd.grad((out, lse), bias, (dout, dlse))
    expected = dlse[..., None].sum_to_size(bias.shape)
    # B H S / size rows, whose dP is of float32 whatever the dtype, and cancels
    rows = B * H * S / bias.numel()
    dp = dout.float() @ inputs[2].float().repeat_interleave(2, 1).transpose(-1, -2)
    atol = 4 * math.sqrt(rows) * torch.finfo(torch.float32).eps * float(dp.abs().max())
    torch.testing.assert_close(grad, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_options(S, options, dtype, device):
    """Of eight heads: the sinks' gradient, a number a head, is compared whole."""
    bias = torch.randn(8, S, 90, device=device, requires_grad=True)
    check(drawn(device, 1, 8, 2, S, 90, 16), bias, dtype, options)


@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_options_beside_a_bias_of_keys(S, dtype, device):
    bias = torch.randn(8, 1, 90, device=device, requires_grad=True)
    check(drawn(device, 1, 8, 2, S, 90, 16), bias, dtype, OPTIONS["everything"])


@pytest.mark.parametrize("D", [64, 128, 256])
def test_head_dims(D, device):
    bias = torch.randn(2, 40, 70, device=device, requires_grad=True)
    check(drawn(device, 1, 2, 1, 40, 70, D), bias, torch.float32)


@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_holes(S, dtype, device):
    """What ranges cannot say: -inf anywhere; a row of nothing else; one key; two; below -2.36e38."""
    seen = torch.rand(2, 1, S, 70, device=device) > 0.6
    seen[0, 0, 1] = False
    seen[1, 0, 1:3] = False
    seen[1, 0, 1, [3, 50]] = True
    seen[1, 0, 2, 40] = True
    bias = masks.additive(seen)
    assert bias.dtype == torch.float32 and bias.requires_grad is False
    inputs = drawn(device, 2, 4, 2, S, 70, 16)
    check(inputs, bias.requires_grad_(), dtype)
    out, lse = ops.attention_with_lse(*inputs, bias=bias)
    assert not out[0, :, 1].any() and (lse[0, :, 1] == -torch.inf).all()
    torch.testing.assert_close(out[1, :, 2], inputs[2][1, :, 40].repeat_interleave(2, 0))
    for hidden in (torch.finfo(torch.float32).min, -2.37e38):
        lowest = torch.where(seen, 0.0, hidden)
        assert torch.equal(ops.attention(*inputs, bias=lowest), out)


def test_a_low_bias_of_all_keys_hides_none(device):
    inputs = [x.detach() for x in drawn(device, 1, 2, 1, 20, 33, 16)]
    bias = torch.full((20, 33), -2.3e38, device=device)
    out = ops.attention(*inputs, bias=bias)
    expected = inputs[2].mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, expected)


def test_an_expanded_bias_is_not_laid_out(device):
    """float16 is made float32: of what is in memory."""
    q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, 20, 33, 16))
    bias = torch.randn(20, 33, device=device, dtype=torch.float16)
    whole = bias.expand(2, 4, 20, 33).requires_grad_()
    out = ops.attention(q, k, v, bias=whole)
    assert torch.equal(out, ops.attention(q, k, v, bias=bias))
    (grad,) = torch.autograd.grad(out, whole, torch.randn_like(out))
    assert grad.shape == whole.shape and grad.dtype == torch.float16
    check((q, k, v), bias.float().expand(2, 4, 20, 33).requires_grad_(), torch.float32)
    mask = torch.rand(1, 1, 20, 33, device=device).gt(0.5).expand(2, 4, 20, 33)
    added = masks.additive(mask)
    assert added.shape == mask.shape and added.untyped_storage().nbytes() == 4 * 20 * 33


def test_ranges_too(dtype, device):
    bias = torch.randn(4, 40, 60, device=device, requires_grad=True)
    begin = torch.arange(40, device=device) // 3
    check(drawn(device, 2, 4, 2, 40, 60, 16), bias, dtype, {"ranges": (begin, begin + 30)})


@pytest.mark.parametrize("S", [1, 40], ids=["decode", "blocked"])
def test_alibi(S, device):
    """The slopes of eight heads of the paper, and what they add."""
    bias = masks.alibi(8, 60, device=device)
    assert bias.shape == (8, 1, 60)
    slopes = torch.tensor([2.0**-i for i in range(1, 9)], device=device)
    torch.testing.assert_close(bias[:, 0, 1] - bias[:, 0, 0], slopes)
    assert (bias[:, 0, -1] == 0).all()
    twelve = masks.alibi(12, 2)[:, 0].diff()[:, 0]
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert math.isclose(float(twelve.sum()), sum(expected), rel_tol=1e-6)
    q, k, v = (x.detach() for x in drawn(device, 1, 8, 8, S, 60, 16))
    far = torch.arange(60 - S, 60, device=device)[:, None] - torch.arange(60, device=device)
    whole = -slopes[:, None, None] * far
    found, expected = (ops.attention(q, k, v, causal=True, bias=b) for b in (bias, whole))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64], ids=str)
def test_a_bias_of_its_own_dtype(kind, device):
    inputs = [x.detach() for x in drawn(device, 1, 2, 1, 20, 33, 16)]
    bias = torch.randn(2, 20, 33, device=device, dtype=kind, requires_grad=True)
    expected = ops.attention(*inputs, bias=bias.float())
    out = ops.attention(*inputs, bias=bias)
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert grad.dtype == kind and grad.shape == bias.shape


def test_strides(device):
    inputs = drawn(device, 1, 2, 1, 20, 33, 16)
    bias = torch.randn(33, 2, 40, device=device)[..., ::2].permute(1, 2, 0).requires_grad_()
    check(inputs, bias, torch.float32)
    assert torch.equal(
        ops.attention(*inputs, bias=bias), ops.attention(*inputs, bias=bias.contiguous())
    )


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty(empty, device):
    B, S, T = {"batch": (0, 5, 7), "queries": (2, 0, 7), "keys": (2, 5, 0)}[empty]
    inputs = drawn(device, B, 4, 2, S, T, 16)
    bias = torch.zeros(4, S, T, device=device, requires_grad=True)
    out = ops.attention(*inputs, bias=bias)
    assert out.shape == (B, 4, S, 16) and not out.any()
    (grad,) = torch.autograd.grad(out.sum(), bias)
    assert grad.shape == bias.shape and not grad.any()


@pytest.mark.triton
@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_opcheck(S, device):
    assert _op.serves("attention", torch.empty(0, device=device))
    q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, S, 33, 16))
    bias = torch.randn(4, S, 33, device=device)
    options = (None, bias, None, None, None, None, -1, -1, 0, 0.0, 0.25, 0.0)
    torch.library.opcheck(fwd, (q, k, v, *options))
    for wanted in (False, True):
        torch.library.opcheck(bwd, (torch.randn_like(q), None, q, k, v, *options, wanted))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic, device):
    compiled = torch.compile(
        lambda q, k, v, bias: ops.attention(q, k, v, bias=bias),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for S in (20, 33):
        inputs = drawn(device, 1, 4, 2, S, S, 16)
        bias = torch.randn(4, S, S, device=device, requires_grad=True)
        found, expected = (
            f(*inputs, bias)
            for f in (compiled, lambda q, k, v, bias: ops.attention(q, k, v, bias=bias))
        )
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(out.sum(), (*inputs, bias)) for out in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["made", "parameter"])
def test_compiles_with_a_bias_that_is_no_argument(kind, device):
    """Whose sizes are numbers beside symbols."""
    slopes = torch.nn.Parameter(torch.randn(4, 1, 1, device=device))

    def f(q):
        bias = masks.alibi(4, q.size(2), device=q.device) if kind == "made" else slopes
        return ops.attention(q, q, q, bias=bias)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for S in (20, 40):
        q = torch.randn(2, 4, S, 16, device=device)
        torch.testing.assert_close(compiled(q), f(q))


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(5, 5).long(), "\\(5, 5\\) torch.int64"),
        (torch.zeros(5, 5) > 0, "\\(5, 5\\) torch.bool"),
        (torch.zeros(3, 5, 5), "\\(3, 5, 5\\)"),
        (torch.zeros(5, 4), "\\(5, 4\\)"),
        (torch.zeros(1, 1, 4, 5, 5), "\\(1, 1, 4, 5, 5\\)"),
        (torch.zeros(5, 5, device="meta"), "on meta"),
    ],
)
def test_bad_input(bias, message, device):
    bias = bias if bias.is_meta else bias.to(device)
    with pytest.raises(ValueError, match=f"attention: bias .*{message}"):
        ops.attention(*drawn(device, 2, 4, 2, 5, 5, 8), bias=bias)
