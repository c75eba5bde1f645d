"""nn.QuantEmbedding, and heads that are tied to one."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tilewright.bench import harness
from tilewright.nn import QuantEmbedding, QuantLinear
from tilewright.quant.apply import Fold, QuantConfig, quantize_

weights = harness.load(Path(__file__).with_name("quant_weights.py"))
V, E = 48, 64
IDS = torch.tensor([[3, 0, 47], [15, 3, 3]])


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows(bits, kind, dtype, device):
    weight = weights.make(V, E, bits=bits, kind=kind, device=device)
    embedding = QuantEmbedding(weight, dtype=dtype)
    for ids in (IDS.to(device), IDS.int().to(device), IDS[:, :0].to(device)):
        rows = embedding(ids)
        assert rows.dtype == dtype and not rows.requires_grad
        assert torch.equal(rows, weight.dequantize(dtype)[ids])


def test_is_what_torch_embedding_is():
    weight = weights.make(V, E)
    ours = QuantEmbedding(weight, padding_idx=3)
    theirs = torch.nn.Embedding(V, E, padding_idx=3, _weight=weight.dequantize())
    for name in ("num_embeddings", "embedding_dim", "padding_idx"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert torch.equal(ours(IDS), theirs(IDS)) and "48, 64, bits=4, group=32" in repr(ours)


def test_casts_change_what_it_returns_alone():
    weight = weights.make(V, E, kind="zeros")
    embedding = QuantEmbedding(weight).bfloat16()
    assert embedding.dtype == torch.bfloat16 and embedding.scales.dtype == torch.float16
    assert torch.equal(embedding(IDS), weight.dequantize(torch.bfloat16)[IDS])
    assert embedding.to(torch.float64)(IDS).dtype == torch.float64


@pytest.mark.parametrize("ids, told", [([[0, -1]], "ids -1 to 0"), ([48], "ids 48 to 48")])
def test_ids_that_are_no_rows(ids, told):
    with pytest.raises(IndexError, match=f"quant_embedding: {told} are not all of 48 rows"):
        QuantEmbedding(weights.make(V, E))(torch.tensor(ids))


def test_bad_input():
    with pytest.raises(ValueError, match=r"ids must be int32 or int64, not torch\.float32"):
        QuantEmbedding(weights.make(V, E))(torch.ones(2))
    with pytest.raises(ValueError, match=r"dtype must be a floating one, not torch\.int8"):
        QuantEmbedding(weights.make(V, E), dtype=torch.int8)


def test_compiles_fullgraph():
    embedding = QuantEmbedding(weights.make(V, E))
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager", dynamic=True)
    for ids in (IDS, IDS[:, :2]):
        assert torch.equal(compiled(ids), embedding(ids))


class Model(torch.nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(V, E)
        self.inner = torch.nn.Linear(E, E)
        self.lm_head = torch.nn.Linear(E, V, bias=False)
        if tied:
            self.lm_head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.inner(self.tokens(ids)))


def nbytes(model: torch.nn.Module) -> int:
    """Of distinct storages."""
    held = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in held}.values())


def quantised(**settings) -> Model:
    return quantize_(Model(**settings), QuantConfig(bits=8, group=32, embeddings=8))


def is_tied(model: Model) -> bool:
    return model.lm_head.weight is model.tokens.weight


def test_a_tied_head_stays_tied():
    model = Model()
    truth, before = model(IDS), nbytes(model)
    quantize_(model, QuantConfig(bits=8, group=32, embeddings=8))
    assert type(model.tokens) is QuantEmbedding and isinstance(model.lm_head, QuantLinear)
    assert is_tied(model) and nbytes(model) < 0.3 * before
    # of weights of unit variance, codes of 8 bits
    assert (model(IDS) - truth).square().mean() < 1e-3 * truth.square().mean()
    for twin in (copy.deepcopy(model), copy.deepcopy(model).bfloat16().float()):
        assert is_tied(twin) and not any(
            t.data_ptr() == model.tokens.qweight.data_ptr() for t in twin.buffers()
        )
        x = torch.randn(2, E)
        assert torch.equal(twin.lm_head(x), model.lm_head(x))


def test_a_tied_head_loads_and_saves_with_its_embedding(tmp_path):
    a, b = quantised(), quantised()
    state = {name: t.clone() for name, t in a.state_dict().items()}
    assert {n for n in state if "inner" not in n} == {"tokens.qweight", "tokens.scales"}
    for assign in (False, True):
        b.load_state_dict(state, assign=assign)
        assert torch.equal(a(IDS), b(IDS)) and is_tied(b)
    swapped = torch.func.functional_call(b, {"tokens.scales": 2 * b.tokens.scales}, (IDS,))
    assert not torch.allclose(swapped, b(IDS)) and torch.equal(a(IDS), b(IDS))
    save_file(a.state_dict(), tmp_path / "a.safetensors")  # which takes no tensor twice


def test_a_fold_reaches_an_embedding():
    """awq's factors are divided out of the embedding before that is rounded."""
    model = Model(tied=False)
    with torch.no_grad():
        model.inner.weight[:, ::7] *= 20
    truth = model(IDS)
    fold = Fold(("inner",), lambda factors: model.tokens.weight.div_(factors))
    quantize_(model, QuantConfig("awq", bits=8, group=32, embeddings=8), [IDS], [fold])
    assert (model(IDS) - truth).square().mean() < 1e-3 * truth.square().mean()


