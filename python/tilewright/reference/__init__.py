"""The specification of every op, in eager PyTorch: same names and signatures as ops/."""

__all__ = [
]
