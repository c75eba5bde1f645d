"""Formats of quantised checkpoints, one file each, quantisers, and modules quantised in place.

gptq, awq, compressed_tensors, bitsandbytes and hqq read one layer's tensors (`read`), gptq,
compressed_tensors and hqq write them too (`write`); gguf reads files, and writes a tensor's blocks.
quantisers make a QuantTensor of a matrix, quantize_ an nn.QuantLinear of each linear layer.
"""

from typing import TYPE_CHECKING, Any

from tilewright.quant import awq, bitsandbytes, compressed_tensors, gptq, hqq, quantisers
from tilewright.quant.apply import QuantConfig, quantize_

if TYPE_CHECKING:
    from tilewright.quant.gguf import GGUFFile

__all__ = [
    "GGUFFile",
    "QuantConfig",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "gptq",
    "hqq",
    "quantisers",
    "quantize_",
]


def __getattr__(name: str) -> Any:
    # gguf is a package of its own, which the other formats do without
    if name == "GGUFFile":
        from tilewright.quant.gguf import GGUFFile

        return GGUFFile
    raise AttributeError(f"module 'tilewright.quant' has no attribute {name!r}")
