"""What is told of a pool while things happen in it: recalls that are open, moves under way, holes that are filled."""

from __future__ import annotations

from infinillm.core.moves import Wish
from infinillm.core.types import Move, Span
from infinillm.engine.messages import MoveBlocks
from tests.cluster import Cluster
from tests.pool.test_losses import cut
from tests.pool.test_moves import counted, start
from tests.pool.test_placement import agree, decoder, truth
from tests.pool.test_recall import listening, recall, tidy


def wanted(cluster: Cluster) -> tuple[list[int], float]:
    """Blocks wanted back, by the lender's books of its loans and by the borrower's metric."""
    lender = cluster.peers["b"]
    cluster.home.lenders.measure()
    loans = [lender.service.claims.wanted(loan) for loan in lender.memory.blocks.loans.values()]
    return loans, counted(cluster, 'infinillm_recalled_blocks{node="a",side="borrower"}')


def test_a_recall_is_told_until_it_is_paid() -> None:
    with Cluster(decoder("llama"), {"a": 30, "b": 20}) as cluster:
        listening(cluster).lend("b", 12)
        assert wanted(cluster) == ([0], 0)
        recall(cluster, 5)
        assert wanted(cluster) == ([5], 5)
        tidy(cluster)
        assert wanted(cluster) == ([0], 0)
        cluster.settle()


def test_what_waits_to_move_is_told_until_it_is_there() -> None:
    with Cluster(decoder("llama"), {"a": 30, "b": 20}, moves=16) as cluster:
        cluster.lend("b", 12)
        start(cluster, 4)
        assert cluster.engine.placement("s").moving == ()
        cluster.engine.inbox.put(MoveBlocks("a", "s", "a", "b", 5, "a test"))
        cluster.turn()
        assert cluster.engine.placement("s").moving == (Wish(Move("s", "a", "b", 16, 3), "a test"),)
        assert cluster.engine.load.moving == 3
        cluster.turn()
        cluster.turn()
        assert (cluster.engine.placement("s").moving, cluster.engine.load.moving) == ((), 0)
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()


def test_what_is_moving_now_is_told_too() -> None:
    with Cluster(decoder("llama"), {"a": 30, "b": 20}, moves=16) as cluster:
        cluster.lend("b", 12)
        start(cluster, 4)
        seen = []
        run = cluster.engine.runner.run

        def look(*given):  # type: ignore[no-untyped-def]
            seen.append(cluster.engine.placement("s").moving)
            return run(*given)

        cluster.engine.runner.run = look  # type: ignore[method-assign]
        cluster.engine.inbox.put(MoveBlocks("a", "s", "a", "b", 2, "a test"))
        cluster.turn()
        assert seen == [(Wish(Move("s", "a", "b", 0, 2), "beside this step"),)]
        agree(cluster.finish()["s"], truth("llama"))
        cluster.settle()


def test_a_hole_is_told_until_it_is_filled() -> None:
    with Cluster(decoder("llama"), {"a": 4, "b": 40}, patience=2.0, step_tokens=16) as cluster:
        cluster.lend("b", 20)
        start(cluster, 4)
        before = cluster.engine.placement("s")
        assert (before.holes, before.layout[0]) == ((), Span("a", 0, 32))
        cut(cluster, "b")
        told = []
        while not told or told[-1]:
            cluster.turn()
            if cluster.engine.lost:
                told.append(cluster.engine.placement("s").holes)
                load = cluster.engine.load
                assert load.missing == load.lost - load.repaired
        length = before.tokens - 1  # the last token produced is never stored
        assert told[0] == ((32, length),)
        assert ((48, length),) in told and ((64, length),) in told, "sixteen tokens a step"
        agree(cluster.finish()["s"], truth("llama"))
        load = cluster.engine.load
        assert (load.lost, load.repaired, load.missing) == (length - 32, length - 32, 0)
        cluster.settle()
