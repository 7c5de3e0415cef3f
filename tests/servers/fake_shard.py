"""A controller and workers without a model, and a gateway in front of them: real servers, tokens known beforehand."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from infinillm import config, rpc
from infinillm.errors import InfinillmError, NotFound, TooLong, Unavailable
from infinillm.protos import controller_pb2, shard_pb2, types_pb2
from infinillm.servers.controllers import CONTROLLER
from infinillm.servers.gateway import Gateway
from infinillm.servers.inference_pool import SHARD
from tests import tiny

LOCALHOST = "127.0.0.1"
WAIT_SECONDS = 10.0
MODEL = "tiny-talker"
EPOCH = 7
TEXT = "The pool remembers, the ledger decides. 日本語 and 🦊 are whole."
T = TypeVar("T")


def encode(text: str) -> list[int]:
    return tiny.tokenizer().encode(text, add_special_tokens=False)


def logprob(token: int, place: int) -> float:
    """What the fake claims of a token, so that a test can claim the same."""
    return -0.25 - place - (token % 5) / 8


def _scored(token: int, count: int, size: int) -> types_pb2.TokenLogprob:
    top = [(token + i) % size for i in range(count)]
    return types_pb2.TokenLogprob(
        token=token,
        logprob=logprob(token, 0),
        top_tokens=top,
        top_logprobs=[logprob(each, i) for i, each in enumerate(top)],
    )


class FakeShard:
    """Says `script(prompt)`, token by token, but what exists already, then the end token; keeps what it was asked."""

    def __init__(self, id: str):
        self.id, self.address = id, ""
        self.placements = 0  # asked for
        self.eos = tiny.tokenizer().eos_token_id
        self.size = len(tiny.tokenizer())
        self.asked: list[shard_pb2.ShardGenerateRequest] = []
        self.ended: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        self.script: Callable[[list[int]], list[int]] = lambda prompt: encode(TEXT)
        self.hold_after: int | None = None  # tokens, then wait until `release` is set
        self.release = asyncio.Event()
        self.move_after: int | None = None  # tokens, then hand over
        self.leave_after: int | None = None  # tokens, then say so, and wait until `release` is set
        self.meeting: InfinillmError | None = None  # why it meets nobody
        self.met: list[str] = []
        self.passed: set[str] = set()  # what another worker is ready to go on with
        self.fail_after: int | None = None  # tokens, then fail with `failure`
        self.failure: InfinillmError = Unavailable("the worker is gone")
        self.batch = 1  # tokens in one message
        self.cached = 0
        self.asked.clear()
        self.ended.clear()

    async def Generate(self, request: Any, call: Any) -> AsyncIterator[shard_pb2.ShardGenerateResponse]:
        self.asked.append(request)
        self.ended[request.id] = "running"
        try:
            async for response in self._answer(request):
                yield response
            self.ended[request.id] = "finished"
        except InfinillmError:
            self.ended[request.id] = "failed"
            raise
        finally:
            if self.ended.get(request.id) == "running":
                self.ended[request.id] = "cancelled"

    async def _answer(self, request: Any) -> AsyncIterator[shard_pb2.ShardGenerateResponse]:
        sampling, prompt = request.sampling, list(request.prompt)
        if self.fail_after == 0:
            raise self.failure
        if self.hold_after == 0:
            await self.release.wait()
        scored = []
        if sampling.HasField("prompt_logprobs"):
            scored = [_scored(token, sampling.prompt_logprobs, self.size) for token in prompt[1:]]
        if not sampling.max_tokens:
            yield shard_pb2.ShardGenerateResponse(prompt_logprobs=scored, finish_reason="length")
            return
        said = len(request.already)
        tokens = [*self.script(prompt), self.eos]
        while said < len(tokens):
            part: list[int] = []
            reason, stop = "", 0
            while len(part) < self.batch and not reason:
                part.append(token := tokens[said])
                said += 1
                stops = token in sampling.stop_token_ids or (token in request.eos_ids and not sampling.ignore_eos)
                if stops and said >= sampling.min_tokens:
                    reason, stop = "stop", token
                elif said >= sampling.max_tokens or said == len(tokens):
                    reason = "length"
            yield shard_pb2.ShardGenerateResponse(
                tokens=part,
                logprobs=[_scored(t, sampling.logprobs, self.size) for t in part]
                if sampling.HasField("logprobs")
                else [],
                prompt_logprobs=scored,
                finish_reason=reason,
                stop_token=stop,
                cached_tokens=self.cached,
            )
            scored = []
            if reason:
                return
            if said == self.leave_after:
                yield shard_pb2.ShardGenerateResponse(leaving=True)
                await self.release.wait()
            if request.id in self.passed:
                yield shard_pb2.ShardGenerateResponse(finish_reason="moved")
                return
            if self.move_after is not None and said >= self.move_after:
                yield shard_pb2.ShardGenerateResponse(finish_reason="moved")
                return
            if self.fail_after is not None and said >= self.fail_after:
                raise self.failure
            if self.hold_after is not None and said >= self.hold_after:
                await self.release.wait()

    async def Meet(self, request: Any, call: Any) -> shard_pb2.MeetResponse:
        self.met += [each.node for each in request.nodes]
        if self.meeting is not None:
            raise self.meeting
        return shard_pb2.MeetResponse()

    async def HandOver(self, request: Any, call: Any) -> shard_pb2.HandOverResponse:
        self.passed.add(request.id)
        self.release.set()
        return shard_pb2.HandOverResponse()

    async def Placement(self, request: Any, call: Any) -> shard_pb2.PlacementResponse:
        self.placements += 1
        if request.id not in self.ended:
            raise NotFound("no such request", field="id")
        spans = [types_pb2.Span(node=self.id, start=0, stop=16), types_pb2.Span(node="other", start=16, stop=20)]
        return shard_pb2.PlacementResponse(id=request.id, state="running", tokens=20, block_size=16, spans=spans)


class FakeController:
    """Sends requests to the shards in turn."""

    def __init__(self, shards: list[FakeShard]):
        self.shards = shards
        self.reset()

    def reset(self) -> None:
        self.max_tokens, self.max_position = 500, 1000
        self.routed: list[controller_pb2.RouteRequest] = []
        self.refusal: InfinillmError | None = None
        self.once = False  # refuses one request, and no more
        self.serves = True
        self.settling = False  # has just begun to lead, and knows nobody yet
        self.tells = True  # how long a request the worker it names could hold
        self.turn = 0

    async def Route(self, request: Any, call: Any) -> controller_pb2.RouteResponse:
        self.routed.append(request)
        if self.refusal is not None:
            refusal, self.refusal = self.refusal, None if self.once else self.refusal
            raise refusal
        if request.longest_tokens > self.max_tokens:
            raise TooLong(f"the request needs {request.longest_tokens} tokens; the pool holds {self.max_tokens}")
        left = [shard for shard in self.shards if shard.id not in request.exclude]
        if not left or not self.serves:
            raise Unavailable("no worker is ready to serve")
        self.turn += 1
        shard = left[self.turn % len(left)]
        reach = self.max_tokens if self.tells else 0
        return controller_pb2.RouteResponse(node=shard.id, address=shard.address, max_tokens=reach, epoch=EPOCH)

    async def Snapshot(self, request: Any, call: Any) -> controller_pb2.SnapshotResponse:
        shape = types_pb2.AttentionShape(
            heads=1, kv_heads=1, head_dim=1, block_size=16, dtype="float32", scale=1.0, windows=[0]
        )
        nodes = [
            types_pb2.Node(
                id=shard.id,
                incarnation="1",
                address=shard.address,
                blocks=40,
                lendable=30,
                serves=self.serves,
                tier="device",
            )
            for shard in self.shards
            if not self.settling
        ]
        return controller_pb2.SnapshotResponse(
            settling=self.settling,
            epoch=EPOCH,
            policy="pooled",
            model=controller_pb2.Model(name=MODEL, shape=shape, max_position=self.max_position),
            max_tokens=self.max_tokens,
            nodes=nodes,
        )

    async def Join(self, request: Any, call: Any) -> Any:
        raise Unavailable("nobody joins a fake")

    Heartbeat = Leave = Creditors = Join


def settings(folder: Path, controller: str, **changed: Any) -> config.Gateway:
    given = {"port": 0, "grpc_port": 0, "served_model_name": MODEL, "max_body_bytes": 1 << 20, **changed}
    return config.Gateway(model=str(folder), controller=controller, **given)


@dataclass(slots=True, eq=False)
class Site:
    """Fakes and gateway in an event loop of their own thread, so that tests use ordinary clients."""

    folder: Path
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    thread: threading.Thread = field(init=False)
    shards: list[FakeShard] = field(init=False)
    controller: FakeController = field(init=False)
    gateway: Gateway = field(init=False)
    servers: list[rpc.Server] = field(default_factory=list)
    controller_address: str = ""
    http: httpx.Client = field(init=False)

    def __enter__(self) -> Site:
        self.thread = threading.Thread(target=self.loop.run_forever, name="site")
        self.thread.start()
        self.call(self._start())
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_SECONDS)
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()
        self.call(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT_SECONDS)
        self.loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_SECONDS)

    async def _start(self) -> None:
        self.shards = [FakeShard("worker-0"), FakeShard("worker-1")]
        self.controller = FakeController(self.shards)
        for shard in self.shards:
            shard.address = await self.serve([(SHARD, shard)])
        self.controller_address = await self.serve([(CONTROLLER, self.controller)])
        self.gateway = Gateway(settings(self.folder, self.controller_address))
        await self.gateway.start()
        await self.gateway.pool.refresh()

    async def serve(self, services: list[tuple[Any, object]], port: int = 0) -> str:
        server = rpc.Server(LOCALHOST, port, services)
        self.servers.append(server)
        return f"{LOCALHOST}:{await server.start()}"

    async def _stop(self) -> None:
        for shard in self.shards:
            shard.release.set()
        await self.gateway.stop()
        for server in self.servers:
            await server.stop(0.1)

    def reset(self) -> None:
        self.call(self._reset())

    async def _reset(self) -> None:
        for shard in self.shards:
            shard.release.set()
            shard.reset()
        self.controller.reset()
        await self.gateway.pool.refresh()

    def change(self, **changed: Any) -> None:
        """Set attributes of all shards, between two steps of the loop."""
        self.call(self._change(changed))

    async def _change(self, changed: dict[str, Any]) -> None:
        for shard in self.shards:
            for name, value in changed.items():
                setattr(shard, name, value)

    def release(self) -> None:
        self.loop.call_soon_threadsafe(lambda: [shard.release.set() for shard in self.shards])

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for something the loop does soon."""
        self.call(self._until(true))

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await asyncio.sleep(0.002)

    @property
    def url(self) -> str:
        return f"http://{self.gateway.http_address}"

    @property
    def ended(self) -> dict[str, str]:
        return {id: how for shard in self.shards for id, how in shard.ended.items()}

    @property
    def asked(self) -> list[Any]:
        return [request for shard in self.shards for request in shard.asked]


@contextmanager
def unreachable(shard: FakeShard) -> Iterator[None]:
    """What is told of this shard is an address at which nobody listens."""
    with socket.socket() as nobody:
        nobody.bind((LOCALHOST, 0))
        there, shard.address = shard.address, f"{LOCALHOST}:{nobody.getsockname()[1]}"
        try:
            yield
        finally:
            shard.address = there


def sites(folder: Path) -> Iterator[Site]:
    """The body of a fixture: one site for a file of tests."""
    tiny.tokenizer().save_pretrained(folder)
    with Site(folder) as site:
        yield site
