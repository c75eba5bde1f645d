"""merge_attention: attentions over disjoint keys make the one over all of them."""

import itertools

import pytest
import torch

from tilewright import ops, reference
from tilewright.testing import assert_matches_reference

T = 90


def drawn(device, dtype=torch.float32):
    shapes = ((2, 4, 20, 16), (2, 2, T, 16), (2, 2, T, 16))
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]


def in_parts(side, cuts, sinks=None):
    """attention_with_lse over the keys between cuts, merged; a sink is the first part's."""

    def attend(q, k, v, *sinks):
        outs, lses = [], []
        for a, b in itertools.pairwise(cuts):
            first = sinks[0] if sinks and a == 0 else None
            out, lse = side.attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], sinks=first)
            outs.append(out)
            lses.append(lse)
        return side.merge_attention(outs, lses)

    return attend


@pytest.mark.parametrize("cuts", [(0, T), (0, 40, T), (0, 1, 50, 50, T)], ids=str)
def test_parts_make_the_whole(cuts, dtype, device):
    """Outputs, log-sum-exps and every gradient; an empty part counts for nothing."""
    assert_matches_reference(
        in_parts(ops, cuts), in_parts(reference, cuts), *drawn(device), dtype=dtype
    )
    if dtype == torch.float32:
        assert_matches_reference(
            in_parts(ops, cuts), reference.attention_with_lse, *drawn(device), dtype=dtype
        )


def test_with_a_sink(device):
    sinks = torch.linspace(-1, 3, 4, device=device).requires_grad_()
    assert_matches_reference(
        in_parts(ops, (0, 40, T)),
        lambda q, k, v, s: reference.attention_with_lse(q, k, v, sinks=s),
        *drawn(device),
        sinks,
        dtype=torch.float32,
    )


def test_gradients_in_float64(device):
    outs = [torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True) for _ in "ab"]
    lses = [torch.randn(3, dtype=torch.float64, device=device, requires_grad=True) for _ in "ab"]
    merge = lambda a, b, c, d: ops.merge_attention([a, b], [c, d])  # noqa: E731
    assert torch.autograd.gradcheck(merge, (*outs, *lses))


def test_rows_that_no_part_sees(dtype, device):
    outs = [torch.full((3, 8), x, device=device, dtype=dtype) for x in (torch.nan, 2.0)]
    lses = [torch.tensor(x, device=device) for x in ([-torch.inf] * 3, [-torch.inf, 0.0, -1e4])]
    for x in (*outs, *lses):
        x.requires_grad_()
    out, lse = ops.merge_attention(outs, lses)
    assert out[0].eq(0).all() and out[1:].eq(2).all()
    assert lse.tolist() == [-torch.inf, 0.0, -1e4]
    grads = torch.autograd.grad([out.sum(), lse[1:].sum()], [*outs, *lses])
    assert all(g.isfinite().all() for g in grads)
    assert not any(g[0].any() for g in grads)


def test_compiles_fullgraph(device):
    inputs = (
        [torch.randn(3, 8, device=device) for _ in "ab"],
        [torch.randn(3, device=device) for _ in "ab"],
    )
    f = torch.compile(ops.merge_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(f(*inputs), ops.merge_attention(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "0 outs and 0 lses"),
        ([torch.zeros(3, 8)], [torch.zeros(3)] * 2, "1 outs and 2 lses"),
        ([torch.zeros(3, 8)], [torch.zeros(4)], "lse \\(4,\\)"),
        ([torch.zeros(3, 8), torch.zeros(3, 9)], [torch.zeros(3)] * 2, "out \\(3, 9\\)"),
        ([torch.zeros(3, 8), torch.zeros(3, 8).half()], [torch.zeros(3)] * 2, "torch.float16"),
        ([torch.zeros(3, 8)], [torch.zeros(3).long()], "torch.int64"),
        ([torch.zeros(3, 8)], [torch.zeros(3, device="meta")], "on meta"),
    ],
)
def test_bad_input(outs, lses, message):
    with pytest.raises(ValueError, match=f"merge_attention: .*{message}"):
        ops.merge_attention(outs, lses)
