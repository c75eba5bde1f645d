"""Quantised weights that tests of quant_linear make, and its comparison with its twin."""

import torch
from torch import Tensor

from tilewright import ops, reference
from tilewright.quant_tensor import QuantTensor, pack_int4
from tilewright.testing import assert_matches_reference


def make(N, K, *, bits=4, group=32, kind="minima", scale_dtype=torch.float16, device="cpu"):
    g = torch.Generator().manual_seed(bits * 1000 + N + K)
    codes = torch.randint(0, 2**bits, (N, K), generator=g, dtype=torch.uint8)
    G = K // group
    scales = (torch.rand(N, G, generator=g) * 0.02 + 0.01).to(scale_dtype)
    zeros = minima = None
    if kind == "zeros":
        zeros = torch.randint(0, 2**bits, (N, G), generator=g).to(scale_dtype)
    elif kind == "minima":
        minima = (-scales.float() * 2 ** (bits - 1) * torch.rand(N, G, generator=g)).to(scale_dtype)
    q = pack_int4(codes) if bits == 4 else codes
    move = (t if t is None else t.to(device) for t in (q, scales, zeros, minima))
    return QuantTensor(*move, bits=bits)


def check(w: QuantTensor, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None, **kwargs):
    """Our op against its twin, with the weight's own values in every dtype."""

    def call(fn):
        return lambda x, b: fn(x, w, b, **kwargs)

    assert_matches_reference(
        call(ops.quant_linear), call(reference.quant_linear), x, bias, dtype=dtype
    )
