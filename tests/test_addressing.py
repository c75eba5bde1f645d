"""Offsets beyond 2^31 elements, in every op's inputs: 32 bits would wrap.

A few rows lie so far apart in a vast storage, of which only their pages are ever touched.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tilewright import QuantTensor, ops
from tilewright.quant_tensor import Int8Rows

FAR = 1 << 30  # elements from row to row: the third begins at 2^31


def far_apart(x: Tensor, dim: int) -> Tensor:
    """x with steps of FAR along `dim`, the other dimensions dense."""
    assert x.shape[dim] == 3
    inner = [n for d, n in enumerate(x.shape) if d != dim]
    strides = list(torch.empty(inner, device="meta").stride())
    strides.insert(dim, FAR)
    storage = torch.empty(2 * FAR + x.numel(), dtype=x.dtype, device=x.device)
    view = storage.as_strided(x.shape, strides)
    view.copy_(x)
    return view


def draw(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def quantised(bits: int) -> QuantTensor:
    codes = torch.randint(0, 256, (40, 64 * bits // 8), dtype=torch.uint8)
    return QuantTensor(codes, torch.rand(40, 2).half() + 0.1, bits=bits)


@pytest.fixture
def cases() -> dict[str, tuple[Callable, Tensor, int]]:
    """Op with its other inputs bound, the tensor to spread, the dimension; M = 3 and, as a matrix
    product, 12 rows."""
    row, wide = draw(3, 64), draw(3, 64)
    weight = draw(64)
    cos, sin = torch.rand(4, 32).bfloat16(), torch.rand(4, 32).bfloat16()
    w4, w8 = quantised(4), quantised(8)
    q, kv = draw(1, 2, 3, 64), draw(1, 2, 3, 64)
    packed, cu = draw(3, 2, 64), torch.tensor([0, 1, 3])
    values, three = draw(3, 1, 4, 64), draw(1, 3, 4, 64)

    def append(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return ops.attention_decode_append_(
            q, k, v, k_cache, v_cache, torch.tensor([3]), cos=cos, sin=sin
        )

    by_row = QuantTensor(w8.qweight, w8.scales[:, :1].contiguous(), bits=8)

    def spread_codes(x: Tensor) -> Int8Rows:
        """x as codes, whose rows are as far apart."""
        codes = (20 * x.detach()).contiguous().to(torch.int8)
        codes = codes if x.is_contiguous() else far_apart(codes, 0)
        return Int8Rows(codes, torch.ones(3), torch.float32)

    def normed(x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows, h = ops.rms_norm_int8(
            x.detach(), weight, residual=None if residual is None else residual.detach()
        )
        return rows.dequantize() + h

    def replayed(x: Tensor) -> Tensor:
        """The weights of ids that are as far apart as x's rows."""
        ids = torch.tensor([[0, 9], [-1, 63], [5, 5]])
        return ops.moe_route(wide, 2, ids=ids if x.is_contiguous() else far_apart(ids, 0))[0]

    def losses(x: Tensor, spread: bool = False) -> Tensor:
        """Of ids that are as far apart as rows, if spread."""
        ids = torch.tensor([[0, 9], [-1, 63], [5, 5]])
        return torch.stack(ops.moe_losses(x, far_apart(ids, 0) if spread else ids)[:2])

    def placed_by(x: Tensor) -> Tensor:
        """Where ids are placed that are as far apart as x's rows."""
        ids = torch.tensor([[0, 9], [-1, 63], [5, 5]])
        return ops.moe_dispatch(ids if x.is_contiguous() else far_apart(ids, 0), 64).rows

    placed = ops.moe_dispatch(torch.tensor([[2], [0], [2]]), 3)
    shares = torch.rand(3, 1), placed
    one = torch.rand(3, 1), ops.moe_dispatch(torch.zeros(3, 1, dtype=torch.int64), 1)
    w13, w2 = draw(3, 12, 64), draw(3, 64, 6)
    q13 = QuantTensor(w8.qweight[:36], w8.scales[:36], bits=8)
    q2 = QuantTensor(w8.qweight.view(-1)[: 192 * 6].view(192, 6), torch.rand(192, 1), bits=8)

    return {
        "rms_norm": (lambda x: ops.rms_norm(x, weight), row, 0),
        "add_rms_norm": (lambda x: ops.add_rms_norm(x, wide, weight)[0], row, 0),
        "add_rms_norm residual": (lambda x: ops.add_rms_norm(wide, x, weight)[0], row, 0),
        "swiglu gate": (lambda x: ops.swiglu(x, wide), row, 0),
        "swiglu up": (lambda x: ops.swiglu(wide, x), row, 0),
        "geglu": (lambda x: ops.geglu(x), row, 0),
        "rope": (lambda x: ops.rope(x, cos, sin), draw(2, 3, 4, 64), 1),
        "rope batch": (lambda x: ops.rope(x, cos, sin), draw(3, 2, 4, 64), 0),
        "quant_linear 4": (lambda x: ops.quant_linear(x, w4), row, 0),
        "quant_linear 8": (lambda x: ops.quant_linear(x, w8), draw(3, 4, 64), 0),
        "int8_linear": (lambda x: ops.int8_linear(x, by_row), row, 0),
        "int8_linear rows": (
            lambda x: ops.int8_linear(spread_codes(x), by_row) + 0 * x.sum(),
            row,
            0,
        ),
        "int8_rows": (lambda x: ops.int8_rows(x.detach()).dequantize() + 0 * x.sum(), row, 0),
        "rms_norm_int8": (lambda x: normed(x) + 0 * x.sum(), row, 0),
        "rms_norm_int8 residual": (lambda x: normed(wide, x) + 0 * x.sum(), row, 0),
        "moe_route": (lambda x: ops.moe_route(x, 4)[0], row, 0),
        "moe_route ids": (lambda x: replayed(x) + 0 * x.sum(), row, 0),
        "moe_losses": (losses, row, 0),
        "moe_losses ids": (lambda x: losses(x, not x.is_contiguous()), row, 0),
        "moe_dispatch": (lambda x: placed_by(x).sum() + 0 * x.sum(), row, 0),
        "moe_experts x": (lambda x: ops.moe_experts(x, *shares, w13, w2), row, 0),
        "moe_experts w13": (lambda w: ops.moe_experts(wide, *shares, w, w2), w13, 0),
        "moe_experts w2 rows": (
            lambda w: ops.moe_experts(wide[:, :3], *one, w13[:1, :, :3], w),
            w2[:1, :3],
            1,
        ),
        "moe_experts w2": (lambda w: ops.moe_experts(wide, *shares, w13, w), w2, 0),
        "quant_moe_experts x": (lambda x: ops.quant_moe_experts(x, *shares, q13, q2), row, 0),
        "moe_combine": (lambda x: ops.moe_combine(x, weight[:3, None].float(), placed), row, 0),
        "attention q": (lambda x: ops.attention(x, kv, kv), q, 2),
        "attention k": (lambda x: ops.attention(q, x, kv), kv, 2),
        "attention v": (lambda x: ops.attention(q, kv, x), kv, 2),
        "attention batch": (lambda x: ops.attention(x, x, x), draw(3, 1, 2, 64), 0),
        "attention_decode page": (
            lambda x: ops.attention_decode(
                torch.ones_like(q[:, :, :1]),
                x,
                x,
                torch.tensor([5]),
                block_table=torch.tensor([[2, 0]]),
            ),
            draw(3, 1, 4, 64),
            0,
        ),
        "attention_decode key": (
            lambda x: ops.attention_decode(torch.ones_like(q[:, :, :1]), x, x, torch.tensor([3])),
            draw(1, 1, 3, 64),
            2,
        ),
        "attention_decode_append_ page": (
            lambda x: (
                ops.attention_decode_append_(
                    *(q[:, :n, :1] for n in (2, 1, 1)),
                    x.detach(),
                    values,
                    torch.tensor([3]),
                    block_table=torch.tensor([[2, 0]]),
                )
                + 0 * x.sum()
            ),
            draw(3, 1, 4, 64),
            0,
        ),
        "attention_decode_append_ heads": (
            lambda x: (
                append(*(x[:, :, :1].detach() for _ in range(3)), x.detach(), three) + 0 * x.sum()
            ),
            draw(1, 3, 4, 64),
            1,
        ),
        "attention_decode_append_ value heads": (
            lambda x: (
                append(*(three[:, :, :1] for _ in range(3)), three.clone(), x.detach())
                + 0 * x.sum()
            ),
            draw(1, 3, 4, 64),
            1,
        ),
        "attention_decode heads": (
            lambda x: ops.attention_decode(x[:, :, :1], x, x, torch.tensor([3])),
            draw(1, 3, 4, 64),
            1,
        ),
        "attention_decode_with_lse q": (
            lambda x: ops.attention_decode_with_lse(x, kv, kv, torch.tensor([3]))[1],
            draw(1, 2, 3, 64),
            2,
        ),
        "attention_varlen q": (
            lambda x: ops.attention_varlen(x, x[:, :1], x[:, :1], cu),
            draw(3, 2, 64),
            0,
        ),
        "attention_varlen_with_lse k": (
            lambda x: ops.attention_varlen_with_lse(packed, x, x, cu, causal=True)[1],
            draw(3, 1, 64),
            0,
        ),
        "merge_attention out": (
            lambda x: ops.merge_attention([x, wide], [wide[:, 0].float(), wide[:, 1].float()])[0],
            row,
            0,
        ),
        "attention_with_lse k": (
            lambda x: ops.attention_with_lse(q, x, kv, window=(1, 1), softcap=2.0)[1],
            kv,
            2,
        ),
    }


