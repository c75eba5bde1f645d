"""attention against its reference, as an operator, under compile, autocast and odd memory layouts."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import _native, _op, ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

# B, H, G, S, T, D.  A CPU tile is 48 rows by 48 keys, a decode chunk 128 keys; a GPU tile at most
# 128 by 64.
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1),
    "decode_two_chunks": (1, 6, 2, 1, 300, 64),
    "decode_odd_head_dim": (2, 6, 2, 1, 7, 40),
    "few_queries": (1, 8, 2, 5, 60, 80),
    "mqa": (1, 5, 1, 9, 20, 16),
    "exact_tile": (2, 3, 3, 48, 48, 64),
    "tiles_twice": (1, 2, 1, 130, 130, 32),
    "cached_prefill": (1, 4, 2, 50, 113, 33),
    "blind_rows": (1, 4, 2, 60, 30, 59),
    "widest_head": (1, 2, 2, 20, 23, 256),
}
EMPTY = [(0, 2, 1, 3, 3, 8), (1, 2, 1, 0, 3, 8), (1, 2, 1, 3, 0, 8), (1, 0, 1, 3, 3, 8)]

fwd = torch.ops.tilewright.attention_fwd.default
bwd = torch.ops.tilewright.attention_bwd.default
served = pytest.mark.usefixtures("_needs_kernel")


def qkv(device: str, B: int, H: int, G: int, S: int, T: int, D: int) -> tuple[Tensor, ...]:
    shapes = ((B, H, S, D), (B, G, T, D), (B, G, T, D))
    return tuple(torch.randn(shape, device=device, requires_grad=True) for shape in shapes)


def packed(device: str, B: int, H: int, G: int, S: int, D: int) -> tuple[Tensor, ...]:
    """Views of one projection's output [B, S, (H + 2 G) D], as a fused QKV layer makes them."""
    x = torch.randn(B, S, (H + 2 * G) * D, device=device)
    parts = x.split([H * D, G * D, G * D], dim=-1)
    return tuple(p.unflatten(-1, (-1, D)).transpose(1, 2).requires_grad_() for p in parts)


def layouts(device: str, B: int = 2) -> dict[str, tuple[Tensor, ...]]:
    q, k, v = qkv(device, B, 4, 2, 10, 10, 24)
    cache = torch.randn(2, B, 2, 99, 24, device=device)
    return {
        "packed": packed(device, B, 4, 2, 10, 24),
        "cache": (q, *(c[:, :, :31].requires_grad_() for c in cache)),
        "columns": tuple(t.detach().mT.contiguous().mT.requires_grad_() for t in (q, k, v)),
        "every_other": tuple(t.detach()[:, :, ::2, ::2].requires_grad_() for t in (q, k, v)),
    }


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(shape, causal, dtype, device):
    assert_matches_reference(
        ops.attention, reference.attention, *qkv(device, *shape), dtype=dtype, causal=causal
    )


@pytest.mark.parametrize("layout", layouts("cpu").keys())
def test_strides(layout, dtype, device):
    inputs = layouts(device)[layout]
    assert_matches_reference(ops.attention, reference.attention, *inputs, dtype=dtype, causal=True)


def test_expanded(dtype, device):
    def shared(attention):
        return lambda q, x: attention(
            q, x.expand(2, 2, 10, 24), x.expand(2, 2, 10, 24), causal=True
        )

    q, x, _ = qkv(device, 2, 4, 1, 10, 10, 24)
    assert_matches_reference(shared(ops.attention), shared(reference.attention), q, x, dtype=dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("S", [2, 20], ids=["decode", "blocked"])
@pytest.mark.parametrize("scale", [0.25, -0.3, 2.5, 0.0])
def test_scale(scale, S, seed, dtype, device):
    """At 2.5 one probability of a row is often near 1, at 0 all are equal: sums err one way.

    Four heads a group: where a row of dk is one term or two, how far P (dP - mean) happens to cancel
    decides its error, eager's and ours alike, and their ratio is a lottery.
    """
    torch.manual_seed(seed)
    inputs = qkv(device, 1, 8, 2, S, 53, 32)
    assert_matches_reference(
        ops.attention, reference.attention, *inputs, dtype=dtype, causal=True, scale=scale
    )


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, device):
    inputs = qkv(device, *shape)
    out = ops.attention(*inputs, causal=True)
    assert out.shape == inputs[0].shape and not out.any()
    for grad, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("S", [7, 60], ids=["decode", "blocked"])
