"""quant_moe_experts and its gradients against the reference, by the rule."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright import _native, explain, ops, reference
from tilewright.bench import harness
from tilewright.expert_rows import ExpertRows
from tilewright.quant_tensor import QuantTensor
from tilewright.testing import assert_matches_reference

ROOT = Path(__file__).resolve().parents[1]
experts = harness.load(ROOT / "tests/quant_experts.py")
Drawn, Form, FORMS = experts.Drawn, experts.Form, experts.FORMS
check, drawn, of, weight = experts.check, experts.drawn, experts.of, experts.weight


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [2, 30])
def test_every_form(form, T, dtype, device):
    check(drawn(device, T, 3, 2, 128, 128, FORMS[form], none=T > 2, bias=True), dtype)


@pytest.mark.parametrize(
    "T, E, k, D, I, group",
    [
        (0, 4, 2, 32, 32, 32),
        (1, 1, 1, 32, 32, 32),
        (1, 16, 8, 320, 96, 32),
        (31, 7, 2, 64, 32, 32),
        (5, 20, 3, 40, 24, 8),
        (65, 4, 1, 100, 70, 0),
        (17, 12, 10, 96, 48, 48),
        (20, 2, 1, 72, 48, 24),
    ]
    # which are slow to interpret: more experts than tokens, more rows than an expert's are taken at once
    + ([] if _native.INTERPRET else [(70, 128, 8, 32, 16, 16), (600, 2, 1, 48, 32, 16)]),
)
@pytest.mark.parametrize("bits", [4, 8])
def test_matches_reference(T, E, k, D, I, group, bits, dtype, device):
    """No row, one, one token's, experts without, groups that no power of two divides."""
    check(drawn(device, T, E, k, D, I, Form(bits, group, "zeros")), dtype)


# halves of a chunk in two groups, the last chunk half, no offsets, minima
@pytest.mark.parametrize(
    "form",
    [
        Form(4, 32),
        Form(4, 96, "zeros"),
        Form(4, 288, "minima"),
        Form(8, 32, "minima"),
        Form(8, 288),
    ],
    ids=lambda form: f"int{form.bits}-{form.group}-{form.kind}",
)
@pytest.mark.skipif(_native.INTERPRET, reason="of the CPU's kernels")
@pytest.mark.parametrize("T", [1, 2, 3, 7])
def test_few_rows_of_wide_weights(T, form, dtype, device):
    """Which integers multiply: one to eight rows at a time.  Of every expert, so that no gradient is one number."""
    check(drawn(device, T, 6, 6, 288, 288, form), dtype)


@pytest.mark.skipif(_native.INTERPRET, reason="of the CPU's kernels")
def test_more_rows_than_are_kept_prepared():
    check(drawn("cpu", 2100, 3, 2, 2048, 32), torch.bfloat16)


