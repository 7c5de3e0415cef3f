"""Prompts for groups that have the slots: which one each goes to, who waits, and for whom slots are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infinillm.core.elastic.filling import PATIENCE, filled
from infinillm.core.elastic.values import Decode, Kept, Master, Plan, Prefill
from tests.core.elastic_cluster import A800, SLOTS, batch, instances, running, waiting
from tests.core.test_elastic import state


def alone(name: str, place: str) -> Decode:
    return Decode((name,), (place,), (Master(place, (name,)),), 0.01)


R, S = batch(running("r", left=900, a=100)), batch(running("s", left=90_000, b=100))
PLAN = Plan((), (alone("r", "a"), alone("s", "b")), (), (), ())
FIRST = Plan((), PLAN.decodes[:1], (), (), ())


def prompts(plan: Plan) -> list[tuple[str, ...]]:
    return [each.prompts for each in plan.decodes]


def test_it_joins_the_batch_that_it_costs_least() -> None:
    """A second costs s, which comes to have 90,000 tokens, next to nothing."""
    found = filled(PLAN, state(instances(SLOTS, SLOTS), waiting(300), R, S), A800, None)
    assert prompts(found) == [(), ("w0",)]
    assert found.decodes[1].kept == (Kept("b", "w0", 0, 300),)


def test_those_who_join_one_batch_pay_for_each_other() -> None:
    alike = batch(running("s", left=900, b=100))
    found = filled(PLAN, state(instances(SLOTS, SLOTS), waiting(4000, 4000), R, alike), A800, None)
    assert prompts(found) == [("w0",), ("w1",)]


def test_of_groups_that_cost_as_much_the_emptier_takes_it() -> None:
    two = batch(running("s", left=900, b=1100), running("t", left=900, b=1100))
    both = Decode(("s", "t"), ("b",), (Master("b", ("s", "t")),), 0.01)
    told = state(instances(SLOTS, SLOTS), waiting(300), two, R)
    assert prompts(filled(replace(PLAN, decodes=(both, PLAN.decodes[0])), told, A800, None)) == [(), ("w0",)]


@pytest.mark.parametrize(("left", "found"), [(20, ()), (90_000, ("w0",))])
def test_it_waits_for_a_batch_that_ends_soon(left: int, found: tuple[str, ...]) -> None:
    """The batch would wait for 50,000 tokens of prompt; that prompt can wait for some steps."""
    told = state(instances(SLOTS), waiting(50_000, left=50), batch(running("r", left=left, a=900)))
    assert prompts(filled(FIRST, told, A800, None)) == [found]


def test_where_many_wait_for_that_the_rest_begins_now() -> None:
    def begun(count: int) -> int:
        told = state(instances(SLOTS), waiting(*[5000] * count, left=50), batch(running("r", left=20, a=980)))
        return len(filled(FIRST, told, A800, None).decodes[0].prompts)

    assert begun(2) == 0
    assert 0 < begun(20) < 20


@pytest.mark.parametrize(("steps", "found"), [(1.01, ("w0",)), (0.99, ())])
def test_nobody_waits_long_for_an_empty_group(steps: float, found: tuple[str, ...]) -> None:
    """Though it would cost all less: a second costs r a thousand times what it costs the prompt."""
    left = round(PATIENCE / FIRST.decodes[0].seconds * steps)
    told = state(instances(SLOTS), waiting(200_000), batch(*(running(f"r{n}", left=left, a=1) for n in range(60))))
    names = tuple(f"r{n}" for n in range(60))
    here = replace(FIRST, decodes=(Decode(names, ("a",), (Master("a", names),), 0.01),))
    assert prompts(filled(here, told, A800, None)) == [found]


@pytest.mark.parametrize("soon", [0.0, 60.0])
def test_it_waits_for_an_instance_that_is_back_soon(soon: float) -> None:
    told = replace(state(instances(SLOTS), waiting(4000), R), soon=soon)
    assert prompts(filled(FIRST, told, A800, None)) == [("w0",) if soon else ()]
    assert prompts(filled(FIRST, told, A800, told.waiting[0])) == [("w0",)]


def test_a_group_with_a_long_step_in_hand_takes_nobody() -> None:
    told = state(instances(SLOTS, SLOTS), waiting(300), R, S)
    told = replace(told, instances=tuple(replace(e, busy=9.0 if e.id == "b" else 0.02) for e in told.instances))
    assert prompts(filled(PLAN, told, A800, None)) == [("w0",), ()]


def test_beside_a_step_weights_are_read_once() -> None:
    (step,) = filled(FIRST, state(instances(SLOTS), waiting(300), R), A800, None).decodes
    fixed, each, _, _ = A800.decode
    assert step.more == A800.alone(300) - fixed - each


def test_an_idle_instance_prefills_alone() -> None:
    found = filled(FIRST, state(instances(SLOTS, SLOTS), waiting(300), R), A800, None)
    assert found.prefills == (Prefill(("w0",), ("b",), (Kept("b", "w0", 0, 300),), A800.alone(300)),)
    assert prompts(found) == [()]


def test_a_wider_group_takes_the_long_prompt() -> None:
    """And one instance the short one, which two would not compute sooner."""
    both = Decode(("r",), ("a", "b"), (Master("a", ("r",)),), 0.01)
    told = state(instances(SLOTS, SLOTS, SLOTS), waiting(20, 50_000), batch(running("r", left=90_000, a=50, b=50)))
    found = filled(Plan((), (both,), (), (), ()), told, A800, None)
    assert prompts(found) == [("w1",)]
    assert [each.requests for each in found.prefills] == [("w0",)]


def test_only_as_many_begin_as_there_are_slots_for_to_their_ends() -> None:
    """With three they would need 1,250 slots at once, when r and they have 50 to come; there are 1,200."""
    told = state(instances(1100), waiting(300, 300, 300, left=50), batch(running("r", left=50, a=100)))
    assert prompts(filled(FIRST, told, A800, None)) == [("w0", "w1")]


def test_whom_a_second_costs_most_goes_before_those_who_came_first() -> None:
    told = state(instances(1000), waiting(600, 500, left=50), R)
    assert prompts(filled(FIRST, told, A800, None)) == [("w1",)]
    assert prompts(filled(FIRST, told, A800, told.waiting[0])) == [("w0",)]


def test_slots_are_kept_for_the_first_where_it_has_them_soonest() -> None:
    """On b it finds 900 slots once s has ended, 10 steps from now; a has them in 100, and goes on taking others."""
    batches = batch(running("r", left=100, a=500)), batch(running("s", left=10, b=500))
    told = state(instances(1000, 1000, slots=1000), waiting(800, 20, 20, left=11), *batches)
    assert prompts(filled(PLAN, told, A800, None)) == [("w1",), ("w2",)]
    assert prompts(filled(PLAN, told, A800, told.waiting[0])) == [("w1", "w2"), ()]


@pytest.mark.parametrize(("left", "found"), [(10, [("w1",), ("w2",)]), (11, [("w1", "w2"), ()])])
def test_who_has_ended_by_then_is_begun_there(left: int, found: list[tuple[str, ...]]) -> None:
    batches = batch(running("r", left=100, a=500)), batch(running("s", left=10, b=500))
    told = state(instances(1000, 1000, slots=1000), waiting(800, 20, 20, left=left), *batches)
    assert prompts(filled(PLAN, told, A800, told.waiting[0])) == found


def test_who_fits_on_no_instance_has_several_kept() -> None:
    told = state(
        instances(1000, 1000, slots=1000),
        waiting(1800, 20, left=101),
        *(batch(running("r", left=100, a=500)), batch(running("s", left=10, b=500))),
    )
    assert prompts(filled(PLAN, told, A800, told.waiting[0])) == [(), ()]


def test_those_are_of_one_place_if_that_can_hold_it() -> None:
    """Of b and c, at different places, there would be slots sooner."""
    steps = {"a": 100, "b": 10, "c": 10, "d": 50}
    batches = [batch(running(f"r{name}", left=left, **{name: 500})) for name, left in steps.items()]
    told = state(instances(1000, 1000, 1000, 1000, slots=1000), waiting(1800, 20, 20, 20, 20, left=60), *batches)
    told = replace(told, instances=tuple(replace(e, place=p) for e, p in zip(told.instances, "lrlr", strict=True)))
    decodes = tuple(alone(f"r{name}", name) for name in steps)
    found = filled(Plan((), decodes, (), (), ()), told, A800, told.waiting[0])
    assert [bool(each.prompts) for each in found.decodes] == [True, False, True, False]


def test_whom_the_plan_has_begun_is_not_begun_again() -> None:
    begun = Prefill(("w0",), ("b",), (Kept("b", "w0", 0, 300),), 1.0)
    found = filled(
        Plan((begun,), FIRST.decodes, (), (), ()), state(instances(SLOTS, SLOTS), waiting(300), R), A800, None
    )
    assert found.prefills == (begun,)
    assert prompts(found) == [()]
