"""Damaged headers of GGUF files and safetensors folders: each loads or is refused in one line that names the file.

fuzz_headers.py makes them, in a process with little memory and time for each: what ends that process is a failure,
and so is an error of any other type.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tilewright.bench import harness
from tilewright.models import Llama

fuzz = harness.load(Path(__file__).with_name("fuzz_headers.py"))
FEW = 100  # of each kind, in every run
MANY = {"gguf": 4000, "gptq": 3000, "compressed-tensors": 3000}
AT_ONCE = 1000  # mutants of one process


@pytest.fixture(scope="module")
def base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    kind, path = request.param, tmp_path_factory.mktemp("base")
    if kind == "gguf":
        return kind, fuzz.make_gguf(path / "m.gguf")
    return kind, fuzz.make_folder(path / "m", kind)


def tried(base: tuple[str, Path], first: int, last: int) -> Counter[str]:
    """Of seeds first to last - 1, how many loaded and were refused; fails on anything else."""
    kind, path = base
    package = Path(fuzz.__file__).parent.parent / "python"
    done = subprocess.run(
        [sys.executable, fuzz.__file__, str(path), kind, str(first), str(last)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    assert not wrong, f"{kind}: {len(wrong)} wrong:\n" + "\n".join(wrong[:20])
    seeds = [line for line in lines if line.startswith("seed")]
    last_words = f"{seeds[-1] if seeds else 'no seed'}: {done.stderr[-2000:]}"
    assert done.returncode == 0 and lines[-1].startswith("DONE"), (
        f"{kind}: ended by {done.returncode} at {last_words}"
    )
    return Counter(json.loads(lines[-1].removeprefix("DONE")))


@pytest.mark.parametrize("base", fuzz.KINDS, indirect=True)
def test_damaged_headers(base):
    counts = tried(base, 0, FEW)
    assert counts["refused"] > counts["loaded"] > 0 and counts.total() == FEW


@pytest.mark.slow
@pytest.mark.parametrize("base", fuzz.KINDS, indirect=True)
def test_many_damaged_headers(base):
    counts = Counter()
    for first in range(0, MANY[base[0]], AT_ONCE):
        counts += tried(base, first, min(first + AT_ONCE, MANY[base[0]]))
    assert counts["refused"] > counts["loaded"] > 0 and counts.total() == MANY[base[0]]


FOUND = [
    ({"num_attention_heads": float("inf")}, "num_attention_heads must be a whole number, not inf"),
    ({"vocab_size": None}, "vocab_size must be a whole number, not None"),
    ({"eos_token_id": [0, "x"]}, "eos_token_id must be a whole number, not 'x'"),
    ({"sliding_window": 1 << 63}, f"2 windows of 0 to {1 << 63} keys do not fit 2 layers"),
    ({"num_hidden_layers": 1 << 63}, f"num_hidden_layers {1 << 63} is more than 65536"),
    ({"layer_types": 3}, "layer_types must be a list, not 3"),
    ({"rope_parameters": "yarn"}, "rope_parameters must be an object, not 'yarn'"),
    ({"rope_parameters": {"rope_type": "yarn", "beta_fast": 1e308}}, "beta_fast must be positive"),
    (
        {"rope_parameters": {"rope_theta": float("nan")}},
        "rope_theta must be a finite number, not nan",
    ),
    ({"quantization_config": "gptq"}, "quantization_config must be an object, not 'gptq'"),
    ({"quantization_config": {"quant_method": {}}}, "quant_method {}; readable are gptq"),
]


@pytest.mark.parametrize("base", ["compressed-tensors"], indirect=True)
@pytest.mark.parametrize(("change", "told"), FOUND)
def test_what_was_found(base, change, told, tmp_path):
    _, path = base
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        Llama.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"targets": 3}, "group_0 is for 3, no list of names"),
        ({"targets": ["re:("]}, "target '('"),
    ],
)
@pytest.mark.parametrize("base", ["compressed-tensors"], indirect=True)
def test_groups_that_say_nothing(base, change, told, tmp_path):
    _, path = base
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        Llama.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
