"""rpc.py over real sockets on loopback: errors both ways, malformed bytes, leaving, deadlines, health, reflection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from infinillm import errors, rpc
from infinillm.protos import controller_pb2, pool_pb2, shard_pb2

CONTROLLER = controller_pb2.DESCRIPTOR.services_by_name["ControllerService"]
SHARD = shard_pb2.DESCRIPTOR.services_by_name["ShardService"]
POOL = pool_pb2.DESCRIPTOR.services_by_name["PoolService"]
SOON = 10.0
KINDS = [kind for kind in errors.tree() if kind is not errors.NodeLost]


def refusal(kind: type[errors.InfinillmError]) -> errors.InfinillmError:
    return kind(f"a {kind.__name__} with ümläuts", field="max_tokens")


class Controller:
    """Answers a Route by its model's name."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    async def Route(self, request: controller_pb2.RouteRequest, call: Any) -> controller_pb2.RouteResponse:
        match request.model:
            case "lost":
                raise errors.NodeLost("it is gone", node="worker-1")
            case "defect":
                raise ZeroDivisionError("by zero")
            case "long":
                raise errors.BadRequest("x" * 100_000, field="model")
            case "slow":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case name if name in vars(errors):
                raise refusal(getattr(errors, name))
        return controller_pb2.RouteResponse(node=f"for {request.model}")

    async def Join(self, request: Any, call: Any) -> Any:
        raise AssertionError("not called")

    Heartbeat = Leave = Creditors = Snapshot = Join


