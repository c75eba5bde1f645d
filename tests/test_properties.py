"""Every op on drawn shapes, layouts and dtypes: it matches its reference, leaves its inputs as they
were, and repeats to the bit.

A layout is any order of the dimensions in memory, any of them stepped over or expanded, the whole at
any offset: what views of views come to.  `--hypothesis-profile=full` draws more.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tilewright import QuantTensor, ops, reference
from tilewright.quant_tensor import pack_int4
from tilewright.testing import assert_matches_reference, assert_within, run

SIZES = st.sampled_from([0, 1, 2, 3, 5, 8, 17])
WIDTHS = st.sampled_from([0, 1, 2, 3, 8, 16, 31, 64, 100, 130])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def laid_out(draw: st.DrawFn, shape: tuple[int, ...], alike: bool = True) -> Tensor:
    """Normals of this shape, float32, in a drawn layout; a gradient may be wanted.

    alike: the last dimension may be expanded too.
    """
    rank = len(shape)
    order = draw(st.permutations(range(rank)))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    expanded = [draw(st.integers(0, 7)) == 7 for _ in shape]
    expanded[-1] &= alike
    offset = draw(st.integers(0, 3))
    sizes = [1 if wide else n * step for n, step, wide in zip(shape, steps, expanded, strict=True)]
    strides, stride = [0] * rank, 1
    for d in reversed(order):
        strides[d], stride = stride, stride * max(1, sizes[d])
    storage = torch.randn(offset + stride)
    x = storage.as_strided(sizes, strides, offset)
    x = x[tuple(slice(None, None, 1 if w else s) for s, w in zip(steps, expanded, strict=True))]
    return x.expand(shape).requires_grad_(draw(st.booleans()))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return (*draw(st.lists(SIZES, max_size=2)), draw(WIDTHS))


def rms_norm(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    shape = draw(shapes())
    weight = laid_out(draw, shape[-1:]) if draw(st.booleans()) else None
    return [laid_out(draw, shape), weight, 1e-5], {"offset": draw(st.sampled_from([0.0, 1.0]))}


def add_rms_norm(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    shape = draw(shapes())
    weight = laid_out(draw, shape[-1:]) if draw(st.booleans()) else None
    return [laid_out(draw, shape), laid_out(draw, shape), weight, 1e-5], {}


def swiglu(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    shape = draw(shapes())
    if draw(st.booleans()):
        return [laid_out(draw, (*shape[:-1], 2 * shape[-1]))], {}
    return [laid_out(draw, shape), laid_out(draw, shape)], {}


def geglu(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    inputs, _ = swiglu(draw)
    # the slope crosses 0 near -0.75: alone in its row, what is left of it there is luck, eager's too; and a
    # row that is one number, expanded, is alone
    assume(inputs[0].shape[-1] // (3 - len(inputs)) not in range(1, 8))
    assume(all(x.stride(-1) for x in inputs))
    return inputs, {"approximate": draw(st.sampled_from(["tanh", "none"]))}


def rope(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    B, H, S = draw(SIZES), draw(SIZES), draw(SIZES)
    D = draw(st.sampled_from([2, 6, 16, 64, 80]))
    # the whole head turns, or all but its last pair
    R = D if D == 2 else draw(st.sampled_from([D, D - 2]))
    doubled = draw(st.booleans()) and 2 * R > D
    rows = S + draw(st.integers(0, 2))
    angles = torch.rand(max(rows, 1), R // 2) * 6
    interleaved = draw(st.booleans())
    if doubled:
        repeat = (
            (lambda t: t.repeat_interleave(2, 1)) if interleaved else (lambda t: t.repeat(1, 2))
        )
        angles = repeat(angles)
    kwargs: dict[str, Any] = {"interleaved": interleaved}
    if draw(st.booleans()):
        shape = (B, S) if draw(st.booleans()) else (S,)
        kwargs["position_ids"] = torch.randint(0, max(rows, 1), shape)
    elif rows == 0:
        angles = angles[:0]
    return [laid_out(draw, (B, H, S, D)), angles.cos(), angles.sin()], kwargs


def moe_route(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    size = draw(st.sampled_from([1, 3, 8, 13]))
    group_k, k = draw(st.integers(1, groups)), draw(st.integers(1, size))
    E = groups * size
    shape = (*draw(st.lists(SIZES, max_size=2)), E)
    kwargs: dict[str, Any] = {"groups": groups, "group_k": group_k}
    kwargs["scores"] = draw(st.sampled_from(["softmax", "sigmoid"]))
    kwargs["bias"] = laid_out(draw, (E,), alike=False).detach() if draw(st.booleans()) else None
    kwargs["scale"], kwargs["renormalise"] = 2.5, draw(st.booleans())
    # of one expert, or of experts alike, the weights sum to 1 whatever the logits: the gradient is 0, and what is
    # left of it there is luck, eager's too
    alike = k == 1 and kwargs["renormalise"]
    logits = laid_out(draw, shape, alike=False)
    return [logits.detach() if alike else logits, k], kwargs


def moe_combine(draw: st.DrawFn) -> tuple[list[Any], dict[str, Any]]:
    leading, E = draw(st.lists(SIZES, max_size=2)), draw(st.integers(1, 9))
    ids = torch.rand(*leading, E).argsort(-1)[..., : draw(st.integers(1, E))]
    if draw(st.booleans()):
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.3, -1)
    y = laid_out(draw, (ids.numel(), draw(WIDTHS)), alike=False)
    return [y, laid_out(draw, ids.shape), reference.moe_dispatch(ids, E)], {}


OPS: dict[str, Callable] = {
    "rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "swiglu": swiglu, "geglu": geglu, "rope": rope,
    "moe_route": moe_route, "moe_combine": moe_combine,
}  # fmt: skip


def bits(inputs: list[Any]) -> list[Tensor]:
    return [x.detach().clone() for x in inputs if isinstance(x, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) or torch.equal(x.isnan(), y.isnan()) for x, y in zip(a, b, strict=True)
    )


def rounded(x: Any, dtype: torch.dtype) -> Any:
    """The same layout in `dtype`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    base = torch.empty(x.untyped_storage().nbytes() // 4, dtype=dtype)
    base.copy_(torch.empty(0).set_(x.untyped_storage()))
    view = base.as_strided(x.shape, x.stride(), x.storage_offset())
    return view.requires_grad_(x.requires_grad)


@pytest.mark.parametrize("op", OPS)
@given(data=st.data(), dtype=DTYPES)
def test_any_layout_matches_and_repeats(op: str, data: st.DataObject, dtype: torch.dtype):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    inputs, kwargs = OPS[op](data.draw)
    ours, theirs = getattr(ops, op), getattr(reference, op)
    assert_matches_reference(ours, theirs, *inputs, dtype=dtype, **kwargs)
    inputs = [rounded(x, dtype) for x in inputs]
    before = bits(inputs)
    first, again = run(ours, inputs, kwargs), run(ours, inputs, kwargs)
    assert same(first, again) and same(before, bits(inputs))


@given(data=st.data(), dtype=DTYPES)
def test_attention_sees_layouts_alike(data: st.DataObject, dtype: torch.dtype):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    G, group, D = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 8, 33, 64])),
    )
    B, S, T = draw(st.integers(0, 2)), draw(st.integers(0, 20)), draw(st.integers(0, 40))
    shaped = [(B, G * group, S, D), (B, G, T, D), (B, G, T, D)]
    inputs = [rounded(laid_out(draw, shape), dtype) for shape in shaped]
    limit = st.sampled_from([-1, -1, 0, 1, 7, 100])
    sinks = laid_out(draw, (G * group,)) if draw(st.booleans()) else None
    kwargs = {
        "causal": draw(st.booleans()),
        "window": (draw(limit), draw(limit)) if draw(st.booleans()) else None,
        "softcap": draw(st.sampled_from([None, None, 0.5, 30.0])),
        "sinks": sinks,
    }
    if draw(st.booleans()):
        begin = torch.randint(-3, T + 3, (draw(st.sampled_from([1, B])), S))
        kwargs["ranges"] = begin, begin + torch.randint(-2, T + 3, (S,))
    before = bits([*inputs, sinks])
    found = run(ops.attention_with_lse, inputs, kwargs)
    assert same(before, bits([*inputs, sinks]))
    dense = [x.detach().contiguous().requires_grad_(x.requires_grad) for x in inputs]
    assert same(found, run(ops.attention_with_lse, dense, kwargs))
    with torch.no_grad():
        truth, eager = (
            reference.attention(*(x.to(kind) for x in inputs), **kwargs).double()
            for kind in (torch.float64, dtype)
        )
    # a few rows are too few, and rows of few numbers, of few keys each, that may cancel: eager's worst may
    # by luck be good
    if truth.shape[:3].numel() >= 32 and (33 if "ranges" in kwargs else 8) <= D:
        assert_within(found[0], eager, truth, torch.finfo(dtype).eps, "out")


