"""What groups take, against published times, and the planner's times fitted to that."""

from __future__ import annotations

import pytest

from infinillm.core.cost import Curve
from infinillm.sim import striping
from infinillm.sim.hardware import cluster, read_size
from infinillm.sim.striping import Share
from tests.core.elastic_cluster import A800, MEASURED
from tests.core.test_cost import LLAMA_H100

SIZE = read_size("LWM-7B", 16, "float16")
CLUSTER = cluster("1x8xA800@loongserve:tp2", SIZE)
COST = CLUSTER.sites[0].near


def test_four_instances_prefill_as_published() -> None:
    """Nothing of a group is fitted: the costs are those of one instance."""
    ratios = [
        striping.prefill(COST, [tokens] * requests, 4) / (milliseconds / 1e3)
        for requests, tokens, _, _, milliseconds, *_ in MEASURED["measured"]
    ]
    assert ratios == pytest.approx([1.0] * 6, abs=0.08)


def test_one_instance_alone_needs_no_ring() -> None:
    fixed = COST.prefill(0)
    assert striping.prefill(COST, [1000], 1) == pytest.approx(COST.computing(1000))
    assert striping.prefill(COST, [1000, 2000], 1) == pytest.approx(COST.prefill(1000) + COST.prefill(2000) - fixed)


@pytest.mark.parametrize("rows", [1, 64, 512])
def test_a_step_of_one_instance_is_a_step(rows: int) -> None:
    tokens = rows * 1000
    assert striping.step(COST, [Share(rows, rows, 0, tokens, 0)]) == pytest.approx(COST.decode_step(rows, tokens))
    later = striping.step(COST, [Share(rows, rows, 0, tokens, 0)], 10)
    assert later == pytest.approx(COST.decode_step(rows, tokens + 10 * rows))


def test_four_masters_step_as_the_calibration_says() -> None:
    """128 rows each of 512, each with K/V of a quarter: as bench/fit.py predicts SP4TP2."""
    share = Share(128, 512, 384, 128_000, 3)
    expected = COST.dense(128) + COST.attend(128_000, 512) + COST.question(384) + 3 * COST.merging(128)
    assert striping.step(COST, [share] * 4) == pytest.approx(expected)
    assert expected == pytest.approx(42.25e-3, rel=0.12)


def test_the_slowest_instance_counts() -> None:
    light, heavy = Share(1, 1, 0, 10, 0), Share(0, 1, 1, 100_000, 0)
    assert striping.step(COST, [light, heavy]) > striping.step(COST, [light])


def test_a_planner_is_told_what_groups_take() -> None:
    times = striping.times(CLUSTER)
    assert times.widest == 4
    for degree, time in enumerate(times.prefill, 1):
        for tokens in (100, 1_000, 10_000, 100_000):
            assert time(tokens, tokens**2) == pytest.approx(striping.prefill(COST, [tokens], degree), rel=0.02)
    assert times.decode(1, 64, 64_000) == pytest.approx(COST.decode_step(64, 64_000), rel=0.1)
    assert times.move == pytest.approx(COST.move(10_000) / 10_000, rel=0.05)


def test_those_times_are_near_the_ones_fitted_to_published_points() -> None:
    times = striping.times(CLUSTER)
    for degree in (1, 4):
        for tokens in (1_000, 10_000, 100_000):
            published = A800.prefill[degree - 1](tokens, tokens**2)
            assert times.prefill[degree - 1](tokens, tokens**2) == pytest.approx(published, rel=0.35)
    assert 100 < times.crowd < 200 and 1 < times.tipping < 10


def test_a_group_beyond_a_server_sends_over_the_link_between() -> None:
    two = striping.times(cluster("2x8xA800@loongserve:tp2", SIZE))
    assert two.prefill[:4] == striping.times(CLUSTER).prefill
    assert two.prefill[4].alpha > two.prefill[3].alpha and two.move > striping.times(CLUSTER).move


def test_the_elbow_is_where_more_begins_to_cost_more() -> None:
    assert striping.elbow(Curve(((0.0, 1.0), (8.0, 1.1), (16.0, 2.0)))) == 8
    assert striping.elbow(LLAMA_H100.dense) == LLAMA_H100.dense.points[1][0]
