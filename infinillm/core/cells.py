"""Large clusters in cells: which of them a request goes to.

Theory of operation. What a planner decides takes longer the more instances there are, more than in proportion, and few
requests want more than some of them. So a large cluster is planned in cells, whole servers each, that know nothing of
each other. A request goes to the cell where the prompts that wait take least, among those that could ever hold it; of
equals, to the one with most slots free beyond what waits there. That is one look at each cell, and the rest of a
decision is as large as a cell whatever the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WHOLE = 32  # instances of a cluster that is not divided


class Load(NamedTuple):
    """What a cell has to do: the longest request it can serve, seconds of prompts that wait, slots free beyond them."""

    longest: int
    seconds: float
    free: int


def split(instances: int, of_server: int, most: int) -> tuple[range, ...]:
    """The cells of so many instances, `of_server` in each server: of at most so many, and whole servers if one fits."""
    size = instances if instances <= WHOLE else most - most % of_server or most
    return tuple(range(at, min(at + size, instances)) for at in range(0, instances, size))


def choose(tokens: int, loads: Sequence[Load]) -> int | None:
    """The cell for a request that comes to have so many tokens; None where none could hold it."""
    able = [at for at, load in enumerate(loads) if load.longest >= tokens]
    return min(able, key=lambda at: (loads[at].seconds, -loads[at].free, at), default=None)
