"""Losses in the simulated cluster: nodes die and come back, and every request is answered all the same."""

from __future__ import annotations

import random
from functools import partial

import pytest

from infinillm.core import claims
from infinillm.core.pace import DOUBT_SECONDS, SILENT_BEATS
from infinillm.core.policy import POLICIES
from infinillm.errors import BadRequest
from infinillm.sim import lender, moves
from infinillm.sim.losses import DIES, RETURNS, Loss, schedule
from infinillm.sim.simulation import Ending, Simulation
from tests.sim.test_simulation import BLOCK, BLOCKS, load, simulation

BEAT = 0.05


def history(policy: str, losses: list[Loss], seed: int = 1, count: int = 120) -> tuple[list[Ending], Simulation]:
    cluster = simulation(3, policy, beat_seconds=BEAT)
    endings: list[Ending] = []
    schedule(cluster, losses)
    cluster.play(iter(load(seed, count, 2.0)), endings.append)
    while cluster.busy and cluster.clock.step(1000.0):
        cluster.check()
    return endings, cluster


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("at", [0.31, 0.9, 1.4])
def test_what_a_node_ran_goes_on_elsewhere_and_the_books_balance(policy: str, at: float) -> None:
    losses = [Loss(at, "n0", DIES), Loss(at + 0.4, "n0", RETURNS)]
    endings, cluster = history(policy, losses)
    whole, _ = history(policy, [])
    assert len(endings) == len(whole) == 120
    served = sorted((each.prompt, each.output) for each in endings if not each.refused)
    assert served == sorted((each.prompt, each.output) for each in whole if not each.refused), "with every token"
    assert cluster.past[0].steps and endings != whole
    assert any(each.node == "n0" and each.asked > at + 0.4 for each in endings), "it serves again"
    cluster.run(cluster.now + 10)
    assert all(w.blocks.used == w.blocks.lent == 0 for w in cluster.workers.values())


def test_equal_losses_give_equal_histories() -> None:
    losses = [Loss(0.5, "n1", DIES), Loss(0.9, "n2", DIES), Loss(1.4, "n1", RETURNS)]
    found, _ = history("proactive", losses)
    assert found == history("proactive", losses)[0] != history("proactive", losses[:1])[0]


def test_a_borrower_computes_again_what_its_lender_held_and_goes_on() -> None:
    cluster = simulation(2, "pooled", beat_seconds=BEAT)
    endings: list[Ending] = []
    cluster.ask(BLOCKS * BLOCK * 5 // 4, 90, endings.append)
    while not (lenders := [w for w in cluster.workers.values() if w.blocks.lent]) or not cluster.totals().rows > 20:
        cluster.clock.step(10.0)
    (lender,) = lenders
    (home,) = (w for w in cluster.workers.values() if w is not lender)
    (sequence,) = home.running
    computed, there = sequence.computed, sum(s.stop - s.start for s in sequence.layout if s.node == lender.id)
    cluster.die(lender.id)
    assert 0 < computed - sequence.computed <= there and sequence.holes
    cluster.check()
    cluster.at(cluster.now + 0.1, lambda: cluster.revive(lender.id))
    cluster.run(20.0)
    (only,) = endings
    assert (only.output, only.node, only.refused) == (90, home.id, "")
    assert not sequence.holes


def test_where_nobody_could_hold_it_any_more_it_is_refused() -> None:
    cluster = simulation(2, "pooled", beat_seconds=BEAT)
    endings: list[Ending] = []
    cluster.ask(BLOCKS * BLOCK * 5 // 4, 90, endings.append)
    cluster.run(0.2)
    (lender,) = (w.id for w in cluster.workers.values() if w.blocks.lent)
    cluster.die(lender)
    cluster.run(20.0)
    (only,) = endings
    assert "too small for this request" in only.refused


def test_where_all_are_lost_requests_are_refused() -> None:
    cluster = simulation(2, "pooled", beat_seconds=BEAT)
    endings: list[Ending] = []
    cluster.ask(100, 50, endings.append)
    cluster.die("n0")
    cluster.die("n1")
    (only,) = endings
    assert "no worker is ready to serve besides n0, n1" in only.refused
    cluster.die("n1")
    cluster.run(1.0)
    assert not cluster.ledger.nodes


def test_the_ledger_keeps_a_node_until_it_was_silent_for_long_and_lenders_keep_its_blocks_in_doubt() -> None:
    cluster = simulation(2, "pooled", beat_seconds=BEAT)
    cluster.ask(BLOCKS * BLOCK * 5 // 4, 90, lambda _: None)
    cluster.run(0.2)
    (lender,) = (w for w in cluster.workers.values() if w.blocks.lent)
    (home,) = (w for w in cluster.workers.values() if w is not lender)
    cluster.die(home.id)
    assert lender.blocks.lent
    cluster.run(0.2 + SILENT_BEATS * BEAT)
    assert home.id in cluster.ledger.nodes
    cluster.run(0.2 + (SILENT_BEATS + 2) * BEAT)
    assert home.id not in cluster.ledger.nodes
    cluster.run(0.2 + DOUBT_SECONDS - 0.01)
    assert home.id in lender.blocks.loans
    cluster.run(0.2 + DOUBT_SECONDS + 2 * BEAT)
    assert not lender.blocks.loans
    cluster.check()
    cluster.revive(home.id)
    assert cluster.ledger.nodes[home.id].incarnation == "2"


@pytest.mark.parametrize(
    ("loss", "field"),
    [(Loss(1.0, "n7", DIES), "node"), (Loss(1.0, "n0", "sleeps"), "what"), (Loss(-1.0, "n0", DIES), "at")],
)
def test_losses_that_cannot_be_are_refused(loss: Loss, field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        schedule(simulation(2, "pooled"), [loss])
    assert refused.value.field == field


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", POLICIES)
def test_sessions_recalls_and_losses_all_at_once(policy: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes die and come back while sessions share what they said and lenders want memory back: all is answered."""
    monkeypatch.setattr(claims, "RECALL_AFTER_SECONDS", 3.0)
    monkeypatch.setattr(moves, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(claims, "REST_SECONDS", 2.0)
    monkeypatch.setattr(lender, "PATIENCE_SECONDS", 1.0)
    draw, cluster, endings = random.Random(seed), simulation(3, policy, beat_seconds=BEAT), list[Ending]()
    dead = [(draw.uniform(0, 3), node) for node in ("n0", "n2")]
    schedule(cluster, [Loss(at, node, DIES) for at, node in dead] + [Loss(at + 0.8, n, RETURNS) for at, n in dead])
    said = dict.fromkeys("abc", 0)
    for arrival in load(seed, 80, 2.0):
        session = draw.choice("abc ").strip()
        shared = said.get(session, 0) if said.get(session, 0) < 500 else 0
        prompt = arrival.prompt + shared if session and arrival.prompt < 400 else arrival.prompt
        if session:
            said[session] = prompt + arrival.output
        ask = partial(cluster.ask, prompt, arrival.output, endings.append, session, min(shared, prompt))
        cluster.at(arrival.at, ask)
    while (cluster.busy or cluster.now < 4) and cluster.clock.step(1000.0):
        cluster.check()
    assert len(endings) == 80 and sum(not each.refused for each in endings) > 40
    cluster.run(cluster.now + 30)
    assert all(w.blocks.used == w.blocks.lent == 0 and not w.needs for w in cluster.workers.values())
    assert not cluster.awake
