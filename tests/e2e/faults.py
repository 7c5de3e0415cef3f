"""Faults for a cluster with two controllers: a schedule drawn from a seed, and the hands that carry it out."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tests.e2e.pair import NAMES, Pair, free_port

LOCALHOST = "127.0.0.1"
KINDS = {  # what happens, and how often against the others
    "kill": 4,  # a worker dies, and is started again under its name and address
    "kill two": 2,  # two at once
    "stop": 6,  # a worker stands still (SIGSTOP), and goes on
    "leave": 2,  # a worker is told to end, ends with 0, and is started again
    "hurry": 1,  # the same, told twice
    "guest": 2,  # one worker more joins; the next time it leaves
    "cut": 8,  # every gRPC connection to a worker is reset
    "hold": 6,  # nothing passes to or from a worker's gRPC port, then all of it does
    "kill controller": 4,  # one of the two, whether it leads or stands by
    "stop controller": 4,
    "kill controllers": 1,  # both at once: nobody leads until one is back
}
PAUSE, LEAST_PAUSE = 1.5, 0.3  # seconds between two faults: on average beyond the least, and at least
SHORTEST, LONGEST = 0.2, 6.0  # seconds a fault lasts: short ones are not noticed, long ones are
LEAST_UP = 2  # workers that are well at any time
END_SECONDS = 60.0
GUEST = "guest"


class Fault(NamedTuple):
    """What happens to whom (a worker's number), when (seconds since the start), and for how long."""

    at: float
    kind: str
    who: int
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:7.1f} s  {self.kind:<16} {self.who}  {self.lasts:.1f} s"


def schedule(seed: int, workers: int) -> Iterator[Fault]:
    """What will happen, without end; the same for the same seed."""
    draw = random.Random(f"faults/{seed}")
    at = 0.0
    while True:
        at += LEAST_PAUSE + draw.expovariate(1 / PAUSE)
        (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
        yield Fault(round(at, 2), kind, draw.randrange(workers), round(draw.uniform(SHORTEST, LONGEST), 2))


class Lane:
    """What stands between one worker's gRPC port and all who dial it: it can be cut, and held for a while.

    Its address stays the same however often the worker is started again.
    """

    def __init__(self) -> None:
        self.door = socket.create_server((LOCALHOST, 0))
        self.address = f"{LOCALHOST}:{self.door.getsockname()[1]}"
        self.target = 0  # the port the worker itself listens on
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.ends: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    def aim(self) -> int:
        """A free port for the worker that is about to start."""
        self.target = free_port()
        return self.target

    async def open(self) -> None:
        self.server = await asyncio.start_server(self._admit, sock=self.door)

    async def close(self) -> None:
        self.server.close()
        self.flowing.set()
        self.cut()
        await asyncio.gather(*self.tasks)

    def cut(self) -> None:
        for end in list(self.ends):
            end.transport.abort()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ends.add(writer)
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        try:
            await self.flowing.wait()
            there, back = await asyncio.open_connection(LOCALHOST, self.target)
        except OSError:
            writer.transport.abort()
            self.ends.discard(writer)
            return
        self.ends.add(back)
        await asyncio.gather(self._carry(reader, back), self._carry(there, writer))
        self.ends -= {writer, back}

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One way of a connection; where it ends, the other way ends too."""
        try:
            while data := await reader.read(1 << 16):
                await self.flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.transport.abort()


class Faults:
    """Carries a schedule out, as far as enough workers stay well, and heals everything in the end."""

    def __init__(self, pool: Pair, names: Sequence[str], lanes: dict[str, Lane], tell: Callable[[str], None]):
        self.pool, self.names, self.lanes, self.tell = pool, names, lanes, tell
        self.down: set[str] = set()
        self.done: list[Fault] = []
        self.skipped: list[Fault] = []
        self.defects: list[str] = []

    async def run(self, seed: int, over: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        tasks: list[asyncio.Task[None]] = []
        try:
            for fault in schedule(seed, len(self.names)):
                try:
                    await asyncio.wait_for(over.wait(), began + fault.at - loop.time())
                    break
                except asyncio.TimeoutError:
                    pass
                hit = self._hit(fault)
                if not hit or hit & self.down or len(set(self.names) - self.down - hit) < LEAST_UP:
                    self.skipped.append(fault)
                    continue
                self.done.append(fault)
                self.down |= hit
                tasks.append(asyncio.create_task(self._carry_out(fault, sorted(hit))))
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)
        if GUEST in self.pool.workers:
            await self._leave(GUEST, 1)
            del self.pool.workers[GUEST]

    def _hit(self, fault: Fault) -> set[str]:
        match fault.kind:
            case "kill controllers":
                return set(NAMES)
            case "kill controller" | "stop controller":
                return {NAMES[fault.who % len(NAMES)]}
            case "guest":
                return {GUEST}
            case "kill two":
                return {self.names[fault.who], self.names[(fault.who + 1) % len(self.names)]}
            case _:
                return {self.names[fault.who]}

    async def _carry_out(self, fault: Fault, hit: Sequence[str]) -> None:
        self.tell(f"{fault.kind} {' '.join(hit)}, {fault.lasts} s")
        try:
            match fault.kind:
                case "kill" | "kill two":
                    for name in hit:
                        self.pool.workers[name].kill()
                    await asyncio.sleep(fault.lasts)
                    await self._start(*hit)
                case "leave" | "hurry":
                    await self._leave(hit[0], 2 if fault.kind == "hurry" else 1)
                    await self._start(hit[0])
                case "guest" if GUEST in self.pool.workers:
                    await self._leave(GUEST, 1)
                    del self.pool.workers[GUEST]
                case "guest":
                    await self._start(GUEST)
                case "cut":
                    self.lanes[hit[0]].cut()
                case "hold":
                    self.lanes[hit[0]].flowing.clear()
                    await asyncio.sleep(fault.lasts)
                    self.lanes[hit[0]].flowing.set()
                case "kill controller" | "kill controllers":
                    for name in hit:
                        self.pool.controllers[name].kill()
                    await asyncio.sleep(fault.lasts)
                    for process in [self.pool.start_controller(name) for name in hit]:
                        await asyncio.to_thread(process.ready)
                case "stop" | "stop controller":
                    process = {**self.pool.workers, **self.pool.controllers}[hit[0]]
                    process.signal(signal.SIGSTOP)
                    await asyncio.sleep(fault.lasts)
                    process.signal(signal.SIGCONT)
        except Exception as defect:
            self.defects.append(f"{fault}: {type(defect).__name__}: {defect}")
        finally:
            self.down -= set(hit)

    async def _start(self, *names: str) -> None:
        for process in [self.pool.add_worker(name) for name in names]:
            await asyncio.to_thread(process.ready)

    async def _leave(self, name: str, times: int) -> None:
        process = self.pool.workers[name]
        for _ in range(times):
            process.signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
        code = await asyncio.to_thread(process.wait, END_SECONDS)
        if code:
            self.defects.append(f"{name} was told to end, and ended with {code}: {process.last_words[-500:]}")
