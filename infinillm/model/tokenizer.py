"""Text to tokens and back, streams included; needs no torch, so a gateway can use it alone."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from infinillm.errors import BadRequest

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
UTF8 = codecs.getincrementaldecoder("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies (GPT-2's): character -> byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


ALPHABET = _byte_alphabet()


class Tokenizer:
    """The vocabulary and chat template of one model."""

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int]):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.vocab_size = len(tokenizer)
        self.special_ids = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self.byte_level = _is_byte_level(self._backend.decoder)
        self._texts: dict[int, bytes] = {}

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """The tokenizer in folder `path`; end tokens are those of its generation config, config and tokenizer."""
        from transformers import PreTrainedTokenizerFast

        if (path / "tokenizer.json").is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            except (OSError, ValueError) as error:
                raise BadRequest(f"{path} has no tokenizer we can read: {error}", field="model") from error
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            if (path / name).is_file():
                stated = json.loads((path / name).read_text()).get("eos_token_id")
                ids += stated if isinstance(stated, list) else [] if stated is None else [stated]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        return Tokenizer(tokenizer, ids)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; where `special`, with what the model expects around a text (often one in front)."""
        try:
            ids: list[int] = self._backend.encode_batch([text], add_special_tokens=special)[0].ids  # lets go of the GIL
        except (TypeError, UnicodeEncodeError) as error:
            raise BadRequest(f"prompt is not valid Unicode text: {error}", field="prompt") from error
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]], **kw: Any) -> list[int]:
        """Token ids of a conversation, put through the model's template, ready for the model's turn.

        Keywords go to the template (`tools`, `add_generation_prompt`, ...). A content of text parts is joined by line
        ends. Raises BadRequest naming `messages`.
        """
        if not self._tokenizer.chat_template and "chat_template" not in kw:
            raise BadRequest("this model has no chat template; use completions instead", field="messages")
        spoken = [_flat(message) for message in messages]
        options = {"add_generation_prompt": True, **kw, "tokenize": False}
        try:
            text = self._tokenizer.apply_chat_template(spoken, **options)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise BadRequest(f"messages do not fit the model's chat template: {error}", field="messages") from error
        try:
            return self.encode(text, special=False)
        except BadRequest as error:
            raise BadRequest("messages are not valid Unicode text", field="messages") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; part of a character, perhaps. Empty for ids outside the vocabulary."""
        known = self._texts.get(token)
        if known is None:
            known = self._texts[token] = self._bytes(self.spelled(token) or "")
        return known

    def token_text(self, token: int) -> str:
        """The text of one token, special ones spelled out; broken characters as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def spelled(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None for ids outside."""
        spelled: str | None = self._backend.id_to_token(token)
        return spelled

    def _bytes(self, spelled: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(ALPHABET[char] for char in spelled)
            except KeyError:
                return spelled.encode()
        byte = BYTE_TOKEN.fullmatch(spelled)
        return bytes([int(byte[1], 16)]) if byte else spelled.replace("\u2581", " ").encode()


def _is_byte_level(decoder: Any) -> bool:
    return decoder is not None and json.loads(decoder.__getstate__())["type"] == "ByteLevel"


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRequest("this model reads text only: each part must be {type: text, text: ...}", field="messages")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


class Detokenizer:
    """The text of a growing list of tokens, piece by piece.

    Law: the pieces, `end()` included, joined are `tokenizer.decode` of all the tokens. A piece never holds part of a
    character. Each token is looked at a bounded number of times.

    Theory of operation. In a byte-level vocabulary a token is bytes, and an incremental UTF-8 decoder keeps back an
    unfinished character. In a sentencepiece vocabulary bytes come as tokens of their own, and a run of them is decoded
    as a whole, so a run is kept back until a token of another kind ends it; the text of a token is what it adds to the
    text of the tokens of the piece before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = UTF8("replace")
        self._before: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that `token` completes; often its own, sometimes none yet."""
        if token in self._skipped:
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        spelled = self._tokenizer.spelled(token)
        if spelled is None:
            return ""
        self._pending.append(token)
        return "" if BYTE_TOKEN.fullmatch(spelled) else self._release()

    def end(self) -> str:
        """What was kept back: after it, nothing may be added."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._release() if self._pending else ""

    def _release(self) -> str:
        old = self._tokenizer.decode(self._before, skip_special=False)
        new = self._tokenizer.decode(self._before + self._pending, skip_special=False)
        self._before, self._pending = self._pending, []
        return new[len(old) :]
