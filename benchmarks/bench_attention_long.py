"""attention at the lengths people train at, in TFLOP/s beside torch's own kernels: bfloat16, 64 heads that share 8
of keys on a GPU, 16 that share 4 on a CPU; forward, and backward alone."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tilewright import ops, reference
from tilewright.bench import harness
from tilewright.bench.timing import interleaved, spread
from tilewright.testing import assert_within

HEADS = {"cuda": (64, 8), "cpu": (16, 4)}
LENGTHS = {"cuda": (8192, 2048), "cpu": (512,)}
DIMS = {"cuda": (128, 64, 256), "cpu": (128,)}
BACKENDS = {
    "cuda": {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION},
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}
CHECKED = (
    128  # the last queries, of the heads that share the first keys, are compared with the reference
)


def _torch(backend: SDPBackend, causal: bool) -> Callable:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return call


def _verify(out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """AssertionError where what is compared is less right than the rule allows."""
    group = q.size(1) // k.size(1)
    rows = [x.detach() for x in (q[:, :group, -CHECKED:], k[:, :1], v[:, :1])]
    truth = reference.attention(*(x.double() for x in rows), causal=causal)
    eager = reference.attention(*rows, causal=causal)
    ours = out.detach()[:, :group, -CHECKED:]
    assert_within(ours.double(), eager.double(), truth, torch.finfo(q.dtype).eps, "attention_long")


def _rows(S: int, D: int, causal: bool, device: str, seconds: float) -> list[dict[str, Any]]:
    H, G = HEADS[device]
    q, k, v = (
        torch.randn(1, S, heads, D, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (H, G, G)
    )
    rivals = {"tilewright": lambda q, k, v: ops.attention(q, k, v, causal=causal)}
    rivals |= {name: _torch(backend, causal) for name, backend in BACKENDS[device].items()}
    outs = {name: fn(q, k, v) for name, fn in rivals.items()}
    _verify(outs["tilewright"], q, k, v, causal)
    dout = torch.randn_like(outs["tilewright"])

    def forward(fn: Callable) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return fn(q, k, v)

        return call

    def backward(out: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    flops = 4 * H * S * S * D / (2 if causal else 1)
    rows = []
    for mode, factor, calls in (
        ("forward", 1.0, {name: forward(fn) for name, fn in rivals.items()}),
        ("backward", 2.5, {name: backward(out) for name, out in outs.items()}),
    ):
        times = interleaved(calls, seconds=seconds)
        speeds = {n: factor * flops / spread(t).p50 / 1e12 for n, t in times.items()}
        rows.append(
            {
                "length": S,
                "head_dim": D,
                "mask": "causal" if causal else "full",
                "pass": mode,
                "tflops": speeds.pop("tilewright"),
                **{f"{name}_tflops": speed for name, speed in speeds.items()},
            }
        )
    return rows


def measure(quick: bool) -> list[dict[str, Any]]:
    """Rows in TFLOP/s: under a causal mask of the half that it leaves; a backward is 2.5 forwards."""
    device = harness.device()
    torch.manual_seed(0)
    return [
        row
        for D in DIMS[device]
        for S in LENGTHS[device]
        for causal in (True, False)
        for row in _rows(S, D, causal, device, 0.1 if quick else 0.5)
    ]
