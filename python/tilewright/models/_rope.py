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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RULES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """A frequency rule: `dim` rotated features of a head, `context` positions the model takes.

    original_context is the length it was pretrained at; divisors, where given, divide the
    frequencies one by one (GGUF's rope_freqs tensor).  Raises ValueError for an unknown rule, an
    odd dim, or factors of the wrong length.
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
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope: theta {self.theta} and factor {self.factor} must be positive")
        for name in ("short_factor", "long_factor", "divisors"):
            n = len(getattr(self, name))
            if n != self.dim // 2 and (n or (self.rule == "longrope" and name != "divisors")):
                raise ValueError(f"rope: {name} has {n} numbers, not {self.dim // 2}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> "Rope":
        """The rule in a Hugging Face config.json, old spelling (rope_scaling) or new."""
        given = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
        context = int(config["max_position_embeddings"])
        original = config.get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings"
        )
        rule = given.get("rope_type") or given.get("type") or "default"
        partial = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        factor = given.get("factor")
        if factor is None:
            factor = context / original if original and rule in ("yarn", "longrope") else 1.0
        optional = {
            name: given[name]
            for name in (
                "low_freq_factor",
                "high_freq_factor",
                "beta_fast",
                "beta_slow",
                "truncate",
                "attention_factor",
                "mscale",
                "mscale_all_dim",
            )
            if given.get(name) is not None
        }
        return cls(
            dim=int(head_dim * partial),
            theta=float(given.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rule=rule,
            context=context,
            original_context=int(original or context),
            factor=float(factor),
            short_factor=tuple(given.get("short_factor") or ()),
            long_factor=tuple(given.get("long_factor") or ()),
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
