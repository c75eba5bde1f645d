"""A Gluon kernel for Hopper as Python: Triton's interpreter knows none of its operations.

    launch(module, "_attention_hopper_kernel", grid, seed, *arguments)

runs a module's kernel on the CPU, arguments Descriptor, Pointer and numbers.  Partitions of warps take turns
that the seed picks, at each of these operations.  What the hardware may do late is done late: a copy lands,
and meets its barrier, at any time after it is issued, its place nan until then; a product in flight is of
what its operands hold when it is issued, or when it is waited for.  Deadlock is raised where all partitions
wait, RuntimeError where a barrier, a product or a copy is misused.  Layouts are not looked at, numbers are float32 between the stores.
"""

import random
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Deadlock(RuntimeError):
    """Every partition waits for a barrier, and no copy is under way."""


class _Partition(threading.Thread):
    """One partition of a program's warps, which runs when it is its turn."""

    def __init__(
        self, program: "_Program", function: Callable[..., None], arguments: tuple[Any, ...]
    ):
        super().__init__(daemon=True)
        self.program, self.function, self.arguments = program, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.done = False
        self.flying: list[_Flight] = []

    def run(self) -> None:
        self.turn.acquire()
        try:
            if self.program.fault is None:
                with torch.no_grad():  # which a thread does not inherit
                    self.function(*self.arguments)
                    self.done = True
                    self.program.pass_turn()
        except SystemExit:
            pass
        except BaseException as fault:  # the launch raises it
            self.program.stop(fault)


class _Copy:
    """A copy under way; a slow one lands when nothing else can go on."""

    def __init__(self, land: Callable[[], None], slow: bool):
        self.land, self.slow = land, slow


