"""Debts in a circle, found and cancelled: blocks of nodes that lend each other go home, and the loans with them.

Theory of operation. A debt is blocks of one node's requests that lie on another and could move: full ones. Where the
debts of some nodes form a circle (two that lend each other are the shortest), each of them keeps what is another's and
asks for its own in every step, for nothing. As much as the smallest debt in the circle goes home all along it: that one
is gone, so the circle is open, and every node gives up as many blocks as it takes. Nothing but the ledger is asked.

It takes room to begin with: where no node of a circle has any, the circle stays, and the next plan looks again. A home
takes what it has room for, and returns what it no longer needs, which is the room of the next.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import TypeAlias

from infinillm.core.policy.orders import MoveBlocks, full_blocks
from infinillm.core.types import Ledger, NodeId, SeqId

MOST = 64  # circles of one plan: the next looks again
Debts: TypeAlias = dict[NodeId, dict[NodeId, int]]  # who owes whom how many blocks


def debts(ledger: Ledger, block_size: int) -> Debts:
    """What could move home, of nodes that both lend and borrow: no others are in a circle."""
    found: Debts = {}
    for loan in sorted(ledger.loans.values(), key=lambda loan: loan.id):
        lender, borrower = ledger.nodes[loan.lender], ledger.nodes.get(loan.borrower)
        if loan.used and lender.borrowed and borrower is not None and borrower.lent:
            layouts = ledger.layouts.get(loan.borrower, {}).values()
            if blocks := sum(full_blocks(layout, loan.lender, block_size) for layout in layouts):
                found.setdefault(loan.borrower, {})[loan.lender] = blocks
    return found


def circle(owed: Debts, start: NodeId) -> list[NodeId]:
    """A shortest way along debts from a node back to it, both ends told; empty where there is none."""
    came: dict[NodeId, NodeId] = {}
    ahead = deque([start])
    while ahead:
        node = ahead.popleft()
        for lender in owed.get(node, {}):
            if lender == start:
                path = [start, node]
                while path[-1] != start:
                    path.append(came[path[-1]])
                return path[::-1]
            if lender not in came:
                came[lender] = node
                ahead.append(lender)
    return []


def cancel(ledger: Ledger, block_size: int) -> tuple[MoveBlocks, ...]:
    """Moves after which no circle is left, of those on which somebody has room; `MOST` circles at once."""
    owed = debts(ledger, block_size)
    home: dict[tuple[NodeId, NodeId], int] = {}
    left = MOST
    for node in [name for name in owed if ledger.nodes[name].free > 0]:
        while left and (around := circle(owed, node)):
            left -= 1
            least = min(owed[borrower][lender] for borrower, lender in pairwise(around))
            for borrower, lender in pairwise(around):
                home[borrower, lender] = home.get((borrower, lender), 0) + least
                owed[borrower][lender] -= least
                if not owed[borrower][lender]:
                    del owed[borrower][lender]
    orders: list[MoveBlocks] = []
    for (borrower, lender), blocks in sorted(home.items()):
        for there, seq in _there(ledger, borrower, lender, block_size):
            if (count := min(there, blocks)) > 0:
                why = f"{borrower} and {lender} are in a circle of debts"
                orders.append(MoveBlocks(borrower, seq, lender, borrower, count, why))
                blocks -= count
    return tuple(orders)


def _there(ledger: Ledger, home: NodeId, lender: NodeId, block_size: int) -> list[tuple[int, SeqId]]:
    layouts = ledger.layouts.get(home, {})
    return [(full_blocks(layout, lender, block_size), seq) for seq, layout in sorted(layouts.items())]
