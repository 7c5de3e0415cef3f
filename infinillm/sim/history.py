"""Memory, queues and loans of a run over time, in bounded memory however long it is and however many nodes it has.

Theory of operation. `look` is for `Simulation.watch`: it takes what the ledger says at one moment. Looks are summed up
in columns, one look each to begin with; where there are too many columns, neighbours become one, and from then on
each column takes twice as many looks. Nodes side by side share a row where there are more of them than rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from infinillm.core.types import Ledger, NodeId

ROWS = 48
COLUMNS = 240  # at least half as many, once there were so many looks


@dataclass(slots=True)
class Column:
    """Sums over some looks; blocks of each row."""

    looks: int
    own: list[int]  # in use by requests of these nodes
    lent: list[int]  # in use by requests of others
    running: int
    waiting: int

    def join(self, other: Column) -> Column:
        return Column(
            self.looks + other.looks,
            [a + b for a, b in zip(self.own, other.own, strict=True)],
            [a + b for a, b in zip(self.lent, other.lent, strict=True)],
            self.running + other.running,
            self.waiting + other.waiting,
        )


class History:
    """See the theory of operation above. `every`: seconds between two looks."""

    def __init__(self, every: float):
        self.every = every
        self.names: list[str] = []  # of the rows
        self.blocks: list[int] = []  # that each row has
        self.columns: list[Column] = []
        self.looks = 0
        self.loans: dict[tuple[int, int], int] = {}  # (row that lends, row that borrows): blocks, over all looks
        self._each = 1  # looks of a column
        self._row: dict[NodeId, int] = {}

    def look(self, now: float, ledger: Ledger) -> None:
        if not self._row:
            self._lay_out(ledger)
        rows = len(self.names)
        one = Column(1, [0] * rows, [0] * rows, 0, 0)
        for node in ledger.nodes.values():
            one.own[self._row[node.id]] += node.used
            one.running += node.running
            one.waiting += node.waiting
        for loan in ledger.loans.values():
            lender, borrower = self._row[loan.lender], self._row[loan.borrower]
            one.lent[lender] += loan.used
            if loan.blocks:
                self.loans[lender, borrower] = self.loans.get((lender, borrower), 0) + loan.blocks
        self.looks += 1
        if self.columns and self.columns[-1].looks < self._each:
            self.columns[-1] = self.columns[-1].join(one)
            return
        if len(self.columns) == COLUMNS:
            self.columns = [a.join(b) for a, b in list(pairwise(self.columns))[::2]]
            self._each *= 2
        self.columns.append(one)

    def _lay_out(self, ledger: Ledger) -> None:
        nodes = sorted(ledger.nodes)
        each = -(-len(nodes) // ROWS)
        for row, first in enumerate(range(0, len(nodes), each)):
            those = nodes[first : first + each]
            self.names.append(those[0] if len(those) == 1 else f"{those[0]} to {those[-1]}")
            self.blocks.append(sum(ledger.nodes[node].blocks for node in those))
            self._row |= dict.fromkeys(those, row)

    # --- what was seen ---------------------------------------------------------------------------------------------

    @property
    def times(self) -> list[float]:
        """When each column begins, in seconds."""
        found, looks = [], 0
        for column in self.columns:
            found.append(looks * self.every)
            looks += column.looks
        return found

    def memory(self, *, lent: bool) -> list[list[float]]:
        """For each row, column by column, the share of its blocks that was in use; with `lent`, by others."""
        return [
            [
                ((0 if lent else column.own[row]) + column.lent[row]) / max(column.looks * self.blocks[row], 1)
                for column in self.columns
            ]
            for row in range(len(self.names))
        ]

    def lending(self) -> list[list[float]]:
        """Blocks that each row (first) lent each other (second), on average."""
        rows: Sequence[int] = range(len(self.names))
        return [[self.loans.get((lender, borrower), 0) / max(self.looks, 1) for borrower in rows] for lender in rows]

    def queue(self) -> list[float]:
        """Requests that waited, column by column."""
        return [column.waiting / column.looks for column in self.columns]
