"""Recall in the simulated cluster: who starves has what it lent back, and the borrower goes on elsewhere or anew."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

from infinillm.core import claims, recall
from infinillm.core.blocks import Blocks
from infinillm.core.recall import AT_ONCE, Terms
from infinillm.core.request import total
from infinillm.sim import lender, moves
from infinillm.sim.simulation import Ending, Simulation
from infinillm.sim.worker import Worker
from tests.sim.test_simulation import BLOCK, BLOCKS, simulation

LONG, ANSWER = BLOCKS * BLOCK * 3 // 2, 200  # tokens
FULL, FEW = LONG - 15, 16  # with its answer it fills its last block
SHORT = 22 * BLOCK - 12  # with its answer, too


class Story(NamedTuple):
    """A long request borrows nearly all of a node; then a short one comes there, and waits."""

    long: Ending
    short: Ending
    cluster: Simulation


def story(
    monkeypatch: pytest.MonkeyPatch,
    after: float,
    grace: float,
    patience: float = 15.0,
    *,
    prompt: int = LONG,
    answer: int = ANSWER,
    meanwhile: float = 0.3,
    moving: bool = True,
) -> Story:
    monkeypatch.setattr(claims, "RECALL_AFTER_SECONDS", after)
    monkeypatch.setattr(moves, "GRACE_SECONDS", grace)
    monkeypatch.setattr(lender, "PATIENCE_SECONDS", patience)
    monkeypatch.setattr(claims, "REST_SECONDS", 0.5)
    cluster = simulation(2, "pooled", beat_seconds=0.05)
    for worker in cluster.workers.values():
        worker.moves.most *= moving
    long: list[Ending] = []
    short: list[Ending] = []
    cluster.ask(prompt, answer, long.append)
    cluster.run(meanwhile)
    cluster.ask(SHORT, 10, short.append)
    while cluster.busy and cluster.clock.step(1000.0):
        cluster.check()
    assert (long[0].output, short[0].output) == (answer, 10) and long[0].node != short[0].node
    return Story(long[0], short[0], cluster)


def test_who_starves_for_long_has_its_memory_back_before_the_borrower_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    never = story(monkeypatch, math.inf, 0.2)
    assert never.short.first > never.long.last and never.cluster.totals().preemptions == 0
    soon = story(monkeypatch, 0.2, 0.2)
    assert soon.short.first < soon.long.last
    assert soon.short.first - soon.short.asked > 0.2, "it starved"
    assert soon.cluster.totals().preemptions == 1, "the long one gave way, when it needed a block more"
    assert soon.long.last > never.long.last


def test_what_takes_long_to_compute_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "LEFT_ALONE_TIMES", 1e6)
    monkeypatch.setattr(recall, "RECALL_AFTER_SECONDS", 0.2)
    found = story(monkeypatch, 0.2, 0.2)
    assert found.short.first > found.long.last and found.cluster.totals().preemptions == 0


def test_what_lies_there_may_end_within_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(grace: float) -> Story:
        return story(monkeypatch, 0.0, grace, prompt=FULL, answer=FEW, meanwhile=0.06, moving=False)

    assert found(60.0).short.first > found(60.0).long.last and found(60.0).cluster.totals().preemptions == 0
    assert found(0.0).cluster.totals().preemptions == 1


def test_a_loan_of_which_nothing_comes_back_ends_and_the_holes_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holes: list[int] = []

    def lose(worker: Worker, node: str) -> None:
        lost(worker, node)
        holes.extend(total(sequence.holes) for sequence in worker.sequences.values())

    lost = Worker.lose
    monkeypatch.setattr(Worker, "lose", lose)
    found = story(monkeypatch, 0.0, 60.0, 0.01, prompt=FULL, answer=FEW, meanwhile=0.06)
    assert holes and max(holes) > 10 * BLOCK
    assert found.short.first < found.long.last


def test_the_ledger_hears_what_is_wanted_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RECALL_AFTER_SECONDS", 0.2)
    cluster = simulation(2, "pooled", beat_seconds=0.05)
    cluster.ask(LONG, ANSWER, lambda _: None)
    cluster.run(0.3)
    cluster.ask(SHORT, 10, lambda _: None)
    seen: list[int] = []
    cluster.watch(0.05, lambda _, ledger: seen.append(sum(loan.recalled for loan in ledger.loans.values())))
    cluster.run(2.0)
    assert seen[0] == 0 and max(seen) > 0


def test_what_was_lent_for_longer_is_not_wanted_back_before() -> None:
    books = Blocks("a", 40, BLOCK, 36)
    one = lender.Lender(books, 1)
    for borrower, blocks, terms in (("b", 20, Terms(save=False, hold=8.0)), ("c", 5, AT_ONCE)):
        assert one.offer(borrower, blocks, terms, now=2.0) == blocks and borrower not in books.loans
        one.lend(borrower, blocks, terms, now=2.0)
    assert one.recall(10, now=9.9) == [("c", 5)]
    assert one.recall(10, now=10.0) == [("b", 10)]
    assert one.offer("d", 1, AT_ONCE, now=11.0) is None, "it rests"
    assert [loan.recalled for loan in one.told()] == [10, 5]