def test_embeddings_of_one_parameter_share_it():
    model = Model()
    model.others = torch.nn.Embedding(V, E, padding_idx=2)
    model.others.weight = model.tokens.weight
    model.again = model.tokens
    quantize_(model, QuantConfig(bits=8, group=32, embeddings=8))
    assert model.again is model.tokens and model.others.padding_idx == 2
    assert model.others.weight is model.tokens.weight and is_tied(model)
    assert {n for n in model.state_dict() if "others" in n or "lm_head" in n} == set()


def test_no_embedding_to_quantise():
    for model, told in (
        (torch.nn.Sequential(torch.nn.Linear(E, E)), "the model has no torch.nn.Embedding"),
        (torch.nn.Embedding(V, E), "the model is one embedding"),
    ):
        with pytest.raises(ValueError, match=told):
            quantize_(model, QuantConfig(group=32, embeddings=8))


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(IDS)
        assert QuantEmbedding(weights.make(V, E))(ids).shape == (2, 3, E)


@pytest.mark.parametrize(("bits", "taken"), [(4, "int8"), (8, "int8_token")])
def test_a_tied_head_beside_layers_by_token(bits, taken):
    """Of 4 bits it takes its input as they cannot."""
    model = Model()
    truth = model(IDS)
    quantize_(model, QuantConfig("smoothquant", embeddings=bits), [IDS])
    assert is_tied(model) and model.lm_head.activations == taken
    layers = {m.activations for m in model.modules() if isinstance(m, QuantLinear)}
    assert layers == {taken, "int8_token"}
    found = model(IDS)
    assert (found - truth).norm() < (0.2 if bits == 4 else 0.02) * truth.norm()


def test_a_tied_head_moves_with_its_embedding():
    model = quantised().to("meta")
    assert is_tied(model) and model.lm_head.weight.qweight.is_meta


def test_a_head_of_its_own_is_a_layer_like_others():
    model = quantised(tied=False)
    assert type(model.tokens) is QuantEmbedding and type(model.lm_head) is torch.nn.Linear


def test_a_tied_head_stays_a_float_with_its_embedding():
    """Whatever its name is."""
    model = Model()
    quantize_(model, QuantConfig(bits=8, group=32, skip=()))
    assert type(model.inner) is QuantLinear and type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.tokens.weight


@pytest.mark.parametrize(
    "change, config, told",
    [
        (lambda m: setattr(m.tokens, "max_norm", 1.0), {}, "tokens: max_norm 1.0 changes"),
        (lambda m: m.tokens.weight.data[0].fill_(torch.nan), {}, "tokens: its weight holds nan"),
        (lambda m: m.tokens.weight.data[0].fill_(1e30), {}, "tokens: the weights of row 0"),
        (lambda m: None, {"group": 48}, "groups of 48 do not divide 64"),
    ],
)
def test_nothing_changes_where_an_embedding_does_not_fit(change, config, told):
    model = Model()
    change(model)
    with pytest.raises(ValueError, match=told):
        quantize_(model, QuantConfig(**{"bits": 8, "group": 32, "embeddings": 4} | config))
    assert type(model.inner) is torch.nn.Linear and type(model.tokens) is torch.nn.Embedding


def test_bits_of_embeddings():
    with pytest.raises(ValueError, match="embeddings must be 0, 4 or 8 bits, not 3"):
        QuantConfig(embeddings=3)
