"""moe_dispatch against its reference, to the last number."""

import pytest
import torch
from torch import Tensor

from tilewright import explain, ops, reference
from tilewright.expert_rows import ExpertRows


def check(ids: Tensor, E: int) -> ExpertRows:
    """Equal to the reference, and what it says it is."""
    found, expected = ops.moe_dispatch(ids, E), reference.moe_dispatch(ids, E)
    for name, a, b in zip(ExpertRows._fields, found, expected, strict=True):
        assert a.dtype == torch.int64 and a.is_contiguous() and torch.equal(a, b), name
    flat = ids.reshape(-1)
    assert torch.equal(found.order.sort().values, torch.arange(len(flat), device=ids.device))
    assert found.rows.shape == ids.shape and found.offsets[0] == 0
    for e, (begin, end) in enumerate(zip(found.offsets[:-1], found.offsets[1:], strict=True)):
        assert torch.equal(found.order[begin:end], (flat == e).nonzero()[:, 0])
    return found


@pytest.mark.parametrize("T", [0, 1, 2, 31, 33, 65, 1000])
@pytest.mark.parametrize("E, k", [(1, 1), (7, 2), (60, 3), (128, 8), (257, 10), (1024, 2), (8, 8)])
def test_matches_reference(T, E, k, device):
    check(torch.rand(T, E, device=device).argsort(-1)[:, :k], E)


def test_all_to_one_and_experts_without(device):
    for e in (0, 3, 6):
        found = check(torch.full((300, 2), e, device=device), 7)
        assert torch.equal(found.rows, torch.arange(600, device=device).view(300, 2))
    check(torch.randint(0, 60, (150, 3), device=device) * 2, 128)  # every other


def test_slots_of_no_expert_come_last(device):
    ids = torch.randint(-1, 9, (200, 4), device=device)
    ids[60:130] = -1  # blocks of them
    found = check(ids, 9)
    here = int(found.offsets[-1])
    assert here == (ids >= 0).sum() and torch.equal(found.rows < 0, ids < 0)
    assert torch.equal(found.order[here:], (ids.flatten() < 0).nonzero()[:, 0])
    assert not check(torch.full((5, 2), -1, device=device), 3).offsets.any()


def test_strides_and_leading_dimensions(device):
    ids = torch.randint(0, 5, (6, 10, 8), device=device)
    for strided in (ids[::2, :, 1:4], ids.transpose(0, 2), ids[:1].expand(3, 10, 8), ids[0, 0]):
        check(strided, 5)


def test_repeats(device):
    ids = torch.randint(-1, 60, (777, 6), device=device)
    first = ops.moe_dispatch(ids, 60)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, ops.moe_dispatch(ids, 60), strict=True))


def test_opcheck(device):
    ids = torch.randint(-1, 9, (20, 4), device=device)
    torch.library.opcheck(torch.ops.tilewright.moe_dispatch.default, (ids, 9))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    def step(logits: Tensor) -> tuple[Tensor, ...]:
        _, ids = ops.moe_route(logits, 3)
        return ops.moe_dispatch(ids, logits.shape[-1])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    logits = torch.randn(11, 20, device=device)
    assert all(torch.equal(a, b) for a, b in zip(step(logits), compiled(logits), strict=True))


@pytest.mark.parametrize(
    "ids, E, told",
    [
        (torch.zeros(2, 2), 4, r"ids torch.float32 \(2, 2\) must be int64 \[..., k\]"),
        (torch.tensor(3), 4, r"ids torch.int64 \(\) must be int64"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, "0 experts; from 1 to 1024 are taken"),
        (torch.zeros(2, 2, dtype=torch.int64), 1025, "1025 experts"),
    ],
)
def test_bad_input(ids, E, told):
    with pytest.raises(ValueError, match=told):
        ops.moe_dispatch(ids, E)


@pytest.mark.parametrize("bad", [-2, 8, 1 << 40])
def test_ids_of_no_expert(bad, device):
    """An error of the CPU's kernel; elsewhere as -1."""
    ids = torch.randint(0, 8, (9, 2), device=device)
    ids[3, 1] = bad
    (route,) = (r for r in explain() if (r.op, r.device) == ("moe_dispatch", device))
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match=f"id {bad} of ids is none of 8 experts"):
            ops.moe_dispatch(ids, 8)
        return
    as_none = ops.moe_dispatch(ids.where(ids != bad, -1), 8)
    assert all(torch.equal(a, b) for a, b in zip(check(ids, 8), as_none, strict=True))
