"""Drop-in modules: subclasses of torch.nn where one exists, with its state dict."""

from tilewright.nn.add_rms_norm import AddRMSNorm
from tilewright.nn.rms_norm import RMSNorm

__all__ = [
    "AddRMSNorm",
    "RMSNorm",
]