class _Program:
    """One program: its partitions, and the copies under way."""

    def __init__(self, seed: object):
        self.random = random.Random(str(seed))
        self.partitions: list[_Partition] = []
        self.copies: list[_Copy] = []
        self.fault: BaseException | None = None

    def run(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.partitions = [_Partition(self, *part) for part in parts]
        for partition in self.partitions:
            partition.start()
        self.pass_turn()
        for partition in self.partitions:
            partition.join()
        if self.fault is not None:
            raise self.fault
        if self.copies:
            raise RuntimeError(f"{len(self.copies)} copies are under way where the program ends")

    def copy(self, land: Callable[[], None]) -> None:
        self.copies.append(_Copy(land, self.random.random() < 0.25))

    def land(self, copy: "_Copy") -> None:
        self.copies.remove(copy)
        copy.land()

    def pass_turn(self) -> None:
        """To a partition that can go on, copies landing between."""
        while not all(p.done for p in self.partitions):
            able = [p for p in self.partitions if not p.done and p.ready()]
            quick = [copy for copy in self.copies if not copy.slow]
            if self.copies and not able:
                self.land(self.random.choice(quick or self.copies))
            elif quick and self.random.random() < 0.3:
                self.land(self.random.choice(quick))
            elif able:
                self.random.choice(able).turn.release()
                return
            else:
                self.stop(Deadlock("every partition waits for a barrier"))
                raise SystemExit

    def wait(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Others' turn, until it is this partition's again and it is ready."""
        me = threading.current_thread()
        assert isinstance(me, _Partition)
        me.ready = ready
        self.pass_turn()
        me.turn.acquire()
        if self.fault is not None:
            raise SystemExit

    def stop(self, fault: BaseException) -> None:
        self.fault = self.fault or fault
        for partition in self.partitions:
            partition.turn.release()


_program = _Program(0)


def _step(ready: Callable[[], bool] = lambda: True) -> None:
    _program.wait(ready)


class Descriptor:
    """A tensor descriptor: blocks of `block` elements, zero past the tensor's ends."""

    layout = None

    def __init__(self, tensor: Tensor, block: Sequence[int]):
        self.tensor, self.dtype = tensor, tensor.dtype
        self.block = tuple(block)
        nbytes = torch.Size(block).numel() * tensor.element_size()
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def window(self, at: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Of the tensor, and of a block, what of the block at `at` lies within."""
        spans = [
            (min(int(a), n), min(int(a) + b, n))
            for a, b, n in zip(at, self.block, self.tensor.shape, strict=True)
        ]
        return tuple(slice(a, b) for a, b in spans), tuple(slice(0, b - a) for a, b in spans)


class Pointer:
    """Where elements of a dense tensor lie."""

    def __init__(self, tensor: Tensor, at: Tensor | int = 0):
        self.tensor, self.at = tensor.view(-1), at

    def __add__(self, offset: Tensor) -> "Pointer":
        return Pointer(self.tensor, self.at + offset)


class _Shared:
    """Shared memory, nan until it is written."""

    def __init__(self, data: Tensor):
        self.data, self.dtype, self.shape = data, data.dtype, tuple(data.shape)

    def index(self, i: int) -> "_Shared":
        return _Shared(self.data[int(i)])

    def reshape(self, shape: Sequence[int]) -> "_Shared":
        return _Shared(self.data.view(*shape))

    def permute(self, order: Sequence[int]) -> "_Shared":
        return _Shared(self.data.permute(*order))

    def store(self, x: Tensor) -> None:
        _step()
        self.data.copy_(x)

    def load(self, layout: None) -> Tensor:
        _step()
        return self.data.clone()


class _Barrier:
    """Completes a phase when `count` have arrived and all bytes that are expected have."""

    count = left = bytes = phase = 0

    def settle(self, arrived: int, nbytes: int) -> None:
        self.left, self.bytes = self.left - arrived, self.bytes + nbytes
        if self.left < 0:
            raise RuntimeError(f"more than {self.count} arrived at a barrier")
        if self.left == self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1


class _Barriers(list[_Barrier]):
    def index(self, i: int) -> _Barrier:  # type: ignore[override]
        return self[int(i)]


class _MBarrier:
    @staticmethod
    def MBarrierLayout() -> None:
        return None

    @staticmethod
    def init(barrier: _Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    @staticmethod
    def expect(barrier: _Barrier, nbytes: int) -> None:
        _step()
        barrier.settle(1, nbytes)

    @staticmethod
    def arrive(barrier: _Barrier) -> None:
        _step()
        barrier.settle(1, 0)

    @staticmethod
    def wait(barrier: _Barrier, phase: int) -> None:
        _step(lambda: barrier.phase != int(phase))


class _TMA:
    @staticmethod
    def async_copy_global_to_shared(
        source: Descriptor, at: Sequence[int], barrier: _Barrier, to: _Shared
    ) -> None:
        _step()
        there, here = source.window(at)
        to.data.fill_(float("nan"))

        def land() -> None:
            to.data.zero_()
            to.data[here] = source.tensor[there]
            barrier.settle(0, -source.block_type.nbytes)

        _program.copy(land)

    @staticmethod
    def async_copy_shared_to_global(to: Descriptor, at: Sequence[int], source: _Shared) -> None:
        _step()
        there, here = to.window(at)
        to.tensor[there] = source.data[here]

    @staticmethod
    def store_wait(pending: int) -> None:
        _step()


class _Flight:
    """A product under way."""

    result: Tensor | None = None

    def __init__(self, a: Any, b: _Shared, acc: Any):
        self.operands = a, b, acc

    def land(self) -> Tensor:
        """The result, of what the operands hold when this is first called."""
        if self.result is not None:
            return self.result
        a, b, acc = self.operands
        left = a.data if isinstance(a, _Shared) else a
        if isinstance(acc, _Flight):
            acc = acc.land()
        self.result = left.float() @ b.data.float() + (0 if acc is None else acc)
        return self.result


def _warpgroup_mma(
    a: Any, b: _Shared, acc: Any, use_acc: bool = True, is_async: bool = False
) -> Any:
    _step()
    flight = _Flight(a, b, acc if use_acc else None)
    if not is_async:
        return flight.land()
    if _program.random.random() < 0.5 and not isinstance(acc, _Flight):
        flight.land()
    threading.current_thread().flying.append(flight)  # type: ignore[attr-defined]
    return flight


def _warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    _step()
    flying = threading.current_thread().flying  # type: ignore[attr-defined]
    while len(flying) > outstanding:
        flying.pop(0).land()
    if any(x in flying for x in deps):
        raise RuntimeError("a product is used before it is waited for")
    results = tuple(x.result if isinstance(x, _Flight) else x for x in deps)
    return results[0] if len(results) == 1 else results


class _Language:
    """gluon.language's names."""

    float32, int64 = torch.float32, torch.int64
    constexpr = staticmethod(lambda x: x)
    static_range = range
    SliceLayout = DotOperandLayout = NVMMADistributedLayout = staticmethod(lambda *a: None)
    maximum = staticmethod(torch.maximum)
    exp2 = staticmethod(torch.exp2)
    log2 = staticmethod(torch.log2)
    where = staticmethod(torch.where)
    zeros = staticmethod(lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype))
    full = staticmethod(lambda shape, x, dtype, layout: torch.full(shape, x, dtype=dtype))
    arange = staticmethod(lambda start, end, layout: torch.arange(start, end))
    max = staticmethod(lambda x, axis: x.amax(axis))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    convert_layout = staticmethod(lambda x, layout: x)
    cdiv = staticmethod(lambda a, b: -(-a // b))
    warp_specialize = staticmethod(lambda parts, warps, registers: _program.run(parts))

    def __init__(self, at: tuple[int, int, int], grid: tuple[int, int, int]):
        self.program_id = lambda axis: torch.tensor(at[axis])
        self.num_programs = lambda axis: grid[axis]

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: None) -> Any:
        if dtype == torch.int64:
            return _Barriers(_Barrier() for _ in range(shape[0]))
        return _Shared(torch.full(shape, float("nan"), dtype=dtype))

    @staticmethod
    def load(at: Pointer, mask: Tensor, other: float) -> Tensor:
        assert isinstance(at.at, Tensor)
        return torch.where(mask, at.tensor[torch.where(mask, at.at, 0)], other)

    @staticmethod
    def store(to: Pointer, x: Tensor, mask: Tensor) -> None:
        assert isinstance(to.at, Tensor)
        to.tensor[to.at[mask]] = x[mask].to(to.tensor.dtype)


def launch(
    module: ModuleType, kernel: str, grid: tuple[int, int, int], seed: int, *arguments: Any
) -> None:
    """Every program of a grid, one after another.  What a partition raises is raised, Deadlock too."""
    global _program
    for at in ((x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])):
        names: dict[str, Any] = dict(vars(module)) | {
            "gl": _Language(at, grid),
            "tma": _TMA,
            "mbarrier": _MBarrier,
            "warpgroup_mma": _warpgroup_mma,
            "warpgroup_mma_wait": _warpgroup_mma_wait,
            "fence_async_shared": lambda: None,
        }
        for name, x in vars(module).items():
            if hasattr(x, "is_gluon"):
                names[name] = FunctionType(x.fn.__code__, names, name)
            elif type(x).__name__ == "constexpr":
                names[name] = x.value
        _program = _Program((seed, at))
        names[kernel](*arguments)
