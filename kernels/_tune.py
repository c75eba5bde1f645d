"""Launch configurations: the tile shapes and warps of each kernel, by GPU and sizes.

A Tunable is one kernel's choice: a heuristic, and the space `tilewright tune` may search.  Where a
table has the bucket that the sizes fall in, the table decides; elsewhere the heuristic does.  A
table is a file <folder>/<GPU>/<kernel>.json, the folder the user's (OWN) or ours (SHIPPED), the
user's first:

    {"gpu": "NVIDIA H200", "kernel": "rms_norm_fwd", ..., "buckets": {
        "dtype=bfloat16 M=8192 BLOCK_N=4096": {"config": {"BLOCK_M": 1, "num_warps": 8}, ...}}}

Nothing here benchmarks, and nothing asks for a driver before the first launch, so importing is free
on a machine without a GPU.  A choice depends on the GPU's name, the bucket and the tables alone.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHIPPED = Path(__file__).resolve().parent / "tuned"
# expanduser, not Path.home, which raises for a user without a home
_CONFIG = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
OWN = Path(os.environ.get("TILEWRIGHT_TUNED") or _CONFIG / "tilewright/tuned")
OPTIONS = ("num_warps", "num_stages")  # the launch options of a configuration; the rest constexprs

Config = dict[str, int]


class Choice(NamedTuple):
    """A configuration, and who says so: "heuristic", "shipped table" or "own table"."""

    config: Config
    source: str


def row_warps(block: int) -> int:
    """Warps for a program that holds `block` elements of a row: about 8 a thread, 16 at most."""
    return min(16, max(1, block // 256))


def bucket(n: int, most: int) -> int:
    """The sizes that share a configuration: n >= 1 rounded up to a power of two, `most` at most."""
    return min(most, 1 << (n - 1).bit_length())


def grid(**values: tuple[int, ...]) -> list[Config]:
    """Every combination of the values."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def fitted(config: Config, K: int) -> dict[str, Any]:
    """config with a BLOCK_K that divides K, where 32 does, or else with a tile whose masked loads, a number each,
    do not spill; and FULL, whether it divides K."""
    dividing = K & -K  # the largest power of two that divides it
    if dividing >= 32:
        return {**config, "BLOCK_K": min(config["BLOCK_K"], dividing), "FULL": True}
    small = {name: min(config[name], 64) for name in ("BLOCK_M", "BLOCK_N")}
    return {**config, **small, "BLOCK_K": 32, "FULL": False}


def split(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constexprs and the launch options of a configuration, to compile it offline."""
    options = {name: config[name] for name in OPTIONS if name in config}
    constexprs = {name: value for name, value in config.items() if name not in options}
    return constexprs, options | {"enable_fp_fusion": True}


def gpu_folder(gpu: str) -> str:
    """The folder of a GPU's tables: its name, in small letters and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in gpu.lower()).split())


def gpu_name(device: torch.device) -> str:
    """The GPU's name; on the CPU, where only Triton's interpreter launches, "interpreter"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


class Tunable:
    """One kernel's configuration, chosen by a key of dtypes, flags and bucketed sizes.

    name      the kernel's, without its underscores and "_kernel"
    ops       the public operators that launch it
    keys      what the parts of a key are called
    heuristic heuristic(*key) -> the configuration where no table has one
    space     space(*key) -> the configurations a table may hold; all right at every size
    is_way    of no kernel, but of which kernels are launched
    """

    def __init__(
        self,
        name: str,
        ops: tuple[str, ...],
        keys: tuple[str, ...],
        heuristic: Callable[..., Config],
        space: Callable[..., list[Config]],
        is_way: bool = False,
    ) -> None:
        self.name, self.ops, self.keys, self.is_way = name, ops, keys, is_way
        self.heuristic, self.space = heuristic, space
        self.made: dict[tuple[Any, ...], Choice] = {}  # (device index, *key) -> what was chosen
        self._tables: dict[str, list[tuple[str, dict[str, Any]]]] = {}  # by GPU, the first wins
        self._forced: Config | None = None
        TUNABLES[name] = self

    def __call__(self, device: torch.device, *key: Any) -> Config:
        """The configuration for a launch on `device`; not to be changed by the caller.

        ValueError where a table of this kernel and GPU is not one, or holds what the space lacks.
        """
        choice = self.made.get((device.index, *key))
        if choice is None:
            choice = self.made[(device.index, *key)] = self.choose(gpu_name(device), *key)
        return choice.config if self._forced is None else self._forced

    def choose(self, gpu: str, *key: Any) -> Choice:
        """What a launch on a GPU of that name gets."""
        if gpu not in self._tables:
            self._tables[gpu] = self._load(gpu)
        bucket = self.bucket(*key)
        for source, buckets in self._tables[gpu]:
            if bucket in buckets:
                config = buckets[bucket]["config"]
                if config not in self.space(*key):
                    raise ValueError(
                        f"{self.name} on {gpu}: the {source} has {config} for {bucket}, which is not "
                        "a configuration of this kernel"
                    )
                return Choice(config, source)
        return Choice(self.heuristic(*key), "heuristic")

    def bucket(self, *key: Any) -> str:
        """The key as tables spell it: "dtype=bfloat16 M=8192 BLOCK_N=4096"."""
        words = (str(part).removeprefix("torch.") for part in key)
        return " ".join(f"{n}={word}" for n, word in zip(self.keys, words, strict=True))

    def path(self, gpu: str, folder: Path) -> Path:
        return folder / gpu_folder(gpu) / f"{self.name}.json"

    def forget(self) -> None:
        """Choose anew from here on: the tables may have changed."""
        self.made.clear()
        self._tables.clear()

    @contextmanager
    def forced(self, config: Config) -> Iterator[None]:
        """Every launch of this kernel takes `config`: for `tilewright tune`, and tests."""
        self._forced = config
        try:
            yield
        finally:
            self._forced = None

    def _load(self, gpu: str) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for source, folder in (("own table", OWN), ("shipped table", SHIPPED)):
            path = self.path(gpu, folder)
            if not path.is_file():
                continue
            try:
                buckets = json.loads(path.read_text())["buckets"]
                found.append((source, {key: {"config": b["config"]} for key, b in buckets.items()}))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: not a table of launches: {error!r}") from error
        return found


TUNABLES: dict[str, Tunable] = {}  # by name: those of the kernel files imported


def choices(op: str) -> list[str]:
    """Every choice this process has made for an operator, a line each."""
    return [
        f"{tunable.name} {tunable.bucket(*key)}: "
        + " ".join(f"{name}={value}" for name, value in choice.config.items())
        + f" ({choice.source})"
        for tunable in TUNABLES.values()
        if op in tunable.ops
        for (_, *key), choice in tunable.made.items()
    ]
