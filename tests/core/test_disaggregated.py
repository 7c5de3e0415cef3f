"""Prefill and decode apart: who prefills what, where it is kept, and who has to go."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from infinillm.core.disaggregated import longest, plan
from infinillm.core.elastic.values import Batch, Running, State
from tests.core.elastic_cluster import A800, SMALL, batch, instances, running, waiting

SIDE = frozenset({"a", "b"})  # prefill
FOUR = instances(100, 100, 100, 100, slots=100)


def test_prompts_go_to_the_least_busy_and_are_kept_where_most_room_is() -> None:
    found = plan(SIDE, State(FOUR, waiting(60, 40, 10), (), 0.0), SMALL)
    assert [(each.group, each.requests) for each in found.prefills] == [(("a",), ("w0",)), (("b",), ("w1", "w2"))]
    kept = [each for prefill in found.prefills for each in prefill.kept]
    assert kept == [("c", "w0", 0, 60), ("d", "w1", 0, 40), ("d", "w2", 0, 10)]
    assert not (found.decodes or found.migrations or found.preempted or found.evicted)


def test_a_batch_ends_at_the_tipping_point_and_a_single_prompt_does_not() -> None:
    times = replace(A800, tipping=1.0)  # 10,000 tokens take 0.4 s, 100,000 take 11
    group = instances(*[200_000] * 4)
    found = plan(SIDE, State(group, waiting(100_000, 10_000, 10_000, 10_000), (), 0.0), times)
    assert [each.requests for each in found.prefills] == [("w0",), ("w1", "w2")]


def test_nobody_is_prefilled_whose_output_would_evict() -> None:
    """d is full; c has 40 tokens with 15 to come. Beside them 40 fit with 5 to come, and not with 20."""
    old = batch(running("r", left=15, c=40)), batch(running("s", left=1, d=99))
    group = instances(100, 100, 60, 1, slots=100)
    for left, fits in ((5, True), (20, False)):
        found = plan(SIDE, State(group, waiting(40, left=left), old, 0.0), SMALL)
        assert bool(found.prefills) == fits
        assert [(each.group, each.requests) for each in found.decodes] == [(("c",), ("r",)), (("d",), ("s",))]


def test_slots_of_prompts_that_are_still_computed_count() -> None:
    """Of c 50 slots are taken for a prompt that is not told of."""
    group = instances(100, 0, 50, 0, slots=100)
    assert plan(SIDE, State(group, waiting(45, left=5), (), 0.0), SMALL).prefills
    assert not plan(SIDE, State(group, waiting(45, left=6), (), 0.0), SMALL).prefills


def test_the_newest_has_to_go_where_slots_lack() -> None:
    old = batch(running("r", arrived=1.0, c=50), running("s", arrived=2.0, c=30), running("t", arrived=0.0, c=19))
    found = plan(SIDE, State(instances(100, 100, 1, 100, slots=100), waiting(9), (old,), 0.0), SMALL)
    assert found.evicted == ("s",) and not found.prefills
    assert [each.requests for each in found.decodes] == [("t", "r")]


def test_the_longest_is_what_one_that_decodes_can_hold() -> None:
    assert longest(SIDE, (*FOUR[:2], replace(FOUR[2], slots=70), replace(FOUR[3], slots=80)), SMALL) == 80
    assert longest(SIDE, FOUR[2:], SMALL) == longest(SIDE, FOUR[:2], SMALL) == 0, (
        "all that prefill, or decode, are lost"
    )


@given(
    st.lists(st.integers(1, 60), max_size=8),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=8),
    st.integers(1, 20),
)
def test_every_plan_fits(prompts: list[int], old: list[tuple[int, int]], left: int) -> None:
    held = {"c": 0, "d": 0}
    requests: list[Running] = []
    for at, (tokens, more) in enumerate(old):
        place = "cd"[at % 2]
        if held[place] + tokens <= 100:
            held[place] += tokens
            requests.append(running(f"r{at}", float(at), left=more, **{place: tokens}))
    group = instances(100, 100, 100 - held["c"], 100 - held["d"], slots=100)
    found = plan(SIDE, State(group, waiting(*prompts, left=left), (Batch(tuple(requests)),), 0.0), SMALL)
    free = {each.id: each.free for each in group}
    for seq in found.evicted:
        for name, tokens in next(r.held for r in requests if r.id == seq).items():
            free[name] += tokens
    for each in found.prefills:
        assert set(each.group) <= SIDE
        for name, seq, start, stop in each.kept:
            assert (start, stop) == (0, prompts[int(seq[1:])])
            free[name] -= stop
    taken = sorted(seq for each in found.prefills for seq in each.requests)
    assert taken == [f"w{n}" for n in range(len(taken))], "first come, first served"
    for step in found.decodes:
        (place,) = step.group
        assert free[place] >= len(step.requests)
    assert sorted((*found.evicted, *(s for each in found.decodes for s in each.requests))) == sorted(
        r.id for r in requests
    )
