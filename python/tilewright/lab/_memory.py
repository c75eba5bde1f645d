"""The memory of an interpreted launch: whose it is, what was written, who touched it."""

import bisect
import ctypes
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

POISON = 0xFD  # fills what torch.empty gives out: NaN in float16, -4e37 in float32 and bfloat16
WATCHED = 64  # allocations whose unwritten bytes are known at a time
VAST, CHUNK = 1 << 29, 1 << 16  # bytes of a region that is counted by chunks; cells of a chunk
NOBODY, MANY, ATOMICALLY = 0, -1, -2  # who touched a cell; else a program's number from 1


class KernelFault(Exception):
    """A kernel did what a GPU would let pass in silence."""


@dataclass
class Launch:
    """What one launch did, in bytes of the elements not masked off, and FLOPs of tl.dot."""

    kernel: str
    module: str = ""
    grid: tuple[int, int, int] = (0, 0, 0)
    programs: int = 0  # interpreted: all of the grid's, but under sampling
    # what Triton would specialise on: types by argument, constants, options, multiples of 16
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    divisible: list[str] = field(default_factory=list)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    distinct_bytes_loaded: int = 0
    distinct_bytes_stored: int = 0
    atomics: int = 0
    dot_flops: int = 0
    # by argument, those of one storage under one name: bytes loaded, stored, distinct of each
    arguments: dict[str, dict[str, int]] = field(default_factory=dict)


def _bytes_at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))


class Allocations:
    """Fresh storages and which of their bytes have been written; they are kept alive until all are,
    so that no address is given out twice."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, tuple[Any, np.ndarray]] = OrderedDict()

    def add(self, t: Tensor) -> None:
        """Fill a tensor that torch.empty made, and watch it."""
        if type(t) is not Tensor or t.device.type != "cpu" or t.numel() == 0:
            return
        storage = t.untyped_storage()
        _bytes_at(storage.data_ptr(), storage.nbytes())[:] = POISON
        self._held[storage.data_ptr()] = (storage, np.zeros(storage.nbytes(), bool))
        while len(self._held) > WATCHED:
            self._held.popitem(last=False)

    def written(self, address: int) -> np.ndarray | None:
        """Flags of the storage's bytes; None where it is not fresh."""
        found = self._held.get(address)
        return None if found is None else found[1]

    def drop_whole(self, address: int) -> None:
        """Forget a storage every byte of which is written."""
        found = self._held.get(address)
        if found is not None and found[1].all():
            del self._held[address]

    def clear(self) -> None:
        self._held.clear()


