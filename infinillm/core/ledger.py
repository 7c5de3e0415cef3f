"""The ledger as a fold over events: who owns, lends and borrows blocks, and where sequences live.

Theory of operation. An event is a fact told by the node it concerns, because nodes judge their own memory: a lender
tells of its loans, a home tells where its sequences lie, and what anybody else knows about them does not count. `apply`
makes the next ledger and leaves the old one as it was; equal events give equal ledgers.

    Joined    all that a node knows: its counts, the loans it gave, where its sequences lie; replaces what was known
    Left      the node is gone, and with it the loans it gave and the layouts it told
    Reported  the node's counts changed
    Lent      a loan is new, or its size, use or expiry changed
    Returned  a loan is over
    Placed    a sequence lies elsewhere than before
    Released  a sequence is over

`lent` and `borrowed` follow from the loans and are not taken from reports. A loan may name a borrower, and a span a
node, that is not in the ledger: after a restart it has not joined again yet; after a loss the teller has not noticed
yet. So the ledger is soft state: `rebuild` from the nodes' own books gives it back whole.

Laws, checked by `check`: used + lent <= blocks and lent <= lendable on every node; lent and borrowed are the sums of
the loans; a loan's lender is known, is not its borrower, and promised at least what is used, maybe nothing; a home is
known, and the spans of a layout are in order and do not overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from infinillm.core.pace import ARRIVAL_SECONDS
from infinillm.core.types import Layout, Ledger, Loan, LoanId, Node, NodeId, SeqId
from infinillm.errors import Broken


@dataclass(frozen=True, slots=True)
class Report:
    """One node's own books: its counts, the loans it gave, the layouts of the sequences it runs."""

    node: Node
    lent: tuple[Loan, ...] = ()
    layouts: Mapping[SeqId, Layout] = field(default_factory=dict)
    marks: frozenset[int] = frozenset()  # landmarks it has, which are no part of the ledger


@dataclass(frozen=True, slots=True)
class Joined:
    report: Report


@dataclass(frozen=True, slots=True)
class Left:
    node: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class Reported:
    node: Node


@dataclass(frozen=True, slots=True)
class Lent:
    loan: Loan


@dataclass(frozen=True, slots=True)
class Returned:
    lender: NodeId
    loan: LoanId


@dataclass(frozen=True, slots=True)
class Placed:
    home: NodeId
    sequence: SeqId
    layout: Layout


@dataclass(frozen=True, slots=True)
class Released:
    home: NodeId
    sequence: SeqId


Event: TypeAlias = Joined | Left | Reported | Lent | Returned | Placed | Released


def apply(ledger: Ledger, event: Event) -> Ledger:
    """The ledger after one event. Raises Broken where a node speaks that never joined, or of another's loans."""
    return apply_all(ledger, (event,))


def apply_all(ledger: Ledger, events: Iterable[Event]) -> Ledger:
    """The ledger after some events, in their order; all of them or, where one raises, none."""
    draft = _Draft(ledger)
    for event in events:
        draft.take(event)
    return Ledger(ledger.epoch, draft.nodes, draft.loans, draft.layouts)


def changes(before: Report, after: Report) -> tuple[Event, ...]:
    """What one node tells when its books went from `before` to `after`.

    What became smaller comes first and what became larger last, so that every ledger in between keeps the laws.
    """
    old, new = {loan.id: loan for loan in before.lent}, {loan.id: loan for loan in after.lent}
    told: list[Event] = [Returned(after.node.id, name) for name in old if name not in new]
    moved = [loan for name, loan in new.items() if old.get(name) != loan]
    smaller = [loan for loan in moved if loan.id in old and loan.blocks <= old[loan.id].blocks]
    told += [Lent(loan) for loan in smaller]
    if before.node != after.node:
        told.append(Reported(after.node))
    told += [Lent(loan) for loan in moved if loan not in smaller]
    home = after.node.id
    told += [Released(home, seq) for seq in before.layouts if seq not in after.layouts]
    told += [Placed(home, seq, layout) for seq, layout in after.layouts.items() if before.layouts.get(seq) != layout]
    return tuple(told)


def rebuild(epoch: int, reports: Iterable[Report]) -> Ledger:
    """A new ledger from the nodes' own books, in any order."""
    return apply_all(Ledger(epoch), (Joined(report) for report in reports))


class Promised:
    """The requests that were routed to nodes since these last told of their queues."""

    def __init__(self) -> None:
        self._sent: dict[NodeId, deque[tuple[float, int]]] = {}  # (when, blocks), oldest first
        self._expected: tuple[Ledger, Ledger] | None = None  # what is expected of a ledger, until one of both changes

    def add(self, node: NodeId, blocks: int, now: float) -> None:
        self._sent.setdefault(node, deque()).append((now, blocks))
        self._expected = None

    def heard(self, node: NodeId, now: float) -> None:
        """The node has told of its queue: what was sent some time ago is in it."""
        sent = self._sent.get(node)
        while sent and sent[0][0] < now - ARRIVAL_SECONDS:
            sent.popleft()
            self._expected = None

    def waits(self, node: NodeId) -> bool:
        """Whether there are any for a node."""
        return bool(self._sent.get(node))

    def forget(self, node: NodeId) -> None:
        self._sent.pop(node, None)
        self._expected = None

    def expected(self, ledger: Ledger) -> Ledger:
        """The ledger with all of these in the queues; the same value as before where nothing has changed."""
        if self._expected is None or self._expected[0] is not ledger:
            sums = {node: (sum(blocks for _, blocks in sent), len(sent)) for node, sent in self._sent.items() if sent}
            self._expected = ledger, expecting(ledger, sums)
        return self._expected[1]


