"""What a worker takes, refuses and hands over."""

import asyncio
from queue import SimpleQueue
from typing import Any

import pytest

from infinillm import wire
from infinillm.core.request import MOVED, RUNNING, WAITING, Sampling
from infinillm.core.types import Layout
from infinillm.engine.messages import Cancel, Load, Output, Submit
from infinillm.errors import BadRequest, InfinillmError, Overloaded, Unavailable
from infinillm.protos import shard_pb2 as pb
from infinillm.servers.shard import ShardService


class FakeEngine:
    """An engine that hears and never answers."""

    alive = True

    def __init__(self) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.load = Load()
        self.states: dict[str, str] = {}

    def placement(self, id: str) -> tuple[str, int, Layout] | None:
        return (self.states[id], 1, ()) if id in self.states else None


def ask(id: str, **more: Any) -> pb.ShardGenerateRequest:
    return pb.ShardGenerateRequest(id=id, prompt=[1], sampling=wire.sampling_to_wire(Sampling()), **more)


def shard_of(engine: Any) -> ShardService:
    return ShardService(engine, asyncio.get_running_loop(), 10, 4, max_waiting=8)


def test_a_full_queue_refuses() -> None:
    async def scenario() -> None:
        engine: Any = FakeEngine()
        shard = ShardService(engine, asyncio.get_running_loop(), 10, 4, max_waiting=2)
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
        asked = asyncio.ensure_future(anext(shard_of(engine).Generate(ask("s", already=[7, 8]), None)))
        while not engine.inbox.qsize():
            await asyncio.sleep(0)
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
        first = asyncio.ensure_future(anext(shard.Generate(ask("s"), None)))
        while not engine.inbox.qsize():
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="runs here still"):
            await anext(shard.Generate(ask("s", already=[1]), None))
        assert list(shard.streams) == ["s"], "the first one goes on"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    asyncio.run(scenario())


def test_handing_over_first_what_waits_then_the_rest() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        shard = shard_of(engine)
        names = ("waits", "runs", "unheard")
        asked = {name: shard.Generate(ask(name), None) for name in names}
        tasks = {name: asyncio.ensure_future(anext(each)) for name, each in asked.items()}
        while engine.inbox.qsize() < 3:
            await asyncio.sleep(0)
        engine.states = {"waits": WAITING, "runs": RUNNING}  # and of the last, the engine has not heard yet
        assert shard.hand_over(waiting=True) == 2
        said = await asyncio.gather(tasks["waits"], tasks["unheard"])
        assert [each.finish_reason for each in said] == [MOVED, MOVED]
        shard._deliver([Output("runs", (5,))])
        assert list((await tasks["runs"]).tokens) == [5]
        assert shard.hand_over(waiting=False) == 3
        shard._deliver([Output("runs", (6,))])
        assert [(list(each.tokens), each.finish_reason) async for each in asked["runs"]] == [([], MOVED)]
        for name in ("waits", "unheard"):
            await asked[name].aclose()
        assert not shard.streams
        heard = [engine.inbox.get() for _ in range(6)]
        assert heard[3:] == [Cancel("runs"), Cancel("waits"), Cancel("unheard")], "nobody computes for them any more"

    asyncio.run(scenario())


def test_a_failure_ends_a_stream_and_its_computation() -> None:
    async def scenario() -> None:
        engine = FakeEngine()
        shard = shard_of(engine)
        task = asyncio.ensure_future(anext(shard.Generate(ask("s"), None)))
        while not engine.inbox.qsize():
            await asyncio.sleep(0)
        shard.fail(Unavailable("superseded"))
        with pytest.raises(InfinillmError, match="superseded"):
            await task
        assert [type(engine.inbox.get()) for _ in range(2)] == [Submit, Cancel]

    asyncio.run(scenario())
