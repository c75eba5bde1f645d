"""attention's block-sparse masks against the reference."""

import pytest
import torch
from torch import Tensor

from tilewright import _op, masks, ops, reference
from tilewright.testing import assert_matches_reference

fwd = torch.ops.tilewright.attention_fwd.default
bwd = torch.ops.tilewright.attention_bwd.default
OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (25, 3)},
    "everything": {"causal": True, "window": (60, -1), "softcap": 2.0, "sinks": True, "scale": 0.2},
    "dropout": {"dropout_p": 0.3},
}


def drawn(device: str, B: int, H: int, G: int, S: int, T: int, D: int) -> list[Tensor]:
    shapes = (B, H, S, D), (B, G, T, D), (B, G, T, D)
    return [torch.randn(s, device=device, requires_grad=True) for s in shapes]


def some_blocks(device: str, B: int, H: int, S: int, T: int, size: int) -> tuple[Tensor, int]:
    """Half of them; of the last head's first queries none, which so see nothing."""
    seen = torch.rand(B, H, -(-S // size), -(-T // size), device=device) > 0.5
    seen[:, -1, 0] = False
    return seen, size


def check(inputs, blocks, dtype, bias=None, **options):
    more = [] if bias is None else [bias]
    if options.pop("sinks", False):
        sinks = torch.linspace(-1, 4, inputs[0].size(1), device=inputs[0].device)
        more.append(sinks.requires_grad_())

    def given(attend):
        def call(q, k, v, *more):
            names = (["bias"] if bias is not None else []) + ["sinks"]
            torch.manual_seed(3)
            return attend(q, k, v, blocks=blocks, **dict(zip(names, more, strict=False)), **options)

        return call

    ours, theirs = (given(side.attention_with_lse) for side in (ops, reference))
    assert_matches_reference(ours, theirs, *inputs, *more, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "shared"), [(16, ""), (64, "batches"), (16, "heads"), (64, "both")]
)
def test_matches_reference(size, shared, dtype, device):
    B, H = (
        1 if shared in words else n
        for words, n in ((("batches", "both"), 2), (("heads", "both"), 4))
    )
    blocks = some_blocks(device, B, H, 70, 150, size)
    check(drawn(device, 2, 4, 2, 70, 150, 24), blocks, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("S", [3, 75], ids=["decode", "blocked"])
def test_options(S, options, dtype, device):
    blocks = some_blocks(device, 2, 4, S, 100, 16)
    check(drawn(device, 2, 4, 1, S, 100, 16), blocks, dtype, **options)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_head_dims(D, device):
    blocks = some_blocks(device, 1, 2, 140, 130, 128)
    check(drawn(device, 1, 2, 1, 140, 130, D), blocks, torch.float32)


def test_ranges_too(dtype, device):
    begin = torch.arange(70, device=device) // 3
    blocks = some_blocks(device, 2, 4, 70, 80, 16)
    check(drawn(device, 2, 4, 2, 70, 80, 16), blocks, dtype, ranges=(begin, begin + 40))


@pytest.mark.parametrize(
    "shape", [(2, 4, 70, 80), (4, 1, 80), (70, 1)], ids=["whole", "keys", "queries"]
)
def test_a_bias_too(shape, dtype, device):
    bias = torch.randn(shape, device=device, requires_grad=True)
    blocks = some_blocks(device, 2, 4, 70, 80, 16)
    # no key with few queries, of whose gradient the rounding is luck
    check(drawn(device, 2, 4, 2, 70, 80, 16), blocks, dtype, bias, window=(60, 20))


@pytest.mark.parametrize("S", [3, 75], ids=["decode", "blocked"])
def test_the_blocks_of_a_mask(S, device):
    """Beside the mask itself they change nothing."""
    mask = torch.rand(2, 1, S, 100, device=device) > 0.98
    blocks = masks.blocks(mask, 16)
    assert blocks[0].shape == (2, 1, -(-S // 16), 7) and not blocks[0].all()
    inputs = [x.detach() for x in drawn(device, 2, 4, 2, S, 100, 16)]
    bias = masks.additive(mask)
    found, expected = (ops.attention(*inputs, bias=bias, blocks=b) for b in (blocks, None))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"blocks: mask \(3, 100\) torch.bool"):
        masks.blocks(mask[0, 0, :3])


def test_what_no_query_sees_is_not_read(device):
    """Keys and values of nan, in blocks that every query leaves out, forward and backward."""
    q, k, v = drawn(device, 1, 2, 1, 96, 144, 16)
    seen = torch.ones(1, 1, 6, 9, dtype=torch.bool, device=device)
    seen[..., 3:6] = False
    with torch.no_grad():
        k[:, :, 48:96] = v[:, :, 48:96] = torch.nan
    out = ops.attention(q, k, v, blocks=(seen, 16))
    assert out.isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq.isfinite().all()
    for grad in (dk, dv):
        assert not grad[:, :, 48:96].any() and grad.isfinite().all()


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty(empty, device):
    B, S, T = {"batch": (0, 5, 7), "queries": (2, 0, 7), "keys": (2, 5, 0)}[empty]
    inputs = drawn(device, B, 4, 2, S, T, 16)
    out = ops.attention(*inputs, blocks=some_blocks(device, B, 4, S, T, 16) if S else
                        (torch.ones(B, 4, 0, 1, dtype=torch.bool, device=device), 16))  # fmt: skip
    assert out.shape == (B, 4, S, 16) and not out.any()
    assert all(
        g.shape == x.shape
        for g, x in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True)
    )


@pytest.mark.triton
@pytest.mark.parametrize("S", [1, 20], ids=["decode", "blocked"])
def test_opcheck(S, device):
    assert _op.serves("attention", torch.empty(0, device=device))
    q, k, v = (x.detach() for x in drawn(device, 2, 4, 2, S, 33, 16))
    seen, size = some_blocks(device, 1, 4, S, 33, 16)
    options = (None, None, None, None, seen, None, -1, 0, size, 0.0, 0.25, 0.0)
    torch.library.opcheck(fwd, (q, k, v, *options))
    torch.library.opcheck(bwd, (torch.randn_like(q), None, q, k, v, *options, False))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_fullgraph(dynamic, device):
    def f(q, k, v, seen):
        return ops.attention(q, k, v, blocks=(seen, 16), causal=True)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for S in (20, 33):
        inputs = drawn(device, 1, 4, 2, S, S, 16)
        seen, _ = some_blocks(device, 1, 4, S, S, 16)
        found, expected = compiled(*inputs, seen), f(*inputs, seen)
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(out.sum(), inputs) for out in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((2, 4, 2, 3), 48, "blocks of 48 are not of a power of two"),
        ((2, 4, 2, 3), 8, "blocks of 8 are not"),
        ((2, 4, 2, 2), 16, r"blocks \(2, 4, 2, 2\)"),
        ((2, 3, 2, 3), 16, r"blocks \(2, 3, 2, 3\)"),
        ((4, 2, 3), 16, r"blocks \(4, 2, 3\)"),
    ],
)
def test_bad_input(shape, size, message, device):
    seen = torch.ones(shape, dtype=torch.bool, device=device)
    inputs = drawn(device, 2, 4, 2, 20, 40, 8)
    with pytest.raises(ValueError, match=f"attention: {message}"):
        ops.attention(*inputs, blocks=(seen, size))
    for other in (seen.float(), seen.to("meta")):
        with pytest.raises(ValueError, match=r"attention: blocks"):
            ops.attention(*inputs, blocks=(other, size))
