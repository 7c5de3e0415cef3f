"""Step 4: where K/V stays after a prefill, and which instances are the masters of a batch that decodes.

Theory of operation. Scaling down costs nothing: a prefill is striped over its group, K/V passes every instance, and
each keeps the tokens that `retention` gives it (LoongServe, section 4.1). The released code fills the fullest
instances first. So do we, but only among choices of the fewest instances, which is what the paper says; filling the
fullest first may take three where one has the room.

Scaling up moves nothing either: the new instance becomes a master, which runs the dense layers of its share of the
requests and keeps their new tokens (section 4.2). A batch short of slots is merged with the roomiest other batch that
can help, else given an idle instance; one with more than `crowd` requests to a master is given idle instances. There
are as few masters as that allows, the fullest first, and their shares are equal where memory lets them be. The
released code fills one master to `crowd` before the next; the paper asks for equal shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Batch, Decode, Instance, Kept, Master, Running, Waiting, free
from infinillm.core.types import NodeId, SeqId


def retention(requests: Sequence[Waiting], group: Sequence[Instance]) -> tuple[Kept, ...]:
    """Who keeps which tokens of a prefill: each token once, on the fewest instances. They must have the room."""
    return laid(requests, fewest(sum(each.tokens for each in requests), group))


def laid(requests: Sequence[Waiting], order: Iterable[Instance]) -> tuple[Kept, ...]:
    """Who keeps which tokens of a prefill where each instance is filled before the next."""
    places = iter(order)
    left = 0
    kept: list[Kept] = []
    for each in requests:
        start = 0
        while start < each.tokens:
            while not left:
                here = next(places)
                left = here.free
            stop = start + min(each.tokens - start, left)
            kept.append(Kept(here.id, each.id, start, stop))
            left -= stop - start
            start = stop
    return tuple(kept)


def fewest(tokens: int, group: Sequence[Instance]) -> tuple[Instance, ...]:
    """The fewest instances with so many slots free between them, the fullest of such."""
    assert tokens <= free(group), "a prefill was given less room than it fills"
    rooms = sorted((each.free for each in group), reverse=True)
    count = next(n for n in range(len(rooms) + 1) if sum(rooms[:n]) >= tokens)
    order = fullest(group)
    chosen: list[Instance] = []
    for at, each in enumerate(order):
        others = sorted((other.free for other in order[at + 1 :]), reverse=True)
        if count and each.free + sum(others[: count - 1]) >= tokens:
            chosen.append(each)
            tokens, count = tokens - each.free, count - 1
    return tuple(chosen)


def fullest(group: Iterable[Instance]) -> list[Instance]:
    """The fullest first."""
    return sorted(group, key=lambda each: (-each.used, each.id))


def masters(requests: Sequence[SeqId], group: Sequence[Instance], crowd: int) -> tuple[Master, ...]:
    """Consecutive shares of the requests: as few as keep each within `crowd`, equal where memory lets them be."""
    order = fullest(group)
    need = len(requests)
    assert need <= free(order), "a batch was given less room than its next tokens need"
    shares: dict[NodeId, int] = {}
    for count in range(-(-need // crowd), len(order) + 1):
        roomy = [each for each in order if each.free >= -(-need // count)][:count]
        if len(roomy) == count:
            shares = {each.id: need // count + (at < need % count) for at, each in enumerate(roomy)}
            break
    else:
        left = need
        for at, each in enumerate(sorted(order, key=lambda e: e.free)):
            shares[each.id] = min(each.free, left // (len(order) - at))
            left -= shares[each.id]
    found, start = [], 0
    for each in order:
        if share := shares.get(each.id, 0):
            found.append(Master(each.id, tuple(requests[start : start + share])))
            start += share
    return tuple(found)


@dataclass(slots=True)
class _Draft:
    """A batch whose group may still grow."""

    batch: Batch
    group: dict[NodeId, Instance]

    @property
    def slack(self) -> int:
        """Slots free beyond one for the next token of each request."""
        return free(self.group.values()) - len(self.batch.requests)

    def add(self, instance: Instance) -> None:
        self.group[instance.id] = instance


def decoding(
    batches: Sequence[Batch], spare: Iterable[NodeId], instances: Mapping[NodeId, Instance], times: Times
) -> tuple[tuple[Decode, ...], tuple[SeqId, ...]]:
    """How batches with disjoint groups go on, with the help of `spare` instances; and who cannot, newest first."""
    batches, evicted, instances = _evicted(batches, spare, instances)
    names = {*spare, *(name for gone in evicted for name in gone.held)} - {n for each in batches for n in each.group}
    idle = sorted((e for name in names if (e := instances[name]).free), key=lambda e: (e.free, e.id))
    drafts = [_Draft(each, {name: instances[name] for name in each.group}) for each in batches]
    while short := [each for each in drafts if each.slack < 0]:
        here = short[0]
        others = [each for each in drafts if each is not here]
        other = max(others, key=lambda each: each.slack, default=None)
        if other and (other.slack + here.slack >= 0 or not idle):
            drafts = [each for each in others if each is not other]
            drafts.append(_Draft(Batch(here.batch.requests + other.batch.requests), here.group | other.group))
        else:
            here.add(idle.pop())
    for draft in sorted(drafts, key=lambda each: -len(each.batch.requests)):
        while idle and len(draft.batch.requests) > times.crowd * sum(e.free > 0 for e in draft.group.values()):
            draft.add(idle.pop())
    return tuple(_decode(each, times) for each in drafts), tuple(each.id for each in evicted)


def _decode(draft: _Draft, times: Times) -> Decode:
    names = tuple(each.id for each in draft.batch.requests)
    found = masters(names, tuple(draft.group.values()), times.crowd)
    return Decode(
        names, tuple(sorted(draft.group)), found, times.decode(len(draft.group), len(names), draft.batch.tokens)
    )


def _evicted(
    batches: Sequence[Batch], spare: Iterable[NodeId], instances: Mapping[NodeId, Instance]
) -> tuple[list[Batch], list[Running], dict[NodeId, Instance]]:
    """The batches, the instances, and those who have to go, newest first, until each of the rest has its next slot."""
    known = dict(instances)
    room = free(known[name] for name in {*spare, *(name for each in batches for name in each.group)})
    running = sorted((each for batch in batches for each in batch.requests), key=lambda r: (r.arrived, r.id))
    gone: list[Running] = []
    while running and len(running) > room:
        gone.append(running.pop())
        room += gone[-1].tokens
        for name, tokens in gone[-1].held.items():
            known[name] = replace(known[name], used=known[name].used - tokens)
    stay = {each.id for each in running}
    rest = [Batch(tuple(each for each in batch.requests if each.id in stay)) for batch in batches]
    return [batch for batch in rest if batch.requests], gone, known
