"""Whole models: one readable file each, every class with from_pretrained(path)."""

from tilewright.models.llama import Llama
from tilewright.models.mixtral import Mixtral

__all__ = [
    "Llama",
    "Mixtral",
]
