"""Where each token's experts find it: what moe_dispatch returns and the experts' kernels take."""

from typing import NamedTuple

from torch import Tensor


class ExpertRows(NamedTuple):
    """The rows of the experts' input and output, expert by expert: a row for each slot, k slots for each token.

    Slot t * k + j is token t's j-th expert.  order [P] int64: the slot of each row, so token order // k; rows
    [..., k] int64: the row of each slot, -1 where it has no expert here; offsets [E + 1] int64: expert e's rows are
    offsets[e] to offsets[e + 1], in their tokens' order.  The last rows, from offsets[E], are the slots of no
    expert.
    """

    order: Tensor
    rows: Tensor
    offsets: Tensor