def test_odd_widths(dtype, device):
    check(drawn(device, 12, 5, 3, 33, 17, Form(8), bias=True), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_biases_activations_and_limits(activation, limit, dtype, device):
    given = drawn(device, 24, 5, 2, 64, 32, none=True, bias=True)
    check(given, dtype, activation=activation, limit=limit)


def test_all_to_one(dtype, device):
    given = drawn(device, 70, 6, 1, 32, 32)
    ids = torch.full((70, 1), 4, device=device)
    check(given._replace(placed=reference.moe_dispatch(ids, 6)), dtype)


@pytest.mark.parametrize(
    "forms", [("int4 32", "int8 64 zeros"), ("nf4 64 nested", "int4 32 minima")]
)
def test_weights_of_two_forms(forms, dtype, device):
    given = drawn(device, 9, 4, 2, 64, 64)
    w13, w2 = (
        weight(4 * 128, 64, FORMS[forms[0]], device),
        weight(4 * 64, 64, FORMS[forms[1]], device),
    )
    check(given._replace(w13=w13, w2=w2), dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_in_another_order(bits, dtype, device):
    """Act-order, which all experts share."""
    given = drawn(device, 9, 4, 2, 96, 64, Form(bits, 32, "zeros"), none=True)
    turned = [
        replace(w, order=torch.randperm(w.in_features, device=device, dtype=torch.int32))
        for w in (given.w13, given.w2)
    ]
    check(given._replace(w13=turned[0], w2=turned[1]), dtype)


@pytest.mark.parametrize("form", ["int8 rows", "int4 32", "nf4 64 nested"])
def test_one_token_is_what_it_is_among_others(form, device):
    """To how its sums are ordered, by the rule; few rows and many are not of one kernel."""
    many = drawn(device, 40, 8, 4, 128, 64, FORMS[form])
    x, weights = (t.detach() for t in many.inputs)
    ids = reference.moe_dispatch(torch.rand(40, 8, device=device).argsort(-1)[:, :4], 8)

    def token(side: Any, x: Tensor, weights: Tensor) -> Tensor:
        weights = weights if weights.dtype == torch.float64 else weights.float()
        return side.quant_moe_experts(x, weights, ids, many.w13, many.w2)[:1]

    chosen = torch.zeros(1, 4, dtype=torch.int64, device=device)
    for j, row in enumerate(ids.rows[0].tolist()):
        chosen[0, j] = int((ids.offsets[1:] <= row).sum())
    alone = reference.moe_dispatch(chosen, 8)
    assert_matches_reference(
        lambda x, w: ops.quant_moe_experts(x[:1], w[:1].float(), alone, many.w13, many.w2),
        lambda x, w: token(reference, x, w), x, weights, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("how", [{}, {"limit": 1.0}], ids=["free", "limited"])
def test_not_finite(how, T, device):
    """inf and nan where the reference has them, in tokens that have them and in no other."""
    given = drawn(device, T, 4, 2, 64, 32, FORMS["int4 32"], bias=True)
    x, *rest = given.inputs
    with torch.no_grad():
        x[0, 5], x[1, 0] = torch.nan, torch.inf
    expected = of(reference, given, **how)(x, *rest)
    found = of(ops, given, **how)(x, *rest)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found.isfinite().all(1).sum() == T - 2
    (ours,), (theirs,) = (torch.autograd.grad(out.sum(), x) for out in (found, expected))
    assert ours.isfinite().all(1).sum() >= T - 2
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def grads(given: Drawn, **how: Any) -> list[Tensor]:
    """The output and the gradients of x and weights."""
    out = of(ops, given, **how)(*given.inputs)
    return [out, *torch.autograd.grad(out.square().sum(), given.inputs[:2])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", ["int4 32", "nf4 64 nested"])
def test_no_memory_is_read_that_was_not_written(form, device):
    """What torch.empty gives is nan: outputs and gradients are as they were."""
    given = drawn(device, 40, 6, 2, 64, 64, FORMS[form], none=True, bias=True)
    plain, was = grads(given), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = grads(given)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert same(plain, poisoned)


def test_nothing_waits_for_the_device():
    """No launcher or op asks a tensor for its numbers."""
    asks = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|unique)\(")
    paths = [
        *ROOT.glob("kernels/*quant_moe*.py"),
        *ROOT.glob("python/tilewright/ops/quant_moe*.py"),
    ]
    assert len(paths) == 4 and not any(asks.search(path.read_text()) for path in paths)


def test_slots_of_no_expert_are_not_looked_at(device):
    given = drawn(device, 30, 5, 3, 32, 32, none=True, bias=True)
    x, weights, *biases = given.inputs
    expected = of(ops, given)(*given.inputs)
    nowhere = given.placed.rows < 0
    wrong = weights.detach().masked_fill(nowhere, torch.nan).requires_grad_()
    out, *found = grads(given._replace(inputs=[x, wrong, *biases]))
    assert torch.equal(out, expected)
    assert all(g.isfinite().all() for g in found) and not found[1][nowhere].any()
    nobody = reference.moe_dispatch(torch.full((30, 3), -1, device=device), 5)
    assert not any(t.any() for t in grads(given._replace(placed=nobody)))


def test_strides_and_leading_dimensions(dtype, device):
    given = drawn(device, 24, 5, 2, 64, 32, bias=True)
    x, weights, bias13, bias2 = (t.detach() for t in given.inputs)
    x, bias13, bias2 = (t.to(dtype) for t in (x, bias13, bias2))

    def run(x: Tensor, weights: Tensor, more: Drawn, bias13: Tensor, bias2: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weights)]
        out = ops.quant_moe_experts(
            *leaves, more.placed, more.w13, more.w2, bias13=bias13, bias2=bias2
        )
        dout = torch.linspace(-1, 1, 64, device=device).to(dtype).expand(out.shape)
        return [t.reshape(-1) for t in (out, *torch.autograd.grad(out, leaves, dout))]

    dense = run(x, weights, given, bias13, bias2)
    apart = lambda t: torch.stack([t, t], 1)[:, 0]  # noqa: E731
    turned = lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)  # noqa: E731
    rows = ExpertRows(*(torch.stack([t, t], -1)[..., 0] for t in given.placed))
    for other in (apart, turned):
        w13, w2 = (
            replace(w, qweight=other(w.qweight), scales=other(w.scales))
            for w in (given.w13, given.w2)
        )
        more = given._replace(placed=rows, w13=w13, w2=w2)
        strided = run(other(x), turned(weights), more, apart(bias13), turned(bias2))
        assert same(dense, strided)
    leading = given.placed._replace(rows=given.placed.rows.view(2, 12, 2))
    more = given._replace(placed=leading)
    assert same(dense, run(x.view(2, 12, 64), weights.view(2, 12, 2), more, bias13, bias2))


@pytest.mark.parametrize("T", [1, 70])
def test_repeats_bit_for_bit_and_mutates_nothing(T, dtype, device):
    given = drawn(device, T, 9, 3, 160, 96, bias=True)
    x, weights, bias13, bias2 = (t.detach() for t in given.inputs)
    x, bias13, bias2 = (t.to(dtype) for t in (x, bias13, bias2))
    given = given._replace(inputs=[x.requires_grad_(), weights.requires_grad_(), bias13, bias2])
    theirs = [*given.w13.tensors().values(), *given.w2.tensors().values()]
    everything = [*given.inputs, *given.placed, *theirs]
    before = [t.detach().clone() for t in everything]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (threads, threads, 1):
            torch.set_num_threads(n)
            results.append(grads(given))
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], again) for again in results[1:])
    assert same(before, everything)


