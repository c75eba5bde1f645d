"""attn_implementation="tilewright" in transformers' models gives what "eager" gives there."""

import copy
import sys

import pytest
import torch
from torch import Tensor

from tilewright.testing import assert_within

transformers = pytest.importorskip("transformers")

from tilewright.interop import transformers as interop  # noqa: E402

SMALL = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 128,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
DECODERS = {
    "Llama": GROUPED,
    "Qwen2": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 7},
    "Gemma2": GROUPED | {
        "sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16,
    },
    "GptOss": GROUPED | {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2": {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}  # fmt: skip


def eager_attention(module: torch.nn.Module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def eager_mask(**kwargs):
    """A row that sees no key gets a mask of -1.8e308 in float64, and nan with it: not of float32's."""
    mask = transformers.masking_utils.eager_mask(**(kwargs | {"dtype": torch.float32}))
    return mask if mask is None else mask.double()


@pytest.fixture(autouse=True)
def names() -> None:
    interop.register_attention()
    transformers.AttentionInterface.register("eager_in_float64", eager_attention)
    transformers.AttentionMaskInterface.register("eager_in_float64", eager_mask)


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager_in_float64")
    return model


def built(kind: str, head: str = "ForCausalLM") -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**DECODERS[kind], attn_implementation="eager")
    suffix = "LMHeadModel" if kind == "GPT2" else head
    model = getattr(transformers, kind + suffix)(config).eval()
    if kind == "GptOss":
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # so that it matters which keys are seen
    return model


def tokens(B: int = 3, S: int = 20) -> Tensor:
    return torch.randint(1, 99, (B, S))


def assert_same(model: torch.nn.Module, call, real: Tensor | None = None) -> None:
    """call(model) -> logits [B, S, V], of those positions [B, S] that are real."""
    with torch.no_grad():
        eager = call(model)
        truth = call(in_float64(model))
        ours = copy.deepcopy(model)
        ours.set_attn_implementation("tilewright")
        found = call(ours)
    where = slice(None) if real is None else real.bool()
    eager, truth, found = (x[where].double() for x in (eager, truth, found))
    assert_within(found, eager, truth, torch.finfo(torch.float32).eps, "logits")


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits(kind, padding):
    ids, mask = tokens(), torch.ones(3, 20, dtype=torch.long)
    if padding != "none":
        for row, count in ((0, 3), (2, 11)):
            mask[row, slice(count) if padding == "left" else slice(20 - count, 20)] = 0
    assert_same(built(kind), lambda m: m(ids, attention_mask=mask).logits, mask)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_cache_token_by_token(kind):
    """A prompt with padding, a second part of it, then a token at a time."""
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def call(model):
        past, found = None, []
        for a, b in ((0, 8), (8, 11), (11, 12), (12, 13), (13, 14)):
            step = model(
                ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past, use_cache=True
            )
            past = step.past_key_values
            found.append(step.logits)
        return torch.cat(found, 1)

    assert_same(built(kind), call, mask)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_a_static_cache(kind, padded):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0

    def call(model):
        past = transformers.StaticCache(config=model.config, max_cache_len=24)
        found = []
        for a, b in ((0, 9), (9, 10), (10, 12)):
            step = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=past)
            found.append(step.logits)
        return torch.cat(found, 1)

    assert_same(built(kind), call, mask)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GptOss"])
def test_prefix_tuning(kind):
    """Keys that no token made, before a prompt padded on the left: a hole between them."""
    ids = tokens(2, 10)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, 4:7] = 0
    keys = torch.randn(2, 2, 2, 2, 4, 16)

    def call(model):
        past = transformers.DynamicCache()
        for layer in range(2):
            past.update(*(x.to(model.dtype) for x in keys[layer]), layer)
        return model(ids, attention_mask=mask, past_key_values=past).logits

    assert_same(built(kind), call, mask[:, 4:])


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_packed_documents(kind):
    ids = tokens(1, 30)
    positions = torch.cat([torch.arange(n) for n in (7, 12, 11)])[None]
    assert_same(built(kind), lambda m: m(ids, position_ids=positions, use_cache=False).logits)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["Bert", "ClapText"])
