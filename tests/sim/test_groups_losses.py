"""Losses in simulated groups and cells: who needs what was kept there waits again, and all others go on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from infinillm.core.elastic.times import PrefillTime, Times
from infinillm.core.elastic.values import Decode, Kept, Master, Migration, Plan, Prefill, State
from infinillm.core.planners import AUTO, ELASTIC, Planner, disaggregating
from infinillm.errors import BadRequest
from infinillm.sim import striping
from infinillm.sim.cells import Cells
from infinillm.sim.groups import Groups
from infinillm.sim.losses import DIES, RETURNS, Loss, schedule
from infinillm.sim.parties import Asked
from infinillm.sim.simulation import Ending
from tests.core.test_cost import LLAMA_H100 as COST
from tests.sim.test_groups import BLOCK, SLOTS, alone, begun, groups, load, noted, place

PLANNERS = {each.name: each for each in (ELASTIC, AUTO, disaggregating(["n0", "n1"]))}
NOTHING = Plan((), (), (), (), ())


def history(
    planner: Planner,
    losses: list[Loss],
    seed: int,
    look: Callable[[Groups], None] = Groups.check,
    times: Times | None = None,
) -> tuple[list[Ending], Groups]:
    here, endings = groups(planner, times=times), list[Ending]()
    schedule(here, losses)
    here.play(iter(load(seed, 60, 0.5)), endings.append)
    while here.clock.step(1000.0):
        look(here)
    return endings, here


def told(planner: Planner, states: list[State]) -> Planner:
    """The same planner; what it is told is kept."""

    def plan(state: State, times: Times) -> Plan:
        states.append(state)
        return planner.plan(state, times)

    return replace(planner, plan=plan)


# --- all at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PLANNERS)
def test_instances_die_and_come_back_and_the_books_balance_after_every_event(name: str, seed: int) -> None:
    draw = random.Random(seed)
    gone = [(draw.uniform(0, 0.6), node) for node in draw.sample(("n0", "n1", "n2", "n3"), 2) for _ in range(2)]
    losses = [Loss(at, node, DIES) for at, node in gone]
    losses += [Loss(at + draw.uniform(0, 0.3), node, RETURNS) for at, node in gone]
    endings, here = history(PLANNERS[name], losses, seed)
    whole, _ = history(PLANNERS[name], [], seed)
    assert len(endings) == len(whole) == 60 and not here.books.requests and endings != whole
    asked = {(each.asked, each.prompt): each.output for each in whole if not each.refused}
    served = [each for each in endings if not each.refused]
    assert len(served) > 5 and all(each.output == asked[each.asked, each.prompt] for each in served), "with all tokens"
    assert all(each.asked < each.first <= each.last for each in served)
    assert set(here.books.places) == {"n0", "n1", "n2", "n3"} and not any(p.used for p in here.books.places.values())
    assert (endings, here.totals()) == ((again := history(PLANNERS[name], losses, seed))[0], again[1].totals())


@pytest.mark.parametrize("seed", range(5))
def test_so_they_do_where_some_keep_what_others_compute(seed: int) -> None:
    """To stripe a prompt takes long, as over a slow link."""
    usual = striping.times(place(4))
    slow = replace(usual, prefill=(usual.prefill[0], *map(slower, usual.prefill[1:])))
    plans: list[Plan] = []
    losses = [Loss(0.2, "n1", DIES), Loss(0.4, "n1", RETURNS), Loss(0.5, "n0", DIES), Loss(0.7, "n0", RETURNS)]
    endings, here = history(noted(AUTO, plans), losses, seed, times=slow)
    assert len(endings) == 60 and not any(each.used for each in here.books.places.values())
    assert any(kept.instance not in each.group for plan in plans for each in plan.prefills for kept in each.kept)


def slower(time: PrefillTime) -> PrefillTime:
    return time._replace(beta=time.beta * 100)


@pytest.mark.parametrize("name", PLANNERS)
def test_nobody_is_refused_who_still_fits_and_the_planner_is_not_told_of_who_is_away(name: str) -> None:
    states: list[State] = []
    losses = [Loss(0.1, "n3", DIES), Loss(0.4, "n3", RETURNS)]
    endings, _ = history(told(PLANNERS[name], states), losses, 3)
    whole, _ = history(PLANNERS[name], [], 3)
    assert sum(not each.refused for each in endings) == sum(not each.refused for each in whole)
    for state in states:
        assert ("n3" not in {each.id for each in state.instances}) or not 0.1 <= state.now < 0.4
    assert all(any(e.id == "n3" for s in states if at(s.now) for e in s.instances) for at in (before, after))


def before(now: float) -> bool:
    return now < 0.1


def after(now: float) -> bool:
    return now >= 0.4


# --- what is lost, and what is not -----------------------------------------------------------------------------------


def test_who_decodes_there_goes_on_elsewhere_after_what_it_said() -> None:
    here, endings = groups(instances=2), list[Ending]()
    here.ask(100, 50, endings.append)
    here.clock.step(1000.0)
    first, (party,) = here.now, here.books.parties
    here.run(first + party.seconds(5) + party.first / 2)
    here.die(party.group[0])
    (request,) = here.books.requests.values()
    assert (request.produced, request.tokens) == (6, 106), "the step in hand does not count"
    (prefill,) = here.books.prefills
    assert prefill.group == ("n1",) and request.held == {"n1": 106}
    here.check()
    died = here.now
    here.run(1000.0)
    (only,) = endings
    assert (only.first, only.output) == (first, 50)
    steps = sum(COST.decode_step(1, length) for length in range(107, 150))
    assert only.last - died == pytest.approx(striping.prefill(COST, [106], 1) + steps)


def asked(prompt: int, output: int = 60) -> Asked:
    return Asked("", 0.0, prompt, output, lambda _: None)


def scripted(*plans: Plan) -> Groups:
    """Two instances, with s1 of 100 tokens computed on n0 and s2 of 200 on n1; then these plans."""
    script = iter(
        [Plan((begun("s1", "n0", 100),), (), (), (), ()), Plan((begun("s2", "n1", 200),), (), (), (), ()), *plans]
    )
    here = groups(replace(ELASTIC, plan=lambda *_: next(script)), instances=2)
    here.ask(100, 60, lambda _: None)
    here.ask(200, 60, lambda _: None)
    return here


def decoding(*each: Decode) -> Plan:
    return Plan((), each, (), (), ())


def test_the_others_of_its_group_go_on_at_once_without_it() -> None:
    """Two decode together, each where its K/V is; the one on the lost instance waits."""
    both = Decode(("s1", "s2"), ("n0", "n1"), (Master("n0", ("s1",)), Master("n1", ("s2",))), 0.0)
    one = alone("s1", "n0")
    here = scripted(decoding(one), decoding(both), decoding(one))
    here.clock.step(1000.0)
    here.clock.step(1000.0)
    (going,) = here.books.parties
    (first, _), said = going.requests, going.requests[0].produced
    here.run(going.began + 1.5 * going.first)
    here.die("n1")
    here.check()
    (rest,) = here.books.parties
    assert rest.group == ("n0",) and rest.began == here.now and rest.requests == [first]
    assert first.produced == said + 1, "the step in hand does not count"
    assert [(each.prompt, each.produced, each.held) for each in here.books.waiting.values()] == [(200, 2, {})]


def test_who_works_elsewhere_notices_nothing() -> None:
    one, other = alone("s1", "n0"), alone("s2", "n1")
    here = scripted(decoding(one), decoding(one, other), decoding(one))
    here.clock.step(1000.0)
    here.clock.step(1000.0)
    before = next(each for each in here.books.parties if each.group == ("n0",))
    here.run(before.began + 1.5 * before.first)
    here.die("n1")
    (rest,) = here.books.parties
    assert rest.began == pytest.approx(before.began + before.seconds(2)), "at the end of its step in hand"


def test_a_prefill_ends_at_once_for_all_of_it_and_others_go_on() -> None:
    wide = Prefill(("s1", "s2"), ("n0", "n1"), (Kept("n0", "s1", 0, 100), Kept("n1", "s2", 0, 200)), 0.0)
    other = begun("s3", "n2", 300)
    script = iter([Plan((wide, other), (), (), (), ()), NOTHING, decoding(alone("s3", "n2"))])
    here = groups(replace(ELASTIC, plan=lambda *_: next(script)), instances=3)
    for tokens in (100, 200, 300):
        assert here.admit(asked(tokens))
    here.plan()
    ends = here.books.places["n0"].ready
    here.run(ends / 2)
    here.die("n1")
    here.check()
    assert here.books.prefills == [other] and [each.tokens for each in here.books.waiting.values()] == [100, 200]
    assert here.books.places["n0"].ready == here.now < here.books.places["n2"].ready
    here.run(here.books.places["n2"].ready)
    (party,) = here.books.parties
    assert party.requests[0].prompt == 300 and len(here.books.waiting) == 2, "what ended it is no news any more"


def test_prompts_beside_a_step_of_its_group_wait_again() -> None:
    one = alone("s1", "n0")
    beside = replace(one, group=("n0", "n1"), prompts=("s2",), kept=(Kept("n0", "s2", 0, 200),))
    script = iter([Plan((begun("s1", "n0", 100),), (), (), (), ()), NOTHING, decoding(beside), decoding(one)])
    here = groups(replace(ELASTIC, plan=lambda *_: next(script)), instances=2)
    here.ask(100, 60, lambda _: None)
    here.ask(200, 60, lambda _: None)
    here.clock.step(1000.0)
    (party,) = here.books.parties
    assert party.prompts and not here.books.waiting
    here.run(here.now + party.first / 2)
    here.die("n1")
    here.check()
    (party,) = here.books.parties
    assert [each.produced for each in party.requests] == [1] and party.began == here.now
    assert [(each.tokens, each.held) for each in here.books.waiting.values()] == [(200, {})]


def test_what_was_on_its_way_from_it_is_lost() -> None:
    both = Decode(("s1", "s2"), ("n0",), (Master("n0", ("s1", "s2")),), 0.0)
    moving = Plan((), (both,), (Migration("s2", "n1", "n0", 200),), (), ())
    for late in (False, True):
        here = scripted(decoding(alone("s1", "n0")), moving, decoding(both if late else alone("s1", "n0")))
        here.clock.step(1000.0)
        here.clock.step(1000.0)
        (going,) = here.books.parties
        assert going.began > here.now, "once the K/V is there"
        here.run(going.began + (1e-6 if late else -1e-6))
        here.die("n1")
        here.check()
        assert len(here.books.waiting) == (not late)


def test_what_is_kept_elsewhere_for_a_prefill_is_lost_with_that() -> None:
    here = groups(disaggregating(["n0"]), instances=3)
    here.ask(500, 5, lambda _: None)
    ((keeper, _),) = next(iter(here.books.requests.values())).held.items()
    here.run(1e-3)
    here.die(keeper)
    here.check()
    (prefill,) = here.books.prefills
    assert {each.instance for each in prefill.kept} == {"n1", "n2"} - {keeper}
    assert here.books.places["n0"].ready == pytest.approx(1e-3 + striping.prefill(COST, [500], 1))


# --- what nobody can hold any more -----------------------------------------------------------------------------------


def test_what_no_longer_fits_is_refused_and_served_again_once_it_fits() -> None:
    here, endings = groups(instances=2), list[Ending]()
    here.ask(SLOTS * 3 // 2, 20, endings.append)
    here.run(1e-3)
    here.die("n1")
    here.check()
    (only,) = endings
    assert f"{SLOTS * 3 // 2 + 20} tokens are more than the {SLOTS} that policy elastic" in only.refused
    here.ask(SLOTS * 3 // 2, 20, endings.append)
    assert endings[1].refused
    here.revive("n1")
    here.ask(SLOTS * 3 // 2, 20, endings.append)
    here.run(1000.0)
    assert endings[2].output == 20 and not endings[2].refused


def test_who_has_begun_and_loses_nothing_goes_on_until_it_must_make_room() -> None:
    """One needs 20 tokens more than its instance has, and ends when those are gone; the other fits."""
    for output, refused in ((SLOTS, True), (SLOTS - 620, False)):
        here, endings = groups(instances=2), list[Ending]()
        here.ask(600, output, endings.append)
        here.clock.step(1000.0)
        (party,) = here.books.parties
        here.die("n1" if party.group == ("n0",) else "n0")
        here.check()
        assert not endings and here.books.requests
        while here.busy:
            here.clock.step(1000.0)
            here.check()
        (only,) = endings
        assert bool(only.refused) == refused and only.first and only.output == (SLOTS - 600 + 1 if refused else output)


@pytest.mark.parametrize("name", PLANNERS)
def test_where_all_are_lost_all_is_refused_until_they_are_back(name: str) -> None:
    here, endings = groups(PLANNERS[name]), list[Ending]()
    here.ask(100, 50, endings.append)
    here.run(0.1)
    for node in ("n0", "n1", "n2", "n3", "n3"):
        here.die(node)
        here.check()
    assert [bool(each.refused) for each in endings] == [True] and not here.books.places
    assert here.ledger().nodes == {}
    here.ask(100, 50, endings.append)
    assert endings[1].refused
    for node in ("n3", "n0", "n0"):
        here.revive(node)
    here.ask(100, 50, endings.append)
    here.run(1000.0)
    assert endings[2].output == 50 and not here.busy
    assert list(here.books.places) == ["n0", "n3"], "in the order of the cluster"


def test_where_nobody_prefills_others_decode_to_their_end() -> None:
    here, endings = groups(disaggregating(["n0"])), list[Ending]()
    here.ask(100, 50, endings.append)
    here.clock.step(1000.0)
    here.ask(100, 50, endings.append)
    here.die("n0")
    assert [bool(each.refused) for each in endings] == [True]
    here.run(1000.0)
    assert (endings[1].output, endings[1].refused) == (50, "")


# --- cells -----------------------------------------------------------------------------------------------------------


def test_what_a_cell_loses_goes_to_the_others() -> None:
    sites = place(40)
    here, endings = Cells(sites, replace(ELASTIC, cell=20), BLOCK), list[Ending]()
    schedule(here, [Loss(0.05, f"n{at}", DIES) for at in range(20)] + [Loss(0.3, "n7", RETURNS)])
    here.play(iter(load(1, 300, 0.5)), endings.append)
    seen = []
    while here.busy and here.clock.step(1000.0):
        here.check()
        seen.append((here.now, [len(cell.books.requests) for cell in here.cells]))
    assert len(endings) == 300 and not any(each.refused for each in endings)
    assert all(first for now, (first, _) in seen if 0.02 < now < 0.05)
    assert not any(first for now, (first, _) in seen if 0.0501 < now < 0.3) and any(
        f for now, (f, _) in seen if now > 0.3
    )
    assert not any(each.used for cell in here.cells for each in cell.books.places.values())


def test_what_no_cell_could_hold_any_more_is_refused() -> None:
    here, endings = Cells(place(40), replace(ELASTIC, cell=20), BLOCK), list[Ending]()
    here.ask(SLOTS * 16 - 10, 5, endings.append)
    here.run(1e-3)
    for node in range(5):
        here.die(f"n{node}")
    assert not endings and here.cells[1].books.prefills, "the other cell takes it, and begins"
    for node in range(20, 25):
        here.die(f"n{node}")
        here.die(f"n{node}")
        here.check()
    (only,) = endings
    assert f"more than the {SLOTS * 15:,} that" in only.refused


@pytest.mark.parametrize("here", [groups(), Cells(place(4), ELASTIC, BLOCK)], ids=["groups", "cells"])
@pytest.mark.parametrize(
    ("loss", "field"),
    [(Loss(1.0, "n7", DIES), "node"), (Loss(1.0, "n0", "sleeps"), "what"), (Loss(-1.0, "n0", DIES), "at")],
)
def test_losses_that_cannot_be_are_refused(here: Groups | Cells, loss: Loss, field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        schedule(here, [loss])
    assert refused.value.field == field
