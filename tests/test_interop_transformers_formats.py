"""load_quantized: folders in other libraries' formats as models of transformers, to the bit what their tensors say."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright.bench import harness
from tilewright.quant import apply, checkpoint
from tilewright.quant.apply import QuantConfig, quantize_

transformers = pytest.importorskip("transformers")

from tilewright.interop.transformers import TilewrightConfig, load_quantized  # noqa: E402

beside = Path(__file__).with_name
folders = harness.load(beside("test_quant_checkpoints.py")).folders
models = harness.load(beside("test_interop_transformers_quantizer.py"))
assert_same, plain, quantised, saved = (
    models.assert_same, models.plain, models.quantised, models.saved
)  # fmt: skip
Auto = transformers.AutoModelForCausalLM
FORMATS = ["gptq", "gptq act-order", "awq", "compressed", "bitsandbytes", "bitsandbytes nested"]


@pytest.mark.parametrize("format", FORMATS)
def test_folders_in_other_formats(format, tmp_path):
    folder, dense = folders(tmp_path, format, dense=("mlp.down_proj",))
    model = load_quantized(folder, dtype=torch.float32)
    assert len(quantised(model)) == 12
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    read, tensors = checkpoint.reader(settings), load_file(folder / "model.safetensors")
    theirs = Auto.from_pretrained(dense, dtype=torch.float32)
    for name in quantised(model):
        parts = (part for part in checkpoint.names(settings) if f"{name}.{part}" in tensors)
        apply.put(theirs, name, read(name, {part: tensors[f"{name}.{part}"] for part in parts}))
    assert_same(model, theirs)
    model.save_pretrained(tmp_path / "ours")
    for again in (Auto.from_pretrained(tmp_path / "ours"), load_quantized(tmp_path / "ours")):
        assert_same(again, model)


def test_int_quantized_and_hqq(tmp_path):
    """Codes that are called weight, and layers that say their own shape."""
    folder = saved(tmp_path)
    dense = Auto.from_pretrained(folder)
    for name, settings in (("int", {"bits": 8, "group": 32}), ("hqq", models.SETTINGS["hqq"])):
        model = quantize_(copy.deepcopy(dense), plain(settings))
        tensors = {n: t for n, t in dense.state_dict().items() if t.dim() == 1 or "proj" not in n}
        for layer in quantised(model):
            weight = model.get_submodule(layer).weight
            parts = {
                "weight": (weight.codes() ^ 128).view(torch.int8),
                "weight_scale": weight.scales,
            }
            parts = checkpoint.hqq.write(weight) if name == "hqq" else parts
            tensors |= {f"{layer}.{part}": t.contiguous() for part, t in parts.items()}
        said = json.loads((folder / "config.json").read_text())
        weights = {"num_bits": 8, "strategy": "group", "group_size": 32}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        integer = {
            "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups,
        }  # fmt: skip
        said["quantization_config"] = {"quant_method": "hqq"} if name == "hqq" else integer
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(said))
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        assert_same(load_quantized(tmp_path / name), model)


def test_folders_that_cannot_be_read(tmp_path):
    dense = saved(tmp_path)
    with pytest.raises(ValueError, match=r"dense: config\.json has no quantization_config"):
        load_quantized(dense)
    folder, _ = folders(tmp_path, "gptq")
    said = json.loads((folder / "config.json").read_text())
    for change, told in (
        ({"quant_method": "exl2"}, "q: quantization_config: quant_method 'exl2'; readable are"),
        ({"dynamic": {"-:a": {}}}, "q: quantization_config: dynamic"),
    ):
        changed = said | {"quantization_config": said["quantization_config"] | change}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=told):
            load_quantized(folder)
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="GPTQConfig but you are passing a TilewrightConfig"):
        Auto.from_pretrained(folder, quantization_config=TilewrightConfig(group=32))
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj"
    lacking = {n: t for n, t in tensors.items() if not n.startswith(layer)}
    save_file(lacking, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"q: there is no {layer}.weight$"):
        load_quantized(folder)
    for part in ("scales", "qweight"):
        save_file({n: t for n, t in tensors.items() if n != f"{layer}.{part}"}, folder / "model.safetensors")  # fmt: skip
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            load_quantized(folder)


def test_inputs_that_are_rounded_stay_so(tmp_path):
    """W8A8, which a folder of compressed-tensors says and one of ours too."""
    from tilewright.models._quantize import quantize

    ids = torch.randint(0, 32, (4, 16))
    quantize(saved(tmp_path), tmp_path / "theirs", QuantConfig("smoothquant"), calibration=ids)
    model = load_quantized(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    again = Auto.from_pretrained(tmp_path / "ours")
    for one in (model, again):
        assert {one.get_submodule(name).activations for name in quantised(one)} == {"int8_token"}
    assert_same(again, model)
