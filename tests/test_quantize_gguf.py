"""A Llama quantised into a GGUF: its tensors to the bit, the model that is loaded of it here, by transformers and by
llama.cpp, its tokeniser, and what each mistake costs."""

import importlib.util
import json
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tilewright.bench.peers import Peer, smollm2
from tilewright.models import Llama
from tilewright.models._quantize import PLAN, quantize
from tilewright.models._tokenizer import PATTERNS, Tokenizer, _byte_level
from tilewright.quant import GGUFFile, gguf
from tilewright.quant.apply import QuantConfig
from tilewright.quant_tensor import QuantTensor, packed
from tilewright.testing import assert_within

SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=300, max_position_embeddings=64, initializer_range=0.2,
    bos_token_id=0, eos_token_id=1,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biased": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "yarn": transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=32, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(
        **SIZES, head_dim=128
    ),  # transformers reads no other of a GGUF
}
CONFIGS = {
    "rtn": QuantConfig(group=32),
    "8 bits": QuantConfig(bits=8, group=32),
    "gptq": QuantConfig("gptq", group=32),
    "awq": QuantConfig("awq", group=32),
}
TEXT = "The cat's 3 hats cost 1234 dollars,   and\n\n we'll see 57 of them: déjà vu! 日本語\n"


def ids(n: int = 8, S: int = 32) -> torch.Tensor:
    return torch.randint(0, 300, (n, S), generator=torch.Generator().manual_seed(3))


