"""Triton's interpreter, made to tell the truth about kernels.

`install()` mends the interpreter of this process (one started with TRITON_INTERPRET=1):

- bfloat16 is right in arithmetic, reductions, scans, casts and tl.dot (upstream works on its bits as
  integers); float8 casts round to nearest even and saturate, as PTX's do; tl.dot rounds float32
  operands to TF32 where the kernel asks for it, and its sums once, alike in every tile, as a GPU that adds
  in the order of k does; tl.maximum and tl.minimum lose nan, as PTX's max and min do;
- every address of a load, store or atomic lies in the storage of the argument it was made from;
- no load reads memory that torch.empty gave out and nobody has written since;
- no two programs store to one address, nor does one store what another loads, without an atomic;
- programs run in an order shuffled by a seed;
- bytes, distinct bytes, atomics and FLOPs of tl.dot are counted, and what Triton would compile the
  kernel for is noted (`recording`); a large grid may be sampled (`sampling`).

A fault raises KernelFault, which names kernel, program, argument and offset.  For the interpreters of
triton 3.6 to 3.9: methods of the builder are replaced, and what they do not know is upstream's.
"""

import functools
import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as upstream
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from tilewright.lab import _quick
from tilewright.lab._floats import FLOAT8, narrow, tf32, to_float8, to_float32, widen
from tilewright.lab._memory import Allocations, KernelFault, Launch, Memory, watching_allocations

__all__ = ["KernelFault", "Launch", "install", "recording", "sampling", "seed", "watching"]

TF32 = upstream._ir.INPUT_PRECISION.TF32


class _State:
    """Of the interpreter: one launch at a time."""

    def __init__(self) -> None:
        self.fresh = Allocations()
        self.memory: Memory | None = None
        self.records: list[list[Launch]] = []
        self.seed: int | None = 0
        self.most: int | None = None  # programs of a launch that run; None: all
        self.grid = (0, 0, 0)
        self.order = np.zeros(0, np.int64)  # the programs that run, by number


_state = _State()


def _is_bf16(handle: Any) -> bool:
    return getattr(handle, "dtype", None) is not None and handle.dtype.scalar == tl.bfloat16


