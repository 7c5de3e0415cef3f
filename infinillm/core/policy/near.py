"""Near what is there already: a request goes to the node that has most of its prompt, unless that is much busier."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from infinillm.core.names import MARK_EVERY
from infinillm.core.policy.orders import blocks_for
from infinillm.core.types import Ledger, Node, NodeId

SLACK = 1  # requests a node that has a prefix may be ahead of the one the policy chose


def near(
    ledger: Ledger,
    chosen: NodeId,
    holders: Sequence[tuple[NodeId, int]],
    longest_tokens: int,
    block_size: int,
    exclude: Collection[NodeId],
) -> NodeId:
    """`chosen`, or who holds most landmarks of the prompt, where it has room for the rest and is hardly busier."""
    there = dict(holders)
    need = blocks_for(longest_tokens, block_size)
    for name, count in holders:
        node = ledger.nodes.get(name)
        if node is None or not node.serves or node.draining or name in exclude:
            continue
        if count <= there.get(chosen, 0):
            return chosen
        if need - count * MARK_EVERY <= node.free and _busy(node) <= _busy(ledger.nodes[chosen]) + SLACK:
            return name
    return chosen


def _busy(node: Node) -> int:
    return node.running + node.waiting
