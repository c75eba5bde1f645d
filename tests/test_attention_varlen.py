"""attention_varlen against its reference: packed sequences, forward and backward."""

import itertools

import pytest
import torch
from torch import Tensor

from tilewright import ops, reference
from tilewright.testing import assert_matches_reference, run

# lengths of queries and keys: none beside some, fewer keys than queries and more, tiles met twice
LENGTHS = {
    "one": ([40], [40]),
    "documents": ([7, 0, 70, 1, 33], [7, 0, 70, 1, 33]),
    "caches": ([5, 60, 1, 0], [90, 61, 40, 3]),
    "more_queries": ([60, 20], [10, 0]),
    "decode": ([1, 1, 1], [150, 3, 0]),
}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, -1)},
    "ahead": {"window": (3, 5)},
    "everything": {"causal": True, "window": (30, -1), "softcap": 2.0, "sinks": True},
}


def starts(lengths: list[int], device: str, kind: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=kind, device=device)


def drawn(device: str, queries: int, keys: int, H: int = 4, G: int = 1, D: int = 24):
    shapes = ((queries, H, D), (keys, G, D), (keys, G, D))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def bound(attention, *cu_seqlens, **options):
    if options.pop("sinks", False):
        return lambda q, k, v, sinks: attention(q, k, v, *cu_seqlens, sinks=sinks, **options)
    return lambda q, k, v: attention(q, k, v, *cu_seqlens, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_matches_reference(lengths, options, dtype, device):
    cu = [starts(x, device) for x in lengths]
    inputs = drawn(device, sum(lengths[0]), sum(lengths[1]))
    if options.get("sinks"):
        inputs.append(torch.linspace(-1, 6, 4, device=device).requires_grad_())
    name = "attention_varlen_with_lse"
    ours, theirs = (bound(getattr(side, name), *cu, **options) for side in (ops, reference))
    assert_matches_reference(ours, theirs, *inputs, dtype=dtype)


def test_without_lse(dtype, device):
    cu = starts([9, 30, 2], device, torch.int64)
    ours, theirs = (bound(side.attention_varlen, cu, causal=True) for side in (ops, reference))
    assert_matches_reference(ours, theirs, *drawn(device, 41, 41, G=2), dtype=dtype)


def test_each_sequence_is_attention(device):
    """What ops.attention gives of each alone, to the bit where the tiles are the same: one sequence."""
    q, k, v = (x.detach() for x in drawn(device, 60, 90))
    packed = ops.attention_varlen(q, k, v, starts([60], device), starts([90], device), causal=True)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    assert torch.equal(packed.transpose(0, 1)[None], ops.attention(q, k, v, causal=True))


def test_sequences_do_not_meet(device):
    """What one holds changes no other, forward or backward; what none holds gives and gets nothing."""
    inputs = drawn(device, 80, 80)
    cu = starts([30, 20, 20], device)
    others = [x.detach().clone() for x in inputs]
    for x in others:
        x[30:50] = 100 * torch.randn_like(x[30:50])
        x[70:] = 100 * torch.randn_like(x[70:])
        x.requires_grad_()
    dout = torch.randn(80, 4, 24, device=device)
    kept = [*range(30), *range(50, 70)]
    results = []
    for x in (inputs, others):
        out = ops.attention_varlen(*x, cu, causal=True)
        results.append([out, *torch.autograd.grad(out, x, dout)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[kept], b[kept]) and not b[70:].any()


def test_strides(dtype, device):
    """Of one projection's output, kept where it lies."""
    x = torch.randn(50, 6 * 24, device=device)
    q, k, v = (
        p.unflatten(-1, (-1, 24)).detach().requires_grad_() for p in x.split([96, 24, 24], dim=-1)
    )
    cu = starts([20, 30], device)
    ours, theirs = (bound(side.attention_varlen, cu) for side in (ops, reference))
    assert_matches_reference(ours, theirs, q, k, v, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "wide_head"])
def test_what_no_kernel_serves_runs_the_reference(dtype, device):
    D = 16 if dtype == torch.float64 else 320
    inputs = [x.detach().to(dtype).requires_grad_() for x in drawn(device, 12, 12, D=D)]
    cu = starts([5, 7], device)
    ours, theirs = (
        run(bound(side.attention_varlen, cu, causal=True), inputs, {}) for side in (ops, reference)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic, device):
    def f(q, k, v, cu):
        return ops.attention_varlen(q, k, v, cu, causal=True, window=(9, -1))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in ([5, 15], [11, 22]):
        cu = starts(lengths, device)
        inputs = drawn(device, sum(lengths), sum(lengths))
        found, expected = (
            run(lambda q, k, v, g=g, cu=cu: g(q, k, v, cu), inputs, {}) for g in (compiled, f)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_is_attentions(device):
    inputs = drawn(device, 20, 20)
    cu = starts([5, 15], device)
    with torch.autocast(device, torch.bfloat16):
        ours, spec = (side.attention_varlen(*inputs, cu) for side in (ops, reference))
    assert ours.dtype == spec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 5, 4, 8)}, "q \\(1, 5, 4, 8\\)"),
        ({"q": torch.zeros(5, 3, 8)}, "k \\(5, 2, 8\\).* H a multiple of G"),
        ({"v": torch.zeros(4, 2, 8)}, "v \\(4, 2, 8\\)"),
        ({"k": torch.zeros(5, 2, 8).bfloat16()}, "torch.bfloat16"),
        ({"cu_seqlens_q": torch.tensor([0.0, 5.0])}, "cu_seqlens_q \\(2,\\) torch.float32"),
        ({"cu_seqlens_q": torch.tensor(0)}, "cu_seqlens_q \\(\\)"),
        ({"cu_seqlens_q": torch.tensor([0])}, "cu_seqlens_q \\(1,\\)"),
        ({"cu_seqlens_k": torch.tensor([0, 1, 5])}, "cu_seqlens_k \\(3,\\)"),
        ({"cu_seqlens_q": torch.tensor([0, 5], device="meta")}, "on meta"),
        ({"window": (-2, 0)}, "window \\(-2, 0\\)"),
        ({"sinks": torch.zeros(3)}, "sinks \\(3,\\)"),
    ],
)
def test_bad_input(change, message, device):
    q, k, v = (x.detach() for x in drawn(device, 5, 5, G=2, D=8))
    good = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts([5], device)}
    with pytest.raises(ValueError, match=f"attention_varlen: .*{message}"):
        ops.attention_varlen(**(good | change))


@pytest.mark.parametrize("values", [[1, 5], [0, 4, 3], [0, 6]], ids=str)
def test_bad_values_raise_on_a_cpu(values):
    q, k, v = (x.detach() for x in drawn("cpu", 5, 5))
    with pytest.raises(ValueError, match="does not rise from 0 to at most 5"):
        ops.attention_varlen(q, k, v, torch.tensor(values))
