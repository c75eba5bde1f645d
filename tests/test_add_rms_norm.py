import pytest
import torch

from tilewright import _native, nn, ops, reference
from tilewright.testing import assert_matches_reference, assert_within

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
    "batch_transposed": ((5, 2, 40), lambda x: x.transpose(0, 1)),
    "three_row_strides": ((3, 4, 5, 2, 16), lambda x: x.permute(2, 1, 0, 3, 4)[..., 0, :]),
    "columns_strided": ((4, 66), lambda x: x[:, ::2]),
    "rows_expanded": ((1, 40), lambda x: x.expand(5, 40)),
    "all_expanded": ((1, 1), lambda x: x.expand(5, 40)),
}

fwd = torch.ops.tilewright.add_rms_norm_fwd.default
bwd = torch.ops.tilewright.add_rms_norm_bwd.default


def leaf(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    x, r, w = (leaf(*s, device=device) for s in (shape, shape, shape[-1:]))
    # with torch's eps the dx of a single column is what cancellation leaves of zero
    eps = 0.1 if shape[-1] == 1 else None
    assert_matches_reference(
        ops.add_rms_norm, reference.add_rms_norm, x, r, w, dtype=dtype, eps=eps
    )


@pytest.mark.parametrize("shape", [(9, 100), (2, 17000)], ids=str)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("kwargs", [{"offset": 1.0}, {"eps": 1e-5}, {"eps": 0.3, "offset": -0.5}])
def test_options(shape, weight, kwargs, dtype, device):
    x, r = leaf(*shape, device=device), leaf(*shape, device=device)
    w = leaf(shape[-1], device=device) if weight else None
    assert_matches_reference(
        ops.add_rms_norm, reference.add_rms_norm, x, r, w, dtype=dtype, **kwargs
    )


@pytest.mark.parametrize("frozen", ["x", "residual", "weight", "x and weight"])
def test_frozen_input(frozen, dtype, device):
    x, r, w = (leaf(*s, device=device) for s in ((4, 100), (4, 100), (100,)))
    for name, t in (("x", x), ("residual", r), ("weight", w)):
        t.requires_grad_(name not in frozen)
    assert_matches_reference(ops.add_rms_norm, reference.add_rms_norm, x, r, w, dtype=dtype)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_used(output, dtype, device):
    x, r, w = (leaf(*s, device=device) for s in ((4, 100), (4, 100), (100,)))
    assert_matches_reference(
        lambda *args: ops.add_rms_norm(*args)[output] + 0 * args[2],
        lambda *args: reference.add_rms_norm(*args)[output] + 0 * args[2],
        x,
        r,
        w,
        dtype=dtype,
    )


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["x", "residual"])
def test_strides(view, which, dtype, device):
    shape, of = VIEWS[view]
    strided = leaf(*shape, device=device)
    packed = leaf(*of(strided).shape, device=device)
    w = leaf(2 * packed.shape[-1], device=device)

    def call(op):
        def fn(strided, packed, w):
            pair = (of(strided), packed) if which == "x" else (packed, of(strided))
            return op(*pair, w[::2])

        return fn

    assert_matches_reference(
        call(ops.add_rms_norm), call(reference.add_rms_norm), strided, packed, w, dtype=dtype
    )


@pytest.mark.parametrize("view", VIEWS)
def test_strided_output_gradients(view, dtype, device):
    shape, of = VIEWS[view]
    dy, dh = (of(torch.randn(shape, device=device, dtype=dtype)) for _ in range(2))
    h = torch.randn(dy.shape, device=device, dtype=dtype)
    w = torch.randn(h.shape[-1], device=device)
    rstd = (h.float().square().mean(-1) + 0.1).rsqrt()
    strided = bwd(dy, dh, h, w, rstd, 0.0, True)

    def grads(t: torch.dtype):
        leaves = [h.to(t).requires_grad_(), w.to(t).requires_grad_()]
        y, same = reference.add_rms_norm(leaves[0], torch.zeros_like(leaves[0]), leaves[1], eps=0.1)
        return torch.autograd.grad((y, same), leaves, (dy.to(t), dh.to(t)))

    for name, found, eager, truth in zip(
        "hw", strided, grads(dtype), grads(torch.float64), strict=True
    ):
        eps = torch.finfo(found.dtype).eps
        assert_within(found.double(), eager.double(), truth.double(), eps, name)


def test_y_is_rms_norm_of_the_sum_as_rounded(dtype, device):
    x, r = (torch.randn(6, 700, device=device, dtype=dtype) for _ in range(2))
    w = torch.randn(700, device=device)
    y, h = ops.add_rms_norm(x, r, w, offset=1.0)
    assert torch.equal(y, ops.rms_norm(h, w, offset=1.0))
    assert torch.equal(h, x + r)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_wider_residual(wide, device):
    """A bfloat16 branch joins a float32 stream, as under autocast: the sum's dtype is torch's."""
    x = torch.randn(4, 50, device=device, dtype=torch.bfloat16, requires_grad=True)
    r = torch.randn(4, 50, device=device, dtype=wide, requires_grad=True)
    w = torch.randn(50, device=device)
    y, h = ops.add_rms_norm(x, r, w)
    assert y.dtype == h.dtype == wide and torch.equal(h, x + r)
    assert torch.equal(y, ops.rms_norm(h, w))
    dx, dr = torch.autograd.grad((y, h), (x, r), (torch.randn_like(y), torch.randn_like(h)))
    assert (dx.dtype, dr.dtype) == (x.dtype, r.dtype) and torch.equal(dx, dr.to(x.dtype))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (2, 0, 5), (0,)], ids=str)
