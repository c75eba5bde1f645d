"""quant_linear, QuantTensor and nn.QuantLinear against dequantise-then-linear in float64."""

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tilewright import _native, _op, ops, reference
from tilewright.bench import harness
from tilewright.nn import QuantLinear
from tilewright.quant_tensor import Nested, QuantTensor, pack_int4

weights = harness.load(Path(__file__).with_name("quant_weights.py"))
make, check = weights.make, weights.check
KINDS = ["symmetric", "zeros", "minima"]


# (M, N, K, group): empty, one, decode, a GEMV tail, two tiles and panels, odd sizes, a whole row;
# panels of the gradient where no vector fits a group, and two of them along N; groups across panels, a
# row in two of them, groups of a dword
SHAPES = [
    (0, 8, 64, 32),
    (1, 1, 4, 4),
    (1, 33, 96, 32),
    (3, 70, 192, 64),
    (8, 40, 256, 128),
    (1, 33, 288, 32),
    (5, 70, 832, 64),
    (2, 5, 160, 160),
    (1, 9, 130, 130),
    (9, 33, 96, 32),
    (27, 65, 1088, 32),
    (14, 50, 72, 24),
    (20, 9, 72, 24),
    (20, 530, 64, 32),
]
if not _native.INTERPRET:  # panels are the CPU kernels'
    SHAPES += [(17, 34, 1152, 96), (9, 36, 1040, 1040), (32, 18, 520, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(shape, bits, kind, dtype, device):
    M, N, K, group = shape
    w = make(N, K, bits=bits, group=group, kind=kind, device=device)
    x = torch.randn(M, K, device=device, requires_grad=True)
    bias = torch.randn(N, device=device, requires_grad=True)
    check(w, x, dtype, bias)


@pytest.mark.parametrize("bits", [4, 8])
def test_streamed_gradient_goes_twice_round_each_loop(bits, device):
    w = make(131, 1120, bits=bits, device=device)
    check(w, torch.randn(7, 1120, device=device, requires_grad=True), torch.float32)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_match_their_reference(shape, bits, kind, dtype, device):
    M, N, K, group = shape
    w = make(N, K, bits=bits, group=group, kind=kind, device=device)
    x = torch.randn(M, K, device=device).to(dtype)
    x[0, : min(K, 32)] = 0  # a block of zeros has no scale
    check(w, x, dtype, activations="int8")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 12])
def test_scale_dtypes(scale_dtype, M, device):
    for bits in (4, 8):
        w = make(24, 128, bits=bits, scale_dtype=scale_dtype, kind="zeros", device=device)
        check(w, torch.randn(M, 128, device=device), torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [1, 9])
