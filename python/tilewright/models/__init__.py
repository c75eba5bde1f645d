"""Whole models: one readable file each, every class with from_pretrained(path)."""

from tilewright.models.llama import Llama

__all__ = [
    "Llama",
]
