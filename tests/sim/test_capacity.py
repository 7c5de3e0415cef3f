"""Objectives as people write them, judged request by request, and the search for the highest rate that keeps one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm.errors import BadRequest
from infinillm.sim.capacity import FAR, WITHIN, Judge, highest, objective
from infinillm.sim.simulation import Ending

# Asked at 10 s, first token after 2, the other 4 within 4 more: 0.06 s a token, 0.025 a token of the prompt.
ENDING = Ending(10.0, 12.0, 16.0, 80, 20)


def judged(text: str, *endings: Ending, share: float = 0.9, count: int = 0) -> Judge:
    judge = Judge(objective(text, share), count or len(endings))
    for ending in endings:
        judge.add(ending)
    return judge


@pytest.mark.parametrize(
    ("name", "value"), [("ttft", 2.0), ("tpot", 4 / 19), ("latency", 6.0), ("per-token", 0.06), ("per-input", 0.025)]
)
@pytest.mark.parametrize("mean", ["", "mean-"])
def test_each_figure_is_bounded_by_itself(name: str, value: float, mean: str) -> None:
    assert judged(f"{mean}{name}={value * 1.001:.9f}", ENDING).good
    assert not judged(f"{mean}{name}={value * 0.999:.9f}", ENDING).good


def test_all_bounds_must_hold_and_a_share_of_the_requests_must_keep_them() -> None:
    slow = Ending(10.0, 13.0, 17.0, 80, 20)
    judge = judged("ttft=2.5, latency=7", ENDING, slow, ENDING, ENDING, share=0.75)
    assert (judge.kept, judge.missed, judge.share, judge.good) == (3, 1, 0.75, True)
    assert not judged("ttft=2.5, latency=7", ENDING, slow, share=0.75).good
    assert not judged("ttft=2.5, latency=5", ENDING, share=0.75).good


def test_a_refused_request_keeps_nothing_and_counts_in_no_mean() -> None:
    refused = Ending(10.0, 10.0, 10.0, 80, 0, refused="too long")
    judge = judged("mean-ttft=2", ENDING, refused, share=0.5)
    assert (judge.kept, judge.missed, judge.good) == (1, 1, True)
    assert not judged("mean-ttft=1.9", ENDING, refused, share=0.5).good, "2 seconds on average, not 1"
    assert not judged("ttft=3", ENDING, refused).good


def test_a_single_token_has_no_time_between_tokens() -> None:
    assert judged("tpot=0.001", Ending(0.0, 1.0, 1.0, 5, 1)).good


def test_hopeless_is_what_the_best_of_all_that_may_come_cannot_mend() -> None:
    slow = Ending(10.0, 13.0, 17.0, 80, 20)
    assert not judged("ttft=2.5", slow, count=10).hopeless
    assert judged("ttft=2.5", slow, slow, count=10).hopeless
    assert not judged("mean-ttft=0.6", slow, slow, count=10).hopeless
    assert judged("mean-ttft=0.59", slow, slow, count=10).hopeless


@pytest.mark.parametrize("text", ["", "ttft", "ttft=fast", "ttft=0", "ttft=-1", "ttft=inf", "speed=2", "ttft=1,ttft=2"])
def test_what_is_no_objective_is_named(text: str) -> None:
    with pytest.raises(BadRequest, match="--slo") as error:
        objective(text, 0.9)
    assert error.value.field == "slo"


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_the_search_ends_within_two_per_cent_of_the_edge(edge: float, start: float) -> None:
    tried: list[float] = []

    def keeps(rate: float) -> bool:
        tried.append(rate)
        return rate <= edge

    low, high = highest(keeps, start)
    if edge < start / FAR:
        assert low == 0
    elif edge >= start * FAR:
        assert high == math.inf
    else:
        assert low <= edge < high <= low * (1 + WITHIN) * (1 + 1e-9)
    assert len(tried) == len(set(tried)) <= 24


@pytest.mark.parametrize(("answer", "found"), [(True, (FAR, math.inf)), (False, (0.0, 1 / FAR))])
def test_the_search_gives_up_far_from_where_it_began(answer: bool, found: tuple[float, float]) -> None:
    assert highest(lambda rate: answer, 1.0) == found
