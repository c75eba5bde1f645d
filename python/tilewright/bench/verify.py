"""Our model against transformers' on the same weights: logits, greedy tokens, top-1 agreement."""

import logging
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

LOGIT_BOUND = 1e-3  # of float32 logits, weights dequantised to float32 on both sides
NEW_TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a short poem about the sea.",
    "List three prime numbers.",
    "How do I boil an egg?",
)
TEXT = """A library is a collection of books, and possibly other materials and media, that is
accessible for use by its members and members of allied institutions. Libraries provide physical or
digital materials, and may be a physical location, a virtual space, or both. A library's collection
normally includes printed materials which may be borrowed, and usually also includes a reference
section of publications which may only be utilized inside the premises. Resources such as commercial
releases of films, television programmes, other video recordings, radio, music and audio recordings
may be available in many formats. In addition, some libraries offer the use of computers. The first
libraries consisted of archives of the earliest form of writing, the clay tablets in cuneiform
script discovered in Sumer, some dating back to 2600 BC. Private or personal libraries made up of
written books appeared in classical Greece in the 5th century BC. In the 6th century, at the very
close of the classical period, the great libraries of the Mediterranean world remained those of
Constantinople and Alexandria. The fall of the Western Roman Empire led monks to copy what was left. Many people
still walk to one on a Saturday morning, return what they have read, and leave with a book they had
never heard of an hour before. The shelves are arranged by subject, so that a search for one volume
becomes a meeting with its neighbours; no catalogue has yet found a better way to surprise a reader.
"""


def their_model(path: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a GGUF file (dequantised) or a Hugging Face folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    folder, name = path.parent, path.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()


@torch.inference_mode()
def _greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """`count` greedy tokens of a transformers model, by its own forward pass and cache."""
    out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    tokens = [int(out.logits[0, -1].argmax())]
    while len(tokens) < count:
        step = torch.tensor([tokens[-1:]])
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens


def _agreement(ours: Tensor, theirs: Tensor) -> float:
    """Share of positions where both put the same token first."""
    return (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()


def verify(path: Path, *, tokens: int = 256, threads: int | None = None) -> dict[str, Any]:
    """Logits on `tokens` positions, 64 greedy tokens on 5 prompts, and top-1 agreement.

    Both sides run in float32 from the same weights; the quantised paths are then compared with
    transformers' float32 logits, and llama.cpp beside them where it is installed.
    """
    from tilewright.bench.peers import Peer, available
    from tilewright.models.llama import Llama

    if threads is not None:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        ours = Llama.from_pretrained(path, dtype=torch.float32, activations="float")
        theirs = their_model(path, torch.float32)
        tokenizer = ours.tokenizer
        if tokenizer is None:
            raise ValueError(f"verify: {path} has no tokenizer")
        ids = tokenizer.encode(TEXT)[:tokens]
        if len(ids) < tokens:
            raise ValueError(f"verify: the text has {len(ids)} tokens, fewer than {tokens}")
        batch = torch.tensor([ids])
        expected, found = theirs(batch).logits[0].float(), ours(batch)[0].float()
        prompts = [
            tokenizer.encode(tokenizer.chat([{"role": "user", "content": p}]), special=False)
            for p in PROMPTS
        ]
        same = [
            ours.generate(p, max_new_tokens=NEW_TOKENS, ignore_eos=True).tokens
            == _greedy(theirs, p, NEW_TOKENS)
            for p in prompts
        ]
        difference = (found - expected).abs().max().item()
        agreement = {"tilewright, float32": _agreement(found, expected)}
    choice = expected.argmax(-1)
    del ours, theirs, found, expected
    quantised = path.suffix == ".gguf"
    for engine in available():
        if engine.startswith("transformers") or (engine == "llama.cpp" and not quantised):
            continue
        with Peer(engine, path, torch.get_num_threads()) as peer:
            picked = torch.tensor(peer.ask("choices", ids)["choices"])
        agreement[engine] = (picked == choice).double().mean().item()
    return {
        "model": path.name,
        "positions": tokens,
        "largest_logit_difference": difference,
        "bound": LOGIT_BOUND,
        "prompts": len(same),
        "prompts_with_the_same_greedy_tokens": sum(same),
        "top1_agreement_with_transformers_float32": agreement,
        "passed": difference <= LOGIT_BOUND and all(same),
    }


def table(found: dict[str, Any]) -> Table:
    """What verify found, a line for each check."""
    out = Table("check", "found", "must be", title=f"{found['model']} beside transformers")
    difference, bound = found["largest_logit_difference"], found["bound"]
    out.add_row(
        f"largest logit difference on {found['positions']} positions (float32)",
        f"{difference:.2e}",
        f"<= {bound:.0e}",
    )
    same = found["prompts_with_the_same_greedy_tokens"]
    out.add_row(
        f"prompts with the same {NEW_TOKENS} greedy tokens", str(same), str(found["prompts"])
    )
    for engine, share in found["top1_agreement_with_transformers_float32"].items():
        out.add_row(f"same top token as transformers fp32: {engine}", f"{share:.1%}", "")
    return out
