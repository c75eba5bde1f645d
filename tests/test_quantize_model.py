"""A Llama quantised into a folder: it loads here, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from tilewright import ops
from tilewright.models import Llama
from tilewright.models._quantize import PLAN, quantize
from tilewright.nn import QuantLinear
from tilewright.quant import checkpoint, gptq, quantisers
from tilewright.quant.apply import QuantConfig

SIZES = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, max_position_embeddings=64,
)  # fmt: skip
CONFIGS = {
    "rtn": QuantConfig(group=32),
    "asymmetric": QuantConfig(group=32, symmetric=False),
    "8 bits by row": QuantConfig(bits=8, group=-1),
    "gptq": QuantConfig("gptq", group=32),
    "act-order": QuantConfig("gptq", group=32, act_order=True),
    "awq": QuantConfig("awq", group=32),
    "hqq": QuantConfig("hqq", group=32, symmetric=False),
    "smoothquant": QuantConfig("smoothquant", bits=8, group=-1),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, eos_token_id=0)
    whole = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if name.endswith("norm.weight"):
                weight[::13] *= 8
    whole.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ids(n: int = 8, S: int = 32) -> torch.Tensor:
    return torch.randint(0, 96, (n, S), generator=torch.Generator().manual_seed(3))


def lost(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).square().sum() / truth.square().sum())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_methods(config, model, tmp_path):
    told = []
    out = tmp_path / "out"
    format = {"hqq": "hqq", "gptq": "gptq"}.get(config.method, "compressed-tensors")
    quantize(
        model, out, config, calibration=ids(), format=format, progress=lambda *x: told.append(x)
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)] and not (out / PLAN).exists()
    truth = Llama.from_pretrained(model)(ids(4))
    found = Llama.from_pretrained(out)
    assert found.activations == config.activations
    layers = [m for m in found.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 12 and {m.bits for m in layers} == {config.bits}
    assert lost(found(ids(4)), truth) < (0.001 if config.bits == 8 else 0.1)


def test_activations_by_token_are_rounded_in_the_norm(model, tmp_path, monkeypatch):
    """Where no gradient is wanted; else in the layer, of the norm's output: the same but for float32's rounding."""
    quantize(model, tmp_path / "out", CONFIGS["smoothquant"], calibration=ids())
    found = Llama.from_pretrained(tmp_path / "out")
    assert {layer.qkv.activations for layer in found.layers} == {"int8_token"}
    called = []
    fused = ops.rms_norm_int8
    monkeypatch.setattr(ops, "rms_norm_int8", lambda *a, **k: called.append(1) or fused(*a, **k))
    y = found(ids(2))
    assert len(called) == 2 * len(found.layers)
    found.embedding.weight.requires_grad_()
    apart = found(ids(2))
    assert len(called) == 2 * len(found.layers) and lost(y, apart.detach()) < 1e-4
    (grad,) = torch.autograd.grad(apart.sum(), found.embedding.weight)
    assert grad.isfinite().all() and grad.any()
    found.embedding.weight.requires_grad_(False)
    plain = Llama.from_pretrained(tmp_path / "out", activations="float")
    assert plain.activations == "float" and lost(plain(ids(2)), y) < 1e-3
    quantize(model, tmp_path / "by group", CONFIGS["rtn"])
    by_group = Llama.from_pretrained(tmp_path / "by group", activations="int8_token")
    blocks = Llama.from_pretrained(tmp_path / "by group", activations="int8")
    assert by_group.activations == "int8" and torch.equal(by_group(ids(2)), blocks(ids(2)))


def test_a_folder_of_layers_by_token_and_others(model, tmp_path):
    """compressed-tensors' groups: each layer takes its input as its weight can."""
    from tilewright.interop.transformers_quantizer import load_quantized

    folders = {name: tmp_path / name for name in ("smoothquant", "rtn")}
    for name, out in folders.items():
        quantize(model, out, CONFIGS[name], calibration=ids())
    config, mixed = (
        json.loads((folders[n] / "config.json").read_text()) for n in ("rtn", "smoothquant")
    )
    settings = mixed["quantization_config"]
    settings["format"] = "mixed-precision"
    by_group = config["quantization_config"]["config_groups"]["group_0"]
    settings["config_groups"]["group_1"] = by_group | {"targets": [r"re:.*layers\.1\..*"]}
    (folders["smoothquant"] / "config.json").write_text(json.dumps(mixed))
    index = folders["smoothquant"] / "model.safetensors.index.json"
    told, other = (
        json.loads(index.read_text()),
        json.loads((folders["rtn"] / index.name).read_text()),
    )
    file = next(f for n, f in other["weight_map"].items() if ".layers.1." in n)
    (folders["smoothquant"] / "other.safetensors").write_bytes((folders["rtn"] / file).read_bytes())
    kept = {n: f for n, f in told["weight_map"].items() if ".layers.1." not in n}
    moved = {n: "other.safetensors" for n in other["weight_map"] if ".layers.1." in n}
    index.write_text(json.dumps(told | {"weight_map": kept | moved}))
    found = Llama.from_pretrained(folders["smoothquant"])
    taken = [layer.qkv.activations for layer in found.layers]
    assert taken == ["int8_token", "int8", "int8_token"] and found.activations == "int8_token"
    theirs = load_quantized(folders["smoothquant"])
    layers = [layer.mlp.up_proj.activations for layer in theirs.model.layers]
    assert layers == taken
    with torch.no_grad():
        assert lost(found(ids(2)), theirs(ids(2)).logits) < 1e-4


