"""Attention's Hopper kernel: its arithmetic and its barriers as Python, for there is no interpreter of
Gluon.  On a Hopper GPU test_attention.py runs the kernel itself."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
from tilewright import reference
from tilewright.bench import harness
from tilewright.kernels import _attention_hopper as hopper
from tilewright.lab import gluon
from tilewright.testing import assert_matches_reference

SHAPES = [  # B, H, G, S, T, D, causal, BLOCK_N, STAGES
    (1, 1, 1, 128, 128, 64, True, 128, 3),
    (2, 4, 2, 200, 333, 64, True, 128, 2),
    (1, 2, 1, 130, 1000, 128, False, 128, 2),
    (1, 2, 1, 300, 300, 128, True, 128, 2),
    (1, 1, 1, 320, 321, 256, True, 64, 2),
    (1, 1, 1, 64, 50, 64, False, 64, 2),
    (1, 1, 1, 65, 777, 64, True, 64, 3),
]


def attention_by(seed: int, BLOCK_N: int, STAGES: int, module: ModuleType = hopper) -> Callable:
    """attention_with_lse by the kernel as Python."""

    def op(q, k, v, causal):
        (B, H, S, D), (G, T) = q.shape, k.shape[1:3]
        out, lse = torch.full_like(q, torch.nan), torch.full((B, H, S), torch.nan)
        blocks = ((q, 64), (k, BLOCK_N), (v, BLOCK_N), (out, 64))
        gluon.launch(
            module, "_attention_hopper_kernel", (-(-S // 128), H, B), seed,
            *(gluon.Descriptor(x, (1, 1, rows, D)) for x, rows in blocks), gluon.Pointer(lse),
            H, S, T, D**-0.5 * hopper.LOG2_OF_E.value, H // G, causal, D, 128, BLOCK_N, STAGES,
        )  # fmt: skip
        return out, lse

    return op


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_attends(shape, seed):
    B, H, G, S, T, D, causal, N, stages = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, S, H, D, generator=generator).transpose(1, 2)
    k, v = (torch.randn(B, G, T, D, generator=generator) for _ in "kv")
    assert_matches_reference(
        attention_by(seed, N, stages), reference.attention_with_lse, q, k, v,
        dtype=torch.float32, causal=causal,
    )  # fmt: skip


FAULTS = [  # what is taken out, what is put there
    ("    mbarrier.wait(empty.index(stage), phase ^ 1)\n", ""),
    ("    mbarrier.wait(k_full.index(stage), phase)\n", ""),
    ("    mbarrier.wait(v_full.index(before), phase_before)\n", ""),
    ("    mbarrier.wait(v_full.index(last), phase)\n", ""),
    ("    mbarrier.wait(q_full.index(part), 0)\n", ""),
    ("    mbarrier.wait(k_full.index(0), 0)\n", ""),
    ("    mbarrier.arrive(v_empty.index(before))\n", ""),
    ("    mbarrier.arrive(k_empty.index(stage))\n", ""),
    ("count=2)  # both", "count=1)  # both"),
    ("    s = warpgroup_mma_wait(1, (s,))\n    mbarrier.arrive(k_empty.index(stage))\n",
     "    mbarrier.arrive(k_empty.index(stage))\n    s = warpgroup_mma_wait(1, (s,))\n"),
    ("    acc = warpgroup_mma_wait(0, (acc,))\n    mbarrier.arrive(v_empty.index(before))\n",
     "    mbarrier.arrive(v_empty.index(before))\n    acc = warpgroup_mma_wait(0, (acc,))\n"),
    ("seen = (cols < T)[None, :]", "seen = (cols < T + BLOCK_N)[None, :]"),
    ("seen & (cols[None, :] <= (rows + (T - S))[:, None])", "seen"),
    ("<= (rows + (T - S))", "<= (rows)"),
    ("    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]\n", ""),
    ("l * alpha + gl.sum(p, 1), alpha", "l + gl.sum(p, 1), alpha"),
    ("gl.maximum(m, gl.max(s, 1) * scale)", "m + gl.max(s, 1) * 0"),
    ("whole = first + T - S + 1", "whole = first + T - S + BLOCK_M"),
    ("end = min(T, first + BLOCK_M + T - S)", "end = min(T, first + T - S)"),
    ("range(max(edge, 1), count)", "range(edge, count)"),
    ("1.0 / l", "1.0 + 0 * l"),
    ("(m + gl.log2(l)) * LN2", "(m + gl.log2(l))"),
]  # fmt: skip


@pytest.mark.parametrize("was, becomes", FAULTS, ids=lambda x: str(x).strip()[:50])
def test_a_fault_is_noticed(was, becomes, tmp_path):
    text = Path(hopper.__file__).read_text()
    assert text.count(was) == 1
    path = tmp_path / "faulty.py"
    path.write_text(
        text.replace(was, becomes).replace("from ._tile", "from tilewright.kernels._tile")
    )
    faulty = harness.load(path)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(6):
            for S, T, causal in ((200, 790, True), (64, 330, False), (64, 384, False)):
                generator = torch.Generator().manual_seed(seed)
                q, k, v = (torch.randn(1, 1, n, 64, generator=generator) for n in (S, T, T))
                assert_matches_reference(
                    attention_by(seed, 128, 2, faulty), reference.attention_with_lse, q, k, v,
                    dtype=torch.float32, causal=causal,
                )  # fmt: skip
