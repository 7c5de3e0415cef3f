"""No sharing: every request lives on one node. The baseline."""

from __future__ import annotations

from collections.abc import Collection

from infinillm.core.cost import Costs
from infinillm.core.policy.orders import MoveBlocks, Offers, blocks_for, counted, nobody, roomiest, serving, too_long
from infinillm.core.types import Ledger, NodeId, Refused

NAME = "isolated"
SHARES = False
SAVES = False


def route(
    ledger: Ledger, prompt_tokens: int, longest_tokens: int, block_size: int, exclude: Collection[NodeId]
) -> NodeId | Refused:
    nodes = serving(ledger)
    need = blocks_for(longest_tokens, block_size)
    found = roomiest((node for node in nodes if node.blocks >= need), exclude)
    if found is not None:
        return found
    offered = max((node.blocks for node in nodes), default=0)
    if not nodes or offered >= need:
        return nobody(exclude)
    return too_long(NAME, longest_tokens, block_size, offered, "one worker")


def reach(ledger: Ledger, node: NodeId, block_size: int) -> int:
    return ledger.nodes[node].blocks * block_size


def capacity(ledger: Ledger, block_size: int) -> int:
    return max((node.blocks for node in serving(ledger)), default=0) * block_size


def creditors(
    ledger: Ledger, node: NodeId, blocks: int, exclude: Collection[NodeId], outgrown: bool
) -> Offers | Refused:
    return Refused(f"{node} needs {counted(blocks, 'more block')}; policy {NAME} lends none")


def plan(ledger: Ledger, costs: Costs, block_size: int) -> tuple[MoveBlocks, ...]:
    return ()
