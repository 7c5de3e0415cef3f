"""Instances, requests and batches of simulated groups: what each holds, and steps alike taken in one go."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field

from infinillm.core.types import NodeId, SeqId
from infinillm.sim.hardware import Site
from infinillm.sim.simulation import Ending, Then
from infinillm.sim.striping import Share


@dataclass(slots=True)
class Place:
    """An instance: slots taken, and when what it has in hand is over."""

    site: Site
    slots: int
    used: int = 0
    ready: float = 0.0

    @property
    def free(self) -> int:
        return self.slots - self.used


@dataclass(slots=True)
class Asked:
    """A request: its tokens of K/V on each instance, its output so far. The last of its tokens has no K/V yet."""

    id: SeqId
    arrived: float
    prompt: int
    output: int
    then: Then
    held: dict[NodeId, int] = field(default_factory=dict)
    produced: int = 0
    first: float = 0.0  # when the first token came
    decoding: float = 0.0  # since when

    @property
    def most(self) -> int:
        """Tokens in the end."""
        return self.prompt + self.output

    @property
    def tokens(self) -> int:
        return self.prompt + self.produced

    @property
    def left(self) -> int:
        return self.output - self.produced

    def refuse(self, policy: str, longest: int, now: float) -> None:
        """Say that no instances there are could hold it to its end."""
        why = f"no workers are left with which policy {policy} could serve it"
        if longest:
            why = f"{self.most:,} tokens are more than the {longest:,} that policy {policy} can serve here"
        self.then(Ending(self.arrived, self.first or now, now, self.prompt, self.produced, refused=why))


@dataclass(slots=True)
class Party:
    """A batch that decodes, or lies still where it has no steps in hand.

    Its `times` steps from `began` on are alike: the first takes `first` seconds, each next one `more`. Beside a step
    that computes `prompts` there is no other: then they belong to the batch.
    """

    requests: list[Asked]
    group: tuple[NodeId, ...] = ()
    masters: dict[NodeId, list[Asked]] = field(default_factory=dict)
    prompts: list[Asked] = field(default_factory=list)
    began: float = 0.0
    times: int = 0
    first: float = 0.0
    more: float = 0.0

    def seconds(self, times: int) -> float:
        return times * self.first + self.more * times * (times - 1) / 2

    def begun(self, now: float) -> int:
        """Steps that have begun before now; prompts are computed once that is planned."""
        if self.prompts:
            return 1
        return min(bisect_left(range(self.times + 1), now - self.began, key=self.seconds), self.times)

    def over(self, now: float) -> int:
        """Steps that are over by now."""
        return max(bisect_right(range(self.times + 1), now - self.began, key=self.seconds) - 1, 0)

    @property
    def holders(self) -> set[NodeId]:
        """Who has K/V of it."""
        return {name for request in (*self.requests, *self.prompts) for name in request.held}

    def leave(self) -> list[Asked]:
        """Let go of those that have all their tokens, and name them."""
        over = [each for each in self.requests if not each.left]
        if over:
            self.requests = [each for each in self.requests if each.left]
            left = {name: [each for each in requests if each.left] for name, requests in self.masters.items()}
            self.masters = {name: requests for name, requests in left.items() if requests}
        return over

    def shares(self) -> list[Share]:
        """What each instance of the group does in the next step."""
        asked, foreign, tokens = (Counter[NodeId]() for _ in range(3))
        peers: dict[NodeId, set[NodeId]] = {name: set() for name in self.masters}
        for master, requests in self.masters.items():
            tokens[master] += len(requests)
            for request in requests:
                asked[master] += master not in request.held
                for name, count in request.held.items():
                    asked[name] += 1
                    tokens[name] += count
                    if name != master:
                        foreign[name] += 1
                        peers[master].add(name)
        return [
            Share(len(self.masters.get(n, ())), asked[n], foreign[n], tokens[n], len(peers.get(n, ())))
            for n in self.group
        ]
