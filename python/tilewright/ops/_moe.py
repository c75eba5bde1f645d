"""What the experts' public functions share: the rules for tokens, their slots and the activation."""

import torch
from torch import Tensor

from tilewright.expert_rows import ExpertRows

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


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
