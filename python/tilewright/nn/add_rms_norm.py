"""AddRMSNorm: RMSNorm that first adds to the residual stream, in one pass."""

from torch import Tensor

from tilewright import ops

from .rms_norm import RMSNorm


class AddRMSNorm(RMSNorm):
    """RMSNorm of x + residual.  x, residual [..., D] -> y, x + residual; RMSNorm's state dict."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The normalised sum, and the sum: the new residual."""
        shape = self.normalized_shape
        if x.shape[-len(shape) :] != shape:
            raise ValueError(f"AddRMSNorm: x {tuple(x.shape)} does not end in {shape}")
        if len(shape) == 1:
            return ops.add_rms_norm(x, residual, self.weight, self.eps, offset=self.offset)
        weight = None if self.weight is None else self.weight.flatten()
        n = -len(shape)
        y, h = ops.add_rms_norm(
            x.flatten(n), residual.flatten(n), weight, self.eps, offset=self.offset
        )
        return y.view(x.shape), h.view(x.shape)
