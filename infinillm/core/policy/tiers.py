"""Blocks in host memory come back to devices, as room appears there and where the model says that it pays.

Theory of operation. Host memory is lent last, so a request's blocks lie there because no device had room. `fetch` looks
for room now: at the home of the request beyond what its queue and its running requests need; then on a device creditor,
to which other blocks of the request go from home, so that no block travels twice. What a step takes before and
after follows from the measured costs of the nodes it reads on; a move pays where the seconds it saves in `STEPS` steps
(what a request has left, nobody knows) are more than those of moving. Reading on two nodes at once may be quicker than
on one: then blocks stay. Where nobody measured, devices are taken to be quicker.
"""

from __future__ import annotations

from infinillm.core.cost import Costs
from infinillm.core.policy.orders import MoveBlocks, full_blocks, offer
from infinillm.core.types import DEVICE, HOST, Layout, Ledger, NodeId, SeqId

STEPS = 64
GROWTH = 16  # blocks that a request finds at home for what it writes next: else the host would get that, too


def fetch(ledger: Ledger, costs: Costs, block_size: int) -> tuple[MoveBlocks, ...]:
    """What should move for the sake of blocks that lie in host memory."""
    nodes = ledger.nodes
    spilled = sorted(
        (loan.borrower, loan.lender)
        for loan in ledger.loans.values()
        if loan.used and nodes[loan.lender].tier == HOST and loan.borrower in nodes
    )
    room: dict[NodeId, int] = {}
    if spilled:
        short = {loan.borrower for loan in ledger.loans.values() if loan.used}
        idle = (n for n in nodes.values() if n.tier == DEVICE and not (n.id in short or n.draining or n.waiting))
        room = {node.id: blocks for node in idle if (blocks := offer(node)) > 0}
    unused = {x.borrower for x in ledger.loans.values() if x.used < x.blocks and nodes[x.lender].tier == DEVICE}
    orders: list[MoveBlocks] = []
    for name, host in spilled:
        home = nodes[name]
        if home.draining:
            continue
        spare = home.free - home.running - home.wanted
        for there, seq, layout in _longest_first(ledger, name, host, block_size):
            wanted = min(max(spare, 0), there)
            back = _most(ledger, costs, name, seq, host, name, wanted, block_size)
            if (
                back == wanted < there and room and not home.waiting and name not in unused
            ):  # else some are on their way
                target = max(room, key=lambda node: (room[node], node))
                most = min(room[target], full_blocks(layout, name, block_size))
                more = _most(ledger, costs, name, seq, host, target, min(most, there - back), block_size)
                if more:
                    away = min(most, more + GROWTH) if more == there - back else more
                    orders.append(MoveBlocks(name, seq, name, target, away, f"room for what comes back from {host}"))
                    del room[target]
                    back += more
            if back:
                orders.append(MoveBlocks(name, seq, host, name, back, f"back from {host}"))
                spare -= back
    return tuple(orders)


def _longest_first(ledger: Ledger, home: NodeId, host: NodeId, block_size: int) -> list[tuple[int, SeqId, Layout]]:
    """The sequences with full blocks there, and how many."""
    layouts = ledger.layouts.get(home, {}).items()
    found = [(blocks, seq, each) for seq, each in layouts if (blocks := full_blocks(each, host, block_size)) > 0]
    return sorted(found, reverse=True)


def _most(
    ledger: Ledger, costs: Costs, home: NodeId, seq: SeqId, host: NodeId, target: NodeId, blocks: int, size: int
) -> int:
    """How many of so many blocks of a sequence pay for their way from the host to the target: all, half, and so on."""
    cost, there, at = costs.of(home), costs.of(host), costs.of(target)
    if cost is None or there is None or at is None:
        return blocks
    before = _attending(ledger, costs, home, seq, host, target, 0)
    hops = 1 if target == home else 2
    while blocks > 0:
        tokens = blocks * size
        saved = before - _attending(ledger, costs, home, seq, host, target, tokens)
        if target != home and ledger.nodes[target].running:
            saved -= at.attend(tokens)
        if saved * STEPS > hops * cost.move(tokens):
            return blocks
        blocks //= 2
    return 0


def _attending(
    ledger: Ledger, costs: Costs, home: NodeId, seq: SeqId, host: NodeId, target: NodeId, tokens: int
) -> float:
    """Seconds of a step at home, once so many tokens of a sequence have gone from the host to the target."""
    held: dict[NodeId, dict[SeqId, int]] = {}
    for each, layout in ledger.layouts.get(home, {}).items():
        for span in layout:
            at = held.setdefault(span.node, {})
            at[each] = at.get(each, 0) + span.stop - span.start
    if tokens:
        held[host][seq] -= tokens
        at = held.setdefault(target, {})
        at[seq] = at.get(seq, 0) + tokens
    cost = costs.of(home)
    assert cost is not None
    there = {node: [n for n in each.values() if n] for node, each in held.items() if node != home}
    answers = [(costs.of(node) or cost).answer(len(each), sum(each)) for node, each in there.items() if each]
    return cost.decode_step(ledger.nodes[home].running, sum(held.get(home, {}).values()), answers)
