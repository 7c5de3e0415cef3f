"""One pool: a request lives on the node that serves it and on whoever lends it blocks.

A lender keeps back what its cap says, and one block for each request it runs, so that these can go on. It keeps nothing
back for its queue: two nodes that wait for each other's room would wait for ever. Of those who could lend, nodes of the
same place come first, where asking costs least, then who does already, so that a request lies on few nodes, and host
memory last. So a request that no node can hold alone goes to the place with most room.
"""

from __future__ import annotations

from collections.abc import Collection

from infinillm.core.cost import Costs
from infinillm.core.policy.circles import cancel
from infinillm.core.policy.orders import (
    MoveBlocks,
    Offers,
    blocks_for,
    by_rank,
    counted,
    in_roomiest_place,
    nobody,
    roomiest,
    serving,
    too_long,
)
from infinillm.core.policy.tiers import fetch
from infinillm.core.types import Ledger, Node, NodeId, Refused

NAME = "pooled"
SHARES = True
SAVES = False


def route(
    ledger: Ledger, prompt_tokens: int, longest_tokens: int, block_size: int, exclude: Collection[NodeId]
) -> NodeId | Refused:
    nodes = serving(ledger)
    need = blocks_for(longest_tokens, block_size)
    lendable = _lendable(ledger)
    able = [node for node in nodes if _reach(node, lendable) >= need]
    if able and need > max(node.blocks for node in able):
        able = in_roomiest_place(ledger, able, exclude)
    found = roomiest(able, exclude)
    if found is not None:
        return found
    offered = max((_reach(node, lendable) for node in nodes), default=0)
    if not nodes or offered >= need:
        return nobody(exclude)
    count = sum(not node.draining for node in ledger.nodes.values())
    return too_long("the pool", longest_tokens, block_size, offered, counted(count, "worker"))


def reach(ledger: Ledger, node: NodeId, block_size: int) -> int:
    return _reach(ledger.nodes[node], _lendable(ledger)) * block_size


def capacity(ledger: Ledger, block_size: int) -> int:
    lendable = _lendable(ledger)
    return max((_reach(node, lendable) for node in serving(ledger)), default=0) * block_size


def creditors(
    ledger: Ledger, node: NodeId, blocks: int, exclude: Collection[NodeId], outgrown: bool
) -> Offers | Refused:
    """As many as it takes to cover `blocks` twice: the ledger is half a second old, and some may refuse."""
    ranked = by_rank(ledger, node, exclude)
    if not ranked:
        others = [n for n in ledger.nodes.values() if n.id != node and n.id not in exclude and not n.draining]
        most = sum(n.lendable for n in others)
        return Refused(
            f"{node} needs {counted(blocks, 'more block')}; {counted(len(others), 'other worker')} "
            f"may lend {most:,} in all, and none of them is free now"
        )
    offers: Offers = []
    wanted = 2 * blocks
    for name, offered in ranked:
        if wanted <= 0:
            break
        offers.append((name, offered))
        wanted -= offered
    return offers


def plan(ledger: Ledger, costs: Costs, block_size: int) -> tuple[MoveBlocks, ...]:
    """Blocks are lent when a node wants them; unasked, they only go back where they came from."""
    return (*cancel(ledger, block_size), *fetch(ledger, costs, block_size))


def _lendable(ledger: Ledger) -> int:
    return sum(node.lendable for node in ledger.nodes.values() if not node.draining)


def _reach(node: Node, lendable: int) -> int:
    """Blocks a request could come to hold from this node: all of its own, and what the others may lend."""
    return node.blocks + lendable - (0 if node.draining else node.lendable)
