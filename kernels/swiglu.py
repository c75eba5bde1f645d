"""SwiGLU:  y = silu(gate) up,  silu(g) = g / (1 + e^-g).

Shazeer 2020, arXiv:2002.05202, eq. 6.  The rows' kernels are in _glu.py.
"""

import triton
from torch import Tensor

from ._glu import glu_bwd, glu_fwd, glu_packed_bwd, glu_variants


def swiglu_fwd(gate: Tensor, up: Tensor | None) -> Tensor:
    return glu_fwd(gate, up, "silu")


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return glu_bwd(dy, gate, up, "silu")


def swiglu_packed_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    return glu_packed_bwd(dy, gate_up, "silu")


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    return glu_variants("silu")
