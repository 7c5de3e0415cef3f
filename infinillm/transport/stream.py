"""The port over gRPC: a bidirectional stream of bytes that works wherever our control plane does, TLS included.

The node's server (grpc.aio) carries a stream on its event loop, the asker's channel (blocking grpc) on one thread;
both only move bytes between the call and two queues. The token travels as metadata. The first message is the node's
"admitted".
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import torch

from infinillm.errors import PortClosed
from infinillm.transport.door import ADMITTED, Ticket, Waiting
from infinillm.transport.local import Queue, QueueWire
from infinillm.transport.port import BytePort

SERVICE, METHOD = "infinillm.v1.PortService", "Exchange"
TOKEN = "port-token-bin"
GRACE_SECONDS = 0.5


def options(patience: float) -> list[tuple[str, int]]:
    """Channel and server options under which a stopped peer is noticed within about the patience, not a minute."""
    ms = max(1, int(patience * 1000))
    return [
        ("grpc.keepalive_time_ms", ms),
        ("grpc.keepalive_timeout_ms", ms),
        ("grpc.http2.ping_timeout_ms", ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", ms),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", ms // 2),
    ]


def plain(patience: float) -> Callable[[str], grpc.Channel]:
    """How to reach an address without TLS."""
    return lambda address: grpc.insecure_channel(address, options(patience))


def connect(ticket: Ticket, dial: Callable[[str], grpc.Channel], *, patience: float, device: torch.device) -> BytePort:
    """The asker's end. Raises PortClosed where the node does not admit us."""
    news = threading.Condition()
    out, into = Queue(news), Queue(news)
    channel = dial(ticket.address)
    call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(_spoken(out), metadata=((TOKEN, ticket.token),))
    listening = threading.Thread(target=_listen, args=(call, out, into), name="port-stream", daemon=True)
    listening.start()

    def freed() -> None:
        listening.join(GRACE_SECONDS)  # what was sent last is still under way
        call.cancel()
        listening.join()
        channel.close()

    wire = QueueWire(out, into, patience=patience, freed=freed)
    greeting = ctypes.create_string_buffer(len(ADMITTED))
    try:
        wire.read([(ctypes.addressof(greeting), len(ADMITTED))], True)
    except (OSError, EOFError) as lost:
        wire.end()
        freed()
        raise PortClosed(f"no stream port waits at {ticket.address}: {lost}") from lost
    return BytePort("stream", wire, device)


def service(
    claim: Callable[[bytes], Waiting | None], *, patience: float, device: torch.device
) -> grpc.GenericRpcHandler:
    """The handler a grpc.aio server registers; `claim` finds the offer a token belongs to."""

    async def exchange(_: object, call: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        token = dict(call.invocation_metadata() or ()).get(TOKEN, b"")
        waiting = claim(token if isinstance(token, bytes) else token.encode())
        if waiting is None:
            await call.abort(grpc.StatusCode.PERMISSION_DENIED, "no port waits for this token")
            return
        loop = asyncio.get_running_loop()
        news, to_say, room = threading.Condition(), asyncio.Event(), asyncio.Event()
        out, into = Queue(news), Queue(news)

        def moved() -> None:
            with contextlib.suppress(RuntimeError):  # the server, and its loop, may be gone before the port
                loop.call_soon_threadsafe(to_say.set)
                loop.call_soon_threadsafe(room.set)

        wire = QueueWire(out, into, patience=patience, moved=moved)
        await call.write(ADMITTED)
        waiting.bring(BytePort("stream", wire, device))
        lanes = {asyncio.create_task(_speak(call, out, to_say)), asyncio.create_task(_hear(call, into, room))}
        try:
            await asyncio.wait(lanes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            out.end("the peer is gone")
            into.end("the peer is gone")
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    method = grpc.stream_stream_rpc_method_handler(exchange)
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})


async def _speak(call: grpc.aio.ServicerContext[bytes, bytes], out: Queue, to_say: asyncio.Event) -> None:
    while True:
        to_say.clear()
        if chunk := out.pop():
            await call.write(chunk)
        elif out.ended:
            return
        else:
            await to_say.wait()


async def _hear(call: grpc.aio.ServicerContext[bytes, bytes], into: Queue, room: asyncio.Event) -> None:
    while True:
        room.clear()
        if not into.roomy():
            await room.wait()
        elif (said := await call.read()) is not grpc.aio.EOF:
            into.put(said)
        else:
            return


def _spoken(out: Queue) -> Iterator[bytes]:
    while chunk := out.next():
        yield chunk


def _listen(call: Any, out: Queue, into: Queue) -> None:
    reason = "the peer closed it"
    try:
        for said in call:
            into.put(said)
            into.wait_for_room()
    except grpc.RpcError:
        reason = f"{call.code().name}: {call.details()}"
    out.end(reason)
    into.end(reason)
