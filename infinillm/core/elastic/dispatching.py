"""Steps 1 and 2: who of the queue is prefilled next, and which instances that takes from requests that decode.

Theory of operation. The queue is taken in order of arrival, as far as three conditions hold (LoongServe, section
5.1): the inputs fit the free slots; no eviction is to be expected, were every output as long as it may get (`peak`);
and the prefill, unless of one request, stays under the tipping point. Idle instances come first. Where the queue is
longer than they can take, two things may help, each weighed against it:

- to empty the least used instance that decodes, moving its K/V to others that decode. That pays where the time until
  its batch would have ended is longer than the move. (The released code counts on this in step 1; the price is ours.)
- to preempt a batch, most unused slots first, admitting R' of the queue besides R:

    gain (2) = sum over R' of (average time of decoding - the least that one of the batch has decoded)+ / input length
    cost (1) = sum over the batch of T(R u R', all those instances) / output so far

Step 2 (5.2) goes on emptying instances, as long as what the prefill gains (3) is more than the move costs (4). In
both, each request counts by 1 / input length, so these cancel, and seconds are compared with seconds.

T of a set on some instances is that of one batch, at the best degree of parallelism. Requests that go on decoding
come first (ours): as many idle instances stay theirs as their next tokens need, and none is taken that they cannot do
without. The released code takes first and gives back after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from infinillm.core.elastic.scaling import fullest
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Batch, Instance, Migration, Running, State, Waiting, free
from infinillm.core.types import NodeId


@dataclass(frozen=True, slots=True)
class Sides:
    """Who prefills and who decodes. `kept`: idle instances that the next tokens need; `preempted` batches wait."""

    instances: Mapping[NodeId, Instance]
    prefill: tuple[NodeId, ...]
    kept: tuple[NodeId, ...]
    decode: tuple[Batch, ...]
    preempted: tuple[Batch, ...]
    migrations: tuple[Migration, ...]

    def of(self, names: Iterable[NodeId]) -> tuple[Instance, ...]:
        return tuple(self.instances[name] for name in names)

    @property
    def slack(self) -> int:
        """Slots free beyond one for the next token of each request that goes on decoding."""
        names = {*self.kept, *(name for each in self.decode for name in each.group)}
        return free(self.of(names)) - sum(len(each.requests) for each in self.decode)


def sides(state: State) -> Sides:
    """Idle instances prefill, but for those without which decoding cannot go on."""
    decode = disjoint(state.batches)
    busy = {name for each in decode for name in each.group}
    idle = sorted((e for e in state.instances if e.id not in busy), key=lambda e: (-e.free, e.id))
    names = tuple(each.id for each in idle)
    found = Sides({e.id: e for e in state.instances}, names, (), decode, (), ())
    while found.slack < 0 and found.prefill:
        found = replace(found, kept=(*found.kept, found.prefill[0]), prefill=found.prefill[1:])
    return found


def disjoint(batches: Iterable[Batch]) -> tuple[Batch, ...]:
    """Batches that share an instance are one."""
    found: list[Batch] = []
    for each in batches:
        group = set(each.group)
        meets = [other for other in found if group & set(other.group)]
        found = [other for other in found if other not in meets]
        found.append(Batch(tuple(r for batch in (*meets, each) for r in batch.requests)))
    return tuple(found)


def dispatched(state: State, start: Sides, times: Times) -> tuple[tuple[Waiting, ...], Sides]:
    """Step 1: the requests to prefill, first come first served, and the sides then."""
    queue = _Queue(state, times)
    here = start
    count = queue.longest(here)
    while count < len(queue.waiting) and (least := least_used(here)):
        wait = state.average_decode - min(each.seconds for each in least.batch.requests)
        if wait <= least.tokens * times.move:
            break
        after = emptied(here, least)
        reached = queue.longest(after)
        if reached == count:
            break
        here, count = after, reached
    for batch in sorted(here.decode, key=lambda each: -free(here.of(each.group))):
        after = preempt(here, batch)
        if count < len(queue.waiting) and (after.slack >= 0 or not after.decode):
            wait = max(state.average_decode - min(each.seconds for each in batch.requests), 0.0)
            slowed = sum(1 / max(each.produced, 1) for each in batch.requests)
            pays = [
                reached
                for reached in range(count + 1, queue.longest(after) + 1)
                if wait * (queue.inverse[reached] - queue.inverse[count]) > queue.seconds(reached, after) * slowed
            ]
            if pays:
                here, count = after, pays[-1]
    return (queue.waiting[:count], here) if count else ((), start)


def allocated(requests: Sequence[Waiting], start: Sides, times: Times) -> Sides:
    """Step 2: the sides once all instances that are worth emptying for these requests are."""
    tokens = sum(each.tokens for each in requests)
    squares = sum(each.tokens**2 for each in requests)
    here = start
    while here.prefill and (least := least_used(here)):
        seconds, widened = (times.quickest(len(here.prefill) + one, tokens, squares) for one in (0, 1))
        if seconds - widened <= least.tokens * times.move:
            break
        here = emptied(here, least)
    return here


class _Queue:
    """The requests that wait, oldest first, with the sums of what comes before each."""

    def __init__(self, state: State, times: Times):
        self.times = times
        self.waiting = tuple(sorted(state.waiting, key=lambda each: (each.arrived, each.id)))
        self.tokens = [0, *accumulate(each.tokens for each in self.waiting)]
        self.squares = [0, *accumulate(each.tokens**2 for each in self.waiting)]
        self.inverse = [0.0, *accumulate(1 / each.tokens for each in self.waiting)]
        self.running = [(each.left, each.tokens) for each in state.running.values()]
        self.slots = state.slots

    def seconds(self, count: int, on: Sides) -> float:
        """T of the first so many."""
        return self.times.quickest(len(on.prefill), self.tokens[count], self.squares[count])

    def longest(self, on: Sides) -> int:
        """How many of the queue these instances can take."""
        room = free(on.of(on.prefill))

        def fits(count: int) -> bool:
            if self.tokens[count] > room or (count > 1 and self.seconds(count, on) > self.times.tipping):
                return False
            return suffices(self.slots, [*self.running, *((r.left, r.tokens) for r in self.waiting[:count])])

        return largest(fits, len(self.waiting)) if on.prefill else 0


def peak(requests: Iterable[tuple[int, int]]) -> int:
    """The most slots that requests of (output still to come, tokens held) need at once; each leaves at its end."""
    most = held = 0
    for count, (left, tokens) in enumerate(sorted(requests, reverse=True), 1):
        held += tokens
        most = max(most, left * count + held)
    return most


def suffices(slots: int, requests: Sequence[tuple[int, int]]) -> bool:
    """Whether so many slots are enough for requests of (output still to come, tokens held)."""
    return sum(left + tokens for left, tokens in requests) <= slots or peak(requests) <= slots


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count that fits, of at most so many, where less always fits too; 0 needs no proof."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def preempt(before: Sides, batch: Batch) -> Sides:
    """A batch waits, and its instances prefill."""
    return replace(
        before,
        prefill=(*before.prefill, *batch.group),
        decode=tuple(each for each in before.decode if each != batch),
        preempted=(*before.preempted, batch),
    )


class Least(NamedTuple):
    """The least used instance that decodes, its batch, how many tokens of that it has, and who else decodes."""

    instance: NodeId
    batch: Batch
    tokens: int
    others: tuple[Instance, ...]


def least_used(before: Sides) -> Least | None:
    """The instance that costs least to empty; None where others that decode lack the room."""
    held: dict[NodeId, int] = {}
    owner: dict[NodeId, Batch] = {}
    for batch in before.decode:
        for name in batch.group:
            owner[name] = batch
            held[name] = sum(each.held.get(name, 0) for each in batch.requests)
    if len(held) < 2:
        return None
    source = min(held, key=lambda name: (held[name], name))
    batch, tokens = owner[source], held[source]
    others = before.of(name for name in held if name != source)
    if tokens + sum(len(each.requests) for each in before.decode) > free(others):
        return None
    return Least(source, batch, tokens, others)


def emptied(before: Sides, least: Least) -> Sides:
    """That instance joins the prefill, its K/V gone to others.

    Those of the same group come first, as batches that share an instance become one; then the fullest.
    """
    source, batch, _, found = least
    others = sorted(fullest(found), key=lambda each: each.id not in batch.group)
    room = {each.id: each.free for each in others}
    moved: list[Migration] = []
    requests: list[Running] = []
    for each in batch.requests:
        places = dict(each.held)
        left = places.pop(source, 0)
        for target, there in room.items():
            if take := min(left, there):
                moved.append(Migration(each.id, source, target, take))
                places[target] = places.get(target, 0) + take
                room[target], left = there - take, left - take
        requests.append(replace(each, held=places))
    instances = dict(before.instances)
    for name, target, count in ((m.source, m.target, m.tokens) for m in moved):
        instances[name] = replace(instances[name], used=instances[name].used - count)
        instances[target] = replace(instances[target], used=instances[target].used + count)
    rest = tuple(each for each in before.decode if each != batch)
    return replace(
        before,
        instances=instances,
        prefill=(*before.prefill, source),
        decode=disjoint((*rest, Batch(tuple(requests)))),
        migrations=(*before.migrations, *moved),
    )
