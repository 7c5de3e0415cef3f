"""The scheduler: within budget and room, oldest first, nobody half admitted."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from infinillm.core.cost import Cost, Curve
from infinillm.core.layout import grown, reserved, uncovered
from infinillm.core.pace import LEFT_ALONE_TIMES, RECALL_AFTER_SECONDS
from infinillm.core.request import Request, Sampling, Sequence
from infinillm.core.scheduler import FEW_AHEAD, Budget, Here, Match, schedule, shortage
from infinillm.core.types import Chunk, Grow, Span, Stretch
from tests.core.test_cost import LLAMA_H100

SIZE = 4
BUDGET = Budget(tokens=16, sequences=4, block_size=SIZE)


def sequence(id: str, tokens: int, max_tokens: int = 8, arrival: float = 0.0) -> Sequence:
    prompt = tuple(range(tokens))
    return Sequence(Request(id, prompt, Sampling(max_tokens=max_tokens), arrival), list(prompt))


def computing(tokens: int, seconds: float) -> Cost:
    """Where so many tokens take so long to compute."""
    return replace(LLAMA_H100, prefill=Curve(((0.0, 0.0), (float(tokens), seconds))))


def running(
    id: str, tokens: int, done: int, node: str = "home", arrival: float = 0.0, room: int | None = None
) -> Sequence:
    s = sequence(id, tokens, arrival=arrival)
    s.pass_through("admit")
    s.done = ((0, done),) if done else ()
    s.layout = (Span(node, 0, room if room is not None else -(-tokens // SIZE) * SIZE),)
    return s


def decide(run=(), wait=(), room=None, budget=BUDGET, matches=None, denied=-inf, own=100, saved=(), kept=0, cost=None):
    found, here = matches or {}, Here(own, kept, saved, denied, cost)
    room = room or {"home": 100}
    return schedule(1, list(run), list(wait), room, budget, here, lambda s: found.get(s.id, Match()))


def test_a_prompt_is_admitted_whole_and_computed_in_chunks():
    step = decide(wait=[sequence("s", 40)])
    assert step.admit == ("s",)
    assert step.chunks == (Chunk("s", 0, 16),)
    assert step.grow == (Grow("s", "home", 0, 10),)


def test_decodes_come_before_prefills_and_the_budget_holds():
    step = decide(run=[running("d", 9, 8), running("p", 40, 16)], wait=[sequence("w", 5)])
    assert step.chunks == (Chunk("d", 8, 9), Chunk("p", 16, 31))
    assert step.admit == ()


def test_a_decode_that_outgrows_home_goes_on_in_borrowed_blocks():
    step = decide(run=[running("d", 9, 8, room=8)], room={"home": 0, "lender": 3})
    assert step.chunks == (Chunk("d", 8, 9),) and step.grow == (Grow("d", "lender", 8, 1),)


def test_a_sequence_goes_on_where_it_already_borrows():
    s = running("d", 13, 12, room=8)
    s.layout = (*s.layout, Span("old", 8, 12))
    step = decide(run=[s], room={"home": 0, "big": 50, "old": 1})
    assert step.grow == (Grow("d", "old", 12, 1),)


def test_short_of_blocks_it_waits_while_patient_and_preempts_the_youngest_when_not():
    run = [running("old", 9, 8, room=8), running("young", 9, 8, room=8)]
    patient = decide(run=run, room={"home": 0})
    assert patient.chunks == () and patient.preempt == () and patient.short == 2
    assert decide(run=run, room={"home": 0}, denied=0.0).preempt == ("young",)


def test_it_waits_as_long_as_who_gives_way_would_take_to_be_computed_again():
    run, cost = [running("old", 9, 8, room=8), running("young", 5, 4, room=4)], computing(4, 3.0)
    room = {"home": 0, "a": 0}
    for denied, gone in ((-inf, ()), (0.0, ()), (2.9, ()), (3.0, ("young",))):
        assert decide(run=run, room=room, denied=denied, cost=cost).preempt == gone
    assert decide(run=run[:1], room=room, denied=3.0, cost=cost).preempt == (), "it has more to lose"
    assert decide(run=run, room={"home": 0}, denied=0.0, cost=cost).preempt == ("young",), "nobody lends"


def test_one_that_cannot_go_on_does_not_stop_the_others():
    run = [running("stuck", 9, 8, room=8), running("fine", 11, 10)]
    assert decide(run=run, room={"home": 0}).chunks == (Chunk("fine", 10, 11),)


def test_nobody_is_half_admitted_and_nobody_overtakes():
    step = decide(wait=[sequence("big", 40), sequence("small", 4)], room={"home": 6})
    assert step.admit == () and step.short == 4


def test_loans_count_as_room():
    step = decide(wait=[sequence("big", 40)], room={"home": 6, "lender": 4})
    assert step.grow == (Grow("big", "home", 0, 6), Grow("big", "lender", 24, 4))


def test_a_preempted_sequence_comes_back_only_with_all_it_may_need():
    s = running("s", 9, 9)
    s.forget()
    assert decide(wait=[s], room={"home": 3}).short == 1  # 9 prompt tokens and 7 to store, 4 blocks
    assert decide(wait=[s], room={"home": 4}).grow == (Grow("s", "home", 0, 4),)


def test_a_cached_prefix_is_not_computed_again():
    step = decide(wait=[sequence("s", 10)], room={"home": 3}, matches={"s": Match((Stretch("s", 0, 2),), 2)})
    assert step.chunks == (Chunk("s", 8, 10),) and step.grow == (Grow("s", "home", 8, 1),)
    assert decide(wait=[sequence("s", 10)], room={"home": 2}, matches={"s": Match((Stretch("s", 0, 2),), 2)}).short == 1


def test_a_hole_is_pending_work_like_any_other():
    s = running("s", 16, 16)
    s.lose(4, 8)
    s.layout = (Span("home", 0, 4), Span("b", 8, 16))
    step = decide(run=[s])
    assert step.chunks == (Chunk("s", 4, 8),) and step.grow == (Grow("s", "home", 4, 1),)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_run_stays_within_room_and_budget_and_everyone_finishes(data):
    """Drive the scheduler to the end of random work, playing the engine's part."""
    room = {"home": data.draw(st.integers(4, 12)), "lender": data.draw(st.integers(0, 6))}
    total = sum(room.values())
    work = [
        sequence(f"s{i}", data.draw(st.integers(1, 16)), data.draw(st.integers(1, 8)), float(i))
        for i in range(data.draw(st.integers(1, 6)))
    ]
    work = [s for s in work if -(-s.request.longest // SIZE) <= total]
    waiting, run, left = list(work), [], dict(room)
    for number in range(2000):
        if not waiting and not run:
            break
        step = schedule(number, run, waiting, left, BUDGET, Here(1000, 0, (), 0.0, None), lambda _: Match())
        assert sum(c.stop - c.start for c in step.chunks) <= BUDGET.tokens
        assert len({c.seq for c in step.chunks}) == len(step.chunks)
        assert not {c.seq for c in step.chunks} & set(step.preempt)
        by_id = {s.id: s for s in work}
        for id_ in step.preempt:
            s = by_id[id_]
            for span in s.layout:
                left[span.node] += (span.stop - span.start) // SIZE
            s.forget()
            run.remove(s)
            waiting.insert(0, s)
        for id_ in step.admit:
            by_id[id_].pass_through("admit")
            waiting.remove(by_id[id_])
            run.append(by_id[id_])
        for g in step.grow:
            left[g.node] -= g.blocks
            assert left[g.node] >= 0
            by_id[g.seq].layout = grown(by_id[g.seq].layout, [g], SIZE)
        for c in step.chunks:
            s = by_id[c.seq]
            assert not uncovered(s.layout, c.start, c.stop) and c.stop <= reserved(s.layout)
            s.compute(c)
            if s.gap is None:
                s.tokens.append(0)
                if s.produced >= s.request.sampling.max_tokens:
                    s.pass_through("finish")
                    run.remove(s)
                    for span in s.layout:
                        left[span.node] += (span.stop - span.start) // SIZE
        assert step.chunks or step.preempt or waiting or run
    assert not waiting and not run and left == room


def test_what_lies_beyond_home_is_asked_for_also_while_those_that_gave_way_stand_in_front():
    gave_way, large, small = sequence("gave way", 8), sequence("large", 80), sequence("small", 8)
    gave_way.preemptions = 1
    step = decide(wait=[gave_way, large], room={"home": 1}, own=10)
    assert shortage(step, [], [gave_way, large], SIZE, 10, 3, None).beyond == 22 - 10 - 3
    assert shortage(step, [], [small, large], SIZE, 10, 3, None).beyond is None, "it is not its turn yet"
    assert shortage(step, [], [gave_way], SIZE, 10, 3, None).beyond is None


def test_what_outgrows_home_and_gave_way_is_to_be_left_alone_twice_as_long_each_time():
    large, small = sequence("large", 80), sequence("small", 8)
    small.preemptions = 3

    def hold(times: int) -> float:
        large.preemptions = times
        return shortage(
            decide(wait=[small, large], room={"home": 1}, own=10), [], [small, large], SIZE, 10, 0, None
        ).hold

    assert hold(0) == 0.0
    assert [hold(times) / hold(times - 1) for times in (2, 3)] == [2.0, 2.0]
    assert hold(1) > RECALL_AFTER_SECONDS
    assert hold(1000) < float("inf")


def test_what_takes_long_to_compute_again_is_to_be_left_alone_for_several_times_as_long_from_the_first():
    large = sequence("large", 80)
    step = decide(wait=[large], room={"home": 1}, own=10)

    def hold(quicker: float, times: int) -> float:
        large.preemptions = times
        slow = computing(80, 20.0 / quicker)
        return shortage(step, [], [large], SIZE, 10, 0, slow).hold

    assert hold(1.0, 0) == LEFT_ALONE_TIMES * 20.0
    assert hold(1.0, 2) == 4 * hold(1.0, 0)
    assert hold(4.0, 0) == 0.0, "no longer than a recall waits anyway"
    assert hold(4.0, 1) == 2 * RECALL_AFTER_SECONDS
    assert shortage(step, [], [large], SIZE, 40, 0, computing(80, 99.0)).hold == 0.0, "home could hold it"


def test_little_is_borrowed_ahead_for_what_home_could_hold():
    crowd = [sequence(str(n), 24, max_tokens=40) for n in range(9)]
    step = decide(wait=crowd, room={"home": 1}, own=20)
    assert step.short == 5
    assert shortage(step, [], crowd, SIZE, 20, 0, None).wanted == 5 + FEW_AHEAD
    assert shortage(step, [], crowd, SIZE, 15, 0, None).wanted == 5 + 10, (
        "all that it may come to need, where it outgrows home"
    )
