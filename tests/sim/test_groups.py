"""Simulated groups: histories that repeat, books that balance, and plans carried out as they were made."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from infinillm.core.cost import Link
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Decode, Kept, Master, Migration, Plan, Prefill, State
from infinillm.core.planners import AUTO, ELASTIC, Planner, disaggregating
from infinillm.core.types import Ledger
from infinillm.errors import BadRequest, Broken
from infinillm.sim import striping
from infinillm.sim.groups import Groups
from infinillm.sim.hardware import Cluster, Site, cluster, read_size
from infinillm.sim.simulation import Clock, Ending
from infinillm.sim.striping import Share
from infinillm.sim.traffic import Arrival
from tests.core.test_cost import LLAMA_H100 as COST

BLOCK, BLOCKS = 16, 40
SLOTS = BLOCK * BLOCKS
PLANNERS = {each.name: each for each in (ELASTIC, AUTO, disaggregating(["n0"]))}


def place(instances: int, blocks: int = BLOCKS) -> Cluster:
    way = Link("none", 0.0, math.inf)
    return Cluster(tuple(Site(f"n{i}", 0, blocks, COST, COST) for i in range(instances)), way, way)


def groups(planner: Planner = ELASTIC, instances: int = 4, times: Times | None = None) -> Groups:
    here = place(instances)
    return Groups(here, times or striping.times(here), planner, BLOCK, Clock())


def load(seed: int, count: int, seconds: float) -> list[Arrival]:
    """Requests at random moments, a few of them longer than an instance."""
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, seconds) for _ in range(count))
    return [Arrival(at, draw.choice((draw.randint(1, 300), 60, SLOTS * 3 // 2)), draw.randint(1, 90)) for at in times]


def noted(planner: Planner, plans: list[Plan]) -> Planner:
    """The same planner; its plans are kept."""

    def plan(state: State, times: Times) -> Plan:
        plans.append(planner.plan(state, times))
        return plans[-1]

    return replace(planner, plan=plan)


def history(
    planner: Planner, seed: int = 1, count: int = 120, look: Callable[[Groups], None] | None = None
) -> tuple[list[Ending], Groups]:
    here, endings = groups(planner), list[Ending]()
    here.play(iter(load(seed, count, 1.0)), endings.append)
    while here.busy and here.clock.step(1000.0):
        if look is not None:
            look(here)
    return endings, here


@pytest.mark.parametrize("name", PLANNERS)
def test_every_request_ends_and_nothing_is_left(name: str) -> None:
    endings, here = history(PLANNERS[name])
    assert len(endings) == 120 and not here.books.requests
    refused = [each for each in endings if each.refused]
    assert bool(refused) == (name == "disaggregated"), "no single instance holds the long ones"
    assert all(f"more than the {SLOTS} that policy" in each.refused for each in refused)
    asked = sorted(
        (each.prompt, each.output) for each in load(1, 120, 1.0) if each.prompt + each.output <= here.books.longest
    )
    assert sorted((each.prompt, each.output) for each in endings if not each.refused) == asked
    assert all(each.asked < each.first <= each.last for each in endings if not each.refused)
    assert all(each.used == 0 for each in here.books.places.values())
    here.check()


@pytest.mark.parametrize("name", PLANNERS)
def test_the_books_balance_after_every_event(name: str) -> None:
    plans: list[Plan] = []
    used: list[int] = []

    def look(here: Groups) -> None:
        here.check()
        used.append(sum(each.used for each in here.books.places.values()))

    _, here = history(noted(PLANNERS[name], plans), look=look)
    assert max(used) > 0.6 * SLOTS * len(here.books.places), "there was room for all, so little was checked"
    if name == "elastic":
        assert any(len(each.group) > 1 for plan in plans for each in plan.prefills)
        assert any(len(each.masters) > 1 or len(each.group) > 1 for plan in plans for each in plan.decodes)
        assert any(plan.preempted for plan in plans) and any(plan.migrations for plan in plans) and here.moved


def test_equal_seeds_give_equal_histories_and_others_others() -> None:
    assert history(ELASTIC, 3)[0] == history(ELASTIC, 3)[0] != history(ELASTIC, 4)[0]


def test_what_does_not_balance_is_found() -> None:
    here = groups()
    here.ask(100, 50, lambda _: None)
    here.clock.step(1000.0)
    here.check()
    here.books.places["n0"].used += 1
    with pytest.raises(Broken, match="slots in use"):
        here.check()
    here.books.places["n0"].used -= 1
    here.books.parties.clear()
    with pytest.raises(Broken, match="requests"):
        here.check()


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_request_alone_takes_what_the_costs_say() -> None:
    here, endings = groups(instances=1), list[Ending]()
    here.ask(100, 50, endings.append)
    here.run(1000.0)
    (only,) = endings
    assert only.first == pytest.approx(striping.prefill(COST, [100], 1))
    steps = sum(COST.decode_step(1, length) for length in range(101, 150))
    assert only.last - only.first == pytest.approx(steps, rel=1e-9)
    assert here.totals() == (0, 0, 50, 50)


@pytest.mark.parametrize("name", PLANNERS)
def test_steps_taken_in_one_go_end_when_they_would_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def endings() -> tuple[list[Ending], Groups]:
        here, found = groups(PLANNERS[name]), list[Ending]()
        for at, (prompt, output) in enumerate(((300, 80), (60, 33), (500, 64), (90, 20))):
            here.at(at * 0.02, lambda p=prompt, o=output: here.ask(p, o, found.append))  # type: ignore[misc]
        here.run(1000.0)
        return found, here

    found, here = endings()
    monkeypatch.setattr(Groups, "_alike", lambda *_: 1)
    single, slow = endings()
    assert here.totals() == slow.totals() and here.clock.count < 0.3 * slow.clock.count
    for one, other in zip(found, single, strict=True):
        assert (one.prompt, one.output) == (other.prompt, other.output)
        assert (one.first, one.last) == pytest.approx((other.first, other.last), rel=1e-9)


def test_a_plan_waits_for_the_step_in_hand_and_stops_nobody() -> None:
    """A request comes in the middle of a step: its prefill begins on the idle instance at once, the step goes on."""
    here, endings = groups(instances=2), list[Ending]()
    here.ask(100, 50, endings.append)
    here.clock.step(1000.0)
    first = here.now
    (party,) = here.books.parties
    here.run(first + 2.5 * party.first)
    here.ask(80, 1, endings.append)
    (still,) = here.books.parties
    assert still.began == pytest.approx(first + party.seconds(3)) and still.requests[0].produced == 4
    here.run(1000.0)
    assert endings[0].prompt == 80
    assert endings[0].first - endings[0].asked == pytest.approx(striping.prefill(COST, [80], 1))
    assert endings[1].last - first == pytest.approx(sum(COST.decode_step(1, n) for n in range(101, 150)))


def test_who_hears_of_an_ending_may_ask_again() -> None:
    here, left, endings = groups(), [20], list[Ending]()

    def then(ending: Ending) -> None:
        endings.append(ending)
        if left[0]:
            left[0] -= 1
            here.ask(50 + 30 * left[0], left[0] % 3 + 1, then)

    for _ in range(4):
        here.ask(100, 1, then)
    while here.clock.step(1000.0):
        here.check()
    assert len(endings) == 24 and not here.busy


# --- plans -----------------------------------------------------------------------------------------------------------


def test_short_prompts_take_one_instance_and_long_ones_four_and_stay_on_one() -> None:
    """With times fitted to the costs of A800, two a worker."""
    plans: list[Plan] = []
    a800 = cluster("1x8xA800@loongserve:tp2", read_size("LWM-7B", 16, "float16"))
    for tokens, degree in ((100, 1), (100_000, 4)):
        here = Groups(a800, striping.times(a800), noted(ELASTIC, plans), 16, Clock())
        here.ask(tokens, 20, lambda _: None)
        (prefill,) = plans[-1].prefills
        assert len(prefill.group) == degree
        here.clock.step(1000.0)
        (decode,) = plans[-1].decodes
        assert len(decode.group) == 1 and here.books.parties[0].holders == {decode.group[0]}


def test_prompts_and_answers_are_kept_apart() -> None:
    plans: list[Plan] = []
    history(noted(PLANNERS["disaggregated"], plans))
    assert {each.group for plan in plans for each in plan.prefills} == {("n0",)}
    assert {each.group for plan in plans for each in plan.decodes} == {("n1",), ("n2",), ("n3",)}
    assert {kept.instance for plan in plans for each in plan.prefills for kept in each.kept} == {"n1", "n2", "n3"}
    assert not any(plan.migrations or plan.preempted for plan in plans)


def test_what_is_kept_elsewhere_is_sent_while_it_is_computed() -> None:
    slow = replace(COST, move=replace(COST.move, points=((0.0, 0.0), (1000.0, 1.0))))
    here = Groups(
        Cluster(tuple(Site(f"n{i}", i, BLOCKS, COST, slow) for i in range(2)), Link("", 0, 1), Link("", 0, 1)),
        striping.times(place(2)),
        disaggregating(["n0"]),
        BLOCK,
        Clock(),
    )
    endings: list[Ending] = []
    here.ask(500, 1, endings.append)
    here.run(10.0)
    assert endings[0].first == pytest.approx(0.5)


def test_a_move_holds_up_both_ends() -> None:
    """Two batches on instances of their own; then one goes to that of the other, at the end of its step in hand."""
    apart = alone("s1", "n0"), alone("s2", "n1")
    both = Decode(("s1", "s2"), ("n0",), (Master("n0", ("s1", "s2")),), 0.0)
    script = iter(
        [
            Plan((begun("s1", "n0", 100),), (), (), (), ()),
            Plan((begun("s2", "n1", 200),), (), (), (), ()),
            Plan((), apart[:1], (), (), ()),
            Plan((), apart, (), (), ()),
            Plan((), (both,), (Migration("s2", "n1", "n0", 200),), (), ()),
        ]
    )
    here = groups(replace(ELASTIC, plan=lambda *_: next(script)), instances=2)
    here.ask(100, 60, lambda _: None)
    here.run(1e-4)
    here.ask(200, 60, lambda _: None)
    here.clock.step(1000.0)
    here.clock.step(1000.0)
    steps = max(party.began for party in here.books.parties)
    assert steps > here.now, "s1 is in the middle of a step"
    here.plan()
    (party,) = here.books.parties
    assert here.moved == 200 and party.began == pytest.approx(steps + COST.move(200))
    here.check()


def test_a_prompt_beside_a_step_belongs_to_the_batch_from_the_next_plan_on() -> None:
    share = Share(1, 1, 0, 101, 0)
    beside = replace(alone("s1", "n0"), prompts=("s2",), kept=(Kept("n0", "s2", 0, 200),))
    both = Decode(("s1", "s2"), ("n0",), (Master("n0", ("s1", "s2")),), 0.0)
    script = iter(
        [
            Plan((begun("s1", "n0", 100),), (), (), (), ()),
            Plan((), (beside,), (), (), ()),
            Plan((), (both,), (), (), ()),
            Plan((), (), (), (), ()),
        ]
    )
    here, endings = groups(replace(ELASTIC, plan=lambda *_: next(script)), instances=1), []
    here.ask(100, 60, endings.append)
    here.ask(200, 60, endings.append)
    here.clock.step(1000.0)
    here.check()
    began = here.now
    here.clock.step(1000.0)
    here.check()
    assert here.now - began == pytest.approx(striping.beside(COST, [share], [200]))
    assert here.now - began < striping.prefill(COST, [200], 1) + striping.step(COST, [share])
    while here.busy:
        here.clock.step(1000.0)
    assert [each.output for each in endings] == [60, 60] and endings[1].first == pytest.approx(here.now, abs=1.0)
    assert {each.first for each in endings} >= {began} and here.totals().steps == 2 + 59


def begun(seq: str, name: str, tokens: int) -> Prefill:
    return Prefill((seq,), (name,), (Kept(name, seq, 0, tokens),), 0.0)


def alone(seq: str, name: str) -> Decode:
    return Decode((seq,), (name,), (Master(name, (seq,)),), 0.0)


def test_a_planner_that_begins_nothing_is_told_of() -> None:
    here = groups(replace(ELASTIC, plan=lambda *_: Plan((), (), (), (), ())))
    with pytest.raises(Broken, match="elastic begins nothing"):
        here.ask(10, 10, lambda _: None)


# --- looking on ------------------------------------------------------------------------------------------------------


def test_people_may_look_at_a_ledger() -> None:
    here, seen = groups(), list[tuple[float, Ledger]]()
    here.watch(0.05, lambda at, ledger: seen.append((at, ledger)))
    here.play(iter(load(2, 60, 0.5)), lambda _: None)
    here.run(2.0)
    assert [at for at, _ in seen] == pytest.approx([0.05 * n for n in range(len(seen))])
    for _, ledger in seen:
        assert all(node.used >= 0 and node.used + node.lent <= node.blocks for node in ledger.nodes.values())
    assert any(ledger.loans for _, ledger in seen) and any(n.waiting for _, each in seen for n in each.nodes.values())
    with pytest.raises(BadRequest):
        here.watch(0.0, lambda *_: None)
