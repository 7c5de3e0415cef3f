"""No sharing: every request lives on one node. The baseline.

`route` goes by memory. `in_turn` goes by the number of requests, as a balancer does that knows nothing of memory: for
comparisons with systems that have one of these in front.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from infinillm.core.cost import Costs
from infinillm.core.policy.orders import MoveBlocks, Offers, blocks_for, counted, nobody, roomiest, serving, too_long
from infinillm.core.types import Ledger, Node, NodeId, Refused

NAME = "isolated"
SHARES = False
SAVES = False


def route(
    ledger: Ledger, prompt_tokens: int, longest_tokens: int, block_size: int, exclude: Collection[NodeId]
) -> NodeId | Refused:
    return _routed(roomiest, ledger, longest_tokens, block_size, exclude)


def in_turn(
    ledger: Ledger, prompt_tokens: int, longest_tokens: int, block_size: int, exclude: Collection[NodeId]
) -> NodeId | Refused:
    return _routed(_fewest, ledger, longest_tokens, block_size, exclude)


def _routed(
    choose: Callable[[Iterable[Node], Collection[NodeId]], NodeId | None],
    ledger: Ledger,
    longest_tokens: int,
    block_size: int,
    exclude: Collection[NodeId],
) -> NodeId | Refused:
    nodes = serving(ledger)
    need = blocks_for(longest_tokens, block_size)
    found = choose((node for node in nodes if node.blocks >= need), exclude)
    if found is not None:
        return found
    offered = max((node.blocks for node in nodes), default=0)
    if not nodes or offered >= need:
        return nobody(exclude)
    return too_long(f"policy {NAME}", longest_tokens, block_size, offered, "one worker")


def _fewest(nodes: Iterable[Node], exclude: Collection[NodeId]) -> NodeId | None:
    return min(((n.running + n.waiting, n.id) for n in nodes if n.id not in exclude), default=(0, None))[1]


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
