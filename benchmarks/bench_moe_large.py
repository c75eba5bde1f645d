"""A mixture's layer at the sizes people train and serve: bfloat16, in TFLOP/s, GB/s and microseconds, beside torch's
grouped products.

T tokens, E experts, K of them each, D features, I intermediate ones.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import ops, reference
from tilewright.bench import harness
from tilewright.bench.timing import interleaved, spread
from tilewright.testing import assert_within

LAYERS = {  # E, K, D, I
    "Qwen3-30B": (128, 8, 2048, 768),
    "Mixtral": (8, 2, 4096, 14336),
    "small": (8, 2, 256, 128),
}
TRAINED = {"cuda": (("Qwen3-30B", 32768), ("Mixtral", 8192)), "cpu": (("small", 512),)}
SERVED = {"cuda": (("Mixtral", 64), ("Qwen3-30B", 64), ("Qwen3-30B", 1)), "cpu": (("small", 64),)}
ROUTED = {"cuda": (64, 4096), "cpu": (64,)}  # tokens of 128 experts, 8 each
CHECKED = 64  # the first tokens, which are compared with the reference


def _drawn(layer: str, T: int, device: str) -> tuple[Tensor, ...]:
    E, K, D, I = LAYERS[layer]
    ids = torch.rand(T, E, device=device).argsort(-1)[:, :K]
    weights = torch.rand(T, K, device=device).softmax(-1)
    x, w13, w2 = (
        torch.randn(shape, device=device, dtype=torch.bfloat16) / shape[-1] ** 0.5
        for shape in ((T, D), (E, 2 * I, D), (E, D, I))
    )
    return x, weights, ids, w13, w2


def _ours(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    return ops.moe_experts(x, weights, ops.moe_dispatch(ids, len(w13)), w13, w2)


def _grouped(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """As transformers' grouped experts."""
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(len(w13), dtype=torch.int32, device=x.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0)
    ends = ends.to(torch.int32)
    h = torch._grouped_mm(x[order // ids.shape[-1]], w13.transpose(-1, -2), offs=ends)
    gate, up = h.chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(gate) * up, w2.transpose(-1, -2), offs=ends)
    y = (y * weights.flatten()[order, None])[torch.argsort(order)]
    return y.view(*ids.shape, -1).sum(-2).to(x.dtype)


RIVALS: dict[str, Callable[..., Tensor]] = {"tilewright": _ours, "grouped": _grouped}


def _verify(out: Tensor, x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> None:
    """AssertionError where the first tokens are less right than the rule allows."""
    x, weights, ids = x[:CHECKED].detach(), weights[:CHECKED].detach(), ids[:CHECKED]
    placed = reference.moe_dispatch(ids, len(w13))
    given = [w.detach() for w in (w13, w2)]
    eager = reference.moe_experts(x, weights, placed, *given)
    truth = reference.moe_experts(
        x.double(), weights.double(), placed, *(w.double() for w in given)
    )
    ours = out[:CHECKED].detach().double()
    assert_within(ours, eager.double(), truth, torch.finfo(x.dtype).eps, "moe_large")


def _row(job: str, layer: str, T: int, times: dict[str, float], **told: Any) -> dict[str, Any]:
    return {
        "job": job,
        "layer": layer,
        "tokens": T,
        "microseconds": times["tilewright"] * 1e6,
    } | told


def _medians(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    return {name: spread(t).p50 for name, t in interleaved(calls, seconds=seconds).items()}


def _trained(layer: str, T: int, device: str, seconds: float) -> list[dict[str, Any]]:
    _, K, D, I = LAYERS[layer]
    x, weights, ids, w13, w2 = _drawn(layer, T, device)
    leaves = [t.requires_grad_() for t in (x, weights, w13, w2)]
    outs = {name: fn(x, weights, ids, w13, w2) for name, fn in RIVALS.items()}
    _verify(outs["tilewright"], x, weights, ids, w13, w2)
    dout = torch.randn_like(x)

    def forward(fn: Callable) -> Callable[[], object]:
        return torch.no_grad()(lambda: fn(x, weights, ids, w13, w2))

    def backward(out: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    flops, rows = 6 * T * K * D * I, []
    for job, factor, calls in (
        ("forward", 1, {name: forward(fn) for name, fn in RIVALS.items()}),
        ("backward", 2, {name: backward(out) for name, out in outs.items()}),
    ):
        times = _medians(calls, seconds)
        speeds = {name: factor * flops / t / 1e12 for name, t in times.items()}
        rows.append(
            _row(
                job, layer, T, times, tflops=speeds["tilewright"], grouped_tflops=speeds["grouped"]
            )
        )
    return rows


def _graphed(call: Callable[[], object], device: str) -> Callable[[], object]:
    if device == "cpu":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _served(layer: str, T: int, device: str, seconds: float) -> dict[str, Any]:
    *_, D, I = LAYERS[layer]
    given = _drawn(layer, T, device)
    with torch.no_grad():
        _verify(_ours(*given), *given)
        calls = {n: _graphed(lambda fn=fn: fn(*given), device) for n, fn in RIVALS.items()}
        times = _medians(calls, seconds)
    moved = given[2].unique().numel() * 3 * D * I * 2  # the matrices that are asked for, once
    speeds = {name: moved / t / 1e9 for name, t in times.items()}
    return _row(
        "decode", layer, T, times, gb_per_second=speeds["tilewright"],
        grouped_gb_per_second=speeds["grouped"],
    )  # fmt: skip


def _routed(T: int, device: str, seconds: float) -> list[dict[str, Any]]:
    """Router, and dispatch of what it chose; graphs, so that a launch's own time is not theirs."""
    logits = torch.randn(T, 128, device=device)
    _, ids = ops.moe_route(logits, 8)

    def eager() -> object:
        top = logits.softmax(-1).topk(8)
        return top.values / top.values.sum(-1, keepdim=True), top.indices

    with torch.no_grad():
        calls = {
            "tilewright": _graphed(lambda: ops.moe_route(logits, 8), device),
            "eager": _graphed(eager, device),
        }
        router = _medians(calls, seconds)
        dispatch = _medians(
            {"tilewright": _graphed(lambda: ops.moe_dispatch(ids, 128), device)}, seconds
        )
    return [
        _row("router", "128 experts, 8", T, router, eager_microseconds=router["eager"] * 1e6),
        _row("dispatch", "128 experts, 8", T, dispatch),
    ]


def measure(quick: bool) -> list[dict[str, Any]]:
    """Rows: a forward is 6 T K D I floating-point operations, a backward twice that."""
    device, seconds = harness.device(), 0.1 if quick else 0.5
    torch.manual_seed(0)
    rows = [row for T in ROUTED[device] for row in _routed(T, device, seconds)]
    rows += [_served(*case, device, seconds) for case in SERVED[device]]
    return rows + [row for case in TRAINED[device] for row in _trained(*case, device, seconds)]
