"""Our own planner: plans that keep the laws of the elastic one's, the cheapest of several by one price."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import event, given

from infinillm.core.auto import OVERDUE, begun, plan, price
from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.values import State
from tests.core.elastic_cluster import A800, SMALL, batch, running, waiting
from tests.core.test_elastic import FOUR, moved, state, states


@given(states())
def test_its_plans_fit_and_forget_nobody(told: State) -> None:
    found = plan(told, SMALL)
    known, left = moved(told, found)
    assert sorted(chain(found.preempted, *(each.requests for each in found.decodes))) == sorted(left)
    groups = [name for each in (*found.prefills, *found.decodes) for name in each.group]
    assert len(groups) == len(set(groups))
    taken: Counter[str] = Counter()
    for each in found.prefills:
        for name, _, start, stop in each.kept:
            taken[name] += stop - start
    for step in found.decodes:
        for name, _, start, stop in step.kept:
            assert name in step.group
            taken[name] += stop - start
        assert sorted({each.seq for each in step.kept}) == sorted(step.prompts)
        for master in step.masters:
            taken[master.instance] += len(master.requests)
    assert all(known[name].free >= tokens for name, tokens in taken.items())


@given(states())
def test_no_plan_is_dearer_than_the_elastic_ones(told: State) -> None:
    found, theirs = plan(told, SMALL), elastic.plan(told, SMALL)
    event(f"{found == theirs=}")
    assert price(found, told, SMALL) <= price(theirs, told, SMALL)


def test_who_decodes_waits_where_that_costs_all_least() -> None:
    """One request has decoded for longer than the average: the paper's gain (2) is none, and a prompt waits for it."""
    old = [batch(running(name, produced=400, left=400, seconds=9.0, **{name: 500})) for name in "abcd"]
    told = state(FOUR, waiting(100, left=50), *old, average=5.0)
    assert not elastic.plan(told, A800).prefills
    assert begun(plan(told, A800)) == {"w0"}


def test_nobody_who_decodes_waits_where_an_instance_is_back_at_once() -> None:
    old = batch(running("r", produced=400, left=400, a=500))
    told = state(FOUR[:1], waiting(3_000, left=50), old, average=5.0)
    assert begun(plan(told, A800)) == {"w0"}
    assert begun(plan(replace(told, soon=0.01), A800)) == set()


def test_a_prompt_is_computed_beside_a_step_where_all_instances_decode() -> None:
    """A preemption would stop the batch for as long, and weights would be read twice."""
    old = [batch(*(running(f"{name}{n}", produced=90, left=60, **{name: 500}) for n in range(30))) for name in "abcd"]
    found = plan(state(FOUR, waiting(200, left=50), *old, average=5.0), A800)
    assert not found.prefills and not found.preempted
    (step,) = (each for each in found.decodes if each.prompts)
    assert step.prompts == ("w0",) and 0 < step.more < A800.prefill[0](200, 200**2)


@pytest.mark.parametrize("late", [False, True])
def test_nobody_is_passed_over_for_ever(late: bool) -> None:
    """A long prompt costs a batch of short requests more than it gains, until it has waited long enough."""
    busy = [batch(*(running(f"{name}{n}", produced=9, left=9, **{name: 20}) for n in range(30))) for name in "abcd"]
    seconds, often = OVERDUE
    bound = seconds + often * A800.quickest(4, 20_000, 20_000**2)
    told = state(FOUR, waiting(20_000, left=100), *busy, average=5.0)
    assert begun(plan(replace(told, now=bound * (1.01 if late else 0.99)), A800)) == ({"w0"} if late else set())
