"""A whole cluster on this machine: a controller, some workers and a gateway, started, watched and ended together.

Theory of operation. First one process prepares what is slow (converting the model, compiling the kernels), so that the
workers do not each do it. Then the controller starts, then the workers at once, then the gateway; each says one line of
JSON on its standard output when it is ready. From then on nothing is restarted silently: the first process that ends
takes the cluster with it, and its last words are told. Every child runs in a session of its own, so that only we hear
Ctrl-C, and is killed by the kernel should we die without a word.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infinillm import config
from infinillm.errors import BadRequest, Unavailable

START_SECONDS = 600.0  # to load a large model from a slow disk
GRACE_SECONDS = 30.0  # to finish what runs, once told to end
LAST_WORDS = 12  # lines of a dead process that are told

Say = Callable[[str, float], None]  # what is being done, and the share of it that is done


@dataclass(slots=True, eq=False)
class Child:
    """One process of the cluster, its ready line, and the last it said."""

    name: str
    process: asyncio.subprocess.Process
    ready: asyncio.Future[dict[str, Any]]
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def last_words(self) -> str:
        return "".join(f"\n    {line}" for line in self.lines)

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


async def _spawn(name: str, command: str, settings: Any, echo: bool, hear: Say | None = None) -> Child:
    child_argv = [sys.executable, "-m", "infinillm", command, "--dies-with", str(os.getpid())]
    process = await asyncio.create_subprocess_exec(
        *child_argv,
        *config.arguments(settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    child = Child(name, process, asyncio.get_running_loop().create_future())
    child.tasks = [asyncio.create_task(_listen(child, hear)), asyncio.create_task(_drain(child, echo))]
    return child


async def _listen(child: Child, hear: Say | None) -> None:
    assert child.process.stdout is not None
    async for line in _lines(child.process.stdout):
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict) and "ready" in said and not child.ready.done():
            child.ready.set_result(said)
        elif isinstance(said, dict) and "doing" in said and hear is not None:
            hear(str(said["doing"]), float(said["done"]))
        else:
            child.lines.append(line)


async def _drain(child: Child, echo: bool) -> None:
    assert child.process.stderr is not None
    async for line in _lines(child.process.stderr):
        child.lines.append(line)
        if echo:
            print(line, file=sys.stderr, flush=True)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Every line to the end, whatever its length: a child whose pipe nobody reads would stand still."""
    while True:
        try:
            raw = await stream.readline()
        except ValueError:  # longer than the stream's limit; what was read of it is gone
            yield "(a line too long to show)"
            continue
        if not raw:
            return
        yield raw.decode(errors="replace").rstrip()


async def _ready(child: Child, seconds: float) -> dict[str, Any]:
    """What the child said when it was ready. Raises Unavailable, with its last words, if it ended instead."""
    ended = asyncio.create_task(child.process.wait())
    waits: list[asyncio.Future[Any]] = [child.ready, ended]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
    if not child.ready.done() and not child.alive:
        await asyncio.gather(*child.tasks)
    if child.ready.done():
        return child.ready.result()
    complaint = f"infinillm {child.name.split('-')[0]}: "
    if child.process.returncode == 2:  # bad input: it said what in one line
        said = [line for line in child.lines if line.startswith(complaint)]
        raise BadRequest("".join(said[-1:]).removeprefix(complaint) or f"{child.name} was refused:{child.last_words}")
    if child.alive:
        raise Unavailable(f"{child.name} was not ready within {seconds:g} seconds; its last words:{child.last_words}")
    code = child.process.returncode
    raise Unavailable(f"{child.name} ended with status {code} before it was ready; its last words:{child.last_words}")


async def _all_ready(children: list[Child], what: str, say: Say) -> None:
    """Wait for all together, so that the first that cannot start is told at once."""
    waits = [asyncio.create_task(_ready(child, START_SECONDS)) for child in children]
    try:
        for count, wait in enumerate(asyncio.as_completed(waits)):
            say(what, count / len(waits))
            await wait
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _end(children: list[Child], grace: float) -> None:
    """SIGTERM, then SIGKILL for who is still there after `grace` seconds."""
    for child in children:
        if child.alive:
            child.process.terminate()
    deadline = time.monotonic() + grace
    for child in children:
        try:
            await asyncio.wait_for(child.process.wait(), max(deadline - time.monotonic(), 0.01))
        except asyncio.TimeoutError:
            child.process.kill()
            await child.process.wait()
        await asyncio.gather(*child.tasks, return_exceptions=True)