def test_some_gradients(device):
    """Each alone is what it is among all."""
    given = drawn(device, 20, 4, 2, 32, 32, bias=True)
    out, *whole = grads(given)
    for i, expected in enumerate(whole):
        leaves = [t.detach().requires_grad_(n == i) for n, t in enumerate(given.inputs)]
        (grad,) = torch.autograd.grad(of(ops, given)(*leaves).square().sum(), leaves[i])
        assert torch.equal(grad, expected)
    with torch.no_grad():
        assert torch.equal(of(ops, given)(*given.inputs), out)  # which keeps h


def test_only_h_is_kept(device):
    """In bytes, beside what is there anyway: 4 P I of bfloat16."""
    given = drawn(device, 64, 8, 2, 64, 32)
    x, weights = given.inputs
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    half = x.detach().bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.quant_moe_experts(half, weights, given.placed, given.w13, given.w2)
    theirs = *given.w13.tensors().values(), *given.w2.tensors().values()
    for t in (weights, *given.placed, *theirs):
        kept.pop(t.data_ptr())
    assert sum(kept.values()) == 4 * 128 * 32


def arguments(w: QuantTensor) -> tuple[Any, ...]:
    nested = [] if w.nested is None else [*w.nested]
    return w.qweight, w.scales, w.zeros, w.minima, w.codebook, nested, w.bits


@pytest.mark.parametrize("form", ["int4 64 zeros", "int8 rows", "nf4 64 nested"])
def test_opcheck(form, device):
    given = drawn(device, 9, 4, 2, 64, 64, FORMS[form], bias=True)
    x, weights, bias13, bias2 = (t.detach() for t in given.inputs)
    order2 = torch.randperm(64, device=device, dtype=torch.int32)
    both = *arguments(given.w13), *arguments(given.w2)
    fwd = torch.ops.tilewright.quant_moe_experts_fwd
    bwd = torch.ops.tilewright.quant_moe_experts_bwd
    for order, biases, save in ((None, (None, None), False), (order2, (bias13, bias2), True)):
        more = *both, order, *biases, *[None] * 4, "silu", 1.0, 1.0, save
        args = x, weights, *given.placed, *more
        torch.library.opcheck(fwd.default, args)
    _, h = fwd(*args)
    for wanted in ([True, True], [False, True], [True, False]):
        args = (
            torch.randn_like(x),
            None,
            h,
            weights,
            *given.placed,
            *both,
            order2,
            bias2,
            *[None] * 4,
            "silu",
            1.0,
            1.0,
            wanted + [False] * 4,
        )
        torch.library.opcheck(bwd.default, args)


