"""`tilewright inspect`: counts, code and rooflines of an op's own launches."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("typer")

from tilewright import cli
from tilewright.bench import harness, inspection
from tilewright.lab.roofline import GPUS, named

ROOT = Path(__file__).resolve().parents[1]


def definition(op: str):
    return harness.discover(ROOT / "benchmarks", [op])[0]


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `tilewright inspect` in this process -> exit code, stdout, stderr."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["inspect", *arguments])
        return int(exit.value.code or 0), *capsys.readouterr()

    return run


def test_a_norm_is_counted_compiled_and_bounded():
    report = inspection.inspect(definition("rms_norm"), sizes={"M": 64, "N": 4096}, dtype="bf16")
    (kernel,) = report["kernels"]
    rows, weight, rstd = 64 * 4096 * 2, 4096 * 2, 64 * 4
    assert kernel["kernel"] == "_rms_norm_fwd_kernel" and kernel["grid"] == [64, 1, 1]
    assert kernel["bytes_loaded"] == rows + 64 * weight and kernel["bytes_stored"] == rows + rstd
    assert kernel["distinct_bytes"] == 2 * rows + weight + rstd
    assert report["least_bytes"] == 2 * rows + weight
    assert (
        kernel["spills"] == 0 and 0 < kernel["registers"] <= 255 and kernel["types"] == "bf16 fp32"
    )
    assert kernel["wide_loads"] == kernel["loads"] > 0 and kernel["matrix"] is None
    h200 = next(row for row in report["roofline"] if row["gpu"] == "H200")
    assert h200["least"] == report["least_bytes"] / 4.8e12 and h200["bound"] == "bytes"
    assert h200["least"] <= h200["perfect_cache"] <= h200["no_cache"]
    assert [row["gpu"] for row in report["roofline"]] == list(GPUS)


def test_a_product_has_its_matrix_instruction_and_flops():
    sizes = {"B": 1, "H": 2, "G": 1, "S": 128, "T": 128, "D": 64}
    for backward, launches in ((False, 1), (True, 2)):
        report = inspection.inspect(
            definition("attention"), sizes=sizes, arch=80, backward=backward
        )
        assert len(report["kernels"]) == launches
        for kernel in report["kernels"]:
            assert kernel["matrix"] == "mma" and kernel["dot"] == "bf16"
            assert kernel["dot_flops"] >= report["least_flops"] // 4 / launches


@pytest.mark.parametrize("backward", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_op_is_inspected(backward):
    shapes = {
        "rms_norm": "4x64",
        "add_rms_norm": "4x64",
        "swiglu": "4x64",
        "geglu": "4x64,packed=1",
        "rope": "8x2x64,interleaved=1",
        "quant_linear": "4x64x64x4",
        "int8_linear": "4x64x64",
        "rms_norm_int8": "4x64",
        "moe_losses": "2x4x16x2,sigmoid=1",
        "moe_route": "4x16x2,grouped=1",
        "moe_dispatch": "4x16x2",
        "moe_combine": "4x2x64",
        "moe_experts": "4x4x2x32x32",
        "quant_moe_experts": "4x4x2x32x32x4x32",
        "attention": "1x2x1x32x32x64",
        "attention_decode": "2x2x1x32x64x16",
        "attention_varlen": "2x2x1x32x64",
    }
    ops = [path.stem for path in (ROOT / "python/tilewright/ops").glob("[a-z]*.py")]
    assert sorted(shapes) == sorted(ops)
    for op, shape in shapes.items():
        found = definition(op)
        if backward and op in ("attention_decode", "moe_dispatch", "rms_norm_int8"):
            with pytest.raises(ValueError, match=f"{op} has no backward kernels"):
                inspection.inspect(found, sizes=inspection.sizes_of(found, shape), backward=True)
            continue
        sizes = inspection.sizes_of(found, shape)
        report = inspection.inspect(found, sizes=sizes, dtype="fp32", backward=backward)
        assert report["kernels"] and all(k["bytes_stored"] > 0 for k in report["kernels"])


def test_a_sample_is_scaled_up_and_says_so():
    found, sizes = definition("rms_norm"), {"M": 100, "N": 4096}
    whole = inspection.inspect(found, sizes=sizes)["kernels"][0]
    part = inspection.inspect(found, sizes=sizes, programs=10)["kernels"][0]
    assert part["interpreted_programs"] == 10 and part["distinct_bytes"] is None
    assert part["bytes_loaded"] == whole["bytes_loaded"]
    assert part["bytes_stored"] == whole["bytes_stored"]


def test_flags_and_names_in_a_shape():
    rope, swiglu = definition("rope"), definition("swiglu")
    assert inspection.sizes_of(rope, "7x2x64,interleaved=1")["interleaved"] is True
    assert inspection.sizes_of(rope, "7x2,dim=64") == {
        "tokens": 7, "heads": 2, "dim": 64, "interleaved": False,
    }  # fmt: skip
    assert inspection.sizes_of(swiglu, "7x2") == {"rows": 7, "width": 2, "packed": False}


def test_the_command_prints_tables_json_and_code(command):
    wanted = ["swiglu", "--shape", "4x1024", "--arch", "sm_80"]
    code, text, _ = command(*wanted)
    assert code == 0
    for word in ("swiglu", "_glu_fwd_kernel", "occupancy", "registers", *GPUS):
        assert word in text
    report = json.loads(command(*wanted, "--json")[1])
    assert report["arch"] == 80 and report["sizes"]["width"] == 1024
    assert ".target sm_80" in command(*wanted, "--ptx")[1]
    sass = command(*wanted, "--sass")[1]
    assert re.search(r"LDG\.E\.128", sass) and "_glu_fwd_kernel" in sass


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["warp_drive", "--shape", "1"], "no benchmark warp_drive"),
        (["generate", "--shape", "1"], "generate is a measurement, not an op"),
        (["rms_norm", "--shape", "4"], "lacks N: rms_norm takes MxN"),
        (["rms_norm", "--shape", "4x5x6"], "rms_norm takes MxN"),
        (["rms_norm", "--shape", "4x-5"], "whole numbers"),
        (["rms_norm", "--shape", "4x0"], "below 1"),
        (["rms_norm", "--shape", "4x5,Q=3"], "no size Q"),
        (["rms_norm", "--shape", "4x5", "--arch", "sm_42"], "sm_42"),
        (["rms_norm", "--shape", "4x5", "--ptx", "--json"], "exclude each other"),
        (["quant_linear", "--shape", "4x8x33x4"], "could not be interpreted"),
        (["rms_norm", "--shape", "4x5", "--directory", "nowhere"], "run from a checkout"),
    ],
)
def test_a_mistake_exits_2(arguments, told, command):
    code, out, said = command(*arguments)
    assert code == 2 and told in said and len(said.splitlines()) == 1 and not out


def test_a_device_finds_its_data_sheet():
    assert (
        named("NVIDIA H200") is GPUS["H200"]
        and named("nvidia-geforce-rtx-4090") == GPUS["RTX 4090"]
    )
    assert named("Tesla T4") is None
    assert GPUS["H100"].flops("tf32x3") == pytest.approx(165e12)