@given(data=st.data(), dtype=DTYPES)
def test_packed_sequences_are_each_attention(data: st.DataObject, dtype: torch.dtype):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    group, D = draw(st.integers(1, 3)), draw(st.sampled_from([33, 64]))
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=4)
    )
    starts = torch.tensor([(0, 0), *lengths]).cumsum(0)
    Tq, Tk = (int(n) for n in starts[-1])
    shapes = [(Tq, 2 * group, D), (Tk, 2, D), (Tk, 2, D)]
    inputs = [rounded(laid_out(draw, shape), dtype) for shape in shapes]
    kwargs = {"causal": draw(st.booleans()), "softcap": draw(st.sampled_from([None, 2.0]))}
    cu = starts.T.contiguous().unbind()
    before = bits(inputs)
    first, again = (
        run(lambda *x: ops.attention_varlen(*x, *cu, **kwargs), inputs, {}) for _ in range(2)
    )
    assert same(first, again) and same(before, bits(inputs))
    with torch.no_grad():
        truth, eager = (
            reference.attention_varlen(*(x.to(kind) for x in inputs), *cu, **kwargs).double()
            for kind in (torch.float64, dtype)
        )
    # as one row: of few keys, a row may cancel, and is off by what its scores happen to be off by
    rows = [x.reshape(1, -1) for x in (first[0], eager, truth)]
    if truth.shape[:2].numel() >= 64:
        assert_within(*rows, torch.finfo(dtype).eps, "out")


