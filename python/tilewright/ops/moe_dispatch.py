"""moe_dispatch: validate, tilewright::moe_dispatch."""

import torch
from torch import Tensor

from tilewright import _op
from tilewright.expert_rows import ExpertRows
from tilewright.ops.moe_route import MOST_EXPERTS

_dispatch = _op.register(
    "moe_dispatch",
    "moe_dispatch(Tensor ids, int E) -> (Tensor, Tensor, Tensor)",
    fake=lambda ids, E: (
        ids.new_empty(ids.numel()),
        ids.new_empty(ids.shape),
        ids.new_empty(E + 1),
    ),
    dtypes=frozenset({torch.int64}),
)


def moe_dispatch(ids: Tensor, E: int) -> ExpertRows:
    """Each expert's tokens side by side: where the rows of the experts' input and output are.

    ids [..., k] int64 of E experts -> order [P], rows [..., k] and offsets [E + 1], int64, of P slots.  An expert's
    rows are in their tokens' order.  An id of -1 has no row but a place past the last expert's; another id that is
    no expert's is a ValueError of the CPU's kernel, and as -1 elsewhere: a GPU's cannot raise.  ValueError where ids
    are not int64 or E is not from 1 to 1024.
    """
    if ids.dtype != torch.int64 or ids.dim() == 0:
        raise ValueError(f"moe_dispatch: ids {ids.dtype} {tuple(ids.shape)} must be int64 [..., k]")
    if not 1 <= E <= MOST_EXPERTS:
        raise ValueError(f"moe_dispatch: {E} experts; from 1 to {MOST_EXPERTS} are taken")
    if not _op.serves("moe_dispatch", ids):
        return _op.twin("moe_dispatch")(ids, E)
    return ExpertRows(*_dispatch(ids, E))
