"""The specification of every op, in eager PyTorch: same names and signatures as ops/."""

from tilewright.reference.quant_linear import quant_linear

__all__ = [
    "quant_linear",
]
