"""Experts of quantised weights that tests of quant_moe_experts draw, and its comparison with its twin."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilewright import ops, reference
from tilewright.expert_rows import ExpertRows
from tilewright.quant_tensor import Nested, QuantTensor, packed
from tilewright.testing import assert_matches_reference


class Form(NamedTuple):
    bits: int = 4
    group: int = 0  # 0: a row's
    kind: str = "symmetric"
    scales: torch.dtype = torch.float16


FORMS = {
    "int8 rows": Form(8),
    "int8 32": Form(8, 32),  # GGUF's Q8_0
    "int8 64 zeros": Form(8, 64, "zeros"),
    "int8 16 minima": Form(8, 16, "minima", torch.float32),  # Q5_K
    "int4 32": Form(4, 32),  # Q4_0
    "int4 64 zeros": Form(4, 64, "zeros"),
    "int4 128 zeros": Form(4, 128, "zeros", torch.bfloat16),
    "int4 32 minima": Form(4, 32, "minima"),  # Q4_1, Q4_K
    "nf4 64": Form(4, 64, "codebook", torch.float32),
    "nf4 64 nested": Form(4, 64, "nested"),
}


def weight(N: int, K: int, form: Form, device: str) -> QuantTensor:
    """Of numbers that keep the scale of what they multiply."""
    bits, G = form.bits, K // (form.group or K)
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device=device)
    size = 4 / 2**bits / K**0.5
    scales = ((torch.rand(N, G, device=device) + 0.5) * size).to(form.scales)
    parts: dict[str, Any] = {"qweight": packed(codes, bits), "scales": scales, "bits": bits}
    middle = 2 ** (bits - 1)
    if form.kind == "zeros":
        zeros = torch.randint(middle - 2, middle + 3, (N, G), device=device)
        parts["zeros"] = zeros.to(form.scales)
    elif form.kind == "minima":
        parts["minima"] = (-scales.float() * middle * (torch.rand(N, G, device=device) + 0.5)).to(
            form.scales
        )
    elif form.kind in ("codebook", "nested"):
        parts["codebook"] = torch.linspace(-1, 1, 16, device=device) ** 3 * 8
    if form.kind == "nested":
        parts["scales"] = torch.randint(0, 256, (N, G), dtype=torch.uint8, device=device)
        blocks = (torch.rand(-(-N * G // 256), device=device) + 0.5) * size
        code = torch.rand(256, device=device) - 0.5
        parts["nested"] = Nested(code, blocks, torch.tensor(size, device=device))
    return QuantTensor(**parts)


class Drawn(NamedTuple):
    inputs: list[Tensor]  # x, weights and perhaps the biases
    placed: ExpertRows
    w13: QuantTensor
    w2: QuantTensor


def drawn(
    device: str, T: int, E: int, k: int, D: int, I: int, form: Form = FORMS["int4 32"], *, none: bool = False,
    bias: bool = False,
) -> Drawn:  # fmt: skip
    """A slot in three of no expert if none."""
    ids = torch.rand(T, E, device=device).argsort(-1)[:, :k]
    if none:
        ids = ids.masked_fill(torch.rand(T, k, device=device) < 0.3, -1)
    x = torch.randn(T, D, device=device).requires_grad_()
    weights = (torch.randn(T, k, device=device).abs() + 0.1).requires_grad_()
    biases = [torch.randn(E, n, device=device) for n in (2 * I, D)] if bias else []
    w13, w2 = weight(E * 2 * I, D, form, device), weight(E * D, I, form, device)
    return Drawn([x, weights, *biases], reference.moe_dispatch(ids, E), w13, w2)


def of(side: Any, given: Drawn, **how: Any) -> Any:
    def experts(x: Tensor, weights: Tensor, *bias: Tensor) -> Tensor:
        """The router's weights are float32, whatever x is."""
        weights = weights if weights.dtype == torch.float64 else weights.float()
        biases = dict(zip(("bias13", "bias2"), bias, strict=False))
        return side.quant_moe_experts(
            x, weights, given.placed, given.w13, given.w2, **biases, **how
        )

    return experts


def check(given: Drawn, dtype: torch.dtype, **how: Any) -> None:
    """By the rule, whose rows are of the router's weights all."""
    x, weights, *biases = given.inputs
    flat = [x, weights.detach().flatten().requires_grad_(), *biases]

    def shaped(side: Any) -> Any:
        experts = of(side, given, **how)
        return lambda x, w, *biases: experts(x, w.view(weights.shape), *biases)

    assert_matches_reference(shaped(ops), shaped(reference), *flat, dtype=dtype)
