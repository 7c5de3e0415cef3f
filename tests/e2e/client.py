"""A client of the gateway: requests that tell how they ended, and streams one can leave in the middle."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

PATIENCE = httpx.Timeout(60.0, connect=10.0)
LIMITS = httpx.Limits(max_connections=256, keepalive_expiry=1.0)  # seconds; well before the server hangs up


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended: its tokens so far and, where it failed, the HTTP status and OpenAI's error object."""

    id: str
    tokens: list[int]
    finish_reason: str = ""
    status: int = 200
    error: dict[str, Any] | None = None


def body(prompt: Sequence[int] | str, count: int, **more: Any) -> dict[str, Any]:
    """A greedy completion of exactly `count` tokens."""
    asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**asked, **more}


def complete(url: str, prompt: Sequence[int] | str, count: int, **more: Any) -> Ending:
    """One request, not streamed."""
    reply = httpx.post(f"{url}/v1/completions", json=body(prompt, count, **more), timeout=PATIENCE)
    return _whole(reply)


def _whole(reply: httpx.Response) -> Ending:
    said = reply.json()
    if reply.status_code != 200:
        return Ending("", [], status=reply.status_code, error=said["error"])
    (choice,) = said["choices"]
    return Ending(said["id"], choice["token_ids"], choice["finish_reason"])


class Stream:
    """The chunks of one streamed completion, and what they add up to."""

    def __init__(self, reply: httpx.Response):
        self.reply, self.id, self.tokens, self.finish_reason = reply, reply.headers.get("x-request-id", ""), [], ""
        self.error: dict[str, Any] | None = None
        self.logprobs: list[float] = []
        self.over = False

    tokens: list[int]

    def hear(self, line: str) -> None:
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.over = True
            return
        said = json.loads(line.removeprefix("data: "))
        if "error" in said:
            self.error = said["error"]
            return
        self.id = said["id"]
        for choice in said["choices"]:
            self.tokens += choice["token_ids"]
            self.logprobs += (choice["logprobs"] or {}).get("token_logprobs", ())
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    @property
    def ending(self) -> Ending:
        return Ending(self.id, self.tokens, self.finish_reason, self.reply.status_code, self.error)

    def read(self, count: int) -> None:
        """Until `count` tokens have come in all."""
        for line in self._lines:
            self.hear(line)
            if len(self.tokens) >= count:
                return
        raise AssertionError(f"the stream ended after {len(self.tokens)} of {count} tokens: {self.error}")

    def finish(self) -> Ending:
        for line in self._lines:
            self.hear(line)
        assert self.over, "the stream broke off"
        return self.ending

    @property
    def _lines(self) -> Iterator[str]:
        if not hasattr(self, "_iterator"):
            self._iterator = self.reply.iter_lines()
        return self._iterator

    _iterator: Iterator[str]


@contextmanager
def streaming(url: str, prompt: Sequence[int], count: int, **more: Any) -> Iterator[Stream]:
    """A stream; leaving the block hangs up."""
    with (
        httpx.Client(timeout=PATIENCE) as client,
        client.stream("POST", f"{url}/v1/completions", json=body(prompt, count, stream=True, **more)) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        yield Stream(reply)


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=LIMITS) as made:
        yield made


async def ask(http: httpx.AsyncClient, prompt: Sequence[int], count: int, **more: Any) -> Ending:
    """One request among others; streamed where `stream` says so."""
    if not more.get("stream"):
        return _whole(await http.post("/v1/completions", json=body(prompt, count, **more)))
    return await leave(http, prompt, count, after=None, **more)


async def leave(
    http: httpx.AsyncClient, prompt: Sequence[int], count: int, *, after: int | None, **more: Any
) -> Ending:
    """A stream that is hung up after so many tokens; None stays to the end."""
    async with http.stream("POST", "/v1/completions", json=body(prompt, count, **{**more, "stream": True})) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return _whole(reply)
        stream = Stream(reply)
        async for line in reply.aiter_lines():
            stream.hear(line)
            if after is not None and len(stream.tokens) >= after:
                return stream.ending
        assert stream.over, "the stream broke off"
        return stream.ending
