"""The frequencies of rotary embeddings, and the tables ops.rope takes.

theta_i = base^(-2i/D), i < D/2 (Su et al. 2021, arXiv:2104.09864, eq. 15); long-context rules
rescale them:
    linear     theta_i / factor (Chen et al. 2023, arXiv:2306.15595)
    dynamic    base grows with the sequence, "NTK-aware"
    llama3     long wavelengths / factor, short ones kept, a linear blend between
    yarn       the same in rotations over the original context, cos and sin scaled (Peng et al. 2023,
               arXiv:2309.00071, eq. 23)
    longrope   a searched factor for each i, another set past the original context (Ding et al. 2024,
               arXiv:2402.13753)
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 1 << 62  # positions: beyond, no int64 counts them
RULES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def whole(name: str, value: Any) -> int:
    """value, a whole number.  Raises ValueError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0:
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def real(name: str, value: Any) -> float:
    """value, a finite number.  Raises ValueError where it is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def reals(name: str, value: Any) -> tuple[float, ...]:
    """value, a list of finite numbers.  Raises ValueError where it is none."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list of numbers, not {value!r}")
    return tuple(real(name, x) for x in value)


@dataclass(frozen=True)
class Rope:
    """A frequency rule: `dim` rotated features of a head, `context` positions the model takes.

    original_context is the length it was pretrained at; divisors, where given, divide the
    frequencies one by one (GGUF's rope_freqs tensor).  Raises ValueError for an unknown rule, an
    odd dim, numbers that a rule cannot count with, or factors of the wrong length.
    """

    dim: int
    theta: float = 10000.0
    rule: str = "default"
    context: int = 2048
    original_context: int = 2048
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rope: unknown rule {self.rule!r}; known are {', '.join(RULES)}")
        if self.dim <= 0 or self.dim % 2:
            raise ValueError(f"rope: dim {self.dim} is not even and positive")
        if self.rule == "dynamic" and self.dim == 2:
            raise ValueError("rope: the rule dynamic needs a dim above 2")
        if self.rule == "yarn" and self.theta == 1:
            raise ValueError("rope: the rule yarn needs a theta other than 1")
        for name in ("theta", "factor", "beta_fast", "beta_slow"):
            most = (
                MOST if name.startswith("beta") else math.inf
            )  # yarn takes a logarithm of the betas
            if not 1 / most < getattr(self, name) < most:
                raise ValueError(f"rope: {name} must be positive, not {getattr(self, name)}")
        least = 2 if self.rule == "longrope" else 1  # which divides by its logarithm
        if not least <= self.original_context <= MOST or not 1 <= self.context <= MOST:
            raise ValueError(
                f"rope: context {self.context} and original context {self.original_context} must be"
                f" {least} to {MOST}"
            )
        for name in ("short_factor", "long_factor", "divisors"):
            n = len(getattr(self, name))
            if n != self.dim // 2 and (n or (self.rule == "longrope" and name != "divisors")):
                raise ValueError(f"rope: {name} has {n} numbers, not {self.dim // 2}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """The rule in a Hugging Face config.json, old spelling (rope_scaling) or new."""
        given: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            more = config.get(key) or {}
            if not isinstance(more, Mapping):
                raise ValueError(f"{key} must be an object, not {more!r}")
            given |= more

        def number(name: str, *otherwise: Any) -> Any:
            """The first that is there and is not 0."""
            return next((x for x in (given.get(name), *otherwise) if x), None)

        context = whole("max_position_embeddings", config["max_position_embeddings"])
        name = "original_max_position_embeddings"
        original = config.get(name) or given.get(name)
        original = None if not original else whole(name, original)
        rule = number("rope_type", given.get("type"), "default")
        name = "partial_rotary_factor"
        partial = real(name, number(name, config.get(name), 1.0))
        factor = given.get("factor")
        if factor is None:
            factor = context / original if original and rule in ("yarn", "longrope") else 1.0
        optional: dict[str, Any] = {
            name: real(name, given[name])
            for name in (
                "low_freq_factor",
                "high_freq_factor",
                "beta_fast",
                "beta_slow",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
            )
            if given.get(name) is not None
        }
        if given.get("truncate") is not None:
            optional["truncate"] = bool(given["truncate"])
        return cls(
            dim=int(head_dim * partial),
            theta=real("rope_theta", number("rope_theta", config.get("rope_theta"), 10000.0)),
            rule=rule,
            context=context,
            original_context=original or context,
            factor=real("factor", factor),
            short_factor=reals("short_factor", given.get("short_factor") or ()),
            long_factor=reals("long_factor", given.get("long_factor") or ()),
            **optional,
        )


def frequencies(rope: Rope, length: int | None = None) -> tuple[Tensor, float]:
    """theta [D/2] float32 (radians a position) for sequences of `length`, and the scale of cos, sin."""
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    theta, base, scale = 1.0 / rope.theta**exponent, rope.theta, 1.0
    if rope.rule == "linear":
        theta = theta / rope.factor
    elif rope.rule == "dynamic":
        n = max(length or 0, rope.context)
        grown = rope.factor * n / rope.context - (rope.factor - 1)
        theta = 1.0 / (base * grown ** (rope.dim / (rope.dim - 2))) ** exponent
    elif rope.rule == "llama3":
        theta = _llama3(rope, theta)
    elif rope.rule == "yarn":
        theta, scale = _yarn(rope, theta), _yarn_scale(rope)
    elif rope.rule == "longrope":
        is_long = length is not None and length > rope.original_context
        searched = torch.tensor(rope.long_factor if is_long else rope.short_factor)
        theta = 1.0 / (searched * base**exponent)
        scale = 1.0 if rope.factor <= 1 else _longrope_scale(rope)
    if rope.divisors:
        theta = theta / torch.tensor(rope.divisors)
    return theta, scale if rope.attention_factor is None else rope.attention_factor


def _llama3(rope: Rope, theta: Tensor) -> Tensor:
    turns = rope.original_context * theta / (2 * math.pi)  # over the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * theta / rope.factor + keep * theta


def _yarn(rope: Rope, theta: Tensor) -> Tensor:
    def index_of(turns: float) -> float:  # the i that turns so often over the original context
        length = rope.original_context / (turns * 2 * math.pi)
        return rope.dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a step, not 0 / 0
    stretch = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return theta / rope.factor * stretch + theta * (1 - stretch)


def _yarn_scale(rope: Rope) -> float:
    def of(m: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return of(rope.mscale) / of(rope.mscale_all_dim)
    return of(1.0)


def _longrope_scale(rope: Rope) -> float:
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))


class RopeTables:
    """cos and sin [positions, D/2] of a rule, made once for the positions asked for so far."""

    def __init__(self, rope: Rope, dtype: torch.dtype, device: torch.device) -> None:
        self.rope, self.dtype, self.device = rope, dtype, device
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """cos, sin [end - start, D/2] of positions start to end, for a sequence of length end."""
        rope, regime = self.rope, 0  # sequences of one regime share their frequencies
        if rope.rule == "dynamic" and end > rope.context:
            return self._make(start, end, end)
        if rope.rule == "longrope" and end > rope.original_context:
            regime = rope.original_context + 1
        cos, sin = self._tables.get(regime, (None, None))
        if cos is None or sin is None or len(cos) < end:
            cos, sin = self._make(0, 1 << max(end - 1, 63).bit_length(), regime)
            self._tables[regime] = cos, sin
        return cos[start:end], sin[start:end]

    def _make(self, start: int, end: int, length: int) -> tuple[Tensor, Tensor]:
        theta, scale = frequencies(self.rope, length or None)
        angle = torch.outer(torch.arange(start, end, dtype=torch.float32), theta)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        return cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)
