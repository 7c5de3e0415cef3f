"""What a simulated worker borrows: its accounts, its wish for more, and what it gives back; as `pool.borrow` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from infinillm.core.claims import NOBODY
from infinillm.core.pace import IDLE_LOAN_SECONDS
from infinillm.core.policy.orders import Offers
from infinillm.core.policy.saving import TURN_SECONDS
from infinillm.core.recall import Terms
from infinillm.core.scheduler import NEVER, Shortage
from infinillm.core.types import Loan, NodeId, Refused, SeqId, Step
from infinillm.sim.around import Around

if TYPE_CHECKING:
    from infinillm.sim.worker import Worker


NOTHING = Shortage(0, 0, None, 0.0)


@dataclass(slots=True)
class Account:
    """What a borrower knows of one that lends to it, beside the loan."""

    idle_since: float
    recalled: int = 0  # blocks the lender wants back
    saved: bool = False  # for sequences that outgrow home only


class Borrower:
    """All that one worker borrows."""

    def __init__(self, home: NodeId, world: Around):
        self.home, self.world = home, world
        self.accounts: dict[NodeId, Account] = {}
        self.saved_until = 0.0
        self.asking = False
        self.denied_since = NEVER
        self.ask_again = 0.0
        self.woken = 0.0  # the moment for which somebody is to wake the worker, so that it asks again
        self.refused = 0  # wishes in a row while nothing ran
        self.starving = NOBODY
        self.wished = Step(0), (0, 0), NOTHING  # after which step, with how many blocks lent and waiting ones, and what

    # --- accounts ------------------------------------------------------------------------------------------------

    def loans(self) -> list[tuple[Worker, Account, Loan]]:
        if not self.accounts:
            return []
        worker, home = self.world.worker, self.home
        found = ((worker(node), account) for node, account in self.accounts.items())
        return [(lender, account, lender.blocks.loans[home]) for lender, account in found]

    def room(self) -> dict[NodeId, int]:
        """Blocks that may be taken on each lender."""
        return {w.id: max(0, loan.blocks - loan.used - account.recalled) for w, account, loan in self.loans()}

    def owed(self) -> dict[NodeId, int]:
        """How many blocks must come free before the lenders that want some back can have them."""
        recalled = ((w, each.recalled, loan) for w, each, loan in self.loans() if each.recalled)
        owed = {w.id: wanted - (loan.blocks - loan.used) for w, wanted, loan in recalled}
        return {node: blocks for node, blocks in owed.items() if blocks > 0}

    @property
    def blocks(self) -> int:
        return sum([loan.blocks for _, _, loan in self.loans()])

    @property
    def saved(self) -> set[NodeId]:
        return {node for node, account in self.accounts.items() if account.saved}

    @property
    def recalling(self) -> list[NodeId]:
        return [node for node, account in self.accounts.items() if account.recalled]

    def touch(self, node: NodeId, when: float) -> None:
        """What lies there has changed."""
        self.accounts[node].idle_since = when
        self.world.stir(node)

    def hear(self, node: NodeId, blocks: int) -> None:
        """A lender wants blocks back."""
        account, loan = self.accounts[node], self.world.worker(node).blocks.loans[self.home]
        account.recalled = max(account.recalled, min(blocks, loan.blocks))

    def release(self, seq: SeqId) -> None:
        for node in self.accounts:
            if self.world.worker(node).blocks.release(seq, self.home):
                self.touch(node, self.world.now)

    def spare(self) -> list[tuple[Worker, int]]:
        """What no sequence has used for a while, and what lenders want back and is free; it is ours no more."""
        now = self.world.now
        found: list[tuple[Worker, int]] = []
        for lender, account, loan in self.loans():
            left, rests = loan.blocks - loan.used, True
            if now < max(account.idle_since + IDLE_LOAN_SECONDS, self.saved_until if account.saved else 0.0):
                left, rests = min(left, account.recalled), 0 < loan.blocks <= account.recalled
            if left == loan.blocks and rests and not lender.blocks.holders(self.home):
                del self.accounts[lender.id]
            elif left < 1:
                continue
            account.recalled = max(0, account.recalled - left)
            found.append((lender, left))
        return found

    @property
    def calm(self) -> bool:
        """Whether `spare` finds nothing, however long nobody touches anything: all that is borrowed is used."""
        return all(0 < loan.blocks == loan.used for _, _, loan in self.loans())

    # --- more ----------------------------------------------------------------------------------------------------

    def borrow(self, short: Shortage) -> tuple[bool, bool]:
        """Borrow from those the policy names; whether it was enough, and whether another one saves up."""
        least, wanted, beyond, hold = short
        named = self.world.creditors(self.home, wanted, self.recalling, beyond is not None)
        save = named.may_save and beyond is not None
        if save and beyond is not None:
            least, wanted, self.saved_until = 1, beyond, self.world.now + TURN_SECONDS
        if isinstance(named.offers, Refused) or wanted < 1:
            return False, named.another_saves
        return self.reserve(least, wanted, named.offers, Terms(save, hold)), named.another_saves

    def reserve(self, least: int, wanted: int, offers: Offers, terms: Terms) -> bool:
        """Borrow `least` to `wanted` blocks, as ranked, all or nothing: where it is nothing, nobody decides anew."""
        got: list[tuple[Worker, int]] = []
        total = 0
        for name, offered in offers:
            if (asked := min(wanted - total, offered)) < 1:
                break
            lender = self.world.worker(name)
            if (lent := lender.offer(self.home, asked, terms)) is not None:
                got.append((lender, lent))
                total += lent
        if total < least:
            for lender in (each for each, _ in got if each.id in self.accounts):
                lender.blocks.give_back(self.home, 0)
                if self.home not in lender.blocks.loans:
                    del self.accounts[lender.id]
            return False
        self.world.stir(self.home)
        for lender, lent in got:
            lender.lend(self.home, lent, terms)
            account = self.accounts.setdefault(lender.id, Account(self.world.now))
            account.idle_since, account.saved = self.world.now, terms.save
        return True
