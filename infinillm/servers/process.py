"""What every server process does alike: it says what it loads and that it is ready, and ends when told or failed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Iterable

from infinillm.telemetry import log

TOLD_BY = signal.SIGTERM, signal.SIGINT


class Told:
    """SIGTERM and SIGINT, as events of the running loop: `once` to end, `again` to hurry."""

    def __init__(self) -> None:
        self.once, self.again = asyncio.Event(), asyncio.Event()
        for number in TOLD_BY:
            asyncio.get_running_loop().add_signal_handler(number, self._hear)

    def _hear(self) -> None:
        (self.again if self.once.is_set() else self.once).set()

    async def or_ended(self, tasks: Iterable[asyncio.Task[None]]) -> BaseException | None:
        """Wait until told once, or until one of the tasks has ended; returns what it raised."""
        told = asyncio.create_task(self.once.wait())
        done, _ = await asyncio.wait({told, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        failures = (task.exception() for task in done if not task.cancelled())
        return next((failure for failure in failures if failure is not None), None)


async def to_its_end(server: Awaitable[None]) -> None:
    """Run it. Who is told to hurry when he is done ends as if he were not: with the loop, its signals would kill."""
    try:
        await server
    finally:
        for number in TOLD_BY:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def say(what: str, share: float) -> None:
    """A Progress that logs the beginning and the end of what is slow."""
    if share in (0.0, 1.0):
        log("loading", what=what, done=share)


def ready(process: str, **facts: str) -> None:
    """The one line on stdout: who is ready, and where."""
    print(json.dumps({"ready": process, **facts}), flush=True)
