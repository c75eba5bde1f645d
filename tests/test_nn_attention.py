"""nn.Attention against transformers' layers of the same weights, and with a cache against without."""

import copy

import pytest
import torch

from tilewright import eager, masks, nn
from tilewright.testing import assert_within

transformers = pytest.importorskip("transformers")
E, H, G, D, S, B = 48, 4, 2, 16, 23, 2


def rotary(device: str) -> nn.RotaryEmbedding:
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64, device=device) / D)
    return nn.RotaryEmbedding(frequencies, 64)


def check(found: torch.Tensor, layer: nn.Attention, x: torch.Tensor) -> None:
    """By the tolerance rule: the layer of x at once in float64 the truth, on the references eager."""
    with torch.no_grad(), eager():
        truth = copy.deepcopy(layer).double()(x.double())
        bound = layer(x)
    eps = torch.finfo(x.dtype).eps
    assert_within(found.detach().double(), bound.double(), truth, eps, "out")


def llama():
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig

    return LlamaConfig, LlamaAttention, {}


def qwen2():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Config

    return Qwen2Config, Qwen2Attention, {"bias": True}


def qwen3():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config

    return Qwen3Config, Qwen3Attention, {"qk_norm_eps": 1e-6}


def gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssConfig

    return GptOssConfig, GptOssAttention, {"bias": True, "out_bias": True, "sinks": True}


@pytest.mark.parametrize("family", [llama, qwen2, qwen3, gpt_oss])
def test_is_transformers_layer(family, device):
    """Their state dict, their output and the gradient of their input and every weight."""
    make_config, make_layer, form = family()
    config = make_config(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=G, head_dim=D,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = make_layer(config, 0).to(device)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = nn.Attention(E, H, G, D, rotary=rotary(device), device=device, **form)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, S, E, device=device, requires_grad=True)
    cos, sin = (t[:S].repeat(1, 2)[None] for t in (ours.rotary.cos, ours.rotary.sin))
    if family is gpt_oss:  # whose tables are halves
        cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    hidden = torch.full((S, S), -torch.inf, device=device).triu(1)[None, None]

    def results(layer: torch.nn.Module, x: torch.Tensor, out: torch.Tensor) -> dict:
        leaves = {"x": x, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        named = {"out": out, **dict(zip(leaves, grads, strict=True))}
        return {name: value.detach().double() for name, value in named.items()}

    found = [results(theirs, x, theirs(x, (cos, sin), hidden)[0]), results(ours, x, ours(x))]
    with eager():
        wide, wide_x = copy.deepcopy(ours).double(), x.detach().double().requires_grad_()
        bound, truth = results(ours, x, ours(x)), results(wide, wide_x, wide(wide_x))
    eps = torch.finfo(x.dtype).eps
    for side in found:
        assert side.keys() == truth.keys()
        for name, value in side.items():
            assert_within(value, bound[name], truth[name], eps, name)


OPTIONS = {
    "plain": {},
    "window": {"window": (6, 0)},
    "all": {"window": (9, 0), "softcap": 5.0, "sinks": True, "qk_norm_eps": 1e-6, "scale": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_cache_gives_what_the_whole_gives(options, device):
    """Prompt, a few tokens, then one by one."""
    layer = nn.Attention(E, H, G, D, rotary=rotary(device), device=device, **options)
    x = torch.randn(B, S, E, device=device)
    cache = nn.KVCache(B, G, 32, D, device=device)
    with torch.no_grad():
        for _ in range(2):
            parts = [layer(part, cache=cache) for part in x.split([15, 4, 1, 1, 1, 1], 1)]
            check(torch.cat(parts, 1), layer, x)
            assert cache.lengths.tolist() == [S] * B
            cache.reset()


def test_a_cache_of_one_byte(device):
    layer = nn.Attention(E, H, G, D, rotary=rotary(device), device=device)
    x = torch.randn(B, S, E, device=device)
    scale = torch.full((G,), 0.02, device=device)
    cache = nn.KVCache(B, G, 32, D, dtype=torch.int8, device=device, k_scale=scale, v_scale=scale)
    with torch.no_grad():
        expected = layer(x)
        found = torch.cat([layer(part, cache=cache) for part in x.split([20, 1, 1, 1], 1)], 1)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert cache.k.dtype == torch.int8 and cache.k.any()


def test_padding_and_positions(device):
    layer = nn.Attention(E, H, G, D, rotary=rotary(device), device=device)
    x = torch.randn(B, S, E, device=device)
    held = torch.ones(B, S, dtype=torch.int64, device=device)
    held[1, :7] = 0
    positions = (held.cumsum(1) - 1).clamp(min=0)
    out = layer(x, position_ids=positions, ranges=masks.padding(held))
    check(out[1:, 7:], layer, x[1:, 7:])
    check(out[:1], layer, x[:1])


def test_not_causal_and_without_rope(device):
    layer = nn.Attention(E, H, causal=False, device=device)
    x = torch.randn(B, S, E, device=device)
    order = torch.randperm(S, device=device)
    check(layer(x[:, order])[:, order.argsort()], layer, x)


def test_bad_input(device):
    with pytest.raises(ValueError, match="5 heads are not a multiple of 2"):
        nn.Attention(50, 5, 2)
    with pytest.raises(ValueError, match="embed_dim 50 is no multiple of 4"):
        nn.Attention(50, 4)
    layer = nn.Attention(E, H, causal=False, device=device)
    cache = nn.KVCache(B, H, 8, E // H, device=device)
    x = torch.randn(B, 3, E, device=device)
    with pytest.raises(ValueError, match="a cache takes causal layers"):
        layer(x, cache=cache)
    layer.causal = True
    with pytest.raises(ValueError, match="no gradient"):
        layer(x, cache=cache)
    if device == "cpu":
        with torch.no_grad(), pytest.raises(ValueError, match="not 0 to -1"):
            layer(torch.randn(B, 9, E), cache=cache)
    assert not cache.lengths.any()