def byte_level(special: bool = True) -> tokenizers.Tokenizer:
    """A tokeniser of 280 tokens, GPT-2's way, that begins a text with <s>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, show_progress=False, special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", 0)]
        )
    return backend


def folder(path: Path, name: str = "tied", dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a family, norms and biases random too, with a tokeniser."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(path)
    byte_level().save(str(path / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(said))
    return path


# one tensor


def weight(bits: int, N: int = 10, K: int = 96) -> QuantTensor:
    """Every code, and scales of any sign and size, 0 among them."""
    codes = torch.arange(N * K).remainder(1 << bits).to(torch.uint8).view(N, K)
    scales = torch.randn(N, K // 32).half()
    scales[0, 0], scales[1, 1], scales[2, 2] = 0.0, 65504.0, 2.0**-24
    return QuantTensor(packed(codes, bits), scales, bits=bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tensor_is_written_to_the_bit(bits, tmp_path):
    w = weight(bits)
    name, blocks = gguf.write(w)
    kind = package.GGMLQuantizationType[name]
    assert name == {4: "Q4_0", 8: "Q8_0"}[bits] and blocks.dtype == np.uint8
    theirs = package.quants.dequantize(blocks, kind)
    assert torch.equal(torch.from_numpy(theirs), w.dequantize())
    writer = package.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "a.gguf")
    found = file.quantised(["w"])
    assert torch.equal(found.qweight, w.qweight) and torch.equal(found.scales, w.scales)
    assert np.array_equal(file.data("w"), blocks)


def test_what_is_no_block():
    w = weight(4)
    order = torch.arange(96, dtype=torch.int32).flip(0)
    wide = w.scales.float()
    for unlike, told in (
        (QuantTensor(w.qweight, w.scales[:, :1].contiguous()), "groups of 96"),
        (QuantTensor(w.qweight, w.scales, w.scales), "groups of 32 with zeros"),
        (QuantTensor(w.qweight, w.scales, minima=w.scales), "with minima"),
        (QuantTensor(w.qweight, w.scales, order=order), "with order"),
        (QuantTensor(w.qweight, w.scales, codebook=torch.zeros(16)), "with codebook"),
        (QuantTensor(w.qweight, wide + 2.0**-14 * wide), r"scales\[0, 1\] is .* float16"),
        (QuantTensor(w.qweight, w.scales / 0), r"scales\[0, 0\] is nan"),
    ):
        with pytest.raises(ValueError, match=f"gguf: .*{told}"):
            gguf.write(unlike)
    assert torch.equal(  # float32 that float16 holds
        torch.from_numpy(gguf.write(QuantTensor(w.qweight, wide))[1]),
        torch.from_numpy(gguf.write(w)[1]),
    )


# a model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_becomes_a_gguf(name, tmp_path):
    model = folder(tmp_path / "model", name)
    quantize(model, tmp_path / "m.gguf", CONFIGS["rtn"], format="gguf")
    quantize(model, tmp_path / "folder", CONFIGS["rtn"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "m.gguf", "model"]
    ours = Llama.from_pretrained(tmp_path / "m.gguf")
    twin = Llama.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(ours(ids(2)), twin(ids(2)))
    assert ours.config.eos == twin.config.eos and ours.context == twin.context
    file = GGUFFile(tmp_path / "m.gguf")
    kinds = {tensor: info.type for tensor, info in file.tensors.items()}
    assert {kind for tensor, kind in kinds.items() if "norm" in tensor or "bias" in tensor} == {
        "F32"
    }
    assert sum(kind == "Q4_0" for kind in kinds.values()) == 21
    assert file.metadata["general.file_type"] == package.LlamaFileType.MOSTLY_Q4_0
    assert ("output.weight" in kinds) == (name != "tied")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_methods(config, tmp_path):
    model = folder(tmp_path / "model")
    quantize(model, tmp_path / "m.gguf", config, calibration=ids(), format="gguf")
    quantize(model, tmp_path / "folder", config, calibration=ids())
    ours, twin = (Llama.from_pretrained(tmp_path / name) for name in ("m.gguf", "folder"))
    torch.testing.assert_close(ours(ids(2)), twin(ids(2)))
    for part in ("qkv", "o", "gate_up", "down"):
        a, b = (getattr(m.layers[1], part).weight for m in (ours, twin))
        assert torch.equal(a.qweight, b.qweight) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["tied", "llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_it(name, bits, tmp_path):
    """Another reader, with another's idea of the order of rows and of the names of metadata."""
    model = folder(tmp_path / "model", name)
    quantize(model, tmp_path / "m.gguf", QuantConfig(bits=bits, group=32), format="gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ours = Llama.from_pretrained(tmp_path / "m.gguf")(ids(2))
    with torch.no_grad():
        eager = theirs(ids(2)).logits.double()
        truth = theirs.double()(ids(2)).logits
    assert_within(ours.double(), eager, truth, torch.finfo(torch.float32).eps, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embeddings_stay_as_they_are(dtype, tmp_path):
    model = folder(tmp_path / "model", "llama", dtype)
    quantize(model, tmp_path / "m.gguf", CONFIGS["8 bits"], format="gguf")
    file = GGUFFile(tmp_path / "m.gguf")
    source = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    for name, layer in (("token_embd", source.model.embed_tokens), ("output", source.lm_head)):
        assert gguf.FLOAT_DTYPES[file.info(f"{name}.weight").type] == dtype
        assert torch.equal(file.dense(f"{name}.weight", dtype), layer.weight)


@pytest.mark.parametrize("name", ["llama3", "biased", "qwen2"])
def test_a_gguf_becomes_a_gguf(name, tmp_path):
    """Its metadata and what is not quantised are copied; llama3's divisors are a tensor among that."""
    model = folder(tmp_path / "model", name)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    quantize(model, first, CONFIGS["8 bits"], format="gguf")
    quantize(first, second, CONFIGS["gptq"], calibration=ids(), format="gguf")
    a, b = GGUFFile(first), GGUFFile(second)
    keys = a.metadata.keys() | b.metadata.keys()
    unlike = {k for k in keys if a.metadata.get(k) != b.metadata.get(k)}
    assert unlike == {"general.file_type"} and a.types == b.types
    assert b.metadata["general.file_type"] == package.LlamaFileType.MOSTLY_Q4_0
    assert a.tensors.keys() == b.tensors.keys()
    for tensor, info in b.tensors.items():
        if info.type != "Q4_0":
            assert np.array_equal(a.data(tensor), b.data(tensor))
            assert a.info(tensor).type == info.type
    assert ("rope_freqs.weight" in b.tensors) == (name == "llama3")
    if name != "llama3":  # whose rope a folder made of a GGUF does not have
        quantize(first, tmp_path / "folder", CONFIGS["gptq"], calibration=ids())
        ours, twin = (Llama.from_pretrained(path)(ids(2)) for path in (second, tmp_path / "folder"))
        torch.testing.assert_close(ours, twin)


def test_goes_on_where_it_was_stopped(tmp_path):
    class Stopped(Exception):
        pass

    def stop(done: int, whole: int) -> None:
        if done == 2:
            raise Stopped

    model, whole, out = folder(tmp_path / "model"), tmp_path / "whole.gguf", tmp_path / "m.gguf"
    layers = tmp_path / "m.gguf.layers"
    options = {"calibration": ids(), "format": "gguf"}
    quantize(model, whole, CONFIGS["awq"], **options)
    with pytest.raises(Stopped):
        quantize(model, out, CONFIGS["awq"], progress=stop, **options)
    kept = {f: f.stat().st_mtime_ns for f in layers.glob("*.safetensors")}
    assert len(kept) == 2 and (layers / PLAN).is_file() and not out.exists()
    with pytest.raises(ValueError, match=r"m\.gguf\.layers: was begun with another settings"):
        quantize(model, out, CONFIGS["gptq"], **options)
    with pytest.raises(Stopped):
        quantize(model, out, CONFIGS["awq"], progress=stop, **options)
    assert all(f.stat().st_mtime_ns == then for f, then in kept.items())
    quantize(model, out, CONFIGS["awq"], **options)
    assert out.read_bytes() == whole.read_bytes() and not layers.exists()
    with pytest.raises(ValueError, match=r"m\.gguf: is there, and was not begun by this command"):
        quantize(model, out, CONFIGS["awq"], **options)


def test_nothing_half_written(tmp_path, monkeypatch):
    model, out = folder(tmp_path / "model"), tmp_path / "m.gguf"

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        quantize(model, out, CONFIGS["rtn"], format="gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf.layers", "model"]
    monkeypatch.undo()
    quantize(model, out, CONFIGS["rtn"], format="gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "model"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (QuantConfig(group=64), "no group 64;"),
        (QuantConfig(group=-1, symmetric=False), "no group -1, no asymmetric;"),
        (QuantConfig("gptq", group=32, act_order=True), "no act_order;"),
        (QuantConfig("hqq", group=32, symmetric=False), "no method hqq, no asymmetric;"),
        (QuantConfig("smoothquant", bits=8, group=-1), "no method smoothquant, no group -1;"),
        (QuantConfig(group=32, scale_dtype=torch.float32), "no scale_dtype torch.float32;"),
    ],
)
def test_settings_that_do_not_fit(config, told, tmp_path):
    with pytest.raises(ValueError, match=f"quantize: format gguf has {told}"):
        quantize(
            folder(tmp_path / "m"), tmp_path / "m.gguf", config, calibration=ids(), format="gguf"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def with_config(path: Path, **change) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))


