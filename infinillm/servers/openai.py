"""OpenAI's HTTP API, with vLLM's extensions, over the generation core."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from infinillm import __version__
from infinillm.errors import BadRequest, InfinillmError, TooLong
from infinillm.servers.inference import Ask, Inference
from infinillm.servers.openai_bodies import documented, plain, read
from infinillm.servers.openai_edge import Edge, refuse
from infinillm.servers.openai_replies import ChatReply, CompletionReply, Head, Reply, Spelling, Usage
from infinillm.servers.openai_requests import Asked, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from infinillm.servers.openai_streams import Answers, EventStream, gathered
from infinillm.telemetry import CONTENT_TYPE, Metrics

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it; a chat goes on while there is room


class Api:
    """One method per route."""

    def __init__(self, inference: Inference, metrics: Metrics, *, max_body_bytes: int):
        self._inference, self._metrics, self._most = inference, metrics, max_body_bytes
        self._pool = inference.pool
        self._started = int(time.time())

    # --- generation ----------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Continue one prompt or several."""
        asked = await self._read(request, CompletionRequest)
        special = asked.add_special_tokens is not False
        prompts = [
            tuple(await self._inference.encode(prompt, special))
            if isinstance(prompt, str)
            else self._inference.check_tokens(prompt, "prompt")
            for prompt in asked.prompt
        ]
        echoed = [
            prompt if isinstance(prompt, str) else await self._inference.decode(prompt, skip_special=True)
            for prompt in (asked.prompt if asked.echo else ())
        ]
        scored = [asked.prompt_logprobs, asked.logprobs if asked.echo else None]
        fields = ("prompt", "max_tokens")
        head = self._head("cmpl")
        asks = self._asks(
            asked,
            head,
            prompts,
            [self._inference.room(len(prompt), asked.max_tokens, DEFAULT_TOKENS, fields) for prompt in prompts],
            elastic=asked.max_tokens is None,
            logprobs=asked.logprobs,
            prompt_logprobs=max((count for count in scored if count is not None), default=None),
        )
        n = asked.n or 1
        reply = CompletionReply(
            head,
            self._spelling(asked),
            asks,
            [echoed[i // n] for i in range(len(asks))] if asked.echo else None,
            logprobs=asked.logprobs is not None,
            prompt_logprobs=asked.prompt_logprobs is not None,
            token_ids=bool(asked.return_token_ids),
        )
        field = fields[asked.max_tokens is not None]
        return await self._answer(request, asked, asks, reply, head, sum(map(len, prompts)), field)

    async def chat(self, request: Request) -> Response:
        """The next turn of a conversation."""
        asked = await self._read(request, ChatRequest)
        prompt = tuple(await self._inference.chat([message.spoken() for message in asked.messages], **asked.template()))
        name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        wanted = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        head = self._head("chatcmpl")
        asks = self._asks(
            asked,
            head,
            [prompt],
            [self._inference.room(len(prompt), wanted, None, ("messages", name))],
            elastic=wanted is None,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            prompt_logprobs=asked.prompt_logprobs,
        )
        reply = ChatReply(
            head,
            self._spelling(asked),
            asks,
            logprobs=bool(asked.logprobs),
            prompt_logprobs=asked.prompt_logprobs is not None,
            token_ids=bool(asked.return_token_ids),
        )
        field = "messages" if wanted is None else name
        return await self._answer(request, asked, asks, reply, head, len(prompt), field)

    def _asks(
        self,
        asked: Asked,
        head: Head,
        prompts: Sequence[tuple[int, ...]],
        lengths: Sequence[int],
        *,
        elastic: bool,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> list[Ask]:
        """n sequences for each prompt, side by side."""
        n = asked.n or 1
        return [
            Ask(
                request=head.id,
                index=at * n + choice,
                prompt=prompt,
                sampling=asked.sampling(length, logprobs=logprobs, prompt_logprobs=prompt_logprobs, choice=choice),
                elastic=elastic,
                stop=asked.stops,
                include_stop=bool(asked.include_stop_str_in_output),
                skip_special=asked.skip_special_tokens is not False,
                cache_salt=asked.cache_salt or "",
            )
            for at, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            for choice in range(n)
        ]

    async def _answer(
        self,
        request: Request,
        asked: Asked,
        asks: Sequence[Ask],
        reply: Reply,
        head: Head,
        prompt_tokens: int,
        length_field: str,
    ) -> Response:
        usage, n, headers = Usage(prompt_tokens), asked.n or 1, {"X-Request-Id": head.id}
        answers = Answers(self._inference, asks)
        try:
            if not asked.stream:
                pieces = await gathered(request, answers, usage, len(asks), n)
                scored = any(piece.prompt_logprobs for piece in pieces)
                body = await asyncio.to_thread(reply.whole, pieces) if scored else reply.whole(pieces)
                return JSONResponse({**body, "usage": usage.body()}, headers=headers)
            stream = EventStream(
                answers,
                reply,
                usage,
                n=n,
                usage_last=asked.usage_wanted,
                usage_always=asked.usage_always,
                headers=headers,
            )
            try:
                await stream.prepare()
            except BaseException:
                await stream.leave()
                raise
            return stream
        except TooLong as error:
            error.field = error.field or length_field
            raise

    def _head(self, kind: str) -> Head:
        return Head(id=f"{kind}-{secrets.token_hex(16)}", created=int(time.time()), model=self._inference.model)

    def _spelling(self, asked: Asked) -> Spelling:
        return Spelling(self._inference.tokenizer, bool(asked.return_tokens_as_token_ids))

    async def _read(self, request: Request, kind: Any) -> Any:
        asked = await read(request, kind, self._most)
        self._inference.check_model(asked.model)
        if isinstance(asked, Asked):
            asked.check()
        return asked

    # --- tokens --------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a text, or of a conversation in the model's template."""
        asked: TokenizeRequest = await self._read(request, TokenizeRequest)
        if (asked.prompt is None) == (asked.messages is None):
            raise BadRequest("give either a prompt or messages", field="prompt")
        if asked.messages is not None:
            turn = asked.add_generation_prompt is not False
            tokens = await self._inference.chat([m.spoken() for m in asked.messages], add_generation_prompt=turn)
        else:
            assert asked.prompt is not None
            tokens = await self._inference.encode(asked.prompt, asked.add_special_tokens is not False)
        spelled = await self._inference.spell(tokens) if asked.return_token_strs else None
        longest = self._pool.capacity
        return JSONResponse({"count": len(tokens), "max_model_len": longest, "tokens": tokens, "token_strs": spelled})

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens, special ones spelled out."""
        asked: DetokenizeRequest = await self._read(request, DetokenizeRequest)
        tokens = self._inference.check_tokens(asked.tokens, "tokens")
        return JSONResponse({"prompt": await self._inference.decode(tokens, skip_special=False)})

    # --- what is there -------------------------------------------------------------------------------------------

    async def models(self) -> Response:
        """The model served; `max_model_len` is the longest request the pool could serve now, in tokens."""
        return JSONResponse({"object": "list", "data": [await self._card()]})

    async def model(self, name: str) -> Response:
        self._inference.check_model(name)
        return JSONResponse(await self._card())

    async def _card(self) -> dict[str, Any]:
        await self._pool.try_refresh()
        return {
            "id": self._inference.model,
            "object": "model",
            "created": self._started,
            "owned_by": "infinillm",
            "root": self._inference.model,
            "parent": None,
            "max_model_len": self._pool.capacity,
        }

    async def pool(self) -> Response:
        """The controller's ledger: nodes, loans and where sequences live."""
        return JSONResponse(plain(await self._pool.refresh()))

    async def placement(self, id: str) -> Response:
        """Which span of each sequence of a response is, or was when it ended, on which node."""
        found = await self._pool.placement(id)
        sequences = [{**plain(answer), "node": place.node, "address": place.address} for place, answer in found]
        return JSONResponse({"id": id, "object": "list", "data": sequences})

    async def health(self) -> Response:
        """The process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Requests can be served: the controller answers and a worker is there."""
        self._pool.check_ready()
        return JSONResponse({"status": "ready", "max_model_len": self._pool.capacity})

    async def version(self) -> Response:
        return JSONResponse({"version": __version__})

    async def metrics(self) -> Response:
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE)


def application(api: Api, metrics: Metrics) -> ASGIApp:
    """The routes of `api`, with failures in OpenAI's shape, and every answer counted."""
    app = FastAPI(title="infinillm", version=__version__, summary="A pool of K/V memory behind OpenAI's API.")
    for path, endpoint, body in (
        ("/v1/completions", api.completions, CompletionRequest),
        ("/v1/chat/completions", api.chat, ChatRequest),
        ("/tokenize", api.tokenize, TokenizeRequest),
        ("/detokenize", api.detokenize, DetokenizeRequest),
    ):
        app.add_api_route(path, endpoint, methods=["POST"], openapi_extra=documented(body))
    for path, show in (
        ("/v1/models", api.models),
        ("/v1/models/{name:path}", api.model),
        ("/v1/pool", api.pool),
        ("/v1/requests/{id}/placement", api.placement),
        ("/health", api.health),
        ("/ready", api.ready),
        ("/version", api.version),
        ("/metrics", api.metrics),
    ):
        app.add_api_route(path, show, methods=["GET"])

    for kind in (InfinillmError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, partial(refuse, metrics))
    return Edge(app, metrics)
