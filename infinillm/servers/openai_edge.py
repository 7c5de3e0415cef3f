"""The outermost layer of the HTTP API: every answer is counted, every failure has OpenAI's shape."""

from __future__ import annotations

import re

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infinillm.errors import BadRequest, Cancelled, InfinillmError, NotFound
from infinillm.servers import openai_errors as failures
from infinillm.telemetry import Metrics, log

LABEL = re.compile(rb"[\x21-\x7e]{1,128}")


async def refuse(metrics: Metrics, request: Request, error: Exception) -> Response:
    """The answer to a request that failed before it had one."""
    known = _known(error)
    status = known.http_status
    if not isinstance(known, Cancelled):
        metrics.add("refusals_total", reason=failures.reason(known))
        log("request_refused", route=request.url.path, status=status, field=known.field, reason=known.message)
    return JSONResponse(failures.body(known), status, failures.headers(known))


def _known(error: Exception) -> InfinillmError:
    match error:
        case InfinillmError():
            return error
        case HTTPException(status_code=404):
            return NotFound("there is no such route here; see /docs")
        case HTTPException():
            found = BadRequest(str(error.detail))
            found.http_status = error.status_code
            return found
        case RequestValidationError():
            first = error.errors()[0]
            return BadRequest(first["msg"], field=failures.param(first["loc"][1:]) or None)
    return InfinillmError(f"the gateway failed: {type(error).__name__}")


class Edge:
    """Counts every answer by route and status, and hands a client's X-Request-Id back as a label."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        label = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        said = 499  # the client left before there was an answer

        async def counted(message: Message) -> None:
            nonlocal said
            if message["type"] == "http.response.start":
                said = message["status"]
                if LABEL.fullmatch(label):
                    kept = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                    message = {**message, "headers": [*kept, (b"x-request-id", label)]}
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.add("http_requests_total", route=route, status=str(said))
