"""Text to token ids and back, and the chat template, from tokenizer.json or a GGUF's metadata.

Ids equal transformers' for the same file.  transformers itself is not imported: its GGUF tokeniser
alone takes 209 MB.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import (
    Tokenizer as Backend,
)
from tokenizers.models import BPE

Message = Mapping[str, Any]

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF token types
REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to

_GPT2 = ""  # ByteLevel's own pattern
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how text is split before merging.  smollm: transformers reads such a file
# with GPT-2's pattern, and so do we; llama.cpp also splits digits off, which differs only where two
# or more spaces stand before a digit.
PATTERNS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


class Tokenizer:
    """Encodes and decodes text, and renders chats.

    bos and eos are ids (None where the model has none); chat_template is jinja source or None.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos: int | None = None,
        eos: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend, self.bos, self.eos = backend, bos, eos
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja of a folder."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{file}: not a tokenizer: {error}") from error
        config: dict[str, Any] = {}
        if (path / "tokenizer_config.json").is_file():
            config = read_json(path / "tokenizer_config.json")

        def id_of(name: str) -> int | None:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{path / 'tokenizer_config.json'}: {name} is no text: {token!r}")
            return None if token is None else backend.token_to_id(token)

        template = config.get("chat_template")
        if isinstance(template, list):  # several, named
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if not isinstance(template, (str, type(None))):
            raise ValueError(f"{path / 'tokenizer_config.json'}: chat_template is no text")
        if (path / "chat_template.jinja").is_file():
            template = (path / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, bos=id_of("bos_token"), eos=id_of("eos_token"), chat_template=template)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], where: object) -> "Tokenizer":
        """From a GGUF's metadata; `where` names the file in errors.

        Raises ValueError for a tokeniser kind or pre-tokeniser it does not know.
        """

        def get(name: str, default: Any = None) -> Any:
            return metadata.get(f"tokenizer.ggml.{name}", default)

        tokens = get("tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise ValueError(
                f"{where}: metadata tokenizer.ggml.tokens is missing or no list of texts"
            )
        bos, eos, kind = get("bos_token_id"), get("eos_token_id"), get("model")
        for name, token in (("bos", bos), ("eos", eos), ("unknown", get("unknown_token_id"))):
            if token is not None and (not isinstance(token, int) or not 0 <= token < len(tokens)):
                raise ValueError(f"{where}: {name} token {token} is outside 0 to {len(tokens) - 1}")
        try:
            if kind == "gpt2":
                backend = _byte_level(tokens, get("merges"), get("pre", "default"))
                adds_bos = get("pre") in ("llama3", "llama-v3", "llama-bpe", "tekken")
            elif kind == "llama":
                backend = _sentence_piece(
                    tokens, get("scores"), get("merges"), get("unknown_token_id"),
                    bool(get("add_space_prefix", True)),
                )  # fmt: skip
                adds_bos = True
            else:
                raise ValueError(f"tokeniser kind {kind!r} is unknown; known are gpt2, llama")
        except Exception as error:  # tokenizers raises bare Exception for bad merges
            raise ValueError(f"{where}: {error}") from error
        types = get("token_type", [])
        if not isinstance(types, list) or (types and len(types) != len(tokens)):
            told = len(types) if isinstance(types, list) else repr(types)
            raise ValueError(f"{where}: {told} token types for {len(tokens)} tokens")
        named = {i for i in (bos, eos, get("unknown_token_id")) if i is not None}
        special = sorted(named | {i for i, t in enumerate(types) if t == CONTROL})
        backend.add_special_tokens([_added(tokens[i], special=True) for i in special])
        own = [_added(tokens[i], special=False) for i, t in enumerate(types) if t == USER_DEFINED]
        backend.add_tokens(own)
        if bos is not None and get("add_bos_token", adds_bos):
            backend.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"], pair=None, special_tokens=[(tokens[bos], bos)]
            )
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, (str, type(None))):
            raise ValueError(f"{where}: metadata tokenizer.chat_template is no text: {template!r}")
        return cls(backend, bos=bos, eos=eos, chat_template=template)

    def to_gguf(self, vocab_size: int, eos: Sequence[int] = ()) -> dict[str, Any]:
        """A GGUF's metadata of this byte-level BPE for `vocab_size` tokens; from_gguf's inverse.

        eos are the ids that end a text, where the tokeniser knows more or other than its own.  Raises
        ValueError where it is of another kind, splits text as no pre-tokeniser of llama.cpp does that is known
        here, or has more tokens.
        """
        told = json.loads(self.backend.to_str())
        pre = _pre_name(told)
        tokens = [f"[PAD{i}]" for i in range(vocab_size)]
        types = [UNUSED] * vocab_size
        added = {t["id"]: t for t in told["added_tokens"]}
        known = {i: token for token, i in told["model"]["vocab"].items()}
        for i, token in (known | {i: t["content"] for i, t in added.items()}).items():
            if i >= vocab_size:
                raise ValueError(f"token {i}, {token!r}, is outside the model's {vocab_size}")
            tokens[i], types[i] = token, NORMAL
            if i in added:
                types[i] = CONTROL if added[i]["special"] else USER_DEFINED
        pairs = (m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"])
        found: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
        found["merges"] = list(pairs)
        first = self.eos if self.eos is not None else next(iter(eos), None)
        ids = {"bos": self.bos, "eos": first, "eot": next((i for i in eos if i != first), None)}
        found |= {f"{name}_token_id": i for name, i in ids.items() if i is not None}
        found["add_bos_token"] = self.bos is not None and self.encode("a")[:1] == [self.bos]
        found = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
        if self.chat_template is not None:
            found["tokenizer.chat_template"] = self.chat_template
        return found

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of text, with the begin token where the model wants one and `special` is true."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids, control tokens left out unless skip_special is false."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt text of messages ({"role", "content"}), ready for the assistant's turn.

        Encode it with special=False: the template writes its own begin token.  Raises ValueError
        where there is no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("chat: the model has no chat template")
        import jinja2

        def token(i: int | None) -> str:
            return "" if i is None else self.backend.id_to_token(i) or ""

        try:
            return _compile(self.chat_template).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=token(self.bos),
                eos_token=token(self.eos),
                **variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"chat: the model's template failed: {error}") from error


