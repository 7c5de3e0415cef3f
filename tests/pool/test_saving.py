"""Saving up: a borrower keeps what each lender has, and only sequences that outgrow it take from that."""

from __future__ import annotations

from infinillm.core.recall import Terms
from infinillm.core.types import Refused
from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_placement import decoder


def borrow(cluster: Cluster, least: int, wanted: int, offered: int, *, save: bool) -> int | Refused:
    offers = [(name, peer.address, offered) for name, peer in cluster.peers.items() if peer is not cluster.home]
    return cluster.wait(cluster.home.lenders.borrow(least, wanted, offers, Terms(save, 0.0)))  # type: ignore[no-any-return]


def lent(cluster: Cluster) -> dict[str, int]:
    return {name: peer.memory.blocks.lent for name, peer in cluster.peers.items() if peer is not cluster.home}


def test_who_saves_takes_of_each_lender_what_it_has_and_keeps_it():
    with Cluster(decoder("llama"), {"a": 4, "b": 20, "c": 20}) as cluster:
        cluster.peers["b"].memory.blocks.grow("its own", 0, 15)
        assert isinstance(borrow(cluster, 30, 30, 20, save=False), Refused)
        assert lent(cluster) == {"b": 0, "c": 0}, "all or nothing"
        cluster.peers["c"].memory.blocks.grow("its own", 0, 13)
        assert borrow(cluster, 1, 30, 20, save=True) == 12
        assert lent(cluster) == {"b": 5, "c": 7}
        cluster.peers["b"].memory.blocks.release("its own")
        assert borrow(cluster, 1, 18, 20, save=True) == 15
        assert lent(cluster) == {"b": 20, "c": 7} and cluster.home.lenders.borrowed == 27
        assert isinstance(borrow(cluster, 1, 3, 0, save=True), Refused)
        cluster.home.lenders.saved_until = float("inf")
        cluster.wait(cluster.home.lenders.give_back_idle(0.0))
        assert lent(cluster) == {"b": 20, "c": 7}, "it is not idle"
        cluster.home.lenders.saved_until = 0.0
        cluster.wait(cluster.home.lenders.give_back_idle(0.0))
        assert lent(cluster) == {"b": 0, "c": 0}
        cluster.peers["c"].memory.blocks.release("its own")
        cluster.settle()


def test_a_request_that_fits_its_home_waits_there_and_one_that_does_not_uses_what_was_saved():
    prompts = [tiny.prompt(40, seed=1), tiny.prompt(40, seed=2), tiny.prompt(100, seed=3)]
    with Cluster(decoder("llama"), {"a": 8, "b": 40}, share=False) as cluster:
        assert borrow(cluster, 1, 20, 20, save=True) == 20
        cluster.submit(prompts[0], "first", arrival=1.0)
        cluster.submit(prompts[1], "second", arrival=2.0)
        cluster.turn()
        (first,) = cluster.engine.running
        assert first.id == "first" and {span.node for span in first.layout} == {"a"}
        cluster.submit(prompts[2], "large", arrival=3.0)
        places: dict[str, set[str]] = {}
        while cluster.engine.sequences:
            cluster.turn()
            for sequence in cluster.engine.running:
                places.setdefault(sequence.id, set()).update(span.node for span in sequence.layout)
        assert places == {"first": {"a"}, "second": {"a"}, "large": {"a", "b"}}
        cluster.settle()
