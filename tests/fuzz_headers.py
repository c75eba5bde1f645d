"""Damaged headers of GGUF and safetensors files, by seed, and what loading one does.

    python fuzz_headers.py BASE KIND FIRST LAST

loads the mutants of seeds FIRST to LAST - 1 of the model at BASE, in a process that has little memory beyond what
the model takes, and a limited time for each: it prints each seed before, what was wrong, and DONE at the end.
"""

import json
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tilewright.models import Llama
from tilewright.models._quantize import quantize
from tilewright.quant.apply import QuantConfig

KINDS = ("gguf", "gptq", "compressed-tensors")
SPECIAL = (0, 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 256, 4, 2, 2, 48
MEMORY = 128 << 20  # bytes beyond what the base took: the files have less than one million
SECONDS = 20  # of processor time for one mutant

# the bases

ROPES: dict[str, dict[str, Any]] = {
    "gptq": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "compressed-tensors": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip


def weights() -> dict[str, tuple[int, ...]]:
    """Hugging Face's names of a small Llama's tensors, and their shapes."""
    kv = HIDDEN * KV_HEADS // HEADS
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        found |= {f"{at}{n}_layernorm": (HIDDEN,) for n in ("input", "post_attention")}
        found |= {f"{at}self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qo"}
        found |= {f"{at}self_attn.{n}_proj": (kv, HIDDEN) for n in "kv"}
        found |= {f"{at}mlp.{n}_proj": (FFN, HIDDEN) for n in ("gate", "up")}
        found[f"{at}mlp.down_proj"] = (HIDDEN, FFN)
    return {f"{name}.weight": shape for name, shape in found.items()}


def make_folder(path: Path, format: str) -> Path:
    """A quantised folder of one file."""
    plain = path.with_name(f"{path.name}-plain")
    plain.mkdir()
    torch.manual_seed(0)
    save_file(
        {n: torch.randn(shape) for n, shape in weights().items()}, plain / "model.safetensors"
    )
    config = {
        "model_type": "llama" if format == "gptq" else "mistral", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_parameters": ROPES[format], "eos_token_id": 0, "sliding_window": 16, "hidden_act": "silu",
    }  # fmt: skip
    (plain / "config.json").write_text(json.dumps(config))
    act_order = format == "gptq"
    settings = QuantConfig("rtn" if not act_order else "gptq", group=32, symmetric=not act_order)
    ids = torch.arange(VOCAB).view(2, -1)
    quantize(plain, path, settings, calibration=ids, format=format)
    tensors: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (path / "model.safetensors.index.json").unlink()
    save_file(tensors, path / "model.safetensors")
    shutil.rmtree(plain)
    return path


GGUF_TYPES = {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q8_0", "attn_output": "Q4_1",
              "ffn_gate": "Q5_1", "ffn_up": "F16", "ffn_down": "Q6_K", "token_embd": "BF16"}  # fmt: skip


def make_gguf(path: Path) -> Path:
    """A GGUF of seven types of tensors, with a tokeniser."""
    from tilewright.models.llama import GGUF_NAMES

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": LAYERS, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": 16,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    letters = [chr(ord("a") + i) for i in range(26)]
    writer.add_token_list(["<s>", "</s>", *letters, *(a + "b" for a in letters[: VOCAB - 28])])
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges([f"{a} b" for a in letters[: VOCAB - 28]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_array("general.tags", ["small", "of no use"])
    writer.add_uint64("general.parameter_count", 1 << 20)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_chat_template("{{ messages }}")
    for name, shape in weights().items():
        parts = name.removesuffix(".weight").split(".")
        layer = ".".join(parts[3:])
        theirs = GGUF_NAMES[layer or ".".join(parts)]
        kind = gguf.GGMLQuantizationType[GGUF_TYPES.get(theirs, "F32")]
        if kind.name == "Q6_K":  # which the package does not make: any bytes with finite scales
            data = rng.integers(0, 64, (shape[0], shape[1] // 256 * 210), dtype=np.uint8)
        else:
            data = gguf.quants.quantize(rng.normal(0, 1, shape).astype(np.float32), kind)
        full = f"blk.{parts[2]}.{theirs}.weight" if layer else f"{theirs}.weight"
        writer.add_tensor(full, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# a GGUF's mutants


class Field(NamedTuple):
    """A number, or the bytes of a text, in the header: `what` is count, length, type, size, offset, value or text."""

    what: str
    at: int
    width: int


SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # types' widths
STRING, ARRAY = 8, 9


def fields(data: bytes) -> tuple[list[Field], list[tuple[Field, Field]]]:
    """Every field of a whole GGUF's header; the names and types of its tensors."""
    found, at = [Field("count", 4, 4), Field("count", 8, 8), Field("count", 16, 8)], 24

    def number(what: str, width: int) -> int:
        nonlocal at
        found.append(Field(what, at, width))
        at += width
        return int.from_bytes(data[at - width : at], "little")

    def text() -> Field:
        nonlocal at
        length = number("length", 8)
        found.append(Field("text", at, length))
        at += length
        return found[-1]

    def value(kind: int) -> None:
        if kind == STRING:
            text()
        elif kind == ARRAY:
            inner, count = number("type", 4), number("length", 8)
            for _ in range(count):
                value(inner)
        else:
            number("value", SCALARS[kind])

    tensors, keys = struct.unpack_from("<QQ", data, 8)
    for _ in range(keys):
        text()
        value(number("type", 4))
    named = []
    for _ in range(tensors):
        name = text()
        for _ in range(number("length", 4)):
            number("size", 8)
        number("type", 4)
        named.append((name, found[-1]))
        number("offset", 8)
    return found, named


def put(data: bytearray, field: Field, value: int) -> None:
    data[field.at : field.at + field.width] = (value % (1 << 8 * field.width)).to_bytes(
        field.width, "little"
    )


def flip(data: bytearray, rng: random.Random, end: int) -> None:
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data[rng.randrange(min(end, len(data)))] = rng.randrange(256)


def of_gguf(whole: bytes, rng: random.Random) -> bytes:
    """The file with its header, or seldom its data, damaged."""
    data = bytearray(whole)
    every, named = fields(whole)
    end = every[-1].at + 8
    numbers = [f for f in every if f.what != "text"]
    texts = [f for f in every if f.what == "text" and f.width]
    for _ in range(rng.choice((1, 1, 1, 2))):
        way = rng.choice(
            (
                "flip",
                "number",
                "near",
                "long",
                "truncated",
                "swapped",
                "types",
                "twice",
                "utf8",
                "moved",
                "data",
            )
        )
        field = rng.choice(numbers)
        if way == "flip":
            flip(data, rng, end)
        elif way == "number":
            put(data, field, rng.choice(SPECIAL))
        elif way == "near":
            now = int.from_bytes(data[field.at : field.at + field.width], "little")
            put(data, field, now + rng.choice((-1, 1, 32, 1 << 20)))
        elif way == "long":
            field = rng.choice([f for f in numbers if f.what in ("length", "size", "offset")])
            put(data, field, len(whole) - field.at + rng.randrange(-8, 9))
        elif way == "truncated":
            del data[rng.randrange(len(data)) :]
            break
        elif way == "swapped":
            (_, a), (_, b) = rng.sample(named, 2)
            data[a.at : a.at + 4], data[b.at : b.at + 4] = (
                data[b.at : b.at + 4],
                data[a.at : a.at + 4],
            )
        elif way == "types":
            put(data, rng.choice([f for f in numbers if f.what == "type"]), rng.randrange(42))
        elif way == "twice":
            a = rng.choice(texts)
            b = rng.choice([f for f in texts if f.width == a.width])
            data[b.at : b.at + b.width] = whole[a.at : a.at + a.width]
        elif way == "utf8":
            text = rng.choice(texts)
            data[text.at + rng.randrange(text.width)] = rng.choice((0xFF, 0xC0, 0x80, 0))
        elif way == "moved":
            at = rng.randrange(24, end)
            data[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
            break  # fields are elsewhere now
        else:
            flip(data, rng, len(data))
    return bytes(data)


# a folder's mutants

ODD = ("yarn", "dynamic", "llama3", "longrope", "mistral", "qwen3", "re:(", None, True, -1, 0, 1, 3, *SPECIAL[2:], 1 << 100, 0.5, 1e308, float("inf"), float("nan"), "", "x", "64", "\ud800",
       [], [1], ["x"], {}, {"x": 1})  # fmt: skip
DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL",
          "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "X", "")  # fmt: skip


def of_json(text: bytes, rng: random.Random, inner: Callable[[Any, random.Random], None]) -> bytes:
    """A JSON object damaged as text, or by `inner`."""
    way = rng.choice(("text", "cut", "utf8", "twice", *["inner"] * 6))
    data = bytearray(text)
    if way == "text":
        flip(data, rng, len(data))
    elif way == "cut":
        del data[rng.randrange(len(data)) :]
    elif way == "utf8":
        data[rng.randrange(len(data))] = rng.choice((0xFF, 0xC0, 0x80, 0))
    else:
        told = json.loads(text)
        if way == "inner":
            for _ in range(rng.choice((1, 1, 2))):
                inner(told, rng)
        data = bytearray(json.dumps(told), "utf-8")
        if way == "twice":
            key = rng.choice(list(told))
            data[-1:] = (
                f", {json.dumps(key)}: {json.dumps(told[rng.choice(list(told))])}}}".encode()
            )
    return bytes(data)


def change_config(told: dict[str, Any], rng: random.Random) -> None:
    where = told
    while True:
        key = rng.choice(list(where))
        if not isinstance(where[key], dict) or not where[key] or rng.random() < 0.2:
            break
        where = where[key]
    if rng.random() < 0.1:
        del where[key]
    else:
        where[key] = rng.choice(ODD)


def change_tensors(told: dict[str, Any], rng: random.Random) -> None:
    names = [name for name in told if isinstance(told[name], dict) and "shape" in told[name]]
    name = rng.choice(names)
    entry = told[name]
    part = rng.choice(
        ("shape", "shape", "data_offsets", "data_offsets", "dtype", "dtype", "entry", "swap")
    )
    if part in ("shape", "data_offsets") and isinstance(entry.get(part), list) and entry[part]:
        sizes, i = entry[part], rng.randrange(len(entry[part]))
        way = rng.random()
        if way < 0.5:
            sizes[i] = rng.choice((*SPECIAL, sizes[i] + 1, sizes[i] - 1, -1, 0.5, None, "1"))
        elif way < 0.7:
            sizes.reverse()
        elif way < 0.8:
            sizes.append(1)
        else:
            entry[part] = rng.choice(([], sizes[:1], sizes * 40, [0] * len(sizes)))
    elif part == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif part == "swap":
        other = rng.choice(names)
        told[name], told[other] = told[other], told[name]
    elif rng.random() < 0.5:
        del told[name]
    else:
        told[name] = rng.choice(ODD)


def of_safetensors(whole: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", whole)
    header, rest = whole[8 : 8 + length], whole[8 + length :]
    way = rng.choice(("length", "cut", "data", *["header"] * 7))
    if way == "length":
        size = rng.choice(
            (*SPECIAL, length + 1, length - 1, len(whole), len(whole) - 8, rng.randrange(length))
        )
        return struct.pack("<Q", size) + whole[8:]
    if way == "cut":
        return whole[: rng.randrange(len(whole))]
    if way == "data":
        data = bytearray(whole)
        flip(data, rng, len(data))
        return bytes(data)
    header = of_json(header, rng, change_tensors)
    return struct.pack("<Q", len(header)) + header + rest


def mutant(base: Path, at: Path, seed: int) -> Path:
    """The mutant of a seed, at a path of that name."""
    rng = random.Random(seed)
    if base.is_file():
        at.write_bytes(of_gguf(base.read_bytes(), rng))
        return at
    at.mkdir(exist_ok=True)
    config, weights = base / "config.json", base / "model.safetensors"
    told, whole = config.read_bytes(), weights.read_bytes()
    if rng.random() < 0.4:
        told = of_json(told, rng, change_config)
    else:
        whole = of_safetensors(whole, rng)
    (at / config.name).write_bytes(told)
    (at / weights.name).write_bytes(whole)
    return at


# what loading does


def outcome(path: Path) -> str:
    """loaded, refused, or what is wrong."""
    try:
        logits = Llama.from_pretrained(path)(torch.zeros(1, 1, dtype=torch.long))
    except (ValueError, OSError) as error:  # FileNotFoundError is one
        told = str(error)
        return (
            "refused"
            if str(path) in told and "\n" not in told
            else f"{type(error).__name__}: {told!r}"
        )
    except BaseException as error:  # a panic of Rust's is no Exception
        return f"{type(error).__name__}: {error!r}"
    return "loaded" if logits.shape == (1, 1, VOCAB) else f"logits {list(logits.shape)}"


def main(base: Path, kind: str, first: int, last: int) -> None:
    if outcome(base) != "loaded":
        sys.exit(f"the base: {outcome(base)}")
    if Path("/proc/self/statm").is_file():
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY,) * 2)
    scratch = base.with_name(f"mutant-{first}" + (".gguf" if kind == "gguf" else ""))
    counts = {"loaded": 0, "refused": 0}
    for seed in range(first, last):
        print("seed", seed, flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found = outcome(mutant(base, scratch, seed))
        signal.setitimer(signal.ITIMER_PROF, 0)
        if found in counts:
            counts[found] += 1
        else:
            print("WRONG", seed, found, flush=True)
    print("DONE", json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