class _Builder(upstream.InterpreterBuilder):
    """upstream's builder with sound numbers and watched memory."""

    # numbers

    def get_bf16(self, value: float) -> Any:
        return upstream.TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)

    def _wide(self, op: Callable, *handles: Any) -> Any:
        out = op(*(widen(h.data) if _is_bf16(h) else h.data for h in handles))
        return out if out.dtype == np.bool_ else narrow(out)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable) -> Any:
        if not _is_bf16(lhs):
            with np.errstate(all="ignore"):
                return super().binary_op(lhs, rhs, op)
        with np.errstate(all="ignore"):
            return upstream.TensorHandle(self._wide(op, lhs, rhs), tl.bfloat16)

    def ternary_op(self, lhs: Any, rhs: Any, other: Any, op: Callable) -> Any:
        if op is np.where or not _is_bf16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return upstream.TensorHandle(self._wide(op, lhs, rhs, other), tl.bfloat16)

    def unary_op(self, arg: Any, op: Callable) -> Any:
        with np.errstate(all="ignore"):
            if not _is_bf16(arg):
                return super().unary_op(arg, op)
            return upstream.TensorHandle(self._wide(op, arg), tl.bfloat16)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return upstream.TensorHandle(self._wide(lambda a, b, c: a * b + c, x, y, z), tl.bfloat16)

    def create_erf(self, arg: Any) -> Any:
        if not _is_bf16(arg):
            return super().create_erf(arg)
        return upstream.TensorHandle(self._wide(upstream.np_erf_fp32, arg), tl.bfloat16)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            with np.errstate(all="ignore"):
                return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return upstream.TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        wide = upstream.TensorHandle(widen(src.data), tl.float32)
        with np.errstate(all="ignore"):
            return super().cast_impl(wide, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if rounding_mode == upstream._ir.ROUNDING_MODE.RTZ:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if target in FLOAT8 and (source not in FLOAT8):
            data = to_float8(to_float32(src.data, source), target)
        elif source in FLOAT8 or tl.bfloat16 in (source, target):
            wide = to_float32(src.data, source)
            data = (
                narrow(wide)
                if target == tl.bfloat16
                else wide.astype(upstream._get_np_dtype(target))
            )
        else:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return upstream.TensorHandle(data, target)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        left, right = a.data, b.data
        if a.dtype.scalar in FLOAT8 or _is_bf16(a):
            left = to_float32(left, a.dtype.scalar)
        if b.dtype.scalar in FLOAT8 or _is_bf16(b):
            right = to_float32(right, b.dtype.scalar)
        if input_precision == TF32 and left.dtype == np.float32 and not _is_bf16(a):
            left, right = tf32(left), tf32(right)
        if _state.memory is not None:
            _state.memory.launch.dot_flops += 2 * left.size * right.shape[-1]
        with np.errstate(all="ignore"):
            if not _is_bf16(d):
                return upstream.TensorHandle(
                    _product(left, right, d.data.dtype) + d.data, d.dtype.scalar
                )
            out = _product(left, right, np.float32) + widen(d.data)
        return upstream.TensorHandle(narrow(out), tl.bfloat16)

    # programs

    def set_grid_dim(self, nx: int, ny: int, nz: int) -> None:
        super().set_grid_dim(*_state.grid)  # not the line of programs that upstream walks

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        _, ny, nz = _state.grid
        number = int(_state.order[x])
        rest, z = divmod(number, nz)
        x, y = divmod(rest, ny)
        super().set_grid_idx(x, y, z)
        if _state.memory is not None:
            _state.memory.program, _state.memory.me = (x, y, z), number + 1

    # memory

    def _watch(self, kind: str, ptrs: Any, mask: Any) -> None:
        memory = _state.memory
        if memory is None:
            return
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        address = np.asarray(ptrs.data)
        # a mask that a scalar was broadcast into comes as integers
        chosen = None if mask is None else np.asarray(mask.data).astype(bool)
        if chosen is None or chosen.all():
            address = address.ravel()
        else:
            address = address[np.broadcast_to(chosen, address.shape)]
        if address.size:
            getattr(memory, kind)(address, size, _argument(ptrs))

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        self._watch("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        self._watch("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest)

    def create_atomic_rmw(self, rmw: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        self._watch("atomic", ptr, mask)
        return super().create_atomic_rmw(rmw, ptr, val, mask, *rest)

    def create_atomic_cas(self, ptr: Any, *rest: Any) -> Any:
        self._watch("atomic", ptr, None)
        return super().create_atomic_cas(ptr, *rest)


def _product(left: np.ndarray, right: np.ndarray, dtype: Any) -> np.ndarray:
    """The matrix product, of float32 rounded once: a CPU's own rounds by the shape of the tile it is in, and
    scores computed again in another tile would then not be the same."""
    if dtype != np.float32:
        return np.matmul(left, right, dtype=dtype)
    return np.matmul(left, right, dtype=np.float64).astype(np.float32)


def _argument(handle: Any) -> str | None:
    """The argument a pointer was made from: remembered on the way, or the one that begins there."""
    name: str | None = handle.attr.get("argument")
    if name is None and _state.memory is not None and handle.data.size == 1:
        name = _state.memory.name_at(int(handle.data.flat[0]))
    return name


def _remembering(name: str, position: int) -> Callable:
    """The builder's method, whose result keeps the argument its pointer operand was made from."""
    original = getattr(upstream.InterpreterBuilder, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        source = args[position]
        if _state.memory is not None and isinstance(source.dtype, tl.pointer_type):
            argument = _argument(source)
            if argument is not None:
                result.set_attr("argument", argument)
        return result

    return method


for _name, _position in (
    ("create_addptr", 0),
    ("create_bitcast", 0),
    ("create_splat", 1),
    ("create_unsplat", 0),
    ("create_broadcast", 0),
    ("create_expand_dims", 0),
    ("create_reshape", 0),
    ("create_trans", 0),
):
    if hasattr(upstream.InterpreterBuilder, _name):
        setattr(_Builder, _name, _remembering(_name, _position))


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, tuple):
            yield from _tensors({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif isinstance(value, TensorDescriptor):
            yield from _tensors({name: value.base})
        elif hasattr(value, "data_ptr"):
            yield name, upstream._unwrap_tensor(value)


def _cause(error: BaseException | None) -> KernelFault | None:
    while error is not None and not isinstance(error, KernelFault):
        error = error.__cause__
    return error


def _line_of_programs(grid: Any, launch: Launch) -> Callable:
    """The programs that run, as a grid of one dimension; the true one is kept."""

    def line(args: dict[str, Any]) -> tuple[int]:
        dims = tuple(grid(args) if callable(grid) else grid)
        x, y, z = _state.grid = launch.grid = dims + (1,) * (3 - len(dims))
        count = x * y * z
        launch.programs = count if _state.most is None else min(count, _state.most)
        # of a sample, programs evenly apart
        order = np.arange(launch.programs) * count // max(1, launch.programs)
        if _state.seed is not None:
            start = [_state.seed, zlib.crc32(launch.kernel.encode())]
            order = np.random.default_rng(start).permutation(order)
        _state.order = order
        return (launch.programs,)

    return line


def _note(launch: Launch, executor: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """What Triton's compiler would be given for these arguments."""
    names = inspect.getfullargspec(executor.fn).args
    launch.options = {key: value for key, value in kwargs.items() if key not in names}
    known = {key: value for key, value in kwargs.items() if key in names}
    for name, value in inspect.getcallargs(executor.fn, *args, **known).items():
        if name in executor.constexprs or value is None:
            launch.constants[name] = value
        elif isinstance(value, int) and not isinstance(value, bool) and value == 1:
            launch.constants[name] = 1
        else:
            launch.signature[name] = mangle_type(value)
            number = value.data_ptr() if hasattr(value, "data_ptr") else value
            if isinstance(number, int) and number % 16 == 0:
                launch.divisible.append(name)


def _watched_call(original: Callable) -> Callable:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launch = Launch(self.fn.__name__, self.fn.__module__)
        if _state.records:
            _note(launch, self, args, kwargs)
        self.grid = _line_of_programs(self.grid, launch)
        # what a program left out would have written is not missed
        fresh = _state.fresh if _state.most is None else Allocations()
        memory = _state.memory = Memory(launch, fresh)
        try:
            result = original(self, *args, **kwargs)
        except upstream.InterpreterError as error:
            fault = _cause(error)
            if fault is None:
                raise
            raise fault from None
        finally:
            _state.memory = None
        memory.close()
        for records in _state.records:
            records.append(launch)
        return result

    return call


def _watched_arguments(original: Callable) -> Callable:
    def call(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = original(self, args, kwargs)
        assert _state.memory is not None
        for name, t in _tensors(inspect.getcallargs(self.fn, *args, **kwargs)):
            _state.memory.add(name, t)
        return args, kwargs

    return call


def _sound_apply(original: Callable) -> Callable:
    """Reductions and scans of bfloat16, in float32 and rounded once."""

    def apply_impl(self: Any, input: Any) -> Any:
        if not any(t.dtype.scalar == tl.bfloat16 for t in input):
            with np.errstate(all="ignore"):
                return original(self, input)
        wide = tuple(
            self.to_tensor(widen(t.handle.data), tl.float32) if _is_bf16(t.handle) else t
            for t in input
        )
        out = original(self, wide)
        parts = list(out) if isinstance(out, (list, tuple)) else [out]
        for i, (t, was) in enumerate(zip(parts, input, strict=False)):
            if _is_bf16(was.handle) and t.dtype.scalar == tl.float32:
                kind = tl.block_type(tl.bfloat16, t.shape) if t.type.is_block() else tl.bfloat16
                handle = upstream.TensorHandle(narrow(t.handle.data), tl.bfloat16)
                parts[i] = tl.core.tensor(handle, kind)
        return parts if isinstance(out, (list, tuple)) else parts[0]

    return apply_impl


def install() -> None:
    """Mend the interpreter of this process; again is nothing."""
    builder = upstream.interpreter_builder
    if isinstance(builder, _Builder):
        return
    builder.__class__ = _Builder
    executor = upstream.GridExecutor
    executor.__call__ = _watched_call(executor.__call__)
    executor._init_args_hst = _watched_arguments(executor._init_args_hst)
    _quick.install(builder)
    for kind in (upstream.ReduceOps, upstream.ScanOps):
        kind.apply_impl = _sound_apply(kind.apply_impl)


@contextmanager
def watching() -> Iterator[None]:
    """Within it, memory that torch.empty and its like give out must be written before it is read."""
    places = watching_allocations(_state.fresh)
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]
    for owner, name, watched in places:
        setattr(owner, name, watched)
    try:
        yield
    finally:
        for owner, name, original in before:
            if original is None:  # inherited
                delattr(owner, name)
            else:
                setattr(owner, name, original)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches made within it."""
    records: list[Launch] = []
    _state.records.append(records)
    try:
        yield records
    finally:
        _state.records.remove(records)


@contextmanager
def seed(number: int | None) -> Iterator[None]:
    """Within it, programs run in this shuffle; None: in the grid's order."""
    before, _state.seed = _state.seed, number
    try:
        yield
    finally:
        _state.seed = before


@contextmanager
def sampling(most: int | None) -> Iterator[None]:
    """Within it, at most so many programs of a launch run, evenly apart; the rest of its results is
    left unwritten, and its counts are the sample's (Launch.programs of its grid)."""
    before, _state.most = _state.most, most
    try:
        yield
    finally:
        _state.most = before
