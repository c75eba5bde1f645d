"""The Triton launchers of quant_linear against QuantTensor.dequantize: on a GPU or interpreted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tilewright.bench import harness
from tilewright.testing import assert_within

pytest.importorskip("triton")
pytestmark = pytest.mark.triton
launches = harness.load(Path(__file__).with_name("quant_launches.py"))
INTERPRET, DEVICE, DTYPES, KINDS = (
    launches.INTERPRET,
    launches.DEVICE,
    launches.DTYPES,
    launches.KINDS,
)
weight, launch, launch_dgrad = launches.weight, launches.launch, launches.launch_dgrad
expected, kernels = launches.expected, launches.kernels
# (M, N, K, G): one row and, of float32, eight (GEMV), then the tiled kernel, and two; groups that fill a
# tile, that are several tiles, that are no multiple of 32, and that are the row; odd N; several steps of each walk
SHAPES = [
    (1, 1, 2, 1),
    (1, 19, 2112, 33),
    (3, 33, 576, 18),
    (5, 7, 96, 4),
    (8, 20, 100, 1),
    (9, 70, 256, 2),
    (17, 65, 100, 1),
    (33, 130, 192, 4),
    (40, 31, 288, 3),
    (130, 67, 128, 4),
    (2, 21, 320, 5),
]


def rounded(x: Tensor, group: int) -> Tensor:
    """What "int8" activations stand for, in float32: one block a loop, to share no trick."""
    width = 32 if group % 32 == 0 else group
    blocks = []
    for block in x.float().split(width, dim=1):
        # by a tensor: a GPU divides by a number as it multiplies with its inverse
        scale = block.abs().amax(dim=1, keepdim=True) / torch.tensor(127.0, device=x.device)
        codes = torch.where(scale > 0, block / scale, 0.0).round()
        blocks.append(codes * scale)
    return torch.cat(blocks, dim=1)


def turn(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """A kind and a scale dtype for each case: every shape meets all three over the dtypes."""
    return (SHAPES.index(shape) + DTYPES.index(dtype)) % 3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, bits, dtype):
    M, N, K, G = shape
    i = turn(shape, dtype)
    w = weight(N, K, G, bits, KINDS[i], DTYPES[i])
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    bias = torch.randn(N, device=DEVICE).to(dtype) if i else None
    y = launch(x, w, bias)
    assert y.dtype == dtype and y.shape == (M, N) and y.is_contiguous()
    eps = torch.finfo(dtype).eps
    truth = expected(x, w, bias, torch.float64)
    assert_within(y.double(), expected(x, w, bias, dtype), truth, eps, KINDS[i])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad(shape, bits, dtype):
    M, N, K, G = shape
    i = turn(shape, dtype)
    w = weight(N, K, G, bits, KINDS[i], DTYPES[i])
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    dx = launch_dgrad(dy, w)
    assert dx.dtype == dtype and dx.shape == (M, K) and dx.is_contiguous()
    truth = dy.double() @ w.dequantize(torch.float64)
    eager = (dy @ w.dequantize(dtype)).double()
    assert_within(dx.double(), eager, truth, torch.finfo(dtype).eps, KINDS[i])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES[2:7], ids=str)
def test_int8_activations(shape, bits, dtype):
    M, N, K, G = shape
    w = weight(N, K, G, bits, "zeros")
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    x[:, : K // 2] *= 20  # neighbouring blocks of unlike scale
    x[0, : min(K, 32)] = 0  # a block with no scale
    y = launch(x, w, None, "int8")
    x_rounded = rounded(x, w.group)
    truth = expected(x_rounded, w, None, torch.float64)
    eager = expected(x_rounded, w, None, torch.float32).to(dtype).double()
    assert y.dtype == dtype
    assert_within(y.double(), eager, truth, torch.finfo(dtype).eps, "int8")


def test_int8_codes_match_bit_for_bit():
    x = torch.randn(5, 256, device=DEVICE) * 10
    x[:, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # ties go to even
    x[:, 4:32] = 0
    assert torch.equal(kernels()._round_activations(x, 64), rounded(x, 64))
    wide = torch.randn(2, 2500, device=DEVICE)  # a block of several chunks
    assert torch.equal(kernels()._round_activations(wide, 2500), rounded(wide, 2500))


@pytest.mark.parametrize("M", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_rows_read_the_weight_exactly(M, bits, kind):
    w = weight(9, 64, 2, bits, kind, torch.float32)
    eye = torch.eye(64, device=DEVICE)
    y = torch.cat([launch(rows, w) for rows in eye.split(M)])
    dequantised = w.dequantize().T
    if kind == "minima" or not INTERPRET:  # a fused multiply-add, or three TF32 products
        assert_within(y.double(), dequantised.double(), w.dequantize(torch.float64).T, 2**-23, kind)
    else:
        assert torch.equal(y, dequantised)


@pytest.mark.parametrize("M", [2, 12])
def test_strided_inputs(M):
    w = weight(24, 128, 2, 4, "zeros")
    x = torch.randn(M, 300, device=DEVICE)
    assert torch.equal(launch(x[:, 7:135], w), launch(x[:, 7:135].contiguous(), w))
    assert torch.equal(launch(x[:, 7:263:2], w), launch(x[:, 7:263:2].contiguous(), w))
    one = x[:1, :128]
    assert torch.equal(launch(one.expand(M, 128), w), launch(one.repeat(M, 1), w))
    dy = torch.randn(24, M, device=DEVICE).T
    assert torch.equal(launch_dgrad(dy, w), launch_dgrad(dy.contiguous(), w))


@pytest.mark.parametrize("M", [8, 9])
def test_repeats_bit_for_bit_and_mutates_nothing(M):
    w = weight(40, 256, 4, 4, "minima")
    x = torch.randn(M, 256, device=DEVICE)
    before = [t.clone() for t in (x, w.qweight, w.scales, w.minima)]
    assert torch.equal(launch(x, w), launch(x, w))
    assert torch.equal(launch(x, w, None, "int8"), launch(x, w, None, "int8"))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (x, w.qweight, w.scales, w.minima), strict=True)
    )


@pytest.mark.parametrize("M", [1, 20])
def test_nan_stays_in_its_row(M):
    w = weight(5, 96, 3, 4, "symmetric")
    x = torch.randn(M, 96, device=DEVICE)
    x[0, 95] = float("nan")
    y = launch(x, w)
    assert y[0].isnan().all() and not y[1:].isnan().any()


def test_empty():
    w = weight(6, 64, 2, 4, "zeros")
    assert launch(torch.empty(0, 64, device=DEVICE), w).shape == (0, 6)
    assert launch_dgrad(torch.empty(0, 6, device=DEVICE), w).shape == (0, 64)
