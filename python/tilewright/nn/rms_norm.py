"""RMSNorm as a drop-in torch.nn.RMSNorm: same constructor, same state dict."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilewright import ops


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on our kernel.  x [..., *normalized_shape] -> the same shape and dtype.

    offset is added to the weight when it is used: Gemma stores weight - 1, and takes offset=1; the
    weight then starts at 1 - offset, so that a fresh module scales by 1.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
    ) -> None:
        self.offset = offset  # before super().__init__, which resets the parameters
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Set the weight to 1 - offset."""
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x over its last len(normalized_shape) dimensions."""
        shape = self.normalized_shape
        if len(shape) == 1:
            if self.weight is None and x.shape[-1:] != shape:
                raise ValueError(f"RMSNorm: x {tuple(x.shape)} does not end in {shape}")
            return ops.rms_norm(x, self.weight, self.eps, offset=self.offset)
        if x.shape[-len(shape) :] != shape:
            raise ValueError(f"RMSNorm: x {tuple(x.shape)} does not end in {shape}")
        weight = None if self.weight is None else self.weight.flatten()
        y = ops.rms_norm(x.flatten(-len(shape)), weight, self.eps, offset=self.offset)
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """torch's, and the offset where there is one."""
        return super().extra_repr() + (f", offset={self.offset}" if self.offset else "")