def test_empty(shape, dtype, device):
    x, r, w = (
        torch.randn(s, device=device, dtype=dtype, requires_grad=True)
        for s in (shape, shape, shape[-1:])
    )
    y, h = ops.add_rms_norm(x, r, w)
    dx, dr, dw = torch.autograd.grad((y, h), (x, r, w), (torch.ones_like(y), torch.ones_like(h)))
    assert y.shape == h.shape == dx.shape == dr.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))


def test_non_finite(dtype, device):
    x = torch.randn(6, 40, device=device)
    x[1, 3], x[2, 39], x[3, 0] = float("nan"), float("inf"), -float("inf")
    r = torch.where(torch.arange(6, device=device)[:, None] == 4, -x, torch.randn_like(x))
    assert_matches_reference(ops.add_rms_norm, reference.add_rms_norm, x, r, None, dtype=dtype)


def test_opcheck(dtype, device):
    x, r = (torch.randn(6, 5, 80, device=device, dtype=dtype) for _ in range(2))
    w = torch.randn(80, device=device)
    for args in [
        (x, r, w),
        (x, r, None),
        (x.transpose(0, 1), r.transpose(0, 1), w.to(dtype)),
        (x[..., ::2], r[..., :40], w[::2]),
        (x[:, :1].expand(6, 5, 80), r, w),
        (x[:0], r[:0], w),
    ]:
        torch.library.opcheck(fwd, (*args, 1e-6, 1.0))
        _, h, rstd = fwd(*args, 1e-6, 1.0)
        dy = torch.randn_like(args[0])
        torch.library.opcheck(bwd, (dy, args[0], h, args[2], rstd, 1.0, True))
        torch.library.opcheck(bwd, (dy, args[1], h, args[2], rstd, 1.0, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    torch._dynamo.reset()  # the recompile limit counts the tests before this one
    compiled = torch.compile(ops.add_rms_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 6):
        x, r = leaf(m, 3, 32, device=device), leaf(3, m, 32, device=device).transpose(0, 1)
        leaves = [x, r, leaf(32, device=device)]
        expected, found = ops.add_rms_norm(*leaves), compiled(*leaves)
        douts = [torch.randn_like(t) for t in expected]
        for f, e in zip(
            (*found, *torch.autograd.grad(found, leaves, douts)),
            (*expected, *torch.autograd.grad(expected, leaves, douts)),
            strict=True,
        ):
            assert torch.equal(f, e)
        with torch.no_grad():
            assert torch.equal(compiled(*leaves)[0], expected[0])


def test_autocast_changes_nothing(dtype, device):
    x, w = torch.randn(3, 40, device=device, dtype=dtype), torch.randn(40, device=device)
    r = torch.randn(3, 40, device=device)
    with torch.autocast(device, torch.bfloat16):
        found, twin = ops.add_rms_norm(x, r, w), reference.add_rms_norm(x, r, w)
    for f, e, t in zip(found, ops.add_rms_norm(x, r, w), twin, strict=True):
        assert torch.equal(f, e) and f.dtype == t.dtype


def test_repeats_bit_for_bit_and_leaves_inputs_alone(dtype, device):
    x, r = (torch.randn(70, 1500, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    w = torch.randn(1500, device=device, requires_grad=True)
    before = [t.detach().clone() for t in (x, r, w)]
    douts = [torch.randn_like(x) for _ in range(2)]

    def results():
        y, h = ops.add_rms_norm(x, r, w)
        return [y.detach(), h.detach(), *torch.autograd.grad((y, h), (x, r, w), douts)]

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
    assert all(torch.equal(t, b) for t, b in zip((x, r, w), before, strict=True))


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        (torch.ones(()), torch.ones(()), None, "at least one dimension"),
        (torch.ones(3, 4).int(), torch.ones(3, 4), None, "floating point.*int32"),
        (torch.ones(3, 4), torch.ones(4), None, r"residual shape \(4,\) does not fit x \(3, 4\)"),
        (torch.ones(3, 4), torch.ones(3, 4).int(), None, "residual must be .*int32"),
        (torch.ones(3, 4), torch.ones(3, 4, device="meta"), None, "residual is on meta, x on cpu"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(3), r"weight shape \(3,\) does not fit"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(4).int(), "weight must be .*int32"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, device="meta"), "weight is on meta"),
    ],
)
def test_bad_input(x, residual, weight, message):
    with pytest.raises(ValueError, match=f"add_rms_norm: .*{message}"):
        ops.add_rms_norm(x, residual, weight)


def test_operator_refuses_what_does_not_fit():
    if _native.C is None:
        return  # the launchers trust the public function
    x, w, rstd = torch.ones(3, 4), torch.ones(4), torch.ones(3)
    for residual in (x[:2], x.bfloat16()):
        with pytest.raises(ValueError, match="add_rms_norm: residual"):
            fwd(x, residual, w, 1e-6, 0.0)
        with pytest.raises(ValueError, match="add_rms_norm: dresidual"):
            bwd(x, residual, x, w, rstd, 0.0, True)


@pytest.mark.parametrize("shape", [16, (4, 16)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_module(shape, affine, device):
    module = nn.AddRMSNorm(shape, 1e-5, affine, device=device)
    norm = nn.RMSNorm(shape, 1e-5, affine, device=device)
    if affine:
        torch.nn.init.normal_(norm.weight)
    module.load_state_dict(norm.state_dict())
    x, r = (torch.randn(3, 4, 16, device=device) for _ in range(2))
    y, h = module(x, r)
    assert torch.equal(h, x + r) and torch.equal(y, norm(h))
    with pytest.raises(ValueError, match="AddRMSNorm: x"):
        module(x[..., :15], r[..., :15])