NAMES = (
    "rms_norm", "add_rms_norm", "add_rms_norm residual", "swiglu gate", "swiglu up", "geglu", "rope",
    "rope batch", "quant_linear 4", "quant_linear 8", "int8_linear", "int8_linear rows", "int8_rows", "rms_norm_int8",
    "rms_norm_int8 residual", "attention q", "attention k", "attention v",
    "attention batch", "merge_attention out", "attention_decode page", "attention_decode key", "attention_decode_append_ page",
    "attention_decode heads", "attention_decode_append_ heads", "attention_decode_append_ value heads",
    "attention_decode_with_lse q",
    "attention_with_lse k", "attention_varlen q", "attention_varlen_with_lse k", "moe_route", "moe_route ids",
    "moe_losses", "moe_losses ids",
    "moe_dispatch", "moe_combine", "moe_experts x", "moe_experts w13", "moe_experts w2 rows", "moe_experts w2",
    "quant_moe_experts x",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_rows_beyond_two_to_the_31(name: str, cases, device):
    op, x, dim = cases[name]
    dense, far = x.clone().requires_grad_(), far_apart(x, dim).requires_grad_()
    results = []
    for leaf in (dense, far):
        y = op(leaf)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        results.append((y.detach(), grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_op_is_probed():
    assert {name.split()[0] for name in NAMES} == set(ops.__all__)
