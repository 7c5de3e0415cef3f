"""What a lender wants back of its loans, and when it may: one pure value, of real nodes and of simulated ones.

Theory of operation. A request that waits alone at its node, for lack of what the node lent, starves. After some time
the node recalls what it is short of, the largest loans first, and lends nothing for a while: it rests. A borrower says
with its wish for how long it is to be left alone (`recall.undisturbed`); until then nothing of the loan is recalled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from infinillm.core.pace import MOST_HELD_SECONDS, RECALL_AFTER_SECONDS, REST_SECONDS
from infinillm.core.types import Loan, LoanId, SeqId


class Starving(NamedTuple):
    """The request that waits alone at a node, and `since` when it has been refused memory."""

    seq: SeqId
    since: float

    def after(self, seq: SeqId, now: float) -> Starving:
        """Once a request has been refused: that one, and since when."""
        return self if seq == self.seq else Starving(seq, now)

    def long(self, now: float) -> bool:
        """Whether others are to give way."""
        return now - self.since >= RECALL_AFTER_SECONDS


NOBODY = Starving("", 0.0)


class Recall(NamedTuple):
    """To how many blocks a loan must shrink, and until when."""

    least: int
    until: float


@dataclass(frozen=True, slots=True)
class Claims:
    """What one lender has said of its loans.

    recalls       what is wanted back, by loan
    held          until when nothing of a loan is wanted back
    rests_until   nothing is lent before that
    """

    recalls: Mapping[LoanId, Recall] = field(default_factory=dict)
    held: Mapping[LoanId, float] = field(default_factory=dict)
    rests_until: float = 0.0

    def refusal(self, loan: Loan | None, blocks: int, now: float) -> str:
        """Why so many blocks more are not lent to the borrower of this loan, if it has one; empty: they may be."""
        if loan is not None and loan.id in self.recalls:
            return f"wants blocks back from {loan.borrower}"
        if blocks and now < self.rests_until:
            return "has just wanted blocks back for its own requests"
        return ""

    def lent(self, loan: LoanId, hold: float, now: float) -> Claims:
        """Once something was lent of which nothing is wanted back for `hold` seconds; what was said before counts."""
        if not hold > 0:
            return self
        until = now + min(hold, MOST_HELD_SECONDS)
        return replace(self, held={**self.held, loan: max(self.held.get(loan, now), until)})

    def recall(
        self, loans: Iterable[Loan], blocks: int, now: float, patience: float
    ) -> tuple[Claims, list[tuple[Loan, int]]]:
        """Want so many blocks back of these loans within `patience` seconds; from whom, and how many."""
        free = [loan for loan in loans if self.held.get(loan.id, now) <= now]
        if not (found := wanted_from(free, blocks, self.recalls)):
            return self, found
        new = {loan.id: Recall(loan.blocks - asked, now + patience) for loan, asked in found}
        return replace(self, recalls={**self.recalls, **new}, rests_until=now + REST_SECONDS), found

    def wanted(self, loan: Loan) -> int:
        """How many blocks of this loan were recalled and have not come yet."""
        recall = self.recalls.get(loan.id)
        return max(loan.blocks - recall.least, 0) if recall is not None else 0

    def late(self, loans: Iterable[Loan], now: float) -> list[Loan]:
        """Loans of which blocks were recalled and have not come in time."""
        return [loan for loan in loans if self.wanted(loan) and self.recalls[loan.id].until <= now]

    def after(self, loans: Collection[Loan]) -> Claims:
        """Once these are all loans there are: what has come back is wanted no more."""
        recalls = {loan.id: self.recalls[loan.id] for loan in loans if self.wanted(loan)}
        held = {loan.id: self.held[loan.id] for loan in loans if loan.id in self.held}
        return replace(self, recalls=recalls, held=held)


def wanted_from(loans: Iterable[Loan], blocks: int, recalled: Collection[LoanId]) -> list[tuple[Loan, int]]:
    """Of whom so many blocks are wanted back: the largest loans first. `recalled` ones give what they owe already."""
    found: list[tuple[Loan, int]] = []
    for loan in sorted(loans, key=lambda loan: -loan.blocks):
        asked = min(blocks, loan.blocks)
        blocks -= asked
        if asked > 0 and loan.id not in recalled:
            found.append((loan, asked))
    return found
