"""Text to tokens and back: round trips, chats, and streams that never split a character."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, normalizers

from infinillm.errors import BadRequest
from infinillm.model.tokenizer import Detokenizer, Tokenizer
from tests import tiny

HARD = "naïve café — 日本語のテキスト 😀👩‍👩‍👧‍👦🇪🇺 \u202eright to left\u202c עברית\t\r\n\x00 ﷽ 𝔘𝔫𝔦 "


def byte_level() -> Tokenizer:
    return Tokenizer.load(tiny.folder("llama"))


def sentencepiece() -> Tokenizer:
    """A vocabulary in the manner of Llama 2: words marked by U+2581, bytes as tokens of their own."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in ["\u2581", "a", "b", "l", "o", "\u2581a", "lo", "é", "日", "\u2581lo"]:
        vocab[word] = len(vocab)
    merges = [("\u2581", "a"), ("l", "o"), ("\u2581", "lo")]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Tokenizer(fast, [2])


VOCABULARIES = {"byte level": byte_level(), "sentencepiece": sentencepiece()}
each_vocabulary = pytest.mark.parametrize("kind", sorted(VOCABULARIES))


def pieces(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special)
    return [*map(stream.add, ids), stream.end()]


@each_vocabulary
@given(st.text())
def test_text_round_trips_and_so_does_its_stream(kind: str, text: str) -> None:
    tokenizer = VOCABULARIES[kind]
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids) == text
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@each_vocabulary
@given(st.data())
def test_a_stream_of_any_tokens_is_their_decoding(kind: str, data: st.DataObject) -> None:
    """Broken characters, byte runs cut anywhere, special tokens in between, ids the vocabulary lacks."""
    tokenizer = VOCABULARIES[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=60))
    for skip in (True, False):
        assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@each_vocabulary
def test_hard_text_cut_anywhere(kind: str) -> None:
    tokenizer = VOCABULARIES[kind]
    ids = tokenizer.encode(HARD * 2, special=False)
    for cut in range(len(ids)):
        assert "".join(pieces(tokenizer, ids[:cut])) == tokenizer.decode(ids[:cut])


@each_vocabulary
def test_a_piece_never_holds_part_of_a_character(kind: str) -> None:
    tokenizer = VOCABULARIES[kind]
    parts = pieces(tokenizer, tokenizer.encode("x😀y日z", special=False))
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == "x😀y日z"


def test_characters_come_as_soon_as_they_are_whole() -> None:
    tokenizer = VOCABULARIES["byte level"]
    ids = tokenizer.encode("😀!", special=False)
    assert pieces(tokenizer, ids) == ["", "", "", "😀", "!", ""]


def test_a_long_stream_costs_each_token_a_bounded_look() -> None:
    """Counted, not timed: what the vocabulary is asked to decode grows with the text, not with its square."""
    tokenizer = sentencepiece()
    looked: list[int] = []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, skip_special=True: looked.append(len(ids)) or decode(ids, skip_special)  # type: ignore[method-assign,func-returns-value]
    ids = tokenizer.encode("a lo 😀 日 ü " * 200, special=False)
    pieces(tokenizer, ids)
    assert sum(looked) <= 3 * len(ids)


@each_vocabulary
def test_the_bytes_of_tokens_are_the_text(kind: str) -> None:
    tokenizer = VOCABULARIES[kind]
    ids = tokenizer.encode(HARD, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip(" ") == HARD.lstrip(" ")


def test_token_text() -> None:
    tokenizer = VOCABULARIES["byte level"]
    assert tokenizer.token_text(0) == "<|start|>"
    assert tokenizer.token_text(tokenizer.encode("é", special=False)[0]) == "\ufffd"
    assert tokenizer.token_text(10**6) == ""


def test_end_tokens_come_from_everywhere(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.folder("llama"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert Tokenizer.load(folder).eos_ids == (7, 8, 1)
    (folder / "generation_config.json").unlink()
    assert Tokenizer.load(folder).eos_ids == (1,)


def test_chat_is_what_transformers_makes_of_it() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀"}]
    tokenizer = VOCABULARIES["byte level"]
    want = tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.chat(messages) == want
    assert tokenizer.decode(tokenizer.chat(messages), skip_special=False).endswith("<|end|>\n<|start|>assistant\n")
    assert len(tokenizer.chat(messages, add_generation_prompt=False)) < len(want)


def test_content_in_parts() -> None:
    tokenizer = VOCABULARIES["byte level"]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    whole = tokenizer.chat([{"role": "user", "content": "one\ntwo"}])
    assert tokenizer.chat([{"role": "user", "content": parts}]) == whole
    for bad in ([{"type": "image_url", "image_url": {}}], ["text"], [{"type": "text"}]):
        with pytest.raises(BadRequest) as caught:
            tokenizer.chat([{"role": "user", "content": bad}])
        assert caught.value.field == "messages"


def test_bad_text_is_a_bad_request() -> None:
    tokenizer = VOCABULARIES["byte level"]
    with pytest.raises(BadRequest) as caught:
        tokenizer.encode("lone \ud800 surrogate")
    assert caught.value.field == "prompt"
    with pytest.raises(BadRequest) as caught:
        tokenizer.chat([{"role": "user", "content": "\ud800"}])
    assert caught.value.field == "messages"


def test_bad_chats_are_bad_requests() -> None:
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages[0].content + 1 }}"
    )
    tokenizer = VOCABULARIES["byte level"]
    with pytest.raises(BadRequest, match="user first"):
        tokenizer.chat([{"role": "system", "content": "x"}], chat_template=strict)
    with pytest.raises(BadRequest, match="template"):
        tokenizer.chat([{"role": "user", "content": "x"}], chat_template=strict)
    with pytest.raises(BadRequest, match="no chat template"):
        VOCABULARIES["sentencepiece"].chat([{"role": "user", "content": "x"}])


def test_a_folder_without_tokenizer_is_a_bad_request(tmp_path: Path) -> None:
    shutil.copy(tiny.folder("llama") / "config.json", tmp_path)
    with pytest.raises(BadRequest, match="tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_default_models_tokenizer(smollm: Path) -> None:
    tokenizer = Tokenizer.load(smollm)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.vocab_size == 49152
    for text in (HARD, " 12345 m² x²³", "def f(x):\n    return x\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(pieces(tokenizer, ids)) == text
    assert [tokenizer.token_text(i) for i in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    chat = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Hi"}]), skip_special=False)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_gateway_needs_no_torch() -> None:
    """Loading a tokenizer must stay light: one process more should not cost a second and 200 MB."""
    program = (
        "import sys, pathlib; from infinillm.model.tokenizer import Tokenizer; import infinillm.model.files;"
        f"Tokenizer.load(pathlib.Path({str(tiny.folder('llama'))!r})).chat([dict(role='user', content='x')]);"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
