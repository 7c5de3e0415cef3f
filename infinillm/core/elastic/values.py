"""What the elastic planner is told of a cluster, and what it answers with.

A slot keeps the K/V of one token, all layers. An instance is one replica of the weights with its slots. The instances
that work on one batch are its group; their number is its degree of parallelism (dop). Times are seconds, lengths
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple

from infinillm.core.types import NodeId, SeqId


@dataclass(frozen=True, slots=True)
class Instance:
    """One elastic instance. Instances at one `place` (a server) have the better links between them.

    What it has in hand keeps it `busy` for so many seconds; what a plan begins on it begins then.
    """

    id: NodeId
    slots: int
    used: int
    place: str
    busy: float = 0.0

    @property
    def free(self) -> int:
        return self.slots - self.used


@dataclass(frozen=True)
class Waiting:
    """A request that waits: its input of `tokens`, and the output it may come to have, both one or more."""

    id: SeqId
    tokens: int
    arrived: float
    left: int

    @property
    def needed(self) -> int:
        """Slots for it to its end."""
        return self.tokens + self.left

    @cached_property
    def weight(self) -> float:
        """What a second costs it, in seconds per token it comes to have."""
        return 1 / (self.tokens + self.left)


@dataclass(frozen=True)
class Running:
    """A request that decodes: the tokens of its K/V on each instance, its output so far and still to come at most.

    There is always one more token to come. `seconds` it has been decoding.
    """

    id: SeqId
    arrived: float
    held: Mapping[NodeId, int]
    produced: int
    left: int
    seconds: float

    @cached_property
    def tokens(self) -> int:
        """Tokens of K/V, wherever they lie."""
        return sum(self.held.values())

    @cached_property
    def weight(self) -> float:
        """What a second costs it, in seconds per token it comes to have."""
        return 1 / (self.tokens + self.left)


@dataclass(frozen=True)
class Batch:
    """Requests that decode together, in the order in which masters share them."""

    requests: tuple[Running, ...]

    @cached_property
    def group(self) -> tuple[NodeId, ...]:
        """The instances that hold K/V of it."""
        return tuple(sorted({name for each in self.requests for name, tokens in each.held.items() if tokens}))

    @cached_property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.requests)

    @cached_property
    def weight(self) -> float:
        """What a second costs it, in seconds per token."""
        return sum(each.weight for each in self.requests)


@dataclass(frozen=True)
class State:
    """All the planner knows at the start of a macro-iteration.

    `average_decode`: seconds that requests spent decoding, on average of those that ended. `soon`: seconds until one of
    the instances in a prefill, which are not told of, comes back. `largest`: slots of the largest place, all of it, or
    0. Requests no pool of this size can hold are refused before they come here: they would stop the queue.
    """

    instances: tuple[Instance, ...]
    waiting: tuple[Waiting, ...]
    batches: tuple[Batch, ...]
    average_decode: float
    soon: float = inf
    now: float = 0.0
    largest: int = 0

    @cached_property
    def running(self) -> Mapping[SeqId, Running]:
        """Those of all batches, by name."""
        return {each.id: each for batch in self.batches for each in batch.requests}

    @cached_property
    def slots(self) -> int:
        """Slots that are free or of a batch."""
        return free(self.instances) + sum(each.tokens for each in self.running.values())


class Kept(NamedTuple):
    """After the prefill `instance` keeps the K/V of tokens [start, stop) of a request."""

    instance: NodeId
    seq: SeqId
    start: int
    stop: int


class Master(NamedTuple):
    """An instance that runs the dense layers of these requests, and keeps their new K/V."""

    instance: NodeId
    requests: tuple[SeqId, ...]


class Migration(NamedTuple):
    """`tokens` of K/V of a request go from one instance to another before the macro-iteration begins."""

    seq: SeqId
    source: NodeId
    target: NodeId
    tokens: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """A batch to prefill on a group, striped over it; afterwards it lies as `kept` says. `seconds` is predicted."""

    requests: tuple[SeqId, ...]
    group: tuple[NodeId, ...]
    kept: tuple[Kept, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Decode:
    """A batch to decode on a group, some of which are its masters. `seconds` of a step are predicted.

    Beside its first step the group computes `prompts`, striped over it, which takes so many seconds `more`; they lie
    as `kept` says, and decode from the next plan on.
    """

    requests: tuple[SeqId, ...]
    group: tuple[NodeId, ...]
    masters: tuple[Master, ...]
    seconds: float
    prompts: tuple[SeqId, ...] = ()
    kept: tuple[Kept, ...] = ()
    more: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """One macro-iteration. Groups are disjoint; every running request decodes, is preempted or is evicted.

    `preempted` requests keep their K/V and wait for the prefill on their instances. `evicted` ones lose theirs, and
    have to be prefilled again: there is no slot for their next token.
    """

    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]
    migrations: tuple[Migration, ...]
    preempted: tuple[SeqId, ...]
    evicted: tuple[SeqId, ...]


def by_place(instances: Iterable[Instance]) -> list[tuple[Instance, ...]]:
    """The instances of one place after the other, in the order of the first of each."""
    found: dict[str, list[Instance]] = {}
    for each in instances:
        found.setdefault(each.place, []).append(each)
    return [tuple(here) for here in found.values()]


def slots(instances: Iterable[Instance]) -> int:
    """Slots of all of them, used or not."""
    return sum(each.slots for each in instances)


def free(instances: Iterable[Instance]) -> int:
    """Slots free on all of them."""
    return sum(each.free for each in instances)
