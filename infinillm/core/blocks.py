"""The books of one node's memory: which block is whose, what is cached, what is lent.

Theory of operation. Every block is in exactly one place: *free*, *idle* (nobody refers to it, but it is a full block
kept for its content, and is room like a free one), or *held* by one or more sequences. A sequence holds blocks in a
holding, keyed by its owner: the node itself (owner ""), or a borrower. Blocks whose content is on its way from another
node are held as well, but *staged*: no question sees them until they are adopted. A loan is a number of blocks promised
to one borrower, not particular blocks: what is promised and not yet held is subtracted from the node's own room, so a
borrower that reserved never finds the memory gone. One borrower has at most one loan here; lending again makes it
larger. No two loans ever have one id, so a late word about a loan that is over finds nothing.

A full block may have a name (see `names`), and whoever needs its content may share it, instead of taking one of its
own. What a borrower shares it holds as a *guest*, beside its loan: the node keeps the block for it, as it keeps those
of its own sequences. A block that is both kept and in a loan counts twice, since either may outlive the other.

Law: free + idle + held == count, and kept by the node itself + lent <= count. `check` says whether it holds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from infinillm.core.holding import Holding
from infinillm.core.layout import firsts
from infinillm.core.names import MARK_EVERY, mark
from infinillm.core.types import Loan, LoanId, NodeId, Refused, SeqId
from infinillm.errors import Broken

OWN = ""


class Blocks:
    """See the theory of operation above. Not thread-safe: its owner holds a lock."""

    def __init__(self, node: NodeId, count: int, block_size: int, lendable: int):
        self.node, self.count, self.block_size, self.lendable = node, count, block_size, lendable
        self.loans: dict[NodeId, Loan] = {}
        self._free = list(range(count - 1, -1, -1))
        self._references: dict[int, int] = {}  # to blocks with a name; one without has one holder, or none
        self._keepers: dict[int, int] = {}  # of the references: those of the node's own sequences, and of guests
        self._used = self._guests = self._lent = 0
        self.marks: set[int] = set()  # of the landmarks that are here
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._holdings: dict[tuple[NodeId, SeqId], Holding] = {}
        self._staged: dict[tuple[NodeId, SeqId], Holding] = {}

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def lent(self) -> int:
        return self._lent

    @property
    def room(self) -> int:
        """Blocks the node may still take for its own sequences."""
        return self.count - self._used - self.lent

    @property
    def offer(self) -> int:
        """Blocks the node may lend now."""
        return min(self.lendable, self.count - self._used) - self.lent

    @property
    def cached(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        """Blocks kept for the node's own sequences, and for guests."""
        return self._used

    def holding(self, seq: SeqId, owner: NodeId = OWN) -> Holding | None:
        return self._holdings.get((owner, seq))

    def staged(self, seq: SeqId, owner: NodeId = OWN) -> Holding | None:
        return self._staged.get((owner, seq))

    def holders(self, owner: NodeId = OWN) -> list[SeqId]:
        return [seq for whose, seq in dict.fromkeys([*self._holdings, *self._staged]) if whose == owner]

    def match(self, seq: SeqId, names: Sequence[bytes]) -> tuple[list[int], int]:
        """Which of these names are here, by their index, and how many of the blocks cost `seq` room to share."""
        found = [i for i, name in enumerate(names) if name in self._by_name]
        left = self._left_by_others(seq, OWN)
        costs = (self._keepers[self._by_name[names[i]]] == 0 and i * self.block_size not in left for i in found)
        return found, sum(costs)

    def leading(self, names: Sequence[bytes]) -> int:
        """How many of the first names are here, without a gap."""
        return next((i for i, name in enumerate(names) if name not in self._by_name), len(names))

    def _left_by_others(self, seq: SeqId, owner: NodeId) -> dict[int, NodeId]:
        """In whose loan blocks of this very sequence are: whoever goes on with it has them, and their room."""
        found: dict[int, NodeId] = {}
        for whose in self.loans:
            if whose != owner and (held := self._holdings.get((whose, seq))) is not None:
                found |= dict.fromkeys((first for first in held.firsts if first not in held.guests), whose)
        return found

    # --- holding -------------------------------------------------------------------------------------------------

    def share(self, seq: SeqId, names: Mapping[int, bytes], owner: NodeId = OWN) -> list[int]:
        """Hold the blocks of these names, by the positions they are wanted at, as far as they are here and room lasts.

        Returns the positions. What is held at a position already stays. A borrower shares while it has a loan, be it of
        nothing, and guests stay within the cap on what is lent. What another borrower holds of the same sequence goes
        from its loan to whoever goes on with the sequence.
        """
        if owner != OWN and owner not in self.loans:
            return []
        left, taken = self._left_by_others(seq, owner), dict[NodeId, set[int]]()
        holding = self._holdings.setdefault((owner, seq), Holding())
        held, shared = set(holding.firsts), []
        for first, name in names.items():
            block = self._by_name.get(name)
            if block is None or first in held:
                continue
            if first in left:
                taken.setdefault(left[first], set()).add(first)
            elif (owner != OWN and self._guests + self.lent >= self.lendable) or (
                self._keepers[block] == 0 and self.room < 1
            ):
                break
            if owner != OWN:
                self._guests += 1
                holding.guests.add(first)
            self._idle.pop(block, None)
            self._references[block] += 1
            self._used += self._keepers[block] == 0
            self._keepers[block] += 1
            holding.insert((first,), (block,))
            shared.append(first)
        if not holding.blocks:
            del self._holdings[owner, seq]
        for whose, gone in taken.items():
            self._drop(whose, seq, gone)
            self._promise(replace(self.loans[whose], blocks=self.loans[whose].blocks - len(gone)))
        return shared

    def grow(self, seq: SeqId, first: int, blocks: int, owner: NodeId = OWN) -> Refused | None:
        """Hold `blocks` for positions from `first` on; refused whole where there is no room for all.

        What is held already stays as it is: a plan that is told twice grows once.
        """
        if blocks > self.count:
            return Refused(f"{seq} asked for {blocks} blocks of {self.node}, which has {self.count}")
        held = self._holdings.get((owner, seq))
        wanted: Sequence[int] = firsts(first, blocks, self.block_size)
        if held is not None and held.firsts and first <= held.firsts[-1]:
            have = set(held.firsts)
            wanted = [at for at in wanted if at not in have]
        return self._reserve(self._holdings, seq, wanted, owner)

    def stage(self, seq: SeqId, first: int, blocks: int, owner: NodeId = OWN) -> Refused | None:
        """Hold `blocks` for content on its way here; refused whole where there is no room, or one is held already."""
        if blocks > self.count:
            return Refused(f"{seq} asked for {blocks} blocks of {self.node}, which has {self.count}")
        wanted = firsts(first, blocks, self.block_size)
        for held in (self._holdings.get((owner, seq)), self._staged.get((owner, seq))):
            if held is not None and bisect_left(held.firsts, wanted.start) < bisect_left(held.firsts, wanted.stop):
                return Refused(f"{self.node} has blocks of {seq} from position {first} on already")
        return self._reserve(self._staged, seq, wanted, owner)

    def adopt(self, seq: SeqId, owner: NodeId = OWN) -> None:
        """What was staged has come: from now on the sequence has it here."""
        staged = self._staged.pop((owner, seq), Holding())
        holding = self._holdings.setdefault((owner, seq), Holding())
        holding.insert(staged.firsts, staged.blocks)

    def abandon(self, owner: NodeId = OWN) -> None:
        """What was staged will not come."""
        for whose, seq in [key for key in self._staged if key[0] == owner]:
            self._let_go(owner, self._staged.pop((whose, seq)))

    def leave(self, seq: SeqId, first: int, blocks: int, owner: NodeId = OWN) -> Refused | None:
        """Let go of a sequence's blocks from `first` on; refused whole where one is not here."""
        holding, gone = self._holdings.get((owner, seq), Holding()), firsts(first, blocks, self.block_size)
        at = bisect_left(holding.firsts, first)
        if blocks > len(holding.blocks) or holding.firsts[at : at + blocks] != [*gone]:
            return Refused(f"{self.node} does not hold {blocks} blocks of {seq} from position {first} on")
        self._drop(owner, seq, set(gone))
        return None

    def keep(self, held: Mapping[SeqId, Collection[int]], owner: NodeId) -> None:
        """Let go of all that an owner has here except the blocks at these positions."""
        for seq in self.holders(owner):
            if holding := self._holdings.get((owner, seq)):
                self._drop(owner, seq, set(holding.firsts).difference(held.get(seq, ())))

    def _reserve(
        self, holdings: dict[tuple[NodeId, SeqId], Holding], seq: SeqId, positions: Sequence[int], owner: NodeId
    ) -> Refused | None:
        blocks = len(positions)
        room = self.room
        loan = self.loans.get(owner)
        if owner != OWN:
            room = loan.blocks - loan.used if loan else 0
        if blocks > room:
            return Refused(f"{seq} asked for {blocks} blocks of {self.node}, {room} are left to {owner or 'itself'}")
        holding = holdings.setdefault((owner, seq), Holding())
        holding.insert(positions, self._take(blocks))
        if owner == OWN:
            self._used += blocks
        elif loan is not None:
            self.loans[owner] = replace(loan, used=loan.used + blocks)
        return None

    def release(self, seq: SeqId, owner: NodeId = OWN) -> int:
        """Let go of everything a sequence holds here; returns how many blocks it held."""
        gone = [holdings.pop((owner, seq), Holding()) for holdings in (self._holdings, self._staged)]
        for holding in gone:
            self._let_go(owner, holding)
        return sum(len(holding.blocks) for holding in gone)

    def _drop(self, owner: NodeId, seq: SeqId, gone: Collection[int]) -> None:
        """Let go of a sequence's blocks at these positions, all of which it has here."""
        holding = self._holdings[owner, seq]
        left = Holding(sorted(gone), guests=holding.guests.intersection(gone))
        for first in left.firsts:
            at = bisect_left(holding.firsts, first)
            assert holding.firsts[at] == first, (seq, first)
            del holding.firsts[at]
            left.blocks.append(holding.blocks.pop(at))
        holding.guests -= left.guests
        if not holding.blocks:
            del self._holdings[owner, seq]
        self._let_go(owner, left)

    def _let_go(self, owner: NodeId, left: Holding) -> None:
        """The end of a prefix before its beginning: so it is evicted first."""
        kept, gone = owner == OWN, left.blocks[::-1]
        plain = [block for block in gone if block not in self._names] if self._names else gone
        self._free += plain
        self._used -= len(plain) if kept else 0
        for first, block in zip(reversed(left.firsts), gone, strict=True) if len(plain) < len(gone) else ():
            if block in self._names:
                self._references[block] -= 1
                if kept or first in left.guests:
                    self._keepers[block] -= 1
                    self._used -= self._keepers[block] == 0
                if self._references[block] == 0:
                    self._idle[block] = None
        self._guests -= len(left.guests)
        if owner != OWN and (loan := self.loans.get(owner)):
            self.loans[owner] = replace(loan, used=loan.used - len(left.blocks) + len(left.guests))

    def seal(self, seq: SeqId, first: int, name: bytes, owner: NodeId = OWN) -> None:
        """A full block of a sequence has its final content: others may share it from now on."""
        holding = self._holdings.get((owner, seq))
        if holding is None or name in self._by_name:
            return
        at = bisect_left(holding.firsts, first)
        if at == len(holding.firsts) or holding.firsts[at] != first:
            return  # this block of the sequence lies on another node
        block = holding.blocks[at]
        if block not in self._names:
            self._by_name[name] = block
            self._names[block] = name
            self._references[block], self._keepers[block] = 1, int(owner == OWN)
            if (first // self.block_size) % MARK_EVERY == MARK_EVERY - 1:
                self.marks.add(mark(name))

    # --- lending -------------------------------------------------------------------------------------------------

    def lend(self, borrower: NodeId, blocks: int, until: float, id: LoanId) -> Loan | Refused:
        """Promise `blocks` more to a borrower. First come, first served; the cap and the own room decide.

        `id`, never used before, becomes that of a new loan; a loan that grows keeps its own. Who only shares has a loan
        of nothing.
        """
        if borrower == self.node:
            return Refused("a node cannot lend to itself")
        if blocks < 0:
            return Refused(f"a loan cannot have {blocks} blocks")
        if blocks > self.lendable - self.lent:
            return Refused(f"{self.node} lends at most {self.lendable} blocks and has lent {self.lent}")
        if blocks > self.room:
            return Refused(f"{self.node} has room for {self.room} blocks, not {blocks}")
        old = self.loans.get(borrower)
        loan = (
            replace(old, blocks=old.blocks + blocks, until=max(old.until, until))
            if old
            else Loan(id, self.node, borrower, blocks, until)
        )
        self._promise(loan)
        return loan

    def loan(self, id: LoanId) -> Loan | None:
        """The loan of that id, while it lasts."""
        return next((loan for loan in self.loans.values() if loan.id == id), None)

    def renew(self, id: LoanId, until: float) -> bool:
        """Keep a loan alive; never shortens it."""
        if (loan := self.loan(id)) is None:
            return False
        self.loans[loan.borrower] = replace(loan, until=max(loan.until, until))
        return True

    def doubt(self, id: LoanId, until: float) -> None:
        """The borrower fell silent: its loan ends at `until` unless it is heard again before."""
        if (loan := self.loan(id)) is not None:
            self.loans[loan.borrower] = replace(loan, until=min(loan.until, until))

    def give_back(self, borrower: NodeId, blocks: int | None = None) -> int:
        """The borrower returns unused blocks of its loan (`None`: the whole loan, with whatever it still holds).

        A loan of which nothing is left ends, unless its borrower shares something here.
        """
        loan = self.loans.get(borrower)
        if loan is None:
            return 0
        if blocks is None:
            for seq in self.holders(borrower):
                self.release(seq, borrower)
            loan = self.loans[borrower]
            blocks = loan.blocks
        blocks = min(blocks, loan.blocks - loan.used)
        if blocks == loan.blocks and not self.holders(borrower):
            self._lent -= self.loans.pop(borrower).blocks
        else:
            self._promise(replace(loan, blocks=loan.blocks - blocks))
        return blocks

    def _promise(self, loan: Loan) -> None:
        old = self.loans.get(loan.borrower)
        self._lent += loan.blocks - (old.blocks if old is not None else 0)
        self.loans[loan.borrower] = loan

    def due(self, now: float) -> list[Loan]:
        """The loans nobody renewed in time."""
        return [loan for loan in self.loans.values() if loan.until <= now]

    # --- laws ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Broken where the books do not balance."""
        held: dict[int, int] = {}
        kept: dict[int, int] = {}
        by_owner: dict[NodeId, int] = {}
        for (owner, seq), holding in chain(self._holdings.items(), self._staged.items()):
            if holding.firsts != sorted(set(holding.firsts)):
                raise Broken(f"{seq} holds positions {holding.firsts} on {self.node}")
            by_owner[owner] = by_owner.get(owner, 0) + len(holding.blocks) - len(holding.guests)
            for first, block in zip(holding.firsts, holding.blocks, strict=True):
                held[block] = held.get(block, 0) + 1
                kept[block] = kept.get(block, 0) + (owner == OWN or first in holding.guests)
        for key, staged in self._staged.items():
            if not set(staged.firsts).isdisjoint(self._holdings.get(key, Holding()).firsts):
                raise Broken(f"{key[1]} has blocks twice on {self.node}")
        places = [*self._free, *self._idle, *held]
        if sorted(places) != list(range(self.count)):
            raise Broken(f"{self.node}: {len(places)} places for {self.count} blocks")
        if self._references != {block: held.get(block, 0) for block in self._names} or any(
            count > 1 and block not in self._names for block, count in held.items()
        ):
            raise Broken(f"{self.node}: a reference count is wrong")
        if self._keepers != {b: kept.get(b, 0) for b in self._names} or self._used != sum(map(bool, kept.values())):
            raise Broken(f"{self.node}: it is wrong which blocks are kept")
        for borrower, loan in self.loans.items():
            if loan.used != by_owner.get(borrower, 0) or loan.used > loan.blocks:
                raise Broken(f"{self.node}: {borrower} holds {by_owner.get(borrower, 0)} under {loan}")
        if self._lent != sum(loan.blocks for loan in self.loans.values()):
            raise Broken(f"{self.node}: {self._lent} lent, which is not the sum of its loans")
        if set(by_owner) - set(self.loans) - {OWN}:
            raise Broken(f"{self.node}: somebody holds blocks without a loan")
        if self.room < 0 or self.used + self.lent > self.count or self.lent > max(self.lendable, 0):
            raise Broken(f"{self.node}: used {self.used} + lent {self.lent} of {self.count}, lendable {self.lendable}")

    def _take(self, blocks: int) -> list[int]:
        """So many for new content: the free ones, then those that were idle for longest."""
        left = max(len(self._free) - blocks, 0)
        taken = self._free[left:][::-1]
        del self._free[left:]
        while len(taken) < blocks:
            block, _ = self._idle.popitem(last=False)
            name = self._names.pop(block)
            del self._by_name[name], self._references[block], self._keepers[block]
            self.marks.discard(mark(name))
            taken.append(block)
        return taken
