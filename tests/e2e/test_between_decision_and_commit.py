"""What others do to the books between a step's decision and its commit must not break the step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from infinillm.core.types import Step
from tests import tiny
from tests.cluster import Cluster
from tests.pool.test_placement import decoder

LENGTH, OUTPUT = 60, 20
MOMENT = 0.3  # seconds in which the intruder either has done its deed, or is held off


def _somebody_borrows(cluster: Cluster) -> None:
    memory = cluster.home.memory

    def lend() -> None:
        with memory.lock:
            if memory.blocks.room:
                memory.blocks.lend("stranger", memory.blocks.room, float("inf"), "a loan")

    intruder = threading.Thread(target=lend)
    intruder.start()
    intruder.join(MOMENT)


def _idle_loans_go_back(cluster: Cluster) -> None:
    going = asyncio.run_coroutine_threadsafe(cluster.home.lenders.give_back_idle(0.0), cluster.loop)
    done = threading.Event()
    going.add_done_callback(lambda _: done.set())
    done.wait(MOMENT)


@pytest.mark.parametrize("intrude", [_somebody_borrows, _idle_loans_go_back])
def test_a_step_that_was_decided_can_be_committed(intrude: Callable[[Cluster], None]) -> None:
    want = tiny.oracle(tiny.model("llama"), tiny.prompt(LENGTH), OUTPUT)[0]
    with Cluster(decoder("llama"), {"a": 8, "b": 16}) as cluster:
        cluster.lend("b", 8)
        decide = cluster.engine.decide
        left = [1]

        def decide_and_be_disturbed() -> Step:
            step = decide()
            if step.admit and left:
                left.pop()
                intrude(cluster)
            return step

        cluster.engine.decide = decide_and_be_disturbed  # type: ignore[method-assign]
        cluster.submit(tiny.prompt(LENGTH), max_tokens=OUTPUT)
        got = [token for output in cluster.finish(20.0)["s"] for token in output.tokens]
        assert not left and got == want
        with cluster.home.memory.lock:
            cluster.home.memory.blocks.give_back("stranger")
        cluster.settle()
