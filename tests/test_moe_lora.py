"""Adapters (LoRA) of moe_experts and quant_moe_experts, and every gradient, against the reference, by the rule."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tilewright import _native, ops, reference
from tilewright.bench import harness
from tilewright.expert_lora import ExpertLora
from tilewright.quant_tensor import QuantTensor
from tilewright.testing import assert_matches_reference

ROOT = Path(__file__).resolve().parents[1]
lora_of = harness.load(ROOT / "tests/expert_adapters.py")
experts, SCALE = lora_of.experts, lora_of.SCALE
drawn, call, flattened = lora_of.drawn, lora_of.call, lora_of.flattened
check, run, same = lora_of.check, lora_of.run, lora_of.same
KINDS = ("plain", "int4 32", "nf4 64 nested")  # of weights: x's dtype, or quantised


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("R13, R2", [(16, 16), (1, 0), (0, 3), (64, 65)])
def test_matches_reference(kind, R13, R2, dtype, device):
    torch.manual_seed(
        2
    )  # of rank 1 a row is one number, whose error is luck: one that has a margin
    check(drawn(device, kind, 20, 5, 2, 64, 64, R13, R2, none=True, bias=True), dtype)


@pytest.mark.parametrize("kind", ["plain", "int8 rows"])
@pytest.mark.parametrize(
    "T, E, k, D, I",
    [(0, 4, 2, 16, 8), (1, 1, 1, 8, 4), (3, 7, 7, 33, 17), (65, 3, 1, 100, 70), (9, 60, 3, 24, 8)],
)
def test_sizes(kind, T, E, k, D, I, dtype, device):
    """No row, one, one token's, more rows than are taken at once, experts without."""
    torch.manual_seed(2)  # of one token's
    check(drawn(device, kind, T, E, k, D, I, 5, 8), dtype)


@pytest.mark.skipif(_native.INTERPRET, reason="many rows: of the CPU's kernels, or a GPU's")
@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_large_ranks_and_many_rows(kind, dtype, device):
    check(drawn(device, kind, 300, 2, 1, 288, 320, 512, 130), dtype)


@pytest.mark.parametrize("activation, limit", [("gelu", 0.5), ("gelu_tanh", None)])
def test_activations_and_limits(activation, limit, dtype, device):
    given = drawn(device, "plain", 20, 4, 2, 48, 36, 4, 4, bias=True)
    check(given, dtype, activation=activation, limit=limit)


def test_columns_in_another_order(dtype, device):
    """Act-order, of which adapters know nothing."""
    given = drawn(device, "int4 32", 9, 4, 2, 96, 64, 4, 6, none=True)
    turned = [
        replace(w, order=torch.randperm(w.in_features, device=device, dtype=torch.int32))
        for w in (given.w13, given.w2)
    ]
    check(given._replace(w13=turned[0], w2=turned[1]), dtype)


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_is_what_folded_weights_give(kind, device):
    """The same tokens and gradients as w + scale b a, formed: by the rule, the eager side being the folded one's."""
    given = drawn(device, kind, 20, 4, 2, 64, 32, 16, 8)
    flat, back = flattened(given)

    def folded(*ts: Tensor) -> Tensor:
        inputs = back(*ts)
        x, E = inputs["x"], len(inputs["a13"])
        w13, w2 = (
            (w.dequantize(x.dtype) if isinstance(w, QuantTensor) else w.to(x.dtype)).view(E, -1, n)
            for w, n in ((given.w13, 64), (given.w2, 32))
        )
        w13 = w13 + SCALE * inputs["b13"] @ inputs["a13"]
        w2 = w2 + SCALE * inputs["b2"] @ inputs["a2"]
        weights = inputs["weights"].to(torch.promote_types(x.dtype, torch.float32))
        return reference.moe_experts(x, weights, given.placed, w13, w2)

    ours = lambda *ts: call(ops, given, back(*ts))  # noqa: E731
    assert_matches_reference(ours, folded, *flat, dtype=torch.float32)


