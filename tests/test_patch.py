"""tilewright.patch: models of transformers compute what they did, on our kernels, and unpatch to the bit."""

import copy

import pytest
import torch
from torch import Tensor

import tilewright
from tilewright.testing import assert_within

transformers = pytest.importorskip("transformers")

from tilewright.interop import _layers, _probe  # noqa: E402
from tilewright.interop import patch as interop  # noqa: E402
from tilewright.interop import transformers as implementations  # noqa: E402

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 128, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEW = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
FAMILIES = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    "Qwen3Moe": FEW | {"norm_topk_prob": True},
    "Qwen2Moe": FEW | {"shared_expert_intermediate_size": 32},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.0},
    "DeepseekV3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 7},
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Phi3": {},
    "SmolLM3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
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
MIXTURES = ("Mixtral", "Qwen3Moe", "Olmoe")
IDS = torch.randint(1, 98, (4, 48), generator=torch.Generator().manual_seed(0))


def built(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model whose attention and experts are transformers' plainest, with weights that matter."""
    torch.manual_seed(0)
    sizes = SMALL | FAMILIES[kind]
    if kind == "DeepseekV3":
        del sizes["head_dim"]
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
    return model.to(dtype)


def results(model: torch.nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    """Logits of a training step, and the gradient of every parameter."""
    model = model.train()
    model.zero_grad()
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()
    ).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_patched_within(model: torch.nn.Module, dtype: torch.dtype) -> None:
    truth, eager = results(copy.deepcopy(model).double()), results(copy.deepcopy(model))
    tilewright.patch(model)
    ours = results(model)
    assert ours.keys() == eager.keys() == truth.keys()
    eps = torch.finfo(dtype).eps
    for name, found in ours.items():
        assert found.dtype == dtype
        assert_within(found.double(), eager[name].double(), truth[name].double(), eps, name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_gradients(kind):
    assert_patched_within(built(kind), torch.float32)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_patched(kind):
    done = tilewright.patch(built(kind))
    counts: dict[str, int] = {}
    for told in done.layers.values():
        counts[told] = counts.get(told, 0) + 1
    assert counts == COUNTS[kind]
    assert done.attention == {"": "tilewright" if kind != "DeepseekV3" else done.attention[""]}
    if kind == "DeepseekV3":
        assert done.attention[""].startswith("eager, as DeepseekV3Attention with our kernels: ")
    if kind not in ("GptOss", "SmolLM3"):
        assert not done.left
    printed = str(done)
    assert printed.startswith(f"{kind}ForCausalLM: {len(done.layers)} layers")
    assert all(f"{n} x {told}" in printed for told, n in counts.items())


@pytest.mark.parametrize("kind", FAMILIES)
def test_unpatching_is_exact(kind):
    model = built(kind)
    names, config = set(vars(model)), model.config.to_dict()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = results(model)
    tilewright.patch(model)
    assert [*model.state_dict()] == [*state]
    tilewright.unpatch(model)
    after = results(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert set(vars(model)) == names and model.config.to_dict() == config
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    tilewright.unpatch(model)  # nothing to do


@pytest.mark.parametrize("kind", MIXTURES)
def test_only_this_instance(kind):
    """Two models of one configuration object."""
    model = built(kind)
    other = type(model)(model.config).eval()
    before = results(other)
    tilewright.patch(model)
    assert other.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "tilewright"
    after = results(other)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_kernels_are_what_runs(kind, monkeypatch):
    ran: set[str] = set()
    for name in ("rms_norm", "rope", "attention", "moe_route", "moe_dispatch", "moe_experts"):
        op = getattr(tilewright.ops, name)
        monkeypatch.setattr(
            tilewright.ops, name, lambda *x, _op=op, _name=name, **y: ran.add(_name) or _op(*x, **y)
        )
    model = built(kind)
    results(model)
    assert not ran
    tilewright.patch(model)
    ran.clear()
    results(model)
    assert len(ran) == 6


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Llama"])
def test_generation_with_padding(kind):
    model = built(kind)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :5], mask[0, :5] = 0, 0
    told = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    eager = model.generate(ids, **told)
    tilewright.patch(model)
    assert torch.equal(model.generate(ids, **told), eager)


@pytest.mark.parametrize("kind", MIXTURES)
def test_router_losses_and_their_gradients(kind):
    """transformers takes the logits from a hook on the router, and sums their loss in float32."""

    def loss(model):
        found = model(IDS, output_router_logits=True).aux_loss
        gate = model.model.layers[0].mlp.gate.weight
        return found, torch.autograd.grad(found, gate)[0].double()

    model = built(kind)
    (_, truth), (theirs, eager) = loss(copy.deepcopy(model).double()), loss(model)
    tilewright.patch(model)
    ours, gradient = loss(model)
    torch.testing.assert_close(ours, theirs)
    assert_within(gradient, eager, truth, torch.finfo(torch.float32).eps, "gate.weight")


def test_bfloat16():
    assert_patched_within(built("Llama", torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_copy_is_patched_alike(kind):
    model = built(kind)
    tilewright.patch(model)
    twin = copy.deepcopy(model)
    ours = results(model)
    assert all(torch.equal(ours[name], t) for name, t in results(twin).items())
    tilewright.unpatch(model)
    assert twin.config._attn_implementation == "tilewright"
    norm = twin.model.norm
    assert norm.forward.__self__ is norm
    tilewright.unpatch(twin)
    assert all(
        torch.equal(a, b)
        for a, b in zip(results(twin).values(), results(model).values(), strict=True)
    )


def test_patching_twice():
    model = built("Qwen3Moe")
    first = tilewright.patch(model)
    assert tilewright.patch(model) == first
    tilewright.unpatch(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("kind", MIXTURES)
def test_it_compiles(kind):
    model = built(kind)
    tilewright.patch(model)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


def test_hooks_of_accelerate_stay():
    accelerate = pytest.importorskip("accelerate")
    model = built("Llama")
    norm = model.model.norm
    accelerate.hooks.add_hook_to_module(norm, accelerate.hooks.ModelHook())
    hooked, before = norm.forward, results(model)["logits"]
    tilewright.patch(model)
    assert norm.forward is hooked and norm._old_forward.__func__ is _layers.rms_norm
    results(model)
    tilewright.unpatch(model)
    assert norm.forward is hooked and torch.equal(results(model)["logits"], before)


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


class Adapted(torch.nn.Module):
    """A linear layer with an adapter, as PEFT has it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = (
            base,
            base.in_features,
            base.out_features,
        )
        self.a = torch.nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.b = torch.nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("first", ["adapters", "patch"])
def test_adapters(first):
    model = built("Llama").requires_grad_(False)

    def adapt():
        torch.manual_seed(1)
        for layer in model.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
            layer.mlp.down_proj = Adapted(layer.mlp.down_proj)

    if first == "patch":
        tilewright.patch(model)
    adapt()
    done = tilewright.patch(model)
    assert not done.left and len(done.layers) == 9
    ours = results(model)
    tilewright.unpatch(model)
    eager, truth = results(model), results(copy.deepcopy(model).double())
    assert len(ours) == 9
    for name, found in ours.items():
        assert_within(
            found.double(), eager[name].double(), truth[name], torch.finfo(torch.float32).eps, name
        )


def test_a_difference_of_kind_is_without_bound():
    x = torch.ones(2, 3)
    assert _probe.difference(x, x) == 0
    assert _probe.difference((x, None), (x, None)) == 0
    for ours in (x.double(), x[0], None, (x,), x * torch.nan):
        assert _probe.difference(ours, x) == torch.inf
    assert _probe.difference(torch.tensor([1]), torch.tensor([2])) == torch.inf


def test_models_inside_a_module_of_ones_own():
    outer = torch.nn.ModuleDict({"policy": built("Llama"), "head": torch.nn.Linear(3, 3)})
    done = tilewright.patch(outer)
    assert done.attention == {"policy": "tilewright"}
    assert "policy.model.norm" in done.layers
    tilewright.unpatch(outer)
    assert outer["policy"].config._attn_implementation == "eager"


@pytest.mark.parametrize("call", [tilewright.patch, tilewright.unpatch, interop.patch])
def test_what_is_no_module_raises(call):
    with pytest.raises(TypeError, match=r"patch: model must be a torch\.nn\.Module, not dict"):
        call({})


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_implementation(kind):
    """Without patch: transformers' own interface of experts."""
    implementations.register_experts()
    model = built(kind)
    truth, eager = results(copy.deepcopy(model).double()), results(model)
    model.set_experts_implementation("tilewright")
    for name, found in results(model).items():
        assert_within(
            found.double(), eager[name].double(), truth[name], torch.finfo(torch.float32).eps, name
        )


def test_experts_on_other_devices_add_nothing():
    experts = built("Mixtral").model.layers[0].mlp.experts
    x, ids = torch.randn(6, 64), torch.arange(12).view(6, 2) % 5
    weights = torch.rand(6, 2)
    away = torch.rand(6, 2) < 0.4
    with torch.no_grad():
        found = implementations.experts_forward(experts, x, ids.masked_fill(away, 5), weights)
        wanted = implementations.experts_forward(experts, x, ids, weights.masked_fill(away, 0))
    assert torch.equal(found, wanted)


def test_experts_of_another_make_raise():
    implementations.register_experts()
    model = built("GptOss")
    model.set_experts_implementation("tilewright")
    with pytest.raises(
        ValueError, match="experts of GptOssExperts are transposed, which no kernel"
    ):
        model(IDS)
    config = transformers.Qwen3MoeConfig(**SMALL | FEW, hidden_act="relu")
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("tilewright")
    with pytest.raises(ValueError, match="experts of Qwen3MoeExperts use ReLU"):
        model(IDS)
