"""What clients of the OpenAI API get: pieces of text as choices, whole or in chunks, with usage and logprobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from infinillm.core.types import TokenLogprob
from infinillm.model.tokenizer import Tokenizer
from infinillm.servers.inference import Ask, Piece

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


class Spelling:
    """How tokens are written beside their log-probabilities."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def text(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.token_text(token)

    def legacy(self, values: Sequence[TokenLogprob | int], offset: int) -> dict[str, Any]:
        """The shape of completions; a bare token has no log-probability, as the first of a prompt."""
        texts, offsets = [], []
        for value in values:
            texts.append(self.text(value if isinstance(value, int) else value.token))
            offsets.append(offset)
            offset += len(texts[-1])
        return {
            "text_offset": offsets,
            "token_logprobs": [None if isinstance(value, int) else _finite(value.logprob) for value in values],
            "tokens": texts,
            "top_logprobs": [None if isinstance(value, int) else self._top(value) for value in values],
        }

    def _top(self, value: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in (*value.top, (value.token, value.logprob)):
            found.setdefault(self.text(token), _finite(logprob))  # of two that read the same, the likelier
        return found

    def chat(self, values: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The shape of chat completions."""
        return {
            "content": [
                {
                    **self._entry(value.token, value.logprob),
                    "top_logprobs": [self._entry(token, logprob) for token, logprob in value.top],
                }
                for value in values
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self._tokenizer.token_bytes(token)
        return {"token": self.text(token), "logprob": _finite(logprob), "bytes": list(spelled)}

    def prompt(self, values: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
        """vLLM's shape: nothing for the first token, then alternatives by token id."""
        entries: list[dict[str, Any] | None] = [None]
        for value in values:
            ranks = {token: rank for rank, (token, _) in enumerate(value.top, 1)}
            both = {**dict(value.top), value.token: value.logprob}
            entries.append({str(t): self._scored(t, logprob, ranks.get(t)) for t, logprob in both.items()})
        return entries

    def _scored(self, token: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.text(token)}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB


@dataclass(slots=True, eq=False)
class Usage:
    """Tokens counted so far: prompts once each, whatever n is."""

    prompt: int
    completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # by choice, for the first choice of each prompt

    def count(self, index: int, piece: Piece, n: int) -> None:
        self.completion += len(piece.tokens)
        if index % n == 0:
            self.cached[index] = max(piece.cached, self.cached.get(index, 0))

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all chunks of a response begin with."""

    id: str
    created: int  # seconds since 1970
    model: str

    def body(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class Reply(Protocol):
    """Makes JSON of pieces, for one endpoint."""

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """One chunk of a stream, with one choice."""
        ...

    def empty(self) -> dict[str, Any]:
        """A chunk without choices: it carries the usage."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The response to a request that is not streamed; one piece per choice, in order."""
        ...

    def shows(self, piece: Piece) -> bool:
        """Whether a piece is worth a chunk: some bring tokens and no text yet."""
        ...


class CompletionReply:
    """Text completions."""

    def __init__(
        self,
        head: Head,
        spelling: Spelling,
        asks: Sequence[Ask],
        echoes: Sequence[str] | None,
        *,
        logprobs: bool,
        prompt_logprobs: bool,
        token_ids: bool,
    ):
        self._head, self._spelling, self._asks, self._echoes = head, spelling, asks, echoes
        self._logprobs, self._prompt_logprobs, self._token_ids = logprobs, prompt_logprobs, token_ids
        self._offsets = [0] * len(asks)
        self._begun = [False] * len(asks)

    def shows(self, piece: Piece) -> bool:
        return bool(piece.text or piece.finish_reason) or self._logprobs or self._token_ids

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return {**self._head.body("text_completion"), "choices": [self._choice(index, piece)]}

    def empty(self) -> dict[str, Any]:
        return {**self._head.body("text_completion"), "choices": []}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self._head.body("text_completion"), "choices": choices}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        first, self._begun[index] = not self._begun[index], True
        prompt = self._asks[index].prompt
        text, values = piece.text, list[TokenLogprob | int](piece.logprobs)
        if first and self._echoes is not None:
            text = self._echoes[index] + text
            values = [prompt[0], *piece.prompt_logprobs, *values]
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._spelling.legacy(values, self._offsets[index]) if self._logprobs else None,
            "finish_reason": piece.finish_reason or None,
            "stop_reason": piece.stop_reason,
        }
        if self._logprobs:
            self._offsets[index] += sum(map(len, choice["logprobs"]["tokens"]))
        if self._prompt_logprobs and first:
            choice["prompt_logprobs"] = self._spelling.prompt(piece.prompt_logprobs)
        if self._token_ids:
            choice["token_ids"] = piece.tokens
            choice["prompt_token_ids"] = prompt if first else None
        return choice


class ChatReply:
    """Chat completions."""

    def __init__(
        self,
        head: Head,
        spelling: Spelling,
        asks: Sequence[Ask],
        *,
        logprobs: bool,
        prompt_logprobs: bool,
        token_ids: bool,
    ):
        self._head, self._spelling, self._asks = head, spelling, asks
        self._logprobs, self._prompt_logprobs, self._token_ids = logprobs, prompt_logprobs, token_ids
        self._begun = [False] * len(asks)

    def shows(self, piece: Piece) -> bool:
        return bool(piece.text or piece.finish_reason) or self._logprobs or self._token_ids

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        first, self._begun[index] = not self._begun[index], True
        delta = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
        body = {
            **self._head.body("chat.completion.chunk"),
            "choices": [{"index": index, "delta": delta, **self._rest(piece)}],
        }
        if self._token_ids and first:
            body["prompt_token_ids"] = self._asks[index].prompt
        return body

    def empty(self) -> dict[str, Any]:
        return {**self._head.body("chat.completion.chunk"), "choices": []}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                **self._rest(piece),
            }
            for index, piece in enumerate(pieces)
        ]
        body = {**self._head.body("chat.completion"), "choices": choices}
        if self._prompt_logprobs:
            body["prompt_logprobs"] = self._spelling.prompt(pieces[0].prompt_logprobs)
        if self._token_ids:
            body["prompt_token_ids"] = self._asks[0].prompt
        return body

    def _rest(self, piece: Piece) -> dict[str, Any]:
        rest: dict[str, Any] = {
            "logprobs": self._spelling.chat(piece.logprobs) if self._logprobs else None,
            "finish_reason": piece.finish_reason or None,
            "stop_reason": piece.stop_reason,
        }
        if self._token_ids:
            rest["token_ids"] = piece.tokens
        return rest
