import pytest
import torch
from torch.nn import functional as F

from tilewright import _native, nn, ops, reference
from tilewright.testing import assert_matches_reference, assert_within, run

SHAPES = [
    (1,),
    (1, 1),
    (7, 1),
    (3, 63),
    (5, 256),
    (2, 7, 1000),
    (300, 8),
    (300, 1100),  # several blocks of rows in every dw sum, twice the inner loops of a row
    (3, 20000),  # wider than a program's registers
    (2, 131072),
]

VIEWS = {  # a contiguous leaf, and what is passed of it
    "rows_sliced": ((6, 200), lambda x: x[::2, 8:105]),
    "heads_of_packed": ((2, 5, 3 * 4 * 16), lambda x: x[..., 64:128].unflatten(-1, (4, 16))),
    "transposed_heads": ((2, 5, 4, 16), lambda x: x.transpose(1, 2)),
    "three_row_strides": ((3, 4, 5, 2, 16), lambda x: x.permute(2, 1, 0, 3, 4)[..., 0, :]),
    "columns_strided": ((4, 66), lambda x: x[:, ::2]),
    "columns_outermost": ((33, 6), lambda x: x.t()),
    "rows_expanded": ((1, 40), lambda x: x.expand(5, 40)),
    "all_expanded": ((1, 1), lambda x: x.expand(5, 40)),
}

fwd = torch.ops.tilewright.rms_norm_fwd.default
bwd = torch.ops.tilewright.rms_norm_bwd.default


def leaf(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    x, w = leaf(*shape, device=device), leaf(shape[-1], device=device)
    # with torch's eps the dx of a single column is what cancellation leaves of zero
    eps = 0.1 if shape[-1] == 1 else None
    assert_matches_reference(ops.rms_norm, reference.rms_norm, x, w, dtype=dtype, eps=eps)


def test_many_wide_rows(device):
    x, w = leaf(260, 8200, device=device), leaf(8200, device=device)
    assert_matches_reference(ops.rms_norm, reference.rms_norm, x, w, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(9, 100), (2, 17000)], ids=str)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("kwargs", [{"offset": 1.0}, {"eps": 1e-5}, {"eps": 0.3, "offset": -0.5}])
def test_options(shape, weight, kwargs, dtype, device):
    x, w = leaf(*shape, device=device), leaf(shape[-1], device=device) if weight else None
    assert_matches_reference(ops.rms_norm, reference.rms_norm, x, w, dtype=dtype, **kwargs)


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("n", [100, 17000])
def test_frozen_input(frozen, n, dtype, device):
    x, w = leaf(4, n, device=device), leaf(n, device=device)
    (x if frozen == "x" else w).requires_grad_(False)
    assert_matches_reference(ops.rms_norm, reference.rms_norm, x, w, dtype=dtype)


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, dtype, device):
    shape, of = VIEWS[view]
    x = leaf(*shape, device=device)
    w = leaf(2 * of(x).shape[-1], device=device)
    assert_matches_reference(
        lambda x, w: ops.rms_norm(of(x), w[::2]),
        lambda x, w: reference.rms_norm(of(x), w[::2]),
        x,
        w,
        dtype=dtype,
    )


@pytest.mark.parametrize("view", VIEWS)
def test_strided_output_gradient(view, dtype, device):
    shape, of = VIEWS[view]
    scale = torch.randn(shape, device=device)
    x = leaf(*of(scale).shape, device=device)
    assert_matches_reference(
        lambda x: ops.rms_norm(x) * of(scale).to(x.dtype),
        lambda x: reference.rms_norm(x) * of(scale).to(x.dtype),
        x,
        dtype=dtype,
    )
    # to the operator itself, past what autograd makes of it
    dy = of(scale.to(dtype))
    xd = x.detach().to(dtype)
    _, rstd = fwd(xd, None, 1e-6, 0.0)
    strided, _ = bwd(dy, xd, None, rstd, 0.0, False)
    truth, eager = (
        torch.autograd.grad(reference.rms_norm(leaf, eps=1e-6), leaf, dy.to(t))[0].double()
        for t in (torch.float64, dtype)
        for leaf in [xd.to(t).requires_grad_()]
    )
    assert_within(strided.double(), eager, truth, torch.finfo(dtype).eps, "dx")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [100, 17000])