def test_rows_that_see_nothing(S, device):
    q, k, v = qkv(device, 1, 4, 2, S, 3, 16)
    out = ops.attention(q, k, v, causal=True)
    dq, _, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert not out[:, :, : S - 3].any() and out[:, :, S - 3 :].all()
    assert not dq[:, :, : S - 3].any()


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_large_scores(S, dtype, device):
    q, k, v = (10 * t.detach() for t in qkv(device, 1, 8, 2, S, 40, 16))
    assert_matches_reference(ops.attention, reference.attention, q, k, v, dtype=dtype, causal=True)


def test_large_scores_backward(dtype, device):
    # larger ones saturate float64 too: then the truth itself is 0 where the gradient is not
    q, k, v = (6 * t.detach() for t in qkv(device, 1, 8, 2, 20, 40, 16))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    assert_matches_reference(ops.attention, reference.attention, *inputs, dtype=dtype, causal=True)


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_saturated_gradients_are_exact(S, device):
    """Two keys, p = e^-30 on the second: dS = p (dP_2 - dP_1): float32 sums at 1 - p are 0."""
    q = torch.zeros(1, 1, S, 8, device=device)
    k, v = torch.zeros(1, 1, 2, 8, device=device), torch.randn(1, 1, 2, 8, device=device)
    q[..., 0], k[0, 0, :, 0] = 1.0, torch.tensor([0.0, -30.0])
    dout = torch.randn(1, 1, S, 8, device=device)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = ops.attention(q, k, v, scale=1.0)
    _, dk, _ = torch.autograd.grad(out, inputs, dout)

    def closed_form(dtype):
        # in base 2, as GPU kernels take it: float32 then rounds the exponent itself
        p = (torch.tensor(-30.0, dtype=dtype, device=device) * math.log2(math.e)).exp2()
        dp = dout.to(dtype) @ v.to(dtype).mT
        ds = (p * (dp[..., 1] - dp[..., 0])).sum()
        return torch.stack([-ds, ds]).double()

    plain, truth = closed_form(torch.float32), closed_form(torch.float64)
    assert_within(dk[0, 0, :, 0].double(), plain, truth, torch.finfo(torch.float32).eps, "dk")


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_scores_that_overflow_are_torchs(S, device):
    q, k, v = (t.detach() for t in qkv(device, 1, 2, 1, S, 40, 16))
    q[0, 0, 0], k = 1e30, -1e30 * k.abs()
    with torch.no_grad():
        assert reference.attention(q, k, v)[0, 0, 0].isnan().all()
        assert ops.attention(q, k, v)[0, 0, 0].isnan().all()


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_reads_nothing_outside_the_view(S, dtype, device):
    q, k, v = (t.detach().to(dtype) for t in qkv(device, 1, 4, 2, S, 37, 24))
    cache = torch.full((2, 1, 2, 80, 32), torch.nan, dtype=dtype, device=device)
    views = tuple(c[:, :, 11:48, 5:29].copy_(x) for c, x in zip(cache, (k, v), strict=True))
    assert torch.equal(ops.attention(q, *views, causal=True), ops.attention(q, k, v, causal=True))


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_nan_stays_in_its_row(S, device):
    q, k, v = (t.detach() for t in qkv(device, 1, 4, 2, S, 37, 24))
    q[0, 1, 0, 3] = torch.nan
    out = ops.attention(q, k, v)
    assert out[0, 1, 0].isnan().all() and out.isnan().sum() == 24


@pytest.fixture
def _needs_kernel(device):
    assert _op.serves("attention", torch.empty(0, device=device))


