"""geglu against its reference: exact and tanh, separate and packed, strides, extremes."""

import pytest
import torch
import torch.nn.functional as F

from tilewright import nn, ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

# one, narrow rows that share a tile, odd, exact tile, wider than a block twice over, several threads
SHAPES = [(1,), (1, 1), (5, 3), (2, 3, 63), (4, 64), (2, 1024), (2, 2100), (40, 1730)]


def separate(shape, device):
    return [torch.randn(shape, device=device).mul(3).requires_grad_() for _ in range(2)]


def packed(shape, device):
    return [torch.randn(*shape[:-1], 2 * shape[-1], device=device).mul(3).requires_grad_()]


APPROXIMATE = pytest.mark.parametrize("approximate", ["tanh", "none"])
FORMS = pytest.mark.parametrize("form", [separate, packed])


@APPROXIMATE
@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, form, approximate, dtype, device):
    inputs = form(shape, device)
    assert_matches_reference(
        ops.geglu, reference.geglu, *inputs, dtype=dtype, approximate=approximate
    )


def strided(device):
    """Views of one shape: [4, 6, 10]."""
    return {
        "transposed": torch.randn(6, 4, 10, device=device).transpose(0, 1),
        "columns strided": torch.randn(4, 6, 20, device=device)[..., ::2],
        "columns outermost": torch.randn(10, 4, 6, device=device).permute(1, 2, 0),
        "rows strided": torch.randn(4, 6, 23, device=device)[..., 3:13],
        "every other row": torch.randn(4, 12, 10, device=device)[:, ::2],
        "expanded rows": torch.randn(10, device=device).expand(4, 6, 10),
        "expanded columns": torch.randn(4, 6, 1, device=device).expand(4, 6, 10),
        "offset": torch.randn(241, device=device)[1:].view(4, 6, 10),
    }


@pytest.mark.parametrize("name", list(strided("cpu")))
def test_any_strides(name, dtype, device):
    gate = strided(device)[name].to(dtype)
    up = torch.randn(4, 6, 10, device=device).to(dtype)
    dense = gate.contiguous()
    assert torch.equal(ops.geglu(gate), ops.geglu(dense))
    assert torch.equal(ops.geglu(gate, up), ops.geglu(dense, up))
    assert torch.equal(ops.geglu(up, gate), ops.geglu(up, dense))
    assert ops.geglu(gate, up).is_contiguous()
    fwd = torch.ops.tilewright
    for a, b in zip(
        fwd.geglu_bwd(gate, gate, up, "none"), fwd.geglu_bwd(dense, dense, up, "none"), strict=True
    ):
        assert torch.equal(a, b)
    half = gate[..., :5]
    a = fwd.geglu_packed_bwd(half, gate, "tanh")
    assert torch.equal(a, fwd.geglu_packed_bwd(half.contiguous(), dense, "tanh"))


@APPROXIMATE
@FORMS
def test_extremes(form, approximate, dtype, device):
    edge = [0.0, -0.0, 3.0, -3.0, 9.0, -9.0, 104.0, -104.0, 3e4, -3e4]
    inputs = form((2, 10), device)
    with torch.no_grad():
        for x in inputs:
            x[..., :10] = torch.tensor(edge, device=device)
    assert_matches_reference(
        ops.geglu, reference.geglu, *inputs, dtype=dtype, approximate=approximate
    )


@APPROXIMATE
def test_non_finite(approximate, dtype, device):
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0], device=device)
    up = torch.tensor([1.0, 1.0, 1.0, torch.nan, -torch.inf], device=device)
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    assert_matches_reference(
        ops.geglu, reference.geglu, *inputs, dtype=dtype, approximate=approximate
    )


def test_no_overflow_far_from_zero(device):
    """A finite gate whose cube overflows: torch's own tanh gradient is nan there."""
    gate = torch.tensor([1e20, -1e20, 1e30], device=device, requires_grad=True)
    up = torch.ones(3, device=device)
    ops.geglu(gate, up).sum().backward()
    assert gate.grad.tolist() == [1.0, 0.0, 1.0]


