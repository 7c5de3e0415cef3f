"""The elastic planner: what every plan keeps to, and each of LoongServe's four steps on a case of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain, combinations

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from infinillm.core.elastic.dispatching import allocated, dispatched, least_used, peak, sides
from infinillm.core.elastic.plan import longest, plan
from infinillm.core.elastic.scaling import fewest, masters, retention
from infinillm.core.elastic.times import PrefillTime, Times
from infinillm.core.elastic.values import Batch, Instance, Plan, Running, State, Waiting, free
from tests.core.elastic_cluster import A800, SLOTS, SMALL, batch, instances, running, waiting

FOUR = instances(SLOTS, SLOTS, SLOTS, SLOTS)


def state(group: tuple[Instance, ...], queue: tuple[Waiting, ...] = (), *batches: Batch, average: float = 0.0) -> State:
    """The instances are told what the batches hold."""
    held: Counter[str] = Counter()
    for each in batches:
        for request in each.requests:
            held.update(request.held)
    return State(tuple(replace(e, used=e.used + held[e.id]) for e in group), queue, batches, average)


# --- laws ------------------------------------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn) -> State:
    slots = draw(st.integers(5, 60))
    group = instances(*draw(st.lists(st.integers(slots // 2, slots), min_size=1, max_size=4)), slots=slots)
    room = {e.id: e.free for e in group}
    batches = []
    for at in range(draw(st.integers(0, 3))):
        requests = []
        for number in range(draw(st.integers(1, 6))):
            held = {}
            for name in draw(st.sets(st.sampled_from(sorted(room)), min_size=1, max_size=2)):
                if tokens := draw(st.integers(0, min(room[name], 12))):
                    held[name] = tokens
                    room[name] -= tokens
            if held:
                arrived, produced, seconds = draw(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9)))
                requests.append(Running(f"r{at}.{number}", float(arrived), held, produced, 1, float(seconds)))
        if requests:
            batches.append(Batch(tuple(requests)))
    queue = waiting(*draw(st.lists(st.integers(1, 60), max_size=5)))
    return state(group, queue, *batches, average=float(draw(st.integers(0, 20))))


def moved(told: State, found: Plan) -> tuple[dict[str, Instance], dict[str, Running]]:
    """Instances and running requests once the migrations are done and the evicted have lost what they held."""
    known = {e.id: e for e in told.instances}
    requests = {r.id: r for each in told.batches for r in each.requests}
    for seq, source, target, tokens in found.migrations:
        held = dict(requests[seq].held)
        held[source] -= tokens
        held[target] = held.get(target, 0) + tokens
        assert tokens > 0 and held[source] >= 0 and source != target
        requests[seq] = replace(requests[seq], held={name: n for name, n in held.items() if n})
        known[source] = replace(known[source], used=known[source].used - tokens)
        known[target] = replace(known[target], used=known[target].used + tokens)
        assert known[target].free >= 0
    for seq in found.evicted:
        for name, tokens in requests.pop(seq).held.items():
            known[name] = replace(known[name], used=known[name].used - tokens)
    return known, requests


@given(states())
def test_a_plan_uses_every_instance_once_and_forgets_nobody(told: State) -> None:
    found = plan(told, SMALL)
    event(f"{len(found.prefills)} prefills, {bool(found.decodes)=}, {bool(found.migrations)=}")
    event(f"{bool(found.preempted)=}, {bool(found.evicted)=}")
    groups = [name for each in (*found.prefills, *found.decodes) for name in each.group]
    assert len(groups) == len(set(groups)) and set(groups) <= {e.id for e in told.instances}
    _, left = moved(told, found)
    assert sorted(chain(found.preempted, *(each.requests for each in found.decodes))) == sorted(left)
    queue = [r.id for r in told.waiting]
    taken = [seq for each in found.prefills for seq in each.requests]
    assert sorted(taken) == queue[: len(taken)], "first come, first served"
    for each in found.prefills:
        lengths = [r.tokens for r in told.waiting if r.id in each.requests]
        time = SMALL.prefill[len(each.group) - 1]
        assert each.seconds == pytest.approx(time(sum(lengths), sum(n * n for n in lengths)))


@given(states())
def test_a_plan_fits_and_keeps_each_token_once(told: State) -> None:
    found = plan(told, SMALL)
    known, left = moved(told, found)
    lengths = {r.id: r.tokens for r in told.waiting}
    for each in found.prefills:
        used: Counter[str] = Counter()
        for name, _, start, stop in each.kept:
            used[name] += stop - start
        assert set(used) <= set(each.group) and all(known[name].free >= n for name, n in used.items())
        for seq in each.requests:
            ranges = sorted((k.start, k.stop) for k in each.kept if k.seq == seq)
            assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
            assert ranges[-1][1] == lengths[seq]
    for step in found.decodes:
        assert tuple(chain(*(each.requests for each in step.masters))) == step.requests
        assert all(known[each.instance].free >= len(each.requests) for each in step.masters)
        holding = {name for seq in step.requests for name in left[seq].held}
        assert set(step.group) == holding | {each.instance for each in step.masters}


@given(states())
def test_only_want_of_slots_evicts_and_then_the_newest_go(told: State) -> None:
    found = plan(told, SMALL)
    requests = sorted((r.arrived, r.id) for each in told.batches for r in each.requests)
    assert {seq for _, seq in requests[len(requests) - len(found.evicted) :]} == set(found.evicted)
    assert bool(found.evicted) == (len(requests) > free(told.instances))
    assert not (found.evicted and found.prefills)


@given(states())
def test_whatever_fits_an_idle_cluster_is_begun(told: State) -> None:
    idle = replace(told, batches=())
    assume(idle.waiting and idle.waiting[0].tokens < free(idle.instances))
    assert plan(idle, SMALL).prefills


# --- step 1 ----------------------------------------------------------------------------------------------------------


def dispatch(told: State, times: Times) -> list[str]:
    return [r.id for r in dispatched(told, sides(told), times)[0]]


def test_inputs_must_fit_and_outputs_are_expected_to() -> None:
    group = instances(50, 50, slots=50)
    assert dispatch(state(group, waiting(60, 30, 10)), SMALL) == ["w0", "w1"]
    assert dispatch(state(group, waiting(60, 30, left=8)), SMALL) == ["w0"]
    old = batch(running("r", left=40, a=10))
    assert dispatch(state(group, waiting(40, 20), old), SMALL) == ["w0"]
    assert dispatch(state(group, waiting(40, left=5), old), SMALL) == ["w0"]
    assert dispatch(state(group, waiting(40, left=26), old), SMALL) == []


def test_the_peak_is_where_most_is_held_before_the_next_leaves() -> None:
    """Three at once need 3 * 2 + 30 slots; when the first has left, 2 * 10 + 20; the last alone 100 + 10."""
    assert peak([(2, 10), (10, 10), (100, 10)]) == 110
    assert peak([(2, 10), (10, 10), (11, 10)]) == 40
    assert peak([(2, 10), (2, 10), (2, 10)]) == 36
    assert peak([]) == 0


def test_a_set_stops_at_the_tipping_point_and_a_single_request_does_not() -> None:
    times = replace(A800, tipping=3.1)  # seconds; 100,000 tokens on four take 3.0
    assert dispatch(state(FOUR, waiting(100_000, 100, 90_000)), times) == ["w0", "w1"]
    assert dispatch(state(FOUR, waiting(200_000, 100)), times) == ["w0"]


SECOND = replace(SMALL, prefill=(PrefillTime(1.0, 0.0, 0.0),) * 4, tipping=9.0)  # whatever is prefilled takes a second


@pytest.mark.parametrize(("tokens", "average", "wins"), [(19, 10, True), (21, 10, False), (19, 9, False)])
def test_a_batch_is_preempted_where_gain_2_exceeds_cost_1(tokens: int, average: float, wins: bool) -> None:
    """Cost: 1 s / 10 + 1 s / 5 of the batch. Gain: (average - 4 s) / input length, of one request."""
    old = batch(running("r0", produced=10, seconds=7, a=9), running("r1", produced=5, seconds=4, a=9))
    found = plan(state(instances(60, slots=60), waiting(tokens), old, average=average), SECOND)
    assert found.preempted == (("r0", "r1") if wins else ())
    assert len(found.prefills) == wins and len(found.decodes) == (not wins)


@pytest.mark.parametrize(("seconds", "empties"), [(9.0, True), (9.9, False)])
def test_an_instance_is_emptied_for_the_queue_where_that_is_sooner_than_its_end(seconds: float, empties: bool) -> None:
    """Two instances decode, 9 tokens and 5; the 5 could go to the other in 0.5 s, or be done on average at 10 s."""
    times = replace(SECOND, move=0.1)
    old = [batch(running("r0", a=9, seconds=9.9)), batch(running("r1", b=5, seconds=seconds))]
    found = plan(state(instances(60, 60, slots=60), waiting(50), *old, average=10), times)
    assert found.migrations == ((("r1", "b", "a", 5),) if empties else ())
    assert [each.group for each in found.prefills] == ([("b",)] if empties else [])
    assert [each.requests for each in found.decodes] == ([("r0", "r1")] if empties else [("r0",), ("r1",)])


def test_an_instance_that_lets_nobody_else_in_is_not_emptied() -> None:
    old = [batch(running("r0", a=9)), batch(running("r1", b=5))]
    told = state(instances(60, 60, 60, slots=60), waiting(10, 500), *old, average=10)
    requests, found = dispatched(told, sides(told), SECOND)
    assert [r.id for r in requests] == ["w0"] and found.prefill == ("c",)


def test_nothing_is_moved_where_next_tokens_would_lack_slots() -> None:
    old = [batch(running("r0", a=9)), batch(running("r1", b=5))]
    for room, fits in ((16, True), (15, False)):
        told = state(instances(room, 60, slots=60), (), *old)
        assert (least_used(sides(told)) is not None) == fits


@pytest.mark.parametrize(("full", "preempted"), [(False, ("r1",)), (True, ())])
def test_the_batch_with_most_unused_slots_is_preempted_unless_others_need_them(
    full: bool, preempted: tuple[str, ...]
) -> None:
    """Either pays. Where the other is full, its next token depends on the one with room."""
    old = [batch(running("r0", produced=99, a=20)), batch(running("r1", produced=99, b=10))]
    group = instances(20 if full else 60, 60, slots=60)
    times = replace(SECOND, move=100)  # seconds a token: nothing moves
    assert plan(state(group, waiting(35), *old, average=100), times).preempted == preempted


def test_idle_instances_without_which_decoding_cannot_go_on_stay_its_own() -> None:
    told = state(instances(5, 50, 40, slots=50), waiting(30, 30), batch(running("r", a=5)))
    found = plan(told, SMALL)
    assert [each.group for each in found.decodes] == [("a", "b")]
    assert [each.group for each in found.prefills] == [("c",)]
    assert [m.instance for m in found.decodes[0].masters] == ["b"]


# --- step 2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("move", "dop"), [(A800.move, 3), (4e-4, 2)])
def test_instances_are_emptied_while_gain_3_exceeds_cost_4(move: float, dop: int) -> None:
    """A prompt of 100,000 tokens takes 5.6 s on two instances and 3.9 on three; 5,000 tokens move in 3 ms or 2 s."""
    old = [batch(running("r0", c=50_000)), batch(running("r1", d=5_000))]
    times = replace(A800, move=move)
    found = plan(state(FOUR, waiting(100_000), *old), times)
    assert [len(each.group) for each in found.prefills] == [dop]
    assert found.migrations == ((("r1", "d", "c", 5_000),) if dop == 3 else ())
    assert [each.group for each in found.decodes] == ([("c",)] if dop == 3 else [("c",), ("d",)])


def test_what_step_1_moved_is_not_counted_against_step_2() -> None:
    """Step 1 empties d, to let the prompt in; then c saves 1.7478 s and costs 1.65 s."""
    old = [
        batch(running(f"r{at}", **{name: n}))
        for at, (name, n) in enumerate(zip("bcd", (60_000, 50_000, 5_000), strict=True))
    ]
    told = state(instances(20_000, SLOTS, SLOTS, SLOTS), waiting(100_000), *old, average=100)
    found = plan(told, replace(A800, move=3.3e-5))
    assert found.migrations == (("r2", "d", "b", 5_000), ("r1", "c", "b", 50_000))
    assert sorted(found.prefills[0].group) == ["a", "c", "d"]


def test_others_of_the_same_group_are_moved_to_first() -> None:
    old = [batch(running("r0", b=90_000)), batch(running("r1", c=50_000, d=5_000))]
    start = sides(state(FOUR, waiting(100_000), *old))
    found = allocated(waiting(100_000), start, replace(A800, move=1e-4))
    assert found.migrations == (("r1", "d", "c", 5_000),)
    assert [each.group for each in found.decode] == [("b",), ("c",)]


def test_short_prompts_empty_nothing() -> None:
    old = [batch(running("r0", c=50_000)), batch(running("r1", d=5))]
    assert not plan(state(FOUR, waiting(100, 100), *old), A800).migrations


def test_nothing_is_emptied_that_step_3_would_gain_too_little_by() -> None:
    """As one batch the prompts gain seconds by a third instance; cut into two batches, less than the move of 27 ms."""
    old = [batch(running("r0", a=41_882)), batch(running("r1", b=56_428))]
    told = state(FOUR, waiting(144, 73, 53_170), *old)
    assert allocated(told.waiting, sides(told), A800).migrations
    found = plan(told, A800)
    assert [len(each.group) for each in found.prefills] == [1, 1] and not found.migrations


# --- steps 3 and 4 ---------------------------------------------------------------------------------------------------


def test_the_papers_fragmented_prompt_fits() -> None:
    """600,000 tokens, and 100,000, 200,000 and 400,000 slots free: equal shares would need 200,000 on each."""
    group = instances(100_000, 200_000, 400_000, slots=500_000)
    (found,) = plan(state(group, waiting(600_000)), A800).prefills
    assert sorted(found.group) == ["a", "b", "c"]
    assert found.kept == (("b", "w0", 0, 200_000), ("c", "w0", 200_000, 600_000))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_a_prefill_stays_on_the_fewest_instances_and_the_fullest_of_such(tokens: list[int], free_: list[int]) -> None:
    group, need = instances(*free_, slots=40), sum(tokens)
    assume(need <= sum(free_))
    kept = retention(waiting(*tokens), group)
    names = {each.instance for each in kept}
    enough = [
        each for n in range(len(group) + 1) for each in combinations(group, n) if sum(e.free for e in each) >= need
    ]
    assert len(names) == len(enough[0])
    assert names == {e.id for e in fewest(need, group)}
    alike = [each for each in enough if len(each) == len(names)]
    fullest = max(sorted((e.used for e in each), reverse=True) for each in alike)
    assert sorted((e.used for e in group if e.id in names), reverse=True) == fullest
    for each in waiting(*tokens):
        positions = [p for k in kept if k.seq == each.id for p in range(k.start, k.stop)]
        assert sorted(positions) == [*range(each.tokens)]


@given(st.integers(1, 60), st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 20))
def test_masters_have_equal_shares_where_memory_lets_them(requests: int, free_: list[int], crowd: int) -> None:
    group = instances(*free_, slots=30)
    assume(requests <= sum(free_))
    names = [f"r{n}" for n in range(requests)]
    found = masters(names, group, crowd)
    assert [*chain(*(each.requests for each in found))] == names
    shares = {each.instance: len(each.requests) for each in found}
    assert all(0 < shares[e.id] <= e.free for e in group if e.id in shares)
    full = {e.id for e in group if shares.get(e.id, 0) == e.free}
    rest = [n for name, n in shares.items() if name not in full]
    event(f"{len(full & set(shares))} full, {len(rest)} not")
    if rest:
        assert max(rest) - min(rest) <= 1
        assert all(shares[name] <= min(rest) + 1 for name in full & set(shares))
    if sum(e.free >= crowd for e in group) * crowd >= requests:
        assert max(shares.values()) <= crowd


def test_few_requests_have_one_master_the_fullest_with_room() -> None:
    group = instances(0, 3, 20, 30, slots=30)
    assert masters(["r0", "r1", "r2", "r3"], group, 8) == (("c", ("r0", "r1", "r2", "r3")),)
    assert masters(["r0", "r1", "r2"], group, 8) == (("b", ("r0", "r1", "r2")),)


def test_a_crowd_is_given_idle_instances() -> None:
    """300 requests, at most 128 to a master: three masters, on one instance with K/V and two without."""
    crowd = batch(*(running(f"r{n}", a=10) for n in range(300)))
    (found,) = plan(state(FOUR, (), crowd), A800).decodes
    assert [len(each.requests) for each in found.masters] == [100, 100, 100]
    assert len(found.group) == 3 and "a" in found.group
    assert found.seconds == A800.decode(3, 300, 3_000)


def test_what_is_full_helps_no_crowd() -> None:
    """Five requests, at most four to a master: b has the room for all, a none, and the idle c some or none."""
    five = batch(*(running(f"r{n}", a=1, b=1) for n in range(5)))
    for room, shares in ((9, {"c": 3, "b": 2}), (0, {"b": 5})):
        (found,) = plan(state(instances(5, 50, room, slots=60), (), five), SMALL).decodes
        assert {each.instance: len(each.requests) for each in found.masters} == shares
        assert set(found.group) == {"a", "b", *shares}


def test_a_preempted_batch_keeps_its_instances() -> None:
    """The prefill needs one of its two; the crowd on c is not given the other."""
    old = [batch(running("r", produced=99, a=9, b=9)), batch(*(running(f"s{n}", c=2) for n in range(5)))]
    found = plan(state(instances(60, 60, 30, slots=60), waiting(20), *old, average=100), replace(SECOND, move=100))
    assert found.preempted == ("r",) and [len(each.group) for each in found.prefills] == [1]
    assert [each.group for each in found.decodes] == [("c",)]


def test_a_batch_short_of_slots_joins_one_that_has_some_or_is_given_an_instance() -> None:
    full, other = batch(running("r0", a=50)), batch(running("r1", b=40))
    told = state(instances(50, 50, slots=50), (), full, other)
    (found,) = plan(told, SMALL).decodes
    assert sorted(found.requests) == ["r0", "r1"] and found.group == ("a", "b")
    assert [each.instance for each in found.masters] == ["b"]
    alone = plan(state(instances(50, 20, 50, slots=50), (), full), SMALL)
    assert [each.group for each in alone.decodes] == [("a", "c")]


def test_batches_short_of_slots_stay_apart_where_an_idle_instance_helps_more() -> None:
    full = batch(*(running(f"r{n}", a=10) for n in range(3)))
    others = [batch(running("s", b=48)), batch(running("t", c=47))]
    apart = plan(state(instances(30, 50, 50, 9, slots=50), (), full, others[0]), SMALL)
    assert sorted(each.group for each in apart.decodes) == [("a", "c"), ("b",)]
    joined = plan(state(instances(30, 50, 50, slots=50), (), full, *others), SMALL)
    assert [each.group for each in joined.decodes] == [("a", "b", "c")]


def test_batches_that_share_an_instance_are_one() -> None:
    told = state(FOUR, (), batch(running("r0", a=9)), batch(running("r1", b=9)), batch(running("r2", a=1, b=1)))
    assert [sorted(each.requests) for each in plan(told, A800).decodes] == [["r0", "r1", "r2"]]


def test_the_newest_is_evicted_where_there_is_no_slot_for_its_next_token() -> None:
    old = batch(running("r0", arrived=1.0, a=30), running("r1", arrived=2.0, a=20))
    found = plan(state(instances(50, slots=50), waiting(5), old), SMALL)
    assert found.evicted == ("r1",) and not found.prefills
    assert [each.requests for each in found.decodes] == [("r0",)]


def test_with_more_instances_than_degrees_what_no_group_can_hold_waits() -> None:
    """And nobody is preempted for it: neither w1, too long for two, nor w2 behind it."""
    two = replace(SECOND, prefill=SECOND.prefill[:2])
    group, old = instances(50, 50, 60, slots=60), batch(running("r", produced=99, c=9))
    found = plan(state(group, waiting(20, 115, 2), old, average=100), two)
    assert [each.requests for each in found.prefills] == [("w0",)] and not found.preempted


def test_the_longest_request_is_what_the_largest_group_can_hold() -> None:
    group = (*FOUR[:2], replace(FOUR[2], slots=9), replace(FOUR[3], slots=5))
    assert longest(group, A800) == 2 * SLOTS + 14
    assert longest(group, replace(A800, prefill=A800.prefill[:3])) == 2 * SLOTS + 9
