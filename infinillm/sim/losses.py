"""Losses on a schedule: which nodes die when, and which come back."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from infinillm.core.types import NodeId
from infinillm.errors import BadRequest
from infinillm.sim.cells import Cells
from infinillm.sim.groups import Groups
from infinillm.sim.simulation import Simulation

DIES, RETURNS = "dies", "returns"


class Loss(NamedTuple):
    """At a moment a node `dies`, or `returns` with nothing in it. What it does already is no news."""

    at: float  # seconds
    node: NodeId
    what: str


def schedule(world: Simulation | Groups | Cells, losses: Iterable[Loss]) -> None:
    """Have these happen. Raises BadRequest, naming the field."""
    verbs = {DIES: world.die, RETURNS: world.revive}
    for at, node, what in losses:
        if what not in verbs:
            raise BadRequest(f"a node {DIES} or {RETURNS}, and {node} {what!r}", field="what")
        if not at >= world.now:
            raise BadRequest(f"at must be seconds from {world.now:g} on, not {at!r}", field="at")
        world.known(node)
        world.clock.at(at, partial(verbs[what], node))
