"""What tests of quant_linear's Triton launchers share: weights, calls and the truth."""

import importlib
import os

import torch
from torch import Tensor

from tilewright.quant_tensor import Nested, QuantTensor, pack_int4

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:  # launchers called here pass the ops by, which do it
    from tilewright.lab import interpreter

    interpreter.install()
DEVICE = "cpu" if INTERPRET else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["symmetric", "zeros", "minima", "codebook"]


def kernels():
    return importlib.import_module("tilewright.kernels.quant_linear")


def weight(N: int, K: int, G: int, bits: int, kind: str, scale_dtype=torch.float16) -> QuantTensor:
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    scales = (torch.rand(N, G) + 0.5) / 2**bits
    zeros = torch.rand(N, G) * (2**bits - 1) if kind == "zeros" else None
    minima = torch.randn(N, G) if kind == "minima" else None
    parts = [None if t is None else t.to(scale_dtype).to(DEVICE) for t in (scales, zeros, minima)]
    q = pack_int4(codes) if bits == 4 else codes
    book = torch.randn(2**bits, device=DEVICE) if kind in ("codebook", "nested") else None
    more = None
    if kind == "nested":
        parts[0] = torch.randint(0, 256, (N, G), dtype=torch.uint8, device=DEVICE)
        blocks = torch.rand(-(-N * G // 256), device=DEVICE) + 0.5
        code = torch.randn(256, device=DEVICE) / 2**bits
        more = Nested(code, blocks, torch.tensor(0.1, device=DEVICE))
    return QuantTensor(q.to(DEVICE), *parts, codebook=book, nested=more, bits=bits)


def nested(w: QuantTensor) -> list[Tensor]:
    return [] if w.nested is None else [*w.nested]


def launch(x: Tensor, w: QuantTensor, bias: Tensor | None = None, activations="float") -> Tensor:
    f = getattr(kernels(), f"linear_int{w.bits}")
    return f(x, w.qweight, w.scales, w.zeros, w.minima, w.codebook, nested(w), bias, activations)


def launch_dgrad(dy: Tensor, w: QuantTensor) -> Tensor:
    f = getattr(kernels(), f"linear_int{w.bits}_dgrad")
    return f(dy, w.qweight, w.scales, w.zeros, w.minima, w.codebook, nested(w))


def expected(x: Tensor, w: QuantTensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    b = None if bias is None else bias.to(dtype)
    return torch.nn.functional.linear(x.to(dtype), w.dequantize(dtype), b).double()
