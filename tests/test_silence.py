"""Who stands still is given up in seconds; who is busy is not, however busy."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infinillm import rpc
from infinillm.errors import Unavailable
from infinillm.protos import shard_pb2 as pb

ROOT = Path(__file__).parents[1]
LOCALHOST = "127.0.0.1"
SHARD = pb.DESCRIPTOR.services_by_name["ShardService"]
NOTICED_SECONDS = 3.0
BUSY_SECONDS = 4.0  # longer than any silence that is borne


class Busy:
    """Says a word, then holds the interpreter where it was asked to, then another word; else nothing more."""

    async def Generate(self, request: pb.ShardGenerateRequest, call: Any) -> AsyncIterator[pb.ShardGenerateResponse]:
        yield pb.ShardGenerateResponse(tokens=[1])
        until, number = time.monotonic() + BUSY_SECONDS, 3**1_000_000
        if request.id != "busy":
            await asyncio.Event().wait()
        while time.monotonic() < until:
            number * number  # one long call that lets no other thread run
        yield pb.ShardGenerateResponse(tokens=[2])

    async def Placement(self, request: Any, call: Any) -> pb.PlacementResponse:
        return pb.PlacementResponse()

    Meet = HandOver = Placement


@contextmanager
def _process(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    made = subprocess.Popen([sys.executable, "-m", "tests.test_silence", *argv], stdout=subprocess.PIPE, cwd=ROOT)
    with made:
        try:
            yield made
        finally:
            made.kill()


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process of its own, and where it listens."""
    with _process() as process:
        assert process.stdout is not None
        yield process, f"{LOCALHOST}:{int(process.stdout.readline())}"


def test_a_busy_process_is_not_given_up(server: tuple[subprocess.Popen[bytes], str]) -> None:
    _, address = server
    with rpc.blocking_channel(address) as channel:
        words = rpc.BlockingClient(channel, SHARD).Generate(pb.ShardGenerateRequest(id="busy"))
        began = next(words), time.monotonic()
        assert list(next(words).tokens) == [2]
        assert time.monotonic() - began[1] > NOTICED_SECONDS


def test_a_stopped_process_is_given_up(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, address = server
    with rpc.blocking_channel(address) as channel:
        words = rpc.BlockingClient(channel, SHARD).Generate(pb.ShardGenerateRequest(id="silent"))
        next(words)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            next(words)
        assert time.monotonic() - began < NOTICED_SECONDS


def test_a_stopped_process_that_was_not_known_is_given_up(server: tuple[subprocess.Popen[bytes], str]) -> None:
    """The kernel takes the connection; nobody answers."""
    process, address = server
    process.send_signal(signal.SIGSTOP)
    with rpc.blocking_channel(address) as channel:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            next(rpc.BlockingClient(channel, SHARD).Generate(pb.ShardGenerateRequest(id="silent")))
        assert time.monotonic() - began < NOTICED_SECONDS


def test_a_stopped_caller_is_given_up() -> None:
    """What it asked for is cancelled."""

    async def scenario() -> None:
        heard, left = asyncio.Event(), asyncio.Event()

        class Patient(Busy):
            async def Generate(self, request: pb.ShardGenerateRequest, call: Any) -> AsyncIterator[Any]:
                heard.set()
                try:
                    yield pb.ShardGenerateResponse(tokens=[1])
                    await asyncio.Event().wait()
                finally:
                    left.set()

        server = rpc.Server(LOCALHOST, 0, [(SHARD, Patient())])
        with _process(f"{LOCALHOST}:{await server.start()}") as caller:
            await asyncio.wait_for(heard.wait(), 60)
            caller.send_signal(signal.SIGSTOP)
            await asyncio.wait_for(left.wait(), NOTICED_SECONDS)
        await server.stop(0.1)

    asyncio.run(scenario())


def _call(address: str) -> None:
    with rpc.blocking_channel(address) as channel:
        list(rpc.BlockingClient(channel, SHARD).Generate(pb.ShardGenerateRequest(id="silent")))


async def _serve() -> None:
    server = rpc.Server(LOCALHOST, 0, [(SHARD, Busy())])
    print(await server.start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    _call(sys.argv[1]) if sys.argv[1:] else asyncio.run(_serve())
