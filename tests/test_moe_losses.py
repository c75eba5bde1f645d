"""moe_losses against its reference: counts to the last, the losses and their gradients by the rule."""

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright import ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

inf, nan = float("inf"), float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET")
SCORES = ["softmax", "sigmoid"]
MASKED = ["all", "some", "none"]  # which tokens count
# T, E, k: none, one, few, all of few, by every score and mask; and one way each: one of many, a whole tile, more than a
# block of rows and a thread's share, more than a power of two, the most
CASES = [
    (shape, scores, masked)
    for shape in ((0, 8, 2), (1, 1, 1), (2, 7, 3), (63, 12, 12))
    for scores in SCORES
    for masked in MASKED
]
CASES += [
    ((33, 60, 3), "softmax", "all"),
    ((31, 60, 1), "sigmoid", "all"),
    ((32, 128, 8), "softmax", "some"),
    ((63, 128, 2), "sigmoid", "some"),
    ((64, 257, 10), "softmax", "all"),
    ((65, 7, 3), "sigmoid", "all"),
    ((1, 257, 3), "sigmoid", "all"),
    ((2, 1024, 32), "softmax", "all"),
    ((1000, 60, 8), "softmax", "some"),
    ((1000, 7, 2), "sigmoid", "all"),
]


def drawn(device: str, *shape: int, k: int, masked: str = "all") -> tuple[Tensor, Tensor, Any]:
    """logits [*shape], ids [.., k], mask [..] or None."""
    leading = shape[:-1]
    ids = torch.rand(shape, device=device).argsort(-1)[..., :k]
    logits = torch.randn(shape, device=device)
    if masked == "all":
        return logits, ids, None
    return logits, ids, torch.rand(leading, device=device) < (0.7 if masked == "some" else 0.0)


def counted(ids: Tensor, E: int, mask: Tensor | None) -> Tensor:
    """counts, one comparison at a time."""
    if mask is not None:
        ids = ids[mask]
    return torch.stack([(ids == e).sum() for e in range(E)])


def of(side: Any, ids: Tensor, mask: Tensor | None = None, **how: Any) -> Any:
    """logits [draws, ...] -> the losses of each draw.  The rule takes a row together: of a single number eager's error
    may by luck be 0."""

    def losses(logits: Tensor) -> tuple[Tensor, Tensor]:
        masks = [None] * len(logits) if mask is None else mask
        found = [
            side.moe_losses(x, i, mask=m, **how) for x, i, m in zip(logits, ids, masks, strict=True)
        ]
        balances, zs, _ = zip(*found, strict=True)
        return torch.stack(balances), torch.stack(zs)

    return losses


def result(fn: Any, i: int) -> Any:
    return lambda *given: fn(*given)[i]


def check(logits: Tensor, ids: Tensor, mask: Tensor | None, dtype: torch.dtype, **how: Any) -> None:
    balance, z, counts = ops.moe_losses(logits.to(dtype), ids, mask=mask, **how)
    assert balance.dtype == z.dtype == torch.float32 and balance.shape == z.shape == ()
    assert torch.equal(counts, counted(ids, logits.shape[-1], mask))
    draws = 8 if ids[..., 0].numel() < 16 else 1
    logits, ids = torch.randn(draws, *logits.shape, device=logits.device), torch.stack([ids] * draws)  # fmt: skip
    masks = None if mask is None else torch.stack([mask] * draws)
    assert_matches_reference(
        of(ops, ids, masks, **how), of(reference, ids, masks, **how), logits.requires_grad_(), dtype=dtype
    )  # fmt: skip


@pytest.mark.parametrize("shape, scores, masked", CASES, ids=str)
def test_matches_reference(shape, scores, masked, dtype, device):
    T, E, k = shape
    check(*drawn(device, T, E, k=k, masked=masked), dtype, scores=scores)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize(
    "shape, k",
    [((3, 17, 60), 4), ((2, 3, 33, 7), 2), ((5, 1, 8), 3), ((1, 40, 9), 1), ((0, 3, 4), 1)],
    ids=str,
)
def test_sequences(shape, k, masked, scores, dtype, device):
    """The balance of each alone; one that nobody counts in is none of them."""
    logits, ids, mask = drawn(device, *shape, k=k, masked=masked)
    if mask is not None and len(mask) > 2:
        mask[1] = False
    check(logits, ids, mask, dtype, scores=scores, per_sequence=True)


