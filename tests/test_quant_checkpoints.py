"""Llama from folders whose layers are quantised, in each format: the logits of the weights they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tilewright.bench import harness
from tilewright.models import Llama
from tilewright.nn import QuantLinear
from tilewright.quant import checkpoint

packers = harness.load(Path(__file__).with_name("quant_packers.py"))
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 64, 96, 4, 2, 50
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def packed_layer(format: str, N: int, K: int) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """A layer's tensors, the checkpoint's settings, and the weight."""
    if format.startswith("bitsandbytes"):
        tensors, truth = packers.bnb_layer(N, K, 32, nested=format.endswith("nested"))
        return tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}, truth
    layer = packers.Layer(4, N, K, symmetric="symmetric" in format, act_order="act-order" in format)
    layer.scales *= 0.3
    if format.startswith("gptq"):
        tensors, config = packers.gptq_layer(layer)
        return tensors, config | {"quant_method": "gptq"}, layer.weight
    if format == "awq":
        tensors, config = packers.awq_layer(layer)
        return tensors, config | {"quant_method": "awq"}, layer.weight
    tensors, weights = packers.compressed_layer(layer)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    return tensors, config, layer.weight


def folders(path: Path, format: str, dense: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A model with its layers quantised, but for those `dense`, and its twin with the weights they stand for."""
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "rope_theta": 10000.0, "eos_token_id": 0,
    }  # fmt: skip
    shared = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    quantised, plain = {}, {}
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shared[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, (N, K) in LINEARS.items():
            module = f"model.layers.{i}.{name}"
            tensors, settings, truth = packed_layer(format, N, K)
            plain[f"{module}.weight"] = truth
            if name in dense:
                quantised[f"{module}.weight"] = truth
            else:
                quantised |= {f"{module}.{part}": t for part, t in tensors.items()}
    found = []
    for name, more, weights in (
        ("q", {"quantization_config": settings}, quantised),
        ("p", {}, plain),
    ):
        folder = path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | more))
        save_file(
            {n: t.contiguous() for n, t in (shared | weights).items()}, folder / "model.safetensors"
        )
        found.append(folder)
    return found[0], found[1]


FORMATS = ["gptq", "gptq symmetric", "gptq act-order", "awq", "compressed", "compressed symmetric",
           "bitsandbytes", "bitsandbytes nested"]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_logits_are_the_weights(format, tmp_path):
    ours, theirs = (Llama.from_pretrained(folder) for folder in folders(tmp_path, format))
    layers = [m for m in ours.modules() if isinstance(m, QuantLinear)]
    # what shares its inputs is one layer, but where code books, orders or blocks of scales are its own
    apart = format in ("gptq act-order", "bitsandbytes", "bitsandbytes nested")
    assert len(layers) > 8 if apart else len(layers) == 8
    ids = torch.randint(0, VOCAB, (2, 11))
    torch.testing.assert_close(ours(ids), theirs(ids))


def test_layers_that_were_left_out_are_dense(tmp_path):
    dense = ("self_attn.v_proj", "mlp.down_proj")
    ours, theirs = (Llama.from_pretrained(f) for f in folders(tmp_path, "gptq", dense))
    assert sum(isinstance(m, torch.nn.Linear) for m in ours.modules()) >= 4
    ids = torch.randint(0, VOCAB, (2, 11))
    torch.testing.assert_close(ours(ids), theirs(ids))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"quant_method": "exl2"},
            "quant_method 'exl2'; readable are gptq, awq, bitsandbytes, hqq",
        ),
        ({"bits": 3}, r"model.layers.0.self_attn.q_proj: gptq: bits must be 4 or 8, not 3"),
        ({"group_size": 64}, r"q_proj: gptq: group_size 64 of 64 inputs"),
        ({"dynamic": {"-:lm_head": {}}}, "dynamic, settings by layer, is not read"),
    ],
)
def test_a_configuration_that_does_not_fit(change, told, tmp_path):
    folder, _ = folders(tmp_path, "gptq")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        Llama.from_pretrained(folder)


def test_groups_of_compressed_tensors():
    def weights(bits: int) -> dict[str, Any]:
        return {"num_bits": bits, "group_size": 32, "strategy": "group"}

    layers = {bits: packers.Layer(bits, symmetric=True) for bits in (4, 8)}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {
            "a": {"targets": ["Linear"], "weights": weights(4)},
            "b": {"targets": ["re:.*down_proj", "lm_head"], "weights": weights(8)},
        },
    }  # fmt: skip
    read = checkpoint.reader(config)
    for module, bits in (("x.q_proj", 4), ("x.down_proj", 8), ("lm_head", 8)):
        w = read(module, packers.compressed_layer(layers[bits])[0])
        assert w.bits == bits and torch.equal(w.dequantize(), layers[bits].weight)
    del config["config_groups"]["a"]
    with pytest.raises(ValueError, match=r"x\.q_proj: no group of quantization_config is for it"):
        checkpoint.reader(config)("x.q_proj", {})
    for wrong, told in (
        ({"format": "marlin-24"}, "b is of format 'marlin-24'"),
        ({"config_groups": {}}, "config_groups is missing"),
        ({"config_groups": {"b": {"targets": []}}}, "b says nothing of weights"),
        ({"config_groups": {"b": ["Linear"]}}, r"b is \['Linear'\], no settings"),
        ({"config_groups": {"b": {"targets": 3, "weights": weights(4)}}}, "b is for 3, no list"),
        ({"quant_method": ["gptq"]}, r"quant_method \['gptq'\]; readable are"),
    ):
        with pytest.raises(ValueError, match=told):
            checkpoint.reader(config | wrong)
