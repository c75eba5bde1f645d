"""Which layers tilewright.patch takes, and which it leaves: by trials on stand-ins."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tilewright
from tilewright.bench import harness
from tilewright.interop import _probe

models = harness.load(Path(__file__).with_name("patch_models.py"))
FAMILIES = models.FAMILIES
SMALL = models.SMALL
built = models.built
transformers = models.transformers


# of each family: how many layers are of ours, by kind
COUNTS = {
    "Mixtral": {
        "RMSNorm: rms_norm": 5, "attention: attention": 2, "experts: silu_experts": 2,
        "router: softmax_router": 2,
    },
    "Qwen3Moe": {
        "RMSNorm: rms_norm": 9, "attention: attention": 2, "experts: silu_experts": 2,
        "router: softmax_router_rounded": 2,
    },
    "Qwen2Moe": {
        "RMSNorm: rms_norm": 5, "attention: attention": 2, "experts: silu_experts": 2,
        "router: softmax_router_rounded": 2, "MLP: swiglu": 2,
    },
    "Olmoe": {
        "RMSNorm: rms_norm": 9, "attention: attention": 2, "experts: silu_experts": 2,
        "router: softmax_router_rounded": 2,
    },
    "DeepseekV3": {
        "RMSNorm: rms_norm": 9, "experts: silu_experts": 1, "router: sigmoid_router": 1, "MLP: swiglu": 2,
    },
    "GptOss": {"RMSNorm: rms_norm": 5, "router: softmax_router_rounded": 2},
    "Llama": {"RMSNorm: rms_norm": 5, "attention: attention": 2, "MLP: swiglu": 2},
    "Qwen2": {"RMSNorm: rms_norm": 5, "attention: attention": 2, "MLP: swiglu": 2},
    "Gemma2": {"RMSNorm: rms_norm_from_zero": 9, "attention: attention": 2, "MLP: geglu_tanh": 2},
    "Phi3": {"RMSNorm: rms_norm": 5, "MLP: swiglu_packed": 2},
    "SmolLM3": {"RMSNorm: rms_norm": 5, "attention: attention": 1, "MLP: swiglu": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_patched(kind):
    done = tilewright.patch(built(kind))
    counts: dict[str, int] = {}
    for told in done.layers.values():
        counts[told] = counts.get(told, 0) + 1
    assert counts == COUNTS[kind]
    assert [*done.attention] == [""]
    if kind == "DeepseekV3":
        assert done.attention[""].startswith("eager, as DeepseekV3Attention with our kernels: ")
    else:
        assert done.attention[""] == "tilewright"
    if kind not in ("GptOss", "SmolLM3"):
        assert not done.left
    printed = str(done)
    assert printed.startswith(f"{kind}ForCausalLM: {len(done.layers)} layers")
    assert all(f"{n} x {told}" in printed for told, n in counts.items())


class Rescaled(torch.nn.Module):
    """An RMSNorm but for one line."""

    def __init__(self, like: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(like.weight.detach().clone()), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight * 1.002


class Clipped(torch.nn.Module):
    """A SwiGLU whose gates are at most 7."""

    def __init__(self, like: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = like.gate_proj, like.up_proj, like.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self.gate_proj(x)).clamp(max=7)
        return self.down_proj(gate * self.up_proj(x))


class Dropping(torch.nn.Module):
    """A SwiGLU that drops in training."""

    def __init__(self, like: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = like.gate_proj, like.up_proj, like.down_proj
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.nn.functional.silu(self.gate_proj(x))
        return self.dropout(self.down_proj(gate * self.up_proj(x)))


class Refusing(Rescaled):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("not today")


def test_what_differs_in_one_line_is_left():
    model = built("Llama")
    first, second = model.model.layers
    first.input_layernorm = Rescaled(first.input_layernorm)
    first.mlp = Clipped(first.mlp)
    second.input_layernorm = Refusing(second.input_layernorm)
    second.mlp.forward = lambda x: x
    done = tilewright.patch(model)
    assert done.left == {
        "model.layers.0.input_layernorm": "Rescaled: its forward computes something else",
        "model.layers.0.mlp": "Clipped: its forward computes something else",
        "model.layers.1.input_layernorm":
            "Refusing: its forward cannot be tried: RuntimeError: not today",
        "model.layers.1.mlp": "its forward was replaced before",
    }  # fmt: skip
    assert "left as they were: model.layers.0.mlp: Clipped: " in str(done)
    tilewright.unpatch(model)
    assert "forward" in vars(second.mlp)


def test_dropout_is_no_kernel_of_ours():
    model = built("Llama")
    model.model.layers[0].mlp = Dropping(model.model.layers[0].mlp)
    assert [*tilewright.patch(model).left] == ["model.layers.0.mlp"]
    sizes = {k: v for k, v in SMALL.items() if k != "head_dim"}
    for rate, left in ((0.0, 0), (0.1, 2)):
        config = transformers.Starcoder2Config(**sizes, residual_dropout=rate)
        assert len(tilewright.patch(transformers.Starcoder2ForCausalLM(config)).left) == left
    # that of the probabilities is attention's own
    config = transformers.LlamaConfig(**SMALL, attention_dropout=0.1)
    done = tilewright.patch(transformers.LlamaForCausalLM(config))
    assert not done.left and done.attention == {"": "tilewright"}


def test_each_activation_is_told_from_the_others():
    """The two gelus differ by little."""
    for name, kind in (("silu", "swiglu"), ("gelu", "geglu"), ("gelu_pytorch_tanh", "geglu_tanh")):
        config = transformers.LlamaConfig(**SMALL, hidden_act=name)
        done = tilewright.patch(transformers.LlamaForCausalLM(config))
        assert done.layers["model.layers.0.mlp"] == f"MLP: {kind}"
    for name in ("gelu_10", "quick_gelu", "relu"):
        config = transformers.LlamaConfig(**SMALL, hidden_act=name)
        done = tilewright.patch(transformers.LlamaForCausalLM(config))
        assert done.left["model.layers.0.mlp"].endswith("computes something else")


def test_a_trial_leaves_no_trace():
    """Nobody else's random numbers change, and no weight is read."""
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SMALL | FAMILIES["Mixtral"])
        )
    state = torch.get_rng_state()
    done = tilewright.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(done.layers) == 11 and not done.left


WHOLE = {
    "Qwen3": {}, "Mistral": {}, "Gemma": {}, "Granite": {}, "Olmo2": {}, "SmolLM3": {"no_rope_layers": [1, 1]},
}  # fmt: skip
TURNING = ("Phi3", "Glm", "Ernie4_5", "Cohere", "GptOss")  # their own way


@pytest.mark.parametrize("kind", [*WHOLE, *TURNING])
def test_families_the_documentation_names(kind):
    config = getattr(transformers, f"{kind}Config")(**SMALL | WHOLE.get(kind, {}))
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    done = tilewright.patch(model)
    assert done.attention == {"": "tilewright"}
    assert [told for told in done.layers.values()].count("attention: attention") == 2 * (
        kind in WHOLE
    )
    assert not done.left or kind in TURNING


def test_a_difference_of_kind_is_without_bound():
    x = torch.ones(2, 3)
    assert _probe.difference(x, x) == 0
    assert _probe.difference((x, None), (x, None)) == 0
    for ours in (x.double(), x[0], None, (x,), x * torch.nan):
        assert _probe.difference(ours, x) == torch.inf
    assert _probe.difference(torch.tensor([1]), torch.tensor([2])) == torch.inf