def test_weight_of_its_own_dtype(weight_dtype, n, dtype, device):
    x, w = (
        torch.randn(5, n, device=device).to(dtype),
        torch.randn(n, device=device).to(weight_dtype),
    )

    def results(fn, x_dtype, w_dtype):
        leaves = [x.to(x_dtype).requires_grad_(), w.to(w_dtype).requires_grad_()]
        return run(fn, leaves, {"offset": 1.0})

    truth = results(reference.rms_norm, torch.float64, torch.float64)
    eager = results(reference.rms_norm, dtype, weight_dtype)
    ours = results(ops.rms_norm, dtype, weight_dtype)
    # y and dx are rounded to x's dtype, dw to the weight's, and dy was rounded to x's
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    for name, o, e, t in zip(("y", "dx", "dw"), ours, eager, truth, strict=True):
        assert_within(o, e, t, eps, name)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = ops.rms_norm(*leaves)
    assert y.dtype == dtype
    assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [dtype, weight_dtype]


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (2, 0, 5), (0,)], ids=str)
def test_empty(shape, dtype, device):
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(shape[-1], device=device, dtype=dtype, requires_grad=True)
    y = ops.rms_norm(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))


def test_float64_runs_the_reference(device):
    x, w = leaf(3, 10, device=device).double(), leaf(10, device=device).double()
    assert torch.equal(ops.rms_norm(x, w), reference.rms_norm(x, w))
    assert torch.equal(ops.rms_norm(x.float(), w), reference.rms_norm(x.float(), w))


@pytest.mark.parametrize("eps", [None, 1e-5, 0.0])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-18, 1e18])
def test_torchs_eps(eps, scale, dtype, device):
    """eps=None is torch's own; values near it, tiny and huge ones."""
    x = (torch.randn(4, 50, device=device) * scale).to(dtype).requires_grad_()
    if dtype == torch.float16 and scale == 1e18:
        x = torch.randn(4, 50, device=device).mul(1e4).to(dtype).requires_grad_()
    if scale == 1e-18 and dtype != torch.float32:
        eps = eps or None  # zero or subnormal rows: 0 / 0 without an eps
    truth = F.rms_norm(
        x.double(), (50,), None, torch.finfo(torch.float32).eps if eps is None else eps
    )
    eager = F.rms_norm(x, (50,), None, eps)
    ours = ops.rms_norm(x, None, eps)
    assert_within(
        ours.double(), eager.double(), truth, torch.finfo(dtype).eps, f"{eps} {scale} {dtype}"
    )


def test_non_finite(dtype, device):
    x = torch.randn(6, 40, device=device)
    x[1, 3], x[2, 39], x[3, 0] = float("nan"), float("inf"), -float("inf")
    x[4] = 0
    assert_matches_reference(
        ops.rms_norm, reference.rms_norm, x, torch.randn(40, device=device), dtype=dtype
    )


def opcheck_inputs(device, dtype):
    x = torch.randn(6, 5, 80, device=device, dtype=dtype)
    w = torch.randn(80, device=device)
    return [
        (x, w),
        (x, None),
        (x.transpose(0, 1), w.to(dtype)),
        (x[..., ::2], w[::2]),
        (x[:, :1].expand(6, 5, 80), w),
        (x[0, 0], w),
        (x[:0], w),
    ]


def test_opcheck(dtype, device):
    for x, w in opcheck_inputs(device, dtype):
        torch.library.opcheck(fwd, (x, w, 1e-6, 1.0))
        _, rstd = fwd(x, w, 1e-6, 1.0)
        dy = torch.randn_like(x)
        torch.library.opcheck(bwd, (dy, x, w, rstd, 1.0, True))
        torch.library.opcheck(bwd, (dy.expand_as(x), x, w, rstd, 1.0, False))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weight", [True, False])
def test_compiles_fullgraph(dynamic, weight, device):
    torch._dynamo.reset()  # the recompile limit counts the tests before this one
    compiled = torch.compile(ops.rms_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 6):
        x = leaf(m, 3, 32, device=device).transpose(0, 1)
        leaves = [x, leaf(32, device=device)] if weight else [x]
        expected, found = ops.rms_norm(*leaves, offset=1.0), compiled(*leaves, offset=1.0)
        assert torch.equal(found, expected)
        dy = torch.randn_like(expected)
        for f, e in zip(
            torch.autograd.grad(found, leaves, dy),
            torch.autograd.grad(expected, leaves, dy),
            strict=True,
        ):
            assert torch.equal(f, e)
        with torch.no_grad():
            assert torch.equal(compiled(*leaves), ops.rms_norm(*leaves))


