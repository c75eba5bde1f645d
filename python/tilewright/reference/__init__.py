"""The specification of every op, in eager PyTorch: same names and signatures as ops/."""

from tilewright.reference.attention import attention

__all__ = [
    "attention",
]
