"""The gateway process: one generation core behind OpenAI's HTTP API and gRPC, from ready line to drain."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from infinillm import config, rpc
from infinillm.errors import BadRequest
from infinillm.model import files
from infinillm.model.tokenizer import Tokenizer
from infinillm.servers.inference import Inference
from infinillm.servers.inference_pool import Pool
from infinillm.servers.inference_service import INFERENCE, InferenceService
from infinillm.servers.openai import Api, application
from infinillm.servers.process import Told, ready, say
from infinillm.servers.request_log import RequestLog
from infinillm.telemetry import Metrics

DRAIN_SECONDS = 20.0  # streams have this long to finish once the process is told to end
READY_SECONDS = 0.5  # between two looks at whether the pool is ready
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that they close first


class Http(uvicorn.Server):
    """A uvicorn server that leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gateway:
    """Everything one gateway process owns, from `start` to `stop`."""

    def __init__(self, settings: config.Gateway):
        self.settings = settings
        self.metrics = Metrics("gateway")
        self.pool = Pool(settings.controller, settings.max_model_len)
        self.http_address = self.grpc_address = ""

    async def start(self) -> None:
        settings = self.settings
        self.requests = RequestLog(settings.request_log, time.monotonic)
        listening = _listen(settings.host, settings.port)
        cache = files.cache_folder(settings.cache_dir)
        path = await asyncio.to_thread(files.resolve, settings.model or None, cache, say)
        tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        model = settings.served_model_name or files.served_name(settings.model or None)
        self.inference = await asyncio.to_thread(Inference, tokenizer, self.pool, model, self.metrics, self.requests)
        api = Api(self.inference, self.metrics, max_body_bytes=settings.max_body_bytes)
        self.http = Http(
            uvicorn.Config(
                application(api, self.metrics),
                log_config=None,
                access_log=False,
                lifespan="off",
                http="h11",  # closes a connection on 64 KiB of headers; others read them without end
                ws="none",
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(DRAIN_SECONDS),
                server_header=False,
            )
        )
        self.serving = asyncio.create_task(self.http.serve([listening]))
        self.grpc = rpc.Server(
            settings.host,
            settings.grpc_port,
            [(INFERENCE, InferenceService(self.inference))],
            max_message=settings.max_body_bytes,
            public=True,
        )
        grpc_port = await self.grpc.start()
        self.pool.start()
        self.watching = asyncio.create_task(self._watch_ready())
        self.tasks = [self.serving, self.watching, self.pool.watching]
        while not self.http.started and not self.serving.done():
            await asyncio.sleep(0.01)
        self.http_address = _address(settings.host, listening.getsockname()[1])
        self.grpc_address = _address(settings.host, grpc_port)

    async def _watch_ready(self) -> None:
        while True:
            self.grpc.set_ready(self.pool.ready)
            await asyncio.sleep(READY_SECONDS)

    async def stop(self) -> None:
        """Drain: accept nothing new, let running streams finish within the grace, then cancel what is left."""
        self.watching.cancel()
        self.grpc.set_ready(False)
        self.http.should_exit = True
        await asyncio.gather(self.serving, self.grpc.stop(0.0 if self.http.force_exit else DRAIN_SECONDS))
        for task in (left := list(self.http.server_state.tasks)):
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self.pool.close()
        self.inference.close()
        self.requests.close()

    async def hurry(self) -> None:
        """Wait for nobody any more: what is left is cancelled."""
        self.http.force_exit = True
        await self.grpc.stop(0.0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only where it is: else tokens wait 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise BadRequest(f"cannot listen on {host}:{port}: {error.strerror}", field="port") from None
    listening.setblocking(False)
    return listening


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def run(settings: config.Gateway) -> None:
    """The process: ready line on stdout; SIGTERM and SIGINT drain and end it, a second one ends it at once."""
    gateway, told = Gateway(settings), Told()
    await gateway.start()
    ready("gateway", http=gateway.http_address, grpc=gateway.grpc_address)
    failure = await told.or_ended(gateway.tasks)
    stopping = asyncio.create_task(gateway.stop())
    hurried = asyncio.create_task(told.again.wait())
    await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        await gateway.hurry()
    hurried.cancel()
    await stopping
    if failure is not None:
        raise failure
