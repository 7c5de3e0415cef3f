"""gRPC services and clients straight from their descriptors: errors as statuses both ways, health, reflection.

A service is any object with one method per RPC, named as in the .proto: `async def Route(self, request, call)`, an
async generator where the response is a stream, an async iterator instead of `request` where the request is one. It
raises our errors; a client of ours raises the same class again, with its field. A request that is no protobuf is the
caller's mistake (INVALID_ARGUMENT), not ours. When a caller leaves, or its deadline passes, the method is cancelled,
and an async generator has been closed before the call is over.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from infinillm import errors
from infinillm.errors import BadRequest, Cancelled, InfinillmError, NodeLost, NotFound, Unavailable, Unreachable
from infinillm.telemetry import log

PUBLIC_MESSAGE_BYTES = 4 << 20
INTERNAL_MESSAGE_BYTES = 64 << 20
MOST_MESSAGE_CHARS = 2000  # a status travels in HTTP/2 trailers, which are limited to 8 KiB

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
LIVENESS, READINESS = "liveness", "readiness"

_ERROR, _FIELD = "infinillm-error", "infinillm-field-bin"  # trailing metadata
_BY_NAME = {error.__name__: error for error in errors.tree()}
_BY_STATUS = {error.grpc_status: error for error in reversed(errors.tree())}  # the parent wins over its children

# A peer that stopped (not died: a dead one is noticed at once) is noticed after time + ping timeout; without the latter
# gRPC waits a minute. Pings are answered beside the threads that compute: who is busy is not silent. A peer that
# restarts is found again within a second; an attempt to connect may take as long as the least backoff.
_SILENCE = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
_AMONG_US = tuple(zip(_SILENCE, (1000, 1500, 1500), strict=True))
_WITH_STRANGERS = tuple(zip(_SILENCE, (10000, 5000, 5000), strict=True))
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_AMONG_US,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
    ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
)
_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)

T = TypeVar("T")


# --- errors <-> statuses ------------------------------------------------------------------------------------------


def _trailers(error: InfinillmError) -> tuple[tuple[str, str | bytes], ...]:
    subject = error.node if isinstance(error, NodeLost) else error.field
    return ((_ERROR, type(error).__name__), (_FIELD, (subject or "").encode()))


def error_of(failed: Any, what: str) -> InfinillmError:
    """Our error for a failed call, `grpc.RpcError` of either kind of channel; `what` names the call."""
    code, details = failed.code(), failed.details() or ""
    trailers = dict(failed.trailing_metadata() or ())
    if (kind := _BY_NAME.get(str(trailers.get(_ERROR, "")))) is not None:
        raw = trailers.get(_FIELD, b"")
        subject = raw.decode() if isinstance(raw, bytes) else str(raw)
        return NodeLost(details, node=subject) if kind is NodeLost else kind(details, field=subject or None)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return BadRequest(f"{what}: {details}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(f"{what}: {details}")
    if code.name in _BY_STATUS:
        return _BY_STATUS[code.name](f"{what}: {details}")
    return InfinillmError(f"{what}: {code.name}: {details}")


async def _abort(call: Any, error: InfinillmError) -> NoReturn:
    message = error.message
    if len(message) > MOST_MESSAGE_CHARS:
        message = message[:MOST_MESSAGE_CHARS] + " ..."
    await call.abort(grpc.StatusCode[error.grpc_status], message, _trailers(error))
    raise AssertionError("abort returned")


# --- server -------------------------------------------------------------------------------------------------------


def _parse(kind: Callable[[], Message], raw: bytes) -> Message:
    message = kind()
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        name = message.DESCRIPTOR.name
        raise BadRequest(f"the request is not a {name} in protobuf: {error}", field=name) from None
    return message


async def _parsed(kind: Callable[[], Message], raws: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for raw in raws:
        yield _parse(kind, raw)


def _served(method: MethodDescriptor, behaviour: Callable[..., Any]) -> grpc.RpcMethodHandler:
    kind = GetMessageClass(method.input_type)
    name = f"{method.containing_service.name}.{method.name}"

    async def guarded(call: Any, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except InfinillmError as error:
            await _abort(call, error)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as defect:  # noqa: BLE001 a defect ends one call, not the server
            log("rpc_failed", method=name, error=repr(defect), trace=traceback.format_exc())
            await _abort(call, InfinillmError(f"{name} failed: {type(defect).__name__}: {defect}"))

    async def one(request: Any, call: Any) -> Any:
        asked = _parsed(kind, request) if method.client_streaming else _parse(kind, request)
        return await behaviour(asked, call)

    async def many(request: Any, call: Any) -> None:
        asked = _parsed(kind, request) if method.client_streaming else _parse(kind, request)
        async with aclosing(behaviour(asked, call)) as responses:
            async for response in responses:
                await call.write(response)

    async def respond(request: Any, call: Any) -> Any:
        return await guarded(call, one(request, call))

    async def stream(request: Any, call: Any) -> None:
        await guarded(call, many(request, call))

    serialise = GetMessageClass(method.output_type).SerializeToString
    if method.server_streaming and method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, None, serialise)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, None, serialise)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(respond, None, serialise)
    return grpc.unary_unary_rpc_method_handler(respond, None, serialise)


def offer(service: ServiceDescriptor, body: object) -> grpc.GenericRpcHandler:
    """What a grpc.aio server registers for one service; `body` has a method for every RPC."""
    return grpc.method_handlers_generic_handler(
        service.full_name, {method.name: _served(method, getattr(body, method.name)) for method in service.methods}
    )


class _Health:
    """grpc.health.v1: "liveness" serves from the start, every other name once the process is ready."""

    def __init__(self, names: Iterable[str]):
        self.serving = {"": False, READINESS: False, **dict.fromkeys(names, False), LIVENESS: True}
        self.closed = False
        self.changed = asyncio.Event()

    def set(self, ready: bool) -> None:
        self.serving = {name: ready or name == LIVENESS for name in self.serving}
        self._wake()

    def close(self) -> None:
        """Nothing serves any more, and nobody watches: a watcher would keep the server from stopping."""
        self.closed = True
        self.serving = dict.fromkeys(self.serving, False)
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def _answer(self, name: str) -> health_pb2.HealthCheckResponse:
        kinds = health_pb2.HealthCheckResponse
        if name not in self.serving:
            return kinds(status=kinds.SERVICE_UNKNOWN)
        return kinds(status=kinds.SERVING if self.serving[name] else kinds.NOT_SERVING)

    async def Check(self, request: health_pb2.HealthCheckRequest, call: Any) -> health_pb2.HealthCheckResponse:
        if request.service not in self.serving:
            raise NotFound(f"no service {request.service!r} here", field="service")
        return self._answer(request.service)

    async def List(self, request: health_pb2.HealthListRequest, call: Any) -> health_pb2.HealthListResponse:
        return health_pb2.HealthListResponse(statuses={name: self._answer(name) for name in self.serving})

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, call: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        said = None
        while True:
            changed, over = self.changed, self.closed
            if (answer := self._answer(request.service)) != said:
                yield answer
                said = answer
            if over:
                return
            await changed.wait()


class Server:
    """A grpc.aio server for some services, with health and reflection. A `public` one bears silent clients longer."""

    def __init__(
        self,
        host: str,
        port: int,
        services: Sequence[tuple[ServiceDescriptor, object]],
        extra_handlers: Sequence[grpc.GenericRpcHandler] = (),
        max_message: int = INTERNAL_MESSAGE_BYTES,
        public: bool = False,
    ):
        self.host, self.port = host, port
        options = [
            *_SERVER_OPTIONS,
            *(_WITH_STRANGERS if public else _AMONG_US),
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", max(max_message, INTERNAL_MESSAGE_BYTES)),
        ]
        self._server = grpc.aio.server(options=options)
        names = [service.full_name for service, _ in services]
        self._health = _Health(names)
        offered = [offer(service, body) for service, body in [*services, (HEALTH, self._health)]]
        self._server.add_generic_rpc_handlers((*offered, *extra_handlers))
        reflection.enable_server_reflection([*names, HEALTH.full_name, reflection.SERVICE_NAME], self._server)

    async def start(self) -> int:
        """Listen; returns the port, which is a free one where 0 was asked for. Raises BadRequest naming `port`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        try:
            self.port = self._server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError as error:
            raise BadRequest(f"cannot listen on {host}:{self.port}: {error}", field="port") from None
        await self._server.start()
        return self.port

    def set_ready(self, ready: bool) -> None:
        """What health says of the services; "liveness" is not concerned."""
        self._health.set(ready)

    async def stop(self, grace: float) -> None:
        """Take no more calls, give those in progress `grace` seconds, then cancel them."""
        self._health.close()
        await self._server.stop(grace)


