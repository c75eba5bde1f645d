"""attention's window, softcap, sinks and log-sum-exp against the reference, forward and backward."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from tilewright import _op, ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

# B, H, G, S, T, D: every blocked kernel loops twice, decode takes more than one chunk.  T > S, and four
# heads a key: where a row sees two keys, or one row a key, how far its gradient cancels decides the error,
# ours and eager's alike.
SHAPES = {
    "prefill": (1, 4, 1, 80, 90, 24),
    "cached_prefill": (1, 4, 1, 20, 75, 40),
    "decode": (1, 8, 2, 3, 150, 32),
    "blind_rows": (1, 4, 1, 60, 40, 16),
}
OPTIONS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (25, -1)},
    "window_of_more_than_a_tile": {"window": (66, 0)},
    "both_sides": {"window": (12, 7)},
    "ahead": {"window": (-1, 20)},
    "softcap": {"causal": True, "softcap": 1.5},
    "softcap_full": {"softcap": 50.0},
    "sinks": {"causal": True, "sinks": True},
    "sinks_full": {"sinks": True},
    "everything": {"causal": True, "window": (30, -1), "softcap": 2.0, "sinks": True, "scale": 0.2},
}
fwd = torch.ops.tilewright.attention_fwd.default
bwd = torch.ops.tilewright.attention_bwd.default


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, device=device, requires_grad=True)


def drawn(device: str, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    B, H, G, S, T, D = shape
    return (
        leaf(B, H, S, D, device=device),
        leaf(B, G, T, D, device=device),
        leaf(B, G, T, D, device=device),
    )


def with_sinks(attention, **options):
    return lambda q, k, v, sinks: attention(q, k, v, sinks=sinks, **options)


def assert_matches(name: str, inputs, options: dict, dtype: torch.dtype) -> None:
    ours, theirs = getattr(ops, name), getattr(reference, name)
    options = dict(options)
    if options.pop("sinks", False):
        # beside q and k of ones, so that a sink takes about a tenth, or nearly all
        H = inputs[0].shape[1]
        sinks = torch.linspace(-1, 6, H, device=inputs[0].device).requires_grad_()
        inputs = (*inputs, sinks)
        ours, theirs, options = with_sinks(ours, **options), with_sinks(theirs, **options), {}
    assert_matches_reference(ours, theirs, *inputs, dtype=dtype, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(shape, options, dtype, device):
    if shape == SHAPES["blind_rows"]:
        # of thirty draws one where no row of a key and a sink all but cancels
        torch.manual_seed(24)
    assert_matches("attention_with_lse", drawn(device, shape), options, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_without_lse(options, dtype, device):
    assert_matches("attention", drawn(device, (1, 4, 2, 25, 40, 16)), options, dtype)


@pytest.mark.parametrize("options", ["window", "everything"])
def test_strides(options, dtype, device):
    """Of one projection's output, and a cache with NaN in what is not used yet."""
    x = torch.randn(2, 60, 16 * 24, device=device)
    parts = x.split([8 * 24, 4 * 24, 4 * 24], dim=-1)
    q, k, v = (p.unflatten(-1, (-1, 24)).transpose(1, 2) for p in parts)
    q = q[:, :, 20:]
    leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
    assert_matches("attention", leaves, OPTIONS[options], dtype)
    cache = torch.full((2, 2, 4, 99, 32), torch.nan, device=device, dtype=dtype)
    kwargs = {"causal": True, "window": (7, -1), "softcap": 3.0}
    q, k, v = (t.detach().to(dtype) for t in (q, k, v))
    views = tuple(c[:, :, 11:71, 5:29].copy_(y) for c, y in zip(cache, (k, v), strict=True))
    assert torch.equal(ops.attention(q, *views, **kwargs), ops.attention(q, k, v, **kwargs))


@pytest.mark.parametrize("S", [6, 60], ids=["decode", "blocked"])
def test_a_window_of_one_key_is_exact(S, device):
    """P = 1: out is v, and nothing but v has a gradient."""
    q, k, v = drawn(device, (1, 4, 2, S, 70, 16))
    out = ops.attention(q, k, v, window=(0, 0))
    assert torch.equal(out, v[:, :, -S:].repeat_interleave(2, 1))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not dq.any() and not dk.any() and dv[:, :, -S:].all() and not dv[:, :, :-S].any()


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_limits_that_hide_nothing_are_none(S, device):
    q, k, v = (t.detach() for t in drawn(device, (1, 4, 2, S, 37, 24)))
    expected = ops.attention(q, k, v)
    for window in ((-1, -1), (36, S - 1), (10**12, 10**12)):
        assert torch.equal(ops.attention(q, k, v, window=window), expected)


