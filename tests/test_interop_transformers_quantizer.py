"""quantization_config=TilewrightConfig(...) in transformers: what quantize_ makes of the same model, to the bit."""

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright.nn import QuantLinear
from tilewright.quant import apply
from tilewright.quant.apply import QuantConfig, quantize_

transformers = pytest.importorskip("transformers")

from tilewright.interop import transformers as interop  # noqa: E402
from tilewright.interop.transformers import TilewrightConfig  # noqa: E402
from tilewright.interop.transformers_quantizer import TilewrightQuantizer  # noqa: E402

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}
KINDS = {
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "BertForSequenceClassification": SMALL,
    "CLIPTextModel": SMALL | {"projection_dim": 32, "eos_token_id": 98},
}
SETTINGS = {
    "rtn": {"group": 32},
    "asymmetric, 8 bits": {"group": -1, "bits": 8, "symmetric": False, "scale_dtype": "bfloat16"},
    "hqq": {"group": 16, "method": "hqq", "symmetric": False},
}
Auto = transformers.AutoModelForCausalLM
IDS = torch.arange(1, 25).view(2, 12)


def config(kind: str, **more):
    name = next(kind.removesuffix(s) for s in ("ForCausalLM", "ForSequenceClassification", "Model") if kind.endswith(s))  # fmt: skip
    return getattr(transformers, f"{name}Config")(**KINDS[kind] | more)


def saved(path: Path, kind: str = "LlamaForCausalLM", **more) -> Path:
    """A folder of the model with weights, biases among them, that matter."""
    model = getattr(transformers, kind)(config(kind, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(path / "dense")
    return path / "dense"


def plain(settings: dict, **more) -> QuantConfig:
    dtype = getattr(torch, settings.get("scale_dtype", "float16"))
    return QuantConfig(**settings | {"scale_dtype": dtype} | more)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS)[0]


def quantised(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype and torch.equal(t, theirs[name]), name
    assert quantised(model) == quantised(other) != set()


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert_same_state(model, other)
    assert torch.equal(outputs(model), outputs(other))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_quantize_makes(kind, settings, tmp_path):
    folder, of = saved(tmp_path, kind), getattr(transformers, kind)
    model = of.from_pretrained(folder, quantization_config=TilewrightConfig(**settings))
    assert_same(model, quantize_(of.from_pretrained(folder), plain(settings)))
    assert model.is_quantized and model.hf_quantizer.is_trainable and not model.training
    model.save_pretrained(tmp_path / "a")
    again = of.from_pretrained(tmp_path / "a")
    assert_same(again, model)
    again.save_pretrained(tmp_path / "b", max_shard_size="10KB")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    assert_same(of.from_pretrained(tmp_path / "b"), model)
    written = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "tilewright"
    assert {k: written[k] for k in settings} == settings


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_another_dtype(device_map, tmp_path):
    """Weights and biases are bfloat16 then, scales what they were told to be."""
    folder = saved(tmp_path, "Qwen2ForCausalLM")
    model = Auto.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device_map,
        quantization_config=TilewrightConfig(group=32),
    )  # fmt: skip
    layer = model.model.layers[1].self_attn.k_proj
    assert layer.bias.dtype == torch.bfloat16 and layer.scales.dtype == torch.float16
    dense = Auto.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same(model, quantize_(dense, QuantConfig(group=32)))
    model.save_pretrained(tmp_path / "q")
    assert_same(Auto.from_pretrained(tmp_path / "q", device_map=device_map), model)
    wide = Auto.from_pretrained(tmp_path / "q", dtype=torch.float32)
    layer = wide.model.layers[1].self_attn.k_proj
    assert layer.bias.dtype == torch.float32 and layer.scales.dtype == torch.float16
    assert_same_state(wide.to(torch.bfloat16), model)  # whose tables of RoPE are rounded then


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_size_that_a_layer_will_have(settings, tmp_path):
    """By which device_map="auto" places layers, before there are any."""
    chosen = TilewrightConfig(**settings)
    model = Auto.from_pretrained(saved(tmp_path), quantization_config=chosen)
    for name in quantised(model):
        weight = model.get_submodule(name).weight
        dense = torch.empty(weight.shape, device="meta")
        size = model.hf_quantizer.param_element_size(model, f"{name}.weight", dense)
        assert size * dense.numel() == sum(t.nbytes for t in weight.tensors().values())
    head = model.lm_head.weight
    assert model.hf_quantizer.param_element_size(model, "lm_head.weight", head) == 4


def test_tied_embeddings_stay_tied(tmp_path):
    folder = saved(tmp_path, "Qwen2ForCausalLM")
    for skip in (None, []):
        chosen = TilewrightConfig(group=32, modules_to_not_convert=skip)
        model = Auto.from_pretrained(folder, quantization_config=chosen)
        model.save_pretrained(tmp_path / "q")
        again = Auto.from_pretrained(tmp_path / "q")
        for one in (model, again):
            assert one.lm_head.weight is one.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "q/model.safetensors")


