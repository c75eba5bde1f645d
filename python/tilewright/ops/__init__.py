"""The public functions: validate, call the operator, autograd.  reference/ has their twins."""

__all__ = [
]
