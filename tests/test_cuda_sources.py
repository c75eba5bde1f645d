"""csrc/cuda/*.cuh, which is also host code, gives the weight's product on a CPU: a thread for each of a
block's, barriers and all but its PTX.  test_compile.py holds what nvcc makes of the sources."""

import ctypes
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tilewright.quant_tensor import QuantTensor, pack_int4
from tilewright.testing import assert_within

CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
NVCC = shutil.which("nvcc")
FLAGS = ["-O3", "-Werror", "all-warnings"]


def nvcc(*args: str) -> str:
    done = subprocess.run([str(NVCC), *FLAGS, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_device_code_includes_no_torch():
    for path in (*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h")):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path.name


HOST = r"""
#include <array>
#include <barrier>
#include <thread>
#include <vector>

#include "quant_linear.cuh"
using namespace tilewright::cuda;

// 32 lanes that meet to multiply: the layouts of mma.m16n8k16 in the PTX manual, told element by element.
struct Warp {
  std::barrier<> meet{32};
  std::array<std::array<uint32_t, 4>, 32> a;
  std::array<std::array<uint32_t, 2>, 32> b;
};

template <typename T>
static float half_of(uint32_t word, int i) {
  const float2 f = Pair<T>::floats(word);
  return i ? f.y : f.x;
}

struct Cpu {
  int thread_, block_, warps_;
  float* sums;
  Warp* warp;
  std::barrier<>* all;
  int thread() const { return thread_; }
  int block() const { return block_; }
  int warps() const { return warps_; }
  float* shared() const { return sums; }
  void sync() const { all->arrive_and_wait(); }
  template <typename T>
  void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    const int lane = thread_ % 32;
    for (int i = 0; i < 4; ++i) warp->a[lane][i] = a[i];
    for (int i = 0; i < 2; ++i) warp->b[lane][i] = b[i];
    warp->meet.arrive_and_wait();
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = warp->a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
        const uint32_t right = warp->b[col * 4 + k % 8 / 2][k / 8];
        c[i] += half_of<T>(left, k % 2) * half_of<T>(right, k % 2);
      }
    }
    warp->meet.arrive_and_wait();
  }
};

template <typename T, int NT, bool WIDE, bool OFFSET>
static void blocks(const Int4Rows& a, int warps) {
  for (int block = 0; block * FEATURES < a.N; ++block) {
    std::vector<float> sums(warps * FEATURES * 8 * NT);
    std::vector<Warp> of(warps);
    std::barrier<> all(32 * warps);
    std::vector<std::thread> lanes;
    for (int i = 0; i < 32 * warps; ++i)
      lanes.emplace_back([&, i] {
        int4_rows<T, NT, WIDE, OFFSET>(Cpu{i, block, warps, sums.data(), &of[i / 32], &all}, a);
      });
    for (auto& lane : lanes) lane.join();
  }
}

template <typename T, int NT, bool WIDE>
static void offsets(const Int4Rows& a, int warps) {
  a.offset ? blocks<T, NT, WIDE, true>(a, warps) : blocks<T, NT, WIDE, false>(a, warps);
}

template <typename T>
static void rows(const Int4Rows& a, int warps) {
  const bool wide = a.group % COLUMNS == 0;
  if (a.M <= 8) wide ? offsets<T, 1, true>(a, warps) : offsets<T, 1, false>(a, warps);
  else wide ? offsets<T, 2, true>(a, warps) : offsets<T, 2, false>(a, warps);
}

extern "C" void rows_on_host(const void* x, const uint8_t* q, const void* s, const void* o, const void* bias, void* y,
                             int64_t M, int64_t N, int64_t K, int64_t G, int kind, int scale_kind, int minimum,
                             int warps) {
  Int4Rows a{};
  a.x = x, a.qweight = q, a.scales = s, a.offset = o, a.bias = bias, a.y = y;
  a.N = N, a.K = K, a.G = G, a.group = K / G, a.M = static_cast<int>(M);
  a.of_group = Divisor::of(a.group / 32);
  a.kind = static_cast<Float>(kind), a.scale_kind = static_cast<Float>(scale_kind), a.offset_is_minimum = minimum;
  a.kind == Float::BF16 ? rows<__nv_bfloat16>(a, warps) : rows<__half>(a, warps);
}

extern "C" uint32_t divided(uint32_t n, uint32_t d) { return quotient(n, Divisor::of(d)); }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if NVCC is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cu").write_text(HOST)
    nvcc("-std=c++20", "-Xcompiler", "-fPIC", "-shared", "-arch=sm_80", f"-I{CUDA}", "-o",
         str(folder / "host.so"), str(folder / "host.cu"))  # fmt: skip
    return ctypes.CDLL(str(folder / "host.so"))


def at(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def on_host(host: ctypes.CDLL, x: torch.Tensor, w: QuantTensor, bias=None, warps=2) -> torch.Tensor:
    """What the kernel makes of it, a thread of this machine for each of its own."""
    number = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    offset = w.zeros if w.minima is None else w.minima
    (M, K), (N, G) = x.shape, w.scales.shape
    y = torch.full((M, N), torch.nan, dtype=x.dtype)
    sizes = [ctypes.c_int64(i) for i in (M, N, K, G)]
    host.rows_on_host(
        at(x), at(w.qweight), at(w.scales), at(offset), at(bias), at(y), *sizes,
        number[x.dtype], number[w.scales.dtype], int(w.minima is not None), warps,
    )  # fmt: skip
    return y


def weight(kind: str, N: int, K: int, G: int, device: str = "cpu") -> QuantTensor:
    dtypes = {"symmetric": torch.float16, "zeros": torch.bfloat16, "minima": torch.float32}
    scales = torch.rand(N, G) + 0.5
    zeros = 15 * torch.rand(N, G) if kind == "zeros" else None
    minima = torch.randn(N, G) if kind == "minima" else None
    parts = [None if t is None else t.to(device, dtypes[kind]) for t in (scales, zeros, minima)]
    return QuantTensor(
        pack_int4(torch.randint(0, 16, (N, K), dtype=torch.uint8)).to(device), *parts
    )


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
@pytest.mark.parametrize(
    "M,N,K,G",
    [
        (1, 32, 128, 1),
        (3, 39, 512, 2),  # features past the end
        (8, 5, 640, 5),  # five runs of columns, of two warps
        (9, 33, 288, 9),  # groups of 32, and a last run of one
        (16, 32, 192, 1),  # one group that 128 does not divide
        (11, 7, 1152, 3),
    ],
)
def test_a_block_makes_the_product(host, half, kind, M, N, K, G):
    w = weight(kind, N, K, G)
    x, bias = torch.randn(M, K).to(half), torch.randn(N).to(half)
    y = on_host(host, x, w, bias if M % 2 else None)
    truth = x.double() @ w.dequantize(torch.float64).T + (bias.double() if M % 2 else 0)
    eager = x.float() @ w.dequantize().T + (bias.float() if M % 2 else 0)
    eps = torch.finfo(half).eps
    assert_within(y.double(), eager.to(half).double(), truth, eps, kind)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("group", [32, 128])
def test_one_hot_rows_read_the_weight_exactly(host, half, group):
    """By columns, so that a code read for another one shows; zeros are whole, as GPTQ's and AWQ's are."""
    K = 256
    w = weight("zeros", 32, K, K // group)
    w.zeros.round_()
    eye = torch.eye(K, dtype=half)
    y = torch.cat([on_host(host, rows, w) for rows in eye.split(16)])
    assert torch.equal(y, w.dequantize().T.to(half))


def test_warps_share_out_the_columns(host):
    x, w = torch.randn(4, 1152).bfloat16(), weight("zeros", 32, 1152, 9)
    one, three = on_host(host, x, w, warps=1), on_host(host, x, w, warps=3)
    assert torch.equal(three, on_host(host, x, w, warps=3))
    truth = x.double() @ w.dequantize(torch.float64).T
    assert_within(three.double(), one.double(), truth, torch.finfo(torch.bfloat16).eps, "three")


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
def test_not_finite(host, kind):
    """Where the product is, though the codes' sums are not: infinite inputs, and what overflows on the way."""
    w = weight(kind, 32, 256, 2)
    if kind == "zeros":
        w.zeros.fill_(8.0)
    x = torch.randn(5, 256).bfloat16()
    x[0, 3], x[1, 200], x[2, 7] = torch.inf, -torch.inf, torch.nan
    x[3] = 5e36  # whose sum passes float32, and whose product with such a weight does not
    w.scales.mul_(0.01)
    if kind == "minima":
        w.minima.mul_(0.01)
    y = on_host(host, x, w)
    truth = x.double() @ w.dequantize(torch.float64).T
    eager = (x.float() @ w.dequantize().T).bfloat16()
    assert_within(y.double(), eager.double(), truth, torch.finfo(torch.bfloat16).eps, kind)


def test_divisors_are_exact(host):
    host.divided.restype = ctypes.c_uint32
    most = 2**21 // 32 - 1  # columns of a row, by 32s
    for d in (1, 2, 3, 4, 7, 100, 4095, 65521, most):
        ends = torch.arange(0, most + 1, d)
        for n in {*ends[:50].tolist(), *ends[-50:].tolist(), most}:
            for near in (n - 1, n, n + 1):
                if 0 <= near <= most:
                    assert host.divided(near, d) == near // d, (near, d)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    """What kernels/_quant_cuda.py says of a weight and x, were the kernel here, and x on a GPU."""
    cuda = importlib.import_module("tilewright.kernels._quant_cuda")
    monkeypatch.setattr(cuda, "is_chosen", lambda device: True)

    class OnGpu(torch.Tensor):
        is_cuda = True

    def serves(
        M=1, K=512, half=torch.bfloat16, bits=4, group=128, kind=1, nested=False, offset=None, at=0
    ):
        x = torch.empty(M, K, dtype=half).as_subclass(OnGpu)
        q = torch.empty(16 + 8 * K // 2, dtype=torch.uint8)
        q = q[-q.data_ptr() % 16 + at :]
        scales = torch.empty(8, K // group, dtype=torch.float16)
        return cuda.serves(
            x, bits, q, scales, scales if offset is None else scales.to(offset), kind, nested
        )

    return serves


def test_where_it_serves(served):
    for group, kind, half in (
        (32, 0, torch.bfloat16),
        (128, 1, torch.float16),
        (512, 2, torch.bfloat16),
    ):
        assert served(16, group=group, kind=kind, half=half) and not served(17, group=group)
    assert not any(
        (
            served(half=torch.float32), served(bits=8), served(group=16), served(group=16, kind=0),
            served(kind=3), served(nested=True), served(offset=torch.uint8), served(at=1),
            served(K=1 << 21, group=1 << 21),
        )
    )  # fmt: skip
    assert served(K=(1 << 21) - 128)
    header = (CUDA / "quant_linear.h").read_text()
    assert "INT4_ROWS = 16;" in header and "INT4_COLUMNS = int64_t{1} << 21;" in header


if torch.cuda.is_available() and hasattr(torch.ops.tilewright, "linear_int4_rows"):

    @pytest.mark.parametrize("half", HALVES, ids=str)
    @pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
    @pytest.mark.parametrize(
        "M,N,K,G",
        [
            (1, 4096, 4096, 32),
            (8, 39, 640, 5),
            (11, 64, 192, 2),
            (16, 8192, 1056, 33),
            (13, 5, 96, 1),
        ],
    )
    def test_on_a_gpu(half, kind, M, N, K, G):
        w = weight(kind, N, K, G, "cuda")
        x, bias = torch.randn(M, K).to("cuda", half), torch.randn(N).to("cuda", half)
        parts = x, w.qweight, w.scales, w.zeros, w.minima, bias
        y = torch.ops.tilewright.linear_int4_rows(*parts)
        assert torch.equal(y, torch.ops.tilewright.linear_int4_rows(*parts))
        truth = x.double() @ w.dequantize(torch.float64).T + bias.double()
        eager = (x.float() @ w.dequantize().T + bias.float()).to(half)
        assert_within(y.double(), eager.double(), truth, torch.finfo(half).eps, kind)

    def test_quant_linear_takes_it(monkeypatch):
        from tilewright import ops

        cuda = importlib.import_module("tilewright.kernels._quant_cuda")
        monkeypatch.setattr(cuda, "is_chosen", lambda device: True)
        w, x = (
            weight("zeros", 512, 1024, 8, "cuda"),
            torch.randn(2, 3, 1024).to("cuda", torch.bfloat16),
        )
        direct = torch.ops.tilewright.linear_int4_rows(
            x.view(6, -1), w.qweight, w.scales, w.zeros, None, None
        )
        assert torch.equal(ops.quant_linear(x, w).view(6, -1), direct)
