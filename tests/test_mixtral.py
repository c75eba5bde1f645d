"""models/mixtral.py against transformers: every family with random weights, in both layouts on disk."""

import copy
import json
from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tilewright import nn
from tilewright.bench import harness
from tilewright.cli import main
from tilewright.models import Llama, Mixtral
from tilewright.models.llama import Layer
from tilewright.models.mixtral import MixtralConfig, SparseLayer
from tilewright.testing import assert_within

folders = harness.load(Path(__file__).with_name("model_folders.py"))
SIZES = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "num_experts_per_tok": 2,
}  # fmt: skip
EIGHT = {"num_experts": 8, "moe_intermediate_size": 40}
FAMILIES = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=8),
    "mixtral_window": transformers.MixtralConfig(
        **SIZES, num_local_experts=4, head_dim=32, sliding_window=9
    ),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, **EIGHT, shared_expert_intermediate_size=24, norm_topk_prob=False
    ),
    "qwen2_moe_some": transformers.Qwen2MoeConfig(
        **SIZES | {"num_hidden_layers": 4}, **EIGHT, shared_expert_intermediate_size=24,
        decoder_sparse_step=2, qkv_bias=False, use_sliding_window=True, sliding_window=7,
        max_window_layers=3,
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, **EIGHT, head_dim=32, norm_topk_prob=True
    ),
    "qwen3_moe_some": transformers.Qwen3MoeConfig(
        **SIZES, **EIGHT, head_dim=16, mlp_only_layers=[0], attention_bias=True,
        use_sliding_window=True, sliding_window=11, tie_word_embeddings=True,
    ),
    "olmoe": transformers.OlmoeConfig(**SIZES, num_experts=8),
    "olmoe_clip": transformers.OlmoeConfig(
        **SIZES, num_experts=8, clip_qkv=0.9, norm_topk_prob=True
    ),
}  # fmt: skip


def folder(path: Path, family: str, **options) -> transformers.PreTrainedModel:
    """A random model of a family, with other options, saved to path; norms and biases random too."""
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    for name, value in options.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"  # grouped_mm has no float64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return folders.saved(model, path)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(name, tmp_path):
    model = folder(tmp_path, name)
    ours = Mixtral.from_pretrained(tmp_path)
    assert not ours.training
    folders.assert_equals(ours, model, 24)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe"])
def test_both_layouts_hold_the_same(name, tmp_path):
    """Expert by expert, as on the hub, in one file or in shards; and stacked, as in memory."""
    model = folder(tmp_path / "each", name)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = load_file(tmp_path / "each/model.safetensors").keys()
    assert any("experts.0." in n for n in names)
    names = load_file(tmp_path / "stacked/model.safetensors").keys()
    assert not any("experts.0." in n for n in names)
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    each, *others = (
        Mixtral.from_pretrained(tmp_path / form).state_dict()
        for form in ("each", "shards", "stacked")
    )
    for other in others:
        assert each.keys() == other.keys()
        assert all(torch.equal(each[n], other[n]) for n in each)


def test_which_layers_are_sparse(tmp_path):
    folder(tmp_path / "step", "qwen2_moe_some")
    ours = Mixtral.from_pretrained(tmp_path / "step")
    assert [type(layer) for layer in ours.layers] == [Layer, SparseLayer] * 2
    assert ours.config.windows == (7, 0, 7, 0)
    config = json.loads((tmp_path / "step/config.json").read_text())
    del config["layer_types"]
    found = MixtralConfig.from_folder(config, tmp_path / "step")
    assert found.windows == ours.config.windows
    folder(tmp_path / "named", "qwen3_moe_some")
    ours = Mixtral.from_pretrained(tmp_path / "named")
    assert [type(layer) for layer in ours.layers] == [Layer, SparseLayer]
    assert ours.config.windows == (11, 11)
    config = json.loads((tmp_path / "named/config.json").read_text()) | {"max_window_layers": 1}
    assert MixtralConfig.from_folder(config, tmp_path).windows == (11, 11)  # which is Qwen2's


def test_bfloat16(tmp_path):
    """Every expert is taken: which of few are would hang on bfloat16's roundings."""
    model = folder(tmp_path, "qwen2_moe", num_experts_per_tok=8)
    ours = Mixtral.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ids = torch.randint(0, 200, (1, 12))
    with torch.no_grad():
        model.bfloat16()
        eager = model(ids).logits.double()
        truth = model.double()(ids).logits  # of the weights as they were rounded
    assert_within(ours(ids).double(), eager, truth, torch.finfo(torch.bfloat16).eps, "logits")


