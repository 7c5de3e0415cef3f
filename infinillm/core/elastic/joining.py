"""Prompts computed beside a step of decode: which of those that wait, and beside whose batch.

Theory of operation. An instance that decodes reads its weights whatever else it does, so a prompt beside a step costs
less than one alone; the batch waits for it. In one pass over those that a plan leaves waiting, the shortest first, each
goes to the batch where that costs all least, in seconds per token: the batch and who joined it wait longer, and the
request waits for the step. Where it would cost more than to wait for an instance to come free, it waits. None joins a
batch that would then outgrow its group: batches that share instances become one, and all wait for the slowest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from infinillm.core.elastic.dispatching import largest, suffices
from infinillm.core.elastic.scaling import retention
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Decode, Instance, Plan, Running, State, Waiting, free
from infinillm.core.types import SeqId


def joined(plan: Plan, state: State, times: Times, soon: float, overdue: Collection[SeqId]) -> Plan:
    """The same plan, and whom of those that wait its decodes compute; an instance comes free `soon`, in seconds.

    Whoever is `overdue` goes first, oldest first, and whatever it costs.
    """
    taken = {seq for each in plan.prefills for seq in each.requests}
    rest = sorted((r for r in state.waiting if r.id not in taken), key=lambda r: (r.tokens, r.arrived, r.id))
    rest.sort(key=lambda r: (r.id not in overdue, r.arrived if r.id in overdue else 0.0))
    moved = {name for each in plan.migrations for name in (each.source, each.target)}
    instances = {each.id: each for each in state.instances}
    sides = [
        _Side(each, [instances[name] for name in each.group], [state.running[seq] for seq in each.requests], times)
        for each in plan.decodes
        if moved.isdisjoint(each.group)
    ]
    if not sides:
        return plan
    here = [(each.left, each.tokens) for each in state.running.values()]
    here += [(each.left, each.tokens) for each in state.waiting if each.id in taken]
    count = largest(lambda n: suffices(state.slots, [*here, *((r.left, r.tokens) for r in rest[:n])]), len(rest))
    for request in rest[:count]:
        price, at = min((side.price(request), at) for at, side in enumerate(sides))
        alone = (soon + times.alone(request.tokens)) * request.weight
        if price < (inf if request.id in overdue else alone):
            sides[at].add(request)
    found = {side.decode.requests: side.planned() for side in sides if side.prompts}
    return replace(plan, decodes=tuple(found.get(each.requests, each) for each in plan.decodes)) if found else plan


@dataclass(slots=True)
class _Side:
    """A batch that decodes, and who joins it."""

    decode: Decode
    instances: Sequence[Instance]
    requests: Sequence[Running]
    times: Times
    prompts: list[Waiting] = field(default_factory=list)
    tokens: int = 0
    squares: int = 0
    more: float = 0.0
    weight: float = 0.0
    room: int = 0
    slots: int = 0

    def __post_init__(self) -> None:
        self.weight = sum(each.weight for each in self.requests)
        self.room = free(self.instances) - len(self.requests)
        self.slots = free(self.instances) + sum(each.tokens for each in self.requests)

    def price(self, request: Waiting) -> float:
        """What it costs all, if one more joins; infinite where the batch would outgrow its group."""
        if request.tokens >= self.room or not self._holds(request):
            return inf
        more = self._more(self.tokens + request.tokens, self.squares + request.tokens**2)
        return (more - self.more) * self.weight + (self.decode.seconds + more) * request.weight

    def _holds(self, request: Waiting) -> bool:
        """Whether the group has slots for all of them to their ends."""
        known = [(each.left, each.tokens) for each in self.requests]
        return suffices(self.slots, [*known, *((each.left, each.tokens) for each in (*self.prompts, request))])

    def add(self, request: Waiting) -> None:
        self.prompts.append(request)
        self.tokens += request.tokens
        self.squares += request.tokens**2
        self.more = self._more(self.tokens, self.squares)
        self.weight += request.weight
        self.room -= request.tokens + 1

    def _more(self, tokens: int, squares: int) -> float:
        """Seconds that the step takes longer: reading weights is in both."""
        fixed, each, _, _ = self.times.decode
        dense = fixed + each * len(self.requests)
        width = min(len(self.instances), self.times.widest)
        return max(self.times.prefill[width - 1](tokens, squares) - dense, 0.0)

    def planned(self) -> Decode:
        """The decode with its prompts: their K/V on the fewest instances, beside the next tokens of the batch."""
        rows = {master.instance: len(master.requests) for master in self.decode.masters}
        rooms = [replace(each, used=each.used + rows.get(each.id, 0)) for each in self.instances]
        names: tuple[SeqId, ...] = tuple(each.id for each in self.prompts)
        return replace(self.decode, prompts=names, kept=retention(self.prompts, rooms), more=self.more)
