"""Mixtures' experts quantised: nn.QuantExperts, quantize_, TilewrightConfig, and folders of other libraries."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tilewright import nn, ops
from tilewright.bench import harness
from tilewright.quant import quantisers
from tilewright.quant.apply import QuantConfig, quantize_

transformers = pytest.importorskip("transformers")

from tilewright.interop.experts import own_experts  # noqa: E402
from tilewright.interop.transformers import TilewrightConfig, load_quantized  # noqa: E402
from tilewright.models import Mixtral  # noqa: E402

beside = Path(__file__).with_name
folders = harness.load(beside("model_folders.py"))
packed_layer = harness.load(beside("test_quant_checkpoints.py")).packed_layer
Auto = transformers.AutoModelForCausalLM
E, D, I = 4, 64, 32
SIZES = {
    "vocab_size": 100, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=I, num_local_experts=E),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=I, moe_intermediate_size=I, num_experts=E, head_dim=16
    ),
}
IDS = torch.arange(1, 25).view(2, 12)


def model_of(kind: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = Auto.from_config(CONFIGS[kind]).eval()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def quantised(model: torch.nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.QuantExperts)]


def mixture(**options) -> nn.MoE:
    torch.manual_seed(0)
    return nn.MoE(D, I, E, 2, **options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (QuantConfig(group=32), {"bias": True, "limit": 0.5}),
        (QuantConfig(bits=8, group=-1, symmetric=False), {"activation": "gelu_tanh"}),
        (QuantConfig("hqq", group=16), {"shared_size": 32, "shared_gate": True}),
    ],
    ids=["rtn", "8 bits", "hqq"],
)
def test_each_expert_is_quantised_alone(config, options):
    moe, x = mixture(**options), torch.randn(9, D)
    floats, made = moe.experts, quantize_(mixture(**options), config).experts
    assert isinstance(made, nn.QuantExperts) and made.training
    for part in ("gate_up_proj", "down_proj"):
        whole = getattr(made, part).weight
        for e, weight in enumerate(getattr(floats, part)):
            alone = (
                quantisers.hqq(weight, group=16)
                if config.method == "hqq"
                else quantisers.rtn(
                    weight, bits=config.bits, group=config.group, symmetric=config.symmetric
                )
            )
            rows = slice(e * len(weight), (e + 1) * len(weight))
            assert torch.equal(whole.dequantize()[rows], alone.dequantize())
    _, weights, ids = moe.gate(x)
    wanted = ops.quant_moe_experts(
        x, weights, ops.moe_dispatch(ids, E), made.gate_up_proj.weight, made.down_proj.weight,
        activation=floats.activation, limit=floats.limit,
        bias13=None if made.gate_up_proj_bias is None else made.gate_up_proj_bias.detach(),
        bias2=None if made.down_proj_bias is None else made.down_proj_bias.detach(),
    )  # fmt: skip
    assert torch.equal(made(x, ids, weights), wanted)
    x.requires_grad_()
    made(x, ids, weights).sum().backward()
    assert x.grad is not None and moe.gate.weight.grad is not None
    assert not any(p.requires_grad for p in made.parameters())


def test_state_dict_and_casts():
    made = quantize_(mixture(bias=True), QuantConfig(group=32)).experts
    state = made.state_dict()
    assert set(state) == {
        "gate_up_proj.qweight", "gate_up_proj.scales", "down_proj.qweight", "down_proj.scales",
        "gate_up_proj_bias", "down_proj_bias",
    }  # fmt: skip
    torch.manual_seed(1)
    other = quantize_(nn.MoE(D, I, E, 2, bias=True), QuantConfig(group=32)).experts
    other.load_state_dict(state)
    x, ids, weights = torch.randn(5, D), torch.arange(10).view(5, 2) % E, torch.rand(5, 2)
    assert torch.equal(other(x, ids, weights), made(x, ids, weights))
    cast = made.to(torch.bfloat16).state_dict()
    kinds = {name: t.dtype for name, t in cast.items()}
    assert kinds["gate_up_proj.scales"] == torch.float16
    assert kinds["gate_up_proj_bias"] == torch.bfloat16
    assert made(x.bfloat16(), ids, weights).dtype == torch.bfloat16


def test_bad_weights():
    made = quantize_(mixture(), QuantConfig(group=32)).experts
    gate_up, down = made.gate_up_proj.weight, made.down_proj.weight
    with pytest.raises(ValueError, match="num_experts must be 1 or more, not 0"):
        nn.QuantExperts(gate_up, down, 0)
    with pytest.raises(ValueError, match=r"down_proj \[256, 32\] are not \[3 2 I, D\]"):
        nn.QuantExperts(gate_up, down, 3)
    with pytest.raises(ValueError, match="activation 'relu' is none of"):
        nn.QuantExperts(gate_up, down, E, activation="relu")
    with pytest.raises(ValueError, match=r"down_proj_bias \[4, 3\] must be \[4, 64\]"):
        nn.QuantExperts(gate_up, down, E, down_proj_bias=torch.zeros(4, 3))


def test_what_quantize_refuses():
    """Before anything is changed."""
    moe = mixture()
    for config, told in (
        (QuantConfig("gptq", group=32), "experts: experts are quantised by rtn or hqq, not gptq"),
        (QuantConfig(group=64), "experts.down_proj: groups of 64 do not divide 32 inputs"),
    ):
        with pytest.raises(ValueError, match=told):
            quantize_(moe, config, [torch.randn(3, D)])
    with torch.no_grad():
        moe.experts.down_proj[1, 2, 3] = torch.inf
    with pytest.raises(ValueError, match=r"experts\.down_proj: its weight holds nan or infinity"):
        quantize_(moe, QuantConfig(group=32))
    assert isinstance(moe.experts, nn.Experts)
    skip = (*QuantConfig().skip, "experts")
    quantize_(moe, QuantConfig("gptq", group=32, skip=skip), [torch.randn(3, D)])
    assert isinstance(moe.experts, nn.Experts)


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_of_transformers(kind):
    """They are floats no one sees, unless they are made ours."""
    model = model_of(kind)
    before, names = logits(model), set(model.state_dict())
    with pytest.raises(ValueError, match="Experts has experts of its own"):
        quantize_(model, QuantConfig(group=32))
    assert own_experts(model, lambda name: "layers.1" in name) == {}
    assert [type(layer.mlp.experts) is nn.Experts for layer in model.model.layers] == [False, True]
    assert own_experts(model) == {}
    assert set(model.state_dict()) == names
    folders.assert_logits_match(logits(model), model_of(kind), IDS)
    quantize_(model, QuantConfig(group=32))
    assert len(quantised(model)) == 2
    assert not torch.equal(logits(model), before)


def test_experts_that_are_left():
    config = transformers.GptOssConfig(
        vocab_size=50, hidden_size=D, intermediate_size=I, num_hidden_layers=2, num_local_experts=E,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Auto.from_config(config)
    left = own_experts(model)
    assert left.keys() == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert all("GptOssExperts" in why for why in left.values())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [{"group": 32}, {"group": 16, "method": "hqq", "symmetric": False}],
    ids=["rtn", "hqq"],
)
def test_from_pretrained_quantises(kind, settings, tmp_path):
    model_of(kind).save_pretrained(tmp_path / "dense")
    model = Auto.from_pretrained(
        tmp_path / "dense", quantization_config=TilewrightConfig(**settings)
    )
    twin = Auto.from_pretrained(tmp_path / "dense")
    own_experts(twin)
    quantize_(twin, QuantConfig(**settings))
    ours, theirs = model.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys() and len(quantised(model)) == 2
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for i, shards in enumerate(({}, {"max_shard_size": "10KB"})):
        model.save_pretrained(tmp_path / f"{i}", **shards)
        again = Auto.from_pretrained(tmp_path / f"{i}")
        assert quantised(again) == quantised(model)
        assert torch.equal(logits(again), logits(model))
        model = again
    for name in quantised(model):
        experts = model.get_submodule(name)
        for part in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, part).weight
            size = model.hf_quantizer.param_element_size(
                model, f"{name}.{part}", torch.empty(weight.shape, device="meta")
            )
            assert size * weight.shape.numel() == sum(t.nbytes for t in weight.tensors().values())


def test_from_pretrained_leaves_experts_that_are_named(tmp_path):
    model_of("mixtral").save_pretrained(tmp_path)
    chosen = TilewrightConfig(group=32, modules_to_not_convert=["experts"])
    model = Auto.from_pretrained(tmp_path, quantization_config=chosen)
    assert quantised(model) == []
    model.save_pretrained(tmp_path / "q")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "q")), logits(model))


def foreign(path: Path, kind: str, format: str, floats: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """A mixture in another library's format, each expert's matrices as layers, but for those whose names hold one
    of `floats`; and its twin with the weights they stand for."""
    model_of(kind).save_pretrained(path / "p")
    tensors, found = load_file(path / "p/model.safetensors"), {}
    for name, t in list(tensors.items()):
        module = name.removesuffix(".weight")
        if t.dim() != 2 or not any(part in name for part in ("self_attn", ".experts.")):
            continue
        parts, settings, truth = packed_layer(format, *t.shape)
        tensors[name] = truth
        if not any(part in name for part in floats):
            found |= {f"{module}.{part}": each.contiguous() for part, each in parts.items()}
        else:
            found[name] = truth
    save_file(tensors, path / "p/model.safetensors", {"format": "pt"})
    layers = {name.rpartition(".")[0] for name in found}
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in layers}
    (path / "q").mkdir()
    said = json.loads((path / "p/config.json").read_text()) | {"quantization_config": settings}
    (path / "q/config.json").write_text(json.dumps(said))
    save_file(rest | found, path / "q/model.safetensors", {"format": "pt"})
    return path / "q", path / "p"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("format", ["gptq", "gptq act-order", "awq", "compressed"])
def test_folders_of_other_libraries(kind, format, tmp_path):
    folder, dense = foreign(tmp_path, kind, format)
    theirs = Auto.from_pretrained(dense, experts_implementation="eager", dtype=torch.float32)
    model, ours = load_quantized(folder, dtype=torch.float32), Mixtral.from_pretrained(folder)
    assert len(quantised(model)) == len(quantised(ours)) == 2
    folders.assert_logits_match(logits(model), theirs, IDS)
    folders.assert_logits_match(ours(IDS), theirs, IDS)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "ours")), logits(model))


def test_folders_whose_experts_are_floats(tmp_path):
    folder, dense = foreign(tmp_path, "mixtral", "gptq", floats=(".experts.",))
    theirs = Auto.from_pretrained(dense, experts_implementation="eager", dtype=torch.float32)
    model, ours = load_quantized(folder, dtype=torch.float32), Mixtral.from_pretrained(folder)
    assert quantised(model) == quantised(ours) == []
    folders.assert_logits_match(logits(model), theirs, IDS)
    folders.assert_logits_match(ours(IDS), theirs, IDS)


def test_folders_that_cannot_be_read(tmp_path):
    """Orders of the columns of each expert's own, and experts that are quantised in part."""
    for i, (format, floats, told, theirs) in enumerate((
        ("gptq act-order", (), "not quantised alike, with one order of the columns", RuntimeError),
        ("gptq", (".experts.3.",), "is not quantised, and other experts are", RuntimeError),
        ("gptq", (".w2.", ), r"experts are quantised in part", ValueError),
    )):  # fmt: skip
        folder, _ = foreign(tmp_path / str(i), "mixtral", format, floats)
        if "act-order" in format:
            tensors = load_file(folder / "model.safetensors")
            own = "model.layers.1.block_sparse_moe.experts.2.w1.g_idx"
            tensors[own] = tensors[own].flip(0)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=told):
            Mixtral.from_pretrained(folder)
        with pytest.raises(theirs):
            load_quantized(folder)
