"""The harness: what it finds, times, counts and writes."""

import json
import math
import platform
import resource
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tilewright
from tilewright.bench import harness, memory, timing

DEFINITION = """
import torch
OP = "double"
SHAPES = {"small": {"n": 8}, "large": {"n": 16}}
DTYPES = (torch.float32, torch.bfloat16)
def inputs(dtype, device, *, n):
    return {"x": torch.ones(n, dtype=dtype, device=device, requires_grad=True), "by": 2}
def ours(x, by):
    return (x * by,)
def eager(x, by):
    return (x + x,)
PROVIDERS = {"tilewright": ours, "eager": eager}
def cost(dtype, *, n):
    return 2 * n * dtype.itemsize, n
def backward_cost(dtype, *, n):
    return 2 * n * dtype.itemsize, n
"""


@pytest.fixture
def definition(tmp_path: Path) -> ModuleType:
    (tmp_path / "bench_double.py").write_text(DEFINITION)
    (tmp_path / "bench_own.py").write_text("def measure(quick): return [{'what': 'it', 'n': 3}]\n")
    return harness.discover(tmp_path, ["double"])[0]


def test_every_definition_of_the_house_can_be_found():
    directory = Path(__file__).resolve().parent.parent / "benchmarks"
    routed = {route.op for route in tilewright.explain()}
    for found in harness.discover(directory):
        assert hasattr(found, "measure") or {"tilewright", "eager"} <= found.PROVIDERS.keys()
        if hasattr(found, "OP"):
            assert harness.name_of(found) == found.OP
            assert getattr(found, "ROUTE", found.OP) in routed


def test_an_op_is_timed_forward_and_backward_at_every_shape(definition):
    report = harness.measure(definition, quick=True)
    assert [(r["shape"], r["dtype"], r["mode"]) for r in report["rows"]] == [
        ("small", "float32", "fwd"),
        ("small", "float32", "fwd+bwd"),
    ]
    line = report["rows"][0]
    ours, eager = (line["milliseconds"][k] for k in ("tilewright", "eager"))
    assert math.isclose(line["speedup_over"]["eager"], eager / ours)
    assert math.isclose(line["gb_per_second"], 2 * 8 * 4 / (ours / 1e3) / 1e9)
    assert not line["allocator_bound"]


def test_a_compiled_rival_is_compiled_at_every_shape(definition):
    """Past its recompile limit torch.compile runs eager, and says nothing."""
    seen: list[tuple[int | torch.SymInt, ...]] = []

    def backend(graph, inputs):
        seen.append(tuple(s for x in inputs if isinstance(x, torch.Tensor) for s in x.shape))
        return graph

    definition.PROVIDERS["compile"] = torch.compile(lambda x, by: (x * by,), backend=backend)
    sizes = list(range(3, 3 + torch._dynamo.config.recompile_limit + 3))
    definition.SHAPES = {str(n): {"n": n} for n in sizes}
    for shape in definition.SHAPES:
        harness.row(definition, shape, torch.float32, "fwd", 0.0)
    assert seen == [(n,) for n in sizes]


def test_what_is_allocated_afresh_at_every_call_is_marked(definition):
    definition.SHAPES = {"under": {"n": (32 << 18) - 1}, "mapped": {"n": 32 << 18}}
    marks = [
        harness.row(definition, shape, torch.float32, "fwd", 0.0)["allocator_bound"]
        for shape in definition.SHAPES
    ]
    assert marks == [False, True]


def test_backward_yields_every_gradient(definition):
    inputs = definition.inputs(torch.float32, "cpu", n=4)
    (grad,) = harness.forward_backward(definition.PROVIDERS["tilewright"], inputs)()
    assert grad.shape == (4,) and inputs["x"].grad is None


def test_a_row_is_of_the_same_numbers_each_time(definition):
    shape = next(iter(definition.SHAPES))
    first, again = (harness.drawn(definition, shape, torch.float32)["x"] for _ in range(2))
    assert torch.equal(first, again)


