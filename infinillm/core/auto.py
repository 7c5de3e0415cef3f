"""Our own planner: it lets the elastic one plan several ways, and takes what costs all requests least.

Theory of operation. The steps of the elastic planner (core/elastic) each weigh one thing against another: a preemption
against the wait for the batch, a move against a wider prefill. What they never weigh is doing less: leaving an instance
to those who come, letting the quick prompts go first, so that a long one has all instances a moment later, working
apart. So the same steps are asked several times, of the state as it is and of altered ones:

    less      some idle instances are held back, for requests to come
    quick     only the quicker part of the queue is told of; the rest follow when its prefills end; eager or not
    apart     nobody works together: every prompt on one instance
    patient   nobody who decodes is preempted, and nothing moves
    eager     whoever decodes is preempted where that lets somebody in, and nothing moves

Each plan has a price in seconds per token, the same for all (`price`): what every known request still has to wait, by
the times of the planner, over the tokens it comes to have, and what quick ones to come would have to wait until an
instance is free. Who is left waiting waits until the planner is asked again, and then the shortest go first; where no
prefill is begun that would end, they preempt the batch where that costs least, or wait for an instance to come free.
The cheapest plan is carried out; of equal ones the first, which is the elastic planner's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp, inf
from typing import NamedTuple

from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Batch, Plan, State, Waiting
from infinillm.core.types import NodeId, SeqId

LATELY = 60.0  # seconds over which requests are counted that come
QUICK = (0.1, 1.0)  # seconds of a prefill on one instance: where the quicker part of a queue may end
TOLD = 32  # requests of the queue that a plan is made for: more do not make it better, and it takes longer
EAGER = 1e6  # seconds, as good as for ever


class Lately(NamedTuple):
    """What a second of waiting costs the quick requests that come in one, lately: seconds per token; and up to when."""

    cost: float
    at: float

    def by(self, now: float) -> float:
        return self.cost * exp((self.at - now) / LATELY)

    def come(self, now: float, tokens: int) -> Lately:
        """One more quick request, which comes to have so many tokens."""
        return Lately(self.by(now) + 1 / (tokens * LATELY), now)


def plan(state: State, times: Times) -> Plan:
    """What every instance does next."""
    plans: list[Plan] = []
    for altered, known in _altered(state, times):
        found = elastic.plan(altered, known)
        if found not in plans:
            plans.append(found)
    return min(plans, key=lambda found: price(found, state, times)) if len(plans) > 1 else plans[0]


def _altered(state: State, times: Times) -> Iterator[tuple[State, Times]]:
    """The state and the times as they are, and otherwise; of the queue the oldest are told of."""
    queue = sorted(state.waiting, key=lambda each: (each.arrived, each.id))
    parts = [tuple(part) for part in _quick(queue, times)]
    state = replace(state, waiting=tuple(queue[:TOLD]))
    yield state, times
    if not queue:
        return
    decoding = {name for batch in state.batches for name in batch.group}
    idle = sorted((e for e in state.instances if e.id not in decoding), key=lambda e: (-e.used, e.id))
    long = any(alone(each.tokens, times) > QUICK[0] for each in state.waiting)
    for less in {1, len(idle) // 2} if long else ():
        if 0 < less < len(idle):
            held = {each.id for each in idle[-less:]}
            yield replace(state, instances=tuple(e for e in state.instances if e.id not in held)), times
    for part in parts:
        yield replace(state, waiting=part), times
    if times.widest > 1 and len(idle) > 1:
        yield state, replace(times, prefill=times.prefill[:1])
    if state.batches:
        still = replace(times, move=EAGER)
        yield replace(state, average_decode=0.0), still
        yield replace(state, average_decode=EAGER), still
        for part in parts:
            yield replace(state, average_decode=EAGER, waiting=part), still


def _quick(queue: Sequence[Waiting], times: Times) -> Iterator[Sequence[Waiting]]:
    """Those who are quick, the oldest of them, where not all are."""
    for seconds in QUICK:
        found = [each for each in queue if alone(each.tokens, times) <= seconds]
        if 0 < len(found) < len(queue):
            yield found[:TOLD]


def alone(tokens: int, times: Times) -> float:
    """Seconds of a prompt on one instance."""
    return times.prefill[0](tokens, tokens**2)


def price(plan: Plan, state: State, times: Times) -> float:
    """What all requests would still have to wait, in seconds per token of each."""
    running = {each.id: each for batch in state.batches for each in batch.requests}
    moving = {each.id: 0.0 for each in state.instances}
    for _, source, target, tokens in plan.migrations:
        moving[source] += tokens * times.move
        moving[target] += tokens * times.move
    until: dict[NodeId, float] = {}  # seconds that an instance is in a prefill
    first: dict[SeqId, float] = {}  # seconds to a first token
    for prefill in plan.prefills:
        seconds = prefill.seconds + max(moving[name] for name in prefill.group)
        until |= dict.fromkeys(prefill.group, seconds)
        first |= dict.fromkeys(prefill.requests, seconds)
    total = state.coming * _free(plan, state, until) ** 2 / 2
    again = min([*until.values(), *(elastic.STEPS * each.seconds for each in plan.decodes)], default=inf)
    for request in state.waiting:
        total += first.get(request.id, 0.0) / (request.tokens + request.left)
    later = [each for each in state.waiting if each.id not in first]
    total += _later(later, again, state, times, preempting=not until)
    for decode in plan.decodes:
        delay = max(moving[name] for name in decode.group)
        for each in (running[seq] for seq in decode.requests):
            total += (delay + decode.seconds * each.left) / (each.tokens + each.left)
    gone = {*plan.preempted, *plan.evicted}
    for batch in state.batches if gone else ():
        step = times.decode(max(len(batch.group), 1), len(batch.requests), batch.tokens)
        for each in (each for each in batch.requests if each.id in gone):
            delay = max((until.get(name, 0.0) for name in each.held), default=0.0)
            if each.id in plan.evicted:
                delay += times.prefill[0](each.tokens, each.tokens**2)
            total += (delay + step * each.left) / (each.tokens + each.left)
    return total


def _later(requests: Sequence[Waiting], again: float, state: State, times: Times, *, preempting: bool) -> float:
    """The price of those who wait until somebody plans `again`, or until an instance comes free by itself."""
    steps = [(times.decode(len(each.group), len(each.requests), each.tokens), each) for each in state.batches]
    ends = [seconds * max(r.left for r in each.requests) for seconds, each in steps]
    wait = min([state.soon, *ends], default=again) if preempting else again
    total, tokens, squares = 0.0, 0, 0
    for each in sorted(requests, key=lambda each: each.tokens):
        tokens, squares = tokens + each.tokens, squares + each.tokens**2
        total += (wait + times.quickest(times.widest, tokens, squares)) / (each.tokens + each.left)
    if preempting and state.batches:
        seconds = again + times.quickest(1, tokens, squares)
        together = seconds * sum(1 / (each.tokens + each.left) for each in requests)
        total = min(total, together + (seconds - again) * min(map(_weight, state.batches)))
    return total if requests else 0.0


def _weight(batch: Batch) -> float:
    """What a second costs a batch, in seconds per token."""
    return sum(1 / (each.tokens + each.left) for each in batch.requests)


def _free(plan: Plan, state: State, until: dict[NodeId, float]) -> float:
    """Seconds until an instance could be given to somebody else: none where one is idle, a step where one decodes."""
    decoding = {name for each in plan.decodes for name in each.group}
    if any(each.id not in until and each.id not in decoding and each.free for each in state.instances):
        return 0.0
    steps = [each.seconds for each in plan.decodes]
    return min([*steps, *until.values()], default=0.0)
