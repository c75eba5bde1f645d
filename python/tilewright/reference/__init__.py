"""The specification of every op, in eager PyTorch: same names and signatures as ops/."""

from tilewright.reference.add_rms_norm import add_rms_norm
from tilewright.reference.rms_norm import rms_norm

__all__ = [
    "add_rms_norm",
    "rms_norm",
]
