"""int8_rows and int8_linear against their twins, and against int64."""

import pytest
import torch

from tilewright import _native, nn, ops, reference
from tilewright.quant_tensor import Int8Rows, QuantTensor
from tilewright.testing import assert_matches_reference

rows_op = torch.ops.tilewright.int8_rows.default
linear_op = torch.ops.tilewright.int8_linear.default

# (M, N, K): none, one, decode, what a tile or a vector leaves over in each direction
SHAPES = [
    (0, 8, 64),
    (1, 1, 32),
    (1, 33, 96),
    (3, 70, 192),
    (8, 40, 257),
    (17, 34, 1152),
    (21, 130, 70),
]


def make(N, K, scale_dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(N + K)
    codes = torch.randint(0, 256, (N, K), generator=g, dtype=torch.uint8)
    scales = (torch.rand(N, 1, generator=g) * 0.02 + 0.01).to(scale_dtype)
    return QuantTensor(codes.to(device), scales.to(device), bits=8)


def same(found: Int8Rows, twin: Int8Rows) -> bool:
    scales = torch.equal(found.scales.nan_to_num(-1), twin.scales.nan_to_num(-1))
    return torch.equal(found.codes, twin.codes) and scales and found.dtype == twin.dtype


@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 64), (2, 3, 100), (2, 9000), (7,)], ids=str)
def test_rows_equal_their_twin(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    x.view(-1, shape[-1])[0] *= 1e3
    assert same(ops.int8_rows(x), reference.int8_rows(x))
    rounded, most = ops.int8_rows(x).dequantize(), x.abs().amax(-1, keepdim=True)
    ulp = torch.finfo(dtype).eps * most.float()
    assert ((rounded.float() - x.float()).abs() <= most.float() / 254 * (1 + 1e-5) + ulp).all()


def test_ties_go_to_even(dtype, device):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 125.5, 126.5]], device=device).to(dtype)
    wanted = torch.tensor([[127, 0, 2, 2, 0, -2, 126, 126]], dtype=torch.int8, device=device)
    assert torch.equal(ops.int8_rows(x).codes, wanted) and ops.int8_rows(x).scales.item() == 1


@pytest.mark.triton
@pytest.mark.parametrize("K", [1, 40, 70, 96, 4096])
def test_a_tile_is_as_wide_as_a_matrix_instruction(K):
    """Of 32 columns at least, which the interpreter does not ask for."""
    from tilewright.kernels._tune import fitted

    config = fitted({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128}, K)
    assert config["BLOCK_K"] >= 32 and not (config["FULL"] and K % config["BLOCK_K"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 39, 4999])
def test_rows_that_are_not_finite(value, column, dtype, device):
    x = torch.randn(3, 5000, device=device).to(dtype)
    x[1, column] = value
    found = ops.int8_rows(x)
    assert same(found, reference.int8_rows(x))
    assert found.scales.isnan().tolist() == [False, True, False] and not found.codes[1].any()
    y = ops.int8_linear(x, make(6, 5000, device=device))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_tiny_rows(device):
    sizes = torch.tensor([0.0, 1e-40, 1e-37, 1.5e-36, 1e-35, 3e38], device=device)
    x = torch.randn(6, 50, device=device).clamp(-1, 1) * sizes[:, None]
    assert same(ops.int8_rows(x), reference.int8_rows(x))
    assert not ops.int8_rows(x).scales[:3].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_matches_reference(shape, has_bias, dtype, device):
    M, N, K = shape
    w = make(N, K, device=device)
    x = torch.randn(M, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True) if has_bias else None
    assert_matches_reference(
        lambda x, b: ops.int8_linear(x, w, b),
        lambda x, b: reference.int8_linear(x, w, b),
        x,
        bias,
        dtype=dtype,
    )


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scale_dtypes(scale_dtype, dtype, device):
    w = make(24, 128, scale_dtype, device)
    assert_matches_reference(
        lambda x: ops.int8_linear(x, w),
        lambda x: reference.int8_linear(x, w),
        torch.randn(5, 128, device=device),
        dtype=dtype,
    )


