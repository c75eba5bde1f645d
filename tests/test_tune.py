"""Launch configurations: who chooses them, that any of a kernel's space is right, and the search."""

import importlib
import json
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tilewright
from tilewright.bench import harness, tune
from tilewright.bench.correctness import check, expected
from tilewright.cli import main

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py"))
for op in OPS:
    importlib.import_module(f"tilewright.kernels.{op}")
_tune = importlib.import_module("tilewright.kernels._tune")

BF16, FP32 = torch.bfloat16, torch.float32
GPU = "NVIDIA H200"
POWERS = (1, 2, 8, 16, 32, 128, 1024, 4096)
KEYS: dict[str, tuple[tuple, ...]] = {  # the values each part of a key takes
    "M": POWERS,
    "N": (1, 64, 4096, 16384),
    "K": (64, 4096),
    "S": POWERS,
    "rows": (1, 64, 1 << 18),
    "BLOCK_N": (1, 16, 128, 1024, 4096),
    "BLOCK_D": (16, 32, 64, 128, 256),
    "BLOCK_E": (16, 64, 128, 512, 1024),
    "D": (64, 80, 128, 256),
    "R": (32, 64),
    "dtype": (BF16, FP32),
    "causal": (True, False),
    "bits": (4, 8),
    "group": (16, 32, 48, 64, 100, 128, 4096),
}
is_gemv = importlib.import_module("tilewright.kernels._quant_tiles").is_gemv
ROWS = _tune.TUNABLES["rms_norm_fwd"]
KEY = (BF16, 8192, 4096)
BUCKET = "dtype=bfloat16 M=8192 BLOCK_N=4096"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders of tables, own/ and shipped/; nothing chosen before or after."""
    monkeypatch.setattr(_tune, "OWN", tmp_path / "own")
    monkeypatch.setattr(_tune, "SHIPPED", tmp_path / "shipped")
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for tunable in _tune.TUNABLES.values():
        tunable.forget()


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    path = ROWS.path(GPU, folder)
    path.parent.mkdir(parents=True)
    path.write_text(text if isinstance(text, str) else json.dumps({"buckets": text}))
    return path


def definition(op: str) -> ModuleType:
    (found,) = harness.discover(ROOT / "benchmarks", [op])
    return found


def test_tunables_are_of_ops_and_all_are_tried():
    assert {op for tunable in _tune.TUNABLES.values() for op in tunable.ops} == set(SIZES)
    assert set(SIZES) <= set(OPS)


@pytest.mark.parametrize("name", sorted(_tune.TUNABLES))
def test_the_space_holds_the_heuristic(name: str):
    tunable = _tune.TUNABLES[name]
    for key in product(*(KEYS[part] for part in tunable.keys)):
        if name == "quant_linear_gemv" and not is_gemv(key[0], key[tunable.keys.index("M")]):
            continue
        space = tunable.space(*key)
        assert tunable.heuristic(*key) in space, tunable.bucket(*key)
        assert len({tuple(c.items()) for c in space}) == len(space)


@pytest.mark.parametrize("n, most, found", [(1, 64, 1), (2, 64, 2), (3, 64, 4), (65, 64, 64)])
def test_buckets(n: int, most: int, found: int):
    assert _tune.bucket(n, most) == found


def test_own_tables_before_shipped_before_the_heuristic(folders: Path):
    assert ROWS.choose(GPU, *KEY) == (ROWS.heuristic(*KEY), "heuristic")
    write(folders / "shipped", {BUCKET: {"config": {"BLOCK_M": 1, "num_warps": 4}}})
    ROWS.forget()
    assert ROWS.choose(GPU, *KEY) == ({"BLOCK_M": 1, "num_warps": 4}, "shipped table")
    write(folders / "own", {BUCKET: {"config": {"BLOCK_M": 2, "num_warps": 8}}})
    ROWS.forget()
    assert ROWS.choose(GPU, *KEY) == ({"BLOCK_M": 2, "num_warps": 8}, "own table")
    assert ROWS.choose(GPU, FP32, *KEY[1:]).source == "heuristic"  # another bucket
    assert ROWS.choose("NVIDIA A100-SXM4-80GB", *KEY).source == "heuristic"  # another GPU


@pytest.mark.parametrize("config", [{"BLOCK_M": 3, "num_warps": 4}, {"BLOCK_M": 1}, {"M": 1}, 7])
def test_a_table_with_no_configuration_of_the_kernel(folders: Path, config: Any):
    write(folders / "own", {BUCKET: {"config": config}})
    with pytest.raises(ValueError, match=f"rms_norm_fwd on {GPU}: the own table has .* {BUCKET}"):
        ROWS.choose(GPU, *KEY)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"buckets": 3}', {BUCKET: {"BLOCK_M": 1}}, {BUCKET: 1}]
)
def test_a_table_that_is_none(folders: Path, text: str | dict[str, Any]):
    path = write(folders / "shipped", text)
    with pytest.raises(ValueError, match=f"{path}: not a table of launches"):
        ROWS.choose(GPU, *KEY)


def part(text: str) -> Any:
    """A key's part from a bucket's spelling of it."""
    named = {"True": True, "False": False}
    return named[text] if text in named else int(text) if text.isdigit() else getattr(torch, text)


def test_shipped_tables_hold_configurations_of_their_kernels():
    for path in _tune.SHIPPED.glob("*/*.json"):
        table = json.loads(path.read_text())
        tunable = _tune.TUNABLES[table["kernel"]]
        assert path == tunable.path(table["gpu"], _tune.SHIPPED)
        assert table["commit"] and table["triton"]
        for text, bucket in table["buckets"].items():
            key = [part(word.partition("=")[2]) for word in text.split(" ")]
            assert tunable.bucket(*key) == text
            assert bucket["config"] in tunable.space(*key), (path, text)


# sizes that launch each kernel: small, yet more than one tile
SIZES: dict[str, list[dict[str, Any]]] = {
    "rms_norm": [{"M": 37, "N": 200}, {"M": 2, "N": 17000}],
    "add_rms_norm": [{"M": 37, "N": 200}, {"M": 2, "N": 17000}],
    "swiglu": [{"rows": 9, "width": 300, "packed": False}],
    "geglu": [{"rows": 9, "width": 300, "packed": True}],
    "rope": [{"tokens": 33, "heads": 3, "dim": 64}],
    "attention": [{"B": 1, "H": 2, "G": 1, "S": 70, "T": 70, "D": 40}],
    "attention_decode": [
        {"B": 1, "H": 6, "G": 1, "T": 300, "D": 40, "page": 16},
        {"B": 5, "H": 2, "G": 1, "T": 70, "D": 64, "page": 70},
    ],
    "quant_linear": [
        {"M": 2, "N": 40, "K": 384, "bits": 4},
        {"M": 70, "N": 70, "K": 256, "bits": 8},
    ],
    "int8_linear": [{"M": 70, "N": 70, "K": 300}],
    "rms_norm_int8": [{"M": 37, "N": 200}, {"M": 2, "N": 17000}],
    "moe_losses": [
        {"B": 1, "S": 37, "E": 60, "K": 4},
        {"B": 2, "S": 9, "E": 60, "K": 4, "sigmoid": True},
    ],
    "moe_route": [{"T": 37, "E": 60, "K": 4}],
    "moe_combine": [{"T": 9, "K": 3, "D": 200}],
    "moe_experts": [{"T": 37, "E": 5, "K": 2, "D": 72, "I": 40}],
    "quant_moe_experts": [{"T": 37, "E": 5, "K": 2, "D": 96, "I": 64, "bits": 4, "group": 32}],
}


def some(space: list[dict[str, int]]) -> list[dict[str, int]]:
    """The first, the last, and a few between."""
    return space[:: max(1, len(space) // 5)] + space[-1:]


@pytest.mark.triton
@pytest.mark.parametrize("op", SIZES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
def test_any_configuration_is_right(op: str, dtype: torch.dtype, device: str):
    bench = definition(op)
    fn, eager = bench.PROVIDERS["tilewright"], bench.PROVIDERS["eager"]
    tried: set[str] = set()
    for sizes in SIZES[op]:
        forget()
        inputs = bench.inputs(dtype, device, **sizes)
        wanted = expected(eager, inputs, grad=True)
        check(fn, inputs, dtype, True, wanted)
        launched = {n: t for n, t in _tune.TUNABLES.items() if t.made and n not in tried}
        for name, tunable in launched.items():
            tried.add(name)
            (_, *key) = next(iter(tunable.made))
            for config in some(tunable.space(*key)):
                if device == "cuda" and config.get("num_stages", 1) > 2:
                    continue  # may not fit in shared memory: what the search refuses
                with tunable.forced(config):
                    check(fn, inputs, dtype, True, wanted)
    assert tried == {n for n, t in _tune.TUNABLES.items() if op in t.ops}
    forget()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """clock(best): a timer by which a configuration takes the longer, the more it differs."""
    forced: list[dict[str, int]] = []
    original = _tune.Tunable.forced

    def noting(tunable: Any, config: dict[str, int]):
        forced.append(config)
        return original(tunable, config)

    monkeypatch.setattr(_tune.Tunable, "forced", noting)

    def liking(best: dict[str, int]) -> tune.Timer:
        def timer(rivals: dict[str, tune.Call], seconds: float) -> dict[str, list[float]]:
            samples = {}
            for name, call in rivals.items():
                call()
                far = sum(forced[-1].get(key) != value for key, value in best.items())
                samples[name] = [1e-5 * (1 + far)] * 5
            return samples

        return timer

    return liking


def searched(timer: tune.Timer, wrong: dict[str, int] | None = None) -> tune.Tuned:
    """A search of the rows' kernel with no launch; its results are wrong under `wrong`."""

    def right() -> None:
        if ROWS(torch.device("cpu"), *KEY) == wrong:
            raise AssertionError("result 0: error 1 > 0")

    return tune.search(ROWS, KEY, lambda: None, right, timer)


