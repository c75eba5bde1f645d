"""The interpreter tells the truth: kernels that commit each fault, and numbers against torch's."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def interpreter():
    from tilewright.lab import interpreter as lab

    lab.install()
    return lab


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK:
        tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N), mask=i < N)
    else:
        tl.store(y_ptr + i, tl.load(x_ptr + i), mask=i < N)


@triton.jit
def _store_past_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK) - 2, tl.zeros((BLOCK,), tl.float32))


@triton.jit
def _wrap_kernel(x_ptr, y_ptr, stride):
    row = tl.program_id(0) + 3
    tl.store(y_ptr, tl.load(x_ptr + row * stride))  # int32: 3 * 2^30 wraps


@triton.jit
def _everyone_stores_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32))


@triton.jit
def _neighbour_kernel(x_ptr, N):
    pid = tl.program_id(0)
    tl.store(x_ptr + pid, tl.load(x_ptr + (pid + 1) % N) + 1)


@triton.jit
def _count_kernel(x_ptr, ATOMIC: tl.constexpr):
    if ATOMIC or tl.program_id(0) > 0:
        tl.atomic_add(x_ptr, 1)
    else:
        tl.store(x_ptr, 1)


@triton.jit
def _order_kernel(order_ptr, next_ptr):
    pid = tl.program_id(0)
    tl.store(order_ptr + tl.atomic_add(next_ptr, 1), pid)


def fault(lab, text: str, launch) -> str:
    with pytest.raises(lab.KernelFault, match=text) as caught:
        launch()
    return str(caught.value)


def test_a_load_past_the_end(interpreter):
    x, y = torch.randn(10), torch.zeros(10)
    _copy_kernel[(2,)](x, y, 10, BLOCK=8, MASK=True)
    assert torch.equal(x, y)
    told = fault(
        interpreter, "load out of bounds",
        lambda: _copy_kernel[(2,)](x, y, 10, BLOCK=8, MASK=False),
    )  # fmt: skip
    assert "_copy_kernel, program (1, 0, 0)" in told
    assert "argument x_ptr, element 10: byte 40 of a storage of 40" in told


@triton.jit
def _scalar_mask_kernel(y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    tl.store(y_ptr + row * BLOCK + i, i, mask=(i < BLOCK - 1) & (row < N))


def test_a_mask_that_a_scalar_takes_part_in(interpreter):
    """It comes as integers: where it is 0 nothing is touched, where 1 each its own place."""
    y = torch.zeros(2, 8, dtype=torch.int32)
    with interpreter.recording() as launches:
        _scalar_mask_kernel[(3,)](y, 2, BLOCK=8)
    assert launches[0].bytes_stored == launches[0].distinct_bytes_stored == 2 * 7 * 4
    assert torch.equal(y[:, :7], torch.arange(7, dtype=torch.int32).expand(2, 7))


def test_a_store_before_the_start(interpreter):
    told = fault(
        interpreter,
        "store out of bounds",
        lambda: _store_past_kernel[(1,)](torch.zeros(8), BLOCK=8),
    )
    assert "argument y_ptr, element -2" in told


def test_an_address_in_another_arguments_storage(interpreter):
    both = torch.zeros(64)
    x, y = both.clone(), both.clone()
    gap = (y.data_ptr() - x.data_ptr()) // 4

    def launch():
        _far_kernel[(1,)](x, y, gap)

    assert "argument x_ptr" in fault(interpreter, "load out of bounds", launch)


@triton.jit
def _far_kernel(x_ptr, y_ptr, gap):
    tl.store(y_ptr, tl.load(x_ptr + gap))


def test_an_offset_that_wraps_int32(interpreter):
    x, y = torch.zeros(8), torch.zeros(1)
    told = fault(interpreter, "out of bounds", lambda: _wrap_kernel[(1,)](x, y, 2**30))
    assert "element -1073741824" in told


def test_views_may_use_all_of_their_storage():
    x, y = torch.arange(20.0), torch.zeros(20)
    _copy_kernel[(1,)](x[4:], y[4:], 16, BLOCK=16, MASK=False)
    assert torch.equal(y[4:], x[4:])


def test_memory_nobody_wrote(interpreter):
    with interpreter.watching():
        x, y = torch.empty(8), torch.empty(8)
        written = torch.empty(8).normal_()
    told = fault(
        interpreter, "load of memory nobody has written",
        lambda: _copy_kernel[(1,)](x, y, 8, BLOCK=8, MASK=True),
    )  # fmt: skip
    assert "argument x_ptr, element 0" in told
    _copy_kernel[(1,)](written, y, 8, BLOCK=8, MASK=True)  # torch wrote it
    _copy_kernel[(1,)](y, written, 8, BLOCK=8, MASK=True)  # a kernel wrote it


def test_part_of_it_written(interpreter):
    with interpreter.watching():
        y = torch.empty(8)
    _copy_kernel[(1,)](torch.zeros(8), y, 5, BLOCK=8, MASK=True)
    _copy_kernel[(1,)](y, torch.zeros(8), 5, BLOCK=8, MASK=True)
    told = fault(
        interpreter, "nobody", lambda: _copy_kernel[(1,)](y, torch.zeros(8), 6, BLOCK=8, MASK=True)
    )
    assert "element 5" in told


def test_two_programs_store_to_one_address(interpreter):
    told = fault(
        interpreter, "race: stores where program",
        lambda: _everyone_stores_kernel[(2,)](torch.zeros(4), BLOCK=4),
    )  # fmt: skip
    assert "argument y_ptr, element 0" in told
    _everyone_stores_kernel[(1,)](torch.zeros(4), BLOCK=4)


def test_a_program_loads_what_another_stores(interpreter):
    for number in range(4):  # found whichever comes first
        with interpreter.seed(number):
            fault(interpreter, "race", lambda: _neighbour_kernel[(5,)](torch.zeros(5), 5))


def test_atomics_are_no_race_but_mixing_them_is(interpreter):
    x = torch.zeros(1, dtype=torch.int32)
    with interpreter.recording() as launches:
        _count_kernel[(7,)](x, ATOMIC=True)
    assert x.item() == 7 and launches[0].atomics == 7
    fault(interpreter, "race", lambda: _count_kernel[(7,)](x, ATOMIC=False))


def test_the_order_is_a_seeds(interpreter):
    def order(number):
        out = torch.zeros(50, dtype=torch.int32)
        with interpreter.seed(number):
            _order_kernel[(50,)](out, torch.zeros(1, dtype=torch.int32))
        return out.tolist()

    assert order(None) == list(range(50))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(50)) != order(1)


def test_traffic(interpreter):
    x, y = torch.randn(100), torch.zeros(100)
    with interpreter.recording() as launches:
        _copy_kernel[(4,)](x, y, 100, BLOCK=32, MASK=True)
        _read_twice_kernel[(1,)](x.to(torch.float16), y, BLOCK=64)
    copy, twice = launches
    assert (copy.kernel, copy.grid) == ("_copy_kernel", (4, 1, 1))
    assert (copy.bytes_loaded, copy.bytes_stored) == (400, 400)
    assert (copy.distinct_bytes_loaded, copy.distinct_bytes_stored) == (400, 400)
    assert (twice.bytes_loaded, twice.distinct_bytes_loaded) == (256, 128)
    assert (twice.bytes_stored, twice.distinct_bytes_stored) == (256, 256)
    assert twice.arguments["x_ptr"]["loaded"] == 256


@triton.jit
def _read_twice_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.load(x_ptr + i).to(tl.float32) + tl.load(x_ptr + BLOCK - 1 - i)
    tl.store(y_ptr + i, total)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = (x / y).to(x.dtype)
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "scale":
        z = x * 1.7
    elif OP == "where":
        z = tl.where(x > y, x, y - 1.0)
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "neg":
        z = -x
    tl.store(out_ptr + i, z)


BF16 = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "max": torch.maximum,
    "scale": lambda x, y: x * torch.tensor(1.7, dtype=torch.bfloat16),
    "where": lambda x, y: torch.where(x > y, x, y - 1.0),
    "abs": lambda x, y: x.abs(),
    "neg": lambda x, y: -x,
}


@pytest.mark.parametrize("op", BF16)
def test_bfloat16_arithmetic_is_torchs(op):
    x, y = torch.randn(2, 512).mul(30).to(torch.bfloat16)
    out = torch.zeros_like(x)
    _arithmetic_kernel[(1,)](x, y, out, OP=op, N=512)
    assert torch.equal(out, BF16[op](x, y))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


SPECIAL = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.0e38, 3.4e38, 1e-40, 9.2e-41, float("inf")]


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_casts_are_torchs(source, target):
    x = torch.cat((torch.randn(500), torch.tensor(SPECIAL), torch.tensor([float("-inf"), 2.5])))
    x = (x * 100 if source == torch.int32 else x).nan_to_num(7) if source == torch.int32 else x
    x = x.clamp(-1e9, 1e9).to(source) if source == torch.int32 else x.to(source)
    out = torch.zeros(512, dtype=target)
    _cast_kernel[(1,)](x, out, N=512)
    assert torch.equal(out, x.to(target))
    if source.is_floating_point:
        nan = torch.full((4,), float("nan"), dtype=source)
        out = torch.zeros(4, dtype=target)
        _cast_kernel[(1,)](nan, out, N=4)
        assert out.isnan().all()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_casts_round_and_saturate(kind):
    x = torch.cat((torch.randn(500) * 20, torch.tensor([1e6, -1e6, 0.0, 2.0**-9, 2.0**-10, 448.0])))
    x = torch.cat((x, torch.zeros(6)))
    bits = torch.zeros(512, dtype=torch.uint8)
    _cast_kernel[(1,)](x, bits.view(kind), N=512)
    most = torch.finfo(kind).max
    assert torch.equal(bits, x.clamp(-most, most).to(kind).view(torch.uint8))
    back = torch.zeros(512)
    _cast_kernel[(1,)](bits.view(kind), back, N=512)
    assert torch.equal(back, bits.view(kind).float())


@triton.jit
def _reduce_kernel(x_ptr, sum_ptr, max_ptr, scan_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + m * N + n)
    tl.store(sum_ptr + tl.arange(0, M), tl.sum(x, axis=1).to(tl.float32))
    tl.store(max_ptr + tl.arange(0, M), tl.max(x, axis=1).to(tl.float32))
    tl.store(scan_ptr + m * N + n, tl.cumsum(x, axis=1).to(tl.float32))


def test_bfloat16_reductions():
    x = torch.randn(4, 64).to(torch.bfloat16)
    total, largest, scan = torch.zeros(4), torch.zeros(4), torch.zeros(4, 64)
    _reduce_kernel[(1,)](x, total, largest, scan, M=4, N=64)
    torch.testing.assert_close(total, x.float().sum(1), rtol=2**-8, atol=2**-5)
    assert torch.equal(largest, x.float().amax(1))
    torch.testing.assert_close(scan, x.float().cumsum(1), rtol=2**-8, atol=2**-5)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    a, b = tl.load(a_ptr + i * 16 + j), tl.load(b_ptr + i * 16 + j)
    tl.store(c_ptr + i * 16 + j, tl.dot(a, b, input_precision=PRECISION))


def test_dot_in_bfloat16_and_its_flops(interpreter):
    a, b, c = torch.randn(2, 16, 16).to(torch.bfloat16).unbind() + (torch.zeros(16, 16),)
    with interpreter.recording() as launches:
        _dot_kernel[(1,)](a, b, c, PRECISION="ieee")
    torch.testing.assert_close(c, a.float() @ b.float())
    assert launches[0].dot_flops == 2 * 16**3


def test_dot_rounds_to_tf32_where_asked():
    a, b, c = torch.randn(2, 16, 16).unbind() + (torch.zeros(16, 16),)
    _dot_kernel[(1,)](a, b, c, PRECISION="ieee")
    torch.testing.assert_close(c, a @ b)
    exact = c.clone()
    _dot_kernel[(1,)](a, b, c, PRECISION="tf32")
    error = (c - exact).abs().max().item()
    assert 1e-5 < error < 1e-2  # 2^-11 of numbers near one


def test_products_do_not_depend_on_the_tile():
    """A BLAS's own may: another microkernel serves the rows and columns that a whole one leaves."""
    from tilewright.lab.interpreter import _product

    a, b = torch.randn(61, 130).numpy(), torch.randn(130, 67).numpy()
    whole = _product(a, b, a.dtype)
    assert whole.dtype == a.dtype
    for rows, columns in ((1, 67), (16, 16), (61, 5), (7, 33)):
        assert (_product(a[:rows], b[:, :columns], a.dtype) == whole[:rows, :columns]).all()


