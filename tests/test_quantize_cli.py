"""`tilewright quantize` and `tilewright eval`: what they print and leave, and what each mistake costs."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tilewright import cli
from tilewright.bench.peers import smollm2
from tilewright.models import Llama
from tilewright.quant import GGUFFile


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the command line, in this process."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of Python's own help."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(topics["types"] + topics["class"], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights with SmolLM2's tokeniser."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=49152, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    file = GGUFFile(smollm2())
    from tilewright.models._tokenizer import Tokenizer

    Tokenizer.from_gguf(file.metadata, file.path).backend.save(str(path / "tokenizer.json"))
    return path


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant", "hqq"])
def test_quantize_and_eval(method, model, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--method", method, *([] if method == "smoothquant" else ["--group", 32])]
    if method != "hqq":
        options += ["--calibration", text, "--samples", 4, "--window", 64]
    code, said, err = run(capsys, "quantize", "--model", model, "--out", out, *options, "--json")
    assert code == 0, err
    told = json.loads(said)
    assert told["method"] == method and 0 < told["bytes"] < told["bytes_before"]
    found = {}
    for path in (model, out):
        code, said, err = run(
            capsys,
            "eval",
            "--model",
            path,
            "--perplexity",
            text,
            "--window",
            64,
            "--most",
            3,
            "--json",
        )
        assert code == 0, err
        found[path] = json.loads(said)
        assert found[path]["windows"] == 3 and found[path]["tokens"] == 192
    # by the model's own logits: what each window's tokens cost
    llama = Llama.from_pretrained(out)
    windows = torch.tensor(llama.tokenizer.encode(text.read_text())[:192]).view(3, 64)
    with torch.no_grad():
        logits = llama(windows)[:, :-1]
    cost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert found[out]["perplexity"] == pytest.approx(float(cost.exp()))
    assert found[out]["perplexity"] != found[model]["perplexity"]


def test_act_order_is_written_as_gptq(model, text, tmp_path, capsys):
    options = ["--method", "gptq", "--act-order", "--group", 32, "--calibration", text]
    options += ["--samples", 4, "--window", 64, "--out", tmp_path / "out"]
    code, said, err = run(capsys, "quantize", "--model", model, *options)
    assert code == 0 and said.endswith("gptq, 4 bits, gptq\n"), err
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["desc_act"] is True


@pytest.mark.parametrize(
    "options, told",
    [
        (["--embeddings", 8], "format compressed-tensors leaves embeddings as they are"),
        (["--embeddings", 3, "--format", "gguf"], "embeddings must be 0, 4 or 8 bits, not 3"),
    ],
)
def test_embeddings_that_cannot_be(options, told, model, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--method", "rtn", "--group", 32, "--out", out, *options]
    code, _, err = run(capsys, "quantize", "--model", model, *options)
    assert code == 2 and told in err and len(err.strip().splitlines()) == 1 and not out.exists()


def test_embeddings_of_a_gguf(model, tmp_path, capsys):
    options = ["--method", "rtn", "--embeddings", 8, "--format", "gguf"]
    code, _, err = run(capsys, "quantize", "--model", model, *options, "--out", tmp_path / "m.gguf")
    assert code == 0, err
    assert GGUFFile(tmp_path / "m.gguf").info("token_embd.weight").type == "Q8_0"


def test_a_gguf_becomes_a_folder(text, tmp_path, capsys):
    """SmolLM2's Q4_1 as 8 bits: its answers, and the perplexity as the last figure."""
    out = tmp_path / "out"
    code, said, err = run(
        capsys,
        "quantize",
        "--model",
        smollm2(),
        "--out",
        out,
        "--method",
        "rtn",
        "--bits",
        8,
        "--group",
        64,
    )
    assert code == 0, err
    assert str(out) in said and "rtn, 8 bits, compressed-tensors" in said
    figures = []
    for path in (smollm2(), out):
        code, said, err = run(
            capsys, "eval", "--model", path, "--perplexity", text, "--window", 128, "--most", 2
        )
        assert code == 0, err
        figures.append(float(said.split()[-1]))
    assert figures[1] == pytest.approx(figures[0], rel=0.01)
    llama = Llama.from_pretrained(out)
    ids = llama.tokenizer.encode(
        llama.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    )
    assert "Paris" in llama.generate(ids, max_new_tokens=8).text


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_into_a_gguf(method, model, text, tmp_path, capsys):
    """Of groups of 32 without being told so; its perplexity is the folder's."""
    found = []
    for format in ("gguf", "compressed-tensors"):
        out = tmp_path / f"m.{format}"
        options = ["--method", method, "--format", format]
        if method != "rtn":
            options += ["--calibration", text, "--samples", 4, "--window", 64]
        if format != "gguf":
            options += ["--group", 32]
        code, said, err = run(capsys, "quantize", "--model", model, "--out", out, *options)
        assert code == 0, err
        assert f"{out}: " in said and f"{method}, 4 bits, {format}" in said
        options = ["--perplexity", text, "--window", 64, "--most", 3]
        code, said, err = run(capsys, "eval", "--model", out, *options)
        assert code == 0, err
        found.append(said.split()[-1])
    assert found[0] == found[1]
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".compressed-tensors"] == ["m.gguf"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method", "gptq"], "--calibration: gptq needs a text"),
        (
            ["--method", "rtn", "--format", "gguf", "--group", 64, "--asymmetric"],
            "format gguf has no group 64, no asymmetric; it takes rtn, gptq, awq, group 32",
        ),
        (["--method", "hqq", "--format", "gguf"], "format gguf has no method hqq, no asymmetric"),
        (["--method", "rtn", "--group", 48], "groups of 48 do not divide the model's 64 inputs"),
        (["--method", "rtn", "--bits", 5], "bits must be 4 or 8, not 5"),
        (["--method", "rtn", "--bits", 0], "--bits must be 4 or 8, not 0"),
        (["--method", "rtn", "--group", 0], "--group must be 1 or more, or -1"),
        (["--method", "hqq", "--group", 32, "--format", "gptq"], "hqq's zero-points"),
        (["--method", "exl2"], "exl2"),
    ],
)
def test_quantize_mistakes(options, told, model, tmp_path, capsys):
    code, out, err = run(capsys, "quantize", "--model", model, "--out", tmp_path / "out", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and told in err
    assert not (tmp_path / "out").exists()


def test_eval_mistakes(model, tmp_path, capsys):
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("hello")
    binary.write_bytes(b"\xff\xfe\x00")
    for file, more, told in (
        (tmp_path / "none", [], "--perplexity: no file"),
        (short, [], "are fewer than a window of 512"),
        (binary, [], "not a text in UTF-8"),
        (short, ["--window", 4096], "are more than the model's 128"),
    ):
        window = more or ([] if "window of" not in told else ["--window", 512])
        path = smollm2() if "window of" in told else model
        code, out, err = run(
            capsys, "eval", "--model", path, "--perplexity", file, *(window or ["--window", 64])
        )
        assert (code, out, err.count("\n")) == (2, "", 1) and told in err
