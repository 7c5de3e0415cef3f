"""Our own planner: it lets the elastic one plan several ways, adds prompts to steps, and takes what costs all least.

Theory of operation. The steps of the elastic planner (core/elastic) each weigh one thing against another: a preemption
against the wait for the batch, a move against a wider prefill. What they never weigh is doing less. So the same steps
are asked several times, of the state as it is and of altered ones:

    all      the queue as it is
    none     nobody is prefilled on instances of their own, and all others go on as they are
    quick    only the quicker part of the queue is told of, and preempts where that lets it in; nothing moves

and each of these plans counts twice: as it is, and with prompts that it leaves waiting computed beside the steps of
those who decode (core/elastic/joining.py), as chunked prefill does. Each has a price in seconds per token, the same for
all (`price`): what every known request still has to wait, by the times of the planner, over the tokens it comes to
have. Who is left waiting waits for instances to come free, those of a prefill or of a batch at its end, and then the
shortest go first; or until they preempt a batch, where that costs less. The cheapest plan is carried out; of equal ones
the first, which is the elastic planner's own.

Seconds per token favour the short. So of plans that begin the oldest request, once that is `overdue`, the cheapest is
carried out; and whoever is overdue is computed beside a step whatever it costs. With a queue that long, nobody is
preempted for quick prompts alone, if they can be begun without: whoever lies still keeps his slots for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.joining import joined
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Plan, State, Waiting
from infinillm.core.types import NodeId, SeqId

QUICK = (0.1, 1.0)  # seconds of a prefill on one instance: where the quicker part of a queue may end
STEPS = 4  # of decode, after which it is asked anew while requests wait
TOLD = 32  # requests of the queue that a plan is made for: more do not make it better, and it takes longer
EAGER = 1e6  # seconds, as good as for ever
OVERDUE = 10.0, 10  # seconds, and times its quickest prefill, that a request may be passed over


def plan(state: State, times: Times) -> Plan:
    """What every instance does next."""
    state = replace(state, waiting=tuple(sorted(state.waiting, key=lambda each: (each.arrived, each.id))[:TOLD]))
    late = {each.id for each in state.waiting if overdue(each, state.now, times)}
    plans: list[Plan] = []
    for altered, known in _altered(state, times):
        found = elastic.plan(altered, known)
        plans.append(found)
        if state.waiting:
            soon = min(seconds for seconds, _ in _freed(found, state))
            if (beside := joined(found, state, times, soon, late)) is not found:
                plans.append(beside)
    if state.waiting and state.waiting[0].id in late:
        plans = [each for each in plans if state.waiting[0].id in begun(each)] or plans
        quick = {each.id for each in state.waiting if times.alone(each.tokens) <= QUICK[0]}
        plans = [each for each in plans if not (each.preempted and begun(each) <= quick)] or plans
    return min(plans, key=lambda found: price(found, state, times)) if len(plans) > 1 else plans[0]


def _altered(state: State, times: Times) -> Iterator[tuple[State, Times]]:
    """The state and the times as they are, and otherwise."""
    yield state, times
    if state.batches and state.waiting:
        still = replace(times, move=EAGER)
        yield replace(state, waiting=()), still
        for seconds in QUICK:
            quick = tuple(each for each in state.waiting if times.alone(each.tokens) <= seconds)
            if 0 < len(quick) < len(state.waiting):
                yield replace(state, average_decode=EAGER, waiting=quick), still


def overdue(request: Waiting, now: float, times: Times) -> bool:
    """Whether it was passed over for long."""
    seconds, often = OVERDUE
    return now - request.arrived > seconds + often * times.quickest(times.widest, request.tokens, request.tokens**2)


def begun(plan: Plan) -> set[SeqId]:
    """Whose prompts it computes."""
    return {seq for each in plan.prefills for seq in each.requests} | {s for each in plan.decodes for s in each.prompts}


def price(plan: Plan, state: State, times: Times) -> float:
    """What all requests would still have to wait, in seconds per token of each."""
    moving = {each.id: 0.0 for each in state.instances}
    for _, source, target, tokens in plan.migrations:
        moving[source] += tokens * times.move
        moving[target] += tokens * times.move
    until: dict[NodeId, float] = {}  # seconds that an instance is in a prefill
    first: dict[SeqId, float] = {}  # seconds to a first token
    for decode in plan.decodes:
        seconds = max(moving[name] for name in decode.group) + decode.seconds + decode.more
        first |= dict.fromkeys(decode.prompts, seconds)
    for prefill in plan.prefills:
        seconds = prefill.seconds + max(moving[name] for name in prefill.group)
        until |= dict.fromkeys(prefill.group, seconds)
        first |= dict.fromkeys(prefill.requests, seconds)
    total = 0.0
    again = min([*until.values(), *(STEPS * each.seconds + each.more for each in plan.decodes)], default=inf)
    for request in state.waiting:
        total += first.get(request.id, 0.0) * request.weight
    later = [each for each in state.waiting if each.id not in first]
    total += _later(later, plan, again, state, times)
    for decode in plan.decodes:
        delay = max(moving[name] for name in decode.group)
        for each in (state.running[seq] for seq in decode.requests):
            total += (delay + decode.more + decode.seconds * each.left) * each.weight
    gone = {*plan.preempted, *plan.evicted}
    for batch in state.batches if gone else ():
        step = times.decode(max(len(batch.group), 1), len(batch.requests), batch.tokens)
        for each in (each for each in batch.requests if each.id in gone):
            delay = max((until.get(name, 0.0) for name in each.held), default=0.0)
            if each.id in plan.evicted:
                delay += times.alone(each.tokens)
            total += (delay + step * each.left) * each.weight
    return total


def _later(requests: Sequence[Waiting], plan: Plan, again: float, state: State, times: Times) -> float:
    """The price of those who wait: for instances that nobody uses any more, or until they preempt a batch.

    The shortest are prefilled first; a batch that is preempted waits for all of them.
    """
    if not requests:
        return 0.0
    weights = tokens = squares = weighted = weighted_squares = 0.0
    for each in sorted(requests, key=lambda each: each.tokens):
        one = each.weight
        tokens, squares, weights = tokens + each.tokens, squares + each.tokens**2, weights + one
        weighted, weighted_squares = weighted + tokens * one, weighted_squares + squares * one
    price = inf
    for seconds, width in _freed(plan, state):
        first = min(a * weights + b * weighted + c * weighted_squares for a, b, c in times.prefill[:width])
        price = min(price, seconds * weights + first)
    for batch in state.batches:
        seconds = times.quickest(max(len(batch.group), 1), tokens, squares)
        price = min(price, (again + seconds) * weights + seconds * batch.weight)
    return price


def _freed(plan: Plan, state: State) -> Iterator[tuple[float, int]]:
    """When instances come free, in seconds, and how many at once."""
    for prefill in plan.prefills:
        yield prefill.seconds, len(prefill.group)
    for decode in plan.decodes:
        left = max(state.running[seq].left for seq in decode.requests)
        yield decode.more + decode.seconds * left, len(decode.group)
    yield state.soon, 1