@pytest.mark.parametrize("S", [7, 60], ids=["decode", "blocked"])
@pytest.mark.parametrize("sink", [False, True], ids=["no_sink", "sink"])
def test_rows_that_see_nothing(S, sink, device):
    q, k, v = drawn(device, (1, 4, 2, S, 3, 16))
    sinks = leaf(4, device=device) if sink else None
    out, lse = ops.attention_with_lse(q, k, v, causal=True, sinks=sinks)
    blind = S - 3
    assert not out[:, :, :blind].any() and out[:, :, blind:].all()
    expected = sinks[None, :, None].expand(1, 4, blind) if sink else torch.tensor(-torch.inf)
    expected = expected.detach().to(lse).expand(1, 4, blind)
    torch.testing.assert_close(lse[:, :, :blind], expected, rtol=2e-7, atol=0)
    dq, dk, dv = torch.autograd.grad((out.sum(), lse[:, :, blind:].sum()), (q, k, v))
    assert not dq[:, :, :blind].any() and dk.isfinite().all() and dv.isfinite().all()
    if sink:
        (dsinks,) = torch.autograd.grad(
            ops.attention_with_lse(q, k, v, causal=True, sinks=sinks)[1][:, :, :blind].sum(), sinks
        )
        assert torch.equal(dsinks, torch.full_like(dsinks, blind))


@pytest.mark.parametrize("S", [7, 60], ids=["decode", "blocked"])
def test_rows_that_see_nothing_but_a_sink_of_nothing(S, device):
    inputs = drawn(device, (1, 4, 2, S, 3, 16))
    sinks = torch.full((4,), -torch.inf, device=device, requires_grad=True)
    out, lse = ops.attention_with_lse(*inputs, causal=True, sinks=sinks)
    assert not out[:, :, : S - 3].any() and (lse[:, :, : S - 3] == -torch.inf).all()
    for grad in torch.autograd.grad((out.sum(), lse[:, :, S - 3 :].sum()), (*inputs, sinks)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("S", [2, 20], ids=["decode", "blocked"])
def test_sinks_that_are_no_sinks(S, device):
    """At -inf a sink takes nothing; beside scores of -1000 it takes all."""
    q, k, v = (t.detach() for t in drawn(device, (1, 4, 2, S, 37, 16)))
    none = torch.full((4,), -torch.inf, device=device)
    assert torch.equal(
        ops.attention(q, k, v, causal=True, sinks=none), ops.attention(q, k, v, causal=True)
    )
    q, k = torch.full_like(q, 16.0), torch.full_like(k, -16.0)
    out, lse = ops.attention_with_lse(q, k, v, sinks=torch.zeros(4, device=device))
    assert not out.any() and not lse.any()


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_lse_far_from_nought(S, shift, device):
    """Below -88 and above 88, where e^lse is no float32: a sink, and keys as far."""
    q, k, v = (t.detach() for t in drawn(device, (1, 4, 2, S, 40, 16)))
    q[..., 0], k[..., 0] = 16.0, shift / 4
    sinks = torch.full((4,), shift, device=device)
    inputs = [t.requires_grad_() for t in (q, k, v, sinks)]
    assert_matches_reference(
        with_sinks(ops.attention_with_lse),
        with_sinks(reference.attention_with_lse),
        *inputs,
        dtype=torch.float32,
    )


def test_parts_merge_into_the_whole(device):
    """lse is what softmaxes over disjoint keys are weighed by."""
    q, k, v = (t.detach() for t in drawn(device, (1, 4, 2, 30, 90, 16)))
    parts = [ops.attention_with_lse(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 31), (31, 90))]
    _, lse = ops.attention_with_lse(q, k, v)
    weights = torch.stack([part[1] for part in parts]).double().softmax(0)
    merged = sum(w[..., None] * part[0] for w, part in zip(weights, parts, strict=True))
    q, k, v = (t.double() for t in (q, k, v))
    truth, eager = (
        reference.attention(*(t.to(kind) for t in (q, k, v))).double()
        for kind in (torch.float64, torch.float32)
    )
    assert_within(merged, eager, truth, torch.finfo(torch.float32).eps, "merged")
    sums = torch.logsumexp(torch.stack([part[1] for part in parts]).double(), 0)
    truth, eager = (
        reference.attention_with_lse(*(t.to(kind) for t in (q, k, v)))[1].double()
        for kind in (torch.float64, torch.float32)
    )
    for found in (sums, lse.double()):
        assert_within(found, eager, truth, torch.finfo(torch.float32).eps, "lse")


