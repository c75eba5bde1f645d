"""quant/gguf.py: codes bit-exact against the gguf package's own dequantisation; bad files refused."""

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tilewright import ops
from tilewright.quant import GGUFFile, _gguf_blocks

QTYPES = ["Q8_0", "Q4_0", "Q4_1"]
MORE_TYPES = ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
N, K = 70, 96


def qtype(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **metadata) -> Path:
    """A GGUF of tensors {name: (float32 array, type)} and metadata (int, float, str, list)."""
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        data = gguf.quants.quantize(array, qtype(kind)) if kind != "F32" else array
        writer.add_tensor(name, data, raw_dtype=qtype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)


@pytest.mark.parametrize("kind", QTYPES)
def test_quantised_is_bit_exact(tmp_path, matrix, kind):
    file = GGUFFile(write(tmp_path / "a.gguf", {"w": (matrix, kind)}))
    weight = file.quantised(["w"])
    truth = gguf.quants.dequantize(gguf.quants.quantize(matrix, qtype(kind)), qtype(kind))
    assert weight.bits == (8 if kind == "Q8_0" else 4) and weight.group == 32
    assert weight.scales.dtype == torch.float16
    assert torch.equal(weight.dequantize(), torch.from_numpy(truth))
    assert torch.equal(file.dense("w", torch.float32), torch.from_numpy(truth))


@pytest.mark.parametrize("kind", [*QTYPES, *MORE_TYPES])
def test_every_bit_pattern_is_bit_exact(tmp_path, kind):
    """Blocks of any bytes at all, but for their float16s, which are finite: no quantiser fills every field."""
    block = _gguf_blocks.KINDS[kind]
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, (N, 3 * block.nbytes), dtype=np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind, (0, 2))
    for i in range(3):
        for byte in at if block.minima or len(at) == 1 else at[:1]:
            half = rng.normal(0, 1, N).astype(np.float16).view(np.uint8).reshape(N, 2)
            data[:, i * block.nbytes + byte :][:, :2] = half
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=qtype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weight = GGUFFile(tmp_path / "a.gguf").quantised(["w"])
    assert (weight.bits, weight.group) == (block.bits, block.group)
    truth = torch.from_numpy(gguf.quants.dequantize(data, qtype(kind)))
    assert torch.equal(weight.dequantize(), truth)
    x = torch.eye(weight.in_features)
    assert torch.equal(ops.quant_linear(x, weight).t(), truth)


@pytest.mark.parametrize("kind", QTYPES)
def test_stacks_and_reorders_rows_in_chunks(tmp_path, matrix, kind, monkeypatch):
    monkeypatch.setattr("tilewright.quant.gguf.CHUNK", 300)  # several chunks a tensor
    file = GGUFFile(write(tmp_path / "a.gguf", {"a": (matrix, kind), "b": (-matrix, kind)}))
    order = torch.randperm(N)
    both = file.quantised(["a", "b"], [order, None]).dequantize()
    alone = [file.quantised([name]).dequantize() for name in "ab"]
    assert torch.equal(both, torch.cat((alone[0][order], alone[1])))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats(tmp_path, matrix, kind):
    row = matrix[0].copy()
    file = GGUFFile(write(tmp_path / "a.gguf", {"w": (matrix, kind), "v": (row, kind)}))
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    for name, array in (("w", matrix), ("v", row)):
        assert torch.equal(file.dense(name, dtype), torch.from_numpy(array).to(dtype))
    order = torch.randperm(N)
    assert torch.equal(file.dense("w", dtype, order), file.dense("w", dtype)[order])


def test_metadata(tmp_path):
    words, numbers = ["a", "é", ""], [3, 1, 2]
    path = write(tmp_path / "a.gguf", {}, t__words=words, t__numbers=numbers, t__x=0.5, t__on=True)
    found = GGUFFile(path).metadata
    assert found["t.words"] == words and found["t.numbers"] == numbers
    assert found["t.x"] == 0.5 and found["t.on"] is True
    assert found["general.architecture"] == "llama"


def test_bad_files(tmp_path, matrix):
    path = write(tmp_path / "a.gguf", {"w": (matrix, "Q8_0")}, t__words=["hello", "world"])
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
        GGUFFile(tmp_path / "none.gguf")
    bad = tmp_path / "bad.gguf"
    for name, data in {
        "empty": b"",
        "other": b"PK\3\4" * 99,
        "version": whole[:4] + b"\x63" + whole[5:],
    }.items():
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.gguf: not a readable GGUF"):
            GGUFFile(bad), name
    for size in range(1, len(whole) - N * K, 7):  # every kind of cut before the data's end
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bad\.gguf"):
            GGUFFile(bad)
    bad.write_bytes(whole[:-64])
    with pytest.raises(ValueError, match="truncated: tensor w is bytes"):
        GGUFFile(bad)
    at = (
        whole.index(b"\x01\0\0\0\0\0\0\0w") + 9 + 4 + 16
    )  # the type, after name, rank and two sizes
    bad.write_bytes(whole[:at] + b"\x10" + whole[at + 1 :])
    with pytest.raises(ValueError, match="tensor w has type IQ2_XXS; readable are"):
        GGUFFile(bad)
    bad.write_bytes(whole[:at] + b"\xee" + whole[at + 1 :])
    with pytest.raises(ValueError, match="tensor w has type number 238"):
        GGUFFile(bad)