def test_models_that_do_not_fit(tmp_path):
    def refused(path: Path, told: str) -> None:
        with pytest.raises(ValueError, match=f"quantize: .*{told}") as caught:
            quantize(path, tmp_path / "m.gguf", CONFIGS["rtn"], format="gguf")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not list(tmp_path.glob("m.gguf*"))

    window = folder(tmp_path / "window", "mistral")
    with_config(window, sliding_window=16)
    refused(window, "sliding window, of 16 keys in a context of 64")
    dynamic = folder(tmp_path / "dynamic")
    with_config(dynamic, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    refused(dynamic, "cannot say its rope")
    partial = folder(tmp_path / "partial")
    with_config(partial, rope_parameters={"partial_rotary_factor": 0.5, "rope_theta": 1e4})
    refused(partial, "cannot say its rope")
    bare = folder(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    refused(bare, "there is no tokenizer.json")
    other = folder(tmp_path / "other")
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(
        str(other / "tokenizer.json")
    )
    refused(other, "tokenizer.json: a GGUF is written of byte-level BPE, not of WordLevel")
    large = folder(tmp_path / "large")
    backend = byte_level()
    backend.add_tokens([f"<{i}>" for i in range(30)])
    backend.save(str(large / "tokenizer.json"))
    refused(large, "token 300, '<19>', is outside the model's 300")


# its tokeniser


def test_the_tokeniser_is_written(tmp_path):
    model = folder(tmp_path / "model")
    quantize(model, tmp_path / "m.gguf", CONFIGS["rtn"], format="gguf")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    ours = Llama.from_pretrained(tmp_path / "m.gguf").tokenizer
    theirs = Tokenizer.from_folder(model)
    for text in (TEXT, f"a<tool>{TEXT}</s>", ""):
        for special in (True, False):
            assert ours.encode(text, special=special) == theirs.encode(text, special=special)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos, ours.eos, ours.chat_template) == (0, 1, theirs.chat_template)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 1] and types[280:] == [4] + [5] * 19
    assert metadata["tokenizer.ggml.tokens"][280:282] == ["<tool>", "[PAD281]"]
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("pre", sorted(PATTERNS))
def test_pre_tokenisers_have_names(pre):
    """One that our reader splits as it does this one."""
    file = byte_level(special=False)
    told = json.loads(file.to_str())["model"]
    tokens = sorted(told["vocab"], key=told["vocab"].get)
    backend = _byte_level(tokens, [" ".join(pair) for pair in told["merges"]], pre)
    found = Tokenizer(backend, eos=1).to_gguf(300, (1, 5, 6))
    name = found["tokenizer.ggml.pre"]
    assert PATTERNS[name] == PATTERNS[pre] and name != "default"
    assert found["tokenizer.ggml.eot_token_id"] == 5
    assert found["tokenizer.ggml.add_bos_token"] is False
    again = Tokenizer.from_gguf(found, "here")
    assert again.encode(TEXT) == backend.encode(TEXT).ids


