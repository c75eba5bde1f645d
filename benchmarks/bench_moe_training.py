"""A small language model with a mixture of experts, trained from nothing: ours beside its eager twin, and the
balance of its experts with and without the loss for it.

A byte-level decoder of two layers on Python's own help texts (pydoc_data/topics.py, which ships with Python), the
same first weights and batches every time.  Loss in nats a byte; a layer's load is how many times its share the
busiest expert takes, over the last tenth of the steps.
"""

from contextlib import nullcontext
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor

import tilewright
from tilewright import nn, ops

BYTES, WIDTH, HEADS, LAYERS = 256, 128, 4, 2
EXPERTS, TAKEN, INNER = 8, 2, 128
BATCH, LENGTH, STEPS, RATE = 8, 128, 300, 2e-3
BALANCE, Z = 0.01, 0.001  # how much of each loss, as Switch Transformer and ST-MoE have it
EVERY = 25  # steps between the losses on record


class Layer(torch.nn.Module):
    """x + attention, then + experts."""

    def __init__(self, rotary: nn.RotaryEmbedding) -> None:
        super().__init__()
        self.before_attention, self.before_experts = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = nn.Attention(WIDTH, HEADS, rotary=rotary)
        self.experts = nn.MoE(WIDTH, INNER, EXPERTS, TAKEN)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.before_attention(x))
        y, logits, ids = self.experts.routed(self.before_experts(x))
        return x + y, logits, ids


class Model(torch.nn.Module):
    """Bytes [B, S] -> logits of the next byte [B, S, 256], and each layer's routing."""

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // HEADS // 2
        rotary = nn.RotaryEmbedding(10000.0 ** (-torch.arange(half) / half), LENGTH)
        self.embedding = torch.nn.Embedding(BYTES, WIDTH)
        self.layers = torch.nn.ModuleList(Layer(rotary) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, routing = self.embedding(ids), []
        for layer in self.layers:
            x, logits, taken = layer(x)
            routing.append((logits, taken))
        return self.head(self.norm(x)), routing


class Run(NamedTuple):
    """losses [steps], nats a byte; counts [layers, E], how often each expert was taken in the last steps."""

    losses: Tensor
    counts: Tensor


def batches(steps: int) -> Tensor:
    """Bytes [steps, B, S + 1], pieces of the text from drawn places."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1)
    begin = torch.randint(len(data) - LENGTH - 1, (steps, BATCH, 1), generator=generator)
    return data[begin + torch.arange(LENGTH + 1)]


def train(
    steps: int, *, balanced: bool, eager: bool = False, dtype: torch.dtype = torch.float32
) -> Run:
    """A run from the same first weights on the same batches."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = Model().to(dtype)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    losses, counts = [], torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    with tilewright.eager() if eager else nullcontext():
        for step, batch in enumerate(batches(steps)):
            out, routing = model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten())
            losses.append(loss.detach())
            found = [ops.moe_losses(logits, ids) for logits, ids in routing]
            if balanced:
                loss = loss + sum(BALANCE * balance + Z * z for balance, z, _ in found)
            if step >= steps - max(1, steps // 10):
                counts += torch.stack([count for _, _, count in found])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return Run(torch.stack(losses), counts)


def measure(quick):
    steps = EVERY if quick else STEPS
    runs = {
        "ours": train(steps, balanced=True),
        "eager": train(steps, balanced=True, eager=True),
        "ours, without the losses": train(steps, balanced=False),
        "eager, without the losses": train(steps, balanced=False, eager=True),
    }
    return [
        {
            "run": name,
            "steps": steps,
            "loss_at": {
                str(step): run.losses[step].item() for step in (*range(0, steps, EVERY), steps - 1)
            },
            "loss_of_last_tenth": run.losses[-max(1, steps // 10) :].mean().item(),
            "load_of_busiest": [
                layer.max().item() * EXPERTS / layer.sum().item() for layer in run.counts
            ],
            "load": [
                [n * EXPERTS / layer.sum().item() for n in layer.tolist()] for layer in run.counts
            ],
        }
        for name, run in runs.items()
    ]
