"""Prefixes of simulated sessions: equal names where tokens are equal, and nothing computed twice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from infinillm.core.names import prefix_hashes
from infinillm.core.policy import POLICIES
from infinillm.core.recall import AT_ONCE
from infinillm.sim.names import Sessions
from infinillm.sim.simulation import Ending, Simulation
from tests.sim.test_simulation import BLOCK, simulation

TURNS = ((90, 30), (140, 20), (400, 40))  # tokens of prompts and answers; each prompt has all that was said before


@pytest.mark.parametrize("seed", range(5))
def test_names_are_equal_where_the_hashes_of_the_tokens_are(seed: int) -> None:
    """Of sessions that share all, a part, or nothing with their last turn."""
    draw, sessions = random.Random(seed), Sessions(BLOCK)
    said: dict[str, list[int]] = {}
    names: list[tuple[int, bytes]] = []
    hashes: list[tuple[int, bytes]] = []
    for _ in range(30):
        session = draw.choice("abc")
        before = said.get(session, [])
        shared = draw.choice((len(before), draw.randint(0, len(before))))
        said[session] = before[:shared] + [draw.getrandbits(30) for _ in range(draw.randint(1, 100))]
        found = sessions.names(session, shared)
        assert found is not None
        true = prefix_hashes(said[session], BLOCK)
        names += enumerate(found.upto(len(true)))
        hashes += enumerate(true)
    for i, (one, true) in enumerate(zip(names, hashes, strict=True)):
        for other, another in zip(names[:i], hashes[:i], strict=True):
            assert (one == other) <= (true == another), "never equal where tokens differ"
    assert len(set(names)) == len(set(hashes)) < len(names)


def test_requests_outside_sessions_have_no_names() -> None:
    assert Sessions(BLOCK).names("", 0) is None


def talk(cluster: Simulation, session: str, wait: float = 1.0) -> list[Ending]:
    endings: list[Ending] = []
    shared = 0
    for prompt, output in TURNS:
        cluster.ask(prompt, output, endings.append, session, shared)
        cluster.run(cluster.now + wait)
        shared = prompt + output
    return endings


@pytest.mark.parametrize("policy", POLICIES)
def test_a_session_goes_on_where_it_was_and_computes_only_what_is_new(policy: str) -> None:
    cluster = simulation(3, policy)
    endings = talk(cluster, "s")
    assert len({each.node for each in endings}) == 1, "the landmark says where"
    (worker,) = (w for w in cluster.workers.values() if w.id == endings[0].node)
    assert worker.shared == (90 + 30 - 1) // BLOCK * BLOCK + (140 + 20 - 1) // BLOCK * BLOCK
    cluster.check()
    alone = simulation(3, policy)
    others = talk(alone, "")
    assert all(w.shared == 0 for w in alone.workers.values())
    assert endings[2].first - endings[2].asked < others[2].first - others[2].asked


def test_what_another_node_has_is_used_where_it_lies() -> None:
    cluster = simulation(2, "pooled")
    endings: list[Ending] = []
    cluster.ask(300, 30, endings.append, "s", 0)
    cluster.run(1.0)
    busy = cluster.workers[endings[0].node]
    (home,) = (w for w in cluster.workers.values() if w is not busy)
    cluster.policy = replace(cluster.policy, route=lambda *_: busy.id)
    for _ in range(2):
        cluster.ask(30, 90, endings.append)
    cluster.run(1.6)
    cluster.policy = replace(cluster.policy, route=lambda *_: home.id)
    cluster.ask(400, 10, endings.append, "s", 330)
    cluster.check()
    (guest,) = home.sequences.values()
    assert home.shared == 320 and {span.node for span in guest.layout} == {"n0", "n1"}
    cluster.run(20.0)
    cluster.check()
    assert len(endings) == 4 and not cluster.running
    assert all(w.blocks.used == w.blocks.lent == 0 for w in cluster.workers.values())


def test_a_loan_of_nothing_that_was_enlarged_in_vain_is_over() -> None:
    cluster = simulation(2, "pooled")
    home, other = cluster.workers.values()
    assert home._share("n1", "s", {0: b"unknown"}) == []
    assert other.blocks.loans["n0"].blocks == 0 and [*home.borrower.accounts] == ["n1"]
    assert not home.borrower.reserve(50, 50, [("n1", 10)], AT_ONCE)
    assert not other.blocks.loans and not home.borrower.accounts
    cluster.check()
