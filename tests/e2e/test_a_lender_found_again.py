"""A lender that was lost for a moment and is asked again answers with nothing it held before."""

from itertools import pairwise

import pytest

from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_placement import decoder

LENGTH, OUTPUT = 150, 40


@pytest.mark.parametrize("elsewhere", [True, False], ids=["hole filled elsewhere", "hole filled there"])
def test_what_a_lender_held_before_it_was_lost_is_not_used_again(elsewhere: bool) -> None:
    """The port breaks while the node lives on: what it held is a hole for us, and must be one for the node too."""
    want = tiny.oracle(tiny.model("llama"), tiny.prompt(LENGTH), OUTPUT)[0]
    with Cluster(decoder("llama"), {"a": 8, "b": 60, "c": 12}, port_kind="tcp", patience=2.0) as cluster:
        cluster.lend("b", 12)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT)
        outputs = cluster.home.outputs
        while len(outputs) < 5:
            cluster.turn()
        cluster.home.lenders.accounts["b"].conversation.port.close()  # type: ignore[union-attr]
        cluster.turn()
        assert {span.node for span in cluster.engine.sequences["s"].layout} == {"a"}, "b is lost"
        if elsewhere:
            cluster.lend("c", 12)
        got = [token for output in cluster.finish(20.0)["s"] for token in output.tokens]
        assert "b" in {span.node for span in cluster.engine.finished["s"][1]}, "b must have been asked again"
        assert got == want
        cluster.settle()


def test_a_sequence_that_came_back_after_preemption_lies_only_where_it_lies_now() -> None:
    """One lender is lost and nobody has room: the sequence is preempted while the other lender is not spoken with.

    When it comes back, less of it lies on that lender than before; what it held of the rest must be gone.
    """
    want = tiny.oracle(tiny.model("llama"), tiny.prompt(LENGTH), 18)[0]
    with Cluster(decoder("llama"), {"a": 8, "b": 7, "c": 12, "d": 10}, patience=2.0, share=False) as cluster:
        cluster.lend("b", 7)
        cluster.lend("c", 5)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=18)
        while len(cluster.home.outputs) < 5:
            cluster.turn()
        sequence = cluster.engine.sequences["s"]
        assert [(span.node, span.start) for span in sequence.layout] == [("a", 0), ("b", 64), ("c", 120)]
        cluster.home.lenders.accounts["b"].conversation.port.close()  # type: ignore[union-attr]
        while not sequence.preemptions:
            cluster.turn()
        cluster.lend("d", 10)
        cluster.lend("c", 4)
        got = [token for output in cluster.finish(20.0)["s"] for token in output.tokens]
        assert [(s.node, s.start) for s in cluster.engine.finished["s"][1]] == [("a", 0), ("d", 64), ("c", 144)]
        assert got == want
        cluster.peers["b"].memory.blocks.give_back("a")  # it would lapse
        cluster.settle()


def test_a_lender_whose_loan_lapsed_unnoticed_does_not_answer_as_if_nothing_were_there() -> None:
    """It holds nothing of the sequence any more, and must say so: an empty partial would be a wrong answer."""
    want = tiny.oracle(tiny.model("llama"), tiny.prompt(LENGTH), OUTPUT)[0]
    with Cluster(decoder("llama"), {"a": 8, "b": 9, "c": 20}, patience=2.0) as cluster:
        cluster.lend("b", 9)
        cluster.lend("c", 8)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT)
        while len(cluster.home.outputs) < 5:
            cluster.turn()
        assert [(s.node, s.start) for s in cluster.engine.sequences["s"].layout] == [("a", 0), ("b", 64), ("c", 136)]
        node = cluster.peers["b"]
        with node.memory.lock:
            node.memory.blocks.give_back("a")
        got = [token for output in cluster.finish(20.0)["s"] for token in output.tokens]
        assert got == want
        cluster.settle()


def test_a_hole_at_the_beginning_of_a_sequence_is_given_a_place_before_it_is_computed() -> None:
    """Nothing lies at home, the first of two lenders is lost, and what is left is one span that begins late."""
    want = tiny.oracle(tiny.model("llama"), tiny.prompt(LENGTH), OUTPUT)[0]
    with Cluster(decoder("llama"), {"a": 8, "b": 12, "c": 12, "d": 12}, patience=2.0, share=False) as cluster:
        books = cluster.home.memory.blocks
        books.lend("stranger", books.room, float("inf"), "a loan")
        cluster.lend("b", 12)
        cluster.lend("c", 12)
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT)
        while len(cluster.home.outputs) < 5:
            cluster.turn()
        assert [(s.node, s.start) for s in cluster.engine.sequences["s"].layout] == [("b", 0), ("c", 96)]
        cluster.home.lenders.accounts["b"].conversation.port.close()  # type: ignore[union-attr]
        cluster.turn()
        assert [s.node for s in cluster.engine.sequences["s"].layout] == ["c"]
        cluster.lend("d", 12)
        got = [token for output in cluster.finish(20.0)["s"] for token in output.tokens]
        assert got == want
        spans = cluster.engine.finished["s"][1]
        assert spans[0].start == 0 and all(one.stop == next.start for one, next in pairwise(spans)), "no hole is left"
        books.give_back("stranger")
        cluster.peers["b"].memory.blocks.give_back("a")  # it would lapse
        cluster.settle()
