"""GeGLU:  y = gelu(gate) up,  gelu(g) = g Phi(g) exactly, or by tanh.

Shazeer 2020, arXiv:2002.05202, eq. 6; the tanh form is Hendrycks & Gimpel 2016, arXiv:1606.08415.
The rows' kernels are in _glu.py.
"""

import triton
from torch import Tensor

from ._glu import glu_bwd, glu_fwd, glu_packed_bwd, glu_variants

ACTS = {"tanh": "gelu_tanh", "none": "gelu_erf"}


def geglu_fwd(gate: Tensor, up: Tensor | None, approximate: str) -> Tensor:
    return glu_fwd(gate, up, ACTS[approximate])


def geglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return glu_bwd(dy, gate, up, ACTS[approximate])


def geglu_packed_bwd(dy: Tensor, gate_up: Tensor, approximate: str) -> Tensor:
    return glu_packed_bwd(dy, gate_up, ACTS[approximate])


def variants() -> list[tuple[triton.JITFunction, dict, dict, dict]]:
    return [v for act in ACTS.values() for v in glu_variants(act)]