class Shard:
    """Streams tokens for ever, or as many as the prompt says, or fails after one."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def Generate(
        self, request: shard_pb2.ShardGenerateRequest, call: Any
    ) -> AsyncIterator[shard_pb2.ShardGenerateResponse]:
        try:
            if request.id == "refused":
                raise errors.TooLong("too long", field="prompt")
            for token in request.prompt:
                yield shard_pb2.ShardGenerateResponse(tokens=[token])
            if request.id == "fails":
                raise errors.NodeLost("gone in the middle", node="worker-2")
            if request.id == "endless":
                while True:
                    yield shard_pb2.ShardGenerateResponse(tokens=[0] * 1000)
            if request.id == "idle":
                await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def Placement(self, request: Any, call: Any) -> Any:
        raise AssertionError("not called")

    Meet = HandOver = Placement


class Pool:
    """Echoes what a borrower says."""

    async def Converse(self, requests: Any, call: Any) -> AsyncIterator[pool_pb2.ConverseResponse]:
        async for request in requests:
            if request.release.sequence == "refuse":
                raise errors.Stale("superseded")
            yield pool_pb2.ConverseResponse(open=request.release.sequence)

    async def Lend(self, request: Any, call: Any) -> Any:
        raise AssertionError("not called")

    Return = OpenPort = Describe = Lend


class World:
    """One server with the three services, and the address it listens on."""

    def __init__(self) -> None:
        self.controller, self.shard = Controller(), Shard()
        services = [(CONTROLLER, self.controller), (SHARD, self.shard), (POOL, Pool())]
        self.server = rpc.Server("127.0.0.1", 0, services, max_message=1 << 20)
        self.address = ""


def serving(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        world.address = f"127.0.0.1:{await world.server.start()}"
        try:
            await test(world)
        finally:
            await world.server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 30))


def route(model: str) -> controller_pb2.RouteRequest:
    return controller_pb2.RouteRequest(model=model)


def test_every_error_arrives_as_itself() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            client = rpc.Client(channel, CONTROLLER)
            for kind in KINDS:
                with pytest.raises(errors.InfinillmError) as caught:
                    await client.Route(route(kind.__name__), timeout=SOON)
                assert type(caught.value) is kind
                assert (caught.value.message, caught.value.field) == (refusal(kind).message, "max_tokens")
            with pytest.raises(errors.NodeLost) as lost:
                await client.Route(route("lost"), timeout=SOON)
            assert (lost.value.message, lost.value.node) == ("it is gone", "worker-1")
            assert (await client.Route(route("me"), timeout=SOON)).node == "for me"

    serving(test)


@pytest.mark.parametrize("kind", errors.tree())
def test_every_error_has_its_status_for_foreign_clients(kind: type[errors.InfinillmError]) -> None:
    name = "lost" if kind is errors.NodeLost else kind.__name__

    async def test(world: World) -> None:
        async with grpc.aio.insecure_channel(world.address) as channel:
            call = channel.unary_unary(
                "/infinillm.v1.ControllerService/Route",
                request_serializer=controller_pb2.RouteRequest.SerializeToString,
                response_deserializer=controller_pb2.RouteResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(route(name), timeout=SOON)
            assert caught.value.code().name == kind.grpc_status

    serving(test)


def test_a_defect_is_internal_and_the_next_call_works(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            client = rpc.Client(channel, CONTROLLER)
            with pytest.raises(errors.InfinillmError, match="ZeroDivisionError: by zero") as caught:
                await client.Route(route("defect"), timeout=SOON)
            assert type(caught.value) is errors.InfinillmError
            assert (await client.Route(route("me"), timeout=SOON)).node == "for me"

    serving(test)


def test_a_very_long_message_is_cut_and_keeps_its_kind() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            with pytest.raises(errors.BadRequest, match=r"xxx \.\.\.$") as caught:
                await rpc.Client(channel, CONTROLLER).Route(route("long"), timeout=SOON)
            assert caught.value.field == "model"

    serving(test)


@pytest.mark.parametrize(
    "method", ["ControllerService/Route", "ShardService/Generate", "PoolService/Converse", "PoolService/Lend"]
)
def test_malformed_protobuf_is_the_callers_mistake(method: str) -> None:
    async def test(world: World) -> None:
        async with grpc.aio.insecure_channel(world.address) as channel:
            call = channel.stream_stream(f"/infinillm.v1.{method}")(iter([b"\xff\xff\xff"]), timeout=SOON)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "Request" in caught.value.details()

    serving(test)


def test_an_oversized_message_is_refused_and_an_unknown_method_unimplemented() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            client = rpc.Client(channel, CONTROLLER)
            with pytest.raises(errors.BadRequest, match="larger than max"):
                await client.Route(route("x" * (2 << 20)), timeout=SOON)
            assert (await client.Route(route("me"), timeout=SOON)).node == "for me"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/infinillm.v1.ControllerService/Steal")(b"", timeout=SOON)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    serving(test)


def test_a_deadline_cancels_the_method() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            with pytest.raises(errors.DeadlineExceeded):
                await rpc.Client(channel, CONTROLLER).Route(route("slow"), timeout=0.05)
            await asyncio.wait_for(world.controller.cancelled.wait(), SOON)

    serving(test)


def test_a_timeout_is_mandatory_for_one_response() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            with pytest.raises(TypeError, match="timeout"):
                await rpc.Client(channel, CONTROLLER).Route(route("me"))

    serving(test)


async def read(responses: rpc.Stream) -> None:
    async for _ in responses:
        pass


@pytest.mark.parametrize("leave", ["cancel", "task", "drop"])
@pytest.mark.parametrize("stream", ["idle", "endless"])
def test_a_caller_that_leaves_closes_the_generator(leave: str, stream: str) -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            request = shard_pb2.ShardGenerateRequest(id=stream, prompt=[7])
            responses = rpc.Client(channel, SHARD).Generate(request)
            assert list((await anext(responses)).tokens) == [7]
            if leave == "cancel":
                responses.cancel()
                with pytest.raises(errors.Cancelled):
                    await read(responses)
            elif leave == "task":
                task = asyncio.create_task(read(responses))
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()
            else:
                del responses
            await asyncio.wait_for(world.shard.closed.wait(), SOON)

    serving(test)


def test_a_stream_ends_or_fails_where_it_should() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            client = rpc.Client(channel, SHARD)
            for name, failure in (("ends", None), ("fails", errors.NodeLost), ("refused", errors.TooLong)):
                got: list[int] = []
                raised = None
                try:
                    async for response in client.Generate(shard_pb2.ShardGenerateRequest(id=name, prompt=[1, 2, 3])):
                        got.extend(response.tokens)
                except errors.InfinillmError as error:
                    raised = type(error)
                assert raised is failure
                assert got == ([] if name == "refused" else [1, 2, 3])

    serving(test)


def test_an_absent_server_is_unavailable_and_found_again_when_it_comes_back() -> None:
    async def test(world: World) -> None:
        async with rpc.channel(world.address) as channel:
            client = rpc.Client(channel, CONTROLLER)
            assert (await client.Route(route("me"), timeout=SOON)).node == "for me"
            await world.server.stop(0)
            with pytest.raises(errors.Unavailable, match=r"ControllerService\.Route"):
                await client.Route(route("me"), timeout=SOON)
            port = int(world.address.rpartition(":")[2])
            world.server = rpc.Server("127.0.0.1", port, [(CONTROLLER, world.controller)])
            assert await world.server.start() == port
            loop = asyncio.get_running_loop()
            until = loop.time() + SOON
            while True:
                try:
                    reply = await client.Route(route("me"), timeout=SOON)
                    break
                except errors.Unavailable:
                    assert loop.time() < until
            assert reply.node == "for me"
        with pytest.raises(errors.Unavailable, match="closed"):
            await client.Route(route("me"), timeout=SOON)

    serving(test)


def test_a_taken_port_is_refused_by_name() -> None:
    async def test(world: World) -> None:
        port = int(world.address.rpartition(":")[2])
        with pytest.raises(errors.BadRequest, match=str(port)) as caught:
            await rpc.Server("127.0.0.1", port, [(CONTROLLER, Controller())]).start()
        assert caught.value.field == "port"

    serving(test)


def test_a_service_without_one_of_its_methods_is_refused_at_once() -> None:
    async def test(world: World) -> None:
        with pytest.raises(AttributeError, match="Join"):
            rpc.Server("127.0.0.1", 0, [(CONTROLLER, object())])

    serving(test)


def test_health_and_reflection() -> None:
    async def test(world: World) -> None:
        kinds = health_pb2.HealthCheckResponse
        names = ["", "readiness", CONTROLLER.full_name, SHARD.full_name, POOL.full_name]
        async with rpc.channel(world.address) as channel:
            health = rpc.Client(channel, rpc.HEALTH)

            async def status(name: str) -> Any:
                return (await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=SOON)).status

            watch = health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
            assert (await anext(watch)).status == kinds.NOT_SERVING
            assert [await status(name) for name in names] == [kinds.NOT_SERVING] * len(names)
            assert await status("liveness") == kinds.SERVING
            with pytest.raises(errors.NotFound):
                await status("nobody")
            world.server.set_ready(True)
            assert (await anext(watch)).status == kinds.SERVING
            assert [await status(name) for name in names] == [kinds.SERVING] * len(names)
            world.server.set_ready(False)
            assert (await anext(watch)).status == kinds.NOT_SERVING

            offered = await asyncio.to_thread(_reflect, world.address)
            assert {CONTROLLER.full_name, SHARD.full_name, POOL.full_name, "grpc.health.v1.Health"} <= offered

            world.server.set_ready(True)
            assert (await anext(watch)).status == kinds.SERVING
            stopping = asyncio.create_task(world.server.stop(SOON))  # a watcher does not keep it waiting
            assert (await anext(watch)).status == kinds.NOT_SERVING
            with pytest.raises(StopAsyncIteration):
                await anext(watch)
            await asyncio.wait_for(stopping, SOON / 2)

    serving(test)


def _reflect(address: str) -> set[str]:
    with rpc.blocking_channel(address) as channel:
        return set(ProtoReflectionDescriptorDatabase(channel).get_services())


def test_blocking_client() -> None:
    def talk(address: str) -> None:
        with rpc.blocking_channel(address) as channel:
            client = rpc.BlockingClient(channel, CONTROLLER)
            assert client.Route(route("me"), timeout=SOON).node == "for me"
            with pytest.raises(errors.TooLong) as caught:
                client.Route(route("TooLong"), timeout=SOON)
            assert caught.value.field == "max_tokens"
            with pytest.raises(TypeError, match="timeout"):
                client.Route(route("me"))

            pool = rpc.BlockingClient(channel, POOL)
            words = (pool_pb2.Release(sequence=word) for word in ("a", "b", "refuse", "c"))
            said = (pool_pb2.ConverseRequest(release=word) for word in words)
            heard: list[str] = []
            with pytest.raises(errors.Stale):
                heard.extend(reply.open for reply in pool.Converse(said))
            assert heard == ["a", "b"]

            silent = threading.Event()
            open_ended = pool.Converse(_until(silent))
            threading.Timer(0.05, open_ended.cancel).start()
            with pytest.raises(errors.Cancelled):
                next(open_ended)
            silent.set()
        with pytest.raises(errors.Unavailable, match="closed"):
            client.Route(route("me"), timeout=SOON)

    async def test(world: World) -> None:
        await asyncio.to_thread(talk, world.address)

    serving(test)


def _until(event: threading.Event) -> Any:
    event.wait(SOON)
    return
    yield
