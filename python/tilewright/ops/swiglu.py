"""swiglu: validate, tilewright::swiglu_{fwd,bwd,packed_bwd}, autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tilewright import _op
from tilewright.ops import _glu

_fwd = _op.register("swiglu", "swiglu_fwd(Tensor gate, Tensor? up) -> Tensor", _glu.fake_fwd)
_bwd = _op.register(
    "swiglu", "swiglu_bwd(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", _glu.fake_bwd
)
_packed_bwd = _op.register(
    "swiglu", "swiglu_packed_bwd(Tensor dy, Tensor gate_up) -> Tensor", _glu.fake_packed_bwd
)

_direct = _op.direct("swiglu")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up = ctx.saved_tensors
        if up is None:
            return _packed_bwd(dy, gate), None
        return _bwd(dy, gate, up)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) up in float32 arithmetic, contiguous, saving only its inputs for the backward.

    gate and up [..., I], or gate [..., 2 I] = [gate | up] where up is None -> [..., I], of gate's
    dtype (any float; float32, bfloat16 and float16 have kernels).  ValueError where shapes, dtypes
    or devices do not fit.  Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    if _direct is not None and gate.is_cpu and not torch.compiler.is_compiling():
        y = _direct(gate, up)
        if y is not None:
            return y
    _glu.check("swiglu", gate, up)
    if not _op.serves("swiglu", gate):
        return _op.twin("swiglu")(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or (up is not None and up.requires_grad)):
        return _SwiGLU.apply(gate, up)
    return _fwd(gate, up)
