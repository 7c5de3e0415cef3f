"""Two ends of a port within this process, with the gRPC server that stream ports need."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import grpc
import torch

from infinillm.transport import Lanes, Port
from infinillm.transport.stream import options, plain

CPU = torch.device("cpu")


@contextlib.contextmanager
def serving(patience: float) -> Iterator[Lanes]:
    """Lanes with a gRPC server on loopback that carries their stream ports."""
    lanes = Lanes(host="127.0.0.1", patience=patience, device=CPU, dial=plain(patience))
    ready, over = threading.Event(), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server(options=options(patience))
        server.add_generic_rpc_handlers((lanes.service(),))
        lanes.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        ready.set()
        await stop.wait()
        await server.stop(None)

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()
        over.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    yield lanes
    loop.call_soon_threadsafe(stop.set)
    thread.join()


def join(node: Lanes, asker: Lanes, kind: str) -> tuple[Port, Port]:
    """Both ends of a new port."""
    listener = node.listen(kind)
    found: list[Port] = []
    accepting = threading.Thread(target=lambda: found.append(listener.accept(10.0)))
    accepting.start()
    port = asker.connect(listener.ticket)
    accepting.join()
    return port, found[0]
