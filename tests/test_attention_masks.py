"""Ranges of keys: what masks.py makes, and attention under them, forward and backward."""

import pytest
import torch
from torch import Tensor

from tilewright import _op, masks, ops, reference
from tilewright.testing import assert_matches_reference

fwd = torch.ops.tilewright.attention_fwd.default
bwd = torch.ops.tilewright.attention_bwd.default


def as_mask(ranges: tuple[Tensor, Tensor], B: int, S: int, T: int) -> Tensor:
    begin, end = (x.expand(B, S)[..., None] for x in ranges)
    keys = torch.arange(T, device=begin.device)
    return (keys >= begin) & (keys < end)


def test_padding():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert torch.equal(as_mask(masks.padding(mask), 4, 1, 4)[:, 0], mask.bool())
    with pytest.raises(ValueError, match=r"1 queries .* others between"):
        masks.padding(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]))
    with pytest.raises(ValueError, match="attention_mask \\(4,\\)"):
        masks.padding(mask[0])


def test_prefix():
    found = as_mask(masks.prefix(torch.tensor([3, 0]), 5), 2, 5, 5)
    causal = torch.ones(5, 5).tril().bool()
    assert torch.equal(found[1], causal)
    assert torch.equal(found[0], causal | (torch.arange(5) < 3))


def test_documents():
    ids = torch.tensor([[4, 4, 4, 1, 1, 9], [2, 2, 2, 2, 2, 2]])
    expected = ids[:, :, None] == ids[:, None, :]
    assert torch.equal(as_mask(masks.documents(ids), 2, 6, 6), expected)
    assert torch.equal(as_mask(masks.documents(ids[0]), 1, 6, 6)[0], expected[0])


def test_from_mask():
    mask = torch.ones(6, 9).tril(2).triu(-1).bool()
    mask[4] = False
    assert torch.equal(as_mask(masks.from_mask(mask), 1, 6, 9)[0], mask)
    with pytest.raises(ValueError, match="no bool"):
        masks.from_mask(mask.float())


def ranges_of(name: str, B: int, S: int, T: int) -> tuple[Tensor, Tensor]:
    keys = torch.arange(T - S, T)
    if name == "padding":  # left, right, neither
        real = torch.ones(B, T)
        real[0, : T // 3] = 0
        real[-1, -2:] = 0
        return masks.padding(real)
    if name == "documents":
        begin, end = masks.documents(torch.arange(T).expand(B, T) * 5 // T)
        return begin[:, -S:], end[:, -S:]
    if name == "prefix":
        begin, end = masks.prefix(torch.arange(B) * 3 + T // 2, T)
        return begin[:, -S:], end[:, -S:]
    if name == "one_key":
        return keys, keys + 1
    if name == "backwards":  # neither side rises
        return (T - 1 - keys).clamp(min=0), (T + 30 - keys).clamp(max=T)
    begin = torch.randint(0, T, (B, S))
    return begin, begin + torch.randint(-3, 40, (B, S))  # past the end, and none at all


NAMES = ("padding", "documents", "prefix", "one_key", "backwards", "any")
SHAPES = {  # B, H, G, S, T, D
    "prefill": (2, 2, 1, 70, 150, 24),
    "decode": (3, 4, 2, 3, 150, 32),
}


def drawn(device: str, B: int, H: int, G: int, S: int, T: int, D: int) -> list[Tensor]:
    shapes = ((B, H, S, D), (B, G, T, D), (B, G, T, D))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_matches_reference(shape, name, causal, dtype, device):
    B, _, _, S, T, _ = shape
    ranges = tuple(x.to(device) for x in ranges_of(name, B, S, T))
    assert_matches_reference(
        ops.attention_with_lse, reference.attention_with_lse, *drawn(device, *shape),
        dtype=dtype, causal=causal, ranges=ranges,
    )  # fmt: skip


def test_with_everything_else(dtype, device):
    ranges = tuple(x.to(device) for x in ranges_of("documents", 1, 80, 90))
    sinks = torch.linspace(-1, 6, 4, device=device).requires_grad_()
    options = {"window": (30, 4), "softcap": 2.0, "ranges": ranges, "scale": 0.2}
    ours, theirs = (
        lambda q, k, v, sinks, f=side.attention_with_lse: f(q, k, v, sinks=sinks, **options)
        for side in (ops, reference)
    )
    inputs = [*drawn(device, 1, 4, 1, 80, 90, 16), sinks]
    assert_matches_reference(ours, theirs, *inputs, dtype=dtype)


@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_ranges_say_what_causal_and_a_window_say(S, device):
    q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, S, 70, 16))
    here = torch.arange(70 - S, 70, device=device)
    for ranges, options in (
        ((here * 0, here + 1), {"causal": True}),
        ((here - 9, here + 3), {"window": (9, 2)}),
        ((torch.tensor(0, device=device), torch.tensor([[70]], device=device)), {}),
    ):
        found, expected = (
            ops.attention_with_lse(q, k, v, **o) for o in ({"ranges": ranges}, options)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_rows_that_see_nothing(S, device):
    inputs = drawn(device, 1, 4, 2, S, 70, 16)
    end = torch.full((S,), 70, device=device)
    end[::2] = 0
    out, lse = ops.attention_with_lse(*inputs, ranges=(torch.zeros_like(end), end))
    assert not out[:, :, ::2].any() and out[:, :, 1::2].all()
    assert (lse[:, :, ::2] == -torch.inf).all() and lse[:, :, 1::2].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), inputs)
    assert not dq[:, :, ::2].any() and dk.isfinite().all() and dv.all()


