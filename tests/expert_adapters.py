"""Experts with adapters that tests of ExpertLora draw, and their comparison with their twin."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright import ops, reference
from tilewright.bench import harness
from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows
from tilewright.quant_tensor import QuantTensor
from tilewright.testing import assert_matches_reference

experts = harness.load(Path(__file__).parent / "quant_experts.py")
SCALE = 0.75


class Given(NamedTuple):
    """x, weights, what there is of adapters and biases by name, and w13 and w2 beside them."""

    inputs: dict[str, Tensor]
    placed: ExpertRows
    w13: Tensor | QuantTensor
    w2: Tensor | QuantTensor


def drawn(
    device: str, kind: str, T: int, E: int, k: int, D: int, I: int, R13: int, R2: int, *, none: bool = False,
    bias: bool = False,
) -> Given:  # fmt: skip
    """A slot in three of no expert if none; adapters as large as the weights."""
    ids = torch.rand(T, E, device=device).argsort(-1)[:, :k]
    if none:
        ids = ids.masked_fill(torch.rand(T, k, device=device) < 0.3, -1)
    shapes: dict[str, tuple[int, ...]] = {"x": (T, D), "weights": (T, k)}
    if R13:
        shapes |= {"a13": (E, R13, D), "b13": (E, 2 * I, R13)}
    if R2:
        shapes |= {"a2": (E, R2, I), "b2": (E, D, R2)}
    if bias:
        shapes |= {"bias13": (E, 2 * I), "bias2": (E, D)}
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    inputs["weights"] = inputs["weights"].abs() + 0.1
    for name in {"a13", "b13", "a2", "b2"} & shapes.keys():
        inputs[name] /= shapes[name][-1] ** 0.5
    if kind == "plain":
        w13 = torch.randn(E, 2 * I, D, device=device) / D**0.5
        w2 = torch.randn(E, D, I, device=device) / I**0.5
    else:
        form = experts.FORMS[kind]
        w13, w2 = (experts.weight(n, m, form, device) for n, m in ((E * 2 * I, D), (E * D, I)))
    leaves = {n: t.requires_grad_(not n.startswith("bias")) for n, t in inputs.items()}
    return Given(leaves, reference.moe_dispatch(ids, E), w13, w2)


def call(side: Any, given: Given, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    """The op of what there is: the router's weights float32 whatever x is, w13 and w2 of x's dtype."""
    rest = dict(inputs)
    x, weights = rest.pop("x"), rest.pop("weights")
    lora = ExpertLora(
        **{n: rest.pop(n) for n in ("a13", "b13", "a2", "b2") if n in rest}, scale=SCALE
    )
    weights = weights if weights.dtype == torch.float64 else weights.float()
    if isinstance(given.w13, QuantTensor):
        op, w = side.quant_moe_experts, (given.w13, given.w2)
    else:
        op, w = side.moe_experts, (given.w13.to(x.dtype), given.w2.to(x.dtype))
    return op(x, weights, given.placed, *w, lora=lora, **rest, **how)


def flattened(given: Given) -> tuple[list[Tensor], Callable[..., dict[str, Tensor]]]:
    """Inputs whose rows, by which the rule goes, are an expert's or the router's all; and the way back."""
    shapes = {name: t.shape for name, t in given.inputs.items()}
    flat = [
        t if name in ("x", "bias13", "bias2") else t.flatten(int(name != "weights"))
        for name, t in given.inputs.items()
    ]
    flat = [t.detach().requires_grad_(t.requires_grad) for t in flat]
    return flat, lambda *ts: {n: t.view(shapes[n]) for n, t in zip(shapes, ts, strict=True)}


def check(given: Given, dtype: torch.dtype, **how: Any) -> None:
    flat, back = flattened(given)
    assert_matches_reference(
        lambda *ts: call(ops, given, back(*ts), **how),
        lambda *ts: call(reference, given, back(*ts), **how),
        *flat, dtype=dtype,
    )  # fmt: skip


def run(given: Given, inputs: dict[str, Tensor] | None = None) -> list[Tensor]:
    """The output and every gradient that is asked for."""
    inputs = given.inputs if inputs is None else inputs
    out = call(ops, given, inputs)
    leaves = [t for t in inputs.values() if t.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
