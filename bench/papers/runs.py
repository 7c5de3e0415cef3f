"""Runs of the simulator: tokens a second at saturation, and the largest rate under a limit of latency.

Theory of operation. A run is a list of arrivals under one policy. Its throughput is that between the moments when a
tenth and nine tenths of all tokens were computed: neither filling up nor the last long request counts. What is computed
of a request that runs counts as far as it is. `saturated` doubles the rate until that brings hardly more; `highest`
halves the interval between a rate that keeps a limit and one that does not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from infinillm.core.cost import Cost
from infinillm.core.types import Ledger
from infinillm.sim.cells import Cells
from infinillm.sim.groups import Groups
from infinillm.sim.hardware import Cluster
from infinillm.sim.statistics import Tally
from infinillm.sim.traffic import Arrival, workload

FIRST, LAST = 0.1, 0.9  # of all tokens
LOOKS = 200  # at what is computed, in a run as long as expected
LITTLE = 0.03  # what is less is no gain
DOUBLINGS = 3
HALVINGS = 3
MOST_DOUBLINGS = 4
SEED = 0
Make = Callable[[], Any]  # a new world: sim.simulation.Simulation, or one with the same surface


class Rate(NamedTuple):
    """One run: rates and throughputs a second, times in seconds."""

    rate: float
    tokens: float
    per_token: float  # mean latency over the tokens of a request
    served: int
    refused: int
    preemptions: int
    moved: int  # tokens of K/V


@dataclass(slots=True)
class _Watched:
    """What has been computed by when."""

    world: Any
    ended: int = 0
    seen: list[tuple[float, float]] = field(default_factory=list)

    def hear(self, tally: Tally, ending: Any) -> None:
        tally.add(ending)
        if not ending.refused:
            self.ended += ending.prompt + ending.output

    def look(self, now: float, _: Ledger | None = None) -> None:
        self.seen.append((now, self.ended + computed(self.world)))

    def when(self, tokens: float) -> float:
        """The moment by which so many were computed, straight between looks."""
        amounts = [amount for _, amount in self.seen]
        at = min(max(bisect_left(amounts, tokens), 1), len(amounts) - 1)
        (a, low), (b, high) = self.seen[at - 1], self.seen[at]
        return a + (b - a) * (tokens - low) / (high - low) if high > low else b


def computed(world: Any) -> float:
    """Tokens that are computed of what runs; of a prefill on a group none before its end."""
    match world:
        case Cells(cells=cells):
            return sum(map(computed, cells))
        case Groups(books=books):
            return sum(each.tokens for each in books.requests.values() if each.produced)
    return sum(_computed(each, world.now) for each in world.workers.values())


def _computed(worker: Any, now: float) -> float:
    """Of one worker; of the step in hand the share that is over."""
    done = sum(stop - start for each in worker.running for start, stop in each.done)
    if (going := worker.going) is None or going.decodes:
        return float(done)
    share = min((now - going.began) / going.seconds(1), 1.0)
    return done + share * sum(chunk.stop - chunk.start for chunk in going.step.chunks)


def throughput(make: Make, arrivals: list[Arrival], rate: float, seconds: float) -> Rate:
    """One run of arrivals that come at `rate`; it may take about so many seconds of the clock."""
    world, tally = make(), Tally()
    watched = _Watched(world)
    offered = sum(each.prompt + each.output for each in arrivals)
    world.watch(seconds / LOOKS, watched.look)
    world.play(iter(arrivals), partial(watched.hear, tally))
    while world.busy and watched.seen[-1][1] <= LAST * offered:
        world.clock.step(float("inf"))
    watched.look(world.now)
    total = watched.seen[-1][1] / LAST if world.busy else watched.ended
    begin, end = watched.when(FIRST * total), watched.when(LAST * total)
    totals = world.totals()
    tokens = (LAST - FIRST) * total / (end - begin)
    return Rate(rate, tokens, tally.per_token.mean, tally.served, tally.refused, totals.preemptions, totals.moved)


def saturated(
    make: Make, trace: str, count: int, first: float, say: Callable[[str], None], seed: int = SEED
) -> list[Rate]:
    """Runs at rates that double from `first` on, the last of which computes hardly more than the best before it."""
    found: list[Rate] = []
    rate = first
    for _ in range(DOUBLINGS):
        say(f"{trace} at {rate:.3g} a second")
        arrivals = list(workload(trace, rate=rate, seed=seed, count=count))
        best = max((each.tokens for each in found), default=0.0)
        found.append(throughput(make, arrivals, rate, count / rate))
        if found[-1].tokens < best * (1 + LITTLE):
            break
        rate *= 2
    return found


def highest(latency: Callable[[float], float], limit: float, start: float, halvings: int = HALVINGS) -> float:
    """The rate at which a latency that rises with the rate passes a limit; straight between the last two rates.

    Infinity where it is kept at a rate many times as large as `start`.
    """
    low, high = 0.0, start
    below, above = 0.0, latency(start)
    while above <= limit:
        if high >= start * 2**MOST_DOUBLINGS:
            return float("inf")
        low, below, high = high, above, 2 * high
        above = latency(high)
    for _ in range(halvings):
        middle = (low + high) / 2
        found = latency(middle)
        if found <= limit:
            low, below = middle, found
        else:
            high, above = middle, found
    share = (limit - below) / (above - below) if above < float("inf") else 0.5
    return low + share * (high - low)


def expected(cost: Cost, place: Cluster, trace: str, rows: int, block_size: int) -> float:
    """Requests a second that the workers could serve, were all always busy with as many as fit: a place to start."""
    arrivals = list(workload(trace, rate=1.0, seed=SEED, count=300))
    length = fmean(each.prompt + each.output / 2 for each in arrivals)
    held = min(max(place.sites[0].blocks * block_size / length, 1.0), rows)
    step = cost.decode_step(held, held * length) / held
    return len(place.sites) / fmean(cost.prefill(each.prompt) + each.output * step for each in arrivals)
