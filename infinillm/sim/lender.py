"""What a simulated node lends and wants back, and what it keeps for whoever saves up: the words of `pool.answer`."""

from __future__ import annotations

import math
from dataclasses import replace

from infinillm.core.blocks import Blocks
from infinillm.core.claims import Claims
from infinillm.core.policy.saving import KEPT_SECONDS
from infinillm.core.recall import Terms
from infinillm.core.types import Loan, NodeId

PATIENCE_SECONDS = 15.0  # what a worker's setting usually is


class Lender:
    """One node's half of its loans. `start`: the number of its start, a part of every loan's name."""

    def __init__(self, blocks: Blocks, start: int):
        self.blocks, self.start = blocks, start
        self.claims = Claims()
        self._kept, self.kept_until = 0, 0.0
        self._loans = 0

    def kept_back(self, now: float) -> int:
        """Blocks that are for somebody who saves up."""
        return self._kept if now < self.kept_until else 0

    def offer(self, borrower: NodeId, blocks: int, terms: Terms, now: float) -> int | None:
        """How many of so many blocks it would lend, all or none; to save up, as many as there are. None: refused."""
        loan, there = self.blocks.loans.get(borrower), self.blocks.offer
        if borrower == self.blocks.node or self.claims.refusal(loan, blocks, now):
            return None
        offered = min(blocks, max(there, 1)) if terms.save else blocks
        found = offered if offered <= there else None
        if found is not None and loan is not None:
            self.claims = self.claims.lent(loan.id, terms.hold, now)
        if terms.save:
            self._kept, self.kept_until = blocks - (found or 0), now + KEPT_SECONDS
        return found

    def lend(self, borrower: NodeId, blocks: int, terms: Terms, now: float) -> None:
        """Lend what was offered just now."""
        self._loans += 1
        name = f"{self.blocks.node}.{self.start}>{borrower}#{self._loans}"
        loan = self.blocks.lend(borrower, blocks, math.inf, name)
        assert isinstance(loan, Loan), loan
        self.claims = self.claims.lent(loan.id, terms.hold, now)

    def recall(self, blocks: int, now: float) -> list[tuple[NodeId, int]]:
        """Want so many blocks back, and keep them; from whom, and how many."""
        self._kept = 0
        if not self.blocks.loans:
            return []
        self.claims, found = self.claims.recall(self.blocks.loans.values(), blocks, now, PATIENCE_SECONDS)
        return [(loan.borrower, asked) for loan, asked in found]

    def late(self, now: float) -> list[NodeId]:
        """Who has not given back in time; what has come is wanted no more."""
        if not self.claims.recalls and not self.claims.held:
            return []
        self.claims = self.claims.after(self.blocks.loans.values())
        return [loan.borrower for loan in self.claims.late(self.blocks.loans.values(), now)]

    def told(self) -> tuple[Loan, ...]:
        """The loans as the ledger hears of them."""
        loans = self.blocks.loans.values()
        claims = self.claims
        return tuple(replace(loan, recalled=claims.wanted(loan)) if claims.recalls else loan for loan in loans)
