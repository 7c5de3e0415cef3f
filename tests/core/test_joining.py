"""Prompts beside a step of decode: whose batch they join, and when they rather wait."""

from __future__ import annotations

from math import inf

from infinillm.core.elastic.joining import joined
from infinillm.core.elastic.values import Decode, Kept, Master, Plan
from tests.core.elastic_cluster import A800, SLOTS, batch, instances, running, waiting
from tests.core.test_elastic import state


def alone(name: str, place: str) -> Decode:
    return Decode((name,), (place,), (Master(place, (name,)),), 0.01)


TWO = (batch(running("r", left=900, a=100)), batch(running("s", left=90_000, b=100)))
PLAN = Plan((), (alone("r", "a"), alone("s", "b")), (), (), ())


def test_it_joins_the_batch_that_it_costs_least() -> None:
    """A second costs s, which comes to have 90,000 tokens, next to nothing."""
    found = joined(PLAN, state(instances(SLOTS, SLOTS), waiting(300), *TWO), A800, inf, ())
    assert [each.prompts for each in found.decodes] == [(), ("w0",)]
    assert found.decodes[1].kept == (Kept("b", "w0", 0, 300),)


def test_those_who_join_one_batch_pay_for_each_other() -> None:
    alike = (TWO[0], batch(running("s", left=900, b=100)))
    found = joined(PLAN, state(instances(SLOTS, SLOTS), waiting(4000, 4000), *alike), A800, inf, ())
    assert [each.prompts for each in found.decodes] == [("w0",), ("w1",)]


def test_it_waits_for_an_instance_that_comes_free_soon_unless_it_is_overdue() -> None:
    told = state(instances(SLOTS), waiting(4000), TWO[0])
    plan = Plan((), PLAN.decodes[:1], (), (), ())
    assert joined(plan, told, A800, 0.0, ()) == plan
    assert joined(plan, told, A800, 0.0, ("w0",)).decodes[0].prompts == ("w0",)
    assert joined(plan, told, A800, inf, ()).decodes[0].prompts == ("w0",)


def test_only_as_many_join_as_there_are_slots_for() -> None:
    """With three they would need 1,200 slots at once: four times 50 to come, and what they hold. There are 1,100."""
    told = state(instances(1000), waiting(300, 300, 300, left=50), TWO[0])
    plan = Plan((), PLAN.decodes[:1], (), (), ())
    assert joined(plan, told, A800, inf, ()).decodes[0].prompts == ("w0", "w1")


def test_none_joins_a_batch_that_would_outgrow_its_group() -> None:
    """Elsewhere is room enough for all; but the batch on a and the prompt come to need 1,300 slots there."""
    told = state(instances(1000, SLOTS), waiting(300, left=100), TWO[0])
    plan = Plan((), PLAN.decodes[:1], (), (), ())
    assert joined(plan, told, A800, inf, ()).decodes[0].prompts == ("w0",)
    told = state(instances(1000, SLOTS), waiting(300, left=800), TWO[0])
    assert joined(plan, told, A800, inf, ("w0",)) == plan
