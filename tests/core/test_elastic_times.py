"""Prefill and decode times of elastic instances against the points LoongServe's notebook prints."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm.core.elastic.times import PrefillTime, Sample, fitted, from_plain, sample, to_plain
from infinillm.errors import BadRequest
from tests.core.elastic_cluster import A800, MEASURED

ROWS = MEASURED["measured"]
SP1TP8, SP2TP4, SP4TP2 = 2, 3, 4  # columns


@pytest.mark.parametrize(
    ("column", "alpha", "beta", "gamma", "worst"),
    [
        (SP1TP8, 0.190, 1.480e-5, 1.780e-10, 0.0234),
        (SP2TP4, 0.063, 1.104e-5, 1.873e-10, 0.0146),
        (SP4TP2, 0.076, 9.952e-6, 1.938e-10, 0.0030),
    ],
)
def test_the_notebooks_points_are_fitted_closely(
    column: int, alpha: float, beta: float, gamma: float, worst: float
) -> None:
    samples = [sample([row[1]] * row[0], row[column] / 1e3) for row in ROWS]
    found = fitted(samples)
    assert found == pytest.approx((alpha, beta, gamma), rel=0.01)
    errors = [abs(found(each.tokens, each.squares) / each.seconds - 1) for each in samples]
    assert max(errors) == pytest.approx(worst, abs=5e-5)


def test_the_times_of_four_instances_are_those_measured() -> None:
    for requests, tokens, *columns in ROWS:
        seconds = A800.prefill[3](requests * tokens, requests * tokens**2)
        assert seconds == pytest.approx(columns[SP4TP2 - 2] / 1e3, rel=0.015)
    assert A800.prefill[3](100, 100**2) == pytest.approx(38.48e-3, rel=0.01)


@pytest.mark.parametrize(("dop", "at_1k", "at_10k", "at_100k"), [(1, 49, 394, 10_900), (2, 42, 229, 5_620)])
def test_fewer_instances_are_quicker_for_short_prompts_only(dop: int, at_1k: int, at_10k: int, at_100k: int) -> None:
    for tokens, milliseconds in ((1_000, at_1k), (10_000, at_10k), (100_000, at_100k)):
        assert A800.prefill[dop - 1](tokens, tokens**2) == pytest.approx(milliseconds / 1e3, rel=0.01)
    best = [min(range(4), key=lambda at: A800.prefill[at](n, n * n)) + 1 for n in (100, 900, 2_100, 3_000, 100_000)]
    assert best == [1, 2, 3, 4, 4]


def test_a_decode_step_takes_as_long_as_measured_and_reads_slower_on_fewer_instances() -> None:
    """A single request of 500,000 tokens is the point the model misses most."""
    for requests, tokens, *columns in ROWS:
        seconds = A800.decode(4, requests, requests * tokens)
        assert seconds == pytest.approx(columns[5] / 1e3, rel=0.05 if requests > 1 else 0.1)
    step = A800.decode(4, 0, 0)
    assert A800.decode(1, 1, 100_000) - A800.decode(1, 1, 0) == pytest.approx(4 * (A800.decode(4, 0, 100_000) - step))


def times_of(alpha: float, beta: float, gamma: float) -> list[Sample]:
    time = PrefillTime(alpha, beta, gamma)
    shapes = [(1, 10), (8, 10), (1, 1_000), (16, 1_000), (4, 20_000), (1, 200_000)]
    return [sample([n] * requests, time(requests * n, requests * n * n)) for requests, n in shapes]


@given(st.floats(1e-3, 1), st.floats(1e-6, 1e-4), st.floats(1e-11, 1e-9))
def test_what_made_the_samples_is_found_again(alpha: float, beta: float, gamma: float) -> None:
    assert fitted(times_of(alpha, beta, gamma)) == pytest.approx((alpha, beta, gamma), rel=1e-3)


def test_the_relative_error_counts_and_no_term_is_negative() -> None:
    """A second more on a prefill of 200 s is nothing; a term below zero is left out, and the rest fitted without it."""
    samples = times_of(0.02, 1e-5, 5e-9)
    late = [*samples[:-1], samples[-1]._replace(seconds=samples[-1].seconds + 1)]
    assert fitted(late).alpha == pytest.approx(0.02, rel=0.01)
    bent = [Sample(n, n * n, n**0.5) for n in (10, 100, 1_000, 10_000)]
    found = fitted(bent)
    assert found.gamma == 0 and found.alpha > 0 and found.beta > 0


@pytest.mark.parametrize(
    "samples", [[], [Sample(1, 1, 0.0)], [Sample(1, 1, 1.0)] * 3, [Sample(1, 1, 1), Sample(2, 4, 2)]]
)
def test_a_fit_needs_samples_that_differ(samples: list[Sample]) -> None:
    with pytest.raises(BadRequest) as found:
        fitted(samples)
    assert found.value.field == "samples"


def test_times_go_through_json() -> None:
    assert from_plain(json.loads(json.dumps(to_plain(A800)))) == A800


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefill", None),
        ("prefill", []),
        ("prefill", "abc"),
        ("prefill", [[1, 2]]),
        ("prefill", [[1, 2, -3]]),
        ("prefill", [[1, 2, float("nan")]]),
        ("prefill", [3]),
        ("decode", [1, 2, 3]),
        ("decode", [1, 2, 3, 0]),
        ("decode", [1, 2, 3, 1.5]),
        ("move", "quick"),
        ("move", None),
        ("tipping", -1),
        ("crowd", 0),
        ("crowd", True),
    ],
)
def test_bad_times_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as found:
        from_plain({**to_plain(A800), field: value})
    assert found.value.field == field


def test_times_are_a_mapping() -> None:
    with pytest.raises(BadRequest, match="mapping"):
        from_plain([1])


def test_samples_of_very_unequal_times_tell_their_terms_apart() -> None:
    """From 0.3 ms to some hours; nothing is fixed."""
    time, lengths = PrefillTime(0.0, 2.7e-5, 4.4e-10), (10, 100, 1_000, 5_000, 20_000, 100_000, 500_000)
    samples = [sample([n] * b, time(b * n, b * n * n)) for n in lengths for b in (1, 8, 64)]
    found = fitted(samples)
    assert found.alpha < 1e-9 and found[1:] == pytest.approx(time[1:], rel=1e-3)
