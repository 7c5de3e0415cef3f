"""What planners gain over baselines on 8 A800: mean latency per token of output and input, as LoongServe counts it."""

from __future__ import annotations

import pytest

from infinillm.core.scheduler import Budget
from infinillm.sim.hardware import read_size
from infinillm.sim.traffic import workload
from infinillm.sim.worlds import answered, world

SIZE, LLAMA = (read_size(name, 16, "float16") for name in ("LWM-7B", "Llama-2-7B"))
BUDGET = Budget(2048, 512, 16, moves=16)
MIXED = ("mixed-like", 0.4, 160)
SHORT, LONG = ("sharegpt", 20.0, 400), ("l-eval-like", 2.0, 200)


def per_token(policy: str, tensor_parallel: int, traffic: tuple[str, float, int]) -> float:
    """Seconds, on average."""
    place = f"1x8xA800@loongserve:tp{tensor_parallel}"
    here = world(policy, place, SIZE, BUDGET, lend_fraction=0.9, beat_seconds=0.5)
    trace, rate, count = traffic
    tally = answered(here, workload(trace, rate=rate, seed=1, count=count))
    assert tally.served == count
    return tally.per_token.mean


def test_elastic_instances_beat_all_devices_as_one_on_lengths_that_differ() -> None:
    elastic = per_token("elastic", 2, MIXED)
    assert elastic < 0.8 * per_token("whole", 8, MIXED)
    assert elastic < per_token("chunked:2048", 8, MIXED)


@pytest.mark.parametrize(("traffic", "share"), [(MIXED, 0.4), (SHORT, 0.7), (LONG, 0.5)])
def test_our_own_planner_beats_the_elastic_one(traffic: tuple[str, float, int], share: float) -> None:
    assert per_token("auto", 2, traffic) < share * per_token("elastic", 2, traffic)


def test_at_saturation_it_brings_as_much_through_as_workers_by_themselves_and_sooner() -> None:
    """400 requests in 16 seconds, of which each policy has work for more than a minute."""

    def run(policy: str) -> tuple[float, float]:
        here = world(policy, "1x8xA100@infinite-llm", LLAMA, BUDGET, lend_fraction=0.9, beat_seconds=0.5)
        tally = answered(here, workload("t2", rate=25.0, seed=1, count=400))
        return here.now, tally.per_token.mean

    (seconds, latency), (theirs, later) = run("auto"), run("whole")
    assert seconds < 1.05 * theirs
    assert latency < 0.7 * later
