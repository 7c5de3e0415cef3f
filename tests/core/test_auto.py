"""Our own planner: plans that keep the laws of the elastic one's, the cheapest of several by one price."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import event, given

from infinillm.core.auto import LATELY, Lately, plan, price
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
        for master in step.masters:
            taken[master.instance] += len(master.requests)
    assert all(known[name].free >= tokens for name, tokens in taken.items())


@given(states())
def test_no_plan_is_dearer_than_the_elastic_ones(told: State) -> None:
    found, theirs = plan(told, SMALL), elastic.plan(told, SMALL)
    event(f"{found == theirs=}")
    assert price(found, told, SMALL) <= price(theirs, told, SMALL)


def test_quick_prompts_go_first_so_that_a_long_one_has_all_instances_a_moment_later() -> None:
    told = state(FOUR, waiting(100_000, 120, 100, left=50))
    assert [len(each.group) for each in elastic.plan(told, A800).prefills] == [2, 1, 1]
    assert sorted(seq for each in plan(told, A800).prefills for seq in each.requests) == ["w1", "w2"]


@pytest.mark.parametrize(("coming", "least", "most"), [(0.0, 4, 4), (0.1, 1, 3)])
def test_an_instance_is_left_to_those_who_come(coming: float, least: int, most: int) -> None:
    """A prompt of 100,000 tokens takes 3.0 s on four instances and 3.9 on three."""
    told = replace(state(FOUR, waiting(100_000)), coming=coming)
    (found,) = plan(told, A800).prefills
    assert least <= len(found.group) <= most


def test_who_decodes_waits_where_that_costs_all_least() -> None:
    """One request has decoded for longer than the average: the paper's gain (2) is none, and a prompt waits for it."""
    old = [batch(running(name, produced=400, left=400, seconds=9.0, **{name: 500})) for name in "abcd"]
    told = state(FOUR, waiting(100, left=50), *old, average=5.0)
    assert not elastic.plan(told, A800).prefills
    assert [each.requests for each in plan(told, A800).prefills] == [("w0",)]


def test_nobody_is_preempted_where_an_instance_is_back_at_once() -> None:
    old = batch(running("r", produced=400, left=400, a=500))
    told = state(FOUR[:1], waiting(3_000, left=50), old, average=5.0)
    assert plan(told, A800).preempted == ("r",)
    assert plan(replace(told, soon=0.01), A800).preempted == ()


def test_what_comes_is_counted_lately() -> None:
    none = Lately(0.0, 0.0)
    once = none.come(10.0, 200)
    assert once == (1 / (200 * LATELY), 10.0)
    assert once.by(10.0 + LATELY) == pytest.approx(once.cost * 0.367879, rel=1e-5)
    steady = none
    for at in range(1000):
        steady = steady.come(float(at), 100)
    assert steady.by(1000.0) == pytest.approx(1 / 100, rel=0.02)
