"""moe_experts and every gradient against the reference, by the rule."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright import explain, ops, reference
from tilewright.expert_rows import ExpertRows
from tilewright.testing import assert_matches_reference

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET")
Drawn = tuple[list[Tensor], ExpertRows]


def drawn(
    device: str, T: int, E: int, k: int, D: int, I: int, *, none: bool = False, bias: bool = False
) -> Drawn:
    """x, weights, w13, w2 and perhaps the biases; a slot in three of no expert if none."""
    ids = torch.rand(T, E, device=device).argsort(-1)[:, :k]
    if none:
        ids = ids.masked_fill(torch.rand(T, k, device=device) < 0.3, -1)
    shapes = [(T, D), (T, k), (E, 2 * I, D), (E, D, I)]
    shapes += [(E, 2 * I), (E, D)] if bias else []
    inputs = [torch.randn(s, device=device) for s in shapes]
    inputs[1] = inputs[1].abs() + 0.1
    for w in inputs[2:4]:
        w /= w.shape[-1] ** 0.5
    return [t.requires_grad_() for t in inputs], reference.moe_dispatch(ids, E)


def of(side: Any, placed: ExpertRows, **how: Any) -> Any:
    def experts(x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, *bias: Tensor) -> Tensor:
        """The weights are float32, whatever x is."""
        weights = weights if weights.dtype == torch.float64 else weights.float()
        biases = dict(zip(("bias13", "bias2"), bias, strict=False))
        return side.moe_experts(x, weights, placed, w13, w2, **biases, **how)

    return experts


def check(inputs: list[Tensor], placed: ExpertRows, dtype: torch.dtype, **how: Any) -> None:
    """By the rule, whose rows are of the router's weights all, and of w13 and w2 an expert's: of one token, a row of
    their gradients is right to what one number happens to be, and that number may cancel."""
    x, weights, w13, w2, *biases = inputs
    flat = [x, weights.flatten(), w13.flatten(1), w2.flatten(1), *biases]
    flat = [t.detach().requires_grad_() for t in flat]

    def shaped(side: Any) -> Any:
        experts = of(side, placed, **how)
        return lambda x, weights, w13, w2, *biases: experts(
            x,
            *(a.view(b.shape) for a, b in zip((weights, w13, w2), inputs[1:4], strict=True)),
            *biases,
        )

    assert_matches_reference(shaped(ops), shaped(reference), *flat, dtype=dtype)


@pytest.mark.parametrize(
    "T, E, k, D, I",
    [
        (0, 4, 2, 16, 8),
        (1, 1, 1, 8, 4),
        (2, 7, 7, 33, 17),
        (31, 7, 2, 64, 32),
        (33, 60, 3, 40, 24),
        (65, 4, 1, 100, 70),
        (70, 128, 8, 32, 16),
        (9, 257, 3, 16, 16),
        (63, 12, 10, 24, 8),
        (64, 60, 1, 24, 8),
        (1000, 7, 2, 12, 10),
    ],
)
def test_matches_reference(T, E, k, D, I, dtype, device):
    check(*drawn(device, T, E, k, D, I), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_biases_activations_and_limits(activation, limit, dtype, device):
    inputs, placed = drawn(device, 40, 5, 2, 48, 36, none=True, bias=True)
    check(inputs, placed, dtype, activation=activation, limit=limit)


def test_all_to_one_and_experts_without(dtype, device):
    inputs, _ = drawn(device, 70, 6, 1, 32, 16)
    placed = reference.moe_dispatch(torch.full((70, 1), 4, device=device), 6)
    check(inputs, placed, dtype)
    out = ops.moe_experts(*inputs[:2], placed, *inputs[2:])
    for grad in torch.autograd.grad(out.sum(), inputs[2:]):
        assert grad[4].any() and not grad[[0, 1, 2, 3, 5]].any()


@pytest.mark.parametrize("how", [{}, {"limit": 1.0}], ids=["free", "limited"])
def test_not_finite(how, device):
    """inf and nan where the reference has them, in tokens that have them and in no other."""
    inputs, placed = drawn(device, 24, 4, 2, 16, 8, bias=True)
    with torch.no_grad():
        inputs[0][3, 5], inputs[0][7, 0], inputs[0][9] = torch.nan, torch.inf, -torch.inf
    expected = of(reference, placed, **how)(*inputs)
    found = of(ops, placed, **how)(*inputs)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found.isfinite().all(1).sum() == 21
    (ours,), (theirs,) = (torch.autograd.grad(out.sum(), inputs[0]) for out in (found, expected))
    assert ours.isfinite().all(1).sum() >= 21
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def test_no_memory_is_read_that_was_not_written(device):
    """What torch.empty gives is nan: outputs and gradients are as they were."""
    inputs, placed = drawn(device, 40, 6, 2, 24, 12, none=True, bias=True)

    def run() -> list[Tensor]:
        out = of(ops, placed)(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    plain, was = run(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("skewed", [False, True])
def test_a_hundred_repeats(skewed, device):
    inputs, _ = drawn(device, 33, 5, 2, 16, 12)
    logits = torch.randn(33, 5, device=device) + (torch.arange(5, device=device) * 3 * skewed)

    def run() -> list[Tensor]:
        weights, ids = ops.moe_route(logits, 2)
        placed = ops.moe_dispatch(ids, 5)
        out = ops.moe_experts(inputs[0], weights, placed, *inputs[2:])
        return [*placed, out, *torch.autograd.grad(out.square().sum(), (inputs[0], *inputs[2:]))]

    first = run()
    for _ in range(99 if device == "cuda" or INTERPRETED is None else 4):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_nothing_waits_for_the_device():
    """No launcher or op asks a tensor for its numbers."""
    asks = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|unique)\(")
    for path in [*ROOT.glob("kernels/*moe*.py"), *ROOT.glob("python/tilewright/ops/moe_*.py")]:
        assert not asks.search(path.read_text()), path.name


def test_slots_of_no_expert_are_not_looked_at(device):
    inputs, placed = drawn(device, 30, 5, 3, 24, 12, none=True, bias=True)
    x, weights, w13, w2, *bias = inputs
    biases = dict(zip(("bias13", "bias2"), bias, strict=True))
    expected = ops.moe_experts(x, weights, placed, w13, w2, **biases)
    wrong = weights.detach().masked_fill(placed.rows < 0, torch.nan).requires_grad_()
    out = ops.moe_experts(x, wrong, placed, w13, w2, **biases)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.square().sum(), (x, wrong, w13, w2, *bias))
    assert all(g.isfinite().all() for g in grads) and not grads[1][placed.rows < 0].any()
    nobody = reference.moe_dispatch(torch.full((30, 3), -1, device=device), 5)
    out = ops.moe_experts(x, weights, nobody, w13, w2, **biases)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert not out.any() and not any(g.any() for g in grads)


def test_strides_and_leading_dimensions(dtype, device):
    """Experts that lie apart, rows that do, the last dimension that does; x of three dimensions."""
    inputs, placed = drawn(device, 24, 5, 2, 40, 20, bias=True)
    x, weights, w13, w2, bias13, bias2 = (t.detach() for t in inputs)
    x, w13, w2, bias13, bias2 = (t.to(dtype) for t in (x, w13, w2, bias13, bias2))

    def run(x: Tensor, weights: Tensor, placed: ExpertRows, *more: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weights, *more)]
        of_w13, of_w2, of_13, of_2 = leaves[2:]
        out = ops.moe_experts(*leaves[:2], placed, of_w13, of_w2, bias13=of_13, bias2=of_2)
        dout = torch.linspace(-1, 1, 40, device=device).to(dtype).expand(out.shape)
        return [t.reshape(-1) for t in (out, *torch.autograd.grad(out, leaves, dout))]

    dense = run(x, weights, placed, w13, w2, bias13, bias2)
    apart = lambda t: torch.stack([t, t], 1)[:, 0]  # noqa: E731
    turned = lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)  # noqa: E731
    rows = ExpertRows(*(torch.stack([t, t], -1)[..., 0] for t in placed))
    for other in (apart, turned):
        strided = run(
            other(x), turned(weights), rows, other(w13), other(w2), apart(bias13), turned(bias2)
        )
        assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
    leading = placed._replace(rows=placed.rows.view(2, 12, 2))
    more = w13, w2, bias13, bias2
    again = run(x.view(2, 12, 40), weights.view(2, 12, 2), leading, *more)
    assert all(torch.equal(a, b) for a, b in zip(dense, again, strict=True))


def test_repeats_bit_for_bit_and_mutates_nothing(dtype, device):
    inputs, placed = drawn(device, 70, 9, 3, 40, 40, bias=True)
    x, weights, w13, w2, bias13, bias2 = inputs
    cast = [t.detach().to(dtype).requires_grad_() for t in (x, w13, w2, bias13, bias2)]
    before = [t.detach().clone() for t in (*cast, weights, *placed)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (threads, threads, 1):
            torch.set_num_threads(n)
            x, w13, w2, bias13, bias2 = cast
            out = ops.moe_experts(x, weights, placed, w13, w2, bias13=bias13, bias2=bias2)
            results.append((out, *torch.autograd.grad(out.square().sum(), (*cast, weights))))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    after = (*cast, weights, *placed)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_some_gradients(device):
    """Each alone is what it is among all."""
    inputs, placed = drawn(device, 20, 4, 2, 24, 12, bias=True)
    run = of(ops, placed)
    whole = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    for i, expected in enumerate(whole):
        leaves = [t.detach().requires_grad_(n == i) for n, t in enumerate(inputs)]
        (grad,) = torch.autograd.grad(run(*leaves).square().sum(), leaves[i])
        assert torch.equal(grad, expected)
    with torch.no_grad():
        alone = run(*inputs)
    assert torch.equal(alone, run(*inputs))  # which keeps h


def test_two_steps_of_training(device):
    """The router too: losses by the rule."""

    def losses(side: Any, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        found = []
        for _ in range(2):
            leaves = [t.detach().requires_grad_() for t in (gate, w13, w2)]
            weights, ids = side.moe_route(x @ leaves[0], 2)
            out = side.moe_experts(x, weights, side.moe_dispatch(ids, 5), *leaves[1:])
            loss = (out - x).square().mean()
            grads = torch.autograd.grad(loss, leaves)
            gate, w13, w2 = (t - 0.1 * g for t, g in zip(leaves, grads, strict=True))
            found.append(loss)
        assert found[1] < found[0]
        return torch.stack(found)

    x, gate = torch.randn(40, 16, device=device), torch.randn(16, 5, device=device)
    w13, w2 = torch.randn(5, 24, 16, device=device) / 4, torch.randn(5, 16, 12, device=device) / 4
    assert_matches_reference(
        lambda *given: losses(ops, *given), lambda *given: losses(reference, *given),
        x, gate, w13, w2, dtype=torch.float32,
    )  # fmt: skip


def test_only_x_and_h_are_kept(device):
    """In bytes, beside what is there anyway: 2 T D + 4 P I of bfloat16, and the router's."""
    inputs, placed = drawn(device, 64, 8, 2, 64, 32)
    x, weights, w13, w2 = (
        t.detach().bfloat16().requires_grad_() if n != 1 else t for n, t in enumerate(inputs)
    )
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.moe_experts(x, weights, placed, w13, w2)
    for t in (weights, w13, w2, *placed):
        kept.pop(t.data_ptr())
    assert sum(kept.values()) == 2 * 64 * 64 + 4 * 128 * 32


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias, device):
    inputs, placed = drawn(device, 9, 4, 2, 16, 8, bias=bias)
    x, weights, w13, w2, *biases = (t.detach() for t in inputs)
    more = (weights, *placed, w13, w2, *(biases or (None, None)), *[None] * 4, "silu", 1.0, 1.0)
    for save in (False, True):
        torch.library.opcheck(torch.ops.tilewright.moe_experts_fwd.default, (x, *more, save))
    _, h = torch.ops.tilewright.moe_experts_fwd(x, *more, True)
    for wanted in ([True] * 10, [False, True, False, True, True] + [False] * 5):
        args = torch.randn_like(x), x, h, *more, wanted
        torch.library.opcheck(torch.ops.tilewright.moe_experts_bwd.default, args)
    half = [
        t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() and t is not weights else t
        for t in args
    ]
    torch.library.opcheck(torch.ops.tilewright.moe_experts_bwd.default, tuple(half))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    x, gate = torch.randn(11, 16, device=device), torch.randn(16, 5, device=device)
    w13, w2 = torch.randn(5, 16, 16, device=device), torch.randn(5, 16, 8, device=device)

    def step(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        weights, ids = ops.moe_route(x @ gate, 2)
        return ops.moe_experts(x, weights, ops.moe_dispatch(ids, len(w13)), w13, w2)

    leaves = [t.requires_grad_() for t in (x, gate, w13, w2)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for fn in (step, compiled):
        out = fn(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_casts_all_but_the_routers_weights(device):
    inputs, placed = drawn(device, 12, 4, 2, 16, 8, bias=True)
    x, weights, *rest = (t.detach() for t in inputs)
    with torch.autocast(device, torch.bfloat16):
        found = of(ops, placed)(x, weights, *rest)
    expected = of(ops, placed)(x.bfloat16(), weights, *(t.bfloat16() for t in rest))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_gradcheck(device):
    """Of the reference, which float64 runs."""
    inputs, placed = drawn(device, 5, 4, 2, 4, 3, none=True, bias=True)
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    for how in ({}, {"activation": "gelu", "limit": 0.7}):
        assert torch.autograd.gradcheck(of(ops, placed, **how), leaves)


PLACED = reference.moe_dispatch(torch.tensor([[0, 1], [1, 0], [2, 0]]), 3)
X, WEIGHTS, W13, W2 = (torch.zeros(s) for s in ((3, 8), (3, 2), (3, 12, 8), (3, 8, 6)))


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"x": X.long()}, "x must be floating point"),
        ({"x": X[0, 0]}, r"x must be floating point \[..., D\], not torch.float32 \(\)"),
        ({"w13": W13[:, :11]}, r"w13 \(3, 11, 8\) must be \[E, 2 I, 8\]"),
        ({"w13": W13[..., :7]}, r"w13 \(3, 12, 7\)"),
        ({"w13": torch.zeros(1025, 12, 8)}, "of 1 to 1024 experts"),
        ({"w2": W2[:, :7]}, r"w2 \(3, 7, 6\) must be \(3, 8, 6\)"),
        ({"w2": W2.half()}, "w2 torch.float16, x torch.float32"),
        ({"weights": WEIGHTS[:2]}, r"weights \(2, 2\) must be \[..., k\] for x \(3, 8\)"),
        ({"weights": WEIGHTS.long()}, "weights must be floating point, not torch.int64"),
        ({"weights": WEIGHTS.to("meta")}, "weights on meta, x on cpu"),
        ({"placed": PLACED._replace(order=PLACED.order[:4])}, r"order torch.int64 \(4,\) must be"),
        ({"placed": PLACED._replace(rows=PLACED.rows.int())}, "rows torch.int32"),
        ({"placed": PLACED._replace(offsets=PLACED.offsets[:3])}, r"offsets torch.int64 \(3,\)"),
        ({"bias13": torch.zeros(3, 11)}, r"bias13 \(3, 11\) must be \(3, 12\)"),
        ({"bias2": torch.zeros(3, 6)}, r"bias2 \(3, 6\) must be \(3, 8\)"),
        ({"activation": "relu"}, "activation 'relu' is none of silu, gelu, gelu_tanh"),
        ({"limit": 0.0}, "limit 0.0 must be above 0"),
    ],
)
def test_bad_input(changed, told):
    given = {"x": X, "weights": WEIGHTS, "placed": PLACED, "w13": W13, "w2": W2} | changed
    with pytest.raises(ValueError, match=told):
        ops.moe_experts(**given)


@pytest.mark.parametrize(
    "name, bad", [("order", 6), ("order", -1), ("order", 4), ("offsets", 9), ("rows", 7)]
)
def test_rows_that_dispatch_never_gives(name, bad, device):
    """An error of the CPU's kernel; elsewhere nothing that is not there is read."""
    placed = ExpertRows(*(t.to(device).clone() for t in PLACED))
    getattr(placed, name).view(-1)[1] = bad
    given = [t.to(device) for t in (X, WEIGHTS, W13, W2)]
    (route,) = (r for r in explain() if (r.op, r.device) == ("moe_experts", device))
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match=f"{bad} of {name}"):
            ops.moe_experts(*given[:2], placed, *given[2:])
    elif route.implementation == "Triton" or (
        route.implementation == "Triton interpreter" and name != "offsets"
    ):  # experts whose rows overlap race, which the interpreter does not let pass
        ops.moe_experts(*given[:2], placed, *given[2:])
