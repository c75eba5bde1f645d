"""The public functions: validate, call the operator, autograd.  reference/ has their twins."""

from tilewright.ops.add_rms_norm import add_rms_norm
from tilewright.ops.rms_norm import rms_norm

__all__ = [
    "add_rms_norm",
    "rms_norm",
]
