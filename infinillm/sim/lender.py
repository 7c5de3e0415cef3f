"""What a simulated node lends and wants back, and what it keeps for whoever saves up: the words of `pool.answer`."""

from __future__ import annotations

import math
from dataclasses import replace

from infinillm.core.blocks import Blocks
from infinillm.core.pace import REST_SECONDS
from infinillm.core.policy.saving import KEPT_SECONDS
from infinillm.core.recall import Terms, wanted_from
from infinillm.core.types import Loan, LoanId, NodeId, Refused

PATIENCE_SECONDS = 15.0  # what a worker's setting usually is


class Lender:
    """One node's half of its loans. `start`: the number of its start, a part of every loan's name."""

    def __init__(self, blocks: Blocks, start: int):
        self.blocks, self.start = blocks, start
        self.rests_until = 0.0  # nothing is lent before that
        self.recalls: dict[LoanId, tuple[int, float]] = {}  # to how many blocks a loan must shrink, and until when
        self._kept, self.kept_until = 0, 0.0
        self._held: dict[LoanId, float] = {}  # until when nothing of a loan is wanted back
        self._loans = 0

    def kept_back(self, now: float) -> int:
        """Blocks that are for somebody who saves up."""
        return self._kept if now < self.kept_until else 0

    def lend(self, borrower: NodeId, blocks: int, terms: Terms, now: float) -> int | None:
        """How many of so many blocks are lent, all or none; to save up, as many as there are. None: refused."""
        least = int(terms.save)
        loan = self.blocks.loans.get(borrower)
        if (loan is not None and loan.id in self.recalls) or (blocks and now < self.rests_until):
            return None
        lent: int | None = min(blocks, max(self.blocks.offer, least or blocks))
        assert lent is not None
        self._loans += 1
        name = f"{self.blocks.node}.{self.start}>{borrower}#{self._loans}"
        result = self.blocks.lend(borrower, lent, math.inf, name)
        if isinstance(result, Refused):
            lent = None
        elif terms.hold > 0:
            self._held[result.id] = max(self._held.get(result.id, now), now + terms.hold)
        if least:
            self._kept, self.kept_until = blocks - (lent or 0), now + KEPT_SECONDS
        return lent

    def recall(self, blocks: int, now: float) -> list[tuple[NodeId, int]]:
        """Want so many blocks back, and keep them; from whom, and how many."""
        self._kept = 0
        self._held = {loan.id: self._held.get(loan.id, now) for loan in self.blocks.loans.values()}
        free = [loan for loan in self.blocks.loans.values() if self._held[loan.id] <= now]
        found = wanted_from(free, blocks, self.recalls)
        for loan, asked in found:
            self.recalls[loan.id] = (loan.blocks - asked, now + PATIENCE_SECONDS)
            self.rests_until = now + REST_SECONDS
        return [(loan.borrower, asked) for loan, asked in found]

    def wanted(self, loan: Loan) -> int:
        """How many blocks of this loan were recalled and have not come yet."""
        least, _ = self.recalls.get(loan.id, (loan.blocks, 0.0))
        return max(loan.blocks - least, 0)

    def late(self, now: float) -> list[NodeId]:
        """Who has not given back in time; what has come is wanted no more."""
        if not self.recalls:
            return []
        owing = {loan.id: loan for loan in self.blocks.loans.values() if self.wanted(loan)}
        self.recalls = {name: recall for name, recall in self.recalls.items() if name in owing}
        return [owing[name].borrower for name, (_, until) in self.recalls.items() if until <= now]

    def told(self) -> tuple[Loan, ...]:
        """The loans as the ledger hears of them."""
        loans = self.blocks.loans.values()
        return tuple(replace(loan, recalled=self.wanted(loan)) if self.recalls else loan for loan in loans)
