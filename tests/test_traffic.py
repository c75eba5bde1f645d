"""What each kernel moves, counted in the interpreter, against the least its mathematics needs and
against what its tiles may read again.

The least is each benchmark's `cost`, plus what a forward tells of its rows (rstd, lse).  What may be
loaded again is a formula in the sizes and the tile's shape, here beside the op.  A kernel that
visits tiles outside its mask exceeds both its loads and its FLOPs.
"""

import itertools
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tilewright.bench import harness

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

ROOT = Path(__file__).resolve().parents[1]
FP32, BF16 = torch.float32, torch.bfloat16
BLOCKS = ("BLOCK_M", "BLOCK_N")


@pytest.fixture(autouse=True)
def interpreter():
    from tilewright.lab import interpreter as lab

    lab.install()
    return lab


attention = harness.load(ROOT / "tests/attention_traffic.py")
moe = harness.load(ROOT / "tests/moe_traffic.py")


def definition(op: str) -> ModuleType:
    return harness.load(ROOT / f"benchmarks/bench_{op}.py")


def power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# op -> formula of (sizes, bytes an element): the most bytes the forward loads


def norm_loads(inputs: int) -> Callable[..., int]:
    def most(e: int, *, M: int, N: int) -> int:
        from tilewright.kernels.rms_norm import TILE, WHOLE_FWD

        if N > WHOLE_FWD:  # rows in tiles, read twice (never what the first pass stored: it may not
            return (2 * inputs * M * N + M * N) * e  # be visible yet), the weight once a row
        rows = min(power(M), max(1, TILE // power(N)))
        return (inputs * M * N + ceil(M / rows) * N) * e  # the weight once a block of rows

    return most


def glu_loads(e: int, *, rows: int, width: int, packed: bool) -> int:
    return 2 * rows * width * e


def rope_loads(e: int, *, tokens: int, heads: int, dim: int, interleaved: bool = False) -> int:
    return tokens * heads * (dim + dim) * e  # the tables once a head


def quant_tiles(e: int, M: int, N: int, K: int, bits: int) -> dict[str, int]:
    from tilewright.kernels import quant_linear as q

    dtype = FP32 if e == 4 else BF16
    key = dtype, bits, 32, power(M), power(N), power(K)
    if q.is_gemv(dtype, M):
        return q.GEMV.heuristic(*key) | {"BLOCK_M": M}
    return q.GEMM.heuristic(*key)


def quant_loads(e: int, *, M: int, N: int, K: int, bits: int) -> int:
    t = quant_tiles(e, M, N, K, bits)
    tiles = K // 32 * ceil(32 / t["BLOCK_K"])
    weight = N * K * bits // 8 + N * tiles * 2 * (2 if bits == 4 else 1)
    # a weight once a block of rows, the rows once a block of outputs, and what shares of K add up to
    shared = quant_told(M=M, N=N, K=K, bits=bits) // 2 * 4
    return ceil(M / t["BLOCK_M"]) * weight + ceil(N / t["BLOCK_N"]) * M * K * e + shared


def quant_told(*, M: int, N: int, K: int, bits: int) -> int:
    """Sums that shares of K store, and a second kernel loads."""
    shares = quant_tiles(2, M, N, K, bits).get("SHARES", 1)
    assert M <= 8 or shares == quant_tiles(4, M, N, K, bits)["SHARES"]
    return 2 * shares * M * N if shares > 1 else 0


def quant_flops(e: int, *, M: int, N: int, K: int, bits: int) -> int:
    t = quant_tiles(e, M, N, K, bits)
    if "SPLIT" in t:
        return 0  # no tensor cores
    rows, columns = ceil(M / t["BLOCK_M"]) * t["BLOCK_M"], ceil(N / t["BLOCK_N"]) * t["BLOCK_N"]
    return 2 * rows * columns * K


def int8_tiles(e: int, M: int, N: int, K: int) -> dict[str, int]:
    from tilewright.kernels._tune import fitted
    from tilewright.kernels.int8_linear import PRODUCT

    return fitted(PRODUCT.heuristic(FP32 if e == 4 else BF16, power(M), power(N), power(K)), K)


def int8_loads(e: int, *, M: int, N: int, K: int) -> int:
    """x twice for its codes; the weight once a block of rows, codes and scales once a block of outputs."""
    t = int8_tiles(e, M, N, K)
    product = ceil(M / t["BLOCK_M"]) * N * (K + 4) + ceil(N / t["BLOCK_N"]) * M * (K + 4)
    return 2 * M * K * e + product


def int8_flops(e: int, *, M: int, N: int, K: int) -> int:
    t = int8_tiles(e, M, N, K)
    return 2 * prod(
        ceil(n / t[f"BLOCK_{d}"]) * t[f"BLOCK_{d}"] for d, n in zip("MNK", (M, N, K), strict=True)
    )


def norm_int8_loads(e: int, *, M: int, N: int) -> int:
    """add_rms_norm's; or x and residual three times, the weight twice a row."""
    from tilewright.kernels.rms_norm import WHOLE_FWD

    return 8 * M * N * e if N > WHOLE_FWD else norm_loads(2)(e, M=M, N=N)


NORM = ({"M": 5, "N": 96}, {"M": 70, "N": 33}, {"M": 2, "N": 20000})
GLU = (
    {"rows": 5, "width": 96, "packed": False},
    {"rows": 3, "width": 1500, "packed": True},
)
CASES: dict[str, tuple[tuple[dict[str, Any], ...], Callable[..., int], Callable[..., int] | None]]
CASES = {
    "rms_norm": (NORM, norm_loads(1), None),
    "add_rms_norm": (NORM, norm_loads(2), None),
    "swiglu": (GLU, glu_loads, None),
    "geglu": (GLU, glu_loads, None),
    "rope": (
        (
            {"tokens": 33, "heads": 3, "dim": 64},
            {"tokens": 7, "heads": 5, "dim": 80, "interleaved": True},
        ),
        rope_loads,
        None,
    ),
    "attention": (
        (
            {"B": 1, "H": 4, "G": 2, "S": 150, "T": 150, "D": 64},
            {"B": 2, "H": 2, "G": 1, "S": 40, "T": 170, "D": 48},
            {"B": 1, "H": 3, "G": 3, "S": 1, "T": 100, "D": 128},
        ),
        attention.attention_loads,
        attention.attention_flops,
    ),
    "attention_decode": (
        (
            {"B": 2, "H": 4, "G": 2, "T": 150, "D": 64, "page": 150},
            {"B": 2, "H": 6, "G": 2, "T": 100, "D": 48, "page": 7},
            {"B": 1, "H": 3, "G": 1, "T": 700, "D": 64, "page": 16},
        ),
        attention.decode_loads,
        attention.decode_flops,
    ),
    "attention_varlen": (
        (
            {"N": 3, "H": 2, "G": 1, "S": 70, "D": 64},
            {"N": 5, "H": 2, "G": 2, "S": 40, "D": 48},
        ),
        attention.varlen_loads,
        attention.varlen_flops,
    ),
    "quant_linear": (
        (
            {"M": 1, "N": 40, "K": 192, "bits": 4},
            {"M": 5, "N": 33, "K": 96, "bits": 8},
            {"M": 70, "N": 70, "K": 64, "bits": 4},
            {"M": 12, "N": 70, "K": 1024, "bits": 4},  # K shared out
        ),
        quant_loads,
        quant_flops,
    ),
    "int8_linear": (
        ({"M": 5, "N": 40, "K": 192}, {"M": 70, "N": 70, "K": 300}),
        int8_loads,
        int8_flops,
    ),
    "rms_norm_int8": (NORM, norm_int8_loads, None),
    "moe_losses": (moe.LOSSES, moe.losses_loads, None),
    "moe_route": (moe.ROUTE, moe.route_loads, None),
    "moe_dispatch": (moe.DISPATCH, moe.dispatch_loads, None),
    "moe_combine": (moe.COMBINE, moe.combine_loads, None),
    "moe_experts": (moe.EXPERTS, moe.experts_loads, moe.experts_flops),
    "quant_moe_experts": (moe.QUANT, moe.quant_loads, moe.quant_flops),
}
# four bytes that a forward tells of its rows, or is told: how many
TOLD = {
    "rms_norm": lambda M, N: M,
    "add_rms_norm": lambda M, N: M,
    "quant_linear": quant_told,
    "int8_linear": lambda M, N, K: M * K // 2 + 2 * M,  # codes and scales, stored and loaded
    "moe_dispatch": moe.dispatch_told,
    "moe_losses": moe.losses_told,
    "attention": lambda B, H, S, **_: B * H * S,
    "attention_decode": attention.decode_told,
    "attention_varlen": lambda N, H, S, **_: N * S * (H + 2),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "op, sizes",
    [(op, sizes) for op, (shapes, *_) in CASES.items() for sizes in shapes],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_forward(op, sizes, dtype, interpreter):
    bench = definition(op)
    _, most_loaded, flops = CASES[op]
    inputs = bench.inputs(dtype, "cpu", **sizes)
    with interpreter.recording() as launches, torch.no_grad():
        bench.PROVIDERS["tilewright"](**inputs)
    least, _ = bench.cost(dtype, **sizes)
    if op in TOLD:
        least += 4 * TOLD[op](**sizes)
    if op in moe.BETWEEN:
        least += moe.BETWEEN[op](dtype.itemsize, **sizes)
    loaded = sum(launch.bytes_loaded for launch in launches)
    stored = sum(launch.bytes_stored for launch in launches)
    distinct = sum(
        launch.distinct_bytes_loaded + launch.distinct_bytes_stored for launch in launches
    )
    assert distinct <= least
    assert stored == sum(launch.distinct_bytes_stored for launch in launches)  # nothing twice
    assert loaded <= most_loaded(dtype.itemsize, **sizes)
    done = sum(launch.dot_flops for launch in launches)
    assert done == (flops(dtype.itemsize, **sizes) if flops else 0)


# op -> formula of (sizes, bytes an element): distinct bytes beyond the benchmark's backward_cost, most
# bytes loaded, bytes stored, tl.dot's FLOPs


def norm_backward(inputs: int) -> Callable[..., tuple[int, int, int, int]]:
    def counts(e: int, *, M: int, N: int) -> tuple[int, int, int, int]:
        from tilewright.kernels.rms_norm import DW_PROGRAMS, TILE, WHOLE_BWD

        assert N <= WHOLE_BWD
        tiles = ceil(M / min(power(M), max(1, TILE // power(N))))
        programs = ceil(tiles / ceil(tiles / DW_PROGRAMS))
        partial = 4 * programs * N  # of dw, float32, a program; torch sums them
        loaded = inputs * M * N * e + 4 * M + programs * N * e
        return partial - N * e, loaded, M * N * e + partial, 0

    return counts


def glu_backward(e: int, *, rows: int, width: int, packed: bool) -> tuple[int, int, int, int]:
    n = rows * width * e
    return 0, 3 * n, 2 * n, 0


def rope_backward(e: int, **sizes: int) -> tuple[int, int, int, int]:
    return 0, rope_loads(e, **sizes), sizes["tokens"] * sizes["heads"] * sizes["dim"] * e, 0


def quant_backward(e: int, *, M: int, N: int, K: int, bits: int) -> tuple[int, int, int, int]:
    from tilewright.kernels.quant_linear import DGRAD

    t = DGRAD.heuristic(FP32 if e == 4 else BF16, 4, 32, power(M), power(N), power(K))
    tiles, blocks = K // 32 * ceil(32 / t["BLOCK_K"]), ceil(M / t["BLOCK_M"])
    codes, scales = N * K * bits // 8, N * 2 * (2 if bits == 4 else 1)
    # the weight once a block of rows, dy once a tile of columns
    loaded = blocks * (codes + scales * tiles) + tiles * M * N * e
    columns = tiles * t["BLOCK_K"]
    flops = 2 * blocks * t["BLOCK_M"] * ceil(N / t["BLOCK_N"]) * t["BLOCK_N"] * columns
    return 0, loaded, M * K * e, flops


def int8_backward(e: int, *, M: int, N: int, K: int) -> tuple[int, int, int, int]:
    from tilewright.kernels.quant_linear import DGRAD

    t = DGRAD.heuristic(FP32 if e == 4 else BF16, 8, K, power(M), power(N), power(K))
    tiles, blocks = ceil(K / t["BLOCK_K"]), ceil(M / t["BLOCK_M"])
    loaded = blocks * N * (K + 4 * tiles) + tiles * M * N * e
    rows, outputs = blocks * t["BLOCK_M"], ceil(N / t["BLOCK_N"]) * t["BLOCK_N"]
    return 0, loaded, M * K * e, 2 * rows * outputs * tiles * t["BLOCK_K"]


BACKWARD: dict[str, tuple[tuple[dict[str, Any], ...], Callable[..., tuple[int, int, int, int]]]]
BACKWARD = {
    "rms_norm": (NORM[:2], norm_backward(2)),
    "add_rms_norm": (NORM[:2], norm_backward(3)),
    "swiglu": (GLU, glu_backward),
    "geglu": (GLU, glu_backward),
    "rope": (CASES["rope"][0], rope_backward),
    "quant_linear": (CASES["quant_linear"][0], quant_backward),
    "int8_linear": (CASES["int8_linear"][0], int8_backward),
    "moe_losses": (moe.LOSSES, moe.losses_backward),
    "moe_route": (moe.ROUTE, moe.route_backward),
    "moe_combine": (moe.COMBINE, moe.combine_backward),
    "moe_experts": (moe.EXPERTS, moe.experts_backward),
    "quant_moe_experts": (moe.QUANT, moe.quant_backward),
    "attention": (CASES["attention"][0], attention.attention_backward),
    "attention_varlen": (CASES["attention_varlen"][0], attention.varlen_backward),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "op, sizes",
    [(op, sizes) for op, (shapes, _) in BACKWARD.items() for sizes in shapes],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_backward(op, sizes, dtype, interpreter):
    bench = definition(op)
    inputs = bench.inputs(dtype, "cpu", **sizes)
    if op == "attention":
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = bench.PROVIDERS["tilewright"](**inputs)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    with interpreter.recording() as launches:
        torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])
    least, _ = bench.backward_cost(dtype, **sizes)
    more, most_loaded, stored, flops = BACKWARD[op][1](dtype.itemsize, **sizes)
    distinct = sum(
        launch.distinct_bytes_loaded + launch.distinct_bytes_stored for launch in launches
    )
    assert distinct <= least + more
    assert sum(launch.bytes_loaded for launch in launches) <= most_loaded
    assert sum(launch.bytes_stored for launch in launches) == stored
    assert sum(launch.dot_flops for launch in launches) == flops


WINDOWS = [  # S, T, left, right
    (150, 150, 40, 0),
    (150, 150, 129, 0),
    (40, 170, 20, -1),
    (170, 40, 5, 9),
    (100, 100, -1, 30),
]


def met(first: int, block: int, S: int, T: int, left: int, right: int, tile: int) -> int:
    """Keys in the tiles that queries first.. of a block meet; with the sides exchanged, queries."""
    begin = max(first + T - S - left, 0) // tile * tile if left >= 0 else 0
    end = min(max(first + block + T - S + right, 0), T) if right >= 0 else T
    return ceil(max(end - begin, 0) / tile) * tile


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("S, T, left, right", WINDOWS)
def test_a_window_visits_its_tiles_alone(S, T, left, right, dtype, interpreter):
    from tilewright import ops
    from tilewright.kernels._attention_bwd import DKV, DQ
    from tilewright.kernels._tile import padded
    from tilewright.kernels.attention import FWD

    H, G, D = 2, 1, 32
    q, k, v = (torch.randn(1, n, m, D, dtype=dtype) for n, m in ((H, S), (G, T), (G, T)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with interpreter.recording() as launches:
        out = ops.attention(*inputs, window=(left, right))
    with interpreter.recording() as backward:
        torch.autograd.grad(out, inputs, torch.randn_like(out))
    key = dtype, padded(D), True, power(S)
    for products, launch, tunable in zip(
        (2, 4), (launches[0], backward[0]), (FWD, DQ), strict=True
    ):
        m, n = (tunable.heuristic(*key)[name] for name in ("BLOCK_M", "BLOCK_N"))
        pairs = m * sum(met(i, m, S, T, left, right, n) for i in range(0, S, m))
        assert launch.dot_flops == 2 * products * H * pairs * padded(D)
    m, n = (DKV.heuristic(*key)[name] for name in ("BLOCK_M", "BLOCK_N"))
    pairs = n * sum(met(j, n, T, S, right, left, m) for j in range(0, T, n))
    assert backward[1].dot_flops == 2 * 4 * H * pairs * padded(D)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_blocks_that_are_left_out_are_not_visited(dtype, interpreter):
    """Not of the mask's, nor of causal's."""
    from tilewright import ops
    from tilewright.kernels._attention_dbias import heuristic
    from tilewright.kernels._tile import NONE, within

    flags = NONE | {"SIZE": 32, "HAS_BIAS": True}

    H, S, T, D, size = 2, 150, 170, 32, 32
    seen = torch.rand(1, H, ceil(S / size), ceil(T / size)) > 0.5
    inputs = [torch.randn(1, n, m, D, dtype=dtype) for n, m in ((H, S), (1, T), (1, T))]
    inputs = [x.requires_grad_() for x in (*inputs, torch.randn(H, S, T))]
    q, k, v, bias = inputs
    with interpreter.recording() as launches:
        out = ops.attention(q, k, v, bias=bias, blocks=(seen, size), causal=True)
    with interpreter.recording() as backward:
        torch.autograd.grad(out, inputs, torch.randn_like(out))
    last = torch.arange(seen.size(2)) * size + size - 1 + T - S  # key that a block of queries sees
    first = torch.arange(seen.size(3)) * size
    met = int((seen & (first <= last[:, None])).sum())
    assert 0 < met < seen.sum()
    flops = [launch.dot_flops for launch in (launches[0], *backward)]
    assert flops[:3] == [2 * products * met * size * size * D for products in (2, 4, 4)]
    # the bias's gradient goes by causal to its own tiles, and by the mask to its blocks
    m, n = (within(heuristic(dtype, D), flags, D)[x] for x in BLOCKS)
    tiles = 0
    for i, j in itertools.product(range(0, S, m), range(0, T, n)):
        tiles += int(seen[0, :, i // size, j // size].sum()) * (j <= min(i + m, S) - 1 + T - S)
    assert flops[3:] == [2 * 2 * tiles * m * n * D]


def test_every_op_is_counted():
    ops = [path.stem for path in (ROOT / "python/tilewright/ops").glob("[a-z]*.py")]
    assert sorted(CASES) == sorted(ops)
    assert sorted([*BACKWARD, "attention_decode", "moe_dispatch", "rms_norm_int8"]) == sorted(
        ops
    )  # these have none


PAGE = harness.load(ROOT / "benchmarks/kernels.py")


@pytest.mark.parametrize("op, shape, backward", PAGE.cases())
def test_the_page_says_what_is_counted(op: str, shape: str, backward: bool):
    line = PAGE.traffic_line(definition(op), shape, backward)
    lines = PAGE.PAGE.read_text().splitlines()
    assert line in lines, f"python benchmarks/kernels.py --write: {line}"


def test_the_page_says_nothing_else():
    text = PAGE.PAGE.read_text().split("## Traffic")[1].split("## Machine code")[0]
    assert text.count("\n| ") == len(PAGE.cases()) + 2
