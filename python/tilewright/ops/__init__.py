"""The public functions: validate, call the operator, autograd.  reference/ has their twins."""

from tilewright.ops.geglu import geglu
from tilewright.ops.rope import rope
from tilewright.ops.swiglu import swiglu

__all__ = [
    "geglu",
    "rope",
    "swiglu",
]