@dataclass(slots=True, eq=False)
class Cluster:
    """The processes of a local cluster, all ready."""

    controller: Child
    workers: list[Child]
    gateway: Child

    @property
    def children(self) -> list[Child]:
        return [self.controller, *self.workers, self.gateway]

    @property
    def url(self) -> str:
        return f"http://{self.gateway.ready.result()['http']}"

    @property
    def addresses(self) -> dict[str, Any]:
        """What each process said when it was ready."""
        gateway = self.gateway.ready.result()
        workers = [child.ready.result() for child in self.workers]
        return {**gateway, "ready": "serve", "controller": self.controller.ready.result(), "workers": workers}

    async def death(self) -> Child:
        """The first process that ends."""
        waits = {asyncio.create_task(child.process.wait()): child for child in self.children}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return waits[done.pop()]


async def prepare(settings: config.Prepare, say: Say) -> Path:
    """Do once, in a process of its own, what is slow the first time; the folder of the model."""
    child = await _spawn("prepare", "prepare", settings, echo=False, hear=say)
    try:
        return Path((await _ready(child, START_SECONDS))["model"])
    finally:
        await _end([child], GRACE_SECONDS)


@asynccontextmanager
async def cluster(
    settings: config.Serve, say: Say, *, echo: bool, grace: float = GRACE_SECONDS
) -> AsyncIterator[Cluster]:
    """A cluster while the block runs; whatever happens, no process of it is left afterwards.

    `echo` passes the children's logs on to our standard error. Raises Unavailable or BadRequest if it cannot start.
    """
    children: list[Child] = []

    async def start(name: str, command: str, its: Any) -> Child:
        children.append(await _spawn(name, command, its, echo))
        return children[-1]

    try:
        say("starting the controller", 0.0)
        controller = await start("controller", "controller", settings.controller())
        address = (await _ready(controller, START_SECONDS))["address"]
        workers = [
            await start(f"worker-{index}", "worker", settings.worker(index, address))
            for index in range(settings.workers)
        ]
        if settings.host_kv_gib:
            workers.append(await start("worker-host", "worker", settings.host_memory(address)))
        gateway = await start("gateway", "gateway", settings.gateway(address))
        await _all_ready([*workers, gateway], f"loading the model in {settings.workers} workers", say)
        say("ready", 1.0)
        yield Cluster(controller, workers, gateway)
    finally:
        # Those who ask end before those who are asked.
        await _end([child for child in children if child.name == "gateway"], grace)
        await _end([child for child in children if child.name.startswith("worker")], grace)
        await _end(children, grace)


async def run(settings: config.Serve, say: Say, announce: Callable[[Cluster], None]) -> None:
    """Serve until SIGTERM or SIGINT; raises Unavailable if a process ends by itself."""
    told = asyncio.Event()
    task = asyncio.current_task()
    assert task is not None

    def end() -> None:
        if told.is_set():  # the second time: at once
            for child in living:
                child.process.kill()
        told.set()

    living: list[Child] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    starting = asyncio.create_task(_serve(settings, say, announce, living, told))
    stopping = asyncio.create_task(told.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    if told.is_set() and not living:  # told to end before it was ready
        starting.cancel()
    try:
        await starting
    except asyncio.CancelledError:
        pass
    finally:
        stopping.cancel()


async def _serve(
    settings: config.Serve, say: Say, announce: Callable[[Cluster], None], living: list[Child], told: asyncio.Event
) -> None:
    await prepare(settings.prepare(), say)
    async with cluster(settings, say, echo=True) as running:
        living += running.children
        announce(running)
        death = asyncio.create_task(running.death())
        stop = asyncio.create_task(told.wait())
        await asyncio.wait([death, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not told.is_set():
            dead = death.result()
            await asyncio.gather(*dead.tasks, return_exceptions=True)
            raise Unavailable(
                f"{dead.name} ended with status {dead.process.returncode}; its last words:{dead.last_words}"
            )
        death.cancel()
