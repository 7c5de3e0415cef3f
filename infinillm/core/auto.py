"""Our own planner: it makes a few plans, looks what would follow from each, and takes what costs all least.

Theory of operation. What brings most through is simple: batches stay apart, and whoever finds slots to his end is
begun, unless to wait for an empty group costs less (core/elastic/filling.py). What that lacks is width: a long prompt
alone on an idle cluster wants all instances, and some fit on none. That is what the elastic planner is for
(core/elastic/plan.py). So there are a few plans:

    apart    everybody goes on, and groups take those of the queue whom they have slots for
    wide     the same, once the elastic planner has had the instances that idle, of one place after the other
    elastic  its own plan, where somebody waits whom no instance could hold alone: it may preempt, move and merge
    eager    and as if all others had to decode for ever: it preempts wherever that lets the queue in

The links between places (servers) are slow. So the elastic planner is asked for one place at a time, and elsewhere all
goes on as in `apart`. Only where somebody waits whom no place could hold, it is asked for all of them together, too.
Prompts that it gives to several instances are computed by fewer of them, and the others only keep K/V, where that is
quicker (core/elastic/narrowing.py).

Each has a price in seconds per token, the same for all (`price`): what every known request has still to wait, by the
times of the planner, over the tokens it comes to have. Whoever a plan leaves waiting is taken to be begun as soon as a
group can begin with him: a rollout of the first plan. So no plan looks cheap for putting work off to a time that never
comes.

Seconds per token favour the short. So the oldest request, once it is `overdue`, goes before all others, and a plan that
begins it before plans that do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf

from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.dispatching import disjoint
from infinillm.core.elastic.filling import STEPS, filled, lightest_last
from infinillm.core.elastic.narrowing import narrowed
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Instance, Plan, Prefill, State, Waiting, by_place, free, slots
from infinillm.core.types import NodeId, SeqId

TOLD = 32  # requests of the queue that a plan is made for: more do not make it better, and it takes longer
EAGER = 1e6  # seconds, as good as for ever
OVERDUE = 10.0, 10  # seconds, and times its quickest prefill, that a request may be passed over


def plan(state: State, times: Times) -> Plan:
    """What every instance does next."""
    state = replace(state, waiting=_told(state.waiting))
    goes_on = elastic.plan(replace(state, waiting=()), times)
    if not state.waiting:
        return goes_on
    oldest = state.waiting[0]
    late = overdue(oldest, state.now, times)
    plans = [each for each in _plans(goes_on, state, times, oldest if late else None) if each.prefills or each.decodes]
    if late:
        plans = [each for each in plans if oldest.id in begun(each)] or plans
    return min(plans, key=lambda found: price(found, state, times), default=goes_on)


def _told(waiting: tuple[Waiting, ...]) -> tuple[Waiting, ...]:
    """Of a long queue the oldest and, of the rest, those whom a second costs most; oldest first."""
    queue = sorted(waiting, key=lambda each: (each.arrived, each.id))
    if len(queue) > TOLD:
        queue[TOLD // 2 :] = sorted(queue[TOLD // 2 :], key=lightest_last)[: TOLD // 2]
        queue.sort(key=lambda each: (each.arrived, each.id))
    return tuple(queue)


def _plans(goes_on: Plan, state: State, times: Times, first: Waiting | None) -> Iterator[Plan]:
    """The plans among which there is a choice; who is `first` goes before all others."""
    yield filled(goes_on, state, times, first)
    places = by_place(state.instances)
    most = max(state.largest, *map(slots, places)) if places else 0  # that a place could hold, were all of it there
    apart = any(each.needed > most for each in state.waiting)
    busy = {name for each in goes_on.decodes for name in each.group}
    if idle := tuple(each for each in state.instances if each.id not in busy):
        yield filled(replace(goes_on, prefills=_wide(by_place(idle), state, times)), state, times, first)
        if apart and len(places) > 1:
            yield filled(replace(goes_on, prefills=_wide([idle], state, times)), state, times, first)
    largest = max((each.slots for each in state.instances), default=0)
    if long := next((each for each in state.waiting if each.needed > largest), None):
        able = [here for here in places if slots(here) >= long.needed]
        here = state.instances if long.needed > most else max(able or places, key=free)
        yield _within(here, state, times, first)
        yield _within(here, replace(state, average_decode=EAGER), times, first, EAGER)


def _wide(places: Iterable[tuple[Instance, ...]], state: State, times: Times) -> tuple[Prefill, ...]:
    """What the elastic planner has the idle instances of one place after the other do."""
    waiting, found = state.waiting, list[Prefill]()
    for here in places:
        alone = replace(state, instances=here, batches=(), waiting=waiting)
        prefills = narrowed(elastic.plan(alone, times), alone, times).prefills
        known = {seq for each in prefills for seq in each.requests}
        waiting = tuple(each for each in waiting if each.id not in known)
        found += prefills
    return tuple(found)


def _within(
    here: tuple[Instance, ...], state: State, times: Times, first: Waiting | None, move: float | None = None
) -> Plan:
    """The elastic planner's plan for these instances, who is told that a move takes so long, and ours for the rest."""
    names = {each.id for each in here}
    batches = disjoint(state.batches)
    inside = tuple(each for each in batches if names.issuperset(each.group))
    outside = tuple(each for each in batches if not names.issuperset(each.group))
    names.difference_update(name for each in outside for name in each.group)
    there = replace(state, instances=tuple(each for each in here if each.id in names), batches=inside)
    found = narrowed(elastic.plan(there, times if move is None else replace(times, move=move)), there, times)
    if len(names) == len(state.instances):
        return found
    known = begun(found)
    waiting = tuple(each for each in state.waiting if each.id not in known)
    others = tuple(each for each in state.instances if each.id not in names)
    rest = replace(state, instances=others, batches=outside, waiting=())
    plan = filled(elastic.plan(rest, times), replace(rest, waiting=waiting), times, first)
    return replace(
        found,
        prefills=found.prefills + plan.prefills,
        decodes=found.decodes + plan.decodes,
        migrations=found.migrations + plan.migrations,
        preempted=found.preempted + plan.preempted,
        evicted=found.evicted + plan.evicted,
    )


