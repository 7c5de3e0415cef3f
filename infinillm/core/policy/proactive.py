"""The pool made room in ahead of time: blocks of long requests move to nodes with room, where that serves more in all.

Theory of operation. Tokens per second of a node are its batch over the seconds of its step. A node whose queue does
not fit (a debtor) would have a larger batch with more room; moving blocks of its longest request to a node with room to
spare (a creditor) makes some, and costs the creditor time, because it reads them in every step. `make_room` goes
through the debtors, smallest batch first; for each it takes the creditor with most room (host memory last) and the
number of blocks with the best joint gain, and again, until there is no gain: first among those of its place, then among
all. What a way to another place costs is in the gain, so over a slow one little goes. All else is as in policy pooled,
but for what is lent on demand.

A request that fits its home stays there, and waits or gives way there: each step with blocks on a node that computes
itself would wait for that node. It borrows only from nodes that serve nothing now. One that no home can hold alone (an
outgrown one) may take from all, but would starve where small requests take each block that comes free. So its home
saves up: it keeps what it was lent until that is enough, and only outgrown requests use it. Two homes that hold half
each would wait for ever: one saves at a time (`Turn`). And outgrown requests gather. Where there is no room for one
now, it is sent to a home of others like it, and takes over the blocks that these leave.

A debtor here is never a creditor, and neither is a node that borrows: nothing cascades. A creditor's cap, and the room
its running requests need, are its own. What is ordered is a wish: a home that cannot (the request is over, the target
is full) does nothing, and the next plan starts from the ledger as it is then. A home that has not used up what was lent
to it is left alone: blocks are still on their way there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from heapq import heapify, heappop, heappush

from infinillm.core.cost import Cost, Costs
from infinillm.core.policy import pooled
from infinillm.core.policy.orders import (
    MoveBlocks,
    Offers,
    blocks_for,
    counted,
    full_blocks,
    offer,
    serving,
)
from infinillm.core.policy.pooled import capacity, reach
from infinillm.core.policy.site import Site, lending_rates, site_of
from infinillm.core.types import HOST, Ledger, Node, NodeId, Refused, SeqId

__all__ = ["NAME", "capacity", "creditors", "make_room", "plan", "reach", "route", "throughput"]

NAME = "proactive"
SHARES = True
SAVES = True
MOST_TRIED = 4  # full nodes, in the hope that they are not full any more
MOST_BEHIND = 4  # requests that wait where one more is sent to gather
LEAST_GAIN = 0.01  # of both nodes' tokens per second: what is less is not worth the wire
TRIED = 16  # block counts tried at once, between the fewest and the most
MOST_ORDERS = 32  # of one plan: the next looks again, so a plan takes no longer in a large cluster
ALL = None  # places


class _Lenders:
    """Who can still lend how many blocks, the roomiest first and host memory last: of each place, and of `ALL`."""

    def __init__(self, offers: Iterable[tuple[Node, int]]):
        self.left: dict[NodeId, int] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.heaps: dict[str | None, list[tuple[bool, int, NodeId]]] = {ALL: []}
        for node, blocks in offers:
            self.nodes[node.id], self.left[node.id] = node, blocks
            for place in (node.place, ALL):
                self.heaps.setdefault(place, []).append((node.tier == HOST, -blocks, node.id))
        for heap in self.heaps.values():
            heapify(heap)

    def roomiest(self, place: str | None) -> NodeId | None:
        heap = self.heaps.get(place, [])
        while heap and self.left[heap[0][2]] != -heap[0][1]:  # what was taken since
            heappop(heap)
        return heap[0][2] if heap else None

    def take(self, name: NodeId, blocks: int) -> None:
        self.left[name] -= blocks
        if left := self.left[name]:
            node = self.nodes[name]
            for place in (node.place, ALL):
                heappush(self.heaps[place], (node.tier == HOST, -left, name))


def route(
    ledger: Ledger, prompt_tokens: int, longest_tokens: int, block_size: int, exclude: Collection[NodeId]
) -> NodeId | Refused:
    """As in policy pooled; but an outgrown request for which there is no room now goes where others like it are."""
    found = pooled.route(ledger, prompt_tokens, longest_tokens, block_size, exclude)
    need = blocks_for(longest_tokens, block_size)
    if isinstance(found, Refused) or ledger.nodes[found].blocks >= need:
        return found
    if sum(node.free - node.wanted for node in ledger.nodes.values() if not node.draining) >= need:
        return found
    homes = sorted(
        (node.waiting, -node.borrowed, node.id)
        for node in serving(ledger)
        if (node.borrowed or node.wanted > node.blocks) and node.waiting < MOST_BEHIND and node.id not in exclude
        if reach(ledger, node.id, block_size) >= longest_tokens
    )
    return homes[0][2] if homes else found


def creditors(
    ledger: Ledger, node: NodeId, blocks: int, exclude: Collection[NodeId], outgrown: bool
) -> Offers | Refused:
    """As in policy pooled; for requests that fit their home, only nodes that serve nothing now.

    For an outgrown one also some that were full when they last told: blocks come free all the time.
    """
    others = [n for n in ledger.nodes.values() if n.id != node and n.id not in exclude and not n.draining]
    busy = () if outgrown else (n.id for n in others if n.running or n.waiting)
    found = pooled.creditors(ledger, node, blocks, {*exclude, *busy}, outgrown)
    named = dict(() if isinstance(found, Refused) else found)
    full = sorted((n.lent - n.lendable, n.id) for n in others if n.id not in named and n.lendable > n.lent)
    more = [(name, -negative) for negative, name in full[:MOST_TRIED]] if outgrown else []
    return [*named.items(), *more] or found


def plan(ledger: Ledger, costs: Costs, block_size: int) -> tuple[MoveBlocks, ...]:
    """What goes back where it came from, and what makes room."""
    return (*pooled.plan(ledger, costs, block_size), *make_room(ledger, costs, block_size))


def make_room(ledger: Ledger, costs: Costs, block_size: int) -> tuple[MoveBlocks, ...]:
    short = [node for node in ledger.nodes.values() if _short(node) and costs.of(node.id) is not None]
    if not short:
        return ()
    waiting = {loan.borrower for loan in ledger.loans.values() if loan.used < loan.blocks}
    debtors = sorted((node.running, node.id) for node in short if node.id not in waiting)
    lenders = _Lenders(
        (node, blocks)
        for node in ledger.nodes.values()
        if not (node.borrowed or node.draining or _short(node))
        and (blocks := offer(node)) > 0
        and costs.of(node.id) is not None
    )
    sites: dict[NodeId, Site] = {}
    orders: list[MoveBlocks] = []
    for _, home in debtors:
        if len(orders) >= MOST_ORDERS or lenders.roomiest(ALL) is None:
            break
        node = ledger.nodes[home]
        site = site_of(ledger, node, costs, block_size)
        movable = _movable(ledger, home, block_size)
        no: NodeId | None = None  # whom it does not pay to ask
        for place in (node.place, ALL):
            while movable and (target := lenders.roomiest(place)) not in (None, no):
                assert target is not None
                blocks, seq = max(movable)
                other = sites.get(target) or site_of(ledger, ledger.nodes[target], costs, block_size)
                way = costs.between(node, ledger.nodes[target])
                assert way is not None
                moved = _best(site, other, way, seq, target, min(lenders.left[target], blocks), block_size)
                if moved is None:
                    no = target
                    break
                count, after, host, gain = moved
                why = f"room for {counted(after.coming - site.coming, 'waiting request')}, {gain:+.1f} tokens/s"
                orders.append(MoveBlocks(home, seq, home, target, count, why))
                site, sites[target] = after, host
                movable.remove((blocks, seq))
                if blocks > count:
                    movable.append((blocks - count, seq))
                lenders.take(target, count)
    return tuple(orders)


def throughput(ledger: Ledger, costs: Costs, block_size: int) -> float:
    """Tokens per second of all nodes, as the model sees them; a node without a cost counts for nothing."""
    known = (node for node in ledger.nodes.values() if costs.of(node.id) is not None)
    return sum(site_of(ledger, node, costs, block_size).rate(block_size) for node in known)


def _short(node: Node) -> bool:
    """Its queue asks for more than there is room."""
    return node.serves and not node.draining and node.running > 0 and node.waiting > 0 and node.wanted > node.free


def _movable(ledger: Ledger, home: NodeId, block_size: int) -> list[tuple[int, SeqId]]:
    """Full blocks of each sequence that lie at its home; the one it writes into stays."""
    found = ((full_blocks(layout, home, block_size), seq) for seq, layout in ledger.layouts.get(home, {}).items())
    return [(blocks, seq) for blocks, seq in found if blocks > 0]


def _moved(site: Site, host: Site, way: Cost, seq: SeqId, target: NodeId, blocks: int, size: int) -> tuple[Site, Site]:
    """Both nodes after so many blocks of a sequence have moved."""
    _, seqs, tokens = site.away.get(target, (way, frozenset(), 0))
    away = {**site.away, target: (way, seqs | {seq}, tokens + blocks * size)}
    after = replace(site, free=site.free + blocks, held=site.held - blocks, away=away)
    return after, host.lending(blocks)


def _best(
    site: Site, host: Site, way: Cost, seq: SeqId, target: NodeId, most: int, block_size: int
) -> tuple[int, Site, Site, float] | None:
    """How many of at most so many blocks gain most, both nodes after that, and the gain; None where none does.

    Between two counts that each let one more request in, fewer is better; so only those are tried.
    """
    coming, each = site.coming, site.each
    requests = min(site.waiting - coming, (site.free + most) // each - coming)
    if requests < 1:
        return None
    there = lending_rates(host, block_size)
    before = site.rate(block_size) + there(0)
    others = [cost.answer(len(seqs), tokens) for node, (cost, seqs, tokens) in site.away.items() if node != target]
    _, seqs, tokens = site.away.get(target, (way, frozenset[SeqId](), 0))
    asked = len(seqs | {seq})
    hosted, local = site.cost.attend(site.lent * block_size), (site.held + site.free) * block_size

    def gain(more: int) -> float:
        """As `_moved` and `rate` have it: who comes fills just what goes, so the tokens read at home stay the same."""
        blocks, rows = (coming + more) * each - site.free, site.running + coming + more
        answers = [*others, way.answer(asked, tokens + blocks * block_size)]
        here = rows / (site.cost.decode_step(rows, local, answers) + hosted)
        return here + there(blocks) - before

    gained, more = _peak(gain, requests)
    if gained <= LEAST_GAIN * before:
        return None
    blocks = (coming + more) * each - site.free
    return blocks, *_moved(site, host, way, seq, target, blocks, block_size), gained


def _peak(gain: Callable[[int], float], most: int) -> tuple[float, int]:
    """The largest gain and where in [1, most] it is: tried widely, then closely around the best."""
    low, high = 1, most
    while True:
        stride = -(-(high - low + 1) // TRIED)
        gained, negative = max((gain(more), -more) for more in {*range(low, high + 1, stride), high})
        if stride == 1:
            return gained, -negative
        low, high = max(-negative - stride + 1, low), min(-negative + stride - 1, high)
