"""tilewright.patch: models of transformers compute what they did, on our kernels, and unpatch to the bit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tilewright
from tilewright.bench import harness
from tilewright.interop import _layers
from tilewright.interop import patch as interop
from tilewright.testing import assert_within

models = harness.load(Path(__file__).with_name("patch_models.py"))
FAMILIES = models.FAMILIES
IDS = models.IDS
MIXTURES = models.MIXTURES
built = models.built
results = models.results


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
