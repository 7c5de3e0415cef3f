"""The elastic planner: LoongServe's four steps, put together for one macro-iteration.

Theory of operation. A macro-iteration is one prefill of every new batch beside some steps of decode. Each time the
planner is told who is there and decides anew who works on what; weights never move, and K/V hardly ever:

1. dispatching: who of the queue is prefilled (dispatching.py)
2. allocation: on which instances, at whose cost (dispatching.py)
3. batching: which of them together, at which degree of parallelism (batching.py)
4. scaling: where their K/V stays, and how all others go on decoding (scaling.py)

The formulas and their order are the paper's (SOSP'24, section 5). From the released code come the estimate of peak
memory, the fit of prefill times, and that batches short of slots are merged before they are given instances. Ours
are: the programme of step 3 in full, retention on the fewest instances, equal shares of masters, decode served before
prefill, and the second thoughts of this file. Steps 1 and 2 judge by one batch on all instances; step 3 often makes
several on fewer. So what step 2 would empty is emptied only if step 3 then gains more than the move costs; a batch
whose instances step 3 leaves alone is not preempted; and idle ones it leaves alone may help decoding. Where places in
a group are limited (more instances than degrees measured), what step 1 admitted may not fit, and the newest are left.

All functions are pure: they take values, and the time that requests have waited or run is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from infinillm.core.elastic.batching import Batched, batched
from infinillm.core.elastic.dispatching import Sides, allocated, dispatched, largest, sides
from infinillm.core.elastic.scaling import decoding, retention
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Batch, Plan, Prefill, State, Waiting, free


def plan(state: State, times: Times) -> Plan:
    """What every instance does in the next macro-iteration."""
    start = sides(state)
    requests, here = dispatched(state, start, times) if start.slack >= 0 else ((), start)
    batches, here = _batches(requests, here, times)
    used = {each.id for batch in batches for each in batch.group}
    waits = [each for each in here.preempted if used & {*each.group} or _short(each, here)]
    decode = [*here.decode, *(each for each in here.preempted if each not in waits)]
    busy = used.union(*(each.group for each in (*decode, *waits)))
    spare = [name for name in here.instances if name not in busy]
    decodes, evicted = decoding(decode, spare, here.instances, times)
    preempted = tuple(each.id for batch in waits for each in batch.requests)
    return Plan(tuple(map(_prefill, batches)), decodes, here.migrations, preempted, evicted)


def _batches(requests: Sequence[Waiting], start: Sides, times: Times) -> tuple[tuple[Batched, ...], Sides]:
    """Steps 2 and 3: the batches, and the sides they are for."""

    def on(here: Sides, count: int) -> tuple[Batched, ...] | None:
        return batched(requests[:count], here.of(here.prefill), times)

    plain = on(start, len(requests))
    if plain is None:
        count = largest(lambda count: on(start, count) is not None, len(requests))
        return on(start, count) or (), start
    here = allocated(requests, start, times)
    wide = None if here is start else on(here, len(requests))
    if wide is not None:
        moved = sum(each.tokens for each in here.migrations[len(start.migrations) :])
        cost = moved * times.move * sum(1 / each.tokens for each in requests)
        if sum(each.latency for each in plain) - sum(each.latency for each in wide) > cost:
            return wide, here
    return plain, start


def _short(batch: Batch, here: Sides) -> bool:
    """Whether it could not decode on its own."""
    return free(here.of(batch.group)) < len(batch.requests)


def _prefill(batch: Batched) -> Prefill:
    names = (tuple(each.id for each in part) for part in (batch.requests, batch.group))
    return Prefill(*names, retention(batch.requests, batch.group), batch.seconds)
