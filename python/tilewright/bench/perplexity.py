"""Perplexity of a model on a text: what a change to its weights cost.

e to the mean, over windows of W tokens each begun afresh, of the cross-entropy of every token after the
first.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def windows(
    tokenizer: Any, context: int, file: Path, length: int, most: int | None = None
) -> Tensor:
    """The text's tokens [n, length], a rest of fewer left out.  Raises ValueError where the model has no
    tokeniser or a shorter context, the file is not UTF-8, or it has fewer tokens than a window."""
    if tokenizer is None:
        raise ValueError(f"{file}: the model has no tokeniser beside its weights")
    if length > context:
        raise ValueError(f"windows of {length} tokens are more than the model's {context}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8: {error}") from error
    ids = torch.tensor(tokenizer.encode(text))
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"{file}: {len(ids)} tokens are fewer than a window of {length}")
    count = count if most is None else min(count, most)
    return ids[: count * length].view(count, length)


@torch.inference_mode()
def perplexity(
    model: Any, ids: Tensor, progress: Callable[[int, int], None] | None = None
) -> float:
    """Of windows ids [n, W]."""
    total = 0.0
    for i, window in enumerate(ids.to(model.device)):
        if progress is not None:
            progress(i, len(ids))
        total += float(cross_entropy(model(window[None])[0, :-1].double(), window[1:]))
    if progress is not None:
        progress(len(ids), len(ids))
    return math.exp(total / len(ids))
