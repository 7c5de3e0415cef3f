"""Our planner `auto` beside every other policy, on the same devices: rates under a limit of latency, and throughput."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import inf
from statistics import fmean
from typing import NamedTuple

from bench.papers import infinite_llm, loongserve
from bench.papers.rows import PREDICTED, Row
from bench.papers.runs import expected, highest, saturated
from infinillm.sim.hardware import cluster, read_size

Say = Callable[[str], None]
TWO, EIGHT = "1x8xA800@loongserve:tp2", "1x8xA800@loongserve:tp8"  # eight devices, as four workers and as one
CHUNK = 2048  # tokens of prompts in one step, of all that compute them in parts
POLICIES = (  # name, policy, cluster
    ("auto", "auto", TWO),
    ("elastic", "elastic", TWO),
    ("proactive", "proactive", TWO),
    ("whole", "whole", TWO),
    ("whole, one worker", "whole", EIGHT),
    ("chunked", f"chunked:{CHUNK}", TWO),
    ("chunked, one worker", f"chunked:{CHUNK}", EIGHT),
    ("disaggregated", "disaggregated", TWO),
)


class Set(NamedTuple):
    """A workload, its limit in ms a token (of prompt and output), and a rate to begin with."""

    name: str
    trace: str
    limit: float
    first: float


SETS = (
    *(Set(each.name, each.trace, each.limit, each.rates["LoongServe"]) for each in loongserve.SETS),
    Set("Swings", "swings", 50, 16.0),  # ours, and the limits too
    Set("Long and swings", "long-and-swings", 50, 4.0),
)
HALVINGS = 5  # of the interval in which a rate is searched
SECONDS, MOST = 300.0, 6_000  # of arrivals in a run: five phases; and requests
SEEDS = (0, 1, 2)


class Systems(NamedTuple):
    """What serves these traces to saturation: names, policies and clusters, of which the first says where rates begin.

    Runs are `longer` than those of the paper's tables for so many `instances`.
    """

    traces: tuple[str, ...]
    instances: int
    longer: int
    systems: tuple[tuple[str, str, str], ...]


SERVER, SERVERS = "1x8xA100@infinite-llm", "4x8xA100@infinite-llm"
SATURATED = {
    "throughput": Systems(
        traces=("t0", "t1", "t2", "t3", "t4", "t5"),
        instances=8,
        longer=6,
        systems=(
            ("auto", "auto", SERVER),
            ("auto, workers of four", "auto", f"{SERVER}:tp4"),
            ("elastic", "elastic", SERVER),
            ("elastic, workers of four", "elastic", f"{SERVER}:tp4"),
            ("proactive", "proactive", SERVER),
            ("pooled", "pooled", SERVER),
            ("whole", "whole", SERVER),
            ("whole, workers of four", "whole", f"{SERVER}:tp4"),
            ("single", "single", SERVER),
        ),
    ),
    "throughput-of-eights": Systems(
        traces=("t6", "t7", "t8"),
        instances=32,
        longer=3,
        systems=tuple((each, each, f"{SERVERS}:tp8") for each in ("auto", "elastic", "proactive", "whole", "single")),
    ),
    "throughput-of-ones": Systems(
        traces=("t3", "t4", "t5", "t6"),
        instances=32,
        longer=1,
        systems=tuple((each, each, SERVERS) for each in ("auto", "elastic", "proactive", "whole")),
    ),
}


def rates(quick: bool, say: Say) -> Iterator[Row]:
    """The largest rate of each policy that keeps the limit and is kept up with; none of one that refuses some requests.

    Not kept up with is what it takes as long again to answer as it took to come: the mean latency a token hardly tells
    of long requests that are put off for ever.
    """
    for each in SETS[:1] if quick else SETS:
        for name, policy, place in POLICIES[:2] if quick else POLICIES:
            if (found := _largest(each, name, policy, place, quick, say)) is not None:
                yield Row(each.name, name, "requests/s", None, found, PREDICTED)


def _largest(each: Set, name: str, policy: str, place: str, quick: bool, say: Say) -> float | None:
    """The rate of one policy; None where it refuses some requests."""
    size = read_size("LWM-7B", loongserve.BLOCK, loongserve.DTYPE)
    budget = replace(loongserve.BUDGET, tokens=CHUNK)

    @cache
    def run(rate: float) -> tuple[float, bool]:
        """Seconds a token, and whether it is kept up with."""
        say(f"{each.name}, {name} at {rate:.3g} a second")
        count = min(loongserve.requests(rate, SECONDS, quick), MOST)
        mean, over = loongserve.answering(policy, place, size, budget, each.trace, rate, count)
        return mean, over <= 2 * count / rate

    def latency(rate: float) -> float:
        mean, kept = run(rate)
        return 1e3 * mean if kept else inf

    return highest(latency, each.limit, each.first, HALVINGS) if run(each.first)[0] < inf else None


def throughput(here: Systems, quick: bool, say: Say) -> Iterator[Row]:
    """Tokens a second at saturation, in the mean of seeds; none of a policy that refuses some requests."""
    for trace in here.traces[:1] if quick else here.traces:
        for name, policy, where in here.systems[:2] if quick else here.systems:
            found = _saturation(here, trace, policy, where, quick, lambda what, name=name: say(f"{name}, {what}"))
            if found is not None:
                yield Row(trace, name, "tokens/s", None, found, PREDICTED)


def _saturation(here: Systems, trace: str, policy: str, where: str, quick: bool, say: Say) -> float | None:
    """The throughput of one system; None where it refuses some requests."""
    size = read_size("Llama-2-7B", infinite_llm.BLOCK, infinite_llm.DTYPE)
    place = cluster(here.systems[0][2], size)
    first = expected(place.sites[0].near, place, trace, infinite_llm.ROWS, infinite_llm.BLOCK)
    count = infinite_llm.requests(trace, here.instances, quick) * (1 if quick else here.longer)
    world = infinite_llm.make(policy, where, size)
    best: list[float] = []
    for seed in SEEDS[:1] if quick else SEEDS:
        runs = saturated(world, trace, count, first, say, seed)
        if any(run.refused for run in runs):
            return None
        best.append(max(run.tokens for run in runs))
    return fmean(best)


def standing(rows: list[Row]) -> Iterator[Row]:
    """`auto`, by its best layout, over the best of the others."""
    for group in dict.fromkeys(row.group for row in rows):
        here = {row.what: row.ours for row in rows if row.group == group}
        own = {name: ours for name, ours in here.items() if name.startswith("auto")}
        if own and (rest := {name: ours for name, ours in here.items() if name not in own}):
            best = max(rest, key=lambda name: rest[name])
            layout = max(own, key=lambda name: own[name])
            yield Row(f"{group}, {layout} over", best, "times", None, own[layout] / rest[best], PREDICTED)
