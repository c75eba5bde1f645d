"""rms_norm_int8 against rms_norm in float64 and int8_rows."""

import pytest
import torch

from tilewright import _native, nn, ops, reference
from tilewright.quant_tensor import Int8Rows, QuantTensor

op = torch.ops.tilewright.rms_norm_int8.default

# whole rows, several and one a program, what a vector leaves over, and rows in tiles
SHAPES = [(5, 96), (70, 33), (1, 1), (2, 3, 1024), (3, 4097), (7,), (2, 17000)]


def check(x, weight, residual=None, offset=0.0, eps=1e-5):
    """The scale is the largest's / 127, and each code the nearest but for what float32 rounds."""
    rows, h = ops.rms_norm_int8(x, weight, eps, residual=residual, offset=offset)
    twin, twin_h = reference.rms_norm_int8(x, weight, eps, residual=residual, offset=offset)
    assert torch.equal(h, twin_h) and h.dtype == rows.dtype == twin.dtype
    assert (rows.codes.shape, rows.scales.shape) == (x.shape, x.shape[:-1])
    assert rows.codes.dtype == torch.int8 and rows.scales.dtype == torch.float32
    wide = None if weight is None else weight.double()
    y = reference.rms_norm(h.double(), wide, eps, offset=offset)
    largest = y.abs().amax(-1)
    ulps = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(rows.scales.double(), largest / 127, rtol=ulps, atol=0.0)
    off = (rows.codes.double() * rows.scales.double()[..., None] - y).abs()
    assert (off <= largest[..., None] * (0.5 / 127 + ulps)).all()
    assert ((rows.codes - twin.codes).abs() <= 1).all()
    assert (rows.codes != twin.codes).double().mean() <= 0.01  # ties that a last bit decides


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rounds_the_norm(shape, has_weight, has_residual, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    residual = torch.randn(shape, device=device).to(dtype) if has_residual else None
    weight = torch.randn(shape[-1], device=device) if has_weight else None
    check(x, weight, residual)


@pytest.mark.parametrize("N", [64, 17000])
def test_offset_and_eps(N, dtype, device):
    x, w = torch.randn(3, N, device=device).to(dtype), torch.randn(N, device=device)
    check(x, w, offset=1.0)
    check(x * 1e-3, w, eps=1e-2)
    check(x, w.to(dtype), offset=-0.5)
    rows, _ = ops.rms_norm_int8(x, w)
    named, _ = ops.rms_norm_int8(x, w, torch.finfo(torch.float32).eps)
    assert torch.equal(rows.codes, named.codes) and torch.equal(rows.scales, named.scales)


@pytest.mark.parametrize("N", [40, 17000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite(N, value, device):
    x = torch.randn(4, N, device=device)
    x[1, 3], x[2, N - 1], x[3] = value, value, 0.0
    rows, _ = ops.rms_norm_int8(x, torch.ones(N, device=device), 1e-6)
    assert rows.scales.isnan().tolist() == [False, True, True, False]
    assert not rows.codes[1:].any() and rows.scales[3] == 0


@pytest.mark.parametrize("N", [40, 17000])
@pytest.mark.parametrize(
    ("size", "of_weight", "eps"),
    [
        (1e10, 1e25, 1e-6),  # whose products pass float32 before the norm
        (1e-18, 1e-25, 0.0),
        (3e38, 2.0, 1e-6),  # whose squares do
        (0.0, 1.0, 0.0),
        (1e-30, 1.0, 0.0),
        (1.0, 1.0, -2.0),
    ],
)
def test_far_from_one(N, size, of_weight, eps, device):
    """As int8_rows of the norm: nan where that is, and its scale elsewhere."""
    x = torch.linspace(-1, 1, 2 * N, device=device).view(2, N) * size
    w = torch.full((N,), of_weight, device=device)
    rows, _ = ops.rms_norm_int8(x, w, eps)
    twin, _ = reference.rms_norm_int8(x, w, eps)
    torch.testing.assert_close(
        rows.scales, twin.scales, rtol=8 * torch.finfo(torch.float32).eps, atol=0.0, equal_nan=True
    )
    assert ((rows.codes - twin.codes).abs() <= 1).all()


def test_strides(dtype, device):
    w = torch.randn(64, device=device)
    for x in (
        torch.randn(10, 80, device=device)[::2, 16:],
        torch.randn(64, 5, device=device).t(),
        torch.randn(4, 6, 64, device=device).transpose(0, 1),
        torch.randn(1, 64, device=device).expand(5, 64),
    ):
        x = x.to(dtype)
        residual = (
            torch.randn(x.shape[::-1], device=device).to(dtype).permute(*range(x.dim())[::-1])
        )
        found, h = ops.rms_norm_int8(x, w, residual=residual)
        twin, h2 = ops.rms_norm_int8(x.contiguous(), w, residual=residual.contiguous())
        assert torch.equal(found.codes, twin.codes) and torch.equal(found.scales, twin.scales)
        assert torch.equal(h, h2) and h.is_contiguous() and found.codes.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 5), (0,)], ids=str)
def test_empty(shape, dtype, device):
    x = torch.randn(shape, device=device, dtype=dtype)
    for residual in (None, x):
        rows, h = ops.rms_norm_int8(x, torch.ones(shape[-1], device=device), residual=residual)
        assert rows.codes.shape == h.shape == shape and not rows.scales.any()


def test_dtypes_that_differ_widen(device):
    x, r = torch.randn(3, 40, device=device).bfloat16(), torch.randn(3, 40, device=device)
    rows, h = ops.rms_norm_int8(x, None, residual=r)
    assert h.dtype == rows.dtype == torch.float32 and torch.equal(h, x + r)


