"""Triton's interpreter made quicker: its values' types are worked out once, not anew for each value.

Every block of values has a type, each with a shape of constexprs of its own.  Types do not change, so one object
stands for all that are equal, and lends what follows from it to the blocks that have it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream

BLOCK, POINTER, TENSOR = tl.core.block_type, tl.core.pointer_type, tl.core.tensor


def _plain(size: Any) -> Any:
    return size.value if isinstance(size, tl.constexpr) else size


def _one_of_each_block_type() -> None:
    known: dict[Any, Any] = {}
    original = BLOCK.__init__

    def key(element_ty: Any, shape: Any) -> Any:
        space = element_ty.address_space if isinstance(element_ty, POINTER) else None
        return element_ty.name, space, tuple(_plain(size) for size in _plain(shape))

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        found = known.get(key(element_ty, shape))
        return object.__new__(cls) if found is None else found

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        if "name" not in vars(self):
            original(self, element_ty, shape)
            known[key(element_ty, shape)] = self

    BLOCK.__new__, BLOCK.__init__ = new, init


def _itself_first(kind: Any, equal: Callable) -> None:
    """Nothing is compared with itself piece by piece."""
    original = kind.__eq__
    kind.__eq__ = lambda self, other: equal(True) if self is other else original(self, other)


def _tensors_of_a_type() -> None:
    original = TENSOR.__init__
    known: dict[int, dict[str, Any]] = {}  # by the type's identity: what is lent holds the type

    def init(self: Any, handle: Any, type: Any) -> None:
        lent = known.get(id(type))
        if lent is None:
            original(self, handle, type)
            if not isinstance(type, POINTER):  # made anew for each argument
                known[id(type)] = {k: v for k, v in vars(self).items() if k != "handle"}
        else:
            vars(self).update(lent)
            self.handle = handle

    TENSOR.__init__ = init


def _nothing_to_broadcast() -> None:
    original = TritonSemantic.broadcast_impl_value
    TritonSemantic.broadcast_impl_value = lambda self, lhs, rhs: (
        (lhs, rhs) if lhs.type is rhs.type else original(self, lhs, rhs)
    )


def _numpy_types() -> None:
    original = upstream._get_np_dtype
    known: dict[str, Any] = {}

    def get(kind: Any) -> Any:
        if isinstance(kind.scalar, POINTER):
            return original(kind)
        found = known.get(kind.scalar.name)
        if found is None:
            found = known[kind.scalar.name] = original(kind)
        return found

    upstream._get_np_dtype = get


class _Nothing:
    def restore(self) -> None:
        pass


def _patched_once() -> None:
    """Upstream patches triton.language at each call of a device function; once will do."""
    original = upstream._patch_lang
    modules = (id(tl), id(tl.core))
    functions: set[Any] = set()
    patched: set[frozenset[int]] = set()

    def patch(fn: Any) -> Any:
        if fn in functions:
            return _Nothing()
        functions.add(fn)
        seen = frozenset(id(m) for m in fn.__globals__.values() if id(m) in modules)
        if seen not in patched:
            original(fn)  # never restored: this process interprets, and does nothing else
            patched.add(seen)
            TENSOR.__index__ = lambda self: int(self.handle.data.item())
        return _Nothing()

    upstream._patch_lang = patch


def install(builder: Any) -> None:
    """Once a process."""
    _patched_once()
    _one_of_each_block_type()
    for kind in (tl.core.dtype, BLOCK, POINTER):
        _itself_first(kind, bool)
    _itself_first(tl.core.tuple, tl.constexpr)
    _tensors_of_a_type()
    _nothing_to_broadcast()
    _numpy_types()
    # without `debug` upstream works out each integer's overflow and drops it
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
