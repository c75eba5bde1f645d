"""nn.functional against torch.nn.functional: the same arguments, the same results."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright import reference
from tilewright.nn import functional
from tilewright.testing import assert_matches_reference, run

# q's shape, k's and v's, arguments, and whether our kernels serve them
CASES = {
    "full": ((2, 3, 20, 16), (2, 3, 30, 16), {}, True),
    "causal": ((2, 3, 60, 16), (2, 3, 60, 16), {"is_causal": True}, True),
    "causal_short": ((2, 3, 7, 16), (2, 3, 60, 16), {"is_causal": True}, True),
    "causal_long": ((2, 3, 60, 16), (2, 3, 7, 16), {"is_causal": True}, True),
    "one_query": ((2, 3, 1, 16), (2, 3, 9, 16), {"is_causal": True}, True),
    "scale": ((2, 3, 20, 16), (2, 3, 20, 16), {"scale": 0.7}, True),
    "gqa": ((2, 6, 20, 16), (2, 3, 20, 16), {"enable_gqa": True, "is_causal": True}, True),
    "no_batch": ((3, 20, 16), (3, 20, 16), {"is_causal": True}, True),
    "two_batches": ((2, 2, 3, 20, 16), (2, 2, 3, 20, 16), {}, True),
    "no_queries": ((2, 3, 0, 16), (2, 3, 30, 16), {}, True),
    "no_keys": ((2, 3, 5, 16), (2, 3, 0, 16), {}, True),
    "no_batches": ((0, 3, 5, 16), (0, 3, 5, 16), {"is_causal": True}, True),
    "no_head": ((2, 0, 5, 16), (2, 0, 5, 16), {}, False),
    "no_heads": ((20, 16), (30, 16), {}, False),
    "broadcast": ((2, 3, 20, 16), (1, 3, 20, 16), {}, False),
    "wide": ((1, 1, 5, 264), (1, 1, 5, 264), {}, False),
}


def drawn(q_shape, k_shape, device, dtype=torch.float32):
    shapes = (q_shape, k_shape, k_shape)
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(("q", "k", "arguments", "ours"), CASES.values(), ids=CASES.keys())
def test_matches_torch(q, k, arguments, ours, dtype, device, attended):
    def theirs(*inputs, **arguments):
        # of no batches torch's fused CUDA kernels make None
        empty = 0 in inputs[0].shape
        with sdpa_kernel(SDPBackend.MATH) if empty else nullcontext():
            return F.scaled_dot_product_attention(*inputs, **arguments)

    assert_matches_reference(
        functional.scaled_dot_product_attention,
        theirs,
        *drawn(q, k, device),
        dtype=dtype,
        **arguments,
    )
    assert bool(attended) == ours


def test_values_of_another_width(device, attended):
    q, k, v = (torch.randn(1, 2, 9, d, device=device, requires_grad=True) for d in (16, 16, 24))
    f = functional.scaled_dot_product_attention, F.scaled_dot_product_attention
    assert_matches_reference(*f, q, k, v, dtype=torch.float32)
    assert not attended


MASKS = {
    "whole": (2, 3, 20, 30),
    "of_batches": (2, 1, 20, 30),
    "of_keys": (2, 1, 1, 30),
    "of_heads": (3, 20, 30),
    "one": (20, 30),
}


@pytest.mark.parametrize("kind", ["bool", "float", "other"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS.keys())
def test_masks(shape, kind, dtype, device, attended):
    inputs = drawn((2, 3, 20, 16), (2, 3, 30, 16), device)
    seen = torch.rand(shape, device=device) > 0.3
    seen[..., 7] = True
    mask = seen if kind == "bool" else torch.where(seen, torch.randn_like(seen.float()), -torch.inf)

    def masked(f):
        def call(q, k, v):
            # float32 beside bfloat16 is torch's too; its float64 truth is of one dtype
            fits = kind == "other" and q.dtype != torch.float64
            given = mask if kind == "bool" else mask.to(torch.float32 if fits else q.dtype)
            return f(q, k, v, attn_mask=given, scale=0.3)

        return call

    ours = masked(functional.scaled_dot_product_attention)
    assert_matches_reference(ours, masked(F.scaled_dot_product_attention), *inputs, dtype=dtype)
    assert attended


def test_a_mask_without_batches_or_with_two(device, attended):
    for shape, mask in (((3, 20, 16), (3, 20, 20)), ((2, 2, 3, 20, 16), (20, 20))):
        q, k, v = (x.detach() for x in drawn(shape, shape, device))
        added = torch.randn(mask, device=device)
        found, expected = (
            f(q, k, v, attn_mask=added)
            for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)
        )
        torch.testing.assert_close(found, expected)
    assert len(attended) == 2


def test_a_learned_mask(device, attended):
    inputs = drawn((2, 3, 20, 16), (2, 3, 30, 16), device)
    mask = torch.randn(3, 20, 30, device=device, requires_grad=True)
    ours, theirs = (
        lambda q, k, v, mask, f=f: f(q, k, v, attn_mask=mask)
        for f in (functional.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    assert_matches_reference(ours, theirs, *inputs, mask, dtype=torch.float32)
    assert attended


def test_a_query_that_sees_nothing_gives_0(device):
    q, k, v = drawn((2, 3, 20, 16), (2, 3, 30, 16), device)
    seen = torch.ones(20, 30, dtype=torch.bool, device=device)
    seen[4] = False
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert not out[:, :, 4].any() and out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout(device, attended):
    q, k, v = (x.detach() for x in drawn((2, 3, 70, 16), (2, 3, 90, 16), device))
    outs = []
    for f in (functional.scaled_dot_product_attention, reference.attention):
        torch.manual_seed(3)
        outs.append(f(q, k, v, dropout_p=0.5))
    torch.testing.assert_close(*outs)
    assert attended and not torch.equal(outs[0], functional.scaled_dot_product_attention(q, k, v))
    for p in (-0.5, 1.5):
        with pytest.raises(RuntimeError, match="dropout"):
            functional.scaled_dot_product_attention(q, k, v, dropout_p=p)


def test_float64_is_torchs(device, attended):
    q, k, v = drawn((2, 3, 20, 16), (2, 3, 20, 16), device, torch.float64)
    found = functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v)) and not attended


def test_compiles_fullgraph(device):
    def f(q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = drawn((2, 3, 20, 16), (2, 3, 30, 16), device)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    found, expected = run(compiled, inputs, {}), run(f, inputs, {})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_errors_are_torchs(device):
    q, k, v = (x.detach() for x in drawn((2, 3, 20, 16), (2, 3, 20, 16), device))
    mask = torch.zeros(20, 20, device=device)
    for bad, arguments in (
        ((q, k[..., :8], v), {}),
        ((q, k, v.double()), {}),
        ((q, k[:, :2], v[:, :2]), {}),
        ((q, k, v, mask[:, :9]), {}),
        ((q, k, v, mask.long()), {}),
    ):
        with pytest.raises(RuntimeError) as expected:
            F.scaled_dot_product_attention(*bad, **arguments)
        with pytest.raises(RuntimeError) as found:
            functional.scaled_dot_product_attention(*bad, **arguments)
        assert str(found.value) == str(expected.value)