@pytest.mark.parametrize("K", [1, 15, 16, 63, 64, 100, 4099])
@pytest.mark.parametrize("M", [1, 6])
def test_sums_are_exact(K, M, device):
    """Equal to int64's, at the extremes too: every product at its largest, of either sign."""
    if _native.INTERPRET and K > 100:
        K = 1000
    g = torch.Generator().manual_seed(K)
    x = torch.randint(-127, 128, (M, K), generator=g, dtype=torch.int8)
    q = torch.randint(0, 256, (9, K), generator=g, dtype=torch.uint8)
    x[0], q[0], q[1] = 127, 0, 255
    if M > 1:
        x[1] = -128  # not one of ours, but a code
    ones = torch.ones(M, device=device), torch.ones(9, 1, device=device)
    y = linear_op(x.to(device), ones[0], q.to(device), ones[1], None, torch.float32)
    exact = x.long() @ (q.long() - 128).t()
    assert torch.equal(y.cpu(), exact.float())


def test_one_hot_rows_return_exact_columns(device):
    w = make(40, 128, device=device)
    for k in (0, 1, 63, 64, 127):
        x = torch.zeros(3, 128, device=device)
        x[:, k] = 127
        found = ops.int8_linear(x, w)
        assert torch.equal(found, (127 * (w.codes()[:, k] - 128.0) * w.scales[:, 0]).expand(3, -1))


@pytest.mark.parametrize("shape", [(0, 64), (8, 0)], ids=str)
def test_empty_weights(shape, device):
    N, K = shape
    w = QuantTensor(
        torch.zeros(N, K, dtype=torch.uint8, device=device), torch.ones(N, 1, device=device), bits=8
    )
    x = torch.randn(3, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    y = ops.int8_linear(x, w, bias)
    assert torch.equal(y, bias.expand(3, N)) and not ops.int8_linear(x, w).any()
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(y))
    assert not dx.any() and torch.equal(dbias, torch.full_like(bias, 3.0))


@pytest.mark.parametrize("view", ["3d", "transposed", "rows", "expanded", "misaligned"])
def test_strides(view, dtype, device):
    w = make(24, 64, device=device)
    x = {
        "3d": lambda: torch.randn(2, 3, 64, device=device),
        "transposed": lambda: torch.randn(64, 5, device=device).t(),
        "rows": lambda: torch.randn(10, 80, device=device)[::2, 16:],
        "expanded": lambda: torch.randn(1, 64, device=device).expand(4, 64),
        "misaligned": lambda: torch.randn(4 * 64 + 1, device=device)[1:].view(4, 64),
    }[view]().to(dtype)  # fmt: skip
    wanted = ops.int8_linear(x.contiguous(), w)
    assert torch.equal(ops.int8_linear(x, w), wanted)
    rows = ops.int8_rows(x)
    assert rows.codes.is_contiguous() and torch.equal(ops.int8_linear(rows, w), wanted)
    apart = Int8Rows(
        rows.codes.mT.contiguous().mT,
        rows.scales[..., None].expand(*rows.scales.shape, 2)[..., 0],
        dtype,
    )
    assert torch.equal(ops.int8_linear(apart, w), wanted)
    wide = torch.zeros(24, 100, dtype=torch.uint8, device=device)
    wide[:, :64] = w.qweight
    assert torch.equal(ops.int8_linear(x, QuantTensor(wide[:, :64], w.scales, bits=8)), wanted)


