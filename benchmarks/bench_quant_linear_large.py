"""quant_linear at a layer of a 7B model, 4096 -> 11008 in groups of 128: beside torch's dense product and its
int4 one, and beside reading the weights at all.

Each call takes the next of several weights, together larger than any cache.  On a CPU `read` is torch's sum of
them as int64, the same number of bytes as ours has codes and scales; and what the kernels of AVX2 take, on a CPU
that has better ones.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import QuantTensor, _native, ops, reference
from tilewright.bench import harness
from tilewright.bench.timing import interleaved, spread
from tilewright.testing import assert_within

K, N, GROUP = 4096, 11008, 128
ROWS = (1, 2, 16, 64, 256)
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
FEW = 2  # rows up to which torch's int4 product on a CPU ends soon in a dtype other than bfloat16, and its dense
# one in float16
WEIGHTS = 4
CHECKED = 64  # outputs that are compared with the reference


def _weight(bits: int, device: str) -> QuantTensor:
    codes = torch.randint(0, 256, (N, K * bits // 8), dtype=torch.uint8, device=device)
    scales = (torch.rand(N, K // GROUP, device=device) * 0.01 + 0.01).half()
    return QuantTensor(codes, scales, bits=bits)


def _verify(out: Tensor, x: Tensor, w: QuantTensor) -> None:
    """AssertionError where the first outputs are less right than the rule allows."""
    part = w.part(0, CHECKED)
    truth = reference.quant_linear(x.double(), part)
    eager = reference.quant_linear(x, part)
    ours = out[:, :CHECKED].double()
    assert_within(ours, eager.double(), truth, torch.finfo(x.dtype).eps, "quant_linear_large")


def _torch_int4(w: QuantTensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    scales = torch.stack([w.scales.t(), torch.zeros_like(w.scales).t()], -1).to(dtype).contiguous()
    aten = torch.ops.aten
    if w.qweight.is_cuda:
        swapped = w.qweight << 4 | w.qweight >> 4  # theirs has the even column in the high bits
        packed = aten._convert_weight_to_int4pack(swapped, 8)
        return lambda x: aten._weight_int4pack_mm(x, packed, GROUP, scales)
    packed = aten._convert_weight_to_int4pack_for_cpu(w.codes().int(), 1)
    return lambda x: aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales)


def _at(isa: str, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """call with the CPU kernels of that level."""

    def at_level(x: Tensor) -> Tensor:
        own = _native.cpu_isa()
        _native.C.set_isa(isa)
        try:
            return call(x)
        finally:
            _native.C.set_isa(own)

    return at_level


def _in_turn(calls: list[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], object]:
    turn = count()
    return lambda: calls[next(turn) % len(calls)](x)


@torch.no_grad()
def measure(quick: bool) -> list[dict[str, Any]]:
    device, seconds = harness.device(), 1.0 if quick else 6.0
    rows = []
    for dtype in DTYPES[device]:
        four = [_weight(4, device) for _ in range(WEIGHTS)]
        eight = [_weight(8, device) for _ in range(WEIGHTS)]
        dense = [torch.randn(N, K, dtype=dtype, device=device) for _ in range(WEIGHTS)]
        int4 = (
            [_torch_int4(w, dtype) for w in four]
            if device == "cpu" or dtype == torch.bfloat16
            else []
        )
        slow = device == "cpu" and dtype != torch.bfloat16
        nbytes = N * K // 2 + N * (K // GROUP) * 2
        # ones: zeros nobody wrote are one page, read from a cache
        plain = [torch.ones(nbytes // 8, dtype=torch.int64, device=device) for _ in range(WEIGHTS)]
        for M in ROWS:
            if M > FEW and device == "cpu" and dtype == torch.float16:
                continue
            theirs = [] if M > FEW and slow else int4
            x = torch.randn(M, K, dtype=dtype, device=device)
            for w in (four[0], eight[0]):
                _verify(ops.quant_linear(x, w), x, w)
            rivals = {
                "4 bits": [lambda x, w=w: ops.quant_linear(x, w) for w in four],
                "8 bits": [lambda x, w=w: ops.quant_linear(x, w) for w in eight],
                "4 bits, int8 activations": [
                    lambda x, w=w: ops.quant_linear(x, w, activations="int8") for w in four
                ],
                "dense": [lambda x, w=w: F.linear(x, w) for w in dense],
                "read": [lambda x, p=p: p.sum() for p in plain],
            }
            if theirs:
                rivals["torch int4"] = theirs
            if device == "cpu" and _native.cpu_isa() not in (None, "scalar", "avx2"):
                for name in ("4 bits", "4 bits, int8 activations"):
                    rivals[f"{name}, AVX2"] = [_at("avx2", call) for call in rivals[name]]
            calls = {name: _in_turn(each, x) for name, each in rivals.items()}
            found = {name: spread(t) for name, t in interleaved(calls, seconds=seconds).items()}
            for name in rivals:
                p20, p50, p80 = found[name]
                rows.append(
                    {
                        "M": M,
                        "dtype": str(dtype).removeprefix("torch."),
                        "provider": name,
                        "ms_p20": p20 * 1e3,
                        "ms": p50 * 1e3,
                        "ms_p80": p80 * 1e3,
                        "over_dense": found["dense"].p50 / p50,
                        "over_torch_int4": found["torch int4"].p50 / p50 if theirs else None,
                        "of_reading": found["read"].p50 / p50 if name.startswith("4") else None,
                        "of_own_level": (
                            found[name.removesuffix(", AVX2")].p50 / p50
                            if name.endswith("AVX2")
                            else None
                        ),
                    }
                )
    return rows
