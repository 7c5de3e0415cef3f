"""A prompt on fewer instances than keep it: the first of them compute, the others are sent what does not fit there.

Theory of operation. A prefill that is striped over a group sends all of its K/V around (LoongServe, section 4.1), so
over a slow link it takes as long as that: 4 ms a token of Llama-2-7B at 125 MB/s, where computing one takes a tenth.
But instances that do not compute can keep K/V, too: it is written there layer by layer, while the next layers are
computed, as lent memory is (Infinite-LLM, section 4). Then only what those who compute have no slots for takes the
way, once, and the others are free for other work meanwhile. Which takes longer depends on the link and on the room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from infinillm.core.elastic.scaling import fewest, laid
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Instance, Plan, Prefill, State, Waiting, by_place, free
from infinillm.core.types import NodeId


def narrowed(plan: Plan, state: State, times: Times) -> Plan:
    """The same plan; each prefill is computed by as many of its group as make it quickest, at one place or all."""
    moved: Counter[NodeId] = Counter()
    for _, source, target, tokens in plan.migrations:
        moved[source] -= tokens
        moved[target] += tokens
    waiting = {each.id: each for each in state.waiting}
    instances = {each.id: replace(each, used=each.used + moved[each.id]) for each in state.instances}

    def narrow(prefill: Prefill) -> Prefill:
        group = [instances[name] for name in prefill.group]
        return _quickest(prefill, [waiting[seq] for seq in prefill.requests], group, times)

    return replace(plan, prefills=tuple(map(narrow, plan.prefills)))


def _quickest(prefill: Prefill, requests: Sequence[Waiting], group: Sequence[Instance], times: Times) -> Prefill:
    tokens, squares = sum(each.tokens for each in requests), sum(each.tokens**2 for each in requests)
    roomiest, *apart = sorted(by_place(group), key=lambda place: (-free(place), place[0].place))
    here = sorted(roomiest, key=lambda each: (-each.free, each.id))
    if apart:  # what goes around takes the way between places
        around = tokens * (len(group) - 1) / len(group) * times.move
        prefill = replace(prefill, seconds=max(prefill.seconds, around))
    for count in range(1, min(len(here) + 1, len(group))):
        there, others = here[:count], (*here[count:], *chain(*apart))
        away = max(tokens - free(there), 0)
        seconds = max(times.on(count, tokens, squares), away * times.move)
        if seconds < prefill.seconds:
            kept = laid(requests, (*there, *fewest(away, others)))
            prefill = replace(prefill, group=tuple(each.id for each in there), kept=kept, seconds=seconds)
    return prefill


def reserved(instances: Iterable[Instance], prefills: Iterable[Prefill]) -> tuple[Instance, ...]:
    """The instances, less the slots that these prefills are to fill where they do not compute."""
    taken: Counter[NodeId] = Counter()
    for prefill in prefills:
        for kept in prefill.kept:
            if kept.instance not in prefill.group:
                taken[kept.instance] += kept.stop - kept.start
    return tuple(replace(each, used=each.used + taken[each.id]) for each in instances)