def test_no_adapters_are_no_lora(dtype, device):
    for kind in ("plain", "int4 32"):
        given = drawn(device, kind, 12, 4, 2, 32, 32, 0, 0)
        x, weights = (t.detach() for t in given.inputs.values())
        x = x.to(dtype)
        op = ops.moe_experts if kind == "plain" else ops.quant_moe_experts
        w = [t.to(dtype) if isinstance(t, Tensor) else t for t in given[2:]]
        expected = op(x, weights, given.placed, *w)
        assert torch.equal(op(x, weights, given.placed, *w, lora=ExpertLora()), expected)


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_experts_without_tokens_get_exactly_nothing(kind, device):
    given = drawn(device, kind, 40, 6, 1, 32, 32, 8, 8)
    placed = reference.moe_dispatch(torch.full((40, 1), 4, device=device), 6)
    _, *grads = run(given._replace(placed=placed))
    for grad in grads[2:]:
        assert grad[4].any() and not grad[[0, 1, 2, 3, 5]].any()
    nobody = reference.moe_dispatch(torch.full((40, 1), -1, device=device), 6)
    assert not any(t.any() for t in run(given._replace(placed=nobody)))


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_slots_of_no_expert_are_not_looked_at(kind, device):
    given = drawn(device, kind, 20, 5, 3, 32, 32, 4, 4, none=True)
    nowhere = given.placed.rows < 0
    wrong = given.inputs["weights"].detach().masked_fill(nowhere, torch.nan).requires_grad_()
    assert same(run(given), run(given, given.inputs | {"weights": wrong}))


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_no_memory_is_read_that_was_not_written(kind, device):
    """What torch.empty gives is nan: outputs and gradients are as they were."""
    given = drawn(device, kind, 20, 6, 2, 64, 64, 5, 17, none=True, bias=True)
    plain, was = run(given), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = run(given)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert same(plain, poisoned)


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
@pytest.mark.parametrize("T", [1, 70])
def test_repeats_bit_for_bit_and_mutates_nothing(kind, T, dtype, device):
    given = drawn(device, kind, T, 9, 3, 64, 96, 16, 20, bias=True)
    inputs = {
        n: t.detach().to(t.dtype if n == "weights" else dtype).requires_grad_(t.requires_grad)
        for n, t in given.inputs.items()
    }
    everything = [*inputs.values(), *given.placed]
    before = [t.detach().clone() for t in everything]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (threads, 3, 1):
            torch.set_num_threads(n)
            results.append(run(given, inputs))
    finally:
        torch.set_num_threads(threads)
    assert same(results[0], results[1]) and same(results[0], results[2])
    assert same(before, everything)


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_some_gradients_and_strides(kind, device):
    """Each alone is what it is among all, and of adapters that lie otherwise."""
    given = drawn(device, kind, 20, 4, 2, 32, 32, 4, 8)
    out, *whole = run(given)
    for name, expected in zip(given.inputs, whole, strict=True):
        alone = {n: t.detach().requires_grad_(n == name) for n, t in given.inputs.items()}
        assert torch.equal(run(given, alone)[1], expected)
    turned = {
        n: t.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
        for n, t in given.inputs.items()
    }
    assert same([out, *whole], run(given, turned))
    with torch.no_grad():
        assert torch.equal(call(ops, given, given.inputs), out)  # which keeps h


