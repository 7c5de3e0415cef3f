"""A prompt on fewer instances than keep it: which compute, what they keep, and that it is never slower."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import event, given

from infinillm.core.auto import begun, plan
from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.narrowing import narrowed, reserved
from infinillm.core.elastic.times import PrefillTime, Times
from infinillm.core.elastic.values import Kept, Plan, State
from tests.core.elastic_cluster import A800, instances, waiting
from tests.core.test_elastic import moved, state, states

MOVE = 0.004  # seconds a token, of Llama-2-7B over 125 MB/s
# Every instance at a link of its own: what is striped over d of them sends (d - 1) / d of its K/V around.
APART = replace(A800, move=MOVE, prefill=tuple(
    PrefillTime(a, A800.prefill[0].beta / d + MOVE * (d - 1) / d, A800.prefill[0].gamma / d)
    for d, (a, _, _) in enumerate(A800.prefill, 1)
))  # fmt: skip


def planned(told: State, times: Times) -> tuple[Plan, Plan]:
    """The elastic planner's plan, and the same narrowed."""
    wide = elastic.plan(told, times)
    return wide, narrowed(wide, told, times)


def test_over_a_slow_link_one_computes_and_others_keep_what_it_has_no_slots_for() -> None:
    """Striped over two, 540 s of K/V go around; 95,000 tokens take 380 s, computing all of them less."""
    told = state(instances(175_000, 100_000, slots=175_000), waiting(270_000))
    wide, found = planned(told, APART)
    assert [each.group for each in wide.prefills] == [("a", "b")]
    (prefill,) = found.prefills
    assert prefill.group == ("a",)
    assert prefill.kept == (Kept("a", "w0", 0, 175_000), Kept("b", "w0", 175_000, 270_000))
    assert prefill.seconds == 95_000 * MOVE > APART.alone(270_000)


def test_inside_a_server_all_compute() -> None:
    wide, found = planned(state(instances(200_000, 200_000), waiting(300_000)), A800)
    assert found == wide
    assert len(found.prefills[0].group) == 2


def test_where_most_does_not_fit_several_compute() -> None:
    """To send 200,000 tokens away takes longer than to send half of 300,000 around."""
    wide, found = planned(state(instances(100_000, 100_000, 100_000, slots=100_000), waiting(290_000)), APART)
    assert len(wide.prefills[0].group) == 3
    assert len(found.prefills[0].group) == 2


def test_the_others_take_prompts_meanwhile_but_not_the_slots_that_are_kept() -> None:
    told = state(instances(175_000, 175_000, slots=175_000), waiting(275_000, 100, 80_000))
    _, found = planned(replace(told, waiting=told.waiting[:1]), APART)
    free = {each.id: each.free for each in reserved(told.instances, found.prefills)}
    assert free == {"a": 175_000, "b": 75_000}
    assert begun(plan(told, APART)) == {"w0", "w1"}


@given(states())
def test_every_token_is_kept_once_where_there_is_room_and_nothing_is_slower(told: State) -> None:
    times = replace(
        APART, prefill=tuple(PrefillTime(a, b * 1e3, c * 1e6) for a, b, c in APART.prefill), move=MOVE * 1e3
    )
    wide, found = planned(told, times)
    event(f"{len(wide.prefills)=}, {wide == found=}")
    known, _ = moved(told, wide)
    room = {name: each.free for name, each in known.items()}
    lengths = {each.id: each.tokens for each in told.waiting}
    for before, after in zip(wide.prefills, found.prefills, strict=True):
        assert after.requests == before.requests and set(after.group) <= set(before.group)
        assert after.seconds <= before.seconds
        for seq in after.requests:
            spans = sorted((each.start, each.stop) for each in after.kept if each.seq == seq)
            assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
            assert spans[-1][1] == lengths[seq]
        for name, _, start, stop in after.kept:
            assert name in before.group
            room[name] -= stop - start
    assert min(room.values()) >= 0