def test_a_gradient_of_the_bias_beside_given_rows(dtype, device):
    w, bias = make(24, 64, device=device), torch.randn(24, device=device, dtype=dtype)
    rows = ops.int8_rows(torch.randn(2, 3, 64, device=device, dtype=dtype))
    y = ops.int8_linear(rows, w, bias.requires_grad_())
    (found,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(found, torch.full_like(bias, 6.0))
    with torch.no_grad():
        assert torch.equal(y, ops.int8_linear(rows, w, bias))


def test_scales_far_from_one(device):
    """What float32 holds of the result is not lost on the way."""
    w, x = make(16, 64, device=device), torch.randn(3, 64, device=device)
    for size, of_weight in ((1e34, 1e-4), (1e-35, 1e4), (1e20, 1e-30)):
        scaled = QuantTensor(w.qweight, w.scales * of_weight, bits=8)
        y, truth = (
            ops.int8_linear(x * size, scaled),
            reference.int8_linear((x * size).double(), scaled),
        )
        torch.testing.assert_close(
            y.double(), truth, rtol=8 * torch.finfo(torch.float32).eps, atol=0.0
        )


def test_opcheck(dtype, device):
    w, bias = make(24, 64, device=device), torch.randn(24, device=device, dtype=dtype)
    for x in (torch.randn(2, 3, 64, device=device), torch.randn(64, 5, device=device).t()):
        torch.library.opcheck(rows_op, (x.to(dtype),))
        for b in (bias, None):
            args = (*rows_op(x.to(dtype)), w.qweight, w.scales, b, dtype)
            torch.library.opcheck(linear_op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    torch._dynamo.reset()  # the recompile limit counts the tests before this one
    w = make(24, 64, device=device)

    def both(x, bias):
        return ops.int8_linear(x, w, bias)

    def apart(x):
        return ops.int8_linear(ops.int8_rows(x), w)

    compiled = [
        torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for f in (both, apart)
    ]
    for m in (4, 6):
        x = torch.randn(m, 3, 64, device=device, requires_grad=True)
        bias = torch.randn(24, device=device, requires_grad=True)
        wanted, found = both(x, bias), compiled[0](x, bias)
        assert torch.equal(found, wanted)
        dy = torch.randn_like(found)
        grads = [torch.autograd.grad(y, (x, bias), dy) for y in (found, wanted)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert torch.equal(compiled[1](x.detach()), apart(x.detach()))


def test_autocast(device):
    w, bias = make(24, 64, device=device), torch.randn(24, device=device)
    x = torch.randn(5, 64, device=device)
    rows = ops.int8_rows(x)
    with torch.autocast(device, torch.bfloat16):
        y, of_rows = ops.int8_linear(x, w, bias), ops.int8_linear(rows, w, bias)
    assert torch.equal(y, ops.int8_linear(x.bfloat16(), w, bias.bfloat16()))
    assert torch.equal(
        of_rows, ops.int8_linear(rows._replace(dtype=torch.bfloat16), w, bias.bfloat16())
    )


def test_repeats_bit_for_bit(dtype, device):
    w, x = make(150, 600, device=device), torch.randn(37, 600, device=device).to(dtype)
    threads, first = torch.get_num_threads(), ops.int8_linear(x, w)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.int8_linear(x, w), first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_what_no_kernel_serves_is_the_twin(dtype, device):
    w, x = make(24, 64, device=device), torch.randn(5, 64, device=device, dtype=dtype)
    assert torch.equal(ops.int8_linear(x, w), reference.int8_linear(x, w))
    assert same(ops.int8_rows(x), reference.int8_rows(x))


X, W = torch.ones(3, 64), make(8, 64)
ROWS = Int8Rows(torch.ones(3, 64, dtype=torch.int8), torch.ones(3), torch.float32)


@pytest.mark.parametrize(
    ("x", "w", "bias", "message"),
    [
        (torch.ones(3, 63), W, None, r"x \[3, 63\] does not fit a weight of shape \[8, 64\]"),
        (torch.ones(()), W, None, r"x \[\] does not fit"),
        (X.int(), W, None, "x must be a floating dtype, not torch.int32"),
        (X.to("meta"), W, None, "x is on meta, the weight on cpu"),
        (X, W, torch.ones(7), r"bias torch.float32 \[7\]"),
        (X, W, torch.ones(8).half(), r"bias torch.float16 \[8\]"),
        (X, QuantTensor(W.qweight, torch.ones(8, 2), bits=8), None, r"a scale a row.*scales \[8, 2\]"),
        (X, QuantTensor(W.qweight, W.scales, W.scales, bits=8), None, "no offsets.*zeros"),
        (X, QuantTensor(W.qweight[:, :32], W.scales, bits=4), None, "8 bits.*not 4"),
        (ROWS._replace(codes=X), W, None, "rows are int8.*not torch.float32"),
        (ROWS._replace(scales=torch.ones(4)), W, None, r"scales \[4\] on cpu do not fit codes \[3, 64\]"),
        (ROWS._replace(scales=torch.ones(3).half()), W, None, "float32, not .*float16"),
        (ROWS._replace(dtype=torch.int8), W, None, "x must be a floating dtype"),
    ],
)  # fmt: skip
def test_bad_input(x, w, bias, message):
    with pytest.raises(ValueError, match=f"int8_linear: .*{message}"):
        ops.int8_linear(x, w, bias)


def test_bad_rows():
    with pytest.raises(ValueError, match=r"int8_rows: x must be floating point.*int32"):
        ops.int8_rows(X.int())
    with pytest.raises(ValueError, match="at least one dimension"):
        ops.int8_rows(torch.ones(()))
    with pytest.raises(
        ValueError, match="int8_rows: codes have no gradient: take int8_linear of x"
    ):
        ops.int8_rows(X.clone().requires_grad_())
    with torch.no_grad():
        ops.int8_rows(X.clone().requires_grad_())


def test_operators_refuse_what_does_not_fit():
    if _native.C is None:
        return  # the launchers trust the public function
    given = [ROWS.codes, ROWS.scales, W.qweight, W.scales, None, torch.float32]
    for at, wrong, message in [
        (0, X, "codes must be int8"),
        (1, torch.ones(4), "row_scales"),
        (2, W.qweight[:, 1:], "qweight"),
        (3, W.scales[1:], "scales"),
        (4, torch.ones(7), "bias"),
        (5, torch.int32, "y"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=f"int8_linear: {message}"):
            linear_op(*given[:at], wrong, *given[at + 1 :])
    long = torch.zeros(1, 1 << 17, dtype=torch.int8)
    with pytest.raises(ValueError, match="sums of 131072 products pass int32"):
        linear_op(
            long, torch.ones(1), long.view(torch.uint8), torch.ones(1, 1), None, torch.float32
        )
    wide = QuantTensor(long.view(torch.uint8), torch.ones(1, 1), bits=8)  # the twin's
    assert ops.int8_linear(torch.ones(1, 1 << 17), wide).item() == -128.0 * (1 << 17)


def test_module(device):
    w, bias = make(24, 64, device=device), torch.randn(24, device=device)
    layer = nn.QuantLinear(w, bias, activations="int8_token")
    x = torch.randn(2, 5, 64, device=device)
    with torch.no_grad():
        assert torch.equal(layer(x), ops.int8_linear(x, w, bias))
        assert torch.equal(layer(ops.int8_rows(x)), layer(x))
    with pytest.raises(ValueError, match="QuantLinear: activations 'float' do not take Int8Rows"):
        nn.QuantLinear(w)(ops.int8_rows(x))
    with pytest.raises(
        ValueError, match=r"QuantLinear: int8_token takes .* not 8 bits in groups of 32"
    ):
        nn.QuantLinear(
            QuantTensor(w.qweight, w.scales.expand(24, 2).contiguous(), bits=8),
            activations="int8_token",
        )
    with pytest.raises(
        ValueError, match="QuantLinear: activations must be one of float, int8, int8_token, not 'x'"
    ):
        nn.QuantLinear(w, activations="x")