def header(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def entry(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: bytes = b"w") -> bytes:
    """A tensor's entry; ggml's sizes run the other way."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, offset)


HUGE = 2**64 - 1
KEY = struct.pack("<Q", 1) + b"k"
CORRUPT = {
    "more tensors than bytes": header(HUGE, 0),
    "more keys than bytes": header(0, HUGE),
    "key longer than the file": header(0, 1) + struct.pack("<Q", HUGE),
    "string longer than the file": header(0, 1) + KEY + struct.pack("<IQ", 8, HUGE) + bytes(99),
    "numbers past the end": header(0, 1) + KEY + struct.pack("<IIQ", 9, 4, HUGE) + bytes(99),
    "strings past the end": header(0, 1) + KEY + struct.pack("<IIQ", 9, 8, HUGE) + bytes(99),
    "an array of arrays": header(0, 1) + KEY + struct.pack("<IIQ", 9, 9, 1) + bytes(99),
    "a value of no type": header(0, 1) + KEY + struct.pack("<I", 99) + bytes(99),
    "a key not in UTF-8": header(0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(99),
    "alignment of no power of two": header(0, 1)
    + struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 3) + bytes(99),
    "two tensors of a name": header(2, 0) + 2 * entry((4,)) + bytes(99),
    "a name longer than the file": header(1, 0) + struct.pack("<Q", HUGE) + bytes(99),
    "more dimensions than bytes": header(1, 0) + KEY + struct.pack("<I", 2**32 - 1) + bytes(99),
    "five dimensions": header(1, 0) + entry((1,) * 5) + bytes(99),
    "a size of zero": header(1, 0) + entry((0, 4)) + bytes(99),
    "zero bytes of huge sizes": header(1, 0) + entry((HUGE, 0)) + bytes(99),
    "sizes whose product wraps to zero": header(1, 0) + entry((2**32, 2**32)) + bytes(99),
    "sizes whose product wraps to few": header(1, 0) + entry((2**62 + 1, 4)) + bytes(99),
    "an offset past the end": header(1, 0) + entry((4,), offset=999) + bytes(99),
    "an offset that wraps": header(1, 0) + entry((4,), offset=HUGE - 15) + bytes(99),
    "the last byte past the end": header(1, 0) + entry((8,), offset=25) + bytes(63),
    "rows of half a block": header(1, 0) + entry((2, 16), kind=8) + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("data", CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_files_are_refused(tmp_path, data):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.gguf: not a readable GGUF file: .") as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value)


def test_noise_never_crashes(tmp_path, matrix):
    path = write(tmp_path / "a.gguf", {"w": (matrix, "Q4_1")}, t__words=["hello"], t__n=[1, 2])
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    bad = tmp_path / "bad.gguf"
    for _ in range(200):
        noisy = bytearray(whole)
        for at in generator.integers(0, len(whole) - N * K // 2, 4):
            noisy[at] = generator.integers(256)
        bad.write_bytes(noisy)
        try:
            file = GGUFFile(bad)
            for name in file.tensors:
                file.dense(name, torch.float32)
        except ValueError as error:
            assert "\n" not in str(error) and "bad.gguf" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("kind", "at", "told"),
    [("Q8_0", 0, "scale"), ("Q4_0", 0, "scale"), ("Q4_1", 2, "minimum"), ("Q5_0", 0, "scale")],
)
def test_scales_that_are_no_numbers(tmp_path, matrix, kind, at, told, value):
    block = _gguf_blocks.KINDS[kind]
    blocks = gguf.quants.quantize(matrix, qtype(kind))
    where = slice(block.nbytes + at, block.nbytes + at + 2)  # of row 5's second block
    blocks[5, where] = np.array([value], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("first", gguf.quants.quantize(matrix, qtype(kind)), raw_dtype=qtype(kind))
    writer.add_tensor("w", blocks, raw_dtype=qtype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    wanted = f"a.gguf: tensor w: the {told} of row 5, group 1 is {value}"
    for rows in (None, [None, torch.randperm(N)]):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            file.quantised(["first", "w"], rows)
    with pytest.raises(ValueError, match=re.escape(wanted)):
        file.dense("w", torch.float32)


@pytest.mark.parametrize("kind", QTYPES)
def test_a_block_of_zeros(tmp_path, kind):
    """Whose scale is 0, as llama.cpp writes it."""
    file = GGUFFile(write(tmp_path / "a.gguf", {"w": (np.zeros((2, 64), np.float32), kind)}))
    weight = file.quantised(["w"])
    assert not weight.scales.any() and not weight.dequantize().any()


def test_wrong_requests(tmp_path, matrix):
    tensors = {"a": (matrix, "Q8_0"), "b": (matrix, "Q4_1"), "c": (matrix, "F32")}
    file = GGUFFile(write(tmp_path / "a.gguf", tensors))
    with pytest.raises(ValueError, match=r"a\.gguf: tensor none is missing"):
        file.dense("none", torch.float32)
    for names in (["a", "b"], ["c"]):
        with pytest.raises(ValueError, match="not quantised matrices of one type and width"):
            file.quantised(names)