class Backwards(TorchDispatchMode):
    """Numbers in each output of the experts' backward operators."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "moe_experts_bwd" in func.name():
            self.sizes.append([t.numel() for t in out])
        return out


def test_frozen_weights_have_no_gradients_formed(device):
    given = drawn(device, "plain", 20, 4, 2, 32, 16, 4, 8, bias=True)
    with Backwards() as seen:
        grads = run(given)[1:]
    x, weights, *adapters = (g.numel() for g in grads)
    assert seen.sizes == [[x, weights, 0, 0, 0, 0, *adapters]]


@pytest.mark.parametrize("kind, of", [("plain", "all"), ("int4 32", "all"), ("int4 32", "a2")])
def test_only_x_and_h_are_kept(kind, of, device):
    """In bytes, beside what is there anyway: nothing of a rank, and x only where it is asked for."""
    given = drawn(device, kind, 64, 8, 2, 64, 32, 16, 16)
    inputs = {
        n: (t if n == "weights" else t.bfloat16()).detach().requires_grad_(of in ("all", n))
        for n, t in given.inputs.items()
    }
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    if kind == "plain":
        given = given._replace(w13=given.w13.bfloat16(), w2=given.w2.bfloat16())
        theirs = [given.w13, given.w2]
    else:
        theirs = [*given.w13.tensors().values(), *given.w2.tensors().values()]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(ops, given, inputs)
    for t in (*given.placed, *theirs, *(t for n, t in inputs.items() if n != "x")):
        kept.pop(t.data_ptr())
    assert sum(kept.values()) == 2 * 64 * 64 * (of == "all") + 4 * 128 * 32


def test_two_steps_of_training(device):
    """Adapters alone, b from zeros: losses by the rule, and they fall."""
    given = drawn(device, "plain", 40, 5, 2, 16, 12, 4, 4)

    def losses(side: Any, x: Tensor, *adapters: Tensor) -> Tensor:
        found = []
        a13, b13, a2, b2 = adapters
        for _ in range(3):
            leaves = [t.detach().requires_grad_() for t in (a13, b13, a2, b2)]
            names = ("a13", "b13", "a2", "b2")
            inputs = {"x": x.detach(), "weights": given.inputs["weights"].detach().to(x.dtype)}
            out = call(side, given, inputs | dict(zip(names, leaves, strict=True)))
            loss = (out - x).square().mean()
            grads = torch.autograd.grad(loss, leaves)
            a13, b13, a2, b2 = (t - 0.5 * g for t, g in zip(leaves, grads, strict=True))
            found.append(loss.detach())
        assert found[2] < found[0]
        return torch.stack(found)

    adapters = [given.inputs[n].detach() for n in ("a13", "b13", "a2", "b2")]
    adapters[1].zero_(), adapters[3].zero_()
    assert_matches_reference(
        lambda *ts: losses(ops, *ts), lambda *ts: losses(reference, *ts),
        given.inputs["x"].detach(), *adapters, dtype=torch.float32,
    )  # fmt: skip


def test_opcheck(device):
    given = drawn(device, "plain", 9, 4, 2, 16, 8, 3, 4, bias=True)
    inputs = {n: t.detach() for n, t in given.inputs.items()}
    x, weights, *pairs, bias13, bias2 = inputs.values()
    fwd, bwd = torch.ops.tilewright.moe_experts_fwd, torch.ops.tilewright.moe_experts_bwd
    none = [None, None]
    for adapters in (pairs, [*pairs[:2], *none], [*none, *pairs[2:]]):
        more = (
            weights,
            *given.placed,
            given.w13,
            given.w2,
            bias13,
            bias2,
            *adapters,
            "silu",
            1.0,
            SCALE,
        )
        torch.library.opcheck(fwd.default, (x, *more, True))
        _, h = fwd(x, *more, True)
        for wanted in ([True] * 10, [False] * 6 + [True, False, False, True]):
            torch.library.opcheck(bwd.default, (torch.randn_like(x), x, h, *more, wanted))


def test_opcheck_of_quantised_weights(device):
    given = drawn(device, "int4 32", 9, 4, 2, 32, 32, 3, 4, bias=True)
    inputs = {n: t.detach() for n, t in given.inputs.items()}
    x, weights, *adapters, bias13, bias2 = inputs.values()
    both = [
        [w.qweight, w.scales, w.zeros, w.minima, w.codebook, [], w.bits]
        for w in (given.w13, given.w2)
    ]
    order2 = torch.randperm(32, device=device, dtype=torch.int32)
    fwd = torch.ops.tilewright.quant_moe_experts_fwd
    bwd = torch.ops.tilewright.quant_moe_experts_bwd
    start = (weights, *given.placed, *both[0], *both[1], order2)
    args = (x, *start, bias13, bias2, *adapters, "silu", 1.0, SCALE, True)
    torch.library.opcheck(fwd.default, args)
    _, h = fwd(*args)
    for known, wanted in ((x, [True] * 6), (None, [True, False, False, False, True, True])):
        more = (*start, bias2, *adapters, "silu", 1.0, SCALE, wanted)
        torch.library.opcheck(bwd.default, (torch.randn_like(x), known, h, *more))


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(kind, dynamic, device):
    given = drawn(device, kind, 11, 5, 2, 32, 32, 4, 8)
    leaves, w = list(given.inputs.values()), (given.w13, given.w2)
    op = ops.moe_experts if kind == "plain" else ops.quant_moe_experts

    def step(x: Tensor, weights: Tensor, *adapters: Tensor) -> Tensor:
        return op(x, weights, given.placed, *w, lora=ExpertLora(*adapters, scale=SCALE))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for fn in (step, compiled):
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert same(*results)


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_autocast_casts_adapters(kind, device):
    """As PEFT has them: float32 beside weights of bfloat16."""
    given = drawn(device, kind, 12, 4, 2, 32, 32, 4, 4)
    with torch.autocast(device, torch.bfloat16):
        found = run(given)
    half = {
        n: (t if n == "weights" else t.bfloat16()).detach().requires_grad_()
        for n, t in given.inputs.items()
    }
    assert found[0].dtype == torch.bfloat16
    assert same([t.to(u) for t, u in zip(found, run(given, half), strict=True)], run(given, half))


def test_gradcheck(device):
    """Of the reference, which float64 runs."""
    given = drawn(device, "plain", 5, 4, 2, 4, 3, 2, 1, none=True)
    names = list(given.inputs)
    leaves = [t.detach().double().requires_grad_() for t in given.inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *ts: call(ops, given, dict(zip(names, ts, strict=True))), leaves
    )


@pytest.mark.parametrize("kind", ["plain", "int4 32"])
def test_every_instruction_set_agrees(kind, dtype):
    """Each level this machine has; whatever serves the CPU where there is no extension."""
    C, current = _native.C, _native.cpu_isa()
    try:
        for isa in [None] if C is None else C.isas():
            if C is not None:
                C.set_isa(isa)
            check(drawn("cpu", kind, 40, 3, 2, 96, 64, 16, 9), dtype)
    finally:
        if C is not None:
            C.set_isa(current)


def test_what_peft_trains(device):
    """Its target_parameters' deltas, by its formula, and gradients to its parameters."""
    E, R, D, I = 5, 3, 16, 8
    given = drawn(device, "plain", 20, E, 2, D, I, 0, 0)
    sizes = ((E * R, D), (2 * I, R * E), (E * R, I), (D, R * E))
    parts = [torch.randn(size, device=device) / size[-1] ** 0.5 for size in sizes]

    def of(side: Any, folded: bool) -> Callable[..., Tensor]:
        def tokens(*ts: Tensor) -> Tensor:
            x, *pairs = ts
            w13, w2 = given.w13.to(x.dtype), given.w2.to(x.dtype)
            weights = (
                given.inputs["weights"].detach().to(torch.promote_types(x.dtype, torch.float32))
            )
            lora = ExpertLora.from_peft(E, (pairs[0], pairs[1]), (pairs[2], pairs[3]), SCALE)
            if folded:
                w13, w2 = (
                    w + SCALE * torch.einsum(
                        "o r e, e r i -> e o i", b.reshape(len(b), -1, E), a.reshape(E, -1, a.shape[1])
                    )
                    for w, a, b in ((w13, *pairs[:2]), (w2, *pairs[2:]))
                )  # fmt: skip
            return side.moe_experts(
                x, weights, given.placed, w13, w2, lora=None if folded else lora
            )

        return tokens

    leaves = [t.detach().requires_grad_() for t in (given.inputs["x"], *parts)]
    assert_matches_reference(of(ops, False), of(reference, True), *leaves, dtype=torch.float32)


