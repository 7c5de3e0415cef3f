"""What policies answer with, and the arithmetic they share."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from infinillm.core.types import HOST, Layout, Ledger, Node, NodeId, Refused, SeqId

Offers: TypeAlias = list[tuple[NodeId, int]]  # who could lend, and how many blocks, best first


@dataclass(frozen=True, slots=True)
class MoveBlocks:
    """The wish that `blocks` full blocks of a sequence move from `source` to `target`; its `home` carries it out.

    Which of them is the home's to say. Only the layout it tells afterwards makes it true.
    """

    home: NodeId
    seq: SeqId
    source: NodeId
    target: NodeId
    blocks: int
    reason: str

    @property
    def direction(self) -> str:
        """Where to, as the home of the sequence sees it."""
        return "home" if self.target == self.home else "away" if self.source == self.home else "between"


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // block_size)


def full_blocks(layout: Layout, node: NodeId, block_size: int) -> int:
    """Blocks of a sequence that lie on a node and could move: all but the one it writes into."""
    blocks = 0
    for span in layout:
        if span.node == node:
            blocks += (span.stop - span.start - (span is layout[-1])) // block_size
    return blocks


def offer(node: Node) -> int:
    """Blocks a node can lend now: within its cap, and one kept back for each request it runs."""
    return min(node.lendable - node.lent, node.free - node.running)


def by_rank(ledger: Ledger, node: NodeId, exclude: Collection[NodeId]) -> Offers:
    """Who could lend to a node, best first: devices, then its place, then who lends to it, then who owes nothing."""
    lending = {loan.lender for loan in ledger.loans.values() if loan.borrower == node}
    place = ledger.nodes[node].place if node in ledger.nodes else ""
    ranked = sorted(
        (n.tier == HOST, n.place != place, n.id not in lending, n.borrowed > 0, -blocks, n.id)
        for n in ledger.nodes.values()
        if n.id != node and n.id not in exclude and not n.draining and (blocks := offer(n)) > 0
    )
    return [(name, -negative) for *_, negative, name in ranked]


def serving(ledger: Ledger) -> list[Node]:
    """The nodes a request may be routed to."""
    return [node for node in ledger.nodes.values() if node.serves and not node.draining]


def roomiest(nodes: Iterable[Node], exclude: Collection[NodeId]) -> NodeId | None:
    """The node with the most room beyond what its queue asks for; of equals the one with fewest requests."""
    ranked = [(n.wanted - n.free, n.running + n.waiting, n.id) for n in nodes if n.id not in exclude]
    return min(ranked)[2] if ranked else None


def in_roomiest_place(ledger: Ledger, nodes: Iterable[Node], exclude: Collection[NodeId]) -> list[Node]:
    """Those of them in the place with most room beyond what its queues ask for."""
    room: dict[str, int] = {}
    for node in ledger.nodes.values():
        if not node.draining:
            room[node.place] = room.get(node.place, 0) + node.free - node.wanted
    asked = [node for node in nodes if node.id not in exclude]
    best = max((room[node.place] for node in asked), default=0)
    return [node for node in asked if room[node.place] == best]


def too_long(who: str, tokens: int, block_size: int, offered: int, where: str) -> Refused:
    """The refusal of a request that no node could serve; people read it."""
    return Refused(
        f"the request needs {blocks_for(tokens, block_size):,} blocks ({tokens:,} tokens, {block_size} per block); "
        f"{who} offers {offered:,} on {where}, so at most {offered * block_size:,} tokens"
    )


def nobody(exclude: Collection[NodeId]) -> Refused:
    """The refusal where nobody is there to ask."""
    if exclude:
        return Refused(f"no worker is ready to serve besides {', '.join(sorted(exclude))}")
    return Refused("no worker is ready to serve")


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