def test_pre_tokenisers_without_a_name():
    backend = byte_level()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    assert Tokenizer(backend).to_gguf(300)["tokenizer.ggml.pre"] == "smollm"
    for change in (
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), level])},
        {"pre_tokenizer": level, "normalizer": normalizers.Lowercase()},
    ):
        for name, value in change.items():
            setattr(backend, name, value)
        with pytest.raises(ValueError, match="a GGUF names how text is split, and none of"):
            Tokenizer(backend).to_gguf(300)


# SmolLM2, and a real text

POSITIONS, AGREED = 384, 0.98


@pytest.fixture(scope="module", params=[4, 8])
def real(request, tmp_path_factory) -> tuple[Path, list[int], torch.Tensor]:
    """SmolLM2 quantised again, the tokens of a text, and our logits after each."""
    out = tmp_path_factory.mktemp("real") / "m.gguf"
    quantize(smollm2(), out, QuantConfig(bits=request.param, group=32), format="gguf")
    ours = Llama.from_pretrained(out)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    prompt = ours.tokenizer.encode(text)[:POSITIONS]
    assert len(prompt) == POSITIONS
    return out, prompt, ours(torch.tensor([prompt]))[0]


@pytest.mark.slow
def test_transformers_prefers_the_same_tokens(real):
    out, prompt, ours = real
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out.parent, gguf_file=out.name, dtype=torch.float32
    )
    with torch.inference_mode():
        found = theirs(torch.tensor([prompt])).logits[0]
    assert float((found.argmax(-1) == ours.argmax(-1)).float().mean()) >= AGREED


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_llama_cpp_prefers_the_same_tokens(real):
    """Where rounding the activations to 8 bits, as llama.cpp does, cannot decide: where our first choice leads the
    second by more than twice what it changes a logit in the root mean square."""
    out, prompt, ours = real
    rounded = Llama.from_pretrained(out, activations="int8")(torch.tensor([prompt]))[0]
    noise = (rounded - ours).square().mean(-1).sqrt()
    first, second = ours.topk(2, -1).values.unbind(-1)
    decided = first - second > 2 * noise
    assert int(decided.sum()) >= 200
    with Peer("llama.cpp", out, torch.get_num_threads()) as peer:
        theirs = torch.tensor(peer.ask("choices", prompt)["choices"])
    agreed = theirs == ours.argmax(-1)
    assert float(agreed[decided].float().mean()) >= AGREED, f"{agreed.sum()} of all {POSITIONS}"
