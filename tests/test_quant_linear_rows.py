"""quant_linear's Triton launchers beyond one tile a program: K shared out, and the weight dequantised for many
rows; on a GPU or interpreted."""

import importlib
import weakref
from pathlib import Path

import pytest
import torch

from tilewright.bench import harness
from tilewright.testing import assert_within

pytest.importorskip("triton")
pytestmark = pytest.mark.triton
launches = harness.load(Path(__file__).with_name("quant_launches.py"))
DEVICE, DTYPES, KINDS = launches.DEVICE, launches.DTYPES, launches.KINDS
weight, launch, launch_dgrad = launches.weight, launches.launch, launches.launch_dgrad
expected = launches.expected
# (N, K, G): a tile a group, several, groups that no power of two divides, and a row that is one
WEIGHTS = [(70, 512, 16), (33, 1152, 9), (19, 300, 3), (40, 100, 1)]


def parts():
    return importlib.import_module("tilewright.kernels._quant_weight")


def tiles():
    return importlib.import_module("tilewright.kernels._quant_tiles")


def arguments(w):
    offset, kind = parts().offset_of(w.scales, w.zeros, w.minima, w.codebook)
    return w.bits, w.qweight, w.scales, offset, kind, w.group


def assert_forward(x, w, bias, dtype):
    y = launch(x, w, bias)
    assert y.dtype == dtype and y.shape == (len(x), w.out_features) and y.is_contiguous()
    truth = expected(x, w, bias, torch.float64)
    eps = torch.finfo(dtype).eps
    assert_within(y.double(), expected(x, w, bias, dtype), truth, eps, str(w.shape))


@pytest.mark.parametrize("shares", [2, 4, 8])
@pytest.mark.parametrize("sizes", WEIGHTS, ids=str)
def test_shared_out(sizes, shares, dtype):
    i = (WEIGHTS.index(sizes) + shares) % 4
    w = weight(*sizes, 4 if i % 2 else 8, KINDS[i])
    gemm = tiles().GEMM
    config = gemm.heuristic(dtype, w.bits, w.group, 16, 64, 512) | {"SHARES": shares}
    x = torch.randn(21, sizes[1], device=DEVICE).to(dtype)
    bias = torch.randn(sizes[0], device=DEVICE).to(dtype) if i else None
    with gemm.forced(config):
        assert_forward(x, w, bias, dtype)
        assert torch.equal(launch(x, w, bias), launch(x, w, bias))


def test_few_tiles_share_out_and_many_do_not():
    heuristic = tiles().GEMM.heuristic
    shares = [heuristic(torch.bfloat16, 4, 128, 16, N, 4096)["SHARES"] for N in (64, 4096, 32768)]
    assert shares == [8, 8, 1]
    assert heuristic(torch.bfloat16, 4, 128, 16, 4096, 128)["SHARES"] == 1  # one tile of K


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", WEIGHTS, ids=str)
def test_dequantized(sizes, kind, bits):
    dtype = DTYPES[(WEIGHTS.index(sizes) + KINDS.index(kind)) % 3]
    w = weight(*sizes, bits, kind)
    ours, theirs = parts().dequantized(*arguments(w), dtype), w.dequantize(dtype)
    if kind == "minima":  # a fused multiply-add, where there is one
        truth = w.dequantize(torch.float64)
        assert_within(ours.double(), theirs.double(), truth, torch.finfo(dtype).eps, kind)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("most", [1 << 28, 5000])
@pytest.mark.parametrize("sizes", WEIGHTS, ids=str)
def test_dense(sizes, most, monkeypatch):
    monkeypatch.setattr(parts(), "MOST", most)
    made, alive = [], []
    original = parts().dequantized

    def noting(*given):
        assert not any(one() is not None for one in alive)  # one at a time
        made.append(original(*given))
        alive.append(weakref.ref(made[-1]))
        return made.pop()

    monkeypatch.setattr(parts(), "dequantized", noting)
    i = WEIGHTS.index(sizes)
    kind = KINDS[(i + (most == 5000)) % 4]
    dtype = DTYPES[1 + i % 2]
    w = weight(*sizes, 4 if i < 2 else 8, kind)
    x = torch.randn(12, sizes[1], device=DEVICE).to(dtype)
    dy = torch.randn(12, sizes[0], device=DEVICE).to(dtype)
    with tiles().DENSE.forced({"DENSE": 1}), tiles().DENSE_DGRAD.forced({"DENSE": 1}):
        assert_forward(x, w, torch.randn(sizes[0], device=DEVICE).to(dtype), dtype)
        assert_forward(x[:, :1].expand(-1, sizes[1]), w, None, dtype)
        dx = launch_dgrad(dy, w)
    assert dx.dtype == dtype and dx.shape == x.shape and dx.is_contiguous()
    assert len(alive) >= (6 if most < 1e8 else 3)
    truth = dy.double() @ w.dequantize(torch.float64)
    eager = (dy @ w.dequantize(dtype)).double()
    assert_within(dx.double(), eager, truth, torch.finfo(dtype).eps, kind)