@pytest.mark.parametrize("form", ["int4 64 zeros", "nf4 64 nested"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(form, dynamic, device):
    given = drawn(device, 11, 5, 2, 64, 64, FORMS[form])
    x, gate = torch.randn(11, 64, device=device), torch.randn(64, 5, device=device)

    def step(x: Tensor, gate: Tensor) -> Tensor:
        weights, ids = ops.moe_route(x @ gate, 2)
        return ops.quant_moe_experts(x, weights, ops.moe_dispatch(ids, 5), given.w13, given.w2)

    leaves = [t.requires_grad_() for t in (x, gate)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for fn in (step, compiled):
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert same(*results)


def test_autocast_casts_x_and_the_biases(device):
    given = drawn(device, 12, 4, 2, 32, 32, bias=True)
    x, weights, *biases = (t.detach() for t in given.inputs)
    with torch.autocast(device, torch.bfloat16):
        found = of(ops, given)(x, weights, *biases)
    expected = of(ops, given)(x.bfloat16(), weights, *(t.bfloat16() for t in biases))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_float64_and_wide_code_books_run_the_reference(device):
    given = drawn(device, 5, 4, 2, 8, 4, Form(4, 4), none=True, bias=True)
    leaves = [t.detach().double() for t in given.inputs]
    leaves = [t.requires_grad_(n < 2) for n, t in enumerate(leaves)]
    for how in ({}, {"activation": "gelu", "limit": 0.7}):
        assert torch.autograd.gradcheck(of(ops, given, **how), leaves)
    book = torch.randn(256, device=device)
    wide = replace(weight(4 * 8, 8, Form(8), device), codebook=book)
    given = given._replace(w13=wide)
    found, expected = (of(side, given)(*given.inputs) for side in (ops, reference))
    assert torch.equal(found, expected)


def test_every_instruction_set_agrees(dtype):
    """Each level this machine has; whatever serves the CPU where there is no extension."""
    C, current = _native.C, _native.cpu_isa()
    try:
        for isa in [None] if C is None else C.isas():
            if C is not None:
                C.set_isa(isa)
            for T, form in ((1, "int4 32"), (30, "int8 32"), (60, "int4 64 zeros")):
                check(drawn("cpu", T, 3, 2, 320, 64, FORMS[form]), dtype)
    finally:
        if C is not None:
            C.set_isa(current)


PLACED = reference.moe_dispatch(torch.tensor([[0, 1], [1, 0], [2, 0]]), 3)
X, WEIGHTS = torch.zeros(3, 8), torch.zeros(3, 2)
W13, W2 = weight(3 * 12, 8, Form(8), "cpu"), weight(3 * 8, 6, Form(8), "cpu")


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"x": X.long()}, "x must be floating point"),
        ({"x": X[0, 0]}, r"x must be floating point \[..., D\], not torch.float32 \(\)"),
        ({"x": X[:, :7]}, r"w13 \(36, 8\) must be \[2 I, 7\] of each of 3 experts"),
        ({"w13": W13.part(0, 35)}, r"w13 \(35, 8\) must be"),
        ({"w13": W13.dequantize()}, "w13 must be a QuantTensor, not Tensor"),
        ({"w2": W2.part(0, 23)}, r"w2 \(23, 6\) must be \(24, 6\)"),
        ({"weights": WEIGHTS[:2]}, r"weights \(2, 2\) must be \[..., k\] for x \(3, 8\)"),
        ({"weights": WEIGHTS.long()}, "weights must be floating point, not torch.int64"),
        ({"weights": WEIGHTS.to("meta")}, "weights on meta, x on cpu"),
        ({"placed": PLACED._replace(order=PLACED.order[:4])}, r"order torch.int64 \(4,\) must be"),
        ({"placed": PLACED._replace(rows=PLACED.rows.int())}, "rows torch.int32"),
        ({"placed": PLACED._replace(offsets=PLACED.offsets[:3])}, r"w2 \(24, 6\) must be"),
        ({"placed": PLACED._replace(offsets=PLACED.offsets[:1])}, "of 1 to 1024 experts"),
        ({"bias13": torch.zeros(3, 11)}, r"bias13 torch.float32 \(3, 11\) must be"),
        ({"bias2": torch.zeros(3, 8).half()}, "bias2 torch.float16"),
        ({"bias2": torch.zeros(3, 8, requires_grad=True)}, "bias2 is frozen"),
        ({"activation": "relu"}, "activation 'relu' is none of silu, gelu, gelu_tanh"),
        ({"limit": 0.0}, "limit 0.0 must be above 0"),
    ],
)
def test_bad_input(changed, told):
    given = {"x": X, "weights": WEIGHTS, "placed": PLACED, "w13": W13, "w2": W2} | changed
    with pytest.raises(ValueError, match=told):
        ops.quant_moe_experts(**given)


@pytest.mark.parametrize(
    "name, bad", [("order", 6), ("order", -1), ("order", 4), ("offsets", 9), ("rows", 7)]
)
def test_rows_that_dispatch_never_gives(name, bad, device):
    """An error of the CPU's kernel; elsewhere nothing that is not there is read."""
    placed = ExpertRows(*(t.to(device).clone() for t in PLACED))
    getattr(placed, name).view(-1)[1] = bad
    given = X.to(device), WEIGHTS.to(device), placed
    w13, w2 = weight(3 * 12, 8, Form(8), device), weight(3 * 8, 6, Form(8), device)
    (route,) = (r for r in explain() if (r.op, r.device) == ("quant_moe_experts", device))
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match=f"{bad} of {name}"):
            ops.quant_moe_experts(*given, w13, w2)
    elif route.implementation == "Triton" or (
        route.implementation == "Triton interpreter" and name != "offsets"
    ):  # experts whose rows overlap race, which the interpreter does not let pass
        ops.quant_moe_experts(*given, w13, w2)