def test_autocast_changes_nothing(dtype, device):
    x, w = torch.randn(3, 40, device=device, dtype=dtype), torch.randn(40, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.rms_norm(x, w)
        assert y.dtype == F.rms_norm(x, (40,), w.to(dtype)).dtype == dtype
    assert torch.equal(y, ops.rms_norm(x, w))


def test_repeats_bit_for_bit_and_leaves_inputs_alone(dtype, device):
    x, w = torch.randn(70, 1500, device=device, dtype=dtype), torch.randn(1500, device=device)
    x.requires_grad_(), w.requires_grad_()
    before = [x.detach().clone(), w.detach().clone()]
    dy = torch.randn_like(x)
    dy_before = dy.clone()

    def results():
        y = ops.rms_norm(x, w)
        return [y.detach(), *torch.autograd.grad(y, (x, w), dy)]

    threads = torch.get_num_threads()
    first = results()
    try:
        torch.set_num_threads(1)
        second = results()
        torch.set_num_threads(3)
        third = results()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1]) and torch.equal(dy, dy_before)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(()), None, r"at least one dimension, not torch.float32 \(\)"),
        (torch.ones(3, 4, dtype=torch.int32), None, r"floating point.*int32 \(3, 4\)"),
        (torch.ones(3, 4), torch.ones(3), r"weight shape \(3,\) does not fit x \(3, 4\)"),
        (torch.ones(3, 4), torch.ones(1, 4), r"weight shape \(1, 4\) does not fit x \(3, 4\)"),
        (torch.ones(3, 4), torch.ones(4, dtype=torch.int64), "weight must be .*int64"),
        (torch.ones(3, 4), torch.ones(4, device="meta"), "weight is on meta, x on cpu"),
    ],
)
def test_bad_input(x, weight, message):
    with pytest.raises(ValueError, match=f"rms_norm: .*{message}"):
        ops.rms_norm(x, weight)


def test_operator_refuses_what_does_not_fit():
    if _native.C is None:
        return  # the launchers trust the public function
    x, w = torch.ones(3, 4), torch.ones(4)
    _, rstd = fwd(x, w, 1e-6, 0.0)
    for arguments in [
        (x[:2], x, w, rstd, 0.0, True),
        (x.bfloat16(), x, w, rstd, 0.0, True),
        (x, x, w[:3], rstd, 0.0, True),
        (x, x, w, rstd[:2], 0.0, True),
        (x, x, w, rstd.double(), 0.0, True),
    ]:
        with pytest.raises(ValueError, match="rms_norm: "):
            bwd(*arguments)


@pytest.mark.parametrize("shape", [16, (16,), [4, 16]], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_module_is_drop_in(shape, affine, eps, dtype, device):
    ours = nn.RMSNorm(shape, eps, affine, device=device, dtype=dtype)
    theirs = torch.nn.RMSNorm(shape, eps, affine, device=device, dtype=dtype)
    assert isinstance(ours, torch.nn.RMSNorm) and repr(ours) == repr(theirs)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    if affine:
        torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 16, device=device, dtype=dtype)
    wide = (
        torch.nn.RMSNorm(shape, eps or torch.finfo(torch.float32).eps, affine).to(device).double()
    )
    wide.load_state_dict(theirs.state_dict())
    assert_within(
        ours(x).double(), theirs(x).double(), wide(x.double()), torch.finfo(dtype).eps, "module"
    )


def test_module_with_offset(device):
    module = nn.RMSNorm(16, offset=1.0, device=device)
    assert torch.equal(module.weight, torch.zeros_like(module.weight))
    assert "offset=1.0" in repr(module)
    x = torch.randn(3, 16, device=device)
    assert torch.equal(module(x), ops.rms_norm(x, module.weight, offset=1.0))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(16,), (2, 16)], ids=str)
def test_module_refuses_another_shape(affine, shape):
    with pytest.raises(ValueError, match="does not"):
        nn.RMSNorm(shape, elementwise_affine=affine)(torch.ones(3, 2, 15))
