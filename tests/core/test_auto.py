"""Our own planner: plans that keep the laws of the elastic one's, the cheapest of several by one price."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from infinillm.core.auto import OVERDUE, TOLD, begun, plan, price
from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.filling import filled
from infinillm.core.elastic.values import State
from tests.core.elastic_cluster import A800, SLOTS, SMALL, batch, instances, running, waiting
from tests.core.test_elastic import FOUR, moved, state, states


def at_places(told: State, count: int) -> State:
    """The same instances, at so many places in turn."""
    return replace(told, instances=tuple(replace(e, place=str(at % count)) for at, e in enumerate(told.instances)))


@given(states(), st.integers(1, 3), st.sampled_from([1, 100]))
def test_its_plans_fit_and_forget_nobody(told: State, places: int, slower: int) -> None:
    """Wherever the instances are, and however slow the links."""
    told = at_places(told, places)
    found = plan(told, replace(SMALL, move=SMALL.move * slower))
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
def test_no_plan_is_dearer_than_that_all_are_begun_apart(told: State) -> None:
    found, goes_on = plan(told, SMALL), elastic.plan(replace(told, waiting=()), SMALL)
    apart = filled(goes_on, told, SMALL, None)
    event(f"{found == apart=}")
    if apart.prefills or apart.decodes:
        assert price(found, told, SMALL) <= price(apart, told, SMALL)


def test_a_long_prompt_alone_is_computed_by_all() -> None:
    (prefill,) = plan(state(FOUR, waiting(100_000)), A800).prefills
    assert len(prefill.group) == 4
    (prefill,) = plan(state(FOUR, waiting(100)), A800).prefills
    assert len(prefill.group) == 1


def test_nobody_is_stopped_or_moved_for_a_prompt_that_an_instance_can_hold() -> None:
    """The elastic planner would empty an instance for it."""
    old = [batch(running(name, produced=400, left=40_000, **{name: 500})) for name in "abcd"]
    told = state(FOUR, waiting(100_000, left=50), *old, average=6000.0)
    assert elastic.plan(told, A800).migrations
    found = plan(told, A800)
    assert begun(found) == {"w0"} and not found.migrations and not found.preempted


def test_what_no_instance_can_hold_is_begun_by_several() -> None:
    (prefill,) = plan(state(FOUR, waiting(400_000, left=50)), A800).prefills
    assert len(prefill.group) > 1


def test_what_one_place_can_hold_is_not_computed_by_two() -> None:
    """Though c and d are idle: it rather waits, and once it is overdue a is stopped for it."""
    busy = [batch(running(name, produced=400, left=40_000, **{name: 500})) for name in "ab"]
    told = state(FOUR, waiting(300_000, left=50), *busy)
    assert [each.group for each in plan(told, A800).prefills] == [("c", "d")], "where all are at one place"
    told = at_places(told, 2)
    assert not begun(plan(told, A800))
    assert [sorted(each.group) for each in plan(replace(told, now=1e4), A800).prefills] == [["a", "c"]]


def test_what_no_place_can_hold_is_computed_by_one_and_kept_by_two() -> None:
    told = at_places(state(FOUR, waiting(500_000, left=50)), 2)
    (prefill,) = plan(told, replace(A800, move=0.001)).prefills
    places = {each.id: each.place for each in told.instances}
    assert len({places[name] for name in prefill.group}) == 1
    assert len({places[kept.instance] for kept in prefill.kept}) == 2


def test_for_what_a_place_can_hold_once_all_of_it_is_back_no_other_is_asked() -> None:
    """Its other instances are in a prefill; until then, nobody computes half of it over there."""
    told = at_places(state(FOUR[:3], waiting(400_000, left=50)), 3)
    assert begun(plan(told, A800)) == {"w0"}
    assert not begun(plan(replace(told, largest=4 * SLOTS), A800))


def test_putting_work_off_makes_no_plan_cheaper() -> None:
    """Whoever is left waiting is begun a little later, and whoever decodes waits for him then."""
    busy = batch(*(running(f"r{n}", produced=9, left=200, a=20) for n in range(30)))
    told = state(FOUR[:1], waiting(200, left=100), busy)
    off = elastic.plan(replace(told, waiting=()), A800)
    assert price(filled(off, told, A800, None), told, A800) < price(off, told, A800)


def test_a_prompt_is_computed_beside_a_step_where_all_instances_decode() -> None:
    """A preemption would stop the batch for as long, and weights would be read twice."""
    old = [batch(*(running(f"{name}{n}", produced=90, left=60, **{name: 500}) for n in range(30))) for name in "abcd"]
    found = plan(state(FOUR, waiting(200, left=50), *old, average=5.0), A800)
    assert not found.prefills and not found.preempted
    (step,) = (each for each in found.decodes if each.prompts)
    assert step.prompts == ("w0",) and 0 < step.more < A800.prefill[0](200, 200**2)


@pytest.mark.parametrize("late", [False, True])
def test_nobody_is_passed_over_for_ever(late: bool) -> None:
    """Where there are slots for one of them, the shorter goes first, until the longer has waited long enough."""
    seconds, often = OVERDUE
    bound = seconds + often * A800.quickest(1, 600, 600**2)
    told = state(instances(1000), waiting(600, 500, left=50))
    assert begun(plan(replace(told, now=bound * (1.01 if late else 0.99)), A800)) == ({"w0"} if late else {"w1"})


def test_of_a_long_queue_it_knows_the_oldest_and_the_lightest() -> None:
    """Long prompts that nobody has slots for do not hide short ones behind them."""
    full = batch(running("r", left=500, a=99_000))
    told = state(instances(100_000, slots=100_000), waiting(*[50_000] * TOLD, 20), full)
    assert begun(plan(told, A800)) == {f"w{TOLD}"}