def expecting(ledger: Ledger, promised: Mapping[NodeId, tuple[int, int]]) -> Ledger:
    """The ledger as if so many (blocks, requests) that were sent to nodes had already joined their queues."""
    nodes = {
        name: replace(node, wanted=node.wanted + blocks, waiting=node.waiting + requests)
        for name, (blocks, requests) in promised.items()
        if (node := ledger.nodes.get(name)) is not None
    }
    return replace(ledger, nodes={**ledger.nodes, **nodes}) if nodes else ledger


def check(ledger: Ledger) -> None:
    """Raise Broken where a law of the ledger fails."""
    lent, borrowed = dict.fromkeys(ledger.nodes, 0), dict.fromkeys(ledger.nodes, 0)
    for name, loan in ledger.loans.items():
        if name != loan.id or loan.lender == loan.borrower or not 0 <= loan.used <= loan.blocks:
            raise Broken(f"{loan} cannot be")
        if loan.lender not in ledger.nodes:
            raise Broken(f"{loan}: its lender is not in the ledger")
        lent[loan.lender] += loan.blocks
        if loan.borrower in borrowed:
            borrowed[loan.borrower] += loan.blocks
    for name, node in ledger.nodes.items():
        if name != node.id or node.lent != lent[name] or node.borrowed != borrowed[name]:
            raise Broken(f"{node}: its loans sum to lent {lent[name]}, borrowed {borrowed[name]}")
        if min(node.used, node.cached) < 0 or node.used + node.lent > node.blocks or node.lent > node.lendable:
            raise Broken(f"{name}: used {node.used} + lent {node.lent} of {node.blocks}, lendable {node.lendable}")
    for home, layouts in ledger.layouts.items():
        if home not in ledger.nodes or not layouts:
            raise Broken(f"layouts of {home!r}, which is not in the ledger or has none")
        for sequence, layout in layouts.items():
            stop = 0
            for span in layout:
                if not stop <= span.start < span.stop:
                    raise Broken(f"{sequence}: {span} starts before {stop} or is empty")
                stop = span.stop


class _Draft:
    """A ledger while events come in: everything is copied once, however many they are."""

    def __init__(self, ledger: Ledger):
        self.nodes, self.loans, self.layouts = {**ledger.nodes}, {**ledger.loans}, {**ledger.layouts}
        self._ours: dict[NodeId, dict[SeqId, Layout]] = {}  # of the layouts, those that are copies

    def take(self, event: Event) -> None:
        match event:
            case Joined(report):
                self._leave(report.node.id)
                self._join(report)
            case Left(node):
                self._leave(node)
            case Reported(node):
                known = self._known(node.id)
                self.nodes[node.id] = replace(node, lent=known.lent, borrowed=known.borrowed)
            case Lent(loan):
                self._known(loan.lender)
                was = self._own(loan.lender, loan.id)
                self.loans[loan.id] = loan
                self._turn(was, loan)
            case Returned(lender, name):
                if (was := self._own(lender, name)) is not None:
                    del self.loans[name]
                    self._turn(was, None)
            case Placed(home, sequence, layout):
                self._known(home)
                self._of(home)[sequence] = layout
            case Released(home, sequence):
                if home in self.layouts:
                    self._of(home).pop(sequence, None)
                    if not self._of(home):
                        del self.layouts[home], self._ours[home]

    def _known(self, node: NodeId) -> Node:
        if (known := self.nodes.get(node)) is None:
            raise Broken(f"{node} speaks and is not in the ledger")
        return known

    def _own(self, lender: NodeId, name: LoanId) -> Loan | None:
        """The loan of that name, if there is one; only its lender speaks of it."""
        loan = self.loans.get(name)
        if loan is not None and loan.lender != lender:
            raise Broken(f"{lender} speaks of {loan}, which is not its own")
        return loan

    def _of(self, home: NodeId) -> dict[SeqId, Layout]:
        """The layouts of one home, to be changed."""
        if home not in self._ours:
            self.layouts[home] = self._ours[home] = {**self.layouts.get(home, {})}
        return self._ours[home]

    def _turn(self, was: Loan | None, now: Loan | None) -> None:
        """Bring the sums of both sides along."""
        for loan, sign in ((was, -1), (now, 1)):
            if loan is None:
                continue
            lender = self.nodes[loan.lender]
            self.nodes[loan.lender] = replace(lender, lent=lender.lent + sign * loan.blocks)
            if (borrower := self.nodes.get(loan.borrower)) is not None:
                self.nodes[loan.borrower] = replace(borrower, borrowed=borrower.borrowed + sign * loan.blocks)

    def _join(self, report: Report) -> None:
        name = report.node.id
        for loan in report.lent:
            if loan.lender != name or self._own(name, loan.id) is not None:
                raise Broken(f"{name} tells twice, or of another's loan: {loan}")
        borrowed = sum(loan.blocks for loan in self.loans.values() if loan.borrower == name)
        self.nodes[name] = replace(report.node, lent=0, borrowed=borrowed)
        for loan in report.lent:
            self.loans[loan.id] = loan
            self._turn(None, loan)
        if report.layouts:
            self.layouts[name] = report.layouts

    def _leave(self, name: NodeId) -> None:
        if name not in self.nodes:
            return
        for loan in [loan for loan in self.loans.values() if loan.lender == name]:
            del self.loans[loan.id]
            self._turn(loan, None)
        self.layouts.pop(name, None)
        self._ours.pop(name, None)
        del self.nodes[name]
