"""Prompts for whichever group has the slots for them to their ends: beside its next step, or alone where it idles.

Theory of operation. Groups stay as they are: none is stopped, moved or merged for a prompt, and a prompt goes to one
of them. (Batches that come to share an instance are one, and wait for its slowest for as long as they last.) An
instance that decodes reads its weights whatever else it does, so a prompt beside a step costs less than one alone; but
the batch waits for it. In one pass, those whom a second costs most first, each request has two choices:

- to begin now, where that costs all least, in seconds per token: it waits for what the group has in hand and for the
  prompts there, and all who are there wait for its own
- to wait for the group that will be empty first, behind those who chose that before, if it comes to that within half
  a minute

So the long are computed between the answers of the short while there is time for it, and beside them where there is
not. (In seconds per token it would pay to put them off further, they weigh so little. But then the last of the short
decode in small batches, and only the long are left, of which few fit at once: throughput falls by a tenth and more.)
A group with more in hand than a few steps takes nobody: by the time it could begin with him, all are asked anew.

One may go before all others, whatever it costs. Where no group has the slots for it now, those that come to have them
soonest take only who has ended by then: a reservation, as in backfilling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import inf

from infinillm.core.elastic.dispatching import suffices
from infinillm.core.elastic.narrowing import reserved
from infinillm.core.elastic.scaling import retention
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Decode, Instance, Plan, Prefill, State, Waiting, free

STEPS = 4  # of decode, after which the planner is asked anew while requests wait
PATIENCE = 30.0  # seconds that a request may come to wait for an empty group


def filled(plan: Plan, state: State, times: Times, first: Waiting | None) -> Plan:
    """The same plan, which must move and preempt nothing, with those of the queue that its groups have slots for."""
    begun = {seq for each in plan.prefills for seq in each.requests}
    rest = sorted((each for each in state.waiting if each.id not in begun), key=lightest_last)
    sides = tuple(_sides(plan, state, times))
    takers = [side for side in sides if not side.decode or side.busy <= STEPS * side.decode.seconds]
    if first in rest:
        rest.remove(first)
        if side := _cheapest(first, takers):
            side.add(first)
        elif takers:
            _reserve(first, takers)
    empty = [_Empty(side.ends, len(side.instances)) for side in sides] + [_Empty(state.soon, 1)]
    for request in rest:
        side = _cheapest(request, takers)
        now = side.price(request)[0] if side else inf
        later = min(empty, key=lambda each: each.after(request, times))
        seconds = later.after(request, times)
        if side is None or (later.seconds <= PATIENCE and seconds * request.weight < now):
            later.seconds = seconds
        else:
            side.add(request)
    decodes = tuple(side.decoding() for side in sides if side.decode)
    prefills = tuple(side.prefill() for side in sides if not side.decode and side.prompts)
    return replace(plan, decodes=decodes, prefills=plan.prefills + prefills)


def lightest_last(request: Waiting) -> tuple[float, float, str]:
    """Whom a second costs most, in seconds per token, goes first."""
    return -request.weight, request.arrived, request.id


@dataclass(slots=True)
class _Side:
    """A group, its batch if it decodes, and the prompts that it takes."""

    decode: Decode | None
    instances: Sequence[Instance]
    times: Times
    known: list[tuple[int, int]]  # output still to come, and tokens held, of all that are here
    weight: float  # theirs
    prompts: list[Waiting] = field(default_factory=list)
    tokens: int = 0
    squares: int = 0
    until: float = inf  # steps after which its slots are somebody else's
    slots: int = field(init=False)
    room: int = field(init=False)
    needed: int = field(init=False)

    def __post_init__(self) -> None:
        self.slots = free(self.instances) + sum(tokens for _, tokens in self.known)
        self.room = free(self.instances) - len(self.known)
        self.needed = sum(left + tokens for left, tokens in self.known)

    @property
    def busy(self) -> float:
        """Seconds until what they have in hand is over."""
        return max(each.busy for each in self.instances)

    @property
    def ends(self) -> float:
        """Seconds until nobody is here any more."""
        return self.busy + (self.decode.seconds * max(left for left, _ in self.known) if self.decode else 0.0)

    def fits(self, request: Waiting) -> bool:
        """Whether there are slots for all of them to their ends."""
        if request.tokens >= self.room or request.left > self.until:
            return False
        needed = self.needed + request.needed
        return needed <= self.slots or suffices(self.slots, [*self.known, (request.left, request.tokens)])

    def price(self, request: Waiting) -> tuple[float, float]:
        """What it costs all if one more begins, in seconds per token, and the share of slots that others need."""
        before = self.seconds(self.tokens, self.squares) if self.prompts else 0.0
        after = self.seconds(self.tokens + request.tokens, self.squares + request.tokens**2)
        return (self.busy + after) * request.weight + (after - before) * self.weight, self.needed / self.slots

    def seconds(self, tokens: int, squares: int) -> float:
        return self.times.on(len(self.instances), tokens, squares)

    def steps(self, request: Waiting) -> int:
        """Steps until those who end leave room for this request, or for as much of it as there can be."""
        wanted = min(request.needed, self.slots)
        room, steps = free(self.instances), 0
        for left, tokens in sorted(self.known):
            if room >= wanted:
                break
            room, steps = room + tokens + left, left
        return steps

    def add(self, request: Waiting) -> None:
        self.prompts.append(request)
        self.known.append((request.left, request.tokens))
        self.weight += request.weight
        self.tokens += request.tokens
        self.squares += request.tokens**2
        self.room -= request.tokens + 1
        self.needed += request.needed

    def decoding(self) -> Decode:
        """The decode with its prompts: their K/V on the fewest instances, beside the next tokens of the batch."""
        assert self.decode
        if not self.prompts:
            return self.decode
        rows = {master.instance: len(master.requests) for master in self.decode.masters}
        rooms = [replace(each, used=each.used + rows.get(each.id, 0)) for each in self.instances]
        fixed, each, _, _ = self.times.decode  # reading weights is in the prefill, too
        more = max(self.seconds(self.tokens, self.squares) - fixed - each * len(self.decode.requests), 0.0)
        return replace(self.decode, prompts=self._names, kept=retention(self.prompts, rooms), more=more)

    def prefill(self) -> Prefill:
        kept, seconds = retention(self.prompts, self.instances), self.seconds(self.tokens, self.squares)
        return Prefill(self._names, tuple(each.id for each in self.instances), kept, seconds)

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(each.id for each in self.prompts)


@dataclass(slots=True)
class _Empty:
    """A group of so many instances, and the seconds until it is empty and has nobody waiting for that."""

    seconds: float
    width: int

    def after(self, request: Waiting, times: Times) -> float:
        """Seconds until a prompt is computed then."""
        return self.seconds + times.on(self.width, request.tokens, request.tokens**2)


def _sides(plan: Plan, state: State, times: Times) -> Iterator[_Side]:
    """All that decode, and every instance that the plan leaves idle by itself."""
    busy = {name for each in plan.prefills for name in each.group}
    idle = {each.id: each for each in reserved(state.instances, plan.prefills) if each.id not in busy}
    for decode in plan.decodes:
        there = [state.running[seq] for seq in decode.requests]
        known, weight = [(each.left, each.tokens) for each in there], sum(each.weight for each in there)
        yield _Side(decode, [idle.pop(name) for name in decode.group], times, known, weight)
    for instance in idle.values():
        yield _Side(None, (instance,), times, [], 0.0)


def _cheapest(request: Waiting, sides: Sequence[_Side]) -> _Side | None:
    """Where a request begins at the least price, of those that have the slots."""
    return min((side for side in sides if side.fits(request)), key=lambda side: side.price(request), default=None)


def _reserve(request: Waiting, sides: Sequence[_Side]) -> None:
    """Slots that a request has soonest are kept for it from then on; if it takes several sides, of one place if any."""
    order = sorted(sides, key=lambda side: side.steps(request))
    places: dict[str, list[_Side]] = {}
    for side in order:
        places.setdefault(side.instances[0].place, []).append(side)
    able = [here for here in places.values() if sum(side.slots for side in here) >= request.needed] or [order]
    soonest = min((_first(here, request.needed) for here in able), key=lambda here: here[-1].steps(request))
    until = soonest[-1].steps(request)
    for side in soonest:
        side.until = until


def _first(sides: Sequence[_Side], slots: int) -> Sequence[_Side]:
    """As many of the first of them as have so many slots together; all, where that is not enough."""
    for count, found in enumerate(accumulate(side.slots for side in sides), 1):
        if found >= slots:
            return sides[:count]
    return sides
