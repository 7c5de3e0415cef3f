"""Pieces of text as server-sent events, or gathered into one response, for as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from infinillm.errors import Cancelled, InfinillmError
from infinillm.servers import openai_errors as failures
from infinillm.servers.inference import Ask, Inference, Piece, joined
from infinillm.servers.openai_replies import Reply, Usage
from infinillm.telemetry import log

EARLY_SECONDS = 0.5  # a refusal within this time still has its own HTTP status
PING_SECONDS = 10.0  # a comment, while a long prompt is computed, keeps proxies from hanging up
QUEUED_PIECES = 64  # of one request, for a client that reads slowly
NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Answers:
    """The pieces of several sequences, as they come; `close` cancels what still runs.

    Each sequence has a task of its own that waits while the reader is behind, so a slow client holds up nobody else.
    """

    def __init__(self, inference: Inference, asks: Sequence[Ask]):
        self._queue: asyncio.Queue[tuple[int, Piece | None, Exception | None]] = asyncio.Queue(QUEUED_PIECES)
        self._tasks = [asyncio.create_task(self._pump(inference, ask)) for ask in asks]
        self._left = len(self._tasks)

    async def _pump(self, inference: Inference, ask: Ask) -> None:
        try:
            async with aclosing(inference.generate(ask)) as pieces:
                async for piece in pieces:
                    await self._queue.put((ask.index, piece, None))
        except Exception as error:  # noqa: BLE001  the reader raises it
            await self._queue.put((ask.index, None, error))
        else:
            await self._queue.put((ask.index, None, None))

    async def next(self) -> tuple[int, Piece] | None:
        """The next piece and the index of its sequence; None at the end. Raises what a sequence failed with."""
        while self._left:
            index, piece, error = await self._queue.get()
            if error is not None:
                raise error
            if piece is not None:
                return index, piece
            self._left -= 1
        return None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def gathered(request: Request, answers: Answers, usage: Usage, choices: int, n: int) -> list[Piece]:
    """Every choice as one piece. Raises Cancelled where the client leaves first."""
    pieces: list[list[Piece]] = [[] for _ in range(choices)]

    async def gather() -> None:
        while (said := await answers.next()) is not None:
            index, piece = said
            usage.count(index, piece, n)
            pieces[index].append(piece)

    work, gone = asyncio.ensure_future(gather()), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Cancelled("the client left")
        work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        await answers.close()
    return [joined(each) for each in pieces]


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """The chunks of a reply as they come. Whatever way it ends, what still runs for it is cancelled."""

    def __init__(
        self,
        answers: Answers,
        reply: Reply,
        usage: Usage,
        *,
        n: int,
        usage_last: bool,
        usage_always: bool,
        headers: Mapping[str, str],
    ):
        super().__init__(self._events(), media_type="text/event-stream", headers={**NO_BUFFERING, **headers})
        self._answers, self._reply, self._usage, self._n = answers, reply, usage, n
        self._usage_last, self._usage_always = usage_last, usage_always
        self._first = asyncio.ensure_future(answers.next())

    async def prepare(self) -> None:
        """Wait a moment for the first piece. Raises what a request refused at once was refused with."""
        await asyncio.wait({self._first}, timeout=EARLY_SECONDS)
        if self._first.done():
            self._first.result()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.leave()

    async def leave(self) -> None:
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        await self._answers.close()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            while not (await asyncio.wait({self._first}, timeout=PING_SECONDS))[0]:
                yield b": waiting\n\n"
            said = self._first.result()
            while said is not None:
                index, piece = said
                self._usage.count(index, piece, self._n)
                if self._reply.shows(piece):
                    chunk = partial(self._reply.chunk, index, piece)
                    yield self._event(await asyncio.to_thread(chunk) if piece.prompt_logprobs else chunk())
                said = await self._answers.next()
            if self._usage_last:
                yield _data({**self._reply.empty(), "usage": self._usage.body()})
        except InfinillmError as error:
            log("stream_failed", reason=error.message)
            yield _data(failures.body(error))
        except Exception as defect:  # noqa: BLE001  the status is sent; this is the only way left to say it
            log("stream_failed", reason=repr(defect))
            yield _data(failures.body(InfinillmError(f"the gateway failed: {type(defect).__name__}")))
        yield b"data: [DONE]\n\n"

    def _event(self, chunk: dict[str, Any]) -> bytes:
        if self._usage_last or self._usage_always:
            chunk["usage"] = self._usage.body() if self._usage_always else None
        return _data(chunk)


def _data(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
