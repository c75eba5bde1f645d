"""Drop-in modules: subclasses of torch.nn where one exists, with its state dict."""

__all__ = [
]