@pytest.mark.parametrize(
    ("weights", "inputs", "wanted"),
    [
        ({"num_bits": 8, "strategy": "channel", "symmetric": True}, ("token", True), "int8_token"),
        ({"num_bits": 8, "strategy": "channel", "symmetric": False}, ("token", True), "int8"),
        ({"num_bits": 8, "strategy": "channel"}, ("token", True), "int8_token"),
        ({"num_bits": 4, "strategy": "group", "symmetric": True}, ("token", True), "int8"),
        ({"num_bits": 8, "strategy": "channel", "symmetric": True}, ("tensor", False), "int8"),
        ({"num_bits": 8, "strategy": "channel", "symmetric": True}, None, "float"),
    ],
)
def test_activations_that_a_folder_says(weights, inputs, wanted):
    rows = None
    if inputs is not None:
        rows = {"num_bits": 8, "type": "int", "strategy": inputs[0], "dynamic": inputs[1]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": rows}}
    assert checkpoint.activations({"config_groups": groups}) == wanted


def test_gptq_loses_less_than_rtn(model, tmp_path):
    truth = Llama.from_pretrained(model)(ids(4))
    errors = {}
    for name in ("rtn", "gptq", "awq"):
        quantize(model, tmp_path / name, CONFIGS[name], calibration=ids())
        errors[name] = lost(Llama.from_pretrained(tmp_path / name)(ids(4)), truth)
    assert errors["gptq"] < errors["rtn"] and errors["awq"] < errors["rtn"], errors


@pytest.mark.parametrize("name", ["rtn", "asymmetric", "8 bits by row", "awq"])
def test_gptq_files(name, model, tmp_path):
    """The same numbers as compressed-tensors'."""
    for format in ("gptq", "compressed-tensors"):
        quantize(model, tmp_path / format, CONFIGS[name], calibration=ids(), format=format)
    a, b = (Llama.from_pretrained(tmp_path / f)(ids(2)) for f in ("gptq", "compressed-tensors"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_quantised_keeps_its_dtype(dtype, model, tmp_path):
    whole = transformers.LlamaForCausalLM.from_pretrained(model, dtype=dtype)
    whole.save_pretrained(tmp_path / "theirs")
    quantize(tmp_path / "theirs", tmp_path / "out", CONFIGS["awq"], calibration=ids())
    kinds = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as f:
            kinds |= {name: f.get_tensor(name).dtype for name in f.keys()}  # noqa: SIM118
    plain = {n: d for n, d in kinds.items() if n.endswith((".weight", ".bias"))}
    assert len(plain) == 8 and set(plain.values()) == {dtype}
    scales = {d for n, d in kinds.items() if n.endswith("weight_scale")}
    assert scales == {torch.float16}


def test_a_quantised_head_is_the_head(model, tmp_path):
    """Not the embedding, where its weight has another name than a float's."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(model)
    theirs.config.tie_word_embeddings = False
    head = torch.randn(96, 64)
    theirs.lm_head.weight = torch.nn.Parameter(head)
    theirs.save_pretrained(tmp_path / "untied")
    quantize(tmp_path / "untied", tmp_path / "out", CONFIGS["rtn"], format="gptq")
    layer = gptq.write(quantisers.rtn(head, group=32))
    file = next((tmp_path / "out").glob("model-00004*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors | {f"lm_head.{n}": t for n, t in layer.items()}, file)
    index = tmp_path / "out/model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["weight_map"]["lm_head.weight"]
    told["weight_map"] |= {f"lm_head.{n}": file.name for n in layer}
    index.write_text(json.dumps(told))
    found = Llama.from_pretrained(tmp_path / "out")
    assert isinstance(found.head, QuantLinear)
    assert torch.equal(found.head.weight.dequantize(), gptq.read(
        layer, {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}).dequantize())  # fmt: skip


def test_another_model_of_the_same_sizes_and_name(model, tmp_path):
    other = tmp_path / "b" / "model"
    whole = transformers.LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        whole.model.layers[1].mlp.up_proj.weight[5, 5] += 1
    whole.save_pretrained(other)

    def stop(done: int, whole: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, CONFIGS["rtn"], progress=stop)
    with pytest.raises(ValueError, match="was begun with another weights"):
        quantize(other, out, CONFIGS["rtn"])


def test_a_layer_that_cannot_be_read_is_made_again(model, tmp_path):
    def stop(done: int, whole: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole, parts = model / "whole", model / "parts"  # within the model's own folder
    quantize(model, whole, CONFIGS["gptq"], calibration=ids(), format="gptq")
    with pytest.raises(KeyboardInterrupt):
        quantize(model, parts, CONFIGS["gptq"], calibration=ids(), format="gptq", progress=stop)
    first, second = sorted(parts.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:300])
    second.write_bytes(b"")
    (parts / f"{PLAN}.part").write_bytes(b"{")
    quantize(model, parts, CONFIGS["gptq"], calibration=ids(), format="gptq")
    for file in whole.iterdir():
        assert file.read_bytes() == (parts / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["rtn", "gptq", "act-order", "awq"])
def test_goes_on_where_it_was_stopped(name, model, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done: int, whole: int) -> None:
        if done == 2:
            raise Stopped

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    format = "gptq" if name == "act-order" else "compressed-tensors"
    quantize(model, whole, CONFIGS[name], calibration=ids(), format=format)
    with pytest.raises(Stopped):
        quantize(model, parts, CONFIGS[name], calibration=ids(), format=format, progress=stop)
    kept = {f: f.stat().st_mtime_ns for f in parts.glob("*.safetensors")}
    assert len(kept) == 2 and (parts / PLAN).is_file() and not (parts / "config.json").exists()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Llama.from_pretrained(parts)
    for other, told, more in (
        (CONFIGS["asymmetric"], "settings", ids()),
        (CONFIGS[name], "calibration", ids(4)),
        (CONFIGS[name], "calibration", ids().view(4, 64)),
    ):
        with pytest.raises(ValueError, match=f"parts: was begun with another {told}"):
            quantize(model, parts, other, calibration=more, format=format)
    quantize(model, parts, CONFIGS[name], calibration=ids(), format=format)
    assert all(f.stat().st_mtime_ns == then for f, then in kept.items())
    files = sorted(f.name for f in whole.iterdir())
    assert files == sorted(f.name for f in parts.iterdir())
    for file in files:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


def test_a_folder_that_holds_something_else(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letters.txt").write_text("dear")
    before = {f.name: f.read_bytes() for f in model.iterdir()}
    with pytest.raises(ValueError, match="was not begun by this command"):
        quantize(model, out, CONFIGS["rtn"])
    with pytest.raises(ValueError, match="was not begun by this command"):
        quantize(model, model, CONFIGS["rtn"])
    assert [f.name for f in out.iterdir()] == ["letters.txt"]
    assert before == {f.name: f.read_bytes() for f in model.iterdir()}


@pytest.mark.parametrize(
    ("config", "more", "told"),
    [
        (QuantConfig(group=48), {}, "groups of 48 do not divide the model's 64 inputs"),
        (QuantConfig("gptq", group=32), {}, "gptq needs a calibration"),
        (QuantConfig(group=32), {"format": "exl2"}, "format 'exl2' is none of"),
        (CONFIGS["hqq"], {}, "hqq's zero-points are no whole numbers"),
        (
            CONFIGS["act-order"],
            {"format": "hqq", "calibration": ids()},
            "format hqq has no act_order",
        ),
        (
            CONFIGS["smoothquant"],
            {"calibration": ids(), "format": "gptq"},
            "format gptq cannot say that inputs are rounded",
        ),
        (
            CONFIGS["act-order"],
            {"calibration": ids()},
            "format compressed-tensors has no act_order",
        ),
        (
            CONFIGS["gptq"],
            {"calibration": ids()[0]},
            r"calibration must be ids \[n, S\], not torch.int64 \[32\]",
        ),
        (
            CONFIGS["gptq"],
            {"calibration": ids(0)},
            r"calibration must be ids \[n, S\], .* \[0, 32\]",
        ),
        (
            CONFIGS["gptq"],
            {"calibration": ids(1, 65)},
            "calibration of 65 tokens is more than the context of 64",
        ),
        (
            CONFIGS["gptq"],
            {"calibration": ids() + 90},
            "calibration ids 90 to 185 are outside the vocabulary of 96",
        ),
    ],
)
def test_settings_that_do_not_fit(config, more, told, model, tmp_path):
    with pytest.raises(ValueError, match=f"quantize: {told}"):
        quantize(model, tmp_path / "out", config, **more)
    assert not (tmp_path / "out").exists()


def test_configuration(model, tmp_path):
    quantize(model, tmp_path / "out", CONFIGS["asymmetric"])
    found = json.loads((tmp_path / "out/config.json").read_text())
    theirs = json.loads((model / "config.json").read_text())
    settings = found.pop("quantization_config")
    assert found == theirs
    weights = settings["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, False)
