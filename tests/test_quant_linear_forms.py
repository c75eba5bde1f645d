"""quant_linear on weights that are more than codes, scales and offsets: act-order, code books, nested scales."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tilewright import _native
from tilewright.bench import harness
from tilewright.nn import QuantLinear
from tilewright.quant_tensor import Nested, QuantTensor, pack_int4

weights = harness.load(Path(__file__).with_name("quant_weights.py"))
make, check = weights.make, weights.check


def by_group(bits: int, device: str, sizes: tuple[int, ...] = (32, 32, 32)) -> tuple:
    """Codes in no order of groups, whose they are, and the weight that they make."""
    K = sum(sizes)
    w = make(16, K, bits=bits, kind="zeros", device=device)
    g_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    g_idx = g_idx[torch.randperm(K)].to(torch.int32).to(device)
    scales, zeros = (t[:, : len(sizes)].contiguous() for t in (w.scales, w.zeros))
    truth = scales.float()[:, g_idx] * (w.codes().float() - zeros.float()[:, g_idx])
    return (w.qweight, scales, zeros, g_idx, bits), truth


@pytest.mark.parametrize("sizes", [(32, 32, 32), (32, 64), (40, 24, 32)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_act_order(bits, sizes, dtype, device):
    """Columns sorted by group, groups of unlike sizes too: the same weight, on the kernels."""
    given, truth = by_group(bits, device, sizes)
    w = QuantTensor.by_group(*given)
    assert w.order is not None and torch.equal(w.dequantize(), truth)
    assert torch.equal(w.rows(torch.tensor([3, 1], device=device)), truth[[3, 1]])
    x = torch.randn(3, sum(sizes), device=device, requires_grad=True)
    check(w, x, dtype)
    check(w, x, dtype, activations="int8")


def test_act_order_of_a_saved_g_idx(device):
    given, truth = by_group(4, device)
    qweight, scales, zeros, g_idx, _ = given
    layer = QuantLinear(QuantTensor.by_group(*given))
    saved = {"qweight": qweight, "scales": scales, "zeros": zeros, "g_idx": g_idx}
    assert "g_idx" not in layer.state_dict()
    before = {name: torch.zeros_like(t) for name, t in layer.state_dict().items()}
    layer.load_state_dict(before | {"order": layer.order})
    layer.load_state_dict(saved)
    assert torch.equal(layer.weight.dequantize(), truth)
    assert set(saved) == {"qweight", "scales", "zeros", "g_idx"}
    with pytest.raises(ValueError, match="g_idx names groups 5 to 7 of 3"):
        layer.load_state_dict(saved | {"g_idx": g_idx + 5})
    with pytest.raises(ValueError, match=r"g_idx must be int32 \[96\], not torch.int32 \[95\]"):
        QuantTensor.by_group(*given[:3], g_idx[1:], 4)


def test_an_order_that_names_a_column_twice(device):
    layer = QuantLinear(QuantTensor.by_group(*by_group(4, device)[0]))
    saved = layer.state_dict()
    saved["order"] = saved["order"].clone().index_fill_(0, torch.tensor([3], device=device), 0)
    with pytest.raises(ValueError, match=r"order \[96\] is no permutation"):
        layer.load_state_dict(saved)


def test_buffers_replaced_one_at_a_time(device):
    """torch.func.functional_call with other zero-points, or minima."""
    weights = {kind: make(16, 64, kind=kind, device=device) for kind in ("zeros", "minima")}
    weights |= dict.fromkeys(("codebook", "nested_scales"), code_book(device, True)[0])
    weights["order"] = QuantTensor.by_group(*by_group(4, device)[0])
    for name, w in weights.items():
        layer = QuantLinear(w)
        x = torch.randn(3, w.in_features, device=device)
        other = {
            name: getattr(layer, name).flip(0) if name == "order" else getattr(layer, name) + 1
        }
        before = layer(x)
        found = torch.func.functional_call(layer, other, (x,))
        assert not torch.equal(found, before) and torch.equal(layer(x), before)


def test_groups_in_their_order_need_none(device):
    (qweight, scales, zeros, g_idx, bits), _ = by_group(8, device)
    w = QuantTensor.by_group(qweight, scales, zeros, g_idx.sort().values, bits)
    assert w.order is None and w.plain and w.group == 32


def code_book(device: str, nested: bool, G: int = 4, N: int = 70) -> tuple[QuantTensor, Tensor]:
    """NF4's kind, and what it stands for."""
    codes = torch.randint(0, 16, (N, 16 * G), dtype=torch.uint8, device=device)
    book = torch.linspace(-1, 1, 16, device=device) ** 3
    scales = torch.rand(N, G, device=device)
    more = None
    if nested:
        code, offset = torch.randn(256, device=device), torch.tensor(0.3, device=device)
        blocks = torch.rand(-(-N * G // 256), device=device)
        more = Nested(code, blocks, offset)
        stored = torch.randint(0, 256, (N, G), dtype=torch.uint8, device=device)
        at = torch.arange(N * G, device=device).view(N, G) // 256
        scales = code[stored.long()] * blocks[at] + offset
    w = QuantTensor(
        pack_int4(codes), stored if nested else scales, codebook=book, nested=more, bits=4
    )
    return w, scales.repeat_interleave(16, 1) * book[codes.long()]


@pytest.mark.parametrize("nested", [False, True])
def test_code_book(nested, dtype, device):
    w, truth = code_book(device, nested)
    assert torch.equal(w.dequantize(), truth)
    assert torch.equal(w.rows(torch.tensor([69, 3], device=device)), truth[[69, 3]])
    check(w, torch.randn(3, 64, device=device, requires_grad=True), dtype)


# the interpreter is slow, and its kernels have two paths
@pytest.mark.parametrize("M", [1, 20] if _native.INTERPRET else [1, 4, 9, 20])
@pytest.mark.parametrize("group", [16, 64] if _native.INTERPRET else [16, 32, 64, 128])
def test_code_book_at_every_size(M, group, dtype, device):
    """Each path of the kernels and both gradients, with groups that fit them and one that does not."""
    N, K = 34, 384 if _native.INTERPRET else 1152
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    book = torch.randn(16, device=device)
    w = QuantTensor(pack_int4(codes), torch.rand(N, K // group, device=device), codebook=book)
    x = torch.randn(M, K, device=device, requires_grad=True)
    check(w, x, dtype, torch.randn(N, device=device, requires_grad=True))
    check(w, x, dtype, activations="int8")


@pytest.mark.parametrize("M", [1, 20])
def test_code_book_of_inputs_of_one_sign(M, dtype, device):
    """NF4's values are not exact in bfloat16: rounded alike in every group they would add up."""
    N, K = (16, 256) if _native.INTERPRET else (64, 4096)
    codes = torch.randn(N, K, device=device).mul(3).add(7.5).clamp(0, 15).to(torch.uint8)
    book = torch.tensor(
        [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379,
         0.4407, 0.5626, 0.723, 1.0], device=device,
    )  # fmt: skip
    w = QuantTensor(pack_int4(codes), torch.ones(N, K // 64, device=device), codebook=book)
    check(w, torch.ones(M, K, device=device), dtype)


def test_a_wide_code_book_runs_on_the_reference(device):
    codes = torch.randint(0, 256, (16, 64), dtype=torch.uint8, device=device)
    book = torch.randn(256, device=device)
    w = QuantTensor(codes, torch.rand(16, 2, device=device), codebook=book, bits=8)
    check(w, torch.randn(3, 64, device=device, requires_grad=True), torch.float32)


def test_opcheck_of_a_code_book(device):
    w, _ = code_book(device, False)
    nested, _ = code_book(device, True)
    x, dy = torch.randn(3, 64, device=device), torch.randn(3, 70, device=device)
    for one in (w, nested):
        more = [] if one.nested is None else [*one.nested]
        args = (one.qweight, one.scales, None, None, one.codebook, more)
        torch.library.opcheck(torch.ops.tilewright.linear_int4.default, (x, *args, None, "float"))
        torch.library.opcheck(torch.ops.tilewright.linear_int4_dgrad.default, (dy, *args))


@pytest.mark.parametrize("M", [1, 8, 20])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_few_bits_of_eight_beside_minima(M, activations, dtype, device):
    """GGUF's Q5_1 and Q5_K: codes below 32, so that centring them at 128 would lose bits to the offset."""
    N, K = (64, 256) if _native.INTERPRET else (512, 2048)
    codes = torch.randint(0, 32, (N, K), dtype=torch.uint8, device=device)
    scales = (torch.rand(N, K // 32, device=device) * 0.01 + 0.01).half()
    w = QuantTensor(codes, scales, minima=(-16 * scales.float()).half(), bits=8)
    x = torch.randn(M, K, device=device)
    check(w, x, dtype, activations=activations)


def test_a_module_with_a_code_book_saves_and_moves(device):
    w, truth = code_book(device, True)
    layer = QuantLinear(w, torch.randn(70, device=device))
    names = {
        "qweight",
        "scales",
        "codebook",
        "nested_code",
        "nested_scales",
        "nested_offset",
        "bias",
    }
    assert set(layer.state_dict()) == names
    layer.half()
    assert layer.bias.dtype == torch.float16 and torch.equal(layer.weight.dequantize(), truth)
    other = copy.deepcopy(layer)
    other.load_state_dict({n: torch.zeros_like(t) for n, t in layer.state_dict().items()})
    assert not torch.equal(other.weight.dequantize(), truth)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight.dequantize(), truth)
