"""What is not told, asked or decided again, because nothing has changed, changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from infinillm.core.claims import Starving
from infinillm.core.ledger import Report
from infinillm.core.moves import Wish
from infinillm.core.pace import RECALL_AFTER_SECONDS
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.scheduler import Shortage, shortage
from infinillm.core.types import Layout, Ledger, Move, SeqId, Step
from infinillm.sim import asking, simulation
from infinillm.sim.losses import DIES, RETURNS, Loss, schedule
from infinillm.sim.remembered import Remembered
from infinillm.sim.simulation import Ending
from infinillm.sim.traffic import Arrival
from infinillm.sim.worker import Worker
from tests.sim.test_simulation import BLOCK, BLOCKS, load
from tests.sim.test_simulation import simulation as cluster_of

LONG = BLOCKS * BLOCK * 3 // 2  # more than a worker holds


def sessions(seed: int) -> list[Arrival]:
    """Turns that go on with what was said before, between other requests."""
    found: list[Arrival] = []
    for number, each in enumerate(load(seed, 150, 4.0)):
        prompt = each.prompt + 20 * (number // 10)
        found.append(Arrival(each.at, prompt, each.output, f"s{number % 10}", prompt // 2))
    return found


def outcome(policy: str, arrivals: list[Arrival]) -> tuple[list[Ending], list[object], object]:
    """How all ended, what the ledger was meanwhile, and what was done in all; a worker dies and comes back."""
    cluster = cluster_of(4, policy, beat_seconds=0.05)
    schedule(cluster, [Loss(3.0, "n2", DIES), Loss(5.0, "n2", RETURNS)])
    endings: list[Ending] = []
    seen: list[object] = []

    def look(now: float, ledger: Ledger) -> None:
        assert cluster.calm <= {*cluster.awake}
        marks = {node: each.marks for node, each in cluster.reports.items()}
        seen.append((now, ledger, marks, cluster.orders, [*cluster.awake]))

    cluster.watch(0.05, look)
    cluster.play(iter(arrivals), endings.append)
    while cluster.busy and cluster.clock.step(1000.0):
        cluster.check()
    return endings, seen, cluster.totals()


def anew(worker: Worker, step: Step) -> Shortage:
    more = worker.borrower.blocks - worker.blocks.lent
    return shortage(step, worker.running, worker.waiting, worker.size, worker.blocks.count, more, worker.cost)


@pytest.mark.parametrize(
    ("policy", "arrivals"),
    [
        ("pooled", load(1, 150, 2.0)),
        ("proactive", load(2, 150, 2.0)),
        ("pooled", sessions(3)),
        ("proactive", sessions(4)),
    ],
    ids=["pooled", "proactive", "pooled sessions", "proactive sessions"],
)
def test_nothing_is_other_than_where_all_is_told_and_asked_each_time(
    policy: str, arrivals: list[Arrival], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = outcome(policy, arrivals)
    monkeypatch.setattr(simulation, "calm", lambda worker: False)
    monkeypatch.setattr(Remembered, "ask", lambda self, ledger, question, find: find())
    monkeypatch.setattr(asking, "_shortage", anew)
    assert found == outcome(policy, arrivals)


def test_a_lender_is_calm_while_its_borrower_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    report = simulation.report

    def listen(worker: Worker, layouts: Mapping[SeqId, Layout] | None) -> Report:
        told.append(worker.id)
        return report(worker, layouts)

    monkeypatch.setattr(simulation, "report", listen)
    cluster = cluster_of(2, "pooled", beat_seconds=0.0005)
    cluster.ask(LONG, 2, lambda _: None)
    cluster.run(0.03)
    home = next(worker for worker in cluster.workers.values() if worker.running)
    lender = next(name for name in cluster.workers if name != home.id)
    assert home.going is not None and cluster.calm == {lender} and cluster.ledger.nodes[lender].lent > 0
    told.clear()
    cluster.run(home.going.began + home.going.seconds(1) - 1e-6)
    assert home.id in told and lender not in told
    cluster.run(5.0)
    assert lender in told and not cluster.ledger.loans and not cluster.awake, "it told what was given back"


def test_who_has_borrowed_for_an_order_is_not_calm_any_more() -> None:
    cluster = cluster_of(2, "pooled", beat_seconds=0.0005)
    cluster.ask(500, 2, lambda _: None)
    home = next(worker for worker in cluster.workers.values() if worker.running)
    other = next(name for name in cluster.workers if name != home.id)
    cluster.promised.heard(home.id, 1.0)
    cluster.run(0.005)
    assert home.id in cluster.calm
    home.obey(MoveBlocks(home.id, "s1", home.id, other, 3, "an order"))
    assert home.borrower.blocks == 3 and home.id not in cluster.calm, "what it does not use goes back"


def wants_back(home: Worker, lender: Worker) -> None:
    request = home.running[0].request
    lender.borrower.starving = Starving(request.id, -2 * RECALL_AFTER_SECONDS)
    asking._starve(lender, request, 1, another_saves=False)


def stages(home: Worker, lender: Worker) -> None:
    home.moves.wishes = (Wish(Move(home.running[0].id, home.id, lender.id, 0, 1), "a test"),)
    home.moves.reserve(home.running)
    assert home.moves.now


@pytest.mark.parametrize(
    ("act", "stirred"),
    [
        (lambda home, lender: lender.share(home.id, "another", {}), "lender"),
        (lambda home, lender: home.lose(lender.id), "home"),
        (wants_back, "lender"),
        (stages, "lender"),
    ],
    ids=["share", "lose", "recall", "stage"],
)
def test_what_is_done_to_a_worker_stirs_it(act: Callable[[Worker, Worker], object], stirred: str) -> None:
    cluster = cluster_of(2, "pooled")
    cluster.ask(LONG, 40, lambda _: None)
    cluster.run(0.1)
    home = next(worker for worker in cluster.workers.values() if worker.running)
    lender = next(worker for worker in cluster.workers.values() if worker is not home)
    home.settle()
    assert home.running[0].produced and lender.blocks.lent
    cluster.calm = {*cluster.workers}
    act(home, lender)
    assert (home if stirred == "home" else lender).id not in cluster.calm


def test_an_answer_holds_for_one_question_and_one_ledger() -> None:
    asked: list[int] = []
    answers, first = Remembered(), Ledger(1)

    def find() -> int:
        asked.append(1)
        return len(asked)

    def answer(ledger: Ledger, question: str) -> int:
        return answers.ask(ledger, question, find)

    assert [answer(first, "a"), answer(first, "a"), answer(first, "b"), answer(first, "a")] == [1, 1, 2, 1]
    assert [answer(Ledger(1), "a"), answer(first, "a")] == [3, 4], "equal is not enough: only the same value is quick"
