"""Every policy by name: which world it runs in, and with what changed."""

from __future__ import annotations

import pytest

from infinillm.core import policy as policies
from infinillm.core.scheduler import Budget
from infinillm.errors import BadRequest
from infinillm.sim.cells import Cells
from infinillm.sim.groups import Groups
from infinillm.sim.hardware import read_size
from infinillm.sim.simulation import Ending, Simulation
from infinillm.sim.statistics import Tally
from infinillm.sim.traffic import workload
from infinillm.sim.worlds import NAMES, best_ratio, together, world

SIZE = read_size("LWM-7B", 16, "float16")
BUDGET = Budget(2048, 512, 16, moves=16)
KINDS = {"elastic": Cells, "auto": Cells, "disaggregated": Groups}


def made(policy: str | policies.Policy, text: str = "1x8xA800:tp2") -> Simulation | Groups | Cells:
    return world(policy, text, SIZE, BUDGET, lend_fraction=0.9, beat_seconds=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_world_that_answers(name: str) -> None:
    here, endings = made(name), list[Ending]()
    here.play(workload("sharegpt", rate=20, seed=1, count=30), endings.append)
    while here.busy and here.clock.step(1000.0):
        pass
    assert len(endings) == 30 and not any(each.refused for each in endings)
    assert here.totals().rows >= sum(each.output for each in endings) - 30
    assert type(here) is KINDS.get(name, Simulation)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_answers_long_contexts_and_swings(name: str) -> None:
    here, endings = made(name, "1x8xA800"), list[Ending]()
    here.play(workload("long-and-swings", rate=0.5, seed=4, count=150), endings.append)
    while here.busy and here.clock.step(10_000.0):
        pass
    here.check()
    assert len(endings) == 150
    refused = [each.prompt for each in endings if each.refused]
    pools = name in ("pooled", "proactive", "single", "elastic", "auto")
    assert bool(refused) != pools and all(prompt > 100_000 for prompt in refused)


def test_names_change_what_they_say() -> None:
    found = {name: made(name) for name in ("isolated", "whole", "chunked", "chunked:100", "single")}
    assert all(isinstance(each, Simulation) and each.policy.name == "isolated" for each in found.values())
    budgets = [each.budget.tokens for each in found.values() if isinstance(each, Simulation)]
    assert budgets == [2048, 1 << 22, 512, 100, 1 << 22]
    assert [len(each.cluster.sites) for each in found.values()] == [4, 4, 4, 4, 1]
    assert made("single").cluster.sites[0].blocks > 4 * made("whole").cluster.sites[0].blocks
    assert made(policies.named("pooled")).cluster == made("pooled").cluster


def test_disaggregated_takes_how_many_prefill() -> None:
    for name, count in (("disaggregated", 2), ("disaggregated:1", 1), ("disaggregated:3", 3)):
        here = made(name)
        assert isinstance(here, Groups)
        assert here.books.longest == here.books.places["n3"].slots
        here.ask(100, 2, lambda _: None)
        here.clock.step(1000.0)
        assert here.books.parties[0].group == (f"n{count}",)


def test_the_same_devices_as_one_worker() -> None:
    assert together("4x8xA100@infinite-llm:tp2") == "4x8xA100@infinite-llm:tp32"
    with pytest.raises(BadRequest) as refused:
        together("cluster.json")
    assert refused.value.field == "policy"


@pytest.mark.parametrize(
    "name",
    ["", "nobody", "elastic:2", "pooled:1", "chunked:0", "chunked:x", "disaggregated:4", "disaggregated:-1", "own.py"],
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        made(name)
    assert refused.value.field == "policy"


def test_the_best_ratio_is_the_one_of_least_score() -> None:
    """Long prompts with short answers want more instances that prefill."""

    def found(trace: str, rate: float) -> str:
        def latency(tally: Tally) -> float:
            return tally.per_token.mean

        return best_ratio(
            "1x8xA800@loongserve:tp2",
            SIZE,
            BUDGET,
            lambda: workload(trace, rate=rate, seed=1, count=100),
            latency,
        )

    assert found("sharegpt", 20.0) == "disaggregated:1"
    assert found("l-eval-like", 1.0) == "disaggregated:2"
    with pytest.raises(BadRequest):
        best_ratio("1x1xA800", SIZE, BUDGET, lambda: iter(()), lambda tally: 0.0)
