"""Drop-in modules: subclasses of torch.nn where one exists, with its state dict."""

from tilewright.nn.quant_linear import QuantLinear

__all__ = [
    "QuantLinear",
]