def test_the_search_finds_the_fastest(folders: Path, clock):
    best = {"BLOCK_M": 2, "num_warps": 8}
    found = searched(clock(best))
    assert found.config == best and found.bucket == BUCKET
    assert found.microseconds < found.heuristic_microseconds and found.refused == 0


def test_the_search_refuses_what_is_wrong(folders: Path, clock):
    best = {"BLOCK_M": 2, "num_warps": 8}
    found = searched(clock(best), wrong=best)
    assert found.config != best and found.refused == 1


def test_the_heuristic_stays_where_nothing_is_faster(folders: Path, clock):
    heuristic = ROWS.heuristic(*KEY)
    found = searched(clock(heuristic))
    assert found.config == heuristic and found.microseconds == found.heuristic_microseconds
    with pytest.raises(AssertionError, match="result 0"):
        searched(clock(heuristic), wrong=heuristic)


@pytest.mark.triton
def test_what_was_tuned_is_launched_and_explained(folders: Path, clock, device: str):
    bench, best = definition("rms_norm"), {"BLOCK_M": 2, "num_warps": 2}

    def tuned(**more: Any) -> dict[str, tune.Tuned]:
        shapes = {"own": {"M": 8, "N": 512}}
        found = tune.tune(
            bench, _tune.OWN, shapes=shapes, dtypes=(BF16,), timer=clock(best), **more
        )
        return {result.kernel: result for result in found}

    assert not tuned(deadline=0.0) and not _tune.OWN.exists()  # no time, nothing written
    first = tuned()
    assert set(first) == {"rms_norm_fwd", "rms_norm_bwd"} and first["rms_norm_fwd"].config == best
    gpu = _tune.gpu_name(torch.device(device))
    table = json.loads(ROWS.path(gpu, _tune.OWN).read_text())
    assert table["buckets"]["dtype=bfloat16 M=8 BLOCK_N=512"]["config"] == best
    assert not tuned()  # what the table has is not tuned again, unless asked for
    assert set(tuned(again=True)) == set(first)

    forget()
    tilewright.ops.rms_norm(torch.randn(8, 512, device=device, dtype=BF16))
    launches = {r.op: r.launches for r in tilewright.explain() if r.device == device}["rms_norm"]
    line = "rms_norm_fwd dtype=bfloat16 M=8 BLOCK_N=512: BLOCK_M=2 num_warps=2 (own table)"
    assert launches == (line,)


