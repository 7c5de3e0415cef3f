"""What a worker takes, refuses and hands over."""

import asyncio
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from infinillm import wire
from infinillm.core.moves import Wish
from infinillm.core.names import prefix_hashes
from infinillm.core.request import MOVED, Request, Sampling
from infinillm.core.types import Layout, Move, Span
from infinillm.engine.messages import Cancel, HandOver, Load, Output, Pass, Placement, Submit
from infinillm.errors import BadRequest, InfinillmError, Overloaded, Unavailable
from infinillm.protos import shard_pb2 as pb
from infinillm.servers.openai_bodies import plain
from infinillm.servers.shard import ShardService


class FakeEngine:
    """An engine that hears and never answers."""

    alive = True

    def __init__(self) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.load = Load()
        self.states: dict[str, str] = {}

    def placement(self, id: str) -> Placement | None:
        if id not in self.states:
            return None
        wish = Wish(Move(id, "a", "b", 4, 2), "room")
        return Placement(self.states[id], 20, (Span("a", 0, 20),), ((8, 12), (16, 20)), (wish,))


def test_where_a_request_is_what_it_lost_and_what_moves() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        engine.states["s"] = "running"
        told = plain(await shard_of(engine).Placement(pb.PlacementRequest(id="s"), None))
        assert (told["state"], told["tokens"], told["block_size"]) == ("running", 20, 4)
        assert told["spans"] == [{"node": "a", "start": 0, "stop": 20}]
        assert told["holes"] == [{"start": 8, "stop": 12}, {"start": 16, "stop": 20}]
        assert told["moving"] == [{"source": "a", "target": "b", "start": 4, "stop": 12, "reason": "room"}]

    asyncio.run(scenario())


def ask(id: str, **more: Any) -> pb.ShardGenerateRequest:
    return pb.ShardGenerateRequest(id=id, prompt=[1], sampling=wire.sampling_to_wire(Sampling()), **more)


async def nobody(request: Request, names: Sequence[bytes], holders: Sequence[tuple[str, str]]) -> tuple[Layout, bool]:
    return (), False


async def met(node: str, address: str) -> None:
    pass


def shard_of(engine: Any, **more: Any) -> ShardService:
    usual = {"max_waiting": 8, "find": nobody, "meet": met}
    return ShardService(engine, asyncio.get_running_loop(), 10, 4, **{**usual, **more})


async def begun(engine: Any, stream: Any) -> asyncio.Task[Any]:
    """What the stream says first, once the engine has heard of the request."""
    task = asyncio.ensure_future(anext(stream))
    while not engine.inbox.qsize():
        await asyncio.sleep(0)
    return task


def test_a_full_queue_refuses() -> None:
    async def scenario() -> None:
        engine: Any = FakeEngine()
        shard = shard_of(engine, max_waiting=2)
        asked = [shard.Generate(ask(str(i)), None) for i in range(4)]
        tasks = [asyncio.ensure_future(anext(each)) for each in asked[:2]]
        while engine.inbox.qsize() < 2:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 requests wait at this worker and 0 run; at most 2 may wait"):
            await anext(asked[2])
        assert engine.inbox.qsize() == 2
        engine.load = Load(running=1)  # one of them has been admitted
        tasks.append(asyncio.ensure_future(anext(asked[3])))
        while engine.inbox.qsize() < 3:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not shard.streams
        heard = [engine.inbox.get() for _ in range(6)]
        assert [type(message) for message in heard] == [Submit] * 3 + [Cancel] * 3

    asyncio.run(scenario())


def test_what_another_worker_produced_counts_as_output() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        asked = await begun(engine, shard_of(engine).Generate(ask("s", already=[7, 8]), None))
        assert engine.inbox.get().request.already == (7, 8)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("already", [[10], [1] * Sampling().max_tokens], ids=["no such token", "nothing left to do"])
def test_output_that_cannot_be_is_refused(already: list[int]) -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        with pytest.raises(BadRequest) as refused:
            await anext(shard_of(engine).Generate(ask("s", already=already), None))
        assert refused.value.field == "already"
        assert engine.inbox.empty()

    asyncio.run(scenario())


