"""A stable sort of P slots by expert, for their counts are enough:  a slot's row is where its expert's rows begin,
and how many slots of its expert come before it.

Three launches and no atomic: BLOCK slots a program count theirs of each of E experts; a program for a few experts
adds up the blocks before each; BLOCK slots a program find their rows.  A block's own slots are compared each with
each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # slots of a program
COLUMNS, BLOCKS = 16, 64  # experts of a program that adds up blocks, and blocks of a step of its


@triton.jit
def _ids(ids_ptr, slots, P, E):
    """Ids, -1 what is no expert's."""
    ids = tl.load(ids_ptr + slots, mask=slots < P, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit
def _moe_dispatch_count_kernel(
    ids_ptr, counts_ptr, P, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """counts [blocks, E]."""
    block = tl.program_id(0).to(tl.int64)
    ids = _ids(ids_ptr, block * BLOCK + tl.arange(0, BLOCK), P, E)
    counts = tl.histogram(tl.maximum(ids, 0), BLOCK_E, mask=ids >= 0)
    cols = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + block * E + cols, counts, mask=cols < E)


@triton.jit
def _moe_dispatch_before_kernel(
    counts_ptr, totals_ptr, blocks, E, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr
):
    """counts [blocks, E] become those of the blocks before; totals [E]."""
    cols = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    totals = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        rows = start + tl.arange(0, BLOCKS)
        at = counts_ptr + rows.to(tl.int64)[:, None] * E + cols[None, :]
        mask = (rows < blocks)[:, None] & (cols < E)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, totals[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        totals += tl.sum(counts, axis=0)
    tl.store(totals_ptr + cols, totals, mask=cols < E)


@triton.jit
def _moe_dispatch_place_kernel(
    ids_ptr, before_ptr, totals_ptr, order_ptr, rows_ptr, offsets_ptr, P, E,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    lanes, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    slots = block * BLOCK + lanes
    ids = _ids(ids_ptr, slots, P, E)
    totals = tl.load(totals_ptr + cols, mask=cols < E, other=0)
    before = tl.load(before_ptr + block * E + cols, mask=cols < E, other=0)
    begins = tl.cumsum(totals, axis=0) - totals
    if block == 0:
        tl.store(offsets_ptr + 1 + cols, (begins + totals).to(tl.int64), mask=cols < E)
        tl.store(offsets_ptr, tl.zeros((), tl.int64))
    earlier = lanes[None, :] < lanes[:, None]
    alike = tl.sum((earlier & (ids[None, :] == ids[:, None])).to(tl.int32), axis=1)
    first = tl.gather(begins + before, tl.maximum(ids, 0), 0)
    # of no expert: past all that are, as many as come before that are of none
    none = (tl.sum(totals, axis=0) - tl.sum(before, axis=0) + block * BLOCK).to(tl.int32)
    here = ids >= 0
    row = (tl.where(here, first, none) + alike).to(tl.int64)
    tl.store(order_ptr + row, slots, mask=slots < P)
    tl.store(rows_ptr + slots, tl.where(here, row, -1), mask=slots < P)


def moe_dispatch(ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [..., k] -> order [P], rows [..., k], offsets [E + 1], all int64."""
    P = ids.numel()
    order, rows, offsets = ids.new_empty(P), ids.new_empty(ids.shape), ids.new_empty(E + 1)
    if P == 0:
        return order, rows, offsets.zero_()
    ids = ids.contiguous()
    blocks, block_e = triton.cdiv(P, BLOCK), max(16, triton.next_power_of_2(E))
    counts = ids.new_empty(blocks, E, dtype=torch.int32)
    totals = ids.new_empty(E, dtype=torch.int32)
    _moe_dispatch_count_kernel[(blocks,)](ids, counts, P, E, BLOCK=BLOCK, BLOCK_E=block_e)
    _moe_dispatch_before_kernel[(triton.cdiv(E, COLUMNS),)](
        counts, totals, blocks, E, BLOCKS=BLOCKS, COLUMNS=COLUMNS
    )
    _moe_dispatch_place_kernel[(blocks,)](
        ids, counts, totals, order, rows, offsets, P, E, BLOCK=BLOCK, BLOCK_E=block_e
    )
    return order, rows, offsets


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """(kernel, signature, constexprs, options) of what the launchers use, to compile offline."""
    found = []
    for E in (128, 1024):
        sizes, tile = {"P": "i32", "E": "i32"}, {"BLOCK": BLOCK, "BLOCK_E": E}
        count = {"ids_ptr": "*i64", "counts_ptr": "*i32"}
        place = {"ids_ptr": "*i64", "before_ptr": "*i32", "totals_ptr": "*i32"}
        place |= {name: "*i64" for name in ("order_ptr", "rows_ptr", "offsets_ptr")}
        found.append((_moe_dispatch_count_kernel, count | sizes, tile, {}))
        found.append((_moe_dispatch_place_kernel, place | sizes, tile, {}))
    before = {"counts_ptr": "*i32", "totals_ptr": "*i32", "blocks": "i32", "E": "i32"}
    found.append((_moe_dispatch_before_kernel, before, {"BLOCKS": BLOCKS, "COLUMNS": COLUMNS}, {}))
    return found
