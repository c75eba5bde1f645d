"""Attention's Hopper kernels of the backward: their arithmetic and their barriers as Python; on a Hopper GPU the
kernels themselves."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from tilewright import reference
from tilewright.bench import harness
from tilewright.kernels import _attention_hopper_bwd as hopper
from tilewright.lab import gluon
from tilewright.testing import assert_matches_reference

HERE = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
SHAPES = [  # B, H, G, S, T, D, causal; BLOCK_N of dq, BLOCK_M of dk and dv, STAGES
    (1, 1, 1, 128, 128, 64, True, 128, 64, 3),
    (2, 4, 2, 200, 333, 64, True, 128, 64, 2),
    (1, 2, 1, 130, 400, 128, False, 64, 64, 3),
    (1, 2, 1, 300, 300, 128, True, 64, 64, 3),
    (1, 1, 1, 64, 50, 64, False, 128, 64, 4),
    (1, 3, 1, 65, 477, 64, True, 64, 128, 3),
]


def gradients_by(
    seed: int, BLOCK_N: int, BLOCK_M: int, STAGES: int, module: ModuleType
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What attention_hopper_bwd launches, as Python."""

    def backward(dout, dlse, q, k, v, causal):
        (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
        stride = -(-S // 4) * 4
        top, center = torch.full((2, B * H, stride), torch.nan)
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))

        def blocks(rows: int, *tensors: Tensor) -> list[gluon.Descriptor]:
            return [gluon.Descriptor(x, (1, 1, rows, D)) for x in tensors]

        scale = D**-0.5 * module.LOG2_OF_E.value
        has_dlse = dlse is not None
        gluon.launch(
            module, "_attention_hopper_dq_kernel", (-(-S // 128), H, B), seed,
            *blocks(64, q, dout), *blocks(BLOCK_N, k, v), *blocks(64, dq),
            gluon.Pointer(dlse) if has_dlse else None, gluon.Pointer(top), gluon.Pointer(center),
            H, S, T, stride, scale, H // G, causal, has_dlse, D, 128, BLOCK_N, STAGES,
        )  # fmt: skip
        stats = [gluon.Descriptor(x[:, :S], (1, BLOCK_M)) for x in (top, center)]
        gluon.launch(
            module, "_attention_hopper_dkv_kernel", (-(-T // 128), G, B), seed,
            *blocks(64, k, v), *blocks(BLOCK_M, q, dout), *stats, *blocks(64, dk, dv),
            H, S, T, scale, H // G, causal, D, BLOCK_M, 128, STAGES,
        )  # fmt: skip
        return dq, dk, dv

    return backward


def launched(dout, dlse, q, k, v, causal):
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    hopper.attention_hopper_bwd(dout, dlse, q, k, v, dq, dk, dv, causal, q.size(-1) ** -0.5)
    return dq, dk, dv


def attention_with(backward: Callable, lse: bool) -> Callable:
    """attention, or attention_with_lse, of which only the backward is ours."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, causal):
            ctx.save_for_backward(q, k, v)
            ctx.causal = causal
            out, sums = reference.attention_with_lse(q, k, v, causal=causal)
            return (out, sums) if lse else out

        @staticmethod
        def backward(ctx, dout, dlse=None):
            dlse = None if dlse is None else dlse.contiguous()
            return *backward(dout.contiguous(), dlse, *ctx.saved_tensors, ctx.causal), None

    return lambda q, k, v, causal: Attention.apply(q, k, v, causal)


def check(backward: Callable, shape: tuple, seed: int, lse: bool, device: str):
    B, H, G, S, T, D, causal = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, D, generator=generator).to(device).transpose(1, 2)
    k, v = (torch.randn(B, G, T, D, generator=generator).to(device) for _ in "kv")
    q[:, :, -1] *= 8  # a row with nearly all its weight on one key
    assert_matches_reference(
        attention_with(backward, lse),
        reference.attention_with_lse if lse else reference.attention,
        *(x.requires_grad_() for x in (q, k, v)), dtype=torch.bfloat16, causal=causal,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, seed):
    backward = launched if HERE else gradients_by(seed, *shape[7:], hopper)
    device = "cuda" if HERE else "cpu"
    check(backward, shape[:7], seed, seed != 1, device)


FAULTS = [  # what is taken out, what is put there
    ("        mbarrier.wait(empty.index(stage), phase ^ 1)\n        mbarrier.expect(full.index(stage), k",
     "        mbarrier.expect(full.index(stage), k"),
    ("        mbarrier.wait(empty.index(stage), phase ^ 1)\n        of_rows", "        of_rows"),
    ("    mbarrier.wait(full.index(stage), phase)\n    keys", "    keys"),
    ("    mbarrier.wait(full.index(stage), phase)\n    queries", "    queries"),
    ("    mbarrier.wait(q_full.index(part), 0)\n", ""),
    ("    mbarrier.wait(dout_full.index(part), 0)\n", ""),
    ("    mbarrier.wait(k_full.index(part), 0)\n", ""),
    ("    mbarrier.wait(v_full.index(part), 0)\n", ""),
    ("    mbarrier.arrive(empty.index(stage))\n    return dq", "    return dq"),
    ("    mbarrier.arrive(empty.index(stage))\n    return dk", "    return dk"),
    ("    dq, pk = warpgroup_mma_wait(0, (dq, pk))\n    mbarrier.arrive(empty.index(stage))\n",
     "    mbarrier.arrive(empty.index(stage))\n    dq, pk = warpgroup_mma_wait(0, (dq, pk))\n"),
    ("    dk, dv = warpgroup_mma_wait(0, (dk, dv))\n    mbarrier.arrive(empty.index(stage))\n",
     "    mbarrier.arrive(empty.index(stage))\n    dk, dv = warpgroup_mma_wait(0, (dk, dv))\n"),
    (" + v_desc.block_type.nbytes", ""),
    ("of_rows + of_stats", "of_rows"),
    ("seen = (cols < T)[None, :]", "seen = (cols < T + BLOCK_N)[None, :]"),
    ("seen & (cols[None, :] <= (rows + (T - S))[:, None])", "seen"),
    ("p = gl.where(cols[:, None] <= here, p, 0.0)", "pass"),
    ("gl.maximum(m, gl.max(s, 1) * scale)", "m + gl.max(s, 1) * 0"),
    ("    pk = pk * alpha_o[:, None]\n", ""),
    ("dq * alpha_o[:, None] - pk * shift_o[:, None]", "dq * alpha_o[:, None]"),
    ("rows + (T - S) <= 0", "rows < 0"),
    ("center = gl.where(still, 0.0, mean)", "pass"),
    ("dp = gl.where(here == 0, 0.0, dp)", "pass"),
    ("center = center - dlse", "center = center + dlse"),
    ("m + gl.log2(l), mask", "m, mask"),
    ("dq = dq + pk * gl", "dq = dq - pk * gl"),
    ("whole = first + T - S + 1", "whole = first + T - S + BLOCK_M"),
    ("end = min(T, first + BLOCK_M + T - S)", "end = min(T, first + T - S)"),
    ("begin = max(first + S - T, 0) // BLOCK_M * BLOCK_M", "begin = (first + BLOCK_N + S - T) // BLOCK_M * BLOCK_M"),
    ("first + BLOCK_N - 1 + S - T", "first + S - T"),
    ("h = g * GROUP + n // count", "h = g * GROUP"),
    ("dk, dv, r * count + i, begin + i * BLOCK_M, keys, values,\n                q, dout, top, center, full, empty, cols, S, T, scale,\n                False",
     "dk, dv, i, begin + i * BLOCK_M, keys, values,\n                q, dout, top, center, full, empty, cols, S, T, scale,\n                False"),
    ("(dk * (scale * LN2))", "(dk * scale)"),
    ("factor = scale * LN2 / l", "factor = scale / l"),
]  # fmt: skip


@pytest.mark.parametrize("was, becomes", FAULTS, ids=lambda x: str(x).strip()[:60])
def test_a_fault_is_noticed(was, becomes, tmp_path):
    text = Path(hopper.__file__).read_text()
    assert text.count(was) == 1
    path = tmp_path / "faulty.py"
    path.write_text(
        text.replace(was, becomes)
        .replace("from ._tile", "from tilewright.kernels._tile")
        .replace("from ._attention_hopper", "from tilewright.kernels._attention_hopper")
    )
    faulty = harness.load(path)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(6):
            for shape in ((1, 2, 1, 170, 170, 64, True), (1, 1, 1, 64, 330, 64, False)):
                check(gradients_by(seed, 64, 64, 2, faulty), shape, seed, True, "cpu")