def test_many_rows_are_dense_but_of_float32(monkeypatch):
    made: list[torch.dtype] = []
    original = parts().dequantized

    def noting(*given):
        made.append(given[-1])
        return original(*given)

    monkeypatch.setattr(parts(), "dequantized", noting)
    w = weight(24, 128, 2, 4, "zeros")
    for dtype in DTYPES:
        for rows in (64, 300):
            x = torch.randn(rows, 128, device=DEVICE).to(dtype)
            assert_forward(x, w, None, dtype)
            launch_dgrad(torch.randn(rows, 24, device=DEVICE).to(dtype), w)
        launch(x, w, None, "int8")  # float32 by then
    assert made == [torch.bfloat16] * 2 + [torch.float16] * 2


@pytest.mark.parametrize("kind", ["zeros", "codebook"])
@pytest.mark.parametrize("sizes", WEIGHTS[1:], ids=str)
def test_parts_are_no_larger_than_asked(sizes, kind, monkeypatch):
    most = 5000
    monkeypatch.setattr(parts(), "MOST", most)
    w = weight(*sizes, 4, kind)
    rows = list(parts().by_rows(*arguments(w), torch.bfloat16))
    columns = list(parts().by_columns(*arguments(w), torch.bfloat16))
    assert all(t.nbytes <= most for _, t in rows)
    assert all(t.nbytes <= most for _, t in columns)
    whole = w.dequantize(torch.bfloat16)
    assert torch.equal(torch.cat([t for _, t in rows]), whole)
    assert torch.equal(torch.cat([t for _, t in columns], 1), whole)
    assert all(torch.equal(whole[at], t) for at, t in rows)
    assert all(torch.equal(whole[:, at], t) for at, t in columns)


def test_deterministic_algorithms_are_ours():
    w, x = weight(24, 128, 2, 4, "zeros"), torch.randn(300, 128, device=DEVICE).bfloat16()
    calls = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(torch, "mm", lambda *a, **k: calls.append(a))
    torch.use_deterministic_algorithms(True)
    try:
        assert_forward(x, w, None, torch.bfloat16)
        launch_dgrad(torch.randn(300, 24, device=DEVICE).bfloat16(), w)
    finally:
        torch.use_deterministic_algorithms(False)
        monkey.undo()
    assert not calls


@pytest.mark.interpreted
def test_dequantized_moves_each_byte_once():
    from tilewright.lab import interpreter

    interpreter.install()
    w = weight(40, 512, 4, 4, "zeros")
    w_cpu = [t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments(w)]
    with interpreter.recording() as launches:
        parts().dequantized(*w_cpu, torch.bfloat16)
    (launched,) = launches
    assert launched.bytes_loaded == 40 * (512 // 2 + 4 * 2 * 2)
    assert launched.bytes_stored == launched.distinct_bytes_stored == 40 * 512 * 2


def test_no_weight():
    w = weight(6, 64, 2, 4, "zeros")
    with tiles().DENSE.forced({"DENSE": 1}), tiles().DENSE_DGRAD.forced({"DENSE": 1}):
        assert launch(torch.empty(0, 64, device=DEVICE), w).shape == (0, 6)
        assert launch_dgrad(torch.empty(0, 6, device=DEVICE), w).shape == (0, 64)


# one row and, of float32, several without tensor cores; a tile and several with them, K shared
# out; G such that blocks of 256 scales end within rows
@pytest.mark.parametrize(
    "shape", [(1, 70, 448, 7), (5, 70, 448, 7), (12, 70, 1024, 16), (70, 90, 320, 5)]
)
@pytest.mark.parametrize("dense", [0, 1])
def test_nested_scales(shape, dense, dtype):
    """Looked up as they are read, a byte each; before, where the weight is written out."""
    M, N, K, G = shape
    w = weight(N, K, G, 4, "nested")
    x, dy = (torch.randn(M, n, device=DEVICE).to(dtype) for n in (K, N))
    with tiles().DENSE.forced({"DENSE": dense}), tiles().DENSE_DGRAD.forced({"DENSE": dense}):
        assert_forward(x, w, torch.randn(N, device=DEVICE).to(dtype), dtype)
        dx = launch_dgrad(dy, w)
        if launches.INTERPRET and not dense:
            with launches.interpreter.recording() as made:
                launch(x, w)
            read = sum(one.distinct_bytes_loaded for one in made if "shares" not in one.kernel)
            told = w.nested.code.nbytes + w.nested.scales.nbytes + 4 + w.codebook.nbytes
            assert read <= w.qweight.nbytes + w.scales.nbytes + x.nbytes + told
    truth = dy.double() @ w.dequantize(torch.float64)
    eager = (dy @ w.dequantize(dtype)).double()
    assert_within(dx.double(), eager, truth, torch.finfo(dtype).eps, "nested")
