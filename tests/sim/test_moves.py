"""Moves of simulated workers: blocks travel beside steps, and the steps at both ends take longer by what that takes."""

from __future__ import annotations

import pytest

from infinillm.core.policy.orders import MoveBlocks
from infinillm.sim.simulation import Simulation
from infinillm.sim.worker import Worker
from tests.sim.test_simulation import BLOCK, COST, simulation


def moving(other_computes: bool) -> tuple[Simulation, Worker, Worker]:
    """n0 has decided on a step beside which the first of two blocks goes to n1."""
    cluster = simulation(2, "pooled")
    cluster.ask(100, 500, lambda _: None)
    if other_computes:
        cluster.ask(100, 500, lambda _: None)
    home, other = cluster.workers.values()
    cluster.run(0.05)
    assert (home.going is not None) and (other.going is not None) == other_computes
    (sequence,) = home.running
    home.obey(MoveBlocks("n0", sequence.id, "n0", "n1", 2, "the test"))
    while not home.moves.now:
        cluster.clock.step(10.0)
    return cluster, home, other


def alone(worker: Worker) -> float:
    """What the first of the steps in hand would take without moves."""
    assert worker.going is not None
    return worker._seconds(worker.going.step.chunks, 0, ())


def test_a_step_takes_longer_by_what_moves_beside_it() -> None:
    cluster, home, _ = moving(other_computes=False)
    for _ in range(2):
        assert home.going is not None and home.moves.now
        assert (home.going.times, home.going.first) == (1, pytest.approx(alone(home) + COST.move(BLOCK)))
        cluster.clock.step(10.0)
    assert home.moves.tokens == 2 * BLOCK and home.going.times > 1
    assert home.going.first == pytest.approx(alone(home)), "nothing moves any more"


def test_so_do_the_next_steps_of_who_computes_at_the_other_end() -> None:
    cluster, _, other = moving(other_computes=True)
    before = other.going
    other.cut()
    while other.going is before:
        taken = other.moves.taken
        cluster.clock.step(10.0)
    assert taken >= COST.move(BLOCK) and not other.moves.taken and other.going is not None
    assert other.going.first == pytest.approx(alone(other) + taken / other.going.times)


def test_who_does_nothing_at_the_other_end_owes_nothing() -> None:
    _, _, other = moving(other_computes=False)
    assert not other.moves.taken
