"""Layers of other libraries' checkpoints, packed by quant_packers.py: what they become stands for the same
numbers to the bit, and what is wrong with one is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tilewright import ops
from tilewright.bench import harness
from tilewright.quant import awq, bitsandbytes, compressed_tensors, gptq, hqq

packers = harness.load(Path(__file__).with_name("quant_packers.py"))
Layer, gptq_layer, awq_layer = packers.Layer, packers.gptq_layer, packers.awq_layer
compressed_layer, bnb_layer, hqq_layer = (
    packers.compressed_layer,
    packers.bnb_layer,
    packers.hqq_layer,
)

CASES: dict[str, tuple[Callable, Callable, dict[str, Any]]] = {
    "gptq v1": (gptq_layer, lambda: Layer(4), {}),
    "gptq v1 of 8 bits": (gptq_layer, lambda: Layer(8), {}),
    "gptq v2": (gptq_layer, lambda: Layer(4), {"version": 2}),
    "gptq v2 of 8 bits": (gptq_layer, lambda: Layer(8), {"version": 2}),
    "gptq symmetric": (gptq_layer, lambda: Layer(4, symmetric=True), {}),
    "gptq act-order": (gptq_layer, lambda: Layer(4, act_order=True), {}),
    "gptq act-order of 8 bits": (gptq_layer, lambda: Layer(8, act_order=True), {"version": 2}),
    "gptq, the last group short": (gptq_layer, lambda: Layer(4, K=80), {}),
    "gptq in bfloat16": (gptq_layer, lambda: Layer(4, dtype=torch.bfloat16), {}),
    "awq gemm": (awq_layer, lambda: Layer(4), {}),
    "awq gemv": (awq_layer, lambda: Layer(4), {"version": "gemv"}),
    "packed": (compressed_layer, lambda: Layer(4, symmetric=True), {}),
    "packed, asymmetric": (compressed_layer, lambda: Layer(4), {}),
    "packed, odd sizes": (compressed_layer, lambda: Layer(4, N=13, K=90, group=30), {}),
    "packed of 8 bits": (compressed_layer, lambda: Layer(8, N=9, K=50, group=10), {}),
    "packed act-order": (compressed_layer, lambda: Layer(4, act_order=True), {}),
    "packed by channel": (compressed_layer, lambda: Layer(4, group=96), {}),
    "int": (compressed_layer, lambda: Layer(8, symmetric=True), {"packing": "int"}),
    "int, asymmetric": (compressed_layer, lambda: Layer(8), {"packing": "int"}),
    "int of 4 bits by channel": (compressed_layer, lambda: Layer(4, group=96), {"packing": "int"}),
}  # fmt: skip
READERS = {gptq_layer: gptq.read, awq_layer: awq.read, compressed_layer: compressed_tensors.read}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bit_exact(case):
    pack, make, how = case
    layer = make()
    w = READERS[pack](*pack(layer, **how))
    assert w.bits == layer.bits and w.shape == layer.codes.shape
    assert torch.equal(w.dequantize(), layer.weight)
    # one input at a time gives one column each, by the kernels
    columns = ops.quant_linear(torch.eye(w.in_features), w)
    assert torch.equal(columns.t(), layer.weight)


def test_symmetric_layers_need_no_zero_points():
    assert gptq.read(*gptq_layer(Layer(4, symmetric=True))).symmetric
    assert compressed_tensors.read(*compressed_layer(Layer(4, symmetric=True))).symmetric


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_file_that_lies_about_its_version(bits):
    """Symmetric zero-points are 2^(bits-1), or that less 1 in version 1: what is stored decides."""
    layer = Layer(bits, symmetric=True)
    for version, told in ((1, "gptq_v2"), (2, "gptq")):
        tensors, config = gptq_layer(layer, version)
        w = gptq.read(tensors, config | {"checkpoint_format": told})
        assert torch.equal(w.dequantize(), layer.weight)
    layer = Layer(bits)  # asymmetric: the file is believed
    tensors, config = gptq_layer(layer, 2)
    w = gptq.read(tensors, config | {"checkpoint_format": "gptq"})
    assert not torch.equal(w.dequantize(), layer.weight)


def test_a_tensor_of_one_scale():
    layer = Layer(8, group=96, symmetric=True)
    layer.scales[:] = layer.scales[0, 0]
    tensors, config = compressed_layer(layer, "int")
    for scale in (
        layer.scales[0, 0],
        layer.scales[0, :1],
        layer.scales[:1, :1],
        layer.scales[:, 0],
    ):
        w = compressed_tensors.read(
            tensors | {"weight_scale": scale}, config | {"strategy": "tensor"}
        )
        assert torch.equal(w.dequantize(), layer.weight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_written_and_read_again(bits, act_order, symmetric):
    layer = Layer(bits, N=32, symmetric=symmetric, act_order=act_order)
    tensors, config = gptq_layer(layer, 2)
    w = gptq.read(tensors, config)
    again = gptq.write(w)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    tensors, config = compressed_layer(layer)
    if act_order:  # later versions read none
        with pytest.raises(ValueError, match="order of columns has no pack-quantized form"):
            compressed_tensors.write(w)
        return
    again = compressed_tensors.write(w)
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_one_group_written(bits, symmetric):
    layer = Layer(bits, N=32, group=96, symmetric=symmetric)
    w = gptq.read(*gptq_layer(layer, 2))
    settings = {"num_bits": bits, "symmetric": symmetric, "strategy": "channel"}
    for again in (
        gptq.read(gptq.write(w), gptq_layer(layer, 2)[1]),
        compressed_tensors.read(compressed_tensors.write(w), settings),
    ):
        assert torch.equal(again.dequantize(), layer.weight)


def test_a_packed_tensor_of_one_zero_point():
    """compressed-tensors leaves it int8, beside packed weights too."""
    layer = Layer(4, group=96)
    layer.scales[:], layer.zeros[:] = layer.scales[0, 0], 5
    tensors, config = compressed_layer(layer)
    tensors |= {"weight_scale": layer.scales[0, :1]}
    tensors |= {"weight_zero_point": torch.tensor([5 - 8], dtype=torch.int8)}
    w = compressed_tensors.read(tensors, config | {"strategy": "tensor"})
    truth = layer.scales[:1, :1].float() * (w.codes().float() - 5)
    assert torch.equal(w.codes(), torch.from_numpy(layer.codes).to(torch.uint8))
    assert torch.equal(w.dequantize(), truth)
    del tensors["weight_zero_point"]
    with pytest.raises(ValueError, match="weight_zero_point is missing"):
        compressed_tensors.read(tensors, config | {"strategy": "tensor"})


def test_what_cannot_be_written():
    w = bitsandbytes.read(bnb_layer()[0])
    zeros = Layer(4)
    half = gptq.read(*gptq_layer(zeros))
    half.zeros[0, 0] = 0.5
    odd = compressed_tensors.read(*compressed_layer(Layer(4, N=13)))
    for write, weight, told in (
        (gptq.write, w, "no GPTQ form"),
        (compressed_tensors.write, w, "no pack-quantized form"),
        (gptq.write, half, "whole numbers from 0 to 15"),
        (compressed_tensors.write, half, "whole numbers from 0 to 15"),
        (gptq.write, odd, "13 outputs"),
    ):
        with pytest.raises(ValueError, match=told):
            write(weight)


BNB = {
    "whole blocks": {"K": 128},
    "blocks that end within a row": {"K": 96},
    "a last block that is short": {"N": 3, "K": 90},
    "one block": {"N": 4, "K": 10, "blocksize": 4096},
    "fp4": {"kind": "fp4", "K": 128},
    "nested": {"N": 90, "K": 256, "nested": True},
    "nested within rows": {"N": 90, "K": 224, "nested": True},
}


@pytest.mark.parametrize("sizes", BNB.values(), ids=BNB.keys())
def test_bitsandbytes_is_bit_exact(sizes):
    tensors, truth = bnb_layer(**sizes)
    w = bitsandbytes.read(tensors)
    assert torch.equal(w.dequantize(), truth)
    assert (w.nested is not None) == (sizes.get("nested", False) and truth.shape[1] % 64 == 0)
    columns = ops.quant_linear(torch.eye(w.in_features), w)
    assert torch.equal(columns.t(), truth)


def test_llm_int8():
    """weight SCB / 127, whose two products and quotient round in float32: to float32's precision."""
    codes = torch.randint(-128, 128, (10, 20), dtype=torch.int8)
    absmax = torch.rand(10) + 0.1
    w = bitsandbytes.read({"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0)})
    truth = codes.double() * absmax.double()[:, None] / 127
    torch.testing.assert_close(w.dequantize(), truth.float())
    assert torch.equal(w.codes(), (codes.int() + 128).to(torch.uint8))
    with pytest.raises(ValueError, match="weight_format is 2; readable is 0"):
        bitsandbytes.read({"weight": codes, "SCB": absmax, "weight_format": torch.tensor(2)})


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_is_exact(bits, encoded):
    """code - zero rounds in float32, hqq's own so in float16."""
    layer, truth = hqq_layer(bits, encoded)
    w = hqq.read(layer)
    torch.testing.assert_close(w.dequantize(), truth)
    assert torch.equal(w.dequantize(torch.float64).float(), truth)


@pytest.mark.parametrize("bits", [4, 8])
def test_hqq_written_and_read_again(bits):
    layer, _ = hqq_layer(bits, encoded=True)
    again = hqq.write(hqq.read(layer))
    assert set(again) >= set(layer)
    for name, t in again.items():
        if name in layer:
            assert torch.equal(t, layer[name].to(t.dtype)), name
    # what HQQLinear's load_state_dict asks for beside
    said = {"encoded_state_dict": 1, "stores_quant_config": 1, "channel_wise": 1, "round_zero": 0}
    assert all(int(again[name]) == value for name, value in said.items())
    assert bytes(again["unpack_view_dtype"].tolist()) == b"torch.uint8"
    assert bytes(again["compute_dtype"].tolist()) == b"torch.float16"
    odd = gptq.read(*gptq_layer(Layer(4, N=8, K=96, act_order=True)))
    with pytest.raises(ValueError, match="an order has no HQQ form"):
        hqq.write(odd)


# what is wrong


def changed(pack: Callable, layer: Any, name: str, change: Any, **how) -> tuple[dict, dict]:
    """The layer with a tensor, or a setting, of another value; None takes it out."""
    tensors, config = pack(layer, **how)
    where = tensors if name in tensors else config
    if change is None:
        del where[name]
    else:
        where[name] = change(where[name]) if callable(change) else change
    return tensors, config


def with_first(value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t.view(-1)[1] = value
        return t

    return change


WRONG = [
    (gptq_layer, "qweight", None, "gptq: qweight is missing; there are g_idx, qzeros, scales"),
    (gptq_layer, "qweight", lambda t: t.long(), "gptq: qweight must be 2-D int32, not torch.int64"),
    (gptq_layer, "qweight", lambda t: t[:-1], "gptq: .*"),
    (gptq_layer, "qzeros", lambda t: t[:, :-1], r"gptq: qzeros is \[3, 2\], not \[3, 3\]"),
    (gptq_layer, "scales", lambda t: t[:2], r"gptq: group_size 32 of 96 inputs .* \[2, 24\]"),
    (gptq_layer, "scales", lambda t: t[:, :8], r"gptq: scales is \[3, 8\], not \[3, 24\]"),
    (gptq_layer, "scales", with_first(float("nan")), r"gptq: scales\[0, 1\] is nan"),
    (awq_layer, "scales", with_first(float("-inf")), r"awq: scales\[0, 1\] is -inf"),
    (gptq_layer, "g_idx", lambda t: t + 1, "g_idx names groups 1 to 3 of 3"),
    (gptq_layer, "g_idx", lambda t: t[1:], r"gptq: g_idx is \[95\], not \[96\]"),
    (gptq_layer, "bits", 3, "gptq: bits must be 4 or 8, not 3"),
    (gptq_layer, "group_size", 0, "gptq: group_size 0"),
    (gptq_layer, "group_size", None, "gptq: group_size must be a whole number, not None"),
    (gptq_layer, "checkpoint_format", "marlin", "gptq: checkpoint_format .* 'marlin'"),
    (awq_layer, "scales", lambda t: t[:, :8], r"awq: scales is \[3, 8\], not \[3, 24\]"),
    (awq_layer, "qzeros", lambda t: t[:1], r"awq: qzeros is \[1, 3\], not \[3, 3\]"),
    (awq_layer, "version", "exllama", "awq: version must be gemm or gemv, not 'exllama'"),
    (awq_layer, "bits", 8, "awq: bits must be 4, not 8"),
    (awq_layer, "group_size", 40, "awq: group_size 40 does not divide 96 inputs"),
    (compressed_layer, "weight_packed", lambda t: t[:, 1:], r"weight_shape \[24, 96\] of 4 bits"),
    (compressed_layer, "weight_shape", lambda t: t + 1, r"weight_shape \[25, 97\]"),
    (compressed_layer, "weight_scale", None, "weight_scale .* missing"),
    (compressed_layer, "weight_scale", lambda t: t[:, :2], r"weight_scale \[24, 2\] does not fit"),
    (compressed_layer, "weight_scale", with_first(float("inf")), r"weight_scale\[0, 1\] is inf"),
    (compressed_layer, "weight_zero_point", lambda t: t[:2], r"weight_zero_point is \[2, 3\]"),
    (compressed_layer, "num_bits", 2, "num_bits must be 4 or 8, not 2"),
    (compressed_layer, "type", "float", "weights of type 'float'"),
    (compressed_layer, "strategy", "block", "strategy 'block'"),
    (compressed_layer, "group_size", 48, r"does not fit a weight \[24, 96\] by group of 48"),
]  # fmt: skip


@pytest.mark.parametrize(("pack", "name", "change", "told"), WRONG)
def test_what_is_wrong_is_told(pack, name, change, told):
    with pytest.raises(ValueError, match=told):
        READERS[pack](*changed(pack, Layer(4), name, change))


@pytest.mark.parametrize(
    ("pack", "name", "at"),
    [
        (gptq_layer, "scales", "0, 1"),
        (awq_layer, "scales", "0, 1"),
        (compressed_layer, "weight_scale", "0, 1"),
    ],
)
def test_a_scale_of_zero(pack, name, at):
    with pytest.raises(ValueError, match=rf"{name}\[{at}\] is 0.0"):
        READERS[pack](*changed(pack, Layer(4), name, with_first(0.0)))


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("weight", lambda t: t[1:], r"weight is \[575, 1\], not \[576, 1\]"),
        ("weight.absmax", None, "weight.absmax is missing"),
        ("weight.absmax", lambda t: t[1:], r"weight.absmax is \[17\], not \[18\]"),
        ("weight.absmax", with_first(float("nan")), r"weight.absmax\[1\] is nan"),
        ("weight.quant_map", lambda t: t[1:], r"weight.quant_map is \[15\]"),
        (STATE, None, "one weight.quant_state"),
        (STATE, lambda t: t[1:], "is no quant state"),
        (STATE, lambda t: torch.tensor(list(b"[]"), dtype=torch.uint8), "is no quant state"),
    ],
)
def test_what_is_wrong_with_bitsandbytes(name, change, told):
    tensors, _ = bnb_layer()
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=f"bitsandbytes: .*{told}"):
        bitsandbytes.read(tensors)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("scale", None, "scale missing"),
        ("axis", 0, "axis is 0; readable is 1"),
        ("packing", "3bit_32", "packing '3bit_32'; readable are 4bit_u8, 8bit_u8"),
        ("quant_zero", True, "quant_zero is True"),
        ("shape", [11, 96], r"W_q is \[15, 32\], not \[16, 32\]"),
        ("shape", [10], r"shape \[10\]"),
        ("shape", 10, "shape 10 is no matrix's"),
        ("scale", torch.ones(3, 1).half(), r"scale is \[3, 1\], not \[30, 1\]"),
    ],
)
def test_what_is_wrong_with_hqq(name, value, told):
    layer, _ = hqq_layer(4)
    if value is None:
        del layer[name]
    else:
        layer[name] = value
    with pytest.raises(ValueError, match=f"hqq: {told}"):
        hqq.read(layer)
