"""Random models of transformers in folders, and what a model of ours read from one must give."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewright.testing import assert_within


def saved(model: Any, path: Path, **kwargs: Any) -> Any:
    """The model, its norms and biases random too, saved to path."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path, **kwargs)
    return model


def assert_logits_match(ours: Tensor, model: Any, ids: Tensor) -> None:
    with torch.no_grad():
        eager = model.float()(ids).logits.double()
        truth = model.double()(ids).logits
    model.float()
    assert_within(ours.double(), eager, truth, torch.finfo(torch.float32).eps, "logits")


def assert_equals(ours: Any, model: Any, S: int) -> None:
    """Logits of S tokens at once and through a cache in parts, and greedy tokens."""
    ids = torch.randint(0, model.config.vocab_size, (2, S))
    assert_logits_match(ours(ids), model, ids)

    cache, parts = ours.new_cache(2, S), []
    for part in ids.split([S - 6, 3, 1, 1, 1], dim=1):
        parts.append(ours(part, cache))
    assert_logits_match(torch.cat(parts, 1), model, ids)

    greedy = ours.generate(ids[0, :5], max_new_tokens=6)
    with torch.no_grad():
        wanted = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
    assert greedy.tokens == wanted
