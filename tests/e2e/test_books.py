"""A soak: all that happens to a cluster, in an order drawn once; then every block is free and all books agree."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import grpc.aio
import httpx

from infinillm import rpc
from infinillm.errors import InfinillmError
from infinillm.protos import inference_pb2 as pb
from tests import tiny
from tests.e2e import client
from tests.e2e.client import Ending
from tests.e2e.conftest import truth
from tests.e2e.processes import Cluster, Process

INFERENCE = pb.DESCRIPTOR.services_by_name["InferenceService"]
SEED = 7
AT_A_TIME = 12
LENGTHS, COUNT = (4, 16, 47, 90, 160, 300, 430, 620, 850), 32
SECONDS = 120.0
KINDS = {"whole": 40, "stream": 30, "grpc": 8, "left": 16, "vanished": 6, "too long": 6, "wrong": 6, "killed": 3}

# A client process that says when its stream has begun, and then waits for its end.
CLIENT = """
import http.client, json, sys
host, body = sys.argv[1:]
http = http.client.HTTPConnection(host, timeout=60)
http.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
reply = http.getresponse()
print(reply.readline().decode(), flush=True)
sys.stdin.read()
"""


class Case(NamedTuple):
    """One request, what it must answer with, and what came of it."""

    kind: str
    want: list[int]
    ending: Ending


class Soak:
    """The requests of one run."""

    def __init__(self, pool: Cluster, http: httpx.AsyncClient, channel: grpc.aio.Channel, seed: int):
        self.pool, self.http, self.grpc = pool, http, rpc.Client(channel, INFERENCE)
        self.rng = random.Random(seed)
        self.cases: list[Case] = []
        self.seats = asyncio.Semaphore(AT_A_TIME)

    def draw(self) -> Awaitable[None]:
        (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
        prompt, want = truth(self.rng.choice(LENGTHS), 30 + self.rng.randrange(2), COUNT)
        count, after = self.rng.randint(1, COUNT), self.rng.randint(1, COUNT)
        deeds: dict[str, Callable[[], Awaitable[Ending]]] = {
            "whole": lambda: client.ask(self.http, prompt, count),
            "stream": lambda: client.ask(self.http, prompt, count, stream=True),
            "grpc": lambda: self.by_grpc(prompt, count),
            "left": lambda: client.leave(self.http, prompt, 100, after=min(after, 12)),
            "vanished": lambda: self.vanish(prompt, after / 100),
            "too long": lambda: client.ask(self.http, tiny.prompt(1100, after), 8, stream=after % 2 == 0),
            "wrong": lambda: client.ask(self.http, prompt, -count),
            "killed": lambda: self.killed(prompt),
        }
        return self._seated(kind, want[:count], deeds[kind])

    async def _seated(self, kind: str, want: list[int], deed: Callable[[], Awaitable[Ending]]) -> None:
        async with self.seats:
            ending = await deed()
        self.cases.append(Case(kind, want, ending))

    # --- the less common deeds -----------------------------------------------------------------------------------

    async def by_grpc(self, prompt: list[int], count: int) -> Ending:
        parameters = pb.GenerateParameters(max_tokens=count, temperature=0, ignore_eos=True)
        asked = pb.GenerateRequest(tokens=pb.TokenIds(ids=prompt), parameters=parameters)
        tokens: list[int] = []
        reason = ""
        try:
            async for said in self.grpc.Generate(asked, timeout=60.0):
                tokens += said.tokens
                reason = said.finish_reason or reason
        except InfinillmError as error:
            return Ending("", tokens, status=error.http_status, error={"message": error.message})
        return Ending("", tokens, reason)

    async def vanish(self, prompt: list[int], seconds: float) -> Ending:
        """Hang up after a moment, whether there was an answer or not."""
        try:
            return await asyncio.wait_for(client.ask(self.http, prompt, 100), seconds)
        except asyncio.TimeoutError:
            return Ending("", [])

    async def killed(self, prompt: list[int]) -> Ending:
        """A client that is a process, and is killed in the middle of its stream."""
        argv = [sys.executable, "-S", "-c", CLIENT, self.pool.gateway.said["http"]]
        process = await asyncio.create_subprocess_exec(
            *argv, json.dumps(client.body(prompt, 150, stream=True)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline()
        process.kill()
        await process.communicate()
        return Ending("", [])


async def soak(
    pool: Cluster, seed: int, requests: int, lost: Process, replace: Callable[[], Process], without: int
) -> list[Case]:
    """After a third of the requests one process is lost, and replaced after so many without it."""
    async with client.client(pool.url) as http, rpc.channel(pool.gateway.said["grpc"]) as channel:
        run = Soak(pool, http, channel, seed)
        tasks = [asyncio.ensure_future(run.draw()) for _ in range(requests)]
        again: asyncio.Future[dict[str, str]] | None = None
        try:
            for at, done in enumerate(asyncio.as_completed(tasks, timeout=SECONDS)):
                await done
                if at == requests // 3:
                    lost.kill()
                if at == requests // 3 + without:
                    again = asyncio.ensure_future(asyncio.to_thread(replace().ready))
            assert again is not None
            await again
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *filter(None, [again]), return_exceptions=True)
        return run.cases


def failures(cases: list[Case]) -> list[Ending]:
    """Who failed though it was accepted, each with a reason; whatever was answered is right."""
    failed = []
    for kind, want, ending in cases:
        tokens, error = ending.tokens, ending.error
        assert tokens[: len(want)] == want[: len(tokens)], kind
        if kind == "too long":
            assert error is not None and error["message"] and not tokens
            assert ending.status == 400 or "controller" in error["message"], ending
        elif kind == "wrong":
            assert error is not None and (ending.status, error["param"]) == (400, "max_tokens"), ending
        elif error is not None:
            failed.append(ending)
            assert error["message"]
        elif kind in {"whole", "stream", "grpc"}:
            assert (tokens, ending.finish_reason) == (want, "length"), kind
    return failed


def settle(pool: Cluster) -> None:
    pool.settle(30.0)
    for worker in pool.workers.values():
        said = [event for event in worker.events if event["event"] in {"rpc_failed", "law_broken", "pass_failed"}]
        assert not said, said


def test_whatever_clients_do_and_without_a_controller_answers_are_right_and_nothing_leaks(pool: Cluster) -> None:
    epoch = pool.ledger().epoch
    cases = asyncio.run(soak(pool, SEED, 100, pool.controller, pool.start_controller_again, without=0))
    assert {case.kind for case in cases} == set(KINDS), "the seed must draw every kind"
    failed = failures(cases)
    assert all(ending.status in {200, 429, 503} for ending in failed), failed
    assert len(failed) <= len(cases) // 20, failed
    settle(pool)
    assert pool.ledger().epoch > epoch


def test_whatever_clients_do_while_a_worker_dies_answers_are_right_and_nothing_leaks(pool: Cluster) -> None:
    replace = partial(pool.add_worker, "worker-1")
    cases = asyncio.run(soak(pool, SEED + 1, 80, pool.workers["worker-1"], replace, without=20))
    for ending in failures(cases):
        assert ending.error is not None
        refused = ending.status == 400 and not ending.tokens and "the pool offers" in ending.error["message"]
        assert refused or ending.status in {200, 429, 503}, (
            ending
        )  # by a pool that is smaller, or with a reason to retry
    settle(pool)