def test_no_weight_of_a_layer_is_allocated(tmp_path, monkeypatch):
    """A folder that is quantised is filled in layer by layer, of what is on the meta device."""
    folder = saved(tmp_path)
    Auto.from_pretrained(folder, quantization_config=TilewrightConfig(group=32)).save_pretrained(
        tmp_path / "q"
    )
    devices = []
    put = apply.put

    def seen(model, name, weight, *more):
        devices.append(model.get_submodule(name).weight.device.type)
        return put(model, name, weight, *more)

    monkeypatch.setattr(apply, "put", seen)
    given = {"quantization_config": TilewrightConfig(group=32)}
    for path, how in ((folder, given), (tmp_path / "q", {})):
        model = Auto.from_pretrained(path, **how)
        assert devices == ["meta"] * 14
        assert all(not t.is_meta for t in model.state_dict().values())
        devices.clear()


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (None, {"lm_head"}),
        ([], set()),
        (["lm_head", "o_proj"], {"lm_head"} | {f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)}),
        (["layers.1", "head"], {"lm_head"} | {f"model.layers.1.{n}" for n in (
            *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}),
    ],
)  # fmt: skip
def test_modules_that_stay(skip, left, tmp_path):
    folder = saved(tmp_path)
    chosen = TilewrightConfig(group=32, modules_to_not_convert=skip)
    model = Auto.from_pretrained(folder, quantization_config=chosen)
    dense = Auto.from_pretrained(folder)
    assert_same(model, quantize_(dense, QuantConfig(group=32, skip=tuple(left) or ("nothing",))))
    assert {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} == left
    model.save_pretrained(tmp_path / "q")
    assert_same(Auto.from_pretrained(tmp_path / "q"), model)


@pytest.mark.parametrize("skip", ["q_proj", "v_proj", "nothing"])
def test_weights_that_are_one_tensor_in_the_folder(skip, tmp_path, monkeypatch):
    """Which a conversion of the model's takes apart; transformers asks about the first alone."""
    from transformers.core_model_loading import Chunk, WeightConverter

    folder = saved(tmp_path, num_key_value_heads=4)
    dense, tensors = Auto.from_pretrained(folder), load_file(folder / "model.safetensors")
    names = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    for i in (0, 1):
        parts = [tensors.pop(f"model.layers.{i}.{name}") for name in names]
        tensors[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    apart = WeightConverter("self_attn.qkv_proj.weight", names, operations=[Chunk(dim=0)])
    monkeypatch.setattr(TilewrightQuantizer, "get_weight_conversions", lambda _: [apart])
    chosen = TilewrightConfig(group=32, modules_to_not_convert=["lm_head", skip])
    model = Auto.from_pretrained(folder, quantization_config=chosen)
    assert_same(model, quantize_(dense, QuantConfig(group=32, skip=("lm_head", skip))))


def test_layers_that_are_no_linear_stay(tmp_path):
    gpt2 = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    dense = transformers.GPT2LMHeadModel(gpt2)
    dense.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel has no torch.nn.Linear to quantise"):
        model = Auto.from_pretrained(tmp_path, quantization_config=TilewrightConfig(group=32))
    assert not quantised(model) and torch.equal(outputs(model), outputs(dense))


def test_a_head_of_the_models_own_stays(tmp_path):
    """Of another name than lm_head; tied."""
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))
    bert.save_pretrained(tmp_path)
    model = transformers.BertForMaskedLM.from_pretrained(
        tmp_path, quantization_config=TilewrightConfig(group=32)
    )
    assert type(model.cls.predictions.decoder) is torch.nn.Linear
    assert_same(model, quantize_(bert, QuantConfig(group=32, skip=("decoder",))))


def test_layers_that_are_kept_in_float32_stay(tmp_path):
    t5 = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    dense = transformers.T5EncoderModel(t5).half()
    dense.save_pretrained(tmp_path)
    model = transformers.T5EncoderModel.from_pretrained(
        tmp_path, dtype=torch.float16, quantization_config=TilewrightConfig(group=32)
    )
    quantize_(dense, QuantConfig(group=32, skip=("wo",)))
    assert quantised(model) == quantised(dense) and len(quantised(model)) == 5