def test_a_request_that_runs_here_still_can_be_tried_elsewhere() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        shard = shard_of(engine)
        first = await begun(engine, shard.Generate(ask("s"), None))
        with pytest.raises(Unavailable, match="runs here still"):
            await anext(shard.Generate(ask("s", already=[1]), None))
        assert list(shard.streams) == ["s"], "the first one goes on"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(scenario())


def test_what_others_have_of_a_request_is_asked_for_first() -> None:
    async def scenario() -> None:
        engine: Any = FakeEngine()
        asked: list[Any] = []

        async def find(
            request: Request, names: Sequence[bytes], holders: Sequence[tuple[str, str]]
        ) -> tuple[Layout, bool]:
            asked.append((request.id, names, holders, engine.inbox.qsize()))
            return (Span("b", 0, 4),), True

        shard = shard_of(engine, find=find)
        wanted = ask("s", already=[2, 3, 4, 5], holders=[{"node": "b", "address": "there"}])
        task = await begun(engine, shard.Generate(wanted, None))
        names = prefix_hashes([1, 2, 3, 4], 4)
        assert asked == [("s", names, [("b", "there")], 0)]
        heard = engine.inbox.get()
        assert (heard.names, heard.shared, heard.copy) == (names, (Span("b", 0, 4),), True)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.inbox.get() == Cancel("s")

    asyncio.run(scenario())


def test_a_worker_that_drains_sends_requests_elsewhere() -> None:
    async def scenario() -> None:
        shard = shard_of(FakeEngine())
        shard.draining = True
        assert [each.finish_reason async for each in shard.Generate(ask("s"), None)] == [MOVED]
        assert not shard.streams and not shard.engine.inbox.qsize()

    asyncio.run(scenario())


def test_a_request_that_is_handed_over_ends_here() -> None:
    async def scenario() -> None:
        engine: Any = FakeEngine()
        shard = shard_of(engine)
        stream = shard.Generate(ask("s"), None)
        task = await begun(engine, stream)
        shard.hand_over(waiting=False)
        shard.publish([Output("s", finish_reason=MOVED)])
        assert (await task).finish_reason == MOVED and [each async for each in stream] == []
        heard = [engine.inbox.get() for _ in range(2)]
        assert heard[1] == HandOver(False) and not engine.inbox.qsize() and not shard.streams

    asyncio.run(scenario())


def test_a_worker_that_leaves_says_so_and_goes_on_until_another_is_ready() -> None:
    async def scenario() -> None:
        engine: Any = FakeEngine()
        shard = shard_of(engine)
        stream = shard.Generate(ask("s"), None)
        task = await begun(engine, stream)
        shard.leave()
        assert (await task).leaving
        shard.publish([Output("s", (5,))])
        assert list((await anext(stream)).tokens) == [5]
        await shard.HandOver(pb.HandOverRequest(id="s"), None)
        assert [engine.inbox.get() for _ in range(2)][1] == Pass("s")
        await stream.aclose()

    asyncio.run(scenario())


def test_nodes_are_met_before_anything_is_asked_of_them() -> None:
    async def scenario() -> None:
        asked: list[tuple[str, str]] = []

        async def meet(node: str, address: str) -> None:
            asked.append((node, address))

        shard = shard_of(FakeEngine(), meet=meet)
        await shard.Meet(pb.MeetRequest(nodes=[{"node": "a", "address": "x"}, {"node": "b", "address": "y"}]), None)
        assert asked == [("a", "x"), ("b", "y")]

    asyncio.run(scenario())


def test_a_failure_ends_a_stream_and_its_computation() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        shard = shard_of(engine)
        task = await begun(engine, shard.Generate(ask("s"), None))
        shard.fail(Unavailable("superseded"))
        with pytest.raises(InfinillmError, match="superseded"):
            await task
        assert [type(engine.inbox.get()) for _ in range(2)] == [Submit, Cancel]

    asyncio.run(scenario())
