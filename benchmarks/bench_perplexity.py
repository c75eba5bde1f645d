"""What quantisation costs: perplexity of SmolLM2-135M-Instruct on Python's own help texts.

The mean over windows of 512 tokens, each begun afresh, of the cross-entropy of every token after the
first; the text ships with Python as pydoc_data/topics.py, whose pages are by turns for calibration and for
this.  The weights are those of its Q4_1 file, and quantised again, symmetric but HQQ's, in groups of 64.
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from tilewright.bench.peers import smollm2
from tilewright.bench.perplexity import perplexity
from tilewright.models._quantize import quantize
from tilewright.models.llama import Llama
from tilewright.quant import QuantConfig

WINDOW, WINDOWS, SAMPLES = 512, 32, 64
QUANTISED = {
    "8 bits, rtn": QuantConfig("rtn", 8, 64),
    "4 bits, rtn": QuantConfig("rtn", 4, 64),
    "4 bits, hqq": QuantConfig("hqq", 4, 64),
    "4 bits, awq": QuantConfig("awq", 4, 64),
    "4 bits, gptq": QuantConfig("gptq", 4, 64),
    "4 bits, gptq, act-order": QuantConfig("gptq", 4, 64, act_order=True),
    "8 bits by row, smoothquant": QuantConfig("smoothquant"),
}
FORMATS = {"hqq": "hqq", "gptq": "gptq"}


def _ids(tokenizer, pages, count: int) -> torch.Tensor:
    text = "\n".join(topics[name] for name in sorted(topics)[pages])
    return torch.tensor(tokenizer.encode(text)[: count * WINDOW]).view(count, WINDOW)


def measure(quick):
    count, samples = (4, 8) if quick else (WINDOWS, SAMPLES)
    file = Path(smollm2())
    rows = []

    def add(weights: str, model: Llama) -> None:
        rows.append(
            {
                "weights": weights,
                "activations": model.activations,
                "perplexity": perplexity(model, ids),
                "windows": count,
                "tokens_a_window": WINDOW,
            }
        )

    model = Llama.from_pretrained(file)
    ids = _ids(model.tokenizer, slice(1, None, 2), count)
    calibration = _ids(model.tokenizer, slice(0, None, 2), samples)
    for activations in ("float", "int8"):
        add("the file's, Q4_1", Llama.from_pretrained(file, activations=activations))
    for name, config in QUANTISED.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            format = FORMATS.get(config.method, "compressed-tensors")
            quantize(file, out, config, calibration=calibration, format=format)
            add(name, Llama.from_pretrained(out))
    for row in rows:
        row["over_float"] = row["perplexity"] / rows[0]["perplexity"] - 1
    return rows