def test_what_the_folder_lacks_is_initialised(tmp_path):
    """A new head stays a float one, and trains; a new bias is 0."""
    folder = saved(tmp_path)
    kind = transformers.LlamaForSequenceClassification
    chosen = TilewrightConfig(group=32, modules_to_not_convert=["lm_head"])
    model = kind.from_pretrained(folder, quantization_config=chosen)
    assert type(model.score) is torch.nn.Linear and len(quantised(model)) == 14
    Auto.from_pretrained(folder, quantization_config=chosen).save_pretrained(tmp_path / "q")
    from_it = kind.from_pretrained(tmp_path / "q")
    assert type(from_it.score) is torch.nn.Linear and quantised(from_it) == quantised(model)
    from_it.model.save_pretrained(tmp_path / "base")  # names without the prefix
    whole = Auto.from_pretrained(tmp_path / "base")
    assert quantised(whole) == quantised(model)
    biased = config("LlamaForCausalLM", attention_bias=True)
    for path, how in ((folder, chosen), (tmp_path / "q", None)):
        settings = copy.deepcopy(biased)
        if how is None:
            settings.quantization_config = chosen.to_dict()
        with_bias = Auto.from_pretrained(path, config=settings, quantization_config=how)
        layer = with_bias.model.layers[0].self_attn.q_proj
        assert type(layer) is QuantLinear and torch.equal(layer.bias, torch.zeros(64))


def test_a_model_that_was_quantised_in_place(tmp_path):
    """By a method that needs a calibration, as act-order of GPTQ."""
    model = Auto.from_pretrained(saved(tmp_path))
    chosen = QuantConfig("gptq", group=32, act_order=True)
    quantize_(model, chosen, [{"input_ids": IDS}])
    assert model.model.layers[0].mlp.up_proj.order is not None
    model.config.quantization_config = TilewrightConfig(method=None)
    model.save_pretrained(tmp_path / "q")
    assert_same(Auto.from_pretrained(tmp_path / "q"), model)


def test_our_own_folders_that_are_broken(tmp_path, caplog):
    model = Auto.from_pretrained(saved(tmp_path), quantization_config=TilewrightConfig(group=32))
    model.save_pretrained(tmp_path / "q")
    tensors, layer = load_file(tmp_path / "q/model.safetensors"), "model.layers.0.mlp.up_proj"
    cut = tensors[f"{layer}.qweight"][:5].clone()
    for changed in (
        {n: t for n, t in tensors.items() if n != f"{layer}.scales"},
        tensors | {f"{layer}.qweight": cut},
        tensors | {f"{layer}.qweight": cut, f"{layer}.scales": tensors[f"{layer}.scales"][:5].clone()},
    ):  # fmt: skip
        save_file(changed, tmp_path / "q/model.safetensors", {"format": "pt"})
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            Auto.from_pretrained(tmp_path / "q")


def test_weights_that_cannot_be_quantised(tmp_path):
    folder = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        Auto.from_pretrained(folder, quantization_config=TilewrightConfig(group=32))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bits": 3}, "bits must be 4 or 8, not 3"),
        ({"group": -2}, "group must be 1 or more, or -1 for a row, not -2"),
        ({"group": 1}, "group must be even for 4 bits, not 1"),
        ({"method": "exl2"}, "method 'exl2' is none of rtn"),
        ({"method": "hqq", "symmetric": True}, "hqq has zero-points: symmetric must be False"),
        ({"scale_dtype": torch.int8}, "scale_dtype torch.int8 is none of"),
        ({"scale_dtype": "float1"}, "scale_dtype float1 is none of"),
        ({"modules_to_not_convert": "lm_head"}, "must be names, not 'lm_head'"),
        ({"modules_to_not_convert": [""]}, r"must be names, not \[''\]"),
        ({"quant_method": "gptq"}, "quant_method must be tilewright, not 'gptq'"),
        *(({"method": m}, f"{m}' needs a calibration: make a folder with `tilewright quantize --method {m}`")
          for m in ("gptq", "awq", "smoothquant")),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(settings, told):
    with pytest.raises(ValueError, match=told):
        TilewrightConfig(**settings)


