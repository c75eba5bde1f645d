"""The public functions: validate, call the operator, autograd.  reference/ has their twins."""

from tilewright.ops.quant_linear import quant_linear

__all__ = [
    "quant_linear",
]