PLACED = reference.moe_dispatch(torch.tensor([[0, 1], [1, 0], [2, 0]]), 3)
X, WEIGHTS, W13, W2 = (torch.zeros(s) for s in ((3, 8), (3, 2), (3, 12, 8), (3, 8, 6)))
A13, B13, A2, B2 = (torch.zeros(s) for s in ((3, 4, 8), (3, 12, 4), (3, 4, 6), (3, 8, 4)))


@pytest.mark.parametrize(
    "lora, told",
    [
        (ExpertLora(A13), "a13 and b13 go together"),
        (ExpertLora(b2=B2), "a2 and b2 go together"),
        (ExpertLora(A13[0], B13), r"a13 \(4, 8\) must be \[3, R, 8\], R from 1 to 512"),
        (ExpertLora(A13[..., :7], B13), r"a13 \(3, 4, 7\) must be \[3, R, 8\]"),
        (ExpertLora(torch.zeros(3, 513, 8), torch.zeros(3, 12, 513)), "R from 1 to 512"),
        (ExpertLora(A13, B13[:, :, :3]), r"b13 \(3, 12, 3\) must be \(3, 12, 4\)"),
        (ExpertLora(None, None, A2, B2[:2]), r"b2 \(2, 8, 4\) must be \(3, 8, 4\)"),
        (ExpertLora(A13.half(), B13), "a13 torch.float16, x torch.float32"),
        (ExpertLora(None, None, A2, B2.double()), "b2 torch.float64, x torch.float32"),
        (ExpertLora(A13.to("meta"), B13.to("meta")), "a13 on meta, x on cpu"),
    ],
)
@pytest.mark.parametrize("quantised", [False, True])
def test_bad_input(lora, told, quantised):
    if quantised:
        form = experts.Form(8)
        w = experts.weight(36, 8, form, "cpu"), experts.weight(24, 6, form, "cpu")
    op = ops.quant_moe_experts if quantised else ops.moe_experts
    with pytest.raises(ValueError, match=told):
        op(X, WEIGHTS, PLACED, *(w if quantised else (W13, W2)), lora=lora)
