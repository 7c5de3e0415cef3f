"""Chaos: requests whose answers are known, while processes die, stop, leave and are cut off; then an audit."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from infinillm.core.cost import Cost, Curve, to_plain
from tests import tiny
from tests.e2e import audit, client
from tests.e2e.client import Ending
from tests.e2e.conftest import BLOCKS, FLAGS, MODEL, truth
from tests.e2e.faults import GUEST, Fault, Faults, Lane
from tests.e2e.pair import Pair

WORKERS = ("worker-0", "worker-1", "worker-2", "worker-3")
PORTS = {"worker-0": "auto", "worker-1": "tcp", "worker-2": "stream", "worker-3": "auto", GUEST: "tcp"}
COUNT, SEEDS = 48, 2  # tokens to come, and prompts of each length
LENGTHS: tuple[int, ...] = (4, 16, 47, 90, 160, 300, 430, 620)  # tokens; two workers hold the longest
OFTEN: tuple[int, ...] = (6, 6, 6, 5, 4, 3, 2, 1)  # how often each length, against the others
BIG = slice(4, 6)  # the lengths that fit one worker, if little else runs there
LONG, LONG_COUNT = (60, 100), 160  # tokens
TOO_LONG = 1800  # tokens; more than all workers and a guest hold
KINDS = {"whole": 33, "stream": 30, "sampled": 14, "long": 3, "left": 12, "vanished": 6, "too long": 2}
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1}
SMALL = "the pool offers"
AT_A_TIME = 16
TURN = 400  # requests; every other turn there are few at a time, none outgrows a worker, and nobody saves up blocks
LASTING, FEW = {**KINDS, "long": 18}, 8  # then big ones wait while long ones run everywhere, and moves make room
PROGRESS_SECONDS = 5.0
CALM_SECONDS = 60.0  # until nothing is left of what ran
DRAIN_SECONDS, HEARTBEAT_SECONDS = "6", "0.1"
MOVES_LOGGED = ("--log-level", "debug")
MORE_FILES = 16  # that a process at rest may have open beyond those of the start
MANY = 1000  # requests, in which policy proactive must have ordered moves, and some were made


def _line(start: float, end: float) -> Curve:
    """Seconds at none and at 1,000 tokens or rows."""
    return Curve(((0.0, start), (1000.0, end)))


COST = Cost(  # a step takes as long whatever its batch: so room for one more is worth a move
    dense=_line(0.01, 0.01),
    attention=_line(0.0, 0.001),
    question=_line(0.002, 0.002),
    merging=_line(0.0001, 0.0001),
    move=_line(0.0, 0.001),
    prefill=_line(0.0, 0.1),
    question_bytes=1584,
    token_bytes=768,
)


class Case(NamedTuple):
    """One request, what it must answer with, what came of it, and how long that took."""

    kind: str
    want: list[int]
    ending: Ending
    seconds: float

    @property
    def verdict(self) -> str:
        tokens, error = self.ending.tokens, self.ending.error
        if tokens[: len(self.want)] != self.want[: len(tokens)]:
            return "wrong"
        if self.kind == "too long":
            return "refused" if error is not None and error["message"] and not tokens else "wrong"
        if self.ending.status == 400 and not tokens and error is not None and SMALL in error["message"]:
            return "refused"  # by a pool that was smaller when it was asked
        if error is not None:
            return "failed" if error["message"] else "wrong"
        if self.kind in ("left", "vanished"):
            return "left"
        return "exact" if (tokens, self.ending.finish_reason) == (self.want, "length") else "wrong"

    @property
    def reason(self) -> str:
        """Why it failed, without the numbers."""
        said = self.ending.error["message"] if self.ending.error else ""
        return re.sub(r"\d[\d,.:]*", "N", f"{self.ending.status} {said}")[:200]


@dataclass
class Result:
    """What became of a run."""

    seed: int
    policy: str
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    skipped: int = 0
    defects: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    gateway_files: tuple[int, int] = (0, 0)  # that the gateway, which lives throughout, has open before and after

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(case.verdict for case in self.cases)

    @property
    def failed(self) -> list[Case]:
        return [case for case in self.cases if case.verdict == "failed"]

    def trouble(self) -> str:
        """All that must not be, with what is needed to run it again; empty where there is nothing."""
        wrong = [
            f"{case.kind}: wanted {case.want}, got {case.ending}" for case in self.cases if case.verdict == "wrong"
        ]
        if not (told := [*wrong, *self.defects]):
            return ""
        return "\n".join([f"seed {self.seed}:", *told, "what was done:", *map(str, self.faults)])


class Load:
    """The requests of one run, each a pure function of the seed and its number."""

    def __init__(self, http: httpx.AsyncClient, seed: int):
        self.http, self.seed = http, seed
        self.cases: list[Case] = []
        self.sampled: dict[int, list[int]] = {}

    async def learn(self) -> None:
        """What is drawn for the sampled requests while all is well: it must never be anything else."""
        for length in LENGTHS:
            ending = await client.ask(self.http, truth(length, 30, COUNT)[0], COUNT, **SAMPLED, seed=length)
            assert ending.error is None, ending
            self.sampled[length] = ending.tokens

    async def run(self, requests: int, minutes: float) -> None:
        """So many requests, or more until the time is over, some at a time."""
        until, numbers, few = time.monotonic() + 60 * minutes, iter(range(1_000_000)), asyncio.Semaphore(FEW)

        async def seat() -> None:
            for number in numbers:
                if number >= requests and time.monotonic() >= until:
                    return
                async with few if number // TURN % 2 else nullcontext():
                    await self._one(number)

        await asyncio.gather(*(seat() for _ in range(AT_A_TIME)))

    async def _one(self, number: int) -> None:
        draw = random.Random(f"load/{self.seed}/{number}")
        kinds, lengths = (LASTING, BIG) if number // TURN % 2 else (KINDS, slice(None))
        (kind,) = draw.choices(list(kinds), list(kinds.values()))
        (length,), count, after = draw.choices(LENGTHS[lengths], OFTEN[lengths]), draw.randint(1, COUNT), draw.random()
        prompt, want = truth(length, 30 if kind == "sampled" else 30 + draw.randrange(SEEDS), COUNT)
        if kind == "long":
            count = LONG_COUNT
            prompt, want = truth(draw.choice(LONG), 30 + draw.randrange(SEEDS), count)
        deeds: dict[str, Callable[[], Awaitable[Ending]]] = {
            "whole": lambda: client.ask(self.http, prompt, count),
            "stream": lambda: client.ask(self.http, prompt, count, stream=True),
            "long": lambda: client.ask(self.http, prompt, count, stream=True),
            "sampled": lambda: client.ask(self.http, prompt, COUNT, **SAMPLED, seed=length, stream=after < 0.5),
            "left": lambda: client.leave(self.http, prompt, 100, after=1 + int(after * 20)),
            "vanished": lambda: self._vanish(prompt, after),
            "too long": lambda: client.ask(self.http, tiny.prompt(TOO_LONG, number), 8, stream=after < 0.5),
        }
        want = self.sampled[length] if kind == "sampled" else want if kind in ("left", "vanished") else want[:count]
        began = time.monotonic()
        try:
            ending = await deeds[kind]()
        except (httpx.HTTPError, AssertionError) as broken:  # no answer, or none with a reason
            ending = Ending("", [], status=0, error={"message": ""})
            self.cases.append(Case(f"{kind}: {broken!r}", want, ending, time.monotonic() - began))
            return
        self.cases.append(Case(kind, want, ending, time.monotonic() - began))

    async def _vanish(self, prompt: list[int], seconds: float) -> Ending:
        try:
            return await asyncio.wait_for(client.ask(self.http, prompt, COUNT), seconds)
        except asyncio.TimeoutError:
            return Ending("", [])


def run(folder: Path, seed: int, requests: int, minutes: float, policy: str, tell: Callable[[str], None]) -> Result:
    """Start a cluster, shake it under load, let it come to rest, and audit it. `tell` hears the progress."""
    result, before = Result(seed, policy), audit.shared_memory()
    others = set(psutil.Process().children(recursive=True))
    lanes = {name: Lane() for name in (*WORKERS, GUEST)}

    def of_worker(name: str) -> tuple[str, ...]:
        port = str(lanes[name].aim())
        return ("--port", port, "--advertise", lanes[name].address, "--port-kind", PORTS[name])

    profile = folder / "profile.json"
    profile.write_text(json.dumps(to_plain(COST)))
    flags = {
        "controller": ("--heartbeat-seconds", HEARTBEAT_SECONDS, "--policy", policy),
        "worker": (*FLAGS["worker"], "--drain-seconds", DRAIN_SECONDS, "--profile", str(profile), *MOVES_LOGGED),
    }
    made = Pair(folder, str(tiny.folder(MODEL)), blocks=BLOCKS, flags=flags, of_worker=of_worker)
    tell("computing what the answers must be")
    for length, count in (*product(LENGTHS, [COUNT]), *product(LONG, [LONG_COUNT])):
        for offset in range(SEEDS):
            truth(length, 30 + offset, count)
    try:
        tell("starting two controllers, a gateway and four workers")
        made.start(len(WORKERS))  # by this thread: they die with the one that started them
        asyncio.run(_shaken(made, lanes, result, requests, minutes, tell))
        tell("at rest; the audit")
        made.end()
    except AssertionError as defect:
        result.defects.append(str(defect))
    finally:
        made.kill()
    result.events, defects = audit.heard(folder)
    result.defects += defects
    if policy == "proactive" and len(result.cases) >= MANY:
        result.defects += [f"nothing was {what}" for what in ("ordered", audit.MOVED) if not result.events[what]]
    if left := set(psutil.Process().children(recursive=True)) - others:
        result.defects += [
            f"left behind: {each}" for each in left if "resource_tracker" not in " ".join(each.cmdline())
        ]
    if left_shared := audit.shared_memory() - before:
        result.defects.append(f"left in shared memory: {left_shared}")
    return result


async def _shaken(
    pool: Pair,
    lanes: dict[str, Lane],
    result: Result,
    requests: int,
    minutes: float,
    tell: Callable[[str], None],
) -> None:
    for lane in lanes.values():
        await lane.open()
    faults = Faults(pool, WORKERS, lanes, lambda what: tell(f"  {what}"))
    async with client.client(pool.url) as http:
        load, over = Load(http, result.seed), asyncio.Event()
        await load.learn()
        gateway = psutil.Process(pool.gateway.popen.pid)
        began, files = time.monotonic(), gateway.num_fds()

        async def progress() -> None:
            while True:
                await asyncio.sleep(PROGRESS_SECONDS)
                tell(f"{_counts(load.cases)} of {requests:,} requests; {len(faults.done)} faults")

        telling = asyncio.create_task(progress())
        shaking = asyncio.create_task(faults.run(result.seed, over))
        try:
            await load.run(requests, minutes)
        finally:
            over.set()
            await shaking
            telling.cancel()
    result.seconds = time.monotonic() - began
    result.cases, result.faults, result.skipped = load.cases, faults.done, len(faults.skipped)
    result.defects += faults.defects
    try:
        await asyncio.to_thread(pool.settle, CALM_SECONDS)
        result.gateway_files = (files, gateway.num_fds())
        if result.gateway_files[1] > files + MORE_FILES:
            result.defects.append(f"the gateway had {files} files open, and has {result.gateway_files[1]}")
    finally:
        for lane in lanes.values():
            await lane.close()


def _counts(cases: list[Case]) -> str:
    counted = Counter(case.verdict for case in cases)
    return ", ".join(f"{counted[verdict]:,} {verdict}" for verdict in sorted(counted)) or "none"
