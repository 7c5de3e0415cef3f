"""The simulated cluster: histories that repeat, books that balance, and steps taken in one go that change nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from infinillm.core.cost import Cost, Link
from infinillm.core.policy import POLICIES
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.scheduler import Budget, schedule
from infinillm.core.types import Grow, Ledger
from infinillm.errors import BadRequest
from infinillm.sim import worker
from infinillm.sim.hardware import Cluster, Site
from infinillm.sim.simulation import Ending, Simulation
from infinillm.sim.traffic import Arrival
from infinillm.sim.worker import Worker
from tests.core.test_cost import LLAMA_H100

BLOCK, BLOCKS = 16, 40
BUDGET = Budget(512, 64, BLOCK, moves=16)
COST: Cost = LLAMA_H100


def one_by_one(*_: object) -> tuple[int, list[tuple[int, Grow]]]:
    return 1, []


def simulation(workers: int, policy: str, beat_seconds: float = 0.5, cores: float | None = None) -> Simulation:
    sites = tuple(Site(f"n{i}", 0, BLOCKS, COST, COST) for i in range(workers))
    way = Link("none", 0.0, math.inf)
    return Simulation(
        Cluster(sites, way, way), POLICIES[policy], BUDGET, lend_fraction=0.9, beat_seconds=beat_seconds, cores=cores
    )


def load(seed: int, count: int, seconds: float) -> list[Arrival]:
    """Requests at random moments, a few of them longer than a worker."""
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, seconds) for _ in range(count))
    return [
        Arrival(at, draw.choice((draw.randint(1, 300), 60, BLOCKS * BLOCK * 3 // 2)), draw.randint(1, 90))
        for at in times
    ]


def history(
    policy: str, seed: int = 1, count: int = 120, seconds: float = 2.0, look: Callable[[Simulation], None] | None = None
) -> tuple[list[Ending], Simulation]:
    cluster = simulation(3, policy, beat_seconds=0.05)
    endings: list[Ending] = []
    cluster.play(iter(load(seed, count, seconds)), endings.append)
    while cluster.busy and cluster.clock.step(1000.0):
        if look is not None:
            look(cluster)
    return endings, cluster


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_nothing_is_left(policy: str) -> None:
    endings, cluster = history(policy)
    assert len(endings) == 120 and not cluster.running
    refused = [each for each in endings if each.refused]
    assert bool(refused) == (policy == "isolated"), "alone no worker holds the long ones"
    asked = {(each.prompt, each.output) for each in load(1, 120, 2.0)}
    for each in endings:
        assert each.asked <= each.first <= each.last
        assert each.refused or (each.prompt, each.output) in asked
    cluster.run(cluster.now + 10)
    assert all(w.blocks.used == w.blocks.lent == 0 and not w.sequences for w in cluster.workers.values())
    assert all(n.used == n.lent == n.borrowed == n.running == 0 for n in cluster.ledger.nodes.values())
    assert not cluster.awake and not cluster.ledger.layouts, "who has nothing tells nothing"


@pytest.mark.parametrize("policy", ["pooled", "proactive"])
def test_the_books_balance_after_every_event(policy: str) -> None:
    lent = []

    def look(cluster: Simulation) -> None:
        cluster.check()
        lent.append(sum(w.blocks.lent for w in cluster.workers.values()))

    history(policy, count=60, look=look)
    assert max(lent) > BLOCKS // 2, "nothing was lent, so nothing was checked"


def test_equal_seeds_give_equal_histories_and_others_others() -> None:
    assert history("proactive", 3)[0] == history("proactive", 3)[0] != history("proactive", 4)[0]


def test_steps_taken_in_one_go_end_when_they_would_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, cluster = history("isolated")
    monkeypatch.setattr(Worker, "_alike", one_by_one)
    single, slow = history("isolated")
    assert sum(w.steps for w in cluster.workers.values()) == sum(w.steps for w in slow.workers.values())
    assert cluster.clock.count < 0.7 * slow.clock.count
    for one, other in zip(found, single, strict=True):
        assert (one.prompt, one.output, one.node, one.refused) == (
            other.prompt,
            other.output,
            other.node,
            other.refused,
        )
        assert (one.first, one.last) == pytest.approx((other.first, other.last), rel=1e-9)


@pytest.mark.parametrize("policy", ["pooled", "proactive"])
def test_and_nearly_so_where_what_is_read_for_others_grows_meanwhile(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = history(policy)
    monkeypatch.setattr(Worker, "_alike", one_by_one)
    single, _ = history(policy)
    assert max(each.last for each in found) == pytest.approx(max(each.last for each in single), rel=0.05)


def test_a_request_alone_takes_what_the_cost_model_says() -> None:
    cluster = simulation(1, "pooled")
    endings: list[Ending] = []
    cluster.ask(100, 50, endings.append)
    cluster.run(1000.0)
    (only,) = endings
    assert only.first - only.asked == pytest.approx(max(COST.computing(100), COST.dense(0)))
    steps = sum(COST.decode_step(1, length) for length in range(101, 150))
    assert only.last - only.first == pytest.approx(steps, rel=1e-9)


def test_workers_on_shared_cores_wait_for_each_other() -> None:
    def last(cores: float | None) -> float:
        cluster = simulation(3, "isolated", cores=cores)
        endings: list[Ending] = []
        for _ in range(3):
            cluster.ask(100, 50, endings.append)
        cluster.run(1000.0)
        return max(each.last for each in endings)

    assert last(None) == last(3.0)
    assert 1.3 * last(None) < last(1.5) <= 2 * last(None)


def test_where_home_is_full_steps_with_blocks_of_a_lender_are_taken_in_one_go_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told() -> tuple[list[Ending], int, Simulation]:
        cluster = simulation(2, "pooled")
        endings: list[Ending] = []
        for _ in range(4):
            cluster.at(0.0, partial(cluster.ask, 2 * BLOCKS * BLOCK // 5, 90, endings.append))
        cluster.run(20.0)
        return endings, cluster.clock.count, cluster

    found, count, cluster = told()
    assert cluster.totals().rows == sum(each.output - 1 for each in found) + 4
    monkeypatch.setattr(Worker, "_alike", one_by_one)
    single, slow, other = told()
    assert count < 0.6 * slow and cluster.totals()[2:] == other.totals()[2:]
    assert [each.last for each in found] == pytest.approx([each.last for each in single], rel=1e-3)


@pytest.mark.parametrize("policy", ["pooled", "proactive"])
def test_a_step_that_would_be_the_same_is_not_decided_anew_and_nothing_changes(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[int] = []
    monkeypatch.setattr(worker, "schedule", lambda *given: decided.append(1) or schedule(*given))
    endings, cluster = history(policy, count=200, seconds=1.0)
    few = len(decided)
    monkeypatch.setattr(worker, "still", lambda _: object())
    again, other = history(policy, count=200, seconds=1.0)
    assert (again, other.totals()) == (endings, cluster.totals()) and cluster.totals().preemptions
    assert few < 0.9 * (len(decided) - few)


def test_somebody_watches_the_ledger_and_changes_nothing() -> None:
    seen: list[tuple[float, int]] = []

    def look(now: float, ledger: Ledger) -> None:
        seen.append((now, sum(loan.used for loan in ledger.loans.values())))

    alone, _ = history("pooled")
    cluster = simulation(3, "pooled", beat_seconds=0.05)
    endings: list[Ending] = []
    cluster.watch(0.25, look)
    cluster.play(iter(load(1, 120, 2.0)), endings.append)
    cluster.run(30.0)
    assert endings == alone
    assert [now for now, _ in seen] == [0.25 * k for k in range(121)]
    assert max(used for _, used in seen) > 10 and seen[-1][1] == 0
    with pytest.raises(BadRequest, match="every must be seconds above 0"):
        cluster.watch(0.0, look)


def test_the_totals_are_of_all_workers() -> None:
    endings, cluster = history("proactive")
    total = cluster.totals()
    assert total.rows >= total.steps > 0
    assert total.preemptions == sum(w.preemptions for w in cluster.workers.values()) > 0
    assert total.rows >= sum(each.output for each in endings)


def test_what_a_policy_orders_is_reserved_and_moves() -> None:
    def plan(ledger: Ledger, *_: object) -> tuple[MoveBlocks, ...]:
        there = [(home, seq) for home, layouts in ledger.layouts.items() for seq in layouts]
        return tuple(MoveBlocks(home, seq, "n0", "n1", 5, "so be it") for home, seq in there if home == "n0")[:1]

    cluster = simulation(2, "isolated", beat_seconds=0.05)
    cluster.policy = replace(cluster.policy, plan=plan, route=lambda *_: "n0")
    endings: list[Ending] = []
    cluster.ask(200, 90, endings.append)
    cluster.run(0.4)
    cluster.check()
    (sequence,) = cluster.workers["n0"].running
    assert sum(span.stop - span.start for span in sequence.layout if span.node == "n1") == 5 * BLOCK
    assert cluster.workers["n1"].blocks.lent >= 5 and cluster.totals().moved == 5 * BLOCK
    cluster.run(30.0)
    assert [each.output for each in endings] == [90]