@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_nan_past_the_end_of_all_ranges(S, dtype, device):
    """The rows of a cache that are not used yet."""
    q, k, v = (x.detach().to(dtype) for x in drawn(device, 2, 4, 2, S, 170, 16))
    end = torch.tensor([[S], [151]], device=device)
    ranges = (torch.zeros_like(end), end)
    clean = ops.attention_with_lse(q, k, v, ranges=ranges)
    for x in (k, v):
        x[0, :, S:] = x[1, :, 151:] = torch.nan
    found = ops.attention_with_lse(q, k, v, ranges=ranges)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))


@pytest.mark.parametrize("S", [3, 60], ids=["decode", "blocked"])
def test_a_nan_sink_is_seen(S, device):
    q, k, v = (x.detach() for x in drawn(device, 1, 2, 1, S, 70, 16))
    sinks = torch.tensor([0.0, torch.nan], device=device)
    for side in (ops, reference):
        out, lse = side.attention_with_lse(q, k, v, sinks=sinks)
        assert out[:, 0].isfinite().all() and lse[:, 0].isfinite().all()
        assert out[:, 1].isnan().all() and lse[:, 1].isnan().all()


@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_opcheck(S, device):
    assert _op.serves("attention", torch.empty(0, device=device))
    q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, S, 33, 16))
    begin, end = (x.to(device, torch.int32) for x in ranges_of("any", 2, S, 33))
    options = (None, None, begin, end, None, None, -1, -1, 0, 0.0, 0.25, 0.0)
    torch.library.opcheck(fwd, (q, k, v, *options))
    torch.library.opcheck(bwd, (torch.randn_like(q), None, q, k, v, *options, False))


def test_values_beyond_the_keys_are_no_keys(device):
    """Of the operators too, which check no value."""
    q, k, v = (x.detach() for x in drawn(device, 1, 2, 1, 20, 33, 16))
    least = torch.full((1, 20), -(2**31), dtype=torch.int32, device=device)
    most = -(least + 1)

    def given(begin, end):
        return (q, k, v, None, None, begin, end, None, None, -1, -1, 0, 0.0, 0.25, 0.0)

    out, _ = fwd(*given(least, most))
    assert torch.equal(out, ops.attention(q, k, v, scale=0.25))
    some = torch.full_like(least, 5)
    for begin, end in ((most, most), (most, some), (some, least), (least, least), (most, least)):
        out, lse = fwd(*given(begin, end))
        assert not out.any() and (lse == -torch.inf).all()
        for grad in bwd(torch.ones_like(q), None, *given(begin, end), False)[:3]:
            assert not grad.any()


@pytest.mark.parametrize("limit", [10**12, 2**63 - 1])
def test_a_window_without_end_beside_ranges(limit, device):
    q, k, v = (x.detach() for x in drawn(device, 1, 4, 2, 9, 33, 16))
    ranges = torch.tensor(2, device=device), torch.tensor(30, device=device)
    found = ops.attention(q, k, v, ranges=ranges, window=(limit, limit))
    assert torch.equal(found, ops.attention(q, k, v, ranges=ranges))
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    cu = torch.tensor([0, 9], device=device), torch.tensor([0, 33], device=device)
    found = ops.attention_varlen(q, k, v, *cu, window=(limit, limit))
    assert torch.equal(found, ops.attention_varlen(q, k, v, *cu))


def test_ranges_of_a_batch_that_begin_far_apart(dtype, device):
    """Decode, whose chunks are the batch's: what one row sees late, another is done with."""
    begin = torch.tensor([[0], [390], [130]], device=device)
    end = torch.tensor([[5], [400], [140]], device=device)
    inputs = drawn(device, 3, 4, 2, 1, 400, 16)
    assert_matches_reference(
        ops.attention_with_lse, reference.attention_with_lse, *inputs,
        dtype=dtype, ranges=(begin, end),
    )  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic, device):
    def f(q, k, v, ids):
        return ops.attention(q, k, v, causal=True, ranges=masks.documents(ids))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S in (20, 33):
        q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, S, S, 16))
        ids = torch.arange(S, device=device).expand(2, S) // 7
        assert torch.equal(compiled(q, k, v, ids), f(q, k, v, ids))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((torch.zeros(5), torch.zeros(5)), "torch.float32"),
        ((torch.zeros(4).long(), torch.zeros(5).long()), "\\(4,\\)"),
        ((torch.zeros(3, 5).long(), torch.zeros(5).long()), "\\(3, 5\\)"),
        ((torch.zeros(1, 2, 5).long(), torch.zeros(5).long()), "\\(1, 2, 5\\)"),
        ((torch.zeros(5, device="meta").long(), torch.zeros(5).long()), "on meta"),
    ],
)
def test_bad_input(ranges, message, device):
    with pytest.raises(ValueError, match=f"attention: ranges {message}|attention: .*{message}"):
        ops.attention(*drawn(device, 2, 4, 2, 5, 5, 8), ranges=ranges)
