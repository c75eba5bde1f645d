"""`tilewright quantize --embeddings`: a GGUF whose embeddings and head are of few bits."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from tilewright import nn
from tilewright.bench import harness
from tilewright.models import Llama
from tilewright.models._quantize import quantize
from tilewright.quant import GGUFFile, quantisers
from tilewright.quant.apply import QuantConfig

models = harness.load(Path(__file__).with_name("test_quantize_gguf.py"))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_embeddings_of_few_bits(name, bits, tmp_path):
    """Of a folder, and of a GGUF of floats; they load as they are, tied where they were."""
    model = models.folder(tmp_path / "model", name)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    config = dataclasses.replace(models.CONFIGS["8 bits"], embeddings=bits)
    quantize(model, first, models.CONFIGS["8 bits"], format="gguf")
    quantize(first, second, config, format="gguf")
    quantize(model, tmp_path / "third.gguf", config, format="gguf")
    source = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = {"token_embd": source.model.embed_tokens, "output": source.lm_head}
    for path in (second, tmp_path / "third.gguf"):
        file, ours = GGUFFile(path), Llama.from_pretrained(path)
        assert ("output.weight" in file.tensors) == (name == "llama")
        for tensor in file.tensors.keys() & {f"{layer}.weight" for layer in layers}:
            assert file.info(tensor).type == {4: "Q4_0", 8: "Q8_0"}[bits]
            weight = layers[tensor.removesuffix(".weight")].weight
            wanted = quantisers.rtn(weight, bits=bits, group=32).dequantize()
            assert torch.equal(file.dense(tensor, torch.float32), wanted)
        assert isinstance(ours.embedding, nn.QuantEmbedding)
        assert (ours.head.weight is ours.embedding.weight) == (name == "tied")


def test_folders_leave_embeddings(tmp_path):
    model = models.folder(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match="format gptq leaves embeddings as they are"):
        quantize(model, tmp_path / "out", QuantConfig(group=32, embeddings=8), format="gptq")
    assert not (tmp_path / "out").exists()
