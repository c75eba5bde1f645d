"""moe_route against its reference: who is chosen, to the last; how much, and its gradient, by the rule."""

import pytest
import torch
from torch import Tensor

from tilewright import explain, ops, reference
from tilewright.testing import assert_matches_reference

inf, nan = float("inf"), float("nan")
HOW = [
    {},
    {"renormalise": False, "scale": 2.5},
    {"scores": "sigmoid"},
    {"scores": "sigmoid", "renormalise": False},
]
# T, E, k: none, one, all of few; and one way each: one of many, a whole tile, more than a block of rows and a
# thread's share, more than a power of two, the most
CASES = [(shape, how) for shape in ((0, 8, 2), (1, 1, 1), (2, 7, 7)) for how in HOW]
CASES += [
    ((31, 60, 1), HOW[3]),
    ((33, 128, 8), HOW[0]),
    ((65, 128, 2), HOW[1]),
    ((1, 257, 3), HOW[2]),
    ((2, 1024, 32), HOW[0]),
    ((63, 16, 10), HOW[2]),
    ((1000, 12, 12), HOW[0]),
]


def both(logits: Tensor, k: int, **kwargs) -> tuple[Tensor, Tensor]:
    """ops' weights and ids, the ids being reference's."""
    weights, ids = ops.moe_route(logits, k, **kwargs)
    _, twin = reference.moe_route(logits, k, **kwargs)
    assert ids.dtype == torch.int64 and torch.equal(ids, twin)
    assert weights.dtype == torch.float32 and weights.shape == ids.shape
    return weights, ids


def weights_of(fn):
    return lambda logits, k, **kwargs: fn(logits, k, **kwargs)[0]


def check(logits: Tensor, k: int, dtype: torch.dtype, **kwargs) -> Tensor:
    """The rule for the weights and the gradient, of the experts that are chosen; the ids."""
    _, ids = both(logits.detach().to(dtype), k, **kwargs)
    assert_matches_reference(
        weights_of(ops.moe_route), weights_of(reference.moe_route), logits, k, dtype=dtype, **kwargs
    )
    return ids


@pytest.mark.parametrize("shape, how", CASES, ids=str)
def test_matches_reference(shape, how, dtype, device):
    T, E, k = shape
    check(torch.randn(T, E, device=device).requires_grad_(), k, dtype, **how)


