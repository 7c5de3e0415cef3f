"""Bodies of HTTP requests, read within their limits and checked against a model; protobuf messages as JSON."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from fastapi import Request
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from infinillm.errors import Cancelled
from infinillm.servers.openai_errors import Oversized, Slow, Unsupported, refusal

BODY_SECONDS = 60.0
DRAIN_SECONDS = 2.0  # of a body that is too large: a client still sending does not hear the answer
LARGE_BODY = 64 << 10  # bytes that are parsed apart from the event loop

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, kind: type[Body], most: int) -> Body:
    """The body of a request, at most `most` bytes. Raises BadRequest naming the parameter at fault."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Unsupported(f"the body must be sent as application/json, not {media or 'without a type'}")
    try:
        raw = await asyncio.wait_for(_raw(request, most), BODY_SECONDS)
    except ClientDisconnect:
        raise Cancelled("the client left before its request was complete") from None
    except asyncio.TimeoutError:
        raise Slow(f"the body did not arrive within {BODY_SECONDS:g} seconds") from None
    if len(raw) > LARGE_BODY:
        return await asyncio.to_thread(_parse, kind, raw)
    return _parse(kind, raw)


async def _raw(request: Request, most: int) -> bytes:
    stated = request.headers.get("content-length", "")
    too_large = Oversized(f"the body is larger than {most:,} bytes")
    if stated.isdigit() and int(stated) > most and request.headers.get("expect", "").lower() == "100-continue":
        raise too_large
    parts: list[bytes] = []
    size = 0
    stream = request.stream()
    async for part in stream:
        size += len(part)
        if size > most:
            parts.clear()
            await _drain(stream, most)
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _drain(stream: Any, most: int) -> None:
    """Read on for a moment and keep nothing: most clients finish sending, and then hear the answer."""

    async def away() -> None:
        size = 0
        async for part in stream:
            size += len(part)
            if size > most:
                return

    try:
        await asyncio.wait_for(away(), DRAIN_SECONDS)
    except asyncio.TimeoutError:
        pass


def _parse(kind: type[Body], raw: bytes) -> Body:
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error) from None


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of a body that `read` takes."""
    schema = kind.model_json_schema()
    for name, definition in schema.pop("$defs", {}).items():
        schema = _inlined(schema, f"#/$defs/{name}", definition)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inlined(schema: Any, name: str, definition: Any) -> Any:
    match schema:
        case {"$ref": found} if found == name:
            return definition
        case dict():
            return {key: _inlined(value, name, definition) for key, value in schema.items()}
        case list():
            return [_inlined(value, name, definition) for value in schema]
    return schema


def plain(message: Message) -> dict[str, Any]:
    """A protobuf message as JSON: all fields, by their names, numbers as numbers."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        nested = field.message_type is not None
        if field.is_repeated:
            found[field.name] = [plain(each) if nested else each for each in value]
        else:
            found[field.name] = plain(value) if nested else value
    return found