def test_a_gradient_of_lse_alone(device):
    q, k, v = drawn(device, (1, 8, 2, 60, 60, 16))
    _, lse = ops.attention_with_lse(q, k, v, causal=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    assert dq.any() and dk.any() and (dv is None or not dv.any())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_in_float64(options, device):
    """The formulas against differences: in float64, where the reference serves."""
    options = dict(options)
    shapes = ((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 4), *([(2,)] if options.get("sinks") else []))
    inputs = [
        torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes
    ]
    named = options.pop("sinks", False)

    def f(q, k, v, sinks=None):
        return ops.attention_with_lse(q, k, v, sinks=sinks if named else None, **options)

    assert torch.autograd.gradcheck(f, inputs)


def test_repeats_to_the_bit(dtype, device):
    inputs = [t.detach().to(dtype).requires_grad_() for t in drawn(device, (2, 4, 2, 50, 70, 16))]
    sinks = torch.randn(4, device=device).requires_grad_()
    f = with_sinks(ops.attention_with_lse, window=(20, 3), softcap=5.0)
    first = run(f, [*inputs, sinks], {})
    for _ in range(3):
        again = run(f, [*inputs, sinks], {})
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("layout", ["plain", "permuted", "decode", "empty"])
def test_opcheck(layout, device):
    assert _op.serves("attention", torch.empty(0, device=device))
    B, S, T = {"decode": (2, 1, 140), "empty": (2, 0, 7)}.get(layout, (2, 10, 13))
    q, k, v = (t.detach() for t in drawn(device, (B, 4, 2, S, T, 16)))
    sinks, dlse = torch.randn(4, device=device), torch.randn(B, 4, S, device=device)
    dout = torch.randn(q.shape, device=device)
    if layout == "permuted":
        q, k, v, dout = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dout))
        dlse = dlse.mT.contiguous().mT
    options = (sinks, None, None, None, None, None, 3, 1, 0, 2.0, 0.25, 0.0)
    torch.library.opcheck(fwd, (q, k, v, *options))
    torch.library.opcheck(bwd, (dout, dlse, q, k, v, *options, False))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic, device):
    def f(q, k, v, sinks):
        return ops.attention_with_lse(
            q, k, v, causal=True, window=(9, -1), softcap=3.0, sinks=sinks
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S, T in itertools.product((1, 20), (20, 33)):
        inputs = [*drawn(device, (1, 2, 1, S, T, 16)), leaf(2, device=device)]
        for ours, eager in zip(run(compiled, inputs, {}), run(f, inputs, {}), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sinks_keep_their_dtype(kind, device):
    q, k, v = drawn(device, (1, 4, 2, 9, 9, 16))
    sinks = torch.randn(4, dtype=kind, device=device, requires_grad=True)
    out, lse = ops.attention_with_lse(q, k, v, sinks=sinks)
    (grad,) = torch.autograd.grad((out.sum(), lse.sum()), sinks)
    assert grad.dtype == kind and out.dtype == lse.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        out, lse = ops.attention_with_lse(q, k, v, sinks=sinks)
        spec = reference.attention_with_lse(q, k, v, sinks=sinks)
    assert (out.dtype, lse.dtype) == tuple(t.dtype for t in spec) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (-2, 0)}, "window \\(-2, 0\\)"),
        ({"softcap": 0.0}, "softcap must be above 0, not 0.0"),
        ({"softcap": -1.0}, "not -1.0"),
        ({"softcap": math.nan}, "not nan"),
        ({"sinks": torch.zeros(3)}, "sinks \\(3,\\)"),
        ({"sinks": torch.zeros(4, 1)}, "sinks \\(4, 1\\)"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks .* on meta"),
        ({"sinks": torch.zeros(4, dtype=torch.long)}, "torch.int64"),
    ],
)
def test_bad_input(options, message, device):
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        ops.attention(*drawn(device, (1, 4, 2, 5, 5, 8)), **options)


@pytest.mark.parametrize(("D", "Dv"), [(24, 16), (16, 40), (192, 128)])
@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_values_of_another_width(D, Dv, S, dtype, device):
    q, k, _ = drawn(device, (1, 4, 2, S, 60, D))
    _, _, v = drawn(device, (1, 4, 2, S, 60, Dv))
    if S == 1:  # of one query a key's gradient is one product, which cancels as luck has it
        q, k, v = (x.detach() for x in (q, k, v))
    options = {"causal": True, "window": (30, -1)}
    check_all = ops.attention_with_lse, reference.attention_with_lse
    assert_matches_reference(*check_all, q, k, v, dtype=dtype, **options)
    out = ops.attention(q, k, v, **options)
    assert out.shape == (1, 4, S, Dv)
    packed = [x[0].transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
    cu = [torch.tensor([0, n], device=device) for n in (S, 60)]
    found = ops.attention_varlen(*packed, *cu, **options)
    assert torch.equal(found.transpose(0, 1)[None], out)


def test_widths_past_the_kernels_run_the_reference(device):
    q, k, _ = drawn(device, (1, 2, 1, 5, 9, 16))
    _, _, v = drawn(device, (1, 2, 1, 5, 9, 300))
    assert torch.equal(ops.attention(q, k, v), reference.attention(q, k, v))


def test_on_meta_gives_shapes():
    q, k, v = (torch.empty(1, 4, 9, 16, device="meta") for _ in range(3))
    lengths = torch.empty(1, dtype=torch.int32, device="meta")
    for out in (ops.attention(q, k, v, causal=True), ops.attention_decode(q, k, v, lengths)):
        assert out.shape == q.shape and out.device.type == "meta"
