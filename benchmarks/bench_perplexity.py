"""What int8 activations cost: perplexity of SmolLM2-135M-Instruct Q4_1 on Python's own help texts.

The mean over windows of 512 tokens, each begun afresh, of the cross-entropy of every token after
the first; the text ships with Python as pydoc_data/topics.py.
"""

import math
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy

from tilewright.bench.peers import smollm2
from tilewright.models.llama import Llama

WINDOW, WINDOWS = 512, 32


@torch.inference_mode()
def _perplexity(model, windows):
    losses = [cross_entropy(model(ids[None])[0, :-1].double(), ids[1:]) for ids in windows]
    return math.exp(torch.stack(losses).mean())


def measure(quick):
    count = 4 if quick else WINDOWS
    rows = []
    for activations in ("float", "int8"):
        model = Llama.from_pretrained(smollm2(), activations=activations)
        text = "\n".join(topics[name] for name in sorted(topics))
        ids = torch.tensor(model.tokenizer.encode(text)[: count * WINDOW])
        rows.append(
            {
                "activations": activations,
                "perplexity": _perplexity(model, ids.view(count, WINDOW)),
                "windows": count,
                "tokens_a_window": WINDOW,
            }
        )
    for row in rows:
        row["over_float"] = row["perplexity"] / rows[0]["perplexity"] - 1
    return rows
