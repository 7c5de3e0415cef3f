"""Failures in the shape of OpenAI's API: a message, a type, the parameter at fault and a code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from infinillm.errors import BadRequest, InfinillmError, NotFound, TooLong

RETRY_AFTER_SECONDS = 1
MOST_REASONS = 4  # of what is wrong with one parameter


class Oversized(BadRequest):
    """The body is larger than this server reads."""

    http_status = 413


class Unsupported(BadRequest):
    """The body is of a kind this server does not read."""

    http_status = 415


class Slow(BadRequest):
    """The body did not arrive in time."""

    http_status = 408


_TYPES = {404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}
_CODES = {429: "rate_limit_exceeded", 503: "service_unavailable", 504: "timeout", 413: "request_too_large"}


def reason(error: InfinillmError) -> str:
    """One word for the metric of refusals."""
    names = {TooLong: "too_long", NotFound: "not_found", Oversized: "oversized"}
    for kind, name in names.items():
        if isinstance(error, kind):
            return name
    if error.http_status < 429:
        return "bad_request"
    return {429: "overloaded", 503: "unavailable", 504: "timeout"}.get(error.http_status, "failed")


def body(error: InfinillmError) -> dict[str, Any]:
    status = error.http_status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = _CODES.get(status)
    if isinstance(error, TooLong):
        code = "context_length_exceeded"
    elif isinstance(error, NotFound):
        code = "model_not_found" if error.field == "model" else "not_found"
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": code}}


def headers(error: InfinillmError) -> dict[str, str]:
    return {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.retry else {}


def refusal(error: ValidationError) -> BadRequest:
    """What pydantic found wrong about the first parameter it names: of alternatives, the one that got furthest."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    name = max((p for each in found if (p := param(each["loc"])).startswith(param(first["loc"]))), key=len)
    if not name:
        return BadRequest("the body must be a JSON object")
    same = dict.fromkeys(_words(each["msg"]) for each in found if param(each["loc"]) == name)
    return BadRequest(f"{name}: {', or '.join(list(same)[:MOST_REASONS])}", field=name)


def _words(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]


def param(path: Sequence[int | str]) -> str:
    """`messages[0].content` for ("messages", 0, "Message", "content"): what is no field or index is pydantic's own."""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        elif step.isidentifier() and step.islower() and step not in {"str", "int", "float", "bool", "dict", "list"}:
            shown += f".{step}" if shown else step
    return shown