@pytest.mark.triton
def test_kernels_of_every_way_are_tuned(folders: Path, device: str):
    """Where the weight is dequantised by default, the kernels that do without are tuned too, before the choice."""
    bench = definition("quant_linear")
    inputs = bench.inputs(BF16, device, M=257, N=64, K=64, bits=4)
    call = harness.forward_backward(bench.PROVIDERS["tilewright"], inputs)
    dense = _tune.TUNABLES["quant_linear_dense"]
    found, forced = [], []
    for name, keys in tune._each(_tune.TUNABLES, call):
        assert len(keys) == 1
        found.append(name)
        forced.append(dense(torch.device(device), *keys[0])["DENSE"])
    ways = ["quant_linear_dense", "quant_linear_dgrad_dense"]
    assert sorted(set(found)) == [
        "quant_linear_dense",
        "quant_linear_dgrad",
        *ways[1:],
        "quant_linear_gemm",
    ]
    assert found[-2:] == ways
    assert not any(
        on for name, on in zip(found, forced, strict=True) if name == "quant_linear_gemm"
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["rms_norm"], "tune measures on a GPU, and PyTorch finds none"),
        (["rms_norm", "rope", "--shape", "8x8"], "--shape 8x8: of one op, not of 2"),
        (["generate"], "generate: measurements, not ops"),
        (["rms_norm", "--shape", "8x8x8"], "takes MxN"),
        (["no_such"], "no benchmark no_such"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments, "--directory", str(ROOT / "benchmarks")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