@served
@pytest.mark.parametrize("layout", ["plain", "packed", "cache", "columns", "empty", "one_query"])
def test_opcheck(layout, device):
    cases = layouts(device, B=1) | {
        "plain": qkv(device, 1, 4, 2, 10, 7, 16),
        "empty": qkv(device, 2, 4, 2, 0, 7, 16),
        "one_query": qkv(device, 1, 4, 2, 1, 7, 16),
    }
    q, k, v = (t.detach() for t in cases[layout])
    options = (None, None, None, None, None, None, -1, 0, 0, 0.0, 0.25, 0.0)
    torch.library.opcheck(fwd, (q, k, v, *options))
    dout = torch.randn(q.shape, device=device)  # unlike out, [B, H, S, D] in memory
    torch.library.opcheck(bwd, (dout, None, q, k, v, *options, False))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_compiles_fullgraph(S, dynamic, device):
    def f(q, k, v):
        return ops.attention(q, k, v, causal=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        inputs = qkv(device, 1, 2, 1, S, T, 16)
        for ours, eager in zip(run(compiled, inputs, {}), run(f, inputs, {}), strict=True):
            assert torch.equal(ours, eager)


def test_heads_merge_without_a_copy(device):
    out = ops.attention(*qkv(device, 2, 4, 2, 10, 10, 16))
    assert out.transpose(1, 2).reshape(2, 10, 64).data_ptr() == out.data_ptr()


def test_views_are_not_copied():
    if _native.C is None:  # the interpreter copies every argument
        return
    q, k, v = (t.detach() for t in packed("cpu", 1, 4, 2, 20, 16))
    cache = torch.randn(1, 2, 64, 16)[:, :, :20]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.attention(q, k, v, causal=True)
        ops.attention(q[:, :, :1], cache, cache)
    assert not {"aten::copy_", "aten::clone"} & {event.name for event in profile.events()}


@pytest.mark.parametrize("dtypes", ["fff", "ddd", "bbb", "fbf"])
def test_autocast_is_torchs(dtypes, device):
    kinds = {"f": torch.float32, "d": torch.float64, "b": torch.bfloat16}
    q, k, v = (
        t.detach().to(kinds[c]).requires_grad_()
        for t, c in zip(qkv(device, 1, 4, 4, 9, 9, 16), dtypes, strict=True)
    )
    with torch.autocast(device, torch.bfloat16):
        theirs = F.scaled_dot_product_attention(q, k, v)
        ours, spec = (f.attention(q, k, v) for f in (ops, reference))
    assert ours.dtype == spec.dtype == theirs.dtype
    alone = ops.attention(*(t.to(theirs.dtype) for t in (q, k, v)))
    assert torch.equal(ours, alone)
    grads = torch.autograd.grad(ours.sum(), (q, k, v))
    assert [g.dtype for g in grads] == [t.dtype for t in (q, k, v)]


def test_autocast_rejects_mixed_doubles(device):
    q, k, v = qkv(device, 1, 1, 1, 2, 2, 4)
    with torch.autocast(device, torch.bfloat16), pytest.raises(ValueError, match="float64"):
        ops.attention(q.double(), k, v)


@pytest.mark.parametrize("S", [1, 60], ids=["decode", "blocked"])
def test_repeats_bitwise_on_any_number_of_threads(S, dtype, device):
    inputs = [t.detach().to(dtype).requires_grad_() for t in qkv(device, 1, 2, 1, S, 300, 32)]
    before = [t.detach().clone() for t in inputs]
    first = run(ops.attention, inputs, {"causal": True})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = run(ops.attention, inputs, {"causal": True})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "wide_head"])
def test_what_no_kernel_serves_runs_the_reference(dtype, device):
    D = 16 if dtype == torch.float64 else 320
    inputs = [t.detach().to(dtype).requires_grad_() for t in qkv(device, 1, 4, 2, 5, 7, D)]
    theirs = run(reference.attention, inputs, {"causal": True})
    for ours, other in zip(run(ops.attention, inputs, {"causal": True}), theirs, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_reference_is_torchs(causal, device):
    q, k, v = (t.detach() for t in qkv(device, 2, 4, 2, 9, 9, 16))
    theirs, truth = (
        F.scaled_dot_product_attention(*x, is_causal=causal, enable_gqa=True).double()
        for x in ((q, k, v), (q.double(), k.double(), v.double()))
    )
    ours = reference.attention(q, k, v, causal=causal).double()
    assert_within(ours, theirs, truth, torch.finfo(torch.float32).eps, "reference")


def test_twins_have_one_signature():
    assert inspect.signature(ops.attention) == inspect.signature(reference.attention)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "not \\[B, H, S, D\\]"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), "v .* does not fit k"),
        (lambda q, k, v: (q, k[:1], v[:1]), "k .* does not fit q"),
        (lambda q, k, v: (q, k[..., 1:], v[..., 1:]), "k .* does not fit q"),
        (lambda q, k, v: (q[:, :3], k, v), "3 query heads .* 2 kv heads"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "0 kv heads"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), "head dim 0"),
        (lambda q, k, v: (q, k.bfloat16(), v), "torch.bfloat16"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "torch.int64"),
        (lambda q, k, v: (q, k.to("meta"), v), "meta"),
    ],
)
def test_bad_input(change, message, device):
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        ops.attention(*change(*qkv(device, 2, 4, 2, 5, 5, 8)))


def test_what_keys_and_values_have_in_common(device):
    """Σ ds = 0, so a part that all keys share adds nothing to dq: an error in the mean of dP would."""
    q, k, v = (torch.randn(1, 2, n, 64, device=device) for n in (40, 300, 300))
    inputs = [x.requires_grad_() for x in (q, k + 1000, v + 1000)]
    assert_matches_reference(ops.attention, reference.attention, *inputs, dtype=torch.float32)
