"""swiglu against its reference: separate and packed, strides, extremes."""

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


FORMS = pytest.mark.parametrize("form", [separate, packed])


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, form, dtype, device):
    assert_matches_reference(ops.swiglu, reference.swiglu, *form(shape, device), dtype=dtype)


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
    assert torch.equal(ops.swiglu(gate), ops.swiglu(dense))
    assert torch.equal(ops.swiglu(gate, up), ops.swiglu(dense, up))
    assert torch.equal(ops.swiglu(up, gate), ops.swiglu(up, dense))
    assert ops.swiglu(gate, up).is_contiguous()
    fwd = torch.ops.tilewright
    for a, b in zip(fwd.swiglu_bwd(gate, gate, up), fwd.swiglu_bwd(dense, dense, up), strict=True):
        assert torch.equal(a, b)
    half = gate[..., :5]
    a = fwd.swiglu_packed_bwd(half, gate)
    assert torch.equal(a, fwd.swiglu_packed_bwd(half.contiguous(), dense))


@FORMS
def test_extremes(form, dtype, device):
    edge = [0.0, -0.0, 20.0, -20.0, 87.0, -87.0, 104.0, -104.0, 3e4, -3e4]
    inputs = form((2, 10), device)
    with torch.no_grad():
        for x in inputs:
            x[..., :10] = torch.tensor(edge, device=device)
    assert_matches_reference(ops.swiglu, reference.swiglu, *inputs, dtype=dtype)


def test_non_finite(dtype, device):
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0], device=device)
    up = torch.tensor([1.0, 1.0, 1.0, torch.nan, -torch.inf], device=device)
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    assert_matches_reference(ops.swiglu, reference.swiglu, *inputs, dtype=dtype)


def test_is_silu_times_up(device):
    gate, up = (t.detach() for t in separate((3, 40), device))
    ours, eager = ops.swiglu(gate, up).double(), (F.silu(gate) * up).double()
    truth = F.silu(gate.double()) * up.double()
    assert_within(ours, eager, truth, torch.finfo(torch.float32).eps, "y")


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)], ids=str)
@FORMS
def test_empty(shape, form, device):
    inputs = form(shape, device)
    y = ops.swiglu(*inputs)
    y.sum().backward()
    assert y.shape == shape and all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_one_gradient(needs, device):
    inputs = [x.requires_grad_(n) for x, n in zip(separate((3, 8), device), needs, strict=True)]
    assert_matches_reference(ops.swiglu, reference.swiglu, *inputs, dtype=torch.float32)


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
        ops.swiglu(*inputs)


def test_float64_runs_the_reference(device):
    (x,) = (t.detach().double() for t in packed((3, 8), device))
    assert torch.equal(ops.swiglu(x), reference.swiglu(x))


def test_opcheck(device):
    fwd, bwd, packed_bwd = (
        getattr(torch.ops.tilewright, f"swiglu_{n}").default for n in ("fwd", "bwd", "packed_bwd")
    )
    dense = torch.randn(4, 6, 10, device=device)
    for x in [dense, *strided(device).values()]:
        torch.library.opcheck(fwd, (x, None))
        torch.library.opcheck(fwd, (x, dense))
        torch.library.opcheck(bwd, (x, x, dense))
        torch.library.opcheck(packed_bwd, (x[..., :5], x))


@FORMS
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, form, device):
    compiled = torch.compile(ops.swiglu, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        inputs = form((rows, 8), device)
        ours, expected = run(compiled, inputs, {}), run(ops.swiglu, inputs, {})
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_autocast_does_as_torch(device):
    gate, up = (t.detach() for t in separate((3, 8), device))
    with torch.autocast(device, torch.bfloat16):
        assert ops.swiglu(gate, up).dtype == (F.silu(gate) * up).dtype == torch.float32
        assert torch.equal(ops.swiglu(gate, up), ops.swiglu(gate, up))


@FORMS
def test_repeatable_and_mutates_nothing(form, dtype, device):
    inputs = [x.detach().to(dtype).requires_grad_() for x in form((37, 1001), device)]
    before = [x.detach().clone() for x in inputs]
    first, second = run(ops.swiglu, inputs, {}), run(ops.swiglu, inputs, {})
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@FORMS
def test_module(form, device):
    inputs = form((3, 8), device)
    module = nn.SwiGLU()
    assert not module.state_dict()
    assert torch.equal(module(*inputs), ops.swiglu(*inputs))
