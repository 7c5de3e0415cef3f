"""Which of several controllers leads: a lease, written on a slate that all of them can reach.

Theory of operation. A slate holds one record: who leads, with which epoch, and for how many seconds a writing is good.
It can be read, and written on condition that nobody wrote since. The leader writes every fifth of that time, which
renews its lease. No two clocks are compared: who has seen one and the same writing for as long as it is good, by its
own clock, may write itself in, with a larger epoch. The leader counts from the moment before it wrote, and allows
itself a fifth less, so it has stopped before anybody else can begin. One that was stopped itself may not know; but
others know its epoch for an old one.

    hold      the record is ours, of the epoch we hold       written again: renewed
              it is ours, nobody's, or has lapsed            written with a new epoch: ours
              it is somebody else's                          they lead
    give_up   it is ours                                     written as nobody's

A new epoch is larger than the record's and than any we have heard of. It is no less than the clock in milliseconds,
so that epochs go on growing where the slate was lost, or where there was none before.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

from infinillm.errors import BadRequest, InfinillmError
from infinillm.servers.slates import EtcdSlate, FileSlate, KubernetesSlate, Record, Slate
from infinillm.telemetry import log

MOST_PAUSE = 1.0  # seconds between two looks at who leads
GIVE_UP_SECONDS = 1.0
BEATS = 5  # of a leader, in the time its lease is good
KINDS = "file:/PATH, etcd://HOST:PORT,HOST:PORT/KEY or kubernetes:NAMESPACE/NAME"


class Term(NamedTuple):
    """Who leads, by the last look, and with which epoch."""

    leader: str
    epoch: int
    ours: bool


class Lease(Protocol):
    """How a controller comes to lead, and stays the leader. Raises Unavailable where that cannot be told now."""

    seconds: float  # a term is good for; infinity: until it is given up

    async def hold(self, epoch: int, heard: int) -> Term:
        """Renew our term of that epoch or, with 0, begin one, above `heard`, if nobody else leads."""
        ...

    async def give_up(self) -> None:
        """Let somebody else lead, at once."""
        ...

    async def close(self) -> None: ...


def next_epoch(*before: int) -> int:
    return max(time.time_ns() // 1_000_000, *(each + 1 for each in before))


class Alone:
    """The lease of a controller that has no other beside it."""

    seconds = math.inf

    def __init__(self, name: str):
        self.name = name

    async def hold(self, epoch: int, heard: int) -> Term:
        return Term(self.name, epoch or next_epoch(heard), ours=True)

    async def give_up(self) -> None:
        pass

    async def close(self) -> None:
        pass


class Shared:
    """The lease of one of several controllers. See the theory of operation above.

    name   how others call this controller; a random word makes it another one after each start
    clock  monotonic, in seconds
    """

    def __init__(self, slate: Slate, name: str, seconds: float, clock: Callable[[], float]):
        self.slate, self.seconds, self.clock = slate, seconds, clock
        self.holder = f"{name}_{secrets.token_hex(4)}"
        self.looked: tuple[str, float] | None = None  # a version of the record, and since when we know it

    async def hold(self, epoch: int, heard: int) -> Term:
        record, version = await self.slate.read()
        lapsed = self._lapsed(record, version)
        ours = record.holder == self.holder
        if ours and record.epoch == epoch:
            wanted = replace(record, seconds=self.seconds)
        elif ours or not record.holder or lapsed:
            wanted = Record(self.holder, next_epoch(record.epoch, heard), self.seconds, record.terms + 1)
        else:
            return _term(record, ours=False)
        if await self.slate.write(wanted, version):
            return _term(wanted, ours=True)
        record, version = await self.slate.read()  # somebody was faster, or an earlier writing of ours was late
        self._lapsed(record, version)
        return _term(record, ours=record.holder == self.holder and record.epoch == epoch)

    def _lapsed(self, record: Record, version: str) -> bool:
        now = self.clock()  # after the answer: what we looked at was written before
        if self.looked is None or self.looked[0] != version:
            self.looked = (version, now)
        return now - self.looked[1] >= record.seconds

    async def give_up(self) -> None:
        record, version = await self.slate.read()
        if record.holder == self.holder:
            await self.slate.write(replace(record, holder=""), version)

    async def close(self) -> None:
        await self.slate.close()


class Candidate(Protocol):
    """A controller that leads while it may: until a moment of the clock, which is put off as the lease is renewed."""

    seen: int  # the largest epoch anybody spoke of

    @property
    def leads(self) -> bool: ...

    @property
    def epoch(self) -> int:
        """Of its present term, or its last."""
        ...

    def lead(self, epoch: int, until: float) -> None: ...

    def stand_by(self, leader: str) -> None: ...


class Campaign:
    """One controller's part in the question who leads, from the first look to the last."""

    def __init__(self, lease: Lease, candidate: Candidate, clock: Callable[[], float]):
        self.lease, self.candidate, self.clock = lease, candidate, clock
        self.failed = False

    async def look(self) -> None:
        """Renew our term, begin one, or see who leads. Where none of that can be done our term ends by itself."""
        candidate, began = self.candidate, self.clock()
        held = candidate.epoch if candidate.leads else 0
        try:
            term = await self.lease.hold(held, candidate.seen)
        except InfinillmError as error:
            if not self.failed:
                log("lease_failed", reason=error.message)
            self.failed = True
            return
        self.failed = False
        if not term.ours:
            candidate.stand_by(term.leader)
        elif term.epoch != held or candidate.leads:  # else it was renewed too late: the next look begins another
            candidate.lead(term.epoch, began + self.lease.seconds * (BEATS - 1) / BEATS)

    async def run(self, over: asyncio.Event) -> None:
        """Until then; our term, if it is ours, ends with it."""
        waiting = asyncio.ensure_future(over.wait())
        while not waiting.done():
            await self.look()
            await asyncio.wait([waiting], timeout=min(self.lease.seconds / BEATS, MOST_PAUSE))
        self.candidate.stand_by("")
        try:
            await asyncio.wait_for(self.lease.give_up(), GIVE_UP_SECONDS)
        except (InfinillmError, asyncio.TimeoutError) as error:
            log("lease_failed", reason=f"it was not given up, and lapses: {error}")
        await self.lease.close()


def _term(record: Record, *, ours: bool) -> Term:
    return Term(record.holder.rpartition("_")[0], record.epoch, ours)


def lease(where: str, name: str, seconds: float, clock: Callable[[], float]) -> Lease:
    """The lease that a setting speaks of; empty: none is shared. Raises BadRequest."""
    if not where:
        return Alone(name)
    kind, _, rest = where.partition(":")
    patience = seconds / BEATS  # of one call to the slate
    match kind:
        case "file" if rest:
            return Shared(FileSlate(rest, patience), name, seconds, clock)
        case "etcd" if rest.startswith("//"):
            hosts, _, key = rest.removeprefix("//").partition("/")
            if hosts and all(hosts.split(",")) and key:
                return Shared(EtcdSlate(hosts.split(","), key, patience), name, seconds, clock)
        case "kubernetes":
            namespace, _, its = rest.partition("/")
            if namespace and its and "/" not in its:
                return Shared(KubernetesSlate(namespace, its, patience), name, seconds, clock)
    raise BadRequest(f"--lease must be {KINDS}, not {where!r}", field="lease")
