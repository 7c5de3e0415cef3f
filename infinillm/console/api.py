"""The gateway as the console sees it: a stream of text, a pool, a placement."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import httpx

from infinillm.errors import BadRequest, InfinillmError, NotFound, Unavailable, tree

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 300.0  # a long prompt is read before its first token
LOOK_SECONDS = 5.0
BY_STATUS = {error.http_status: error for error in reversed(tree())}

Message = dict[str, str]  # role, content


class Piece(NamedTuple):
    """What one event of a stream brought: the response's id, new text, and usage in the last."""

    id: str
    text: str
    usage: dict[str, Any] | None


class Api:
    """A gateway, by its URL. Raises our errors: the ones it answered with, or Unavailable."""

    def __init__(self, url: str):
        if not url.startswith(("http://", "https://")):
            raise BadRequest(f"--url must begin with http:// or https://, not {url!r}", field="url")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.client = httpx.AsyncClient(
            base_url=self.url, timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS)
        )

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.aclose()

    async def pool(self) -> dict[str, Any]:
        pool: dict[str, Any] = await self._get("/v1/pool")
        return pool

    async def placement(self, id: str) -> list[dict[str, Any]]:
        """Where the K/V of a response is, or was: one layout per choice."""
        found = await self._get(f"/v1/requests/{id}/placement")
        layouts = found.get("data") or found.get("choices") or [found] if isinstance(found, dict) else found
        return list(layouts)

    async def model(self) -> str:
        models = (await self._get("/v1/models"))["data"]
        return str(models[0]["id"])

    async def chat(
        self, messages: Sequence[Message], *, model: str, max_tokens: int, temperature: float
    ) -> AsyncIterator[Piece]:
        """The answer, piece by piece. Leaving the loop cancels the request."""
        body = {
            "model": model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                await self._check(answer)
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise InfinillmError(str(event["error"]["message"]))
                    text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                    yield Piece(str(event["id"]), text, event.get("usage"))
        except httpx.HTTPError as error:
            raise self._lost(error) from error

    async def measured(self, address: str, name: str) -> float:
        """The sum of one metric's series, as the process at `address` exports it."""
        text = (await self._look(f"http://{address}/metrics")).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + "{", name + " "))
        )

    async def _get(self, path: str) -> Any:
        return (await self._look(path)).json()

    async def _look(self, url: str) -> httpx.Response:
        try:
            answer = await self.client.get(url, timeout=LOOK_SECONDS)
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        await self._check(answer)
        return answer

    async def _check(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        raw = await answer.aread()
        try:
            message = str(json.loads(raw)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"{answer.request.url} answered {answer.status_code}"
        raise BY_STATUS.get(answer.status_code, NotFound if answer.status_code == 404 else InfinillmError)(message)

    def _lost(self, error: httpx.HTTPError) -> Unavailable:
        why = str(error) or type(error).__name__
        return Unavailable(
            f"no gateway answers at {self.url} ({why}); start one with `infinillm serve`, or name it with --url"
        )