# --- clients ------------------------------------------------------------------------------------------------------


def channel(address: str) -> grpc.aio.Channel:
    """A channel for `Client`; it connects when first used."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def blocking_channel(address: str) -> grpc.Channel:
    """A channel for `BlockingClient`; it connects when first used."""
    return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)


class Stream:
    """The responses of a call, in order. `cancel` leaves early, and so does dropping it. Raises our errors."""

    def __init__(self, call: Any, what: str):
        self._call, self._what, self._left = call, what, False
        self._responses = call.__aiter__()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._responses.__anext__()
        except grpc.RpcError as failed:
            raise error_of(failed, self._what) from None
        except asyncio.CancelledError:
            if self._left:
                raise Cancelled(f"{self._what}: left") from None
            raise

    def cancel(self) -> None:
        self._left = True
        self._call.cancel()

    def __del__(self) -> None:
        if not self._call.done():
            self._call.cancel()


class BlockingStream:
    """The responses of a call, in order, for a thread that may wait. `cancel` may come from any thread."""

    def __init__(self, call: Any, what: str):
        self._call, self._what = call, what

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._call)
        except grpc.RpcError as failed:
            raise error_of(failed, self._what) from None

    def cancel(self) -> None:
        self._call.cancel()


def _multicallable(any_channel: Any, method: MethodDescriptor) -> Any:
    asks, answers = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
    return getattr(any_channel, f"{asks}_{answers}")(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )


class Client:
    """One attribute per RPC: `await client.Route(request, timeout=2.0)`, `async for x in client.Generate(request)`.

    A single response takes a timeout in seconds, always; a stream may have one. Raises our errors.
    """

    def __init__(self, any_channel: grpc.aio.Channel, service: ServiceDescriptor):
        for method in service.methods:
            setattr(self, method.name, self._method(any_channel, method, f"{service.name}.{method.name}"))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the service has no method {name}")

    @staticmethod
    def _method(any_channel: grpc.aio.Channel, method: MethodDescriptor, what: str) -> Callable[..., Any]:
        start = _multicallable(any_channel, method)

        def begin(request: Any, timeout: float | None) -> Any:
            try:
                return start(request, timeout=timeout)
            except grpc.aio.UsageError as closed:
                raise Unavailable(f"{what}: {closed}") from None

        async def one(request: Any, *, timeout: float) -> Any:
            try:
                return await begin(request, timeout)
            except grpc.RpcError as failed:
                raise error_of(failed, what) from None

        def many(request: Any, *, timeout: float | None = None) -> Stream:
            return Stream(begin(request, timeout), what)

        return many if method.server_streaming else one


class BlockingClient:
    """Like Client, for threads: the calls wait."""

    def __init__(self, any_channel: grpc.Channel, service: ServiceDescriptor):
        for method in service.methods:
            setattr(self, method.name, self._method(any_channel, method, f"{service.name}.{method.name}"))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the service has no method {name}")

    @staticmethod
    def _method(any_channel: grpc.Channel, method: MethodDescriptor, what: str) -> Callable[..., Any]:
        start = _multicallable(any_channel, method)

        def begin(request: Any, timeout: float | None) -> Any:
            try:
                return start(request, timeout=timeout)
            except grpc.RpcError as failed:
                raise error_of(failed, what) from None
            except ValueError as closed:  # what grpc raises for a closed channel
                raise Unavailable(f"{what}: {closed}") from None

        def one(request: Any, *, timeout: float) -> Any:
            return begin(request, timeout)

        def many(request: Any, *, timeout: float | None = None) -> BlockingStream:
            return BlockingStream(begin(request, timeout), what)

        return many if method.server_streaming else one
