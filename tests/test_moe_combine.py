"""moe_combine and its gradients against the reference, by the rule."""

import pytest
import torch
from torch import Tensor

from tilewright import explain, ops, reference
from tilewright.expert_rows import ExpertRows
from tilewright.testing import assert_matches_reference


def drawn(
    device: str, T: int, E: int, k: int, D: int, none: bool = False
) -> tuple[Tensor, Tensor, ExpertRows]:
    ids = torch.rand(T, E, device=device).argsort(-1)[:, :k]
    if none:
        ids = ids.masked_fill(torch.rand(T, k, device=device) < 0.4, -1)
    placed = reference.moe_dispatch(ids, E)
    y = torch.randn(T * k, D, device=device, requires_grad=True)
    return y, torch.rand(T, k, device=device).requires_grad_(), placed


def check(y: Tensor, weights: Tensor, placed: ExpertRows, dtype: torch.dtype) -> None:
    """The weights are float32, whatever y is."""
    assert_matches_reference(
        lambda y, w: ops.moe_combine(y, w.float(), placed),
        lambda y, w: reference.moe_combine(y, w if w.dtype == torch.float64 else w.float(), placed),
        y, weights, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize(
    "T, E, k, D",
    [
        (0, 8, 2, 16),
        (1, 7, 1, 1),
        (2, 8, 8, 7),
        (33, 60, 3, 65),
        (65, 128, 8, 200),
        (3, 9, 2, 5000),
    ],
)
def test_matches_reference(T, E, k, D, dtype, device):
    check(*drawn(device, T, E, k, D), dtype)


def test_slots_of_no_expert(dtype, device):
    """Neither their weights nor their rows are looked at."""
    y, weights, placed = drawn(device, 40, 9, 4, 33, none=True)
    check(y, weights, placed, dtype)
    with torch.no_grad():
        expected = ops.moe_combine(y, weights, placed)
        y[int(placed.offsets[-1]) :] = torch.nan
        weights[placed.rows < 0] = torch.nan
    out = ops.moe_combine(y, weights, placed)
    assert torch.equal(out, expected)
    dy, dweights = torch.autograd.grad(out, (y, weights), torch.randn_like(out))
    assert not dy[int(placed.offsets[-1]) :].any() and not dweights[placed.rows < 0].any()
    assert dy.isfinite().all() and dweights.isfinite().all()


def test_of_what_dispatch_gives(device):
    """The identity as every expert, two halves of each: the tokens."""
    x = torch.randn(50, 30, device=device)
    _, ids = ops.moe_route(torch.randn(50, 12, device=device), 2)
    placed = ops.moe_dispatch(ids, 12)
    halves = torch.full((50, 2), 0.5, device=device)
    assert torch.equal(ops.moe_combine(x[placed.order // 2], halves, placed), x)


def test_strides_and_leading_dimensions(dtype, device):
    y, weights, placed = drawn(device, 24, 9, 4, 33)
    y, weights = y.detach().to(dtype), weights.detach()
    dense = ops.moe_combine(y, weights, placed)
    wide = torch.randn(96, 80, device=device).to(dtype)
    wide[:, 3:36] = y
    others = y.t().contiguous().t(), wide[:, 3:36]
    strided = weights.t().contiguous().t()
    for other in others:
        assert torch.equal(ops.moe_combine(other, strided, placed), dense)
    apart = ExpertRows(*(torch.stack([t, t], -1)[..., 0] for t in placed))
    assert torch.equal(ops.moe_combine(y, weights, apart), dense)
    leading = placed._replace(rows=placed.rows.view(2, 12, 4))
    grads = []
    for rows, other in ((placed, y), (leading, others[1])):
        leaf, w = other.detach().requires_grad_(), weights.view(rows.rows.shape).requires_grad_()
        out = ops.moe_combine(leaf, w, rows)
        assert out.shape == (*rows.rows.shape[:-1], 33)
        dout = torch.ones(33, 24, device=device, dtype=dtype).t().reshape(out.shape)
        grads.append([g.flatten() for g in torch.autograd.grad(out, (leaf, w), dout)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_weights_of_other_dtypes(device):
    y, weights, placed = drawn(device, 9, 5, 2, 12)
    weights = weights.detach().bfloat16()
    expected = ops.moe_combine(y.detach(), weights.float(), placed)
    for kind in (torch.bfloat16, torch.float64):
        other = weights.to(kind).requires_grad_()
        out = ops.moe_combine(y, other, placed)
        # no kernel takes float64: the reference does
        served = expected if kind == torch.bfloat16 else reference.moe_combine(y, other, placed)
        assert torch.equal(out, served)
        assert all(
            g.dtype == t.dtype
            for g, t in zip(torch.autograd.grad(out.sum(), (y, other)), (y, other), strict=True)
        )


def test_repeats_bit_for_bit(device):
    y, weights, placed = drawn(device, 70, 9, 4, 65, none=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (threads, threads, 1):
            torch.set_num_threads(n)
            out = ops.moe_combine(y, weights, placed)
            results.append((out, *torch.autograd.grad(out.square().sum(), (y, weights))))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_opcheck(device):
    y, weights, placed = drawn(device, 9, 5, 2, 12, none=True)
    y, weights = y.detach(), weights.detach()
    order, rows, offsets = placed
    torch.library.opcheck(torch.ops.tilewright.moe_combine_fwd.default, (y, weights, rows))
    args = torch.randn(9, 12, device=device), y, weights, order, offsets
    torch.library.opcheck(torch.ops.tilewright.moe_combine_bwd.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    y, weights, placed = drawn(device, 9, 5, 2, 12)
    compiled = torch.compile(ops.moe_combine, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for fn in (ops.moe_combine, compiled):
        out = fn(y, weights, placed)
        results.append((out, *torch.autograd.grad(out.square().sum(), (y, weights))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck(device):
    """Of the reference, which float64 runs."""
    y, weights, placed = drawn(device, 6, 5, 3, 4, none=True)
    inputs = y.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w: ops.moe_combine(y, w, placed), inputs)


PLACED = reference.moe_dispatch(torch.tensor([[0, 1], [1, 0], [2, 0]]), 3)
Y, WEIGHTS = torch.zeros(6, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    "y, weights, placed, told",
    [
        (Y[:5], WEIGHTS, PLACED, r"y torch.float32 \(5, 4\) must be floating point \[6, D\]"),
        (Y.long(), WEIGHTS, PLACED, "y torch.int64"),
        (Y[None], WEIGHTS, PLACED, r"y torch.float32 \(1, 6, 4\)"),
        (Y, WEIGHTS[:2], PLACED, r"weights torch.float32 \(2, 2\) must be floating point \(3, 2\)"),
        (Y, WEIGHTS.long(), PLACED, "weights torch.int64"),
        (Y, WEIGHTS.to("meta"), PLACED, "weights on meta, y on cpu"),
        (Y, WEIGHTS, PLACED._replace(order=PLACED.order.int()), "order torch.int32 must be int64"),
        (Y, WEIGHTS, PLACED._replace(order=PLACED.order[:5]), r"order \(5,\) and offsets \(4,\)"),
        (Y, WEIGHTS, PLACED._replace(offsets=PLACED.offsets[:0]), r"offsets \(0,\) must be"),
    ],
)
def test_bad_input(y, weights, placed, told):
    with pytest.raises(ValueError, match=told):
        ops.moe_combine(y, weights, placed)


@pytest.mark.parametrize("bad", [-2, 6, 1 << 40])
def test_rows_of_nowhere(bad, device):
    """An error of the CPU's kernel; elsewhere as -1."""
    placed = ExpertRows(*(t.to(device) for t in PLACED))
    rows = placed.rows.clone()
    rows[1, 0] = bad
    (route,) = (r for r in explain() if (r.op, r.device) == ("moe_combine", device))
    given = torch.randn(6, 4, device=device), torch.rand(3, 2, device=device)
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match=f"{bad} of rows is none of 6"):
            ops.moe_combine(*given, placed._replace(rows=rows))
        return
    if route.implementation.startswith("Triton"):
        as_none = ops.moe_combine(*given, placed._replace(rows=rows.where(rows != bad, -1)))
        assert torch.equal(ops.moe_combine(*given, placed._replace(rows=rows)), as_none)