def test_a_group_that_does_not_fit_is_found_before_a_weight_is_read(tmp_path):
    folder = saved(tmp_path, intermediate_size=80)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"no weights")
    for group, told in (
        (32, "quantize: model.layers.0.mlp.down_proj: groups of 32 do not divide 80 inputs"),
        (48, "quantize: model.layers.0.self_attn.q_proj: groups of 48 do not divide 64 inputs"),
    ):
        with pytest.raises(ValueError, match=told):
            Auto.from_pretrained(folder, quantization_config=TilewrightConfig(group=group))
    with pytest.raises(ValueError, match="method is None, and the weights are not quantised"):
        Auto.from_pretrained(folder, quantization_config=TilewrightConfig(method=None))
    with pytest.raises(ValueError, match="device_map puts layers on disk"):
        Auto.from_pretrained(
            folder, device_map={"model": "cpu", "lm_head": "disk"},
            quantization_config=TilewrightConfig(group=16),
        )  # fmt: skip
    (folder / "model.safetensors").write_bytes(whole)
    chosen = TilewrightConfig(group=32, modules_to_not_convert=["lm_head", "down_proj"])
    assert len(quantised(Auto.from_pretrained(folder, quantization_config=chosen))) == 12


def test_training_reaches_what_is_float(tmp_path):
    folder = saved(tmp_path, "Qwen2ForCausalLM")
    model = Auto.from_pretrained(folder, quantization_config=TilewrightConfig(group=32))
    theirs = quantize_(Auto.from_pretrained(folder), QuantConfig(group=32))
    for one in (model, theirs):
        one.train()(IDS, labels=IDS).loss.backward()
    found, expected = dict(model.named_parameters()), dict(theirs.named_parameters())
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in found} == {
        "embed_tokens", "q_proj", "k_proj", "v_proj", "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip
    for name, parameter in found.items():
        assert torch.equal(parameter.grad, expected[name].grad), name
        assert parameter.grad.abs().sum() > 0 or "k_proj" in name  # which softmax is blind to
    before = outputs(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(outputs(model), before)


def test_it_compiles_and_generates(tmp_path):
    folder = saved(tmp_path)
    interop.register_attention()
    Auto.from_pretrained(folder, quantization_config=TilewrightConfig(group=32)).save_pretrained(
        tmp_path / "q"
    )
    given = {"quantization_config": TilewrightConfig(group=32)}
    for path, how in ((folder, given), (tmp_path / "q", {})):
        model = Auto.from_pretrained(path, attn_implementation="tilewright", **how)
        assert model.config._attn_implementation == "tilewright"
        ids = model.generate(IDS, max_new_tokens=4, do_sample=False)
        theirs = quantize_(Auto.from_pretrained(folder), QuantConfig(group=32))
        assert ids.shape == (2, 16)
        assert torch.equal(ids, theirs.generate(IDS, max_new_tokens=4, do_sample=False))
        layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 64)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_a_copy_is_apart(tmp_path):
    model = Auto.from_pretrained(saved(tmp_path), quantization_config=TilewrightConfig(group=32))
    assert_same(copy.deepcopy(model), model)


def test_a_process_of_its_own_with_nothing_but_transformers(tmp_path):
    chosen = TilewrightConfig(group=32)
    model = Auto.from_pretrained(saved(tmp_path), quantization_config=chosen)
    model.save_pretrained(tmp_path / "q")
    save_file({"logits": outputs(model)}, tmp_path / "logits")
    code = """
import sys
sys.modules.update(dict.fromkeys(("accelerate", "gguf", "jinja2", "rich", "typer")))  # no such modules
import torch, transformers
from safetensors.torch import load_file
from tilewright.interop.transformers import register_quantizer
assert register_quantizer() == register_quantizer() == "tilewright"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/q")
with torch.no_grad():
    found = model(torch.arange(1, 25).view(2, 12))[0]
assert torch.equal(found, load_file(sys.argv[1] + "/logits")["logits"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(interop.__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("absent", ["core_model_loading", "quantizers"])
def test_a_transformers_that_is_too_old(absent, monkeypatch):
    monkeypatch.setitem(sys.modules, f"transformers.{absent}", None)
    monkeypatch.delitem(sys.modules, "tilewright.interop.transformers_quantizer")
    told = f"TilewrightConfig needs transformers 5.0 or newer: .*{absent}"
    for name in ("TilewrightConfig", "load_quantized"):
        with pytest.raises(ImportError, match=told):
            getattr(interop, name)
    with pytest.raises(ImportError, match=told):
        interop.register_quantizer()
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        interop.other  # noqa: B018


def test_settings_of_the_folder_win(tmp_path):
    """As with transformers' own, with its warning."""
    Auto.from_pretrained(
        saved(tmp_path), quantization_config=TilewrightConfig(group=32)
    ).save_pretrained(tmp_path / "q")
    with pytest.warns(UserWarning, match="will be used"):
        model = Auto.from_pretrained(tmp_path / "q", quantization_config=TilewrightConfig(bits=8))
    assert model.config.quantization_config.bits == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Auto.from_pretrained(tmp_path / "q")
