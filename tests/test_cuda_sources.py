"""The arithmetic of one lane of csrc/cuda/*.cuh, which is also host code, gives the weight's product
on the CPU.  test_compile.py holds what nvcc makes of the sources."""

import ctypes
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
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]


def nvcc(*args: str) -> str:
    done = subprocess.run([str(NVCC), *FLAGS, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_device_code_includes_no_torch():
    for path in (*CUDA.glob("*.cu"), *CUDA.glob("*.cuh"), *CUDA.glob("*.h")):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path.name


HOST = r"""
#include "quant_linear.cuh"
using namespace tilewright::cuda;

template <typename T, int M, bool OFFSET>
static void block(const Int4Gemv& a, float* y) {
  for (int64_t n0 = 0; n0 < a.N; n0 += ROWS<M>)
    for (int lane = 0; lane < WARPS * 32; ++lane) {
      float acc[ROWS<M>][M] = {};
      lane_sums<T, M, OFFSET>(a, n0, lane, WARPS * 32, acc);
      for (int r = 0; r < ROWS<M> && n0 + r < a.N; ++r)
        for (int m = 0; m < a.M; ++m) y[m * a.N + n0 + r] += acc[r][m];
    }
}

template <typename T>
static void rows(const Int4Gemv& a, float* y) {
  if (a.M == 1) a.offset ? block<T, 1, true>(a, y) : block<T, 1, false>(a, y);
  else if (a.M <= 4) a.offset ? block<T, 4, true>(a, y) : block<T, 4, false>(a, y);
  else a.offset ? block<T, 8, true>(a, y) : block<T, 8, false>(a, y);
}

extern "C" void gemv_on_host(const void* x, const uint8_t* q, const void* s, const void* o, float* y, int64_t M,
                             int64_t N, int64_t K, int64_t G, int kind, int scale_kind, int minimum) {
  Int4Gemv a{};
  a.x = x, a.qweight = q, a.scales = s, a.offset = o, a.stride_xm = K;
  a.N = N, a.K = K, a.G = G, a.group = K / G, a.M = static_cast<int>(M);
  a.kind = static_cast<Float>(kind), a.scale_kind = static_cast<Float>(scale_kind), a.offset_is_minimum = minimum;
  if (a.kind == Float::F32) rows<float>(a, y);
  else if (a.kind == Float::BF16) rows<__nv_bfloat16>(a, y);
  else rows<__half>(a, y);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cu").write_text(HOST)
    nvcc("-Xcompiler", "-fPIC", "-shared", "-arch=sm_80", f"-I{CUDA}", "-o",
         str(folder / "host.so"), str(folder / "host.cu"))  # fmt: skip
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
@pytest.mark.parametrize(
    "M,N,K,G", [(1, 7, 64, 2), (3, 9, 8256, 43), (8, 5, 576, 9), (5, 6, 4352, 1)]
)
def test_lanes_sum_to_the_product(host, dtype, kind, M, N, K, G):
    number = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    scale_dtype = {"symmetric": torch.float16, "zeros": torch.bfloat16, "minima": torch.float32}[
        kind
    ]
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scales = (torch.rand(N, G) + 0.5).to(scale_dtype)
    offset = {"symmetric": None, "zeros": 15 * torch.rand(N, G), "minima": torch.randn(N, G)}[kind]
    offset = None if offset is None else offset.to(scale_dtype)
    w = QuantTensor(
        pack_int4(codes),
        scales,
        offset if kind == "zeros" else None,
        offset if kind == "minima" else None,
    )
    x = torch.randn(M, K).to(dtype)
    y = torch.zeros(M, N)

    def at(t: torch.Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    sizes = [ctypes.c_int64(i) for i in (M, N, K, G)]
    host.gemv_on_host(
        at(x), at(w.qweight), at(scales), at(offset), at(y), *sizes,
        number[dtype], number[scale_dtype], int(kind == "minima"),
    )  # fmt: skip
    truth = x.double() @ w.dequantize(torch.float64).T
    assert_within(y.double(), (x.float() @ w.dequantize().T).double(), truth, 2**-23, kind)
