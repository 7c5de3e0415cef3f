"""The queue of a worker has a bound: what is beyond it is refused, with the numbers."""

import asyncio
from queue import SimpleQueue
from typing import Any

import pytest

from infinillm import wire
from infinillm.core.request import Sampling
from infinillm.engine.messages import Cancel, Load, Submit
from infinillm.errors import Overloaded
from infinillm.protos import shard_pb2 as pb
from infinillm.servers.shard import ShardService


class FakeEngine:
    """An engine that hears and never answers."""

    alive = True

    def __init__(self) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.load = Load()


def ask(id: str) -> pb.ShardGenerateRequest:
    return pb.ShardGenerateRequest(id=id, prompt=[1], sampling=wire.sampling_to_wire(Sampling()))


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
