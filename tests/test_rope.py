"""rope against its reference: layouts, partial and doubled tables, positions, both pairings."""

import os

import pytest
import torch
from torch import Tensor

from tilewright import nn, ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# B, H, S, D, columns of the tables: one, nothing turned, odd halves, exact vectors, partial, doubled, doubled and
# partial, several programs and threads
SHAPES = [
    (1, 1, 1, 2, 1),
    (1, 2, 3, 8, 0),
    (2, 3, 5, 14, 7),
    (1, 2, 7, 64, 32),
    (2, 2, 3, 80, 16),
    (2, 2, 3, 64, 64),
    (1, 3, 4, 22, 18),
    (2, 5, 9, 128, 50),
    (3, 9, 33, 64, 32),
]


def tables(
    rows: int, columns: int, device: str, *, doubled: bool, interleaved: bool
) -> list[Tensor]:
    pairs = columns // 2 if doubled else columns
    angles = torch.rand(rows, pairs, device=device) * 6.3
    if doubled:
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles] * 2, -1)
    return [angles.cos(), angles.sin()]


def case(B: int, H: int, S: int, D: int, C: int, device: str, interleaved: bool, rows: int = 0):
    x = torch.randn(B, H, S, D, device=device).requires_grad_()
    return [x, *tables(rows or S, C, device, doubled=2 * C > D, interleaved=interleaved)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, interleaved, dtype, device):
    inputs = case(*shape, device, interleaved)
    assert_matches_reference(
        ops.rope, reference.rope, *inputs, dtype=dtype, interleaved=interleaved
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_float32_tables_with_low_precision_x(interleaved, dtype, device):
    x, cos, sin = case(2, 3, 5, 40, 16, device, interleaved)
    assert_matches_reference(
        lambda x: ops.rope(x, cos, sin, interleaved=interleaved),
        lambda x: reference.rope(x, cos, sin, interleaved=interleaved),
        x,
        dtype=dtype,
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_position_ids(shared, interleaved, dtype, device):
    B, H, S, rows = 3, 2, 6, 50
    inputs = case(B, H, S, 36, 18, device, interleaved, rows)
    ids = torch.randint(0, rows, (S,) if shared else (B, S), device=device)
    kwargs = {"position_ids": ids, "interleaved": interleaved}
    assert_matches_reference(ops.rope, reference.rope, *inputs, dtype=dtype, **kwargs)
    strided = torch.stack([ids, ids], -1)[..., 0]
    x, cos, sin = (t.detach() for t in inputs)
    assert torch.equal(
        ops.rope(x, cos, sin, position_ids=strided, interleaved=interleaved),
        ops.rope(x, cos, sin, **kwargs),
    )


def layouts(device: str) -> dict[str, Tensor]:
    B, H, S, D = 2, 3, 5, 36
    packed = torch.randn(B, S, 3 * H * D, device=device)
    return {
        "packed qkv": packed[..., H * D : 2 * H * D].view(B, S, H, D).transpose(1, 2),
        "seq major": torch.randn(B, S, H, D, device=device).transpose(1, 2),
        "expanded": torch.randn(B, 1, S, D, device=device).expand(B, H, S, D),
        "D not innermost": torch.randn(B, H, D, S, device=device).transpose(2, 3),
        "batch innermost": torch.randn(H, S, D, B, device=device).permute(3, 0, 1, 2),
        "sliced": torch.randn(B, H, 2 * S, D + 1, device=device)[:, :, ::2, 1:],
        "offset": torch.randn(B * H * S * D + 1, device=device)[1:].view(B, H, S, D),
    }


LAYOUTS = list(layouts("cpu"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides(name, dtype, device):
    x = layouts(device)[name].to(dtype)
    cos, sin = tables(9, 14, device, doubled=False, interleaved=False)
    cos, sin = cos.T.contiguous().T, torch.cat([sin, sin], -1)[:, :14]
    y = ops.rope(x, cos, sin)
    assert torch.equal(y, ops.rope(x.contiguous(), cos.contiguous(), sin.contiguous()))
    seq_major = x.stride(1) < x.stride(2)
    assert (y.transpose(1, 2) if seq_major else y).is_contiguous()
    if name != "expanded":
        assert_matches_reference(
            lambda x: ops.rope(x, cos, sin),
            lambda x: reference.rope(x, cos, sin),
            x.requires_grad_(),
            dtype=dtype,
        )


@pytest.mark.parametrize("expand", [False, True])
def test_strided_gradients(expand, device):
    x, cos, sin = case(2, 3, 5, 12, 6, device, False)
    dy = torch.randn(2, 5, 3, 12, device=device).transpose(1, 2)
    if expand:
        dy = torch.ones((), device=device).expand(x.shape)
    ours, eager, truth = (
        torch.autograd.grad(f(x.to(d), cos.to(d), sin.to(d)), x, dy.to(d))[0].double()
        for f, d in (
            (ops.rope, torch.float32),
            (reference.rope, torch.float32),
            (reference.rope, torch.float64),
        )
    )
    assert_within(ours, eager, truth, torch.finfo(torch.float32).eps, "dx")


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (2, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("positions", [False, True])
def test_empty(positions, shape, device):
    x = torch.empty(shape, device=device).requires_grad_()
    cos, sin = tables(3, shape[-1] // 2, device, doubled=False, interleaved=False)
    ids = torch.zeros(shape[0], shape[2], dtype=torch.int64, device=device) if positions else None
    kwargs = {"position_ids": ids}
    assert_matches_reference(ops.rope, reference.rope, x, cos, sin, dtype=torch.float32, **kwargs)


def test_rotating_back_restores(device):
    x, cos, sin = case(1, 2, 3, 16, 8, device, False)
    back = ops.rope(ops.rope(x, cos, sin), cos, -sin).detach().double()
    assert_within(back, x.double(), x.double(), 2 * torch.finfo(torch.float32).eps, "x")


def test_doubled_table_is_transformers_formula(device):
    x, cos, sin = (t.detach() for t in case(2, 2, 3, 64, 64, device, False))
    half = torch.cat([-x[..., 32:], x[..., :32]], -1)
    expected = (x * cos + half * sin).double()
    truth = x.double() * cos.double() + half.double() * sin.double()
    ours = ops.rope(x, cos, sin).double()
    assert_within(ours, expected, truth, torch.finfo(torch.float32).eps, "y")


def test_non_finite(device):
    x, cos, sin = (t.detach() for t in case(1, 1, 1, 64, 32, device, False))
    x[..., 3], x[..., 40] = torch.nan, torch.inf
    bad = ops.rope(x, cos, sin).isfinite().logical_not().nonzero()[:, -1].tolist()
    assert bad == [3, 8, 35, 40]


def test_bad_positions(device):
    x, cos, sin = (t.detach() for t in case(1, 2, 3, 8, 4, device, False, rows=5))
    ids = torch.tensor([-1, 2, 5], device=device)
    if device == "cpu" and not INTERPRET:
        with pytest.raises(ValueError, match=r"position -1 is outside .* 5 rows"):
            ops.rope(x, cos, sin, position_ids=ids)
        with pytest.raises(ValueError, match=r"position 5 is outside"):
            ops.rope(x, cos, sin, position_ids=ids.clamp(min=0))
    else:  # a kernel that cannot raise stays within the table
        clamped = ops.rope(x, cos, sin, position_ids=ids.clamp(0, 4))
        assert torch.equal(ops.rope(x, cos, sin, position_ids=ids), clamped)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 8)}, r"\[B, H, S, D\], not \(3, 8\)"),
        ({"cos": torch.zeros(3)}, r"cos \(3,\)"),
        ({"sin": torch.zeros(3, 5)}, r"sin \(3, 5\)"),
        ({"cos": torch.zeros(3, 9), "sin": torch.zeros(3, 9)}, r"\(3, 9\)"),
        ({"cos": torch.zeros(3, 7), "sin": torch.zeros(3, 7)}, r"\(3, 7\)"),
        ({"cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)}, r"too few rows"),
        ({"cos": torch.zeros(3, 4).half()}, r"float16"),
        ({"cos": torch.zeros(3, 4).half(), "sin": torch.zeros(3, 4).half()}, r"float32"),
        ({"sin": torch.zeros(3, 4, device="meta")}, r"meta"),
        ({"x": torch.zeros(1, 1, 3, 8, dtype=torch.int32)}, r"int32"),
        ({"position_ids": torch.zeros(4, dtype=torch.int64)}, r"\(4,\)"),
        ({"position_ids": torch.zeros(3)}, r"int64"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64, device="meta")}, r"meta"),
    ],
    ids=str,
)
def test_bad_inputs(change, message):
    good = {"x": torch.zeros(1, 2, 3, 8), "cos": torch.zeros(3, 4), "sin": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        ops.rope(**{**good, **change})


def test_float64_runs_the_reference(device):
    x, cos, sin = (t.detach().double() for t in case(1, 2, 3, 8, 4, device, False))
    assert torch.equal(ops.rope(x, cos, sin), reference.rope(x, cos, sin))


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved, device):
    x, cos, sin = (t.detach() for t in case(2, 3, 4, 12, 6, device, interleaved))
    ids = torch.tensor([3, 0, 1, 2], device=device)
    for op in (torch.ops.tilewright.rope_fwd.default, torch.ops.tilewright.rope_bwd.default):
        torch.library.opcheck(op, (x, cos, sin, None, interleaved))
        torch.library.opcheck(op, (x, cos, sin, ids, interleaved))
        for other in layouts(device).values():
            table = torch.zeros(5, 4, device=device)
            torch.library.opcheck(op, (other, table, table, None, interleaved))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    def step(x, cos, sin, ids):
        return ops.rope(x.transpose(1, 2), cos, sin, position_ids=ids)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S in (4, 6):
        x = torch.randn(2, S, 3, 8, device=device)
        cos, sin = tables(9, 4, device, doubled=False, interleaved=False)
        ids = torch.arange(S, device=device)
        ours, expected = (run(f, [x.requires_grad_(), cos, sin, ids], {}) for f in (compiled, step))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_autocast_does_as_the_reference(device):
    x, cos, sin = (t.detach() for t in case(1, 2, 3, 8, 4, device, False))
    with torch.autocast(device, torch.bfloat16):
        ours, twin = ops.rope(x, cos, sin), reference.rope(x, cos, sin)
    assert ours.dtype == twin.dtype == torch.float32
    assert torch.equal(ours, ops.rope(x, cos, sin))


def test_repeatable_and_mutates_nothing(dtype, device):
    x, cos, sin = (t.detach().to(dtype) for t in case(2, 9, 65, 64, 32, device, False))
    before = [t.clone() for t in (x, cos, sin)]
    first = ops.rope(x, cos, sin)
    assert torch.equal(first, ops.rope(x, cos, sin))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, cos, sin), strict=True))


def test_tables_get_no_gradient(device):
    x, cos, sin = case(1, 2, 3, 8, 4, device, False)
    cos.requires_grad_(), sin.requires_grad_()
    ops.rope(x, cos, sin).sum().backward()
    assert x.grad is not None and cos.grad is None and sin.grad is None
    assert not ops.rope(x.detach(), cos, sin).requires_grad


def test_module(device):
    inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    module = nn.RotaryEmbedding(inv_freq, 32, scale=1.5).to(device).bfloat16()
    assert module.cos.dtype == torch.float32 and not module.state_dict()
    x = torch.randn(1, 2, 5, 8, device=device)
    ids = torch.tensor([31, 4, 4, 0, 7], device=device)
    angles = torch.outer(ids.double(), inv_freq.to(device).double())
    cos, sin = (1.5 * angles.cos()).float(), (1.5 * angles.sin()).float()
    assert torch.equal(module(x, ids), ops.rope(x, cos, sin))
    assert "max_positions=32" in repr(module)
