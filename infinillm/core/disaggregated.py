"""Prefill and decode on instances of their own, as in DistServe: who prefills what, and where its K/V is written.

Theory of operation. Some instances only prefill, each a batch of its own, first come first served; a batch ends at the
tipping point, where more prompts would only wait for each other. K/V is written to the instance where its request will
decode: the roomiest, and only where no eviction is to be expected, were every output as long as it may get. So it
needs no move afterwards. (DistServe's decoding instances pull it, and what waits to be pulled lies where it was
computed; here a prompt waits for room before it is computed.) Each of the others decodes what it has, and nobody works
together. How many do what is not decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from infinillm.core.elastic.dispatching import peak
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Decode, Instance, Kept, Master, Plan, Prefill, Running, State, Waiting
from infinillm.core.types import NodeId, SeqId


def plan(prefilling: Collection[NodeId], state: State, times: Times) -> Plan:
    """What every instance does next."""
    running: dict[NodeId, list[Running]] = {e.id: [] for e in state.instances if e.id not in prefilling}
    for each in sorted((r for batch in state.batches for r in batch.requests), key=lambda r: (r.arrived, r.id)):
        (place,) = each.held
        running[place].append(each)
    homes = [_Home(e, running[e.id]) for e in state.instances if e.id in running]
    evicted = tuple(seq for home in homes for seq in home.evict())
    decodes = tuple(home.decode(times) for home in homes if home.running)
    idle = [_Queue(e.id, [], 0, 0) for e in state.instances if e.id in prefilling]
    kept: dict[SeqId, Kept] = {}
    waiting = sorted(state.waiting, key=lambda each: (each.arrived, each.id)) if idle and not evicted else []
    for request in waiting:
        queue = min(idle, key=lambda queue: queue.seconds(times))
        home = max(homes, key=lambda home: home.room)
        if not queue.takes(request, times) or not home.takes(request):
            break
        queue.add(request)
        home.add(request)
        kept[request.id] = Kept(home.instance.id, request.id, 0, request.tokens)
    return Plan(tuple(queue.prefill(kept, times) for queue in idle if queue.requests), decodes, (), (), evicted)


def longest(prefilling: Collection[NodeId], instances: Sequence[Instance], times: Times) -> int:
    """Tokens of the longest request: what one instance that decodes can hold, where one prefills."""
    if not any(each.id in prefilling for each in instances):
        return 0
    return max((each.slots for each in instances if each.id not in prefilling), default=0)


@dataclass(slots=True)
class _Queue:
    """What one instance is to prefill, in one batch."""

    id: NodeId
    requests: list[Waiting]
    tokens: int
    squares: int

    def seconds(self, times: Times) -> float:
        return times.prefill[0](self.tokens, self.squares) if self.requests else 0.0

    def takes(self, request: Waiting, times: Times) -> bool:
        n = request.tokens
        return not self.requests or times.prefill[0](self.tokens + n, self.squares + n * n) <= times.tipping

    def add(self, request: Waiting) -> None:
        self.requests.append(request)
        self.tokens += request.tokens
        self.squares += request.tokens**2

    def prefill(self, kept: dict[SeqId, Kept], times: Times) -> Prefill:
        names = tuple(each.id for each in self.requests)
        return Prefill(names, (self.id,), tuple(kept[name] for name in names), self.seconds(times))


class _Home:
    """An instance that decodes: who runs there, oldest first, and who will."""

    def __init__(self, instance: Instance, running: list[Running]):
        self.instance, self.running = instance, running
        self.coming: list[tuple[int, int]] = []  # output still to come, tokens
        self.free = instance.free
        self.room = instance.free - sum(each.left for each in running)  # were all outputs as long as they may get

    def evict(self) -> list[SeqId]:
        """Who has to go, newest first, until each of the rest has a slot for its next token."""
        gone: list[SeqId] = []
        while len(self.running) > self.free:
            last = self.running.pop()
            self.free += last.tokens
            gone.append(last.id)
        return gone

    def takes(self, request: Waiting) -> bool:
        """Whether no eviction is to be expected."""
        known = [(each.left, each.tokens) for each in self.running]
        others = self.instance.slots - self.free - sum(tokens for _, tokens in (*known, *self.coming))
        return peak([*known, *self.coming, (request.left, request.tokens)]) + others <= self.instance.slots

    def add(self, request: Waiting) -> None:
        self.coming.append((request.left, request.tokens))
        self.free -= request.tokens
        self.room -= request.tokens + request.left

    def decode(self, times: Times) -> Decode:
        names, place = tuple(each.id for each in self.running), self.instance.id
        seconds = times.decode(1, len(names), sum(each.tokens for each in self.running))
        return Decode(names, (place,), (Master(place, names),), seconds)