@pytest.mark.parametrize("scores", SCORES)
def test_more_sequences_than_a_step_adds(scores, device):
    logits, ids, mask = drawn(device, 19, 3, 20, k=2, masked="some")
    check(logits, ids, mask, torch.float32, scores=scores, per_sequence=True)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_few_programs(per_sequence, device, monkeypatch):
    """Of several tiles and steps each, where they are Triton's."""
    if device == "cuda" or INTERPRETED:
        kernels = importlib.import_module("tilewright.kernels.moe_losses")
        for name, n in (("PROGRAMS", (5, 5)), ("BLOCKS", 2), ("SEQUENCES", 2)):
            monkeypatch.setattr(kernels, name, n)
    logits, ids, mask = drawn(device, 3, 140, 20, k=2, masked="some")
    check(logits, ids, mask, torch.float32, per_sequence=per_sequence)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_an_even_load_is_k(per_sequence, device):
    """To the last bit: probabilities of 1/8, of which sums are exact."""
    ids = (torch.arange(16, device=device)[:, None] + torch.arange(3, device=device)) % 8
    logits = torch.zeros(2, 16, 8, device=device)
    balance, _, counts = ops.moe_losses(logits, ids.expand(2, 16, 3), per_sequence=per_sequence)
    assert balance == 3 and (counts == 12).all()
    balance, _, counts = ops.moe_losses(logits, torch.zeros_like(ids.expand(2, 16, 3)))
    assert balance == 3 and counts.tolist() == [96, *[0] * 7]


