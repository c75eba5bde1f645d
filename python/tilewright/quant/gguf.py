"""GGUF: metadata as Python values, tensors as QuantTensor or float, read through a memory map; `write` gives
a tensor's blocks.

The `gguf` package parses the file; this module bounds every read, keeps string arrays as plain lists
(the package makes two arrays a string: 98,000 objects for a tokeniser), and converts tensors a
megabyte at a time, giving mapped pages back, so that loading never holds the file twice.

_gguf_blocks.py has the types of blocks.
"""

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from tilewright.quant._gguf_blocks import KINDS
from tilewright.quant._words import unusable
from tilewright.quant_tensor import OFFSETS, QuantTensor, packed

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_RANK = 4  # ggml's
CHUNK = 1 << 20  # bytes of the map read before they are given back


class TensorInfo(NamedTuple):
    """One tensor of the file: its type's name, shape (rows first), and bytes."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Reader(GGUFReader):
    """GGUFReader that refuses to read past the end, and reads arrays into plain lists."""

    def __init__(self, path: Path) -> None:
        self.arrays: dict[int, list[Any]] = {}  # offset of a field's value -> its elements
        super().__init__(path)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        offset, count = int(offset), int(count)
        end = offset + np.dtype(dtype).itemsize * count
        if end > len(self.data):
            raise ValueError(f"truncated: bytes {offset} to {end} of {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)

    def _get_str(self, offset: int) -> Any:
        found = super()._get_str(offset)
        _text(bytes(found[1]), offset)
        return found

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        start = int(orig_offs)
        if _value_type(raw_type, start) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(start, np.uint32), self._get(start + 4, np.uint64)]
        kind, count, offset = _value_type(head[0][0], start), int(head[1][0]), start + 12
        values: list[Any]
        if kind == GGUFValueType.STRING:
            order = "big" if self.byte_order == "S" else "little"
            raw, values = self.data._mmap, []  # type: ignore[attr-defined]
            for _ in range(count):
                end = offset + 8
                end += int.from_bytes(raw[offset:end], order)  # type: ignore[arg-type]
                if end > len(self.data):
                    raise ValueError(f"truncated: bytes {offset} to {end} of {len(self.data)}")
                values.append(_text(raw[offset + 8 : end], offset))
                offset = end
        else:
            if kind not in self.gguf_scalar_to_np:
                raise ValueError(f"array of {kind.name} at byte {start}")
            array = self._get(offset, self.gguf_scalar_to_np[kind], count)
            values, offset = array.tolist(), offset + array.nbytes
        self.arrays[start] = values
        return offset - start, head, [], [GGUFValueType.ARRAY, kind]

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        for field in fields:
            name = field.name
            shape = tuple(int(d) for d in reversed(field.parts[3].tolist()))
            code = int(field.parts[4][0])
            known = code in GGMLQuantizationType._value2member_map_
            kind = GGMLQuantizationType(code).name if known else f"number {code}"
            if name in self.infos:
                raise ValueError(f"tensor {name} is there twice")
            if len(shape) > MAX_RANK or not all(0 < size < 1 << 63 for size in shape):
                raise ValueError(f"tensor {name} has shape {list(shape[: MAX_RANK + 1])}")
            count = math.prod(shape)
            if kind in FLOAT_DTYPES:
                nbytes = count * FLOAT_DTYPES[kind].itemsize
            elif kind in KINDS:
                block = KINDS[kind]
                if not shape or shape[-1] % block.weights:
                    raise ValueError(f"tensor {name}: {kind} rows of {shape} are not whole blocks")
                nbytes = count // block.weights * block.nbytes
            else:
                known_types = ", ".join((*FLOAT_DTYPES, *KINDS))
                raise ValueError(f"tensor {name} has type {kind}; readable are {known_types}")
            offset = int(start_offs) + int(field.parts[5][0])
            if offset + nbytes > len(self.data):
                raise ValueError(
                    f"truncated: tensor {name} is bytes {offset} to {offset + nbytes} "
                    f"of {len(self.data)}"
                )
            self.infos[name] = TensorInfo(kind, shape, offset, nbytes)


def _text(data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text at byte {offset} is not UTF-8: {error.reason}") from error


def _value_type(code: int, offset: int) -> GGUFValueType:
    if int(code) not in GGUFValueType._value2member_map_:
        raise ValueError(f"a value of type number {int(code)} at byte {offset}")
    return GGUFValueType(code)


class GGUFFile:
    """A GGUF file: `metadata` (key -> value), `types` (key -> GGUF's types of it, an array's and its
    elements'), and `tensors` (name -> TensorInfo).

    Raises FileNotFoundError where there is no such file, ValueError where it is truncated, corrupt,
    big-endian, or holds a tensor of a type other than F32, F16, BF16 and those of _gguf_blocks.py.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            reader = _Reader(self.path)
            self.metadata = {
                name: reader.arrays[int(field.offset) + 12 + int(field.parts[0][0])]
                if field.types[:1] == [GGUFValueType.ARRAY]
                else field.contents()
                for name, field in reader.fields.items()
            }
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            # a KeyError's text is its argument in quotes
            message = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise ValueError(f"{self.path}: not a readable GGUF file: {message}") from error
        if reader.byte_order == "S":
            raise ValueError(f"{self.path}: GGUF of the other byte order")
        self.types = {name: tuple(field.types) for name, field in reader.fields.items()}
        self.tensors = reader.infos
        self._map: np.memmap = reader.data
        self._release(0, len(self._map))

    def info(self, name: str) -> TensorInfo:
        """The entry of tensor `name`.  Raises ValueError where the file has none."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]

    def data(self, name: str) -> np.ndarray:
        """The bytes of tensor `name` as the file has them, uint8 [N, bytes of a row] or [bytes], mapped."""
        info = self.info(name)
        flat = self._map[info.offset : info.offset + info.nbytes]
        return flat.reshape(*info.shape[:-1], -1)

    def _chunks(self, name: str, rows: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """(destination rows, their bytes [n, bytes of a row]), a fresh tensor each time."""
        info = self.info(name)
        count = info.shape[0] if len(info.shape) > 1 else 1
        table = self._map[info.offset : info.offset + info.nbytes].reshape(count, -1)
        step = max(1, CHUNK // table.shape[1])
        order = None if rows is None else rows.numpy()
        for begin in range(0, count, step):
            part = slice(begin, min(begin + step, count))
            picked = table[part] if order is None else table[order[part]]
            yield part, torch.from_numpy(np.array(picked, subok=False))
            if order is None:
                self._release(info.offset + begin * table.shape[1], picked.nbytes)
        self._release(info.offset, info.nbytes)

    def _release(self, offset: int, nbytes: int) -> None:
        """Give mapped pages back: they count as resident memory until then."""
        page = mmap.PAGESIZE
        begin = offset // page * page
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map._mmap.madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)  # type: ignore[attr-defined]

    def dense(self, name: str, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """Tensor `name` in `dtype`, dequantised where it is quantised; `rows` [N] int reorders it.

        Raises ValueError where the file has no such tensor.
        """
        info = self.info(name)
        if info.type in KINDS:
            return self.quantised([name], [rows]).dequantize(dtype)
        out = torch.empty(info.shape, dtype=dtype)
        flat = out.view(info.shape[0] if len(info.shape) > 1 else 1, -1)
        if rows is not None and len(info.shape) == 1:
            return self.dense(name, dtype)[rows]
        for part, data in self._chunks(name, rows):
            flat[part] = data.view(FLOAT_DTYPES[info.type])
        return out

    def quantised(
        self, names: Sequence[str], rows: Sequence[Tensor | None] | None = None
    ) -> QuantTensor:
        """Tensors of one quantised type and width, stacked along their rows; codes bit-exact.

        rows[i], where given, is the order [N] in which to read the rows of names[i].  Raises
        ValueError where types or widths differ, one is no quantised matrix, or a scale or minimum is nan
        or infinite.
        """
        infos = [self.info(name) for name in names]
        kinds = {(info.type, info.shape[-1:]) for info in infos}
        if len(kinds) > 1 or infos[0].type not in KINDS or any(len(i.shape) != 2 for i in infos):
            told = ", ".join(
                f"{n} {i.type} {list(i.shape)}" for n, i in zip(names, infos, strict=True)
            )
            raise ValueError(f"{self.path}: not quantised matrices of one type and width: {told}")
        kind, K = KINDS[infos[0].type], infos[0].shape[1]
        N, G = sum(info.shape[0] for info in infos), K // kind.group
        qweight = torch.empty(N, K * kind.bits // 8, dtype=torch.uint8)
        scales = torch.empty(N, G, dtype=kind.scale_dtype)
        minima = torch.empty_like(scales) if kind.minima else None
        first = 0
        for i, name in enumerate(names):
            for part, data in self._chunks(name, rows[i] if rows else None):
                found = kind.decode(data.view(data.shape[0], -1, kind.nbytes))
                here = slice(first + part.start, first + part.stop)
                qweight[here], scales[here] = packed(found.codes, kind.bits), found.scales
                if minima is not None and found.minima is not None:
                    minima[here] = found.minima
            here = slice(first, first + infos[i].shape[0])
            for what, t in (("scale", scales), ("minimum", minima)):
                if t is not None and (bad := unusable(t[here])) is not None:
                    (row, group), value = bad
                    if rows and (order := rows[i]) is not None:
                        row = int(order[row])
                    raise ValueError(
                        f"{self.path}: tensor {name}: the {what} of row {row}, group {group} is {value}"
                    )
            first += infos[i].shape[0]
        return QuantTensor(qweight, scales, minima=minima, bits=kind.bits)


def write(w: QuantTensor) -> tuple[str, np.ndarray]:
    """(type, blocks uint8 [N, bytes of a row]) of w: Q4_0 where its codes have 4 bits, Q8_0 where 8.

    What `GGUFFile.quantised` reads, to the bit.  Raises ValueError where w has offsets, an order of columns,
    groups of other than 32, or scales that float16 does not hold.
    """
    N, K = w.shape
    if not w.symmetric or w.order is not None or w.group != 32:
        found = [n for n in (*OFFSETS, "order") if getattr(w, n) is not None]
        raise ValueError(
            f"gguf: a weight {[N, K]} in groups of {w.group}"
            f"{' with ' + ', '.join(found) if found else ''}; Q4_0 and Q8_0 have symmetric groups of 32"
        )
    scales = w.plain_scales().cpu()
    halves = scales.to(torch.float16)
    wrong = (halves.to(scales.dtype) != scales) | ~halves.isfinite()
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"gguf: scales{list(at)} is {scales[at].item()}, which float16 does not hold"
        )
    codes = w.codes().cpu().view(N, -1, 32)
    if w.bits == 4:
        name, stored = "Q4_0", codes[..., :16] | codes[..., 16:] << 4
    else:
        name, stored = "Q8_0", codes ^ 128
    blocks = torch.cat((halves.contiguous().view(torch.uint8).view(N, -1, 2), stored), -1)
    return name, blocks.flatten(1).numpy()
