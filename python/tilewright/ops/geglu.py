"""geglu: validate, tilewright::geglu_{fwd,bwd,packed_bwd}, autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op
from tilewright.ops import _glu

_fwd = _op.register(
    "geglu", "geglu_fwd(Tensor gate, Tensor? up, str approximate) -> Tensor", _glu.fake_fwd
)
_bwd = _op.register(
    "geglu",
    "geglu_bwd(Tensor dy, Tensor gate, Tensor up, str approximate) -> (Tensor, Tensor)",
    _glu.fake_bwd,
)
_packed_bwd = _op.register(
    "geglu",
    "geglu_packed_bwd(Tensor dy, Tensor gate_up, str approximate) -> Tensor",
    _glu.fake_packed_bwd,
)

_direct = _op.direct("geglu")


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return _fwd(gate, up, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        if up is None:
            return _packed_bwd(dy, gate, ctx.approximate), None, None
        return (*_bwd(dy, gate, up, ctx.approximate), None)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) up in float32 arithmetic, contiguous, saving only its inputs for the backward.

    gate and up [..., I], or gate [..., 2 I] = [gate | up] where up is None -> [..., I], of gate's
    dtype (any float; float32, bfloat16 and float16 have kernels).  approximate is "tanh" or "none",
    the exact gelu, as in torch.nn.functional.gelu.  ValueError where shapes, dtypes or devices do
    not fit.  Shazeer 2020, arXiv:2002.05202, eq. 6; Hendrycks & Gimpel 2016, arXiv:1606.08415.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', not {approximate!r}")
    if _direct is not None and gate.is_cpu and not torch.compiler.is_compiling():
        y = _direct(gate, up, approximate == "tanh")
        if y is not None:
            return y
    _glu.check("geglu", gate, up)
    if not _op.serves("geglu", gate):
        return _op.twin("geglu")(gate, up, approximate=approximate)
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _GeGLU.apply(gate, up, approximate)
    return _fwd(gate, up, approximate)
