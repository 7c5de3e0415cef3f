"""Losses on a schedule: which nodes die when, and which come back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from infinillm.core.types import NodeId
from infinillm.errors import BadRequest
from infinillm.sim.simulation import Simulation

DIES, RETURNS = "dies", "returns"


class Loss(NamedTuple):
    """At a moment a node `dies`, or `returns` with nothing in it. What it does already is no news."""

    at: float  # seconds
    node: NodeId
    what: str


def schedule(simulation: Simulation, losses: Iterable[Loss]) -> None:
    """Have these happen. Raises BadRequest, naming the field."""
    verbs = {DIES: simulation.die, RETURNS: simulation.revive}
    for at, node, what in losses:
        if what not in verbs:
            raise BadRequest(f"a node {DIES} or {RETURNS}, and {node} {what!r}", field="what")
        if not at >= simulation.now:
            raise BadRequest(f"at must be seconds from {simulation.now:g} on, not {at!r}", field="at")
        simulation.known(node)
        simulation.at(at, partial(verbs[what], node))
