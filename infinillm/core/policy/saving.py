"""One node at a time saves up blocks for a request that outgrows it: whose turn it is, and what that means for others.

Theory of operation. Such a request would wait for ever among small ones that take each block as it comes free, and two
nodes that hold half of what they need each would wait for each other. So one node has the turn while it asks. It may
keep less than it needs (policies with `saves`), and lenders keep what comes free for it. It lends nothing meanwhile.
Another node may have what is free and enough for it at once, and nothing else; no blocks are sent away to make room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from infinillm.core.policy.orders import MoveBlocks, Offers, offer
from infinillm.core.types import Ledger, NodeId, Refused

if TYPE_CHECKING:
    from infinillm.core.policy import Policy

TURN_SECONDS = 10.0  # who saves asks once a step, and steps with much to compute take seconds
KEPT_SECONDS = 1.0  # for which a lender keeps what comes free for who saves up, unless that one asks again


class Turn(NamedTuple):
    """It is `node`'s turn `until` then, by the controller's clock."""

    node: NodeId
    until: float

    def after(self, node: NodeId, now: float) -> Turn:
        """The turn once a node has asked for it: that node's where it is nobody else's."""
        return Turn(node, now + TURN_SECONDS) if node == self.node or now >= self.until else self


NOBODY = Turn("", float("-inf"))


def creditors(
    policy: Policy,
    ledger: Ledger,
    turn: Turn,
    now: float,
    node: NodeId,
    blocks: int,
    exclude: Collection[NodeId],
    outgrown: bool,
) -> tuple[Offers | Refused, Turn, bool]:
    """Who can lend to a node, the turn from now on, and whether the node may save."""
    wants = outgrown and policy.saves
    if wants:
        turn = turn.after(node, now)
    if wants and turn.node == node:
        return policy.creditors(ledger, node, blocks, exclude, True), turn, True
    saver = turn.node if now < turn.until else ""
    offers = policy.creditors(ledger, node, blocks, {*exclude, saver}, outgrown)
    if wants and not isinstance(offers, Refused):
        free = sum(offer(ledger.nodes[name]) for name, _ in offers)
        if free < blocks:
            offers = Refused(f"{node} needs {blocks:,} more blocks; what comes free is for {saver} now, which saves up")
    return offers, turn, False


def orders(found: Iterable[MoveBlocks], turn: Turn, now: float) -> tuple[MoveBlocks, ...]:
    """What of a plan is ordered: while somebody saves up, nothing leaves its home."""
    return tuple(order for order in found if now >= turn.until or order.direction != "away")
