"""Recall: a lender gets its memory back: there is room at home, at another lender, or the youngest gives way."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import replace
from typing import Any

import pytest

from infinillm.core.claims import Claims
from infinillm.core.pace import MOST_HELD_SECONDS, REST_SECONDS
from infinillm.core.types import Span
from infinillm.pool.answer import PoolService
from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_fences import lend, lending
from tests.pool.test_moves import counted, layout, moved, start
from tests.pool.test_placement import LENGTH, OUTPUT, agree, decoder, truth


def recall(cluster: Cluster, blocks: int) -> None:
    """b recalls; returns when a has heard it."""
    cluster.loop.call_soon_threadsafe(cluster.peers["b"].service.recall, blocks)
    assert cluster.heard.wait(10)  # type: ignore[attr-defined]


def listening(cluster: Cluster) -> Cluster:
    """The cluster, before its first loan, so that a test can wait for a recall to be heard."""
    lenders, heard = cluster.home.lenders, threading.Event()
    hear = lenders.recalled

    def told(node: str, blocks: int) -> None:
        hear(node, blocks)
        heard.set()

    lenders.recalled = told  # type: ignore[method-assign]
    cluster.heard = heard  # type: ignore[attr-defined]
    return cluster


def tidy(cluster: Cluster) -> None:
    """What a worker does twice a second; nothing is idle for so long."""
    cluster.wait(cluster.home.lenders.give_back_idle(1e9))


def lent(cluster: Cluster) -> int:
    return cluster.peers["b"].memory.blocks.lent


def test_what_is_not_used_comes_back_at_once_and_is_not_used_meanwhile():
    with Cluster(decoder("llama"), {"a": 30, "b": 20}) as cluster:
        listening(cluster).lend("b", 12)
        tidy(cluster)
        assert lent(cluster) == 12
        recall(cluster, 5)
        assert cluster.home.lenders.room() == {"b": 7} and cluster.home.lenders.owed() == {}
        tidy(cluster)
        assert lent(cluster) == 7 and cluster.home.lenders.room() == {"b": 7}
        cluster.heard.clear()  # type: ignore[attr-defined]
        cluster.peers["b"].service.expire(0.0)
        recall(cluster, 99)
        tidy(cluster)
        assert lent(cluster) == 0 and not cluster.home.lenders.accounts
        cluster.settle()


def test_what_is_used_moves_home_and_nothing_is_computed_twice():
    with Cluster(decoder("llama"), {"a": 30, "b": 20}, moves=16) as cluster:
        cluster.home.memory.blocks.grow("somebody", 0, 20)
        listening(cluster).lend("b", 12)
        start(cluster, 4)
        assert layout(cluster) == (Span("a", 0, 80), Span("b", 80, 160))
        cluster.home.memory.blocks.release("somebody")
        recall(cluster, 8)
        for _ in range(5):
            cluster.turn()
            tidy(cluster)
        assert layout(cluster)[0] == Span("a", 0, 80 + 6 * 8) and cluster.home.lenders.owed() == {}
        assert lent(cluster) == 4 and moved(cluster, "home") == 6 * 8
        cluster.peers["b"].service.expire(1e-9)
        assert not cluster.peers["b"].service.claims.recalls and lent(cluster) == 4
        agree(cluster.finish()["s"], truth("llama"))
        assert counted(cluster, "infinillm_step_tokens_sum") == LENGTH + OUTPUT - 1
        assert counted(cluster, "infinillm_preemptions_total") == 0
        cluster.settle()


def test_where_home_has_no_room_what_lies_there_may_end_within_the_grace():
    with Cluster(decoder("llama"), {"a": 10, "b": 40}, share=False) as cluster:
        listening(cluster).lend("b", 30)
        prompt = tiny.prompt(LENGTH - 5)
        cluster.submit(prompt, id="s", max_tokens=6)  # its blocks have room for them
        cluster.turn()
        recall(cluster, 30)
        cluster.finish()
        tidy(cluster)
        assert lent(cluster) == 0
        assert counted(cluster, "infinillm_step_tokens_sum") == len(prompt) + 5
        assert counted(cluster, "infinillm_preemptions_total") == 0
        cluster.settle()


def test_after_it_the_youngest_that_lies_there_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infinillm.engine.moves.GRACE_SECONDS", 0.0)
    with Cluster(decoder("llama"), {"a": 24, "b": 40}, share=False) as cluster:
        listening(cluster).lend("b", 30)
        for seed, id in enumerate(("s", "t"), 1):
            cluster.submit(tiny.prompt(LENGTH, seed), id=id, arrival=float(seed), max_tokens=OUTPUT, logprobs=0)
        while len(cluster.home.outputs) < 6:
            cluster.turn()
        assert cluster.home.memory.blocks.room == 0
        recall(cluster, 30)
        while not cluster.engine.waiting:  # first nobody else lends any
            cluster.turn()
        assert [s.id for s in cluster.engine.waiting] == ["t"]
        while lent(cluster):
            cluster.turn()
            tidy(cluster)
        assert "s" in cluster.engine.sequences  # its last block moved home as soon as it was full
        got = cluster.finish()
        for seed, id in enumerate(("s", "t"), 1):
            agree(got[id], truth("llama", seed=seed))
        assert counted(cluster, "infinillm_preemptions_total") == 1
        cluster.settle()


def test_where_home_is_full_another_lender_takes_them_and_nobody_gives_way():
    with Cluster(decoder("llama"), {"a": 10, "b": 20, "c": 20}) as cluster:
        listening(cluster).lend("b", 12)
        start(cluster, 4)
        assert layout(cluster)[0] == Span("a", 0, 80)
        recall(cluster, 12)
        while lent(cluster):
            assert "s" in cluster.engine.sequences
            cluster.turn()
            tidy(cluster)
            cluster.home.memory.blocks.check()
        assert {span.node for span in layout(cluster)} == {"a", "c"}
        assert moved(cluster, "home") >= 80
        assert moved(cluster, "away") >= 80
        agree(cluster.finish()["s"], truth("llama"))
        assert counted(cluster, "infinillm_step_tokens_sum") == LENGTH + OUTPUT - 1
        assert counted(cluster, "infinillm_preemptions_total") == 0
        cluster.settle()


def test_room_for_what_is_recalled_is_not_given_to_who_waits():
    with Cluster(decoder("llama"), {"a": 10, "b": 20, "c": 40}) as cluster:
        listening(cluster).lend("b", 12)
        start(cluster, 2)
        cluster.share = False
        cluster.lend("c", 12)
        recall(cluster, 12)
        cluster.submit(tiny.prompt(40, 2), id="t", arrival=1.0)  # there is room for it on c, and soon at home
        while lent(cluster):
            assert "s" in cluster.engine.sequences
            cluster.turn()
            tidy(cluster)
            held = cluster.home.lenders.accounts["c"].held
            assert "t" not in held or lent(cluster) <= 1, "only the block it writes into may take longer"
        agree(cluster.finish()["s"], truth("llama"))
        assert counted(cluster, "infinillm_preemptions_total") == 0
        cluster.settle()


@pytest.mark.parametrize("seed", range(3))
def test_lenders_want_their_memory_back_again_and_again_and_no_token_changes(seed, monkeypatch):
    monkeypatch.setattr("infinillm.core.claims.REST_SECONDS", 0.0)
    """Every few steps one of three lenders recalls some; others have room, mostly; each gets its own back in time."""
    draw, lengths = random.Random(seed), {"s": (LENGTH, 1), "t": (70, 2), "u": (45, 3)}
    with Cluster(decoder("llama"), {"a": 12, "b": 16, "c": 16, "d": 16}, step_tokens=48, moves=32) as cluster:
        for arrival, (id, (length, each)) in enumerate(lengths.items()):
            cluster.submit(tiny.prompt(length, each), id=id, arrival=float(arrival), max_tokens=OUTPUT, logprobs=0)
        cluster.engine.hear(block=False)
        waited = dict.fromkeys("bcd", 0)
        while cluster.engine.sequences:
            cluster.turn()
            tidy(cluster)
            for id, peer in cluster.peers.items():
                peer.memory.blocks.check()
                if id in waited:
                    peer.service.expire(0.0)
                    waited[id] = waited[id] + 1 if peer.service.claims.recalls else 0
            assert max(waited.values()) < 80, waited
            if not any(waited.values()) and draw.random() < 0.3:
                peer = cluster.peers[draw.choice("bcd")]
                cluster.loop.call_soon_threadsafe(peer.service.recall, draw.randint(1, 12))
        outputs: dict[str, list[Any]] = {}
        for output in cluster.home.outputs:
            outputs.setdefault(output.id, []).append(output)
        for id, (length, each) in lengths.items():
            agree(outputs[id], truth("llama", length, OUTPUT, each))
        assert moved(cluster, "home") > 50
        for peer in cluster.peers.values():
            peer.service.claims = Claims()
        cluster.settle()


def test_a_recall_that_nobody_was_there_to_hear_is_said_again():
    with Cluster(decoder("llama"), {"a": 30, "b": 20}) as cluster:
        cluster.home.memory.blocks.grow("somebody", 0, 20)
        listening(cluster).lend("b", 12)
        start(cluster, 2)
        cluster.home.memory.blocks.release("somebody")
        cluster.home.lenders.reset(["b"])
        cluster.loop.call_soon_threadsafe(cluster.peers["b"].service.recall, 12)
        while lent(cluster):
            assert "s" in cluster.engine.sequences
            cluster.turn()
            tidy(cluster)
        assert cluster.heard.is_set()  # type: ignore[attr-defined]
        agree(cluster.finish()["s"], truth("llama"))
        assert counted(cluster, "infinillm_step_tokens_sum") == LENGTH + OUTPUT - 1
        cluster.settle()


def test_a_borrower_that_returns_nothing_loses_its_loan_and_only_what_was_recalled_counts():
    async def test(client: Any, service: PoolService) -> None:
        now = 1000.0
        service.clock = lambda: now
        one = (await lend(client, "1")).loan
        other = (await lend(client, "1", borrower="c")).loan
        await lend(client, "1", other.id, "c")
        service.recall(4)
        service.recall(4)
        assert set(service.claims.recalls) == {other.id}
        refused = (await lend(client, "1", other.id, "c")).refused
        assert refused == "b wants blocks back from c"
        now += service.patience - 1
        service.expire(0.0)
        assert set(service.memory.blocks.loans) == {"a", "c"}
        now += 1
        service.expire(0.0)
        assert [loan.id for loan in service.memory.blocks.loans.values()] == [one.id] and service.claims.recalls == {}

    lending(test)


def test_a_recall_is_over_once_enough_came_back():
    async def test(client: Any, service: PoolService) -> None:
        now = 1000.0
        service.clock = lambda: now
        loan = (await lend(client, "1")).loan.id
        service.recall(2)
        await asyncio.to_thread(service.memory.blocks.give_back, "a", 2)
        now += service.patience + 1
        service.expire(0.0)
        assert service.memory.blocks.loans["a"].blocks == 1
        assert (await lend(client, "1", loan)).loan.blocks == 4

    lending(test)


def test_what_was_wanted_back_is_not_lent_again_at_once():
    async def test(client: Any, service: PoolService) -> None:
        now = 1000.0
        service.clock = lambda: now
        loan = (await lend(client, "1")).loan
        service.memory.keep_back(3, now + 5)
        service.recall(loan.blocks)
        assert service.memory.kept_back(now) == 0, "it is for its own requests"
        await asyncio.to_thread(service.memory.blocks.give_back, "a")
        assert "just wanted blocks back" in (await lend(client, "1", borrower="c")).refused
        now += REST_SECONDS
        service.recall(0)
        assert service.claims.rests_until == now, "nothing was wanted"
        assert (await lend(client, "1", borrower="c")).loan.blocks == loan.blocks

    lending(test)


def test_what_is_lent_for_a_request_that_gave_way_is_not_wanted_back_for_so_long():
    async def test(client: Any, service: PoolService) -> None:
        now = 1000.0
        service.clock = lambda: now
        loan = (await lend(client, "1", hold=30.0)).loan
        other = (await lend(client, "1", borrower="c")).loan
        service.recall(2)
        assert service.claims.recalls.keys() == {other.id}, "the other loan has what is wanted, and may be disturbed"
        service.claims = replace(service.claims, recalls={}, rests_until=0.0)
        await lend(client, "1", loan.id, hold=5.0)
        now += 29.0
        service.recall(2)
        assert service.claims.recalls.keys() == {other.id}, "what was said first still counts"
        now += 2.0
        service.claims = replace(service.claims, recalls={})
        service.recall(2)
        assert service.claims.recalls.keys() == {loan.id}, "it is the larger one"
        service.claims = replace(service.claims, rests_until=0.0)
        for said in (-1.0, float("nan"), float("inf")):
            assert service.claims.held.keys() == {loan.id}
            forever = (await lend(client, "1", borrower="d", hold=said)).loan
        assert service.claims.held[forever.id] == now + MOST_HELD_SECONDS
        await asyncio.to_thread(service.memory.blocks.give_back, "d")
        service.expire(0.0)
        assert forever.id not in service.claims.held and loan.id in service.claims.held

    lending(test)


def test_a_recall_that_is_heard_before_the_loan_is_entered_counts():
    with Cluster(decoder("llama"), {"a": 30, "b": 20}) as cluster:
        lenders, entered = cluster.home.lenders, cluster.home.lenders._open

        def open_and_hear(*told: Any) -> Any:
            opened = entered(*told)
            lenders.recalled("b", 5)
            return opened

        lenders._open = open_and_hear  # type: ignore[method-assign]
        cluster.lend("b", 12)
        assert lenders.room() == {"b": 7}
        tidy(cluster)
        assert lent(cluster) == 7
        cluster.settle()
