"""quantize_: a model's linear layers in place, by each method."""

import copy
import dataclasses
from collections import UserDict

import pytest
import torch

from tilewright import nn
from tilewright.quant.apply import Fold, QuantConfig, quantize_

K = 64


class Net(torch.nn.Module):
    """A norm, two layers that share its outputs, one after them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.gate, self.up = torch.nn.Linear(K, 128), torch.nn.Linear(K, 128, bias=False)
        self.down = torch.nn.Linear(128, K)
        self.lm_head = torch.nn.Linear(K, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(x)
        return self.lm_head(self.down(torch.nn.functional.silu(self.gate(n)) * self.up(n)))


def net() -> tuple[Net, list[torch.Tensor]]:
    model = Net()
    with torch.no_grad():  # outliers, as norms of language models have
        model.norm.weight[::21] *= 20
        for layer in (model.gate, model.up, model.down):
            layer.weight.normal_(std=0.1)
    mixed = torch.randn(12, K)
    return model, [0.3 * torch.randn(2, 40, 12) @ mixed + torch.randn(2, 40, K) for _ in range(4)]


def folds(model: Net) -> list[Fold]:
    def divide(factors: torch.Tensor) -> None:
        model.norm.weight.div_(factors)

    return [Fold(("gate", "up"), divide)]


CONFIGS = {
    "rtn": QuantConfig(group=64),
    "rtn of 8 bits": QuantConfig(bits=8, group=-1),
    "asymmetric": QuantConfig(group=64, symmetric=False),
    "gptq": QuantConfig("gptq", group=64),
    "act-order": QuantConfig("gptq", group=64, act_order=True),
    "awq": QuantConfig("awq", group=64),
    "hqq": QuantConfig("hqq", group=64, symmetric=False),
    "smoothquant": QuantConfig("smoothquant", bits=8, group=-1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_methods(config):
    model, inputs = net()
    truth = [model(x) for x in inputs]
    found = quantize_(model, config, inputs, folds(model))
    assert found is model
    assert all(type(getattr(model, n)) is nn.QuantLinear for n in ("gate", "up", "down"))
    assert type(model.lm_head) is torch.nn.Linear and model.gate.bias is not None
    assert model.gate.weight.bits == config.bits
    assert model.gate.activations == ("int8_token" if config.method == "smoothquant" else "float")
    error = sum(float((model(x) - y).square().sum()) for x, y in zip(inputs, truth, strict=True))
    size = sum(float(y.square().sum()) for y in truth)
    assert error < (0.001 if config.bits == 8 else 0.05) * size
    model(inputs[0].requires_grad_()).sum().backward()
    assert inputs[0].grad.isfinite().all()


def test_what_sees_inputs_beats_rounding():
    model, inputs = net()
    truth = [model(x) for x in inputs]
    lost = {}
    for name in ("rtn", "gptq", "awq"):
        other = copy.deepcopy(model)
        quantize_(other, CONFIGS[name], inputs, folds(other))
        lost[name] = sum(
            float((other(x) - y).square().sum()) for x, y in zip(inputs, truth, strict=True)
        )
    assert lost["gptq"] < lost["rtn"] and lost["awq"] < lost["rtn"]


def test_inputs_by_name_and_in_tuples():
    for wrap in (lambda x: (x,), lambda x: {"x": x}, lambda x: UserDict(x=x)):
        model, inputs = net()
        quantize_(model, CONFIGS["gptq"], [wrap(x) for x in inputs])
        assert type(model.down) is nn.QuantLinear


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "exl2"}, "method 'exl2' is none of rtn, gptq"),
        ({"bits": 3}, "bits must be 4 or 8, not 3"),
        ({"group": -2}, "group must be 1 or more"),
        ({"group": 1}, "group must be even for 4 bits, not 1"),
        ({"damping": -1.0}, "damping must be 0 or more, not -1.0"),
        ({"damping": float("nan")}, "damping must be 0 or more, not nan"),
        ({"method": "smoothquant", "bits": 4}, "smoothquant takes 8 bits by row, symmetric, not 4"),
        ({"method": "smoothquant", "group": 128}, "smoothquant .* group 128"),
        ({"method": "hqq", "symmetric": True}, "hqq has zero-points"),
        ({"act_order": True}, "act_order is gptq's, not rtn's"),
        ({"scale_dtype": torch.int8}, "scale_dtype torch.int8"),
    ],
)
def test_settings_that_do_not_go_together(settings, told):
    with pytest.raises(ValueError, match=f"quantize: {told}"):
        QuantConfig(**settings)


def test_nothing_changes_where_a_layer_does_not_fit():
    model, _ = net()
    before = copy.deepcopy(model.state_dict())
    for config, told in (
        (QuantConfig(group=48), "gate: groups of 48 do not divide 64 inputs"),
        (QuantConfig("gptq", group=64), "gptq needs a calibration"),
    ):
        with pytest.raises(ValueError, match=f"quantize: {told}"):
            quantize_(model, config)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match="quantize: gate saw no input"):
        quantize_(model, dataclasses.replace(CONFIGS["gptq"]), [])
    with pytest.raises(ValueError, match="one linear layer"):
        quantize_(model.gate, QuantConfig(group=64))


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant"])
def test_nothing_changes_where_a_later_layer_does_not_fit(method):
    """By a weight that is not finite, by size, by a layer that the calibration misses, by a wrong fold."""

    def with_nan(model):
        model.down.weight.data[3, 4] = torch.nan

    def with_another(model):
        model.spare = torch.nn.Linear(K, K)

    def with_odd(model):
        model.spare = torch.nn.Linear(63, K)

    for change, told, many in (
        (with_nan, "down: its weight holds nan", ()),
        (
            with_odd,
            "spare: groups of (64 do not divide 63 inputs|63 inputs of 4 bits)",
            ("smoothquant",),
        ),
        (with_another, "spare saw no input", ("rtn",)),
        (lambda model: None, "a fold names gates, no linear layers", ()),
    ):
        if method in many:
            continue
        model, inputs = net()
        change(model)
        before = copy.deepcopy(model.state_dict())
        group = -1 if method == "smoothquant" else 64
        wrong = [Fold(("gates", "up"), lambda f: None)] if "fold" in told else folds(model)
        with pytest.raises(ValueError, match=f"quantize: {told}"):
            quantize_(model, QuantConfig(method, group=group), inputs, wrong)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in after.items())


def test_defaults_are_the_methods():
    assert QuantConfig() == QuantConfig("rtn", 4, 128, True)
    assert QuantConfig("hqq") == QuantConfig("hqq", 4, 128, False)
    assert QuantConfig("smoothquant") == QuantConfig("smoothquant", 8, -1, True)


def test_a_fold_with_a_layer_left_out_changes_nothing():
    """up stays as it is: it could not take the factor that the norm would be divided by."""
    model, inputs = net()
    norm, up = model.norm.weight.clone(), model.up.weight.clone()
    quantize_(model, dataclasses.replace(CONFIGS["awq"], skip=("up",)), inputs, folds(model))
    assert torch.equal(model.norm.weight, norm) and torch.equal(model.up.weight, up)
    assert type(model.gate) is nn.QuantLinear
