"""A lender that was lost for a moment and is asked again answers with nothing it held before."""

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