@given(data=st.data(), dtype=DTYPES)
def test_a_cache_on_any_pages_is_the_cache(data: st.DataObject, dtype: torch.dtype):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    G, group, D = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from([8, 33, 64])),
    )
    B, S, T = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 300))
    lengths = torch.tensor([draw(st.integers(0, T)) for _ in range(B)])
    q = rounded(laid_out(draw, (B, G * group, S, D)), dtype).detach()
    k, v = (rounded(laid_out(draw, (B, G, T, D)), dtype).detach() for _ in range(2))
    kwargs = {
        "window": (draw(st.sampled_from([-1, 0, 3, 100])), 0),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sinks": laid_out(draw, (G * group,)).detach() if draw(st.booleans()) else None,
    }
    page = draw(st.sampled_from([1, 3, 16, 128]))
    pages = -(-T // page)
    table = torch.randperm(B * pages).view(B, pages)
    whole = draw(st.permutations(range(4)))
    spread = []
    for x in (k, v):
        cache = torch.full((B * pages, G, page, D), torch.nan, dtype=dtype)
        padded = torch.nn.functional.pad(x, (0, 0, 0, pages * page - T), value=torch.nan)
        cache[table.flatten()] = padded.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)
        spread.append(
            cache.permute(whole).contiguous().permute(torch.tensor(whole).argsort().tolist())
        )
    before = bits([q, *spread])
    with torch.no_grad():
        found, again = (
            ops.attention_decode_with_lse(q, *spread, lengths, block_table=table, **kwargs)
            for _ in range(2)
        )
        truth, eager = (
            reference.attention_decode_with_lse(
                q.to(kind), k.to(kind), v.to(kind), lengths, **kwargs
            )
            for kind in (torch.float64, dtype)
        )
    assert same(list(found), list(again)) and same(before, bits([q, *spread]))
    torch.testing.assert_close(found, ops.attention_decode_with_lse(q, k, v, lengths, **kwargs))
    # as one row each: of few keys a row may cancel, and is off by what its scores happen to be off by
    for ours, theirs, true in zip(found, eager, truth, strict=True):
        rows = [x.double().reshape(1, -1) for x in (ours, theirs, true)]
        if truth[0].shape[:3].numel() >= 16:
            assert_within(*rows, torch.finfo(dtype).eps, "result")