def test_an_encoder_looks_both_ways(kind, padded):
    """ClapText's layers do not say whether they are causal."""
    config = getattr(transformers, f"{kind}Config")(**SMALL, attn_implementation="eager")
    model = getattr(transformers, f"{kind}Model")(config).eval()
    ids, mask = tokens(), torch.ones(3, 20, dtype=torch.long)
    if padded:
        mask[1, 13:] = 0
    assert_same(model, lambda m: m(ids, attention_mask=mask).last_hidden_state, mask)


def test_an_encoder_and_its_decoder():
    config = transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    ids, mask = tokens(), torch.ones(3, 20, dtype=torch.long)
    mask[1, 13:] = 0
    answers = tokens(3, 25)
    assert_same(
        model, lambda m: m(ids, attention_mask=mask, decoder_input_ids=answers).last_hidden_state
    )


def test_a_mask_of_ones_own():
    """[B, 1, S, T], with holes, which no range says."""
    ids = tokens()
    seen = torch.rand(3, 1, 20, 20) < 0.5
    seen |= torch.eye(20, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    def call(model):
        return model(ids, attention_mask=added.to(model.dtype)).logits

    assert_same(built("Llama"), call)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GptOss"])
def test_gradients(kind):
    """Of a training step with padding: every parameter's, by the rule."""
    ids = tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, 5] = -100  # what the last of the padding would foretell

    def gradients(model):
        model.train()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    eager = built(kind)
    truth, ours = in_float64(eager), copy.deepcopy(eager)
    ours.set_attn_implementation("tilewright")
    eager, truth, ours = (gradients(m) for m in (eager, truth, ours))
    for name, found in ours.items():
        assert_within(found, eager[name], truth[name], torch.finfo(torch.float32).eps, name)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GptOss"])
def test_attention_dropout_drops(kind):
    model = built(kind).train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.set_attn_implementation("tilewright")
    ids = tokens()
    first, again = (model(ids).logits for _ in range(2))
    assert not torch.equal(first, again)
    torch.manual_seed(5)
    first = model(ids).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(ids).logits)


def test_position_biases():
    """T5's, learned and shared by its layers."""
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, pad_token_id=0,
        decoder_start_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.T5Model(config).eval()
    ids, mask = tokens(), torch.ones(3, 20, dtype=torch.long)
    mask[1, 13:] = 0
    answers = tokens(3, 25)
    assert_same(
        model, lambda m: m(ids, attention_mask=mask, decoder_input_ids=answers).last_hidden_state
    )


def test_the_kernel_is_what_runs(monkeypatch):
    calls = []
    attention = interop.ops.attention
    monkeypatch.setattr(
        interop.ops, "attention", lambda *x, **y: calls.append(y) or attention(*x, **y)
    )
    model = built("Mistral")
    model.set_attn_implementation("tilewright")
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        model(tokens(), attention_mask=mask)
        model(tokens(3, 6))
    assert len(calls) == 4 and all(y["ranges"] is not None for y in calls)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_it_compiles(kind):
    """With masks that stay bool, and are added."""
    model = built(kind)
    model.set_attn_implementation("tilewright")
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_what_would_be_wrong_raises():
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    layer = torch.nn.Module()
    with pytest.raises(ValueError, match="Module picks keys by indices"):
        interop.attention_forward(layer, q, k, k, None, indices=torch.zeros(1))
    ranges = torch.zeros(1, 1, 5, 2, dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"mask \(1, 1, 5, 5\) of torch.int32: the model has changed"
    ):
        interop.attention_forward(layer, q, k, k, torch.nn.functional.pad(ranges, (0, 3)))


@pytest.mark.parametrize(
    "given", [{"q_length": 5, "device": "cpu"}, {"cache_position": torch.arange(5)}]
)
def test_a_mask_left_out_is_causal(given, monkeypatch):
    """By what either generation of transformers says of the queries."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda **_: None)
    ranges = interop.attention_mask(**given)
    assert ranges is not None and ranges.shape == (1, 1, 5, 2)
    assert ranges[0, 0].tolist() == [[0, i + 1] for i in range(5)]
    assert interop.attention_mask(**given, allow_is_causal_skip=False) is None
