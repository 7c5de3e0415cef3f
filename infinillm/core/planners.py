"""Planners of whole iterations, bound into one value each: who prefills and who decodes, on which instances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from infinillm.core import auto, disaggregated
from infinillm.core.elastic import filling
from infinillm.core.elastic import plan as elastic
from infinillm.core.elastic.times import Times
from infinillm.core.elastic.values import Instance, Plan, State
from infinillm.core.types import NodeId

CELL = 32  # instances


@dataclass(frozen=True, slots=True)
class Planner:
    """
    plan      what every instance does next; it is told of those that are not in a prefill
    steps     of decode, after which it is asked anew while requests wait
    longest   tokens of the longest request, prompt and output, that all these instances can serve
    cell      instances of a large cluster that it plans at once, so that it decides within some 10 ms
    """

    name: str
    plan: Callable[[State, Times], Plan]
    steps: int
    longest: Callable[[Sequence[Instance], Times], int]
    cell: int


ELASTIC = Planner("elastic", elastic.plan, elastic.STEPS, elastic.longest, CELL)
AUTO = Planner("auto", auto.plan, filling.STEPS, elastic.longest, CELL // 4)


def disaggregating(prefilling: Iterable[NodeId]) -> Planner:
    """Prefill on these instances, and decode on all others."""
    names = frozenset(prefilling)
    return Planner(
        "disaggregated", partial(disaggregated.plan, names), elastic.STEPS, partial(disaggregated.longest, names), CELL
    )