def overdue(request: Waiting, now: float, times: Times) -> bool:
    """Whether it was passed over for long."""
    seconds, often = OVERDUE
    return now - request.arrived > seconds + often * times.quickest(times.widest, request.tokens, request.tokens**2)


def begun(plan: Plan) -> set[SeqId]:
    """Whose prompts it computes."""
    return {seq for each in plan.prefills for seq in each.requests} | {s for each in plan.decodes for s in each.prompts}


@dataclass(slots=True)
class _Group:
    """A group of so many instances that takes the next prompt in `free` seconds; whoever is there waits for it."""

    free: float
    width: int
    slots: int
    weight: float  # of those who are there, in seconds per token


def price(plan: Plan, state: State, times: Times) -> float:
    """What all requests have still to wait, in seconds per token of each, if the rest of the queue is begun next."""
    total, first, groups = _begun(plan, state, times)
    for request in sorted(state.waiting, key=lightest_last):
        if request.id in first:
            total += first[request.id] * request.weight
            continue
        tokens, squares = request.tokens, request.tokens**2
        ends = [
            (group.free + times.on(group.width, tokens, squares), at)
            for at, group in enumerate(groups)
            if group.slots >= request.needed
        ]
        if ends:
            end, at = min(ends)
            taken = groups[at : at + 1]
        else:  # it takes all of them
            taken = groups
            end = max((group.free for group in groups), default=0.0) + times.quickest(times.widest, tokens, squares)
        for group in taken:
            total += (end - group.free) * group.weight
            group.free = end
            group.weight += request.weight / len(taken)
        total += end * request.weight
    return total


def _begun(plan: Plan, state: State, times: Times) -> tuple[float, dict[SeqId, float], list[_Group]]:
    """What those wait who run; seconds to the first tokens of those it begins; and the groups then."""
    begins = {each.id: each.busy for each in state.instances}
    for _, source, target, tokens in plan.migrations:
        begins[source] += tokens * times.move
        begins[target] += tokens * times.move
    weights = {each.id: each.weight for each in state.waiting}
    total, stopped = _stopped(plan, state, times)
    first: dict[SeqId, float] = {}
    groups: list[_Group] = []
    instances = {each.id: each for each in state.instances}

    def group(names: tuple[NodeId, ...], seconds: float, weight: float) -> None:
        slots = sum(instances.pop(name).slots for name in names)
        groups.append(_Group(seconds, len(names), slots, weight))

    for decode in plan.decodes:
        delay = max(begins[name] for name in decode.group) + decode.more
        first |= dict.fromkeys(decode.prompts, delay + decode.seconds)
        there = [state.running[seq] for seq in decode.requests]
        total += sum((delay + decode.seconds * each.left) * each.weight for each in there)
        weight = sum(each.weight for each in there) + sum(weights[seq] for seq in decode.prompts)
        group(decode.group, delay + STEPS * decode.seconds, weight)
    for prefill in plan.prefills:
        seconds = max(begins[name] for name in prefill.group) + prefill.seconds
        first |= dict.fromkeys(prefill.requests, seconds)
        waits = sum(stopped.get(name, 0.0) for name in prefill.group)
        total += seconds * waits
        group(prefill.group, seconds, waits + sum(weights[seq] for seq in prefill.requests))
    for name in [*instances]:
        group((name,), begins[name], stopped.get(name, 0.0))
    if state.soon < inf:
        groups.append(_Group(state.soon, 1, max((each.slots for each in state.instances), default=0), 0.0))
    return total, first, groups


def _stopped(plan: Plan, state: State, times: Times) -> tuple[float, dict[NodeId, float]]:
    """What those who are preempted or evicted wait once they go on, and their weight by instance until then."""
    total = 0.0
    weights: dict[NodeId, float] = {}
    gone = {*plan.preempted, *plan.evicted}
    for batch in state.batches if gone else ():
        step = times.decode(max(len(batch.group), 1), len(batch.requests), batch.tokens)
        for each in (each for each in batch.requests if each.id in gone):
            again = times.alone(each.tokens) if each.id in plan.evicted else 0.0
            total += (again + step * each.left) * each.weight
            for name in each.held:
                weights[name] = weights.get(name, 0.0) + each.weight / len(each.held)
    return total, weights