@pytest.mark.parametrize("masked", [False, True])
def test_transformers(masked, device):
    """Of several layers' logits, which transformers appends to each other: both within the rule."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    draws, layers, B, S, E, k = 8, 3, 2, 9, 8, 2
    logits = torch.randn(draws, layers, B * S, E, device=device, requires_grad=True)
    mask = torch.ones(B, S, dtype=torch.int64, device=device)
    if masked:
        mask[0, :4], mask[1, :7] = 0, 0
    _, ids = ops.moe_route(logits.detach(), k)

    def ours(side: Any) -> Any:
        to = mask.bool().flatten().expand(draws, layers, -1) if masked else None
        return result(of(side, ids, to), 0)

    def theirs(x: Tensor) -> Tensor:
        layered = [tuple(draw) for draw in x]
        return torch.stack(
            [mixtral.load_balancing_loss_func(g, E, k, mask if masked else None) for g in layered]
        )

    truth = run(ours(reference), [logits.detach().double().requires_grad_()], {})
    eager = run(ours(reference), [logits], {})
    for fn in (ours(ops), theirs):
        for found, e, t in zip(run(fn, [logits], {}), eager, truth, strict=True):
            assert_within(found, e, t, torch.finfo(torch.float32).eps, "balance")


@pytest.mark.parametrize("scores", SCORES)
def test_far_and_not_finite(scores, device):
    """nan and inf where the reference has them, a token each."""
    logits = torch.randn(9, 1, 20, device=device)
    logits[0] = -inf
    logits[1, :, 3:] = -inf
    logits[2, :, 5] = inf
    logits[3, :, 5] = nan
    logits[4] = nan
    logits[5, :, :2] = inf
    logits[6] = -200.0 - torch.rand(1, 20, device=device)
    logits[7] += 200.0
    logits[8, :, 1::2] -= 120.0
    ids = torch.rand(9, 1, 20, device=device).argsort(-1)[..., :5]
    fns = of(ops, ids, scores=scores), of(reference, ids, scores=scores)
    assert_matches_reference(*fns, logits.requires_grad_(), dtype=torch.float32)
    for i in (0, 1):  # and each alone
        assert_matches_reference(*(result(fn, i) for fn in fns), logits, dtype=torch.float32)
    together = torch.stack(ops.moe_losses(logits.detach(), ids, scores=scores)[:2])
    assert together.isnan().all()
    finite = ops.moe_losses(logits.detach()[6:], ids[6:], scores=scores)
    assert torch.stack(finite[:2]).isfinite().all()


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("scores", SCORES)
def test_padding_is_not_read(scores, per_sequence, dtype, device):
    """Whatever stands there the losses are the same, and its gradient is 0."""
    logits, ids, mask = drawn(device, 3, 30, 12, k=3, masked="some")
    mask[2] = False
    results = []
    for padding, other in ((0.0, 5), (nan, -1), (inf, 1 << 40)):
        x = logits.where(mask[..., None], padding).to(dtype).requires_grad_()
        i = ids.where(mask[..., None], other)
        balance, z, counts = ops.moe_losses(
            x, i, scores=scores, mask=mask, per_sequence=per_sequence
        )
        (grad,) = torch.autograd.grad(balance + z, x)
        assert grad.dtype == dtype and not grad[~mask].any() and grad[mask].all()
        results.append((balance, z, counts, grad))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("per_sequence", [False, True])
def test_no_token_counts(per_sequence, dtype, device):
    for S in (0, 5):
        logits = torch.full((2, S, 4), nan, device=device, dtype=dtype, requires_grad=True)
        ids = torch.zeros(2, S, 2, dtype=torch.int64, device=device)
        mask = torch.zeros(2, S, dtype=torch.bool, device=device)
        balance, z, counts = ops.moe_losses(logits, ids, mask=mask, per_sequence=per_sequence)
        (grad,) = torch.autograd.grad(balance + z, logits)
        assert balance == 0 and z == 0 and not counts.any() and not grad.any()


def test_ids_of_no_expert(device):
    """Counted nowhere; an id that comes twice counts twice."""
    logits, ids, _ = drawn(device, 40, 9, k=4)
    for bad in (-1, -9, 9, 15, 1 << 32, -(1 << 40)):
        ids[torch.rand(40, 4, device=device) < 0.1] = bad
    ids[5] = 3
    here = (ids >= 0) & (ids < 9)
    _, _, counts = ops.moe_losses(logits, ids)
    assert torch.equal(counts, counted(ids, 9, None)) and counts.sum() == here.sum() < 160
    check(logits, ids, None, torch.float32)


def test_strides(dtype, device):
    wide = torch.randn(4, 6, 80, device=device).to(dtype)
    many = torch.randint(0, 20, (4, 6, 8), device=device)
    some = torch.rand(4, 12, device=device) < 0.6
    views = [
        (wide[..., 3:23], many[..., 1:4], some[:, :6]),
        (wide[..., ::4], many[..., ::2], some[:, ::2]),
        (wide[..., :20].transpose(0, 1), many.transpose(0, 1), some[:, :6].t()),
        (wide[:1, :, :20].expand(4, 6, 20), many[:, :1].expand(4, 6, 8), some[:1, :6].expand(4, 6)),
        (wide.transpose(1, 2), torch.randint(0, 6, (2, 4, 80), device=device).permute(1, 2, 0), None),
    ]  # fmt: skip
    for given in views:
        dense = [None if t is None else t.contiguous() for t in given]
        results = [values(x.detach().requires_grad_(), *more, per_sequence=True) for x, *more in (given, dense)]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def values(logits: Tensor, ids: Tensor, mask: Tensor | None, **how: Any) -> list[Tensor]:
    balance, z, counts = ops.moe_losses(logits, ids, mask=mask, **how)
    return [balance, z, counts, *torch.autograd.grad(balance + z, logits)]


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_hundred_repeats(per_sequence, device):
    """On one thread as on two."""
    logits, ids, mask = drawn(device, 2, 150, 60, k=3, masked="some")
    logits.requires_grad_()
    before, threads = [t.detach().clone() for t in (logits, ids, mask)], torch.get_num_threads()
    first = values(logits, ids, mask, per_sequence=per_sequence)
    try:
        for n in range(99 if device == "cuda" or INTERPRETED is None else 4):
            torch.set_num_threads(1 + n % 2)
            again = values(logits, ids, mask, per_sequence=per_sequence)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, ids, mask), strict=True))


@pytest.mark.parametrize("scores", SCORES)
def test_no_memory_is_read_that_was_not_written(scores, device):
    """What torch.empty gives is nan: outputs and gradients are as they were."""
    logits, ids, mask = drawn(device, 3, 40, 12, k=2, masked="some")
    logits.requires_grad_()
    plain = values(logits, ids, mask, scores=scores, per_sequence=True)
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = values(logits, ids, mask, scores=scores, per_sequence=True)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_no_probabilities_are_kept(device):
    """Beside logits and the mask: a slope an expert, and two totals."""
    logits, ids, mask = drawn(device, 50, 12, k=2, masked="some")
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.moe_losses(logits.requires_grad_(), ids, mask=mask)
    for t in (logits, mask):
        kept.pop(t.data_ptr())
    assert sum(kept.values()) == 4 * 12 + 8


def test_counts_may_change_before_the_backward(device):
    """A bias is updated by them, perhaps in place."""
    logits, ids, _ = drawn(device, 9, 5, k=2)
    balance, _, counts = ops.moe_losses(logits.requires_grad_(), ids)
    assert not counts.requires_grad
    (expected,) = torch.autograd.grad(balance, logits, retain_graph=True)
    counts.zero_()
    assert torch.equal(torch.autograd.grad(balance, logits)[0], expected)


@pytest.mark.parametrize("scores", SCORES)
def test_two_steps_of_training(scores, device):
    """The reference's losses, by the rule."""

    def losses(side: Any, x: Tensor, gate: Tensor) -> Tensor:
        found = []
        for _ in range(2):
            gate = gate.detach().requires_grad_()
            logits = x @ gate
            _, ids = side.moe_route(logits, 3, scores=scores)
            balance, z, _ = side.moe_losses(logits, ids, scores=scores)
            loss = balance + 0.1 * z
            (grad,) = torch.autograd.grad(loss, gate)
            gate = gate - 0.1 * grad
            found.append(loss)
        return torch.stack(found)

    assert_matches_reference(
        lambda *given: losses(ops, *given), lambda *given: losses(reference, *given),
        torch.randn(40, 8, device=device), torch.randn(8, 7, device=device), dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("masked", ["all", "some"])
@pytest.mark.parametrize("scores", SCORES)
def test_opcheck(scores, masked, device):
    logits, ids, mask = drawn(device, 2, 9, 12, k=2, masked=masked)
    fwd, bwd = torch.ops.tilewright.moe_losses_fwd, torch.ops.tilewright.moe_losses_bwd
    one, sigmoid = torch.randn((), device=device), scores == "sigmoid"
    for x, per_sequence in ((logits, False), (logits.bfloat16(), True)):
        args = x, ids, mask, sigmoid, per_sequence
        torch.library.opcheck(fwd.default, args)
        *_, slopes, totals = fwd(*args)
        for grads in ((one, one), (one, None), (None, one)):
            torch.library.opcheck(bwd.default, (*grads, x, mask, slopes, totals, sigmoid))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    logits, ids, mask = drawn(device, 2, 9, 20, k=4, masked="some")

    def step(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        balance, z, counts = ops.moe_losses(
            logits, ids, scores="sigmoid", mask=mask, per_sequence=True
        )
        whole, _, _ = ops.moe_losses(logits, ids)
        return balance + whole, z, counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for fn in (step, compiled):
        balance, z, counts = fn(logits.requires_grad_())
        results.append((balance, z, counts, *torch.autograd.grad(balance + z, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float64_runs_the_reference(device):
    logits, ids, mask = drawn(device, 2, 9, 12, k=2, masked="some")
    for how in ({}, {"scores": "sigmoid", "per_sequence": True}):
        found = ops.moe_losses(logits.double(), ids, mask=mask, **how)
        twin = reference.moe_losses(logits.double(), ids, mask=mask, **how)
        assert found[0].dtype == found[1].dtype == torch.float64
        assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))


@pytest.mark.parametrize("scores", SCORES)
def test_gradcheck(scores, device):
    """Of the reference, which float64 runs: that the rule compares with the right thing."""
    logits, ids, mask = drawn(device, 2, 5, 6, k=2, masked="some")
    logits = logits.double().requires_grad_()
    for per_sequence in (False, True):
        torch.autograd.gradcheck(
            lambda x, per=per_sequence: ops.moe_losses(
                x, ids, scores=scores, mask=mask, per_sequence=per
            )[:2],
            logits,
        )


@pytest.mark.parametrize("scores", SCORES)
def test_the_reference_is_the_papers(scores, device):
    """Token by token, in float64: s' = s / sum s, f and P of DeepSeek-V3's eq. 17 to 20, k times."""
    logits, ids, mask = drawn(device, 3, 8, 5, k=2, masked="some")
    logits, mask[1] = logits.double(), False
    balances, squares = [], []
    for x, chosen, here in zip(logits, ids, mask, strict=True):
        s = x.exp() if scores == "softmax" else x.sigmoid()
        T = here.sum()
        f = torch.stack([5 / (2 * T) * (chosen[here] == i).sum() for i in range(5)])
        P = (s / s.sum(-1, keepdim=True))[here].sum(0) / T
        if here.any():
            balances.append(2 * (f * P).sum())
            squares += (x[here].exp().sum(-1).log() ** 2).tolist()
    found = reference.moe_losses(logits, ids, scores=scores, mask=mask, per_sequence=True)
    expected = torch.stack(balances).mean(), torch.tensor(squares).double().mean().to(device)
    eps = torch.finfo(torch.float32).eps  # far above what order and rounding of float64 do
    for ours, theirs in zip(found[:2], expected, strict=True):
        assert_within(ours, theirs, theirs, eps, "loss")


def test_autocast_changes_nothing(device):
    logits, ids, _ = drawn(device, 5, 20, k=3)
    with torch.autocast(device, torch.bfloat16):
        found = ops.moe_losses(logits, ids)
    assert all(torch.equal(a, b) for a, b in zip(found, ops.moe_losses(logits, ids), strict=True))


ROWS, IDS = torch.zeros(2, 3, 8), torch.zeros(2, 3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "logits, ids, how, told",
    [
        (ROWS.long(), IDS, {}, "logits must be floating point .*, not torch.int64"),
        (torch.tensor(1.0), IDS, {}, r"\[..., E\], not torch.float32 \(\)"),
        (ROWS[0], IDS[0], {"per_sequence": True}, r"\[B, ..., S, E\], not torch.float32 \(3, 8\)"),
        (ROWS[..., :0], IDS, {}, "0 experts; from 1 to 1024"),
        (torch.zeros(2, 3, 1025), IDS, {}, "1025 experts"),
        (ROWS, IDS[..., :0], {}, "k 0 must be from 1 to 32"),
        (ROWS, torch.zeros(2, 3, 33, dtype=torch.int64), {}, "k 33 must be"),
        (ROWS, IDS, {"scores": "max"}, "scores 'max' are none of softmax, sigmoid"),
        (ROWS, IDS.int(), {}, "ids torch.int32"),
        (ROWS, IDS[0], {}, r"ids torch.int64 \(3, 2\) must be int64 \(2, 3, 'k'\)"),
        (ROWS, IDS[..., 0], {"mask": IDS[..., 0]}, r"ids torch.int64 \(2, 3\)"),
        (ROWS, IDS, {"mask": IDS[..., 0]}, r"mask torch.int64 \(2, 3\) must be bool \(2, 3\)"),
        (ROWS, IDS, {"mask": IDS.bool()}, r"mask torch.bool \(2, 3, 2\)"),
        (ROWS, IDS.to("meta"), {}, "ids on meta, logits on cpu"),
    ],
)  # fmt: skip
def test_bad_input(logits, ids, how, told):
    with pytest.raises(ValueError, match=told):
        ops.moe_losses(logits, ids, **how)