@given(data=st.data(), dtype=DTYPES)
def test_quant_linear_on_any_layout(data: st.DataObject, dtype: torch.dtype):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    # few outputs are too few: the largest error of eager's may by luck be small
    N, groups = draw(st.integers(33, 70)), draw(st.integers(1, 4))
    group, width = draw(st.sampled_from([32, 64])), draw(st.sampled_from([4, 8]))
    K = groups * group
    # numbers all alike are rounded all alike: what is left is which of MKL's kernels eager meets
    x = laid_out(draw, (*draw(st.lists(SIZES, max_size=2)), K), alike=False)
    bias = laid_out(draw, (N,)) if draw(st.booleans()) else None
    codes = torch.randint(0, 2**width, (N, K), dtype=torch.uint8)
    scales = (torch.rand(N, groups) + 0.1).half()
    kind = draw(st.sampled_from(["symmetric", "zeros", "minima"]))
    offset = None if kind == "symmetric" else (torch.rand(N, groups) * 2**width / 2).half()
    w = QuantTensor(
        pack_int4(codes) if width == 4 else codes,
        scales,
        offset if kind == "zeros" else None,
        offset if kind == "minima" else None,
        bits=width,
    )
    assert_matches_reference(ops.quant_linear, reference.quant_linear, x, w, bias, dtype=dtype)
    inputs = [rounded(x, dtype), w, rounded(bias, dtype)]
    before = bits(inputs)
    first, again = run(ops.quant_linear, inputs, {}), run(ops.quant_linear, inputs, {})
    assert same(first, again) and same(before, bits(inputs))


@given(data=st.data(), dtype=DTYPES)
def test_moe_losses_see_layouts_alike(data: st.DataObject, dtype: torch.dtype):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    leading, E = draw(st.lists(SIZES, max_size=3)), draw(st.sampled_from([1, 2, 7, 60, 200]))
    logits = rounded(laid_out(draw, (*leading, E)), dtype)
    near = laid_out(draw, (*leading, draw(st.integers(1, 5)), 2)).detach()
    ids = (E * near).to(torch.int64)[..., 0]  # some of no expert
    seen = laid_out(draw, (*leading, 2)).detach()[..., 0] > -0.5
    mask = seen if draw(st.booleans()) else None
    kwargs = {"scores": draw(st.sampled_from(["softmax", "sigmoid"]))}
    kwargs["per_sequence"] = len(leading) > 1 and draw(st.booleans())
    before = bits([logits, ids, mask])
    first, again = (run(ops.moe_losses, [logits, ids], kwargs | {"mask": mask}) for _ in range(2))
    assert same(first, again) and same(before, bits([logits, ids, mask]))
    dense = [None if t is None else t.detach().contiguous() for t in (logits, ids, mask)]
    dense[0].requires_grad_(logits.requires_grad)
    assert same(first, run(ops.moe_losses, dense[:2], kwargs | {"mask": dense[2]}))
    with torch.no_grad():
        _, _, counts = reference.moe_losses(logits, ids, mask=mask)
    assert torch.equal(first[2], counts.double())


def test_every_op_is_drawn():
    kinds = ("", "_decode", "_varlen")
    family = [f"attention{kind}{more}" for kind in kinds for more in ("", "_with_lse")]
    others = [
        "attention_decode_append_",
        "merge_attention",
        "quant_linear",
        "int8_linear",
        "int8_rows",
    ]
    others += ["rms_norm_int8"]  # of codes, which a last bit decides
    others += ["moe_dispatch", "moe_experts", "moe_losses", "quant_moe_experts"]
    assert sorted([*OPS, *family, *others]) == sorted(ops.__all__)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("op", OPS)
def test_gradients_in_float64(op: str):
    """The formulas against differences: in float64, where the reference serves."""
    tables = torch.rand(3, 2, dtype=torch.float64)
    ids = torch.tensor([[0, 2], [-1, 0], [2, 1]])
    inputs = {
        "rms_norm": (double(3, 5), double(5)),
        "add_rms_norm": (double(3, 5), double(3, 5), double(5)),
        "swiglu": (double(3, 5), double(3, 5)),
        "geglu": (double(3, 6),),
        "rope": (double(1, 2, 3, 4), tables.cos(), tables.sin()),
        "moe_route": (double(3, 7), 3),
        "moe_combine": (double(6, 4), double(3, 2)),
    }
    more = {"moe_combine": (reference.moe_dispatch(ids, 3),)}.get(op, ())
    assert torch.autograd.gradcheck(lambda *x: getattr(ops, op)(*x, *more), inputs[op])


def test_attention_gradients_in_float64():
    q, k, v = double(1, 2, 3, 4), double(1, 1, 5, 4), double(1, 1, 5, 4)
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, causal=True), (q, k, v))
