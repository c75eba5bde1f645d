"""What the experts' public functions share: the rules for tokens, their slots, the activation and adapters."""

import torch
from torch import Tensor

from tilewright import _op
from tilewright.expert_lora import ExpertLora
from tilewright.expert_rows import ExpertRows

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
MOST_RANK = 512
ADAPTERS = "Tensor? a13, Tensor? b13, Tensor? a2, Tensor? b2"  # in the operators' schemas


def check_activation(op: str, activation: str, limit: float | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit {limit} must be above 0")


def check_x(op: str, x: Tensor) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point [..., D], not {x.dtype} {tuple(x.shape)}")


def check_slots(op: str, x: Tensor, weights: Tensor, placed: ExpertRows, E: int) -> None:
    """That weights [..., k] and moe_dispatch's rows are of x [..., D] and of E experts."""
    if weights.dim() != x.dim() or weights.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{op}: weights {tuple(weights.shape)} must be [..., k] for x {tuple(x.shape)}"
        )
    if not weights.is_floating_point():
        raise ValueError(f"{op}: weights must be floating point, not {weights.dtype}")
    shapes = {"order": (weights.numel(),), "rows": weights.shape, "offsets": (E + 1,)}
    for name, t in placed._asdict().items():
        if t.shape != shapes[name] or t.dtype != torch.int64:
            raise ValueError(
                f"{op}: {name} {t.dtype} {tuple(t.shape)} must be int64 {tuple(shapes[name])},"
                " as moe_dispatch's"
            )


def check_devices(op: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} on {t.device}, x on {x.device}")


def cast_lora(lora: ExpertLora | None, kind: torch.dtype | None) -> ExpertLora:
    """Adapters as autocast casts them; none: those of no pair."""
    if lora is None:
        return ExpertLora()
    if kind is None:
        return lora
    a13, b13, a2, b2 = (None if t is None else _op.autocast(t, kind) for t in lora[:4])
    return ExpertLora(a13, b13, a2, b2, lora.scale)


def check_lora(op: str, x: Tensor, lora: ExpertLora, E: int, I: int) -> None:
    """That each pair fits x [..., D] and E experts' w13 [2 I, D] or w2 [D, I]."""
    D = x.shape[-1]
    pairs = {"13": (lora.a13, lora.b13, 2 * I, D), "2": (lora.a2, lora.b2, D, I)}
    for n, (a, b, rows, columns) in pairs.items():
        if (a is None) != (b is None):
            raise ValueError(f"{op}: a{n} and b{n} go together, one of them is None")
        if a is None or b is None:
            continue
        R = a.shape[1] if a.dim() == 3 else 0
        if not 1 <= R <= MOST_RANK or a.shape != (E, R, columns):
            raise ValueError(
                f"{op}: a{n} {tuple(a.shape)} must be [{E}, R, {columns}], R from 1 to {MOST_RANK}"
            )
        if b.shape != (E, rows, R):
            raise ValueError(f"{op}: b{n} {tuple(b.shape)} must be {(E, rows, R)}")
        for name, t in ((f"a{n}", a), (f"b{n}", b)):
            if t.dtype != x.dtype:
                raise ValueError(f"{op}: {name} {t.dtype}, x {x.dtype}")
    adapters = {"a13": lora.a13, "b13": lora.b13, "a2": lora.a2, "b2": lora.b2}
    check_devices(op, x, adapters)