class TextStream:
    """Turns token ids into text pieces as they come, and watches for stop strings.

    A piece is held back while it ends in half a character or in what may become a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.stopped: str | None = None  # the stop string met
        self._ids: list[int] = []
        self._context = self._done = (
            0  # ids before _done are text already; from _context re-decoded
        )
        self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` settles, up to a stop string where one is complete."""
        self._ids.append(token)
        return self._settle(final=False)

    def close(self) -> str:
        """The text still held back at the end."""
        return "" if self.stopped is not None else self._settle(final=True)

    def _settle(self, *, final: bool) -> str:
        known = self.tokenizer.decode(self._ids[self._context : self._done])
        text = self.tokenizer.decode(self._ids[self._context :])
        if final or not text.endswith(REPLACEMENT):
            self._held += text[len(known) :]
            self._context, self._done = self._done, len(self._ids)
        found = [(self._held.find(s), s) for s in self.stop if s in self._held]
        if found:
            at, self.stopped = min(found)
            return self._held[:at]
        keep = 0 if final else max((_overlap(self._held, s) for s in self.stop), default=0)
        piece, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return piece


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.  Raises FileNotFoundError, or ValueError where it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for a, _, b in (merge.partition(" ") for merge in merges)]


def _byte_level(tokens: list[str], merges: list[str] | None, pre: str) -> Backend:
    if pre not in PATTERNS:
        raise ValueError(f"pre-tokeniser {pre!r} is unknown; known are {', '.join(PATTERNS)}")
    if merges is None:
        raise ValueError("metadata tokenizer.ggml.merges is missing")
    pattern = PATTERNS[pre]
    model = BPE(
        {token: i for i, token in enumerate(tokens)},
        _pairs(merges),
        ignore_merges=pattern in (_LLAMA3, _TEKKEN),
    )
    backend = Backend(model)
    if pattern == _QWEN2:
        backend.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        backend.pre_tokenizer = level
    backend.decoder = decoders.ByteLevel()
    return backend


def _pre_name(told: Mapping[str, Any]) -> str:
    """The pre-tokeniser of a tokenizer.json, by llama.cpp's name for it.  Raises ValueError where it is no
    byte-level BPE, or it has none."""
    model, kind = told["model"], told["pre_tokenizer"] or {}
    parts = kind.get("pretokenizers", [kind])
    if model["type"] != "BPE" or parts[-1].get("type") != "ByteLevel" or model["byte_fallback"]:
        raise ValueError(
            f"a GGUF is written of byte-level BPE, not of {model['type']} split by"
            f" {', '.join(str(p.get('type')) for p in parts)}"
        )

    def way(told: Mapping[str, Any]) -> Any:
        kind = told["pre_tokenizer"]
        parts = kind.get("pretokenizers", [kind])
        # trim_offsets says where tokens are said to be, not what they are
        return [{k: v for k, v in p.items() if k != "trim_offsets"} for p in parts]

    split = way(told)
    if split[0] == {"type": "Digits", "individual_digits": True}:
        split, names = split[1:], ["smollm"]
    else:
        names = [name for name in PATTERNS if name not in ("default", "smollm")]
    for name in names:
        ours = json.loads(_byte_level(["a"], [], name).to_str())
        alike = all(told["model"][n] == ours["model"][n] for n in ("ignore_merges", "dropout"))
        if split == way(ours) and told["normalizer"] == ours["normalizer"] and alike:
            return name
    raise ValueError(
        f"a GGUF names how text is split, and none of {', '.join(PATTERNS)} is"
        f" {json.dumps(told['normalizer'])}, {json.dumps(split)}"
    )


def _sentence_piece(
    tokens: list[str],
    scores: list[float] | None,
    merges: list[str] | None,
    unknown: int | None,
    prefix_space: bool,
) -> Backend:
    if merges is not None:
        pairs = _pairs(merges)
    elif scores is not None and len(scores) == len(tokens):
        pairs = _merges_of(dict(zip(tokens, scores, strict=True)))
    else:
        raise ValueError("metadata tokenizer.ggml.scores is missing or of the wrong length")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unk = None if unknown is None else tokens[unknown]
    backend = Backend(BPE(vocabulary, pairs, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if prefix_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """SentencePiece merges by the score of their result; BPE wants them as ranked pairs."""
    found: list[tuple[float, str, str]] = []
    for whole, score in scores.items():
        halves = [(whole[:i], whole[i:]) for i in range(1, len(whole))]
        local = [(a, b) for a, b in halves if a in scores and b in scores]
        local.sort(key=lambda pair: (scores[pair[0]], scores[pair[1]]), reverse=True)
        found += [(score, a, b) for a, b in local]
    found.sort(key=lambda merge: merge[0], reverse=True)
    return [(a, b) for _, a, b in found]


@functools.cache
def _compile(source: str) -> Any:
    """The template in a sandbox: it comes with the model, so it is a stranger's program."""
    import jinja2.ext
    import jinja2.sandbox

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
