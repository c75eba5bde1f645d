"""An embedding over a quantised weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tilewright.nn._quant_weight import QuantWeight
from tilewright.quant_tensor import QuantTensor


class QuantEmbedding(QuantWeight):
    """Rows of a QuantTensor w [V, E], dequantised and rounded once to `dtype`: ids [...] int32 or int64 ->
    [..., E].  In the place of a torch.nn.Embedding.

    `.to(dtype)`, `.half()` and the like change `dtype`, not the weight.  The weight is frozen, so that
    padding_idx, kept for those who ask, has no gradient to keep off.  Another QuantEmbedding in the place of w
    is shared.  Raises ValueError where ids are of another dtype, IndexError where one on a CPU is outside
    0 .. V - 1.
    """

    def __init__(
        self,
        weight: QuantTensor | QuantWeight,
        *,
        dtype: torch.dtype = torch.float32,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(weight)
        if not dtype.is_floating_point:
            raise ValueError(f"quant_embedding: dtype must be a floating one, not {dtype}")
        self.dtype, self.padding_idx = dtype, padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.weight.out_features

    @property
    def embedding_dim(self) -> int:
        return self.weight.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"quant_embedding: ids must be int32 or int64, not {ids.dtype}")
        try:
            return self.weight.rows(ids, self.dtype)
        except IndexError as error:
            low, high = (int(x) for x in ids.aminmax())
            raise IndexError(
                f"quant_embedding: ids {low} to {high} are not all of {self.num_embeddings} rows"
            ) from error

    def extra_repr(self) -> str:
        w = self.weight
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{w.out_features}, {w.in_features}, bits={w.bits}, group={w.group}, dtype={self.dtype}{padding}"