def test_one_hot_rows_return_exact_columns(bits, M, device):
    w = make(40, 128, bits=bits, kind="symmetric", scale_dtype=torch.float32, device=device)
    for k in (0, 1, 31, 32, 127):
        x = torch.zeros(M, 128, device=device)
        x[:, k] = 1
        assert torch.equal(ops.quant_linear(x, w), w.dequantize()[:, k].expand(M, -1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("code", [0, -1])
def test_extreme_codes_and_activations(bits, M, code, device):
    """Every product at its largest: no integer path may saturate."""
    q = torch.full((16, 64), code % 2**bits, dtype=torch.uint8)
    w = QuantTensor(
        (pack_int4(q) if bits == 4 else q).to(device),
        torch.ones(16, 2, device=device),
        torch.zeros(16, 2, device=device),
        bits=bits,
    )
    for sign in (1.0, -1.0):
        check(
            w, torch.full((M, 64), 127.0 * sign, device=device), torch.float32, activations="int8"
        )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_mantissa_of_the_largest_activation(bits, sign, device):
    """Fixed-point activations carry between their bytes near the largest number they hold; what one
    large activation leaves of the precision of the small ones in its block is enough."""
    w = make(33, 256, bits=bits, kind="zeros", device=device)
    fine = 2.0 - torch.arange(1, 16) * 2.0**-10  # 1.985 and up
    for largest in torch.cat((fine, torch.rand(15) + 1)).to(device):
        for small in (1.0, 0.1):
            x = torch.randn(1, 256, device=device).clamp(-1, 1) * small
            x[:, 5] = sign * largest
            check(w, x, torch.float32)


@pytest.mark.parametrize("M", [1, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiny_activations(M, bits, device):
    """Where 1 / scale would overflow, an int8 block is zeros."""
    w = make(9, 96, bits=bits, device=device)
    for size in (1e-35, 1e-36, 1e-37, 1e-40, 0.0):
        x = torch.randn(M, 96, device=device) * size
        check(w, x, torch.float32, activations="int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_non_finite_activations(value, bits, kind, activations, device):
    """They reach the outputs that the dequantised weight would take them to, and no other row."""
    w = make(9, 96, bits=bits, kind=kind, device=device)
    columns = (0, 1, 17, 40, 95)
    for first, M in ((0, 1), (1, 1), (2, 1), (3, 1), (1, 6), (0, 20)):
        x = torch.randn(M, 96, device=device)
        for row, k in enumerate(columns[first:]):
            if row < M:
                x[row, k] = value
        check(w, x, torch.float32, activations=activations)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_rows_of_bfloat16(value, bits, kind, device):
    """Which a product of bfloat16 codes does not take."""
    x = torch.randn(20, 96, device=device)
    x[range(5), (0, 1, 17, 40, 95)] = value
    check(make(9, 96, bits=bits, kind=kind, device=device), x, torch.bfloat16)


@pytest.mark.parametrize("M", [1, 6, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_non_finite_gradients(M, bits, device):
    w = make(9, 96, bits=bits, kind="zeros", device=device)
    for value in (float("nan"), float("inf")):
        dy = torch.randn(M, 9, device=device)
        dy[M // 2, 4] = value
        dx = []
        for fn in (ops.quant_linear, reference.quant_linear):
            x = torch.randn(M, 96, device=device, requires_grad=True)
            dx += torch.autograd.grad(fn(x, w), x, dy)
        other = torch.arange(M, device=device) != M // 2
        assert torch.equal(dx[0].isnan(), dx[1].isnan())
        assert torch.equal(dx[0][dx[1].isinf()], dx[1][dx[1].isinf()])
        assert dx[0][other].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 64), (8, 0)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [2, 20])
def test_empty_weights(shape, bits, M, device):
    N, K = shape
    q = torch.zeros(N, K * bits // 8, dtype=torch.uint8, device=device)
    w = QuantTensor(q, torch.ones(N, 2, device=device), bits=bits)
    x = torch.randn(M, K, device=device, requires_grad=True)
    for activations in ("float", "int8"):
        check(w, x, torch.float32, torch.randn(N, device=device), activations=activations)


@pytest.mark.parametrize("view", ["3d", "transposed", "rows", "expanded", "misaligned"])
def test_strided_inputs(view, device):
    w = make(24, 64, device=device)
    x = {
        "3d": lambda: torch.randn(2, 3, 64, device=device),
        "transposed": lambda: torch.randn(64, 5, device=device).t(),
        "rows": lambda: torch.randn(10, 80, device=device)[::2, 16:],
        "expanded": lambda: torch.randn(1, 64, device=device).expand(4, 64),
        "misaligned": lambda: torch.randn(4 * 64 + 1, device=device)[1:].view(4, 64),
    }[view]()
    out = ops.quant_linear(x, w)
    assert torch.equal(out, ops.quant_linear(x.contiguous(), w))
    assert out.is_contiguous()


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits, device):
    w = make(16, 64, bits=bits, kind="zeros", device=device)
    op = getattr(torch.ops.tilewright, f"linear_int{bits}").default
    args = (w.qweight, w.scales, w.zeros, None, None, [])
    for x in (torch.randn(3, 64, device=device), torch.randn(64, 12, device=device).t()):
        torch.library.opcheck(op, (x, *args, None, "float"))
        torch.library.opcheck(op, (x, *args, torch.randn(16, device=device), "int8"))
    dgrad = getattr(torch.ops.tilewright, f"linear_int{bits}_dgrad").default
    for dy in (torch.randn(3, 16, device=device), torch.randn(16, 3, device=device).t()):
        torch.library.opcheck(dgrad, (dy, *args))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    layer = QuantLinear(make(16, 64, device=device), torch.randn(16, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    grad, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(grad, x.grad)


def test_autocast_casts_as_linear_does(device):
    w, x = make(16, 64, device=device), torch.randn(3, 64, device=device)
    bias = torch.randn(16, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = ops.quant_linear(x, w, bias)
        assert out.dtype == torch.nn.functional.linear(x, w.dequantize(), bias).dtype
    assert torch.equal(out, ops.quant_linear(x.bfloat16(), w, bias.bfloat16()))


def test_repeats_bitwise_and_mutates_nothing(device):
    w, x = make(33, 96, device=device), torch.randn(9, 96, device=device)
    before = [t.clone() for t in (x, w.qweight, w.scales, w.minima)]
    first = ops.quant_linear(x, w)
    assert all(torch.equal(first, ops.quant_linear(x, w)) for _ in range(3))
    after = (x, w.qweight, w.scales, w.minima)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_thread_count_does_not_change_a_bit():
    threads = torch.get_num_threads()
    for M, group in ((1, 32), (12, 32), (20, 24), (1, 24)):
        w, dy = make(67, 600 // group * group, group=group), torch.randn(M, 67)
        x = torch.randn(M, w.shape[1], requires_grad=True)
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            y = ops.quant_linear(x, w)
            results.append((y, *torch.autograd.grad(y, x, dy)))
        torch.set_num_threads(threads)
        assert all(map(torch.equal, *results))


def test_float64_runs_on_the_reference(device):
    w = make(4, 32, device=device)
    x = torch.randn(2, 32, dtype=torch.float64, device=device, requires_grad=True)
    assert not _op.serves("quant_linear", x)
    assert torch.autograd.gradcheck(lambda x: ops.quant_linear(x, w), (x,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(2, 63)), "x"),
        (dict(x=torch.ones(2, 64, dtype=torch.int64)), "floating"),
        (dict(bias=torch.randn(15)), "bias"),
        (dict(bias=torch.randn(16, dtype=torch.float16)), "bias"),
        (dict(activations="int4"), "int4"),
    ],
    ids=["columns", "dtype", "bias shape", "bias dtype", "activations"],
)
def test_bad_input(change, message, device):
    args = dict(x=torch.randn(2, 64), bias=None, activations="float") | change
    with pytest.raises(ValueError, match=message):
        ops.quant_linear(
            args["x"].to(device),
            make(16, 64, device=device),
            None if args["bias"] is None else args["bias"].to(device),
            activations=args["activations"],
        )


@pytest.mark.parametrize(
    "change",
    [
        dict(bits=3),
        dict(qweight=torch.zeros(16, 32)),
        dict(scales=torch.ones(15, 2)),
        dict(scales=torch.ones(16, 3)),
        dict(scales=torch.ones(16, 2, dtype=torch.int32)),
        dict(zeros=torch.ones(16, 1)),
        dict(zeros=torch.ones(16, 2), minima=torch.ones(16, 2)),
        dict(order=torch.zeros(64)),
        dict(order=torch.zeros(63, dtype=torch.int32)),
        dict(codebook=torch.zeros(15)),
        dict(codebook=torch.zeros(16), zeros=torch.ones(16, 2)),
        dict(nested=Nested(torch.zeros(256), torch.zeros(1), torch.tensor(0.0))),
        dict(
            scales=torch.ones(16, 2, dtype=torch.uint8),
            nested=Nested(torch.zeros(256), torch.zeros(2), torch.tensor(0.0)),
        ),
        dict(scales=torch.ones(16, 2, dtype=torch.uint8)),
    ],
    ids=lambda c: ",".join(c),
)
def test_bad_quant_tensor(change):
    good = dict(qweight=torch.zeros(16, 32, dtype=torch.uint8), scales=torch.ones(16, 2))
    with pytest.raises(ValueError, match="QuantTensor"):
        QuantTensor(**(good | change))


def test_quant_tensor_rows_are_rows_of_the_whole():
    for bits in (4, 8):
        w = make(16, 64, bits=bits)
        index = torch.tensor([[3, 0], [15, 3]])
        assert torch.equal(w.rows(index), w.dequantize()[index])


def test_module_keeps_scales_through_casts_and_copies():
    weight = make(16, 64, kind="zeros")
    layer = QuantLinear(weight, torch.randn(16))
    assert set(layer.state_dict()) == {"qweight", "scales", "zeros", "bias"}
    layer.bfloat16()
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float16 and torch.equal(layer.scales, weight.scales)
    layer.float()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 64)
    assert torch.equal(twin(x), layer(x))
    assert twin.weight.qweight.data_ptr() != layer.weight.qweight.data_ptr()


def test_state_dict_round_trip():
    a, b = QuantLinear(make(16, 64)), QuantLinear(make(16, 64, kind="minima"))
    with torch.no_grad():
        b.qweight.zero_()
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(a(x), b(x))
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, assign=True)
    assert torch.equal(a(x), b(x))
    names = {f.name for f in fields(QuantTensor)}
    assert set(a.state_dict()) <= names


def test_every_instruction_set_agrees(dtype):
    """Each level this machine has; whatever serves the CPU where there is no extension."""
    C = _native.C
    current = _native.cpu_isa()
    try:
        for isa in [None] if C is None else C.isas():
            if C is not None:
                C.set_isa(isa)
            for M in (1, 5, 13):
                check(make(35, 160), torch.randn(M, 160), dtype)
                check(make(35, 160, bits=8), torch.randn(M, 160), dtype, activations="int8")
    finally:
        if C is not None:
            C.set_isa(current)