@APPROXIMATE
def test_is_gelu_times_up(approximate, device):
    gate, up = (t.detach() for t in separate((3, 40), device))
    ours = ops.geglu(gate, up, approximate=approximate).double()
    eager = (F.gelu(gate, approximate=approximate) * up).double()
    truth = F.gelu(gate.double(), approximate=approximate) * up.double()
    assert_within(ours, eager, truth, torch.finfo(torch.float32).eps, "y")


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)], ids=str)
@FORMS
def test_empty(shape, form, device):
    inputs = form(shape, device)
    y = ops.geglu(*inputs)
    y.sum().backward()
    assert y.shape == shape and all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_gradient(needs, device):
    inputs = [x.requires_grad_(n) for x, n in zip(separate((3, 8), device), needs, strict=True)]
    assert_matches_reference(ops.geglu, reference.geglu, *inputs, dtype=torch.float32)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((torch.zeros(3, 7),), r"\(3, 7\) has no two halves"),
        ((torch.zeros(()),), r"\(\) has no two halves"),
        ((torch.zeros(()), torch.zeros(())), r"does not fit"),
        ((torch.zeros(3, 8), torch.zeros(3, 4)), r"\(3, 4\) does not fit gate \(3, 8\)"),
        ((torch.zeros(3, 8), torch.zeros(8)), r"\(8,\) does not fit gate \(3, 8\)"),
        ((torch.zeros(4), torch.zeros(4).half()), r"float16"),
        ((torch.zeros(4), torch.zeros(4, device="meta")), r"meta"),
        ((torch.zeros(4, dtype=torch.int32),), r"int32"),
    ],
    ids=str,
)
def test_bad_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        ops.geglu(*inputs)


def test_unknown_approximation():
    with pytest.raises(ValueError, match=r"approximate must be 'tanh' or 'none', not 'erf'"):
        ops.geglu(torch.zeros(4), approximate="erf")


def test_float64_runs_the_reference(device):
    (x,) = (t.detach().double() for t in packed((3, 8), device))
    assert torch.equal(ops.geglu(x), reference.geglu(x))


@APPROXIMATE
def test_opcheck(approximate, device):
    fwd, bwd, packed_bwd = (
        getattr(torch.ops.tilewright, f"geglu_{n}").default for n in ("fwd", "bwd", "packed_bwd")
    )
    dense = torch.randn(4, 6, 10, device=device)
    for x in [dense, *strided(device).values()]:
        torch.library.opcheck(fwd, (x, None, approximate))
        torch.library.opcheck(fwd, (x, dense, approximate))
        torch.library.opcheck(bwd, (x, x, dense, approximate))
        torch.library.opcheck(packed_bwd, (x[..., :5], x, approximate))


@FORMS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, form, device):
    compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        inputs = form((rows, 8), device)
        ours, expected = run(compiled, inputs, {}), run(ops.geglu, inputs, {})
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_autocast_does_as_torch(device):
    gate, up = (t.detach() for t in separate((3, 8), device))
    with torch.autocast(device, torch.bfloat16):
        assert ops.geglu(gate, up).dtype == (F.gelu(gate) * up).dtype == torch.float32
        assert torch.equal(ops.geglu(gate, up), ops.geglu(gate, up))


@FORMS
def test_repeatable_and_mutates_nothing(form, dtype, device):
    inputs = [x.detach().to(dtype).requires_grad_() for x in form((37, 1001), device)]
    before = [x.detach().clone() for x in inputs]
    first, second = run(ops.geglu, inputs, {}), run(ops.geglu, inputs, {})
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@APPROXIMATE
@FORMS
def test_module(form, approximate, device):
    inputs = form((3, 8), device)
    module = nn.GeGLU(approximate)
    assert not module.state_dict() and approximate in repr(module)
    assert torch.equal(module(*inputs), ops.geglu(*inputs, approximate=approximate))
