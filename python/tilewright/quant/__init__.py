"""Formats of quantised checkpoints: one file each."""

from tilewright.quant.gguf import GGUFFile

__all__ = [
    "GGUFFile",
]