@pytest.mark.parametrize(
    "E, k, groups, group_k, group_top, scores, has_bias",
    [
        (128, 8, 8, 4, 2, "sigmoid", True),  # as DeepSeek-V3
        (60, 4, 3, 2, 1, "softmax", False),  # as DeepSeek-V2
        (12, 8, 3, 2, 9, "sigmoid", False),  # more than a group has
        (6, 3, 6, 3, 2, "softmax", True),  # groups of one
        (8, 2, 4, 4, 2, "softmax", True),  # all of them
        (8, 2, 4, 4, 2, "sigmoid", False),
    ],
)
def test_groups_and_bias(E, k, groups, group_k, group_top, scores, has_bias, device):
    logits = torch.randn(3, E, device=device).requires_grad_()
    bias = 0.2 * torch.randn(E, device=device) if has_bias else None
    kwargs = {"groups": groups, "group_k": group_k, "group_top": group_top}
    kwargs |= {"bias": bias, "scores": scores}
    ids = check(logits, k, torch.float32, **kwargs)
    for row in (ids // (E // groups)).tolist():
        assert len(set(row)) <= group_k
    if has_bias:  # which chooses and weighs nothing
        weights, _ = ops.moe_route(logits.detach(), k, **kwargs)
        again, _ = ops.moe_route(logits.detach(), k, scores=scores, ids=ids)
        assert torch.equal(again, weights)


def test_a_bias_below_every_score(device):
    """What pads a row is no expert's rank."""
    for scores in ("softmax", "sigmoid"):
        both(
            torch.randn(9, 60, device=device),
            7,
            scores=scores,
            bias=torch.full((60,), -5.0, device=device),
        )


def test_bias_of_any_float_and_stride(device):
    logits, bias = torch.randn(3, 60, device=device), torch.randn(120, device=device).bfloat16()
    dense = ops.moe_route(logits, 4, bias=bias[::2].float())
    for other in (bias[::2], bias[::2].double(), bias[::2].float().requires_grad_()):
        found = ops.moe_route(logits, 4, bias=other)
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest_id(scores, dtype, device):
    logits = torch.zeros(5, 60, device=device, dtype=dtype)
    _, ids = both(logits, 4, scores=scores)
    assert torch.equal(ids, torch.arange(4, device=device).expand(5, 4))
    logits[:, 1::2] = -0.0  # as 0
    both(logits, 4, scores=scores)
    logits = torch.randint(0, 3, (8, 60), device=device).to(dtype)
    both(logits, 7, scores=scores)
    both(logits, 7, scores=scores, bias=torch.randint(0, 2, (60,), device=device).float())
    _, ids = both(torch.zeros(3, 12, device=device), 4, scores=scores, groups=4, group_k=2)
    assert torch.equal(ids, torch.arange(4, device=device).expand(3, 4))


@pytest.mark.parametrize(
    "how", [*HOW, *({**how, "groups": 4, "group_k": 2} for how in HOW[1:3])], ids=str
)
def test_far_and_not_finite(how, device):
    """Weights and gradients are nan where the reference's are, and ids are experts, none twice."""
    logits = torch.randn(9, 20, device=device)
    logits[0] = -inf
    logits[1, 3:] = -inf
    logits[2, 5] = inf
    logits[3, 5] = nan
    logits[4] = nan
    logits[5, :2] = inf
    logits[6] *= 1e30
    logits[7] = -200.0
    logits[8, 1::2] = nan
    ids = check(logits.requires_grad_(), 5, torch.float32, **how)
    assert ((ids >= 0) & (ids < 20)).all() and all(len(set(row)) == 5 for row in ids.tolist())


def test_groups_whose_sum_is_no_number(device):
    """inf - inf ranks as -inf does."""
    bias = torch.zeros(12, device=device)
    bias[0], bias[1:4] = inf, -inf  # the first group's two best
    bias[8] = nan
    _, ids = both(torch.randn(7, 12, device=device), 4, bias=bias, groups=3, group_k=2)
    assert (ids >= 4).all()


@pytest.mark.parametrize("how", HOW, ids=str)
def test_given_ids(how, device):
    logits = torch.randn(9, 60, device=device).requires_grad_()
    ids = torch.stack([torch.randperm(60)[:5] for _ in range(9)]).to(device)
    ids[::3, 1] = -1
    ids[4] = -1
    ids[5, 2:] = ids[5, :1]  # one expert four times
    weights, found = ops.moe_route(logits.detach(), 5, ids=ids, **how)
    assert found is ids and not weights[ids < 0].any()
    assert_matches_reference(
        weights_of(ops.moe_route), weights_of(reference.moe_route), logits, 5,
        dtype=torch.float32, ids=ids, **how,
    )  # fmt: skip
    chosen = ops.moe_route(logits.detach(), 5, **how)
    replayed, _ = ops.moe_route(logits.detach(), 5, ids=chosen[1], **how)
    assert torch.equal(replayed, chosen[0])


def test_strides_and_leading_dimensions(dtype, device):
    wide = torch.randn(4, 3, 80, device=device).to(dtype)
    for logits in (wide[::2, :, 3:63], wide.transpose(0, 1), wide[:1].expand(3, 3, 80), wide[0, 0]):
        weights, ids = both(logits, 3)
        dense = ops.moe_route(logits.contiguous(), 3)
        assert torch.equal(weights, dense[0]) and weights.is_contiguous()
        given = torch.stack([ids, ids], -1)[..., 0]  # of a last stride of 2
        again, _ = ops.moe_route(logits, 3, ids=given)
        assert torch.equal(again, weights)
    leaf = wide.transpose(0, 1).requires_grad_()
    dense = leaf.detach().contiguous().requires_grad_()
    strided = torch.randn(3, 4, 3, device=device).permute(2, 1, 0)
    (a,) = torch.autograd.grad(ops.moe_route(leaf, 3)[0], leaf, strided)
    (b,) = torch.autograd.grad(ops.moe_route(dense, 3)[0], dense, strided.contiguous())
    assert torch.equal(a, b)


def test_repeats_bit_for_bit_and_mutates_nothing(device):
    logits, bias = torch.randn(70, 60, device=device), torch.randn(60, device=device)
    inputs = logits.requires_grad_(), bias
    before, results = [x.detach().clone() for x in inputs], []
    threads = torch.get_num_threads()
    try:
        for n in (threads, threads, 1):
            torch.set_num_threads(n)
            weights, ids = ops.moe_route(logits, 6, bias=bias)
            (grad,) = torch.autograd.grad(weights, logits, torch.ones_like(weights))
            results.append((weights, ids, grad))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    assert all(torch.equal(x, was) for x, was in zip(inputs, before, strict=True))


def test_two_steps_of_training(device):
    """The reference's losses, by the rule."""

    def losses(fn, x, gate):
        found = []
        for _ in range(2):
            gate = gate.detach().requires_grad_()
            weights, ids = fn(x @ gate, 3, scores="sigmoid")
            loss = (weights * ids).square().sum()
            (grad,) = torch.autograd.grad(loss, gate)
            gate = gate - 0.01 * grad
            found.append(loss)
        return torch.stack(found)

    x, gate = torch.randn(9, 8, device=device), torch.randn(8, 7, device=device)
    assert_matches_reference(
        lambda *given: losses(ops.moe_route, *given),
        lambda *given: losses(reference.moe_route, *given),
        x, gate, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("how", HOW, ids=str)
def test_opcheck(how, device):
    logits, bias = torch.randn(6, 20, device=device), torch.randn(20, device=device)
    how = (how.get("scores") == "sigmoid", how.get("renormalise", True), how.get("scale", 1.0))
    weights, ids = torch.ops.tilewright.moe_route_fwd(logits, bias, None, 4, 5, 2, 2, *how)
    for args in ((logits, bias, None, 4, 5, 2, 2, *how), (logits, None, ids, 4, 1, 1, 2, *how)):
        torch.library.opcheck(torch.ops.tilewright.moe_route_fwd.default, args)
    args = torch.randn_like(weights), logits, ids, *how
    torch.library.opcheck(torch.ops.tilewright.moe_route_bwd.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    logits = torch.randn(9, 20, device=device).requires_grad_()

    def step(logits):
        weights, ids = ops.moe_route(logits, 4, scores="sigmoid", groups=4, group_k=2)
        again, _ = ops.moe_route(logits, 4, ids=ids)
        return weights, ids, again

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for fn in (step, compiled):
        weights, ids, again = fn(logits)
        (grad,) = torch.autograd.grad((weights * ids + again).sum(), logits)
        results.append((weights, ids, again, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float64_runs_the_reference(device):
    logits = torch.randn(5, 9, dtype=torch.float64, device=device, requires_grad=True)
    weights, ids = ops.moe_route(logits, 3)
    twin, twin_ids = reference.moe_route(logits, 3)
    assert weights.dtype == torch.float64 and torch.equal(weights, twin)
    assert torch.equal(ids, twin_ids)


def test_gradcheck(device):
    """Of the reference, which float64 runs: that the rule compares with the right thing."""
    logits = torch.randn(5, 9, device=device, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 3, 8], [2, 2, 1], [4, -1, 5], [-1, -1, -1], [7, 1, 0]], device=device)
    for how in HOW:
        torch.autograd.gradcheck(lambda x, how=how: ops.moe_route(x, 3, ids=ids, **how)[0], logits)


def test_autocast_changes_nothing(device):
    logits = torch.randn(5, 20, device=device)
    with torch.autocast(device, torch.bfloat16):
        weights, _ = ops.moe_route(logits, 3)
    assert weights.dtype == torch.float32 and torch.equal(weights, ops.moe_route(logits, 3)[0])


ROWS = torch.zeros(2, 8)
IDS = torch.zeros(2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "logits,kwargs,told",
    [
        (torch.zeros(2, 8, dtype=torch.int64), {}, "logits must be floating point"),
        (torch.tensor(1.0), {}, r"logits must be floating point .*, not torch.float32 \(\)"),
        (torch.zeros(2, 0), {}, "0 experts"),
        (torch.zeros(1, 1025), {}, "1025 experts"),
        (ROWS, {"k": 0}, "k 0 must be from 1 to 8"),
        (ROWS, {"k": 9}, "k 9 must be from 1 to 8"),
        (torch.zeros(1, 64), {"k": 33}, "k 33 must be from 1 to 32"),
        (
            ROWS,
            {"k": 3, "groups": 4, "group_k": 1},
            "k 3 must be from 1 to 2, the experts of 1 groups of 2",
        ),
        (ROWS, {"groups": 3}, "groups 3, group_k 1 and group_top 2 do not fit 8 experts"),
        (ROWS, {"groups": 2, "group_k": 3}, "group_k 3"),
        (ROWS, {"group_top": 0}, "group_top 0"),
        (ROWS, {"scores": "max"}, "scores 'max' are none of softmax, sigmoid"),
        (ROWS, {"bias": torch.zeros(7)}, r"bias torch.float32 \(7,\) must be floating point \[8\]"),
        (ROWS, {"ids": IDS[:1]}, r"ids torch.int64 \(1, 2\) must be int64 \(2, 2\)"),
        (ROWS, {"ids": IDS.int()}, "ids torch.int32"),
        (ROWS, {"bias": torch.zeros(8, device="meta")}, "bias on meta, logits on cpu"),
    ],
)
def test_bad_input(logits, kwargs, told):
    with pytest.raises(ValueError, match=told):
        ops.moe_route(logits, **{"k": 2, **kwargs})


@pytest.mark.parametrize("bad", [-2, 8, 1 << 40])
def test_ids_of_no_expert(bad, device):
    """An error of the CPU's kernel; elsewhere, the reference included, as -1."""
    ids = IDS.clone().to(device)
    ids[1, 1] = bad
    logits = torch.randn(2, 8, device=device)
    logits[1, 3] = nan
    logits.requires_grad_()
    (route,) = (r for r in explain() if (r.op, r.device) == ("moe_route", device))
    if route.implementation.startswith("C++"):
        with pytest.raises(ValueError, match=f"id {bad} of ids is none of 8 experts"):
            ops.moe_route(logits, 2, ids=ids)
        logits = logits.detach().double().requires_grad_()
    weights, _ = ops.moe_route(logits, 2, ids=ids)
    as_none = ops.moe_route(logits, 2, ids=ids.where(ids != bad, -1))[0]
    assert torch.equal(weights.nan_to_num(-1.0), as_none.nan_to_num(-1.0))
    grads = [torch.autograd.grad(w.sum(), logits)[0] for w in (weights, as_none)]
    assert torch.equal(*(grad.nan_to_num(torch.pi) for grad in grads))
