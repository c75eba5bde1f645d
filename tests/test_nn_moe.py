"""nn.MoE against transformers' blocks of the same weights, and its options against the ops."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilewright import eager, nn, ops
from tilewright.testing import assert_within

transformers = pytest.importorskip("transformers")
D, I, E, k = 40, 24, 8, 3
SIZES = {"hidden_size": D, "num_experts_per_tok": k, "hidden_act": "silu"}


def mixtral():
    from transformers.models.mixtral import modeling_mixtral as m

    config = m.MixtralConfig(**SIZES, intermediate_size=I, num_local_experts=E)
    return config, m.MixtralSparseMoeBlock, {}


def qwen2_moe():
    from transformers.models.qwen2_moe import modeling_qwen2_moe as m

    config = m.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=I, shared_expert_intermediate_size=16, num_experts=E
    )
    form = {"renormalise": False, "shared_size": 16, "shared_gate": True}
    return config, m.Qwen2MoeSparseMoeBlock, form


def qwen3_moe():
    from transformers.models.qwen3_moe import modeling_qwen3_moe as m

    config = m.Qwen3MoeConfig(**SIZES, moe_intermediate_size=I, num_experts=E, norm_topk_prob=True)
    return config, m.Qwen3MoeSparseMoeBlock, {}


def olmoe():
    from transformers.models.olmoe import modeling_olmoe as m

    config = m.OlmoeConfig(**SIZES, intermediate_size=I, num_experts=E)
    return config, m.OlmoeSparseMoeBlock, {"renormalise": False}


def deepseek_v3():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    config = m.DeepseekV3Config(
        **SIZES, moe_intermediate_size=I, n_routed_experts=E, num_local_experts=E, n_shared_experts=2,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    form = {
        "scores": "sigmoid", "correction_bias": True, "groups": 4, "group_k": 2, "scale": 2.5,
        "shared_size": 2 * I,
    }  # fmt: skip
    return config, m.DeepseekV3MoE, form


FAMILIES = [mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3]


def name_here(name: str) -> str:
    """DeepSeek's shared experts are one."""
    return name.replace("shared_experts.", "shared_expert.")


def results(moe: torch.nn.Module, x: Tensor, call: Any = None) -> dict[str, Tensor]:
    """Output of moe, or of its form `call`, and gradients; an expert's weight is one row: in a row of it a token's
    part may cancel."""
    x = x.detach().requires_grad_()
    out = (moe if call is None else call)(x)
    leaves = {"x": x, **{name_here(n): p for n, p in moe.named_parameters()}}
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), g)
    named = {"out": out, **dict(zip(leaves, grads, strict=True))}
    named = {n: t.detach().double() for n, t in named.items()}
    return {n: t.flatten(1) if n.startswith("experts") else t for n, t in named.items()}


def routable(x: Tensor, weight: Tensor) -> None:
    """Logits that are quarters, so that no rounding changes who is chosen."""
    x[..., :E] = torch.rand(x.shape[:-1] + (E,), device=x.device).argsort(-1) / 4
    weight.zero_()[:, :E] = torch.eye(E, device=weight.device)


