"""LoongServe's largest rates under its limits of latency, and what more masters do to a decode step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import NamedTuple

from bench.papers.rows import BUILT, PREDICTED, Row, one
from bench.papers.runs import SEED, highest
from infinillm.core.scheduler import Budget
from infinillm.sim import striping, worlds
from infinillm.sim.hardware import Size, hardware, read_size
from infinillm.sim.striping import Share
from infinillm.sim.traffic import workload

BLOCK, DTYPE, MOVES = 16, "float16", 16
ROWS = 1024  # requests at once, as in the artifact's scripts
LEND, BEAT = 0.9, 0.5
SECONDS, MOST = 1000, 20_000  # of arrivals in a run, as in the artifact; and requests
LEAST, QUICK = 200, 60  # requests
BUDGET = Budget(worlds.CHUNK, ROWS, BLOCK, MOVES)
Say = Callable[[str], None]


class Set(NamedTuple):
    """One set of requests: its limit in ms a token (of prompt and output), and the chunk of SplitFuse for it."""

    name: str
    trace: str
    limit: float
    chunk: int
    rates: dict[str, float]  # the paper's, by system


ELASTIC, WHOLE, CHUNKED, APART = "LoongServe", "vLLM", "LightLLM SplitFuse", "DistServe"
SETS = (
    Set("L-Eval", "l-eval-like", 3.5, 2048, {ELASTIC: 2.416, WHOLE: 1.144, CHUNKED: 1.231, APART: 0.415}),
    Set("LV-Eval", "lv-eval-like", 2.5, 16384, {ELASTIC: 0.201, WHOLE: 0.090, CHUNKED: 0.082}),
    Set("Mixed", "mixed-like", 70, 2048, {ELASTIC: 0.553, WHOLE: 0.208, CHUNKED: 0.144}),
    Set("ShareGPT", "sharegpt", 92, 256, {ELASTIC: 29.470, WHOLE: 6.351, CHUNKED: 23.128, APART: 10.366}),
)
SYSTEMS = {  # policy, cluster
    ELASTIC: ("elastic", "1x8xA800@loongserve:tp2"),
    WHOLE: ("whole", "1x8xA800@vllm:tp8"),
    CHUNKED: ("chunked:{chunk}", "1x8xA800@loongserve:tp8"),
    APART: ("disaggregated", "1x8xA800@loongserve:tp4"),
}


def rates(quick: bool, say: Say) -> Iterator[Row]:
    """The largest rate of each system whose mean latency a token keeps the limit; none where a policy is missing."""
    size = read_size("LWM-7B", BLOCK, DTYPE)
    for each in SETS[: 1 if quick else None]:
        for system, paper in each.rates.items():
            policy, place = SYSTEMS[system]
            if policy.partition(":")[0] not in worlds.NAMES:
                continue
            name = policy.format(chunk=each.chunk)

            def latency(
                rate: float, name: str = name, place: str = place, each: Set = each, system: str = system
            ) -> float:
                say(f"{each.name}, {system} at {rate:.3g} a second")
                return 1e3 * per_token(name, place, size, BUDGET, each.trace, rate, requests(rate, SECONDS, quick))

            found = highest(latency, each.limit, paper)
            if found < float("inf"):
                yield Row(each.name, system, "requests/s", one(paper), found, PREDICTED)


def requests(rate: float, seconds: float, quick: bool) -> int:
    """So many that they come for so long, but neither few nor very many."""
    return QUICK if quick else min(max(round(rate * seconds), LEAST), MOST)


def per_token(policy: str, place: str, size: Size, budget: Budget, trace: str, rate: float, count: int) -> float:
    """Mean seconds a token, of prompt and output; infinite where some are refused."""
    return answering(policy, place, size, budget, trace, rate, count)[0]


def answering(
    policy: str, place: str, size: Size, budget: Budget, trace: str, rate: float, count: int
) -> tuple[float, float]:
    """As `per_token`, and the moment when all are answered."""
    world = worlds.world(policy, place, size, budget, lend_fraction=LEND, beat_seconds=BEAT)
    tally = worlds.answered(world, workload(trace, rate=rate, seed=SEED, count=count))
    return (tally.per_token.mean if tally.served and not tally.refused else inf), world.now


def speed_ups(rows: list[Row]) -> Iterator[Row]:
    """LoongServe over each of the others."""
    found = {(row.group, row.what): row for row in rows}
    for (name, system), row in found.items():
        ours = found.get((name, ELASTIC))
        if ours is not None and system != ELASTIC and row.paper and ours.paper:
            said = ours.paper[0] / row.paper[0]
            yield Row(f"{name}, LoongServe over", system, "times", one(said), ours.ours / row.ours, PREDICTED)


# --- scaling ---------------------------------------------------------------------------------------------------------

MASTERS = (  # requests, tokens of each; a decode step with two masters and with four, over one with one master
    (1024, 10, 0.63, 0.465),
    (256, 100, 0.84, 0.68),
    (64, 1_000, 1.10, 1.12),
    (16, 10_000, 1.02, 1.115),
    (4, 50_000, 1.115, 1.03),
    (2, 100_000, 1.11, 1.115),
    (1, 200_000, 1.00, 1.00),
)
KEPT = ((1024, 10, 0.965), (256, 100, 1.015), (64, 1_000, 1.03), (16, 10_000, 1.02), (4, 50_000, 1.005))
INSTANCES = 4


def scaling() -> Iterator[Row]:
    """Four instances of two A800; K/V in equal parts, requests in equal shares."""
    size = read_size("LWM-7B", BLOCK, DTYPE)
    node = hardware("A800@loongserve", 2, 8)
    cost = node.cost(size, node.near)

    def step(requests: int, tokens: int, masters: int) -> float:
        masters, here = min(masters, requests), requests * tokens // INSTANCES
        rows = requests // masters
        master = Share(rows, requests, requests - rows, here, INSTANCES - 1)
        return striping.step(cost, [master] * masters + [Share(0, requests, requests, here, 0)] * (INSTANCES - masters))

    for at, masters in enumerate((2, 4)):
        for requests, tokens, *ratios in MASTERS:
            ours = step(requests, tokens, masters) / step(requests, tokens, 1)
            what = f"{requests} x {tokens:,}"
            yield Row(f"scale up, {masters} masters", what, "of one", one(ratios[at]), ours, PREDICTED)
    for requests, tokens, paper in KEPT:
        what = f"{requests} x {tokens:,}"
        yield Row("scale down after a prefill", what, "of none", one(paper), 1.0, BUILT, "K/V passes every instance")
