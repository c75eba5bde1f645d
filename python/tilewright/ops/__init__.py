"""The public functions: validate, call the operator, autograd.  reference/ has their twins."""

from tilewright.ops.attention import attention

__all__ = [
    "attention",
]
