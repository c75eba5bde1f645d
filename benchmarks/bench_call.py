"""What one call of each op costs the host, beside eager's, on tensors too small to matter: forward
without autograd, and forward recorded for a backward."""

from pathlib import Path
from typing import Any

import torch

import tilewright
from tilewright.bench import harness
from tilewright.bench.timing import call_seconds, interleaved, spread

SIZES: dict[str, dict[str, Any]] = {
    "rms_norm": {"M": 1, "N": 64},
    "add_rms_norm": {"M": 1, "N": 64},
    "rope": {"tokens": 1, "heads": 1, "dim": 64},
    "swiglu": {"rows": 1, "width": 64, "packed": False},
    "geglu": {"rows": 1, "width": 64, "packed": False},
    "attention": {"B": 1, "H": 1, "G": 1, "S": 2, "T": 2, "D": 64},
    "quant_linear": {"M": 1, "N": 32, "K": 32, "bits": 4},
}
AIM = {"cpu": 5, "cuda": 20}  # microseconds of a call without autograd


def _seconds(rivals: dict[str, Any], quick: bool) -> dict[str, float]:
    if harness.device() == "cuda":
        return {name: call_seconds(call) for name, call in rivals.items()}
    samples = interleaved(rivals, seconds=0.1 if quick else 1.0)
    return {name: spread(times).p50 for name, times in samples.items()}


def measure(quick: bool) -> list[dict[str, Any]]:
    """Rows in microseconds; `empty` is what the timing itself adds to each."""
    device = harness.device()
    served = {r.op: r.implementation for r in tilewright.explain() if r.device == device}
    rows = []
    for definition in harness.discover(Path(__file__).parent, list(SIZES)):
        inputs = definition.inputs(torch.float32, device, **SIZES[definition.OP])
        providers = definition.PROVIDERS
        for autograd in (False, True):

            def call(fn, autograd=autograd, inputs=inputs):
                def forward() -> object:
                    with torch.set_grad_enabled(autograd):
                        return fn(**inputs)

                return forward

            rivals = {name: call(providers[name]) for name in ("tilewright", "eager")}
            found = _seconds({**rivals, "empty": call(lambda **inputs: None)}, quick)
            rows.append(
                {
                    "op": definition.OP,
                    "implementation": served[definition.OP],
                    "autograd": "recorded" if autograd else "off",
                    "microseconds": (found["tilewright"] - found["empty"]) * 1e6,
                    "eager_microseconds": (found["eager"] - found["empty"]) * 1e6,
                    "aim_microseconds": None if autograd else AIM[device],
                    "empty_microseconds": found["empty"] * 1e6,
                }
            )
    return rows