def test_bad_input(tmp_path):
    path = tmp_path / "hf"
    folder(path, "qwen2_moe")
    config = path / "config.json"
    good = json.loads(config.read_text())
    for change, message in [
        ({"model_type": "llama"}, "unknown architecture 'llama'; known are mixtral, qwen2_moe"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not silu"),
        ({"num_experts": 4}, r"gate\.weight has shape \[8, 64\], not \[4, 64\]"),
        ({"num_experts": 0}, "experts must be from 1 to 1024, not 0"),
        ({"num_experts": "many"}, r"config\.json: num_experts must be a whole number, not 'many'"),
        ({"num_experts": 1 << 40}, "experts must be from 1 to 1024, not 1099511627776"),
        ({"num_experts_per_tok": 9}, "9 experts a token do not fit 8 experts"),
        ({"num_experts_per_tok": 0}, "0 experts a token do not fit 8 experts"),
        ({"moe_intermediate_size": 48}, r"gate_proj\.weight has shape \[40, 64\], not \[48, 64\]"),
        ({"moe_intermediate_size": -1}, "expert_size must be 1 or more, not -1"),
        ({"shared_expert_intermediate_size": 32}, r"shape \[24, 64\], not \[32, 64\]"),
        ({"shared_expert_intermediate_size": -3}, "shared_size must be 0 or more, not -3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be 1 or more, not 0"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a list, not 1"),
        ({"mlp_only_layers": ["a"]}, "mlp_only_layers must be a whole number, not 'a'"),
        ({"mlp_only_layers": [0]}, r"tensor model\.layers\.0\.mlp\.gate_proj\.weight is missing"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers 1099511627776 is more than 65536"),
        ({"num_key_value_heads": 3}, "mixtral: 4 heads do not divide into 3"),
        ({"model_type": "olmoe", "clip_qkv": -1.0}, r"clip_qkv must be above 0, not -1\.0"),
        ({"model_type": "olmoe", "clip_qkv": "x"}, "clip_qkv must be a finite number, not 'x'"),
    ]:
        config.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            Mixtral.from_pretrained(path)
    config.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="unknown architecture 'qwen2_moe'; known are llama"):
        Llama.from_pretrained(path)
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        config.write_text(json.dumps({k: v for k, v in good.items() if k != name}))
        with pytest.raises(ValueError, match=r"num_(local_)?experts\w* is missing|size is missing"):
            Mixtral.from_pretrained(path)
    config.write_text(json.dumps(good))
    with pytest.raises(ValueError, match="mixtral: max_context must be 1 or more, not 0"):
        Mixtral.from_pretrained(path, max_context=0)
    with pytest.raises(ValueError, match="mixtral: dtype must be"):
        Mixtral.from_pretrained(path, dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Mixtral.from_pretrained(tmp_path / "nowhere")

    weights = load_file(path / "model.safetensors")
    at = "model.layers.1.mlp.experts.3.up_proj"
    gone = {n: w for n, w in weights.items() if n != f"{at}.weight"}
    save_file(gone, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.3\.up_proj\.weight is missing"):
        Mixtral.from_pretrained(path)


@pytest.mark.parametrize("name", ["qwen2_moe_some", "olmoe_clip"])
def test_any_value_loads_or_is_refused_by_name(name, tmp_path):
    """Each key of config.json at values that no model has."""
    folder(tmp_path, name)
    config = tmp_path / "config.json"
    good, counts = json.loads(config.read_text()), Counter()
    for key in good:
        for value in (0, -1, 3, 1 << 31, (1 << 63) - 1, 1 << 64, 1.5, "x", None, [], [[]], True):
            config.write_text(json.dumps(good | {key: value}))
            try:
                Mixtral.from_pretrained(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error), (key, value)
                counts["refused"] += 1
            else:
                counts["loaded"] += 1
    assert counts["refused"] > 100 and counts["loaded"] > 100


def test_what_is_not_read_yet(tmp_path):
    """A GGUF of a mixture."""
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_uint32("qwen3moe.expert_count", 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"m\.gguf: a GGUF of a mixture of experts is not read"):
        Mixtral.from_pretrained(file)


def test_experts_are_nn_moe(tmp_path):
    """What a layer holds is nn.MoE with transformers' names, so its losses' inputs are there."""
    model = folder(tmp_path, "qwen2_moe")
    ours = Mixtral.from_pretrained(tmp_path)
    moe = ours.layers[1].moe
    assert isinstance(moe, nn.MoE)
    theirs = model.model.layers[1].mlp.state_dict()
    assert moe.state_dict().keys() == theirs.keys()
    assert all(torch.equal(w, theirs[n]) for n, w in moe.state_dict().items())
    y, logits, ids = moe.routed(torch.randn(3, 5, 64))
    assert y.shape == (3, 5, 64) and logits.shape == (3, 5, 8) and ids.shape == (3, 5, 2)


def test_the_command_line_takes_one(tmp_path, capsys):
    """It comes as far as the tokeniser, of which a folder of random weights has none."""
    folder(tmp_path, "olmoe")
    with pytest.raises(SystemExit) as end:
        main(["generate", "--model", str(tmp_path), "Hello"])
    assert end.value.code == 2
    assert "there is no tokeniser beside the weights" in capsys.readouterr().err