@dataclass
class _Region:
    """One storage that arguments of the launch lie in, in cells of `unit` bytes."""

    start: int
    end: int
    names: list[str]
    unit: int
    written: np.ndarray | None
    reader: np.ndarray
    writer: np.ndarray
    loaded: int = 0
    stored: int = 0
    touched: set[int] = field(default_factory=set)  # of a vast region: the chunks looked into

    def is_vast(self) -> bool:
        return self.end - self.start > VAST

    def count(self, cells: np.ndarray) -> int:
        """How many were touched; of a vast region no page is read that nobody touched."""
        if not self.is_vast():
            return int(np.count_nonzero(cells))
        return sum(int(np.count_nonzero(cells[i * CHUNK : (i + 1) * CHUNK])) for i in self.touched)

    def refine(self, unit: int) -> None:
        """Smaller cells: something else than whole elements is addressed."""
        if unit < self.unit:
            self.touched = {
                i * (self.unit // unit) + j for i in self.touched for j in range(self.unit // unit)
            }
            self.reader = np.repeat(self.reader, self.unit // unit)
            self.writer = np.repeat(self.writer, self.unit // unit)
            self.unit = unit


class Memory:
    """Checks and counts the accesses of one launch."""

    def __init__(self, launch: Launch, fresh: Allocations) -> None:
        self.launch, self._fresh = launch, fresh
        self._regions: list[_Region] = []  # by address
        self._starts: list[int] = []
        self._base: dict[
            str, tuple[int, int, _Region]
        ] = {}  # argument -> address, itemsize, region
        self._names: dict[int, str] = {}  # address -> the first argument that begins there
        self.program: tuple[int, ...] = (0, 0, 0)
        self.me = 1

    def add(self, name: str, t: Tensor) -> None:
        """An argument and the storage it lies in."""
        storage = t.untyped_storage()
        start, count, unit = storage.data_ptr(), storage.nbytes(), t.element_size()
        region = next((r for r in self._regions if r.start == start), None)
        if region is None:
            unit = gcd(unit, count) or 1
            reader, writer = (np.zeros(count // unit, np.int32) for _ in range(2))
            written = self._fresh.written(start)
            region = _Region(start, start + count, [], unit, written, reader, writer)
            at = bisect.bisect(self._starts, start)
            self._regions.insert(at, region)
            self._starts.insert(at, start)
        region.names.append(name)
        region.refine(gcd(region.unit, unit))
        self._base[name] = (t.data_ptr(), t.element_size(), region)
        self._names.setdefault(t.data_ptr(), name)

    def name_at(self, address: int) -> str | None:
        """The argument that begins at this address."""
        return self._names.get(address)

    def _fault(self, what: str, address: int, name: str | None) -> KernelFault:
        address -= (address >> 63) << 64  # below nought it has wrapped
        if name is None:
            near = min(
                self._base,
                key=lambda n: abs(self._base[n][0] - address),
                default=None,
            )
            name = near
        where = f"address {address:#x}"
        if name is not None:
            base, itemsize, region = self._base[name]
            where = (
                f"argument {name}, element {(address - base) // itemsize}: byte "
                f"{address - region.start} of a storage of {region.end - region.start}"
            )
        kernel, program = self.launch.kernel, self.program
        return KernelFault(f"{kernel}, program {program}: {what}; {where}")

    def _split(
        self, what: str, address: np.ndarray, size: int, name: str | None
    ) -> list[tuple[_Region, np.ndarray]]:
        """The accesses by the region they lie in; KernelFault for one that lies in none, or not in
        the region of the argument its pointer came from."""
        low, high = int(address.min()), int(address.max()) + size
        home: _Region | None = None
        if name is not None:
            home = self._base[name][2]
        elif self._regions:
            home = self._regions[max(bisect.bisect(self._starts, low) - 1, 0)]
        if home is not None and home.start <= low and high <= home.end:
            return [(home, address)]
        if name is not None or home is None:
            outside = address
            if home is not None:
                last = np.uint64(home.end - size)
                outside = address[(address < np.uint64(home.start)) | (address > last)]
            raise self._fault(f"{what} out of bounds", int(outside.flat[0]), name)
        found = []
        where = np.searchsorted(np.array(self._starts, np.uint64), address, "right") - 1
        for at in np.unique(where):
            part = address[where == at]
            region = self._regions[max(int(at), 0)]
            wrong = (part < region.start) | (part + np.uint64(size) > region.end)
            if wrong.any():
                raise self._fault(f"{what} out of bounds", int(part[wrong][0]), None)
            found.append((region, part))
        return found

    def _cells(self, region: _Region, address: np.ndarray, size: int) -> np.ndarray:
        offset = (address - np.uint64(region.start)).astype(np.int64)
        if size % region.unit or (region.unit > 1 and (offset % region.unit).any()):
            region.refine(1)
        cells = offset // region.unit
        if size > region.unit:
            cells = (cells[:, None] + np.arange(size // region.unit)).ravel()
        if region.is_vast():
            region.touched.update(np.unique(cells // CHUNK).tolist())
        return cells

    def load(self, address: np.ndarray, size: int, name: str | None) -> None:
        """Addresses [n] uint64 of elements of `size` bytes, pointers from argument `name`."""
        self.launch.bytes_loaded += address.size * size
        for region, part in self._split("load", address, size, name):
            region.loaded += part.size * size
            self._check_written(region, part, size, name)
            cells = self._cells(region, part, size)
            by = region.writer[cells]
            wrong = (by > 0) & (by != self.me)
            if wrong.any():
                raise self._race("loads what program {} stored", region, cells, by, wrong, name)
            by = region.reader[cells]
            region.reader[cells] = np.where((by == NOBODY) | (by == self.me), self.me, MANY)

    def store(self, address: np.ndarray, size: int, name: str | None) -> None:
        self.launch.bytes_stored += address.size * size
        for region, part in self._split("store", address, size, name):
            region.stored += part.size * size
            cells = self._cells(region, part, size)
            for touched, told in (
                (region.writer, "stores where program {} stored"),
                (region.reader, "stores where program {} loaded"),
            ):
                by = touched[cells]
                wrong = (by != NOBODY) & (by != self.me)
                if wrong.any():
                    raise self._race(told, region, cells, by, wrong, name)
            region.writer[cells] = self.me
            self._mark_written(region, part, size)

    def atomic(self, address: np.ndarray, size: int, name: str | None) -> None:
        self.launch.atomics += address.size
        for region, part in self._split("atomic", address, size, name):
            self._check_written(region, part, size, name)
            cells = self._cells(region, part, size)
            by = region.writer[cells]
            wrong = (by > 0) & (by != self.me)
            if wrong.any():
                told = "updates atomically where program {} stored"
                raise self._race(told, region, cells, by, wrong, name)
            region.writer[cells] = ATOMICALLY

    def _race(
        self,
        told: str,
        region: _Region,
        cells: np.ndarray,
        by: np.ndarray,
        wrong: np.ndarray,
        name: str | None,
    ) -> KernelFault:
        other = int(by[wrong][0])
        who = {MANY: "another", ATOMICALLY: "another, atomically,"}.get(other) or str(
            self.program_of(other)
        )
        address = region.start + int(cells[wrong][0]) * region.unit
        return self._fault(f"race: {told.format(who)}", address, name or region.names[0])

    def program_of(self, number: int) -> tuple[int, int, int]:
        """Grid index of the program numbered from 1."""
        _, ny, nz = self.launch.grid
        rest, z = divmod(number - 1, nz)
        return rest // ny, rest % ny, z

    def _check_written(
        self, region: _Region, address: np.ndarray, size: int, name: str | None
    ) -> None:
        if region.written is None:
            return
        offset = (address - np.uint64(region.start)).astype(np.int64)
        unwritten = ~(region.written[offset] & region.written[offset + size - 1])
        if not unwritten.any():
            return
        offset = offset[unwritten]
        content = _bytes_at(region.start, region.end - region.start)
        inside = offset[:, None] + np.arange(size)
        poisoned = (content[inside] == POISON).all(1)
        if poisoned.any():
            at = region.start + int(offset[poisoned][0])
            raise self._fault("load of memory nobody has written", at, name or region.names[0])
        region.written[inside.ravel()] = True  # torch wrote it

    def _mark_written(self, region: _Region, address: np.ndarray, size: int) -> None:
        if region.written is None:
            return
        offset = (address - np.uint64(region.start)).astype(np.int64)
        for byte in range(size):
            region.written[offset + byte] = True

    def close(self) -> None:
        """Sum up the launch."""
        for region in self._regions:
            loaded = region.count(region.reader) * region.unit
            stored = region.count(region.writer) * region.unit
            self.launch.distinct_bytes_loaded += loaded
            self.launch.distinct_bytes_stored += stored
            self.launch.arguments[" ".join(region.names)] = {
                "loaded": region.loaded,
                "stored": region.stored,
                "distinct_loaded": loaded,
                "distinct_stored": stored,
            }
            self._fresh.drop_whole(region.start)


def watching_allocations(fresh: Allocations) -> list[tuple[Any, str, Callable]]:
    """Replacements of torch's functions that give out memory nobody wrote."""

    def watched(make: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            fresh.add(t)
            return t

        return call

    places: list[tuple[Any, str]] = [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ]
    return [(owner, name, watched(getattr(owner, name))) for owner, name in places]
