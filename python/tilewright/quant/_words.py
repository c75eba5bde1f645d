"""What the formats' layers share: tensors by name, checked, and codes in int32 words."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
INTEGERS = (torch.int32, torch.int64)


def taken(
    format: str, tensors: Tensors, name: str, dtypes: tuple[torch.dtype, ...], dim: int
) -> Tensor:
    """Tensor `name`.  Raises ValueError where it is missing, or of another dtype or rank."""
    if name not in tensors:
        raise ValueError(f"{format}: {name} is missing; there are {', '.join(sorted(tensors))}")
    t = tensors[name]
    if t.dtype not in dtypes or t.dim() != dim:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{format}: {name} must be {dim}-D {wanted}, not {t.dtype} {list(t.shape)}"
        )
    return t


def fits(format: str, name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """t.  Raises ValueError where it is of another shape."""
    if t.shape != shape:
        raise ValueError(f"{format}: {name} is {list(t.shape)}, not {list(shape)}")
    return t


def unusable(t: Tensor) -> tuple[tuple[int, ...], float] | None:
    """Where the first nan or infinity of t is, and which; None where all are finite."""
    bad = ~t.isfinite()
    if not bool(bad.any()):
        return None
    at = tuple(bad.nonzero()[0].tolist())
    return at, t[at].item()


def usable(format: str, name: str, scales: Tensor, zero: bool = False) -> Tensor:
    """scales.  Raises ValueError where one is nan or infinite, or, but where `zero`, 0: quantisers that divide by
    their scales leave none, and what does is a file that lost something."""
    bad = unusable(scales if zero else scales.where(scales != 0, torch.nan))
    if bad is not None:
        raise ValueError(f"{format}: {name}{list(bad[0])} is {scales[bad[0]].item()}")
    return scales


def number(
    format: str, config: Mapping[str, Any], name: str, known: tuple[int, ...] | None = None
) -> int:
    """config[name], a whole number.  Raises ValueError where it is none, or not one of `known`."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or (known and value not in known):
        wanted = " or ".join(map(str, known)) if known else "a whole number"
        raise ValueError(f"{format}: {name} must be {wanted}, not {value!r}")
    return value


def from_words(words: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, n * 32 / bits] of int32 words [R, n], the lowest bits first; bits 4 or 8."""
    octets = words.contiguous().view(
        torch.uint8
    )  # little-endian, as every machine that torch runs on
    if bits == 8:
        return octets
    return torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def to_words(codes: Tensor, bits: int) -> Tensor:
    """from_words' inverse; codes [R, n * 32 / bits] uint8, below 2^bits."""
    octets = codes if bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)
    # cloned, since a single column passes for contiguous whatever its strides
    return octets.clone(memory_format=torch.contiguous_format).view(torch.int32)
