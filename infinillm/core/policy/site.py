"""What the cost model makes of one node: its batch, what it holds and lends, and whom it asks in every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from infinillm.core.cost import Cost, Costs
from infinillm.core.types import Ledger, Node, NodeId, SeqId


@dataclass(frozen=True, slots=True)
class Site:
    """One node, in blocks; `away`: (cost by the way there, which sequences, tokens) on each other node."""

    cost: Cost
    running: int
    waiting: int
    each: int  # a waiting request's blocks, on average
    free: int
    held: int  # by its own sequences
    lent: int
    away: dict[NodeId, tuple[Cost, frozenset[SeqId], int]]

    @property
    def coming(self) -> int:
        """Waiting requests for which there is room."""
        return min(self.waiting, self.free // self.each)

    def lending(self, blocks: int) -> Site:
        """Once it has lent so many more."""
        return replace(self, free=self.free - blocks, lent=self.lent + blocks)

    def rate(self, block_size: int) -> float:
        """Tokens per second, once those who come are in the batch."""
        return lending_rates(self, block_size)(0)


def lending_rates(site: Site, block_size: int) -> Callable[[int], float]:
    """Tokens per second of a node by how many blocks more it lends: `site.lending(blocks).rate`, for many counts."""
    answers = [cost.answer(len(seqs), tokens) for cost, seqs, tokens in site.away.values()]
    steps: dict[int, float] = {}  # seconds of its own work, by how many come

    def rate(blocks: int) -> float:
        coming = min(site.waiting, (site.free - blocks) // site.each)
        if not (rows := site.running + coming):
            return 0.0
        if coming not in steps:
            steps[coming] = site.cost.decode_step(rows, (site.held + coming * site.each) * block_size, answers)
        return rows / (steps[coming] + site.cost.attend((site.lent + blocks) * block_size))

    return rate


def site_of(ledger: Ledger, node: Node, costs: Costs, block_size: int) -> Site:
    cost = costs.of(node.id)
    assert cost is not None
    away: dict[NodeId, tuple[Cost, frozenset[SeqId], int]] = {}
    if node.borrowed:
        for seq, layout in ledger.layouts.get(node.id, {}).items():
            for span in layout:
                if span.node != node.id:
                    way, seqs, tokens = away.get(span.node) or (_way(ledger, node, span.node, costs), frozenset(), 0)
                    away[span.node] = (way or cost, seqs | {seq}, tokens + span.stop - span.start)
    each = max(-(-node.wanted // node.waiting), 1) if node.waiting else 1
    return Site(cost, node.running, node.waiting, each, node.free, node.used, node.lent, away)


def _way(ledger: Ledger, node: Node, lender: NodeId, costs: Costs) -> Cost | None:
    there = ledger.nodes.get(lender)
    return costs.of(lender) if there is None else costs.between(node, there)
