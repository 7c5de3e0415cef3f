"""The elastic planner: LoongServe's four steps, put together for one macro-iteration.

Theory of operation. A macro-iteration is one prefill of every new batch beside some steps of decode. Each time the
planner is told who is there and decides anew who works on what; weights never move, and K/V hardly ever:

1. dispatching: who of the queue is prefilled (dispatching.py)
2. allocation: on which instances, at whose cost (dispatching.py)
3. batching: which of them together, at which degree of parallelism (batching.py)
4. scaling: where their K/V stays, and how all others go on decoding (scaling.py)

The formulas and their order are the paper's (SOSP'24, section 5). From the released code come the estimate of peak
memory, the fit of prefill times, and that batches short of slots are merged before they are given instances. Ours are:
the programme of step 3 in full, retention on the fewest instances, equal shares of masters, decode served before
prefill, and a second thought. Steps 1 and 2 judge by one batch on all instances; step 3 often makes several on fewer.
So what step 2 would empty is emptied only if step 3, done with it and without, gains more than the move costs. Where
there are more instances than degrees were measured, what step 1 admitted may fit no groups: then the newest wait.

All functions are pure: they take values, and the time that requests have waited or run is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from infinillm.core.elastic.batching import Batched, batched
from infinillm.core.elastic.dispatching import Sides, allocated, dispatched, largest, sides
from infinillm.core.elastic.scaling import decoding, retention
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Instance, Plan, Prefill, State, Waiting

STEPS = 10  # of decode, after which a plan is made anew while requests wait: that of the released code


def plan(state: State, times: Times) -> Plan:
    """What every instance does in the next macro-iteration."""
    requests, start = dispatched(state, sides(state), times)
    found = _batches(requests, start, times)
    if found is None:
        count = largest(lambda count: _on(start, requests[:count], times) is not None, len(requests))
        return plan(replace(state, waiting=requests[:count]), times)
    batches, here = found
    busy = {each.id for batch in batches for each in batch.group}
    busy.update(name for each in (*here.decode, *here.preempted) for name in each.group)
    spare = [name for name in here.instances if name not in busy]
    decodes, evicted = decoding(here.decode, spare, here.instances, times)
    preempted = tuple(each.id for batch in here.preempted for each in batch.requests)
    return Plan(tuple(map(_prefill, batches)), decodes, here.migrations, preempted, evicted)


def longest(instances: Sequence[Instance], times: Times) -> int:
    """Tokens of the longest request, prompt and output: what the largest group can hold."""
    return sum(sorted((each.slots for each in instances), reverse=True)[: times.widest])


def _batches(requests: Sequence[Waiting], start: Sides, times: Times) -> tuple[tuple[Batched, ...], Sides] | None:
    """Steps 2 and 3: the batches, and the sides they are for; None where the requests do not fit."""
    plain = _on(start, requests, times)
    if plain is None:
        return None
    here = allocated(requests, start, times) if requests else start
    wide = None if here is start else _on(here, requests, times)
    if wide is None:
        return plain, start
    moved = sum(each.tokens for each in here.migrations[len(start.migrations) :])
    cost = moved * times.move * sum(1 / each.tokens for each in requests)
    gain = sum(each.latency for each in plain) - sum(each.latency for each in wide)
    return (wide, here) if gain > cost else (plain, start)


def _on(here: Sides, requests: Sequence[Waiting], times: Times) -> tuple[Batched, ...] | None:
    return batched(requests, here.of(here.prefill), times)


def _prefill(batch: Batched) -> Prefill:
    requests, group, seconds = batch
    return Prefill(tuple(r.id for r in requests), tuple(e.id for e in group), retention(requests, group), seconds)
