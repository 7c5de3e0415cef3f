"""What became of some traffic on one simulated cluster: counts, times, and what was seen meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from infinillm.core.types import Ledger
from infinillm.sim.capacity import Judge
from infinillm.sim.history import History
from infinillm.sim.simulation import Clock, Ending
from infinillm.sim.statistics import Spread, Tally
from infinillm.sim.steps import Totals
from infinillm.sim.traffic import Arrival, workload

TELL_EVERY = 4096  # events


class World(Protocol):
    """A simulated cluster, whatever it runs."""

    clock: Clock

    @property
    def now(self) -> float: ...

    @property
    def busy(self) -> bool: ...

    def play(self, arrivals: Iterator[Arrival], then: Callable[[Ending], None]) -> None: ...

    def watch(self, every: float, look: Callable[[float, Ledger], None]) -> None: ...

    def totals(self) -> Totals: ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """Which requests, as `workload` has them."""

    name: str
    rate: float
    seed: int
    count: int

    def arrivals(self) -> Iterator[Arrival]:
        return workload(self.name, rate=self.rate, seed=self.seed, count=self.count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the traffic under one policy. `seconds` are of the cluster."""

    policy: str
    traffic: Traffic
    tally: Tally
    seconds: float
    totals: Totals
    judge: Judge | None  # where there is an objective
    history: History | None  # where somebody watched
    whole: bool  # everything was answered

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and of answers."""
        return (self.tally.prompt + self.tally.output) / self.seconds if self.seconds else 0.0

    def told(self) -> dict[str, Any]:
        """As JSON; times in seconds."""
        tally, totals = self.tally, self.totals
        kept = {} if self.judge is None else {"kept": round(self.judge.share, 4)}
        return {
            "policy": self.policy,
            "rate": float(f"{self.traffic.rate:.4g}"),
            "served": tally.served,
            "refused": tally.refused,
            **kept,
            "seconds": round(self.seconds, 3),
            "tokens per second": round(self.tokens_per_second, 1),
            "output tokens per second": round(tally.output / self.seconds, 1) if self.seconds else 0.0,
            "first token": _told(tally.first),
            "output token": _told(tally.each),
            "latency": _told(tally.latency),
            "preemptions": totals.preemptions,
            "moved tokens": totals.moved,
            "steps": totals.steps,
            "request-steps": totals.rows,
        }


def _told(spread: Spread) -> dict[str, float]:
    found = {
        "mean": spread.mean,
        "p50": spread.quantile(0.5),
        "p90": spread.quantile(0.9),
        "p99": spread.quantile(0.99),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def played(
    policy: str,
    world: World,
    traffic: Traffic,
    *,
    until: float,
    judge: Judge | None,
    give_up: bool,
    every: float,
    say: Callable[[float], None],
) -> Outcome:
    """All the traffic on a new cluster, or what of it has come `until` then.

    It ends early where the objective cannot be kept any more, if told to `give_up` then. Somebody looks at the ledger
    `every` so many seconds, or never where that is 0. `say` hears which share of the requests has ended.
    """
    tally, history = Tally(), History(every) if every else None
    if history is not None:
        world.watch(every, history.look)
    lost = False

    def hear(ending: Ending) -> None:
        nonlocal lost
        tally.add(ending)
        if judge is not None:
            judge.add(ending)
            lost = give_up and judge.hopeless

    world.play(traffic.arrivals(), hear)
    events = 0
    while world.busy and not lost and world.clock.step(until):
        events += 1
        if events % TELL_EVERY == 1:
            say((tally.served + tally.refused) / traffic.count)
    return Outcome(policy, traffic, tally, world.now, world.totals(), judge, history, not world.busy)