@pytest.mark.parametrize(
    "exact, dtype",
    [(False, torch.float32), *((True, d) for d in (torch.float32, torch.bfloat16, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_transformers_block(family, exact, dtype, device):
    """Their state dict, their output and the gradients of their input and every weight."""
    config, make, form = family()
    config._experts_implementation = "eager"
    theirs = make(config).to(device)
    x = torch.randn(3, 17, D, device=device)
    with torch.no_grad():
        for t in theirs.state_dict().values():
            torch.nn.init.normal_(t, std=0.3)
        if exact:
            routable(x, theirs.gate.weight)
    theirs, x = theirs.to(dtype), x.to(dtype)
    ours = nn.MoE(D, I, E, k, **form, device=device, dtype=dtype)
    state = {name_here(n): t for n, t in theirs.state_dict().items()}
    assert ours.state_dict().keys() == state.keys()
    ours.load_state_dict(state)
    bound, truth = results(theirs, x), results(copy.deepcopy(theirs).double(), x.double())
    found = results(ours, x)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert_within(value, bound[name], truth[name], torch.finfo(dtype).eps, name)


ROUTING = {
    "plain": {},
    "as they are": {"renormalise": False, "scale": 1.5},
    "groups": {"groups": 4, "group_k": 2},
    "groups by one": {"groups": 2, "group_top": 1},
    "sigmoid": {"scores": "sigmoid"},
}
HOW = {
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "limit": {"limit": 0.2},
    "biases": {"bias": True},
}


@pytest.mark.parametrize(
    "routing, how, correction_bias, shared_gate",
    [
        *((routing, {}, bias, False) for routing in ROUTING.values() for bias in (False, True)),
        *(({}, how, False, gate) for how in HOW.values() for gate in (False, True)),
    ],
    ids=str,
)
def test_options_reach_the_ops(routing, how, correction_bias, shared_gate, device):
    """To the bit what the ops give where they are told the same."""
    moe = nn.MoE(
        D, I, E, k, **routing, **how, correction_bias=correction_bias, shared_size=12, shared_gate=shared_gate,
        device=device,
    )  # fmt: skip
    x, bias = torch.randn(37, D, device=device), moe.gate.e_score_correction_bias
    if bias is not None:
        bias.normal_()
    weights, ids = ops.moe_route(F.linear(x, moe.gate.weight), k, bias=bias, **routing)
    part, activation = moe.experts, how.get("activation", "silu")
    y = ops.moe_experts(
        x, weights, ops.moe_dispatch(ids, E), part.gate_up_proj, part.down_proj,
        activation=activation, limit=how.get("limit"),
        bias13=part.gate_up_proj_bias, bias2=part.down_proj_bias,
    )  # fmt: skip
    assert (part.down_proj_bias is not None) == how.get("bias", False)
    gate, up, down = (p.weight for p in moe.shared_expert.children())
    gate, up = F.linear(x, gate), F.linear(x, up)
    glu = {
        "silu": ops.swiglu,
        "gelu": functools.partial(ops.geglu, approximate="none"),
        "gelu_tanh": functools.partial(ops.geglu, approximate="tanh"),
    }[activation]
    shared = F.linear(glu(gate, up), down)
    if shared_gate:
        shared = F.linear(x, moe.shared_expert_gate.weight).sigmoid() * shared
    assert torch.equal(moe(x), y + shared)


def test_float64_runs_the_references(device):
    moe = nn.MoE(D, I, E, k, bias=True, shared_size=12, device=device)
    x = torch.randn(37, D, device=device)
    found = results(moe, x)
    with eager():
        bound = results(moe, x)
    truth = results(moe.double(), x.double())
    for name, value in found.items():
        assert_within(value, bound[name], truth[name], torch.finfo(torch.float32).eps, name)


def test_routed_gives_what_losses_need(device):
    moe = nn.MoE(D, I, E, k, shared_size=8, device=device)
    x = torch.randn(2, 9, D, device=device)
    y, logits, ids = moe.routed(x)
    assert torch.equal(y, moe(x))
    assert torch.equal(logits, F.linear(x, moe.gate.weight)) and logits.requires_grad
    weights, expected = ops.moe_route(logits, k)
    assert torch.equal(ids, expected)
    for got, wanted in zip(moe.gate(x), (logits, weights, ids), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(0, D), (D,), (1, D), (2, 0, D), (2, 3, 5, D)], ids=str)
def test_any_shape(shape, device):
    moe = nn.MoE(D, I, E, k, shared_size=8, shared_gate=True, device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y, logits, ids = moe.routed(x)
    assert y.shape == shape and logits.shape == (*shape[:-1], E) and ids.shape == (*shape[:-1], k)
    y.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())
    assert torch.equal(y.reshape(-1, D), moe(x.reshape(-1, D)))


def test_the_bias_only_chooses(device):
    moe = nn.MoE(D, I, E, k, scores="sigmoid", correction_bias=True, device=device)
    bias = moe.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and not bias.any()
    assert "gate.e_score_correction_bias" not in dict(moe.named_parameters())
    x = torch.randn(11, D, device=device)
    bias[5] = 2.0  # more than a score
    _, logits, ids = moe.routed(x)
    assert (ids == 5).any(-1).all()
    assert torch.equal(moe.gate(x)[1], ops.moe_route(logits, k, scores="sigmoid", ids=ids)[0])


def test_jitter_is_the_routers_in_training(device):
    """Seen by the router alone, within its bounds, and in training only."""
    jitter = 0.2
    moe = nn.MoE(D, I, E, k, shared_size=8, jitter=jitter, device=device)
    seen: list[Tensor] = []
    for part in (moe.experts, moe.shared_expert):
        part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(200, D, device=device)
    before = x.clone()
    torch.manual_seed(3)
    _, logits, _ = moe.train().routed(x)
    assert all(torch.equal(t, before) for t in (x, *seen)) and len(seen) == 2
    torch.manual_seed(3)
    noise = torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
    assert torch.equal(logits, F.linear(x * noise, moe.gate.weight))
    assert not torch.equal(logits, moe.routed(x)[1])
    _, logits, _ = moe.eval().routed(x)
    assert torch.equal(logits, F.linear(x, moe.gate.weight))
    with torch.no_grad():  # what is drawn: one feature that is 1
        moe.gate.weight.zero_()[:, 0] = 1
        drawn = moe.train().routed(torch.ones_like(x))[1]
    assert drawn.min() >= 1 - jitter and drawn.max() < 1 + jitter
    assert drawn.min() < 1 - jitter / 2 and drawn.max() > 1 + jitter / 2


def test_autocast_is_the_dtype(device):
    """Under autocast float32 weights give what weights and tokens of its dtype give."""
    moe = nn.MoE(D, I, E, k, bias=True, shared_size=8, shared_gate=True, device=device)
    x = torch.randn(2, 9, D, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, logits, ids = moe.routed(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())
    narrow = copy.deepcopy(moe).bfloat16()
    for got, wanted in zip((y, logits, ids), narrow.routed(x.bfloat16()), strict=True):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)


def test_a_router_in_float32(device):
    moe = nn.MoE(D, I, E, k, device=device, dtype=torch.bfloat16)
    moe.gate.float()
    x = torch.randn(9, D, device=device, dtype=torch.bfloat16)
    y, logits, _ = moe.routed(x)
    assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(x.float(), moe.gate.weight))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_fullgraph(dynamic, device):
    moe = nn.MoE(
        D, I, E, k, bias=True, shared_size=8, shared_gate=True, correction_bias=True, jitter=0.1,
        groups=2, device=device,
    ).eval()  # fmt: skip
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (3, 5):
        x = torch.randn(T, D, device=device)
        ours, expected = results(moe, x, compiled), results(moe, x)
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    assert torch.isfinite(torch.compile(moe.train(), fullgraph=True, backend="aot_eager")(x)).all()


def test_nothing_waits(device):
    if device != "cuda":
        pytest.skip("there is no GPU to wait for")
    moe = nn.MoE(D, I, E, k, shared_size=8, shared_gate=True, jitter=0.1, device=device)
    x = torch.randn(9, D, device=device)
    moe(x).sum().backward()  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_begins_as_linear():
    moe = nn.MoE(256, 64, 16, 2, bias=True, dtype=torch.bfloat16)
    assert {t.dtype for t in moe.parameters()} == {torch.bfloat16}
    for name, inputs in [
        ("gate.weight", 256), ("experts.gate_up_proj", 256), ("experts.down_proj", 64),
        ("experts.gate_up_proj_bias", 256), ("experts.down_proj_bias", 64),
    ]:  # fmt: skip
        most = moe.get_parameter(name).abs().max().item()
        assert 0.9 * inputs**-0.5 < most <= inputs**-0.5, name
    on_meta = nn.MoE(1 << 20, 1 << 20, 8, 2, shared_size=4, device="meta")
    assert all(p.is_meta for p in on_meta.parameters())
    assert "k=2" in repr(moe) and "ffn_size=64" in repr(moe)


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ((0, I, E, k), {}, "hidden_size must be 1 or more, not 0"),
        ((D, -2, E, k), {}, "ffn_size must be 1 or more, not -2"),
        ((D, I, 0, k), {}, "num_experts must be from 1 to 1024, not 0"),
        ((D, I, 1025, k), {}, "num_experts must be from 1 to 1024, not 1025"),
        ((D, I, E, 0), {}, "k must be from 1 to 8, not 0"),
        ((D, I, E, 9), {}, "k must be from 1 to 8, not 9"),
        ((D, I, 64, 33), {}, "k must be from 1 to 32, not 33"),
        ((D, I, E, 3), {"groups": 4}, "k must be from 1 to 2, not 3"),
        ((D, I, E, k), {"groups": 3}, "groups 3, group_k 1 and group_top 2 do not fit 8 experts"),
        ((D, I, E, k), {"group_k": 2}, "groups 1, group_k 2 and group_top 2 do not fit 8"),
        ((D, I, E, k), {"group_top": 0}, "group_top 0 do not fit"),
        ((D, I, E, k), {"scores": "max"}, "scores 'max' are none of softmax, sigmoid"),
        ((D, I, E, k), {"jitter": 1.0}, r"jitter must be from 0 to below 1, not 1\.0"),
        ((D, I, E, k), {"activation": "relu"}, "activation 'relu' is none of silu, gelu"),
        ((D, I, E, k), {"limit": 0.0}, r"limit 0\.0 must be above 0"),
        ((D, I, E, k), {"shared_size": -1}, "shared_size must be 0 or more, not -1"),
        ((D, I, E, k), {"shared_gate": True}, "a shared_gate needs a shared_size, not 0"),
    ],
)
def test_bad_input(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        nn.MoE(*sizes, **options)
