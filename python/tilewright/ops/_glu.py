"""What the gated linear units' public functions share: the shapes' rules, and the fakes."""

from torch import Tensor


def check(op: str, gate: Tensor, up: Tensor | None) -> None:
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"{op}: packed gate {tuple(gate.shape)} has no two halves")
    elif gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"{op}: up {tuple(up.shape)} does not fit gate {tuple(gate.shape)}")
    elif gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"{op}: up ({up.dtype}, {up.device}) does not fit gate ({gate.dtype}, {gate.device})"
        )
    if not gate.is_floating_point():
        raise ValueError(f"{op}: gate must be floating point, not {gate.dtype}")


def fake_fwd(gate: Tensor, up: Tensor | None, *_: object) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2) if up is None else gate.shape)


def fake_bwd(dy: Tensor, gate: Tensor, up: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def fake_packed_bwd(dy: Tensor, gate_up: Tensor, *_: object) -> Tensor:
    return gate_up.new_empty(gate_up.shape)
