"""Quantiles from buckets, and endings summed up."""

from __future__ import annotations

import random

import pytest

from infinillm.sim.simulation import Ending
from infinillm.sim.statistics import Spread, Tally


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_right_within_one_per_cent(share: float) -> None:
    draw = random.Random(1)
    amounts = sorted(draw.lognormvariate(0, 2) for _ in range(20_000))
    spread = Spread()
    for amount in amounts:
        spread.add(amount)
    assert spread.quantile(share) == pytest.approx(amounts[max(round(share * len(amounts)) - 1, 0)], rel=0.01)
    assert spread.mean == pytest.approx(sum(amounts) / len(amounts))


def test_memory_does_not_grow_with_the_count() -> None:
    draw, spread = random.Random(2), Spread()
    for _ in range(50_000):
        spread.add(draw.uniform(1e-3, 1e3))
    assert len(spread.buckets) < 1500


def test_nothing_has_quantiles_of_zero() -> None:
    assert (Spread().quantile(0.5), Spread().mean) == (0.0, 0.0)


def test_endings_are_summed_up() -> None:
    tally = Tally()
    tally.add(Ending(asked=1.0, first=2.0, last=5.0, prompt=10, output=4, node="a"))
    tally.add(Ending(asked=1.0, first=1.0, last=1.0, prompt=99, output=0, refused="too long"))
    tally.add(Ending(asked=0.0, first=3.0, last=3.0, prompt=5, output=1, node="a"))
    assert (tally.served, tally.refused, tally.prompt, tally.output) == (2, 1, 15, 5)
    assert (tally.first.mean, tally.latency.mean) == (2.0, 3.5)
    assert tally.each.mean == 1.0, "one token has none after it"
    assert tally.per_token.mean == pytest.approx((4 / 14 + 3 / 6) / 2)
    assert tally.per_input.mean == pytest.approx((1 / 10 + 3 / 5) / 2)