def test_pages_are_kept():
    """Buffers just below the least that is bound by the allocator, in eager's way: two at a time, then none."""
    if not timing.keep_pages():
        assert platform.libc_ver()[0] != "glibc"
        return
    n = (timing.MMAP_BYTES - 4096) // 4

    def faults(count: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            x = torch.ones(n)
            del x
            y, z = torch.ones(n), torch.ones(n)
            del y, z
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(2)
    pages = n * 4 // 4096
    assert faults(10) < 10 * pages  # 30 buffers: some may find no place that was theirs


def test_rivals_take_turns():
    order: list[str] = []
    rivals = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = timing.interleaved(rivals, seconds=0.0, least=3)
    assert samples.keys() == {"a", "b"}
    assert all(len(times) == 3 and min(times) > 0 for times in samples.values())
    first_of_run = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(first_of_run) >= 5  # warm up a, b; then turns that start with another each time


def test_a_report_says_where_it_came_from_and_is_written_whole(tmp_path, definition):
    own = harness.discover(tmp_path, ["own"])[0]
    report = harness.measure(own)
    wanted = {"device", "cpu", "threads", "instruction_set", "torch", "triton", "python", "commit"}
    assert wanted <= report.keys() and report["rows"] == [{"what": "it", "n": 3}]
    path = harness.write(report, tmp_path / "results")
    assert path == tmp_path / "results" / report["device"] / "own.json"
    assert json.loads(path.read_text()) == report
    assert [p.name for p in path.parent.iterdir()] == ["own.json"]
    assert harness.table(report).row_count == 1


def test_what_is_not_there_is_named(tmp_path, definition):
    with pytest.raises(ValueError, match=r"no benchmark nothing; there are double, own"):
        harness.discover(tmp_path, ["nothing"])
    with pytest.raises(ValueError, match=r"no bench_<name>\.py in"):
        harness.discover(tmp_path / "elsewhere")


def test_a_row_carries_its_spread_and_its_roofline(definition):
    line = harness.row(definition, "small", torch.float32, "fwd", 0.0)
    for name in ("tilewright", "eager"):
        low, middle, high = (line[f"milliseconds{p}"][name] for p in ("_p20", "", "_p80"))
        assert 0 < low <= middle <= high
    assert line["speedup_over_p20"]["eager"] <= line["speedup_over_p80"]["eager"]
    assert line["bytes"] == 2 * 8 * 4 and line["flops"] == 8
    assert line["call_microseconds"] > 0 and line["outside_tolerance"] == {}
    if not torch.cuda.is_available():
        ours = line["milliseconds"]["tilewright"]
        assert line["percent_of_roofline"] == pytest.approx(100 * line["copy_milliseconds"] / ours)
        assert "copy" not in line["milliseconds"]
    assert line["peak_bytes"] >= 8 * 4 and line["peak_bytes_of_rivals"].keys() == {"eager"}


def test_nothing_wrong_is_timed(definition):
    definition.PROVIDERS["tilewright"] = lambda x, by: (x * by * 1.01,)
    with pytest.raises(AssertionError, match="result 0: error"):
        harness.row(definition, "small", torch.float32, "fwd", 0.0)


def test_a_rival_that_is_wrong_or_fails_is_named(definition):
    def broken(x, by):
        raise RuntimeError("no kernel image")

    definition.PROVIDERS |= {"rough": lambda x, by: (x * by * 1.01,), "broken": broken}
    line = harness.row(definition, "small", torch.float32, "fwd", 0.0)
    assert "error" in line["outside_tolerance"]["rough"] and "rough" in line["speedup_over"]
    assert line["outside_tolerance"]["broken"] == "RuntimeError: no kernel image"
    assert "broken" not in line["milliseconds"]


def test_rivals_can_be_chosen(definition):
    definition.PROVIDERS |= {"one": definition.eager, "two": definition.eager}
    report = harness.measure(definition, quick=True, against=["two"])
    assert all(r["speedup_over"].keys() == {"eager", "two"} for r in report["rows"])
    assert report["command"] == "tilewright bench double --quick --against two"


def test_peak_memory_is_what_is_alive_at_once():
    x = torch.ones(1 << 20)

    def three_but_never_more_than_two():
        a = x + x
        b = a + a
        del a
        return b + b

    for fn, arrays in ((lambda: x + x, 1), (three_but_never_more_than_two, 2), (x.zero_, 0)):
        assert 0 <= memory.peak_bytes(fn) - arrays * x.nbytes < 4096


def test_spread():
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert timing.spread([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_the_command_says_in_a_line_what_was_wrong(tmp_path, definition, capsys):
    cli = pytest.importorskip("tilewright.cli")
    (tmp_path / "bench_double.py").write_text(DEFINITION.replace("x * by", "x * by * 1.01"))
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "double", "--directory", str(tmp_path)])
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.startswith("tilewright: double is wrong and was not timed")
    assert len(said.splitlines()) == 1 and not (tmp_path / "results").exists()


def test_an_unknown_rival_exits_2(tmp_path, definition, capsys):
    cli = pytest.importorskip("tilewright.cli")
    with pytest.raises(SystemExit) as exit:
        cli.main(["bench", "double", "--directory", str(tmp_path), "--against", "warp_drive"])
    assert (
        exit.value.code == 2 and "no rival warp_drive; there are eager" in capsys.readouterr().err
    )
