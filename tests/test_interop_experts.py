"""experts_implementation="tilewright" in transformers' models."""

import copy
from pathlib import Path

import pytest
import torch

from tilewright.bench import harness
from tilewright.interop import transformers as implementations
from tilewright.testing import assert_within

models = harness.load(Path(__file__).with_name("patch_models.py"))
FEW = models.FEW
IDS = models.IDS
MIXTURES = models.MIXTURES
SMALL = models.SMALL
built = models.built
results = models.results
transformers = models.transformers


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