def test_float64_is_the_twin(device):
    x = torch.randn(3, 40, device=device, dtype=torch.float64)
    rows, h = ops.rms_norm_int8(x)
    assert torch.equal(rows.codes, reference.rms_norm_int8(x)[0].codes) and h is x


def test_opcheck(dtype, device):
    x, w = torch.randn(2, 3, 64, device=device).to(dtype), torch.randn(64, device=device)
    for residual in (None, torch.randn_like(x)):
        for weight in (w, None, w.to(dtype)):
            torch.library.opcheck(op, (x, residual, weight, 1e-6, 1.0))
        torch.library.opcheck(
            op,
            (
                x.transpose(0, 1),
                None if residual is None else residual.mT.mT.transpose(0, 1),
                w,
                1e-6,
                0.0,
            ),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    torch._dynamo.reset()  # the recompile limit counts the tests before this one
    codes = torch.randint(0, 256, (24, 64), dtype=torch.uint8, device=device)
    w = QuantTensor(codes, torch.rand(24, 1, device=device), bits=8)

    def layer(x, r, weight):
        rows, h = ops.rms_norm_int8(x, weight, residual=r)
        return ops.int8_linear(rows, w), h

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 6):
        given = (
            torch.randn(m, 64, device=device),
            torch.randn(m, 64, device=device),
            torch.randn(64, device=device),
        )
        assert all(torch.equal(a, b) for a, b in zip(layer(*given), compiled(*given), strict=True))


def test_autocast_changes_nothing(dtype, device):
    x, w = torch.randn(3, 40, device=device, dtype=dtype), torch.randn(40, device=device)
    with torch.autocast(device, torch.bfloat16):
        rows, h = ops.rms_norm_int8(x, w)
    assert rows.dtype == h.dtype == dtype and torch.equal(
        rows.codes, ops.rms_norm_int8(x, w)[0].codes
    )


def test_repeats_bit_for_bit_and_leaves_inputs_alone(dtype, device):
    x, r = (torch.randn(70, 700, device=device).to(dtype) for _ in range(2))
    w = torch.randn(700, device=device)
    before = [t.clone() for t in (x, r, w)]
    threads, (first, h) = torch.get_num_threads(), ops.rms_norm_int8(x, w, residual=r)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            rows, again = ops.rms_norm_int8(x, w, residual=r)
            assert torch.equal(rows.codes, first.codes) and torch.equal(rows.scales, first.scales)
            assert torch.equal(again, h)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(t, b) for t, b in zip((x, r, w), before, strict=True))


def test_what_a_layer_of_it_costs_in_accuracy(device):
    """The fused norm is as near as the norm rounded to bfloat16 and then to int8."""
    x, w = torch.randn(16, 512, device=device).bfloat16(), torch.rand(512, device=device) + 0.5
    codes = torch.randint(0, 256, (48, 512), dtype=torch.uint8, device=device)
    q = QuantTensor(codes, torch.full((48, 1), 0.01, device=device), bits=8)
    truth = reference.rms_norm(x.double(), w.double(), 1e-5) @ q.dequantize(torch.float64).t()
    fused = ops.int8_linear(ops.rms_norm_int8(x, w, 1e-5)[0], q)
    apart = ops.int8_linear(ops.rms_norm(x, w, 1e-5), q)
    error = lambda y: (y.double() - truth).norm() / truth.norm()  # noqa: E731
    assert error(fused) <= 1.05 * error(apart) and error(fused) < 0.02


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (torch.ones(()), None, None, "at least one dimension"),
        (torch.ones(3, 4).int(), None, None, "floating point.*int32"),
        (torch.ones(3, 4), None, torch.ones(4), r"residual shape \(4,\) does not fit x \(3, 4\)"),
        (torch.ones(3, 4), None, torch.ones(3, 4).int(), "residual must be .*int32"),
        (torch.ones(3, 4), None, torch.ones(3, 4, device="meta"), "residual is on meta, x on cpu"),
        (torch.ones(3, 4), torch.ones(3), None, r"weight shape \(3,\) does not fit"),
        (torch.ones(3, 4), torch.ones(4).int(), None, "weight must be .*int32"),
        (torch.ones(3, 4, requires_grad=True), None, None, "codes have no gradient"),
        (torch.ones(3, 4), torch.ones(4, requires_grad=True), None, "codes have no gradient"),
    ],
)
def test_bad_input(x, weight, residual, message):
    with pytest.raises(ValueError, match=f"rms_norm_int8: .*{message}"):
        ops.rms_norm_int8(x, weight, residual=residual)


def test_operator_refuses_what_does_not_fit():
    if _native.C is None:
        return  # the launchers trust the public function
    x = torch.ones(3, 4)
    for residual in (x[:2], x.bfloat16()):
        with pytest.raises(ValueError, match="rms_norm_int8: residual"):
            op(x, residual, None, 1e-6, 0.0)
    with pytest.raises(ValueError, match="rms_norm_int8: weight"):
        op(x, None, torch.ones(3), 1e-6, 0.0)


def test_a_layer_that_takes_rows(device):
    codes = torch.randint(0, 256, (24, 64), dtype=torch.uint8, device=device)
    layer = nn.QuantLinear(
        QuantTensor(codes, torch.rand(24, 1, device=device), bits=8), activations="int8_token"
    )
    rows, _ = ops.rms_norm_int8(torch.randn(5, 64, device=device))
    assert isinstance(rows, Int8Rows)
    assert torch.equal(layer(rows), ops.int8_linear(rows, layer.weight))