@triton.jit
def _extremes_kernel(x_ptr, y_ptr, high_ptr, low_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(high_ptr + i, tl.maximum(x, y))
    tl.store(low_ptr + i, tl.minimum(x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maximum_and_minimum_lose_nan(dtype):
    nan = float("nan")
    x, y = (torch.tensor(v, dtype=dtype) for v in ([nan, 1.0, nan, -2.0], [3.0, nan, nan, 5.0]))
    high, low = torch.empty_like(x), torch.empty_like(x)
    _extremes_kernel[(1,)](x, y, high, low, BLOCK=4)
    assert torch.equal(high.nan_to_num(7), torch.tensor([3.0, 1.0, 7.0, 5.0], dtype=dtype))
    assert torch.equal(low.nan_to_num(7), torch.tensor([3.0, 1.0, 7.0, -2.0], dtype=dtype))


def test_one_block_type_of_a_kind():
    """lab/_quick.py: equal types are one, unequal ones stay apart, and what upstream refuses is refused."""
    one, same = tl.block_type(tl.float32, [4, tl.constexpr(8)]), tl.block_type(tl.float32, [4, 8])
    pointer = tl.block_type(tl.pointer_type(tl.float32), [4, 8])
    elsewhere = tl.block_type(tl.pointer_type(tl.float32, 3), [4, 8])
    others = [
        tl.block_type(tl.float32, [8, 4]),
        tl.block_type(tl.int32, [4, 8]),
        pointer,
        elsewhere,
    ]
    assert one is same and all(one != other for other in others) and pointer != elsewhere
    assert [int(size) for size in tl.tensor(None, one).shape] == [4, 8]
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [3])
