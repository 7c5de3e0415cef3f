"""The ledger against the nodes' own books: random lives of a cluster, and the laws after every event."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infinillm.core.blocks import Blocks
from infinillm.core.ledger import (
    Event,
    Joined,
    Left,
    Lent,
    Placed,
    Promised,
    Released,
    Report,
    Reported,
    Returned,
    apply,
    apply_all,
    changes,
    check,
    expecting,
    rebuild,
)
from infinillm.core.policy import POLICIES
from infinillm.core.types import Ledger, Loan, Node, Refused, SeqId, Span
from infinillm.errors import Broken

NAMES = ("a", "b", "c", "d")
SIZE = 16


class Machine:
    """One node as it really is: its books, and where its sequences lie."""

    def __init__(self, name: str, life: int):
        self.name, self.life = name, life
        self.blocks = Blocks(name, 12, SIZE, 9)
        self.layouts: dict[SeqId, tuple[Span, ...]] = {}
        self.told: Report | None = None  # what the controller of this epoch has heard

    def report(self) -> Report:
        b = self.blocks
        node = Node(self.name, f"{self.name}{self.life}", f"{self.name}:1", b.count, b.lendable, b.used, b.cached)
        return Report(node, tuple(b.loans.values()), dict(self.layouts))


class Cluster(RuleBasedStateMachine):
    """Nodes live as they like; the controller hears of it only through beats, and sometimes restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.machines = {name: Machine(name, 0) for name in NAMES}
        self.alive = set(NAMES)
        self.ledger = Ledger(1)
        self.events: list[Event] = []
        self.clock = 0.0
        self.count = 0

    def hear(self, events: tuple[Event, ...]) -> None:
        for event in events:
            before = self.ledger
            self.ledger = apply(before, event)
            assert before == apply_all(Ledger(before.epoch), self.events), "an event changed the past"
            self.events.append(event)
            check(self.ledger)

    def of(self, name: str) -> Machine:
        return self.machines[name]

    @initialize()
    def all_join(self) -> None:
        self.all_beat()

    @rule()
    def all_beat(self) -> None:
        for name in NAMES:
            self.beat(name)

    @rule(name=st.sampled_from(NAMES))
    def beat(self, name: str) -> None:
        if name not in self.alive:
            return
        machine, report = self.of(name), self.of(name).report()
        self.hear((Joined(report),) if machine.told is None else changes(machine.told, report))
        machine.told = report

    @rule(name=st.sampled_from(NAMES), blocks=st.integers(1, 5))
    def begin(self, name: str, blocks: int) -> None:
        self.count += 1
        if self.of(name).blocks.grow(f"s{self.count}", 0, blocks) is None:
            self.of(name).layouts[f"s{self.count}"] = (Span(name, 0, blocks * SIZE),)

    @rule(name=st.sampled_from(NAMES))
    def finish(self, name: str) -> None:
        machine = self.of(name)
        if machine.layouts:
            sequence = next(iter(machine.layouts))
            del machine.layouts[sequence]
            machine.blocks.release(sequence)
            for other in self.machines.values():
                other.blocks.release(sequence, name)

    @rule(
        name=st.sampled_from(NAMES), blocks=st.integers(1, 5), policy=st.sampled_from(("pooled", "pooled", "isolated"))
    )
    def borrow(self, name: str, blocks: int, policy: str) -> None:
        """As the ledger advises, though it may be wrong by now: the lender decides, and the sequence grows there."""
        offers = POLICIES[policy].creditors(self.ledger, name, blocks, (), False)
        if isinstance(offers, Refused):
            return
        for lender, offered in offers:
            known = self.ledger.nodes[lender]
            assert lender != name
            assert 0 < offered <= min(known.free, known.lendable - known.lent)
            asked = min(offered, blocks)
            self.count += 1
            until, id = self.clock + 10, f"{lender}>{name}#{self.count}"
            if lender in self.alive and isinstance(self.of(lender).blocks.lend(name, asked, until, id), Loan):
                self.spread(name, lender, asked)
                return

    def spread(self, name: str, lender: str, blocks: int) -> None:
        layouts = self.of(name).layouts
        for sequence, layout in layouts.items():
            first = layout[-1].stop
            if self.of(lender).blocks.grow(sequence, first, blocks, name) is None:
                layouts[sequence] = (*layout, Span(lender, first, first + blocks * SIZE))
                return

    @rule(lender=st.sampled_from(NAMES), borrower=st.sampled_from(NAMES), blocks=st.none() | st.integers(1, 9))
    def give_back(self, lender: str, borrower: str, blocks: int | None) -> None:
        self.of(lender).blocks.give_back(borrower, blocks)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.clock += seconds
        for machine in self.machines.values():
            for loan in machine.blocks.due(self.clock):
                machine.blocks.give_back(loan.borrower)

    @rule(what=st.sampled_from(("die", "silence", "doubt", "start", "restart")), name=st.sampled_from(NAMES))
    def upset(self, what: str, name: str) -> None:
        """What goes wrong once in a while: in one rule, so that the cluster also gets to live."""
        match what:
            case "die":  # it stops; the controller notices by its silence
                self.alive.discard(name)
                self.hear((Left(name, "silent"),))
                self.of(name).told = None
            case "silence":  # the controller thinks it gone, and it is not: it joins again with the same books
                self.hear((Left(name, "silent"),))
                self.of(name).told = None
            case "doubt":  # it does not know whether its last beat was heard, so it joins while it is still known
                self.of(name).told = None
                self.beat(name)
            case "start" if len(self.alive) < len(NAMES):
                dead = min(set(NAMES) - self.alive)
                self.machines[dead] = Machine(dead, self.of(dead).life + 1)
                self.alive.add(dead)
            case "restart":
                self.ledger, self.events = Ledger(self.ledger.epoch + 1), []
                for machine in self.machines.values():
                    machine.told = None

    @invariant()
    def only_the_living_are_routed_to(self) -> None:
        for policy in POLICIES.values():
            reach = policy.capacity(self.ledger, SIZE)
            for tokens in (1, reach, reach + 1):
                found = policy.route(self.ledger, tokens, tokens, SIZE, ("a",))
                if isinstance(found, Refused):
                    assert tokens > reach or set(self.ledger.nodes) <= {"a"} or policy.name == "isolated"
                else:
                    assert found in self.ledger.nodes
                    assert found != "a"
                    assert tokens <= reach

    @invariant()
    def the_ledger_is_what_it_was_told(self) -> None:
        told = [machine.told for machine in self.machines.values() if machine.told is not None]
        assert self.ledger == rebuild(self.ledger.epoch, told)
        assert self.ledger == rebuild(self.ledger.epoch, reversed(told))

    def teardown(self) -> None:
        """When all have spoken, a new ledger from the nodes' own books is the same value, and agrees with them."""
        self.all_beat()
        books = [self.of(name).report() for name in NAMES if name in self.alive]
        assert self.ledger == rebuild(self.ledger.epoch, books)
        for name in self.alive:
            blocks, node = self.of(name).blocks, self.ledger.nodes[name]
            blocks.check()
            assert (node.used, node.cached, node.lent) == (blocks.used, blocks.cached, blocks.lent)
            lenders = [self.of(other).blocks.loans.get(name) for other in self.alive]
            assert node.borrowed == sum(loan.blocks for loan in lenders if loan)


Cluster.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestCluster = Cluster.TestCase


A = Node("a", "1", "a:1", blocks=10, lendable=9, used=4)
B = Node("b", "1", "b:1", blocks=10, lendable=9)
LOAN = Loan("b>a", "b", "a", 5, until=10.0)
BOTH = rebuild(1, [Report(A), Report(B, (LOAN,), {"s": (Span("b", 0, 16), Span("a", 16, 40))})])


def test_a_story() -> None:
    ledger = apply(Ledger(7), Joined(Report(A)))
    ledger = apply(ledger, Joined(Report(B)))
    ledger = apply(ledger, Lent(LOAN))
    assert (ledger.nodes["b"].lent, ledger.nodes["a"].borrowed) == (5, 5)
    ledger = apply(ledger, Lent(replace(LOAN, blocks=7, used=6)))
    assert (ledger.nodes["b"].lent, ledger.nodes["a"].borrowed) == (7, 7)
    ledger = apply(ledger, Placed("a", "s", (Span("a", 0, 16), Span("b", 16, 30))))
    ledger = apply(ledger, Reported(replace(B, used=3, lent=99, borrowed=99)))
    assert (ledger.nodes["b"].used, ledger.nodes["b"].lent, ledger.nodes["b"].borrowed) == (3, 7, 0)
    check(ledger)
    gone = apply(ledger, Left("b", "silent"))
    assert (gone.loans, gone.nodes["a"].borrowed) == ({}, 0)
    assert gone.layouts == ledger.layouts  # only its home says where a sequence lies
    check(gone)
    again = apply(gone, Joined(Report(replace(B, incarnation="2"))))
    assert again.nodes["b"].lent == 0
    ledger = apply(ledger, Released("a", "s"))
    ledger = apply(ledger, Returned("b", "b>a"))
    assert (ledger.layouts, ledger.loans, ledger.nodes["b"].lent, ledger.nodes["a"].borrowed) == ({}, {}, 0, 0)
    assert apply(ledger, Returned("b", "b>a")) == ledger
    assert ledger.epoch == 7


def test_a_borrower_may_join_after_its_lender_told_of_it() -> None:
    late = apply(rebuild(1, [Report(B, (LOAN,))]), Joined(Report(A)))
    assert late == rebuild(1, [Report(A), Report(B, (LOAN,))])
    assert late.nodes["a"].borrowed == 5


@pytest.mark.parametrize(
    "event",
    [
        Reported(Node("z", "1", "z:1", 1, 1)),
        Lent(Loan("z>a", "z", "a", 1, 0.0)),
        Placed("z", "s", ()),
        Lent(replace(LOAN, lender="a", borrower="b")),
        Returned("a", "b>a"),
        Joined(Report(A, (LOAN,))),
        Joined(Report(A, (replace(LOAN, lender="a", borrower="b"),))),
        Joined(Report(Node("c", "1", "c:1", 9, 9), (replace(LOAN, lender="c"),))),
    ],
)
def test_who_never_joined_or_speaks_for_others_is_refused(event: Event) -> None:
    with pytest.raises(Broken):
        apply(BOTH, event)


@pytest.mark.parametrize(
    "broken",
    [
        replace(BOTH, nodes={**BOTH.nodes, "b": replace(BOTH.nodes["b"], used=6)}),
        replace(BOTH, nodes={**BOTH.nodes, "b": replace(BOTH.nodes["b"], lent=4)}),
        replace(BOTH, nodes={**BOTH.nodes, "b": replace(BOTH.nodes["b"], lendable=4)}),
        replace(BOTH, nodes={**BOTH.nodes, "a": replace(BOTH.nodes["a"], borrowed=4)}),
        replace(BOTH, nodes={"a": BOTH.nodes["a"]}, layouts={}),
        replace(BOTH, loans={"b>a": replace(LOAN, used=6)}),
        replace(BOTH, loans={"b>a": replace(LOAN, borrower="b")}),
        replace(BOTH, loans={"other": LOAN}),
        replace(BOTH, layouts={"z": {"s": ()}}),
        replace(BOTH, layouts={"b": {"s": (Span("a", 0, 16), Span("b", 15, 40))}}),
        replace(BOTH, layouts={"b": {"s": (Span("a", 16, 16),)}}),
    ],
)
def test_check_sees_every_broken_law(broken: Ledger) -> None:
    check(BOTH)
    with pytest.raises(Broken):
        check(broken)


def test_what_became_smaller_is_told_first() -> None:
    """A node takes back what it lent and uses it itself, between two beats."""
    second = replace(LOAN, id="b>c", borrower="c", blocks=2)
    before = Report(B, (LOAN, second))
    after = Report(replace(B, used=6), (replace(LOAN, blocks=1), replace(second, blocks=3)))
    ledger = rebuild(1, [Report(A), before])
    for event in changes(before, after):
        ledger = apply(ledger, event)
        check(ledger)
    assert ledger == rebuild(1, [Report(A), after])
    for event in changes(after, before):
        ledger = apply(ledger, event)
        check(ledger)
    assert ledger == rebuild(1, [Report(A), before])
    assert changes(before, before) == ()


def test_expecting_adds_to_the_queue_and_nothing_else() -> None:
    expected = expecting(BOTH, {"a": (7, 2), "gone": (1, 1)})
    assert expected.nodes == {**BOTH.nodes, "a": replace(BOTH.nodes["a"], wanted=7, waiting=2)}
    assert expecting(BOTH, {}) == BOTH


def test_many_events_are_taken_in_at_once_or_not_at_all() -> None:
    layouts = {"a": {"s": (Span("a", 0, 8),)}}
    ledger = replace(rebuild(1, [Report(A), Report(B)]), layouts=layouts)
    events = [Placed("a", "t", (Span("a", 0, 4),)), Lent(LOAN), Released("a", "s")]
    assert apply_all(ledger, events) == reduce(apply, events, ledger)
    with pytest.raises(Broken):
        apply_all(ledger, [*events, Reported(replace(A, id="stranger"))])
    assert ledger.layouts == layouts == {"a": {"s": (Span("a", 0, 8),)}} and not ledger.loans


def test_what_was_sent_waits_until_the_node_has_told_of_its_queue() -> None:
    promised = Promised()
    promised.add("a", 7, 1.0)
    assert promised.waits("a") and not promised.waits("b")
    promised.heard("a", 1.05)
    assert promised.waits("a"), "it was on its way"
    promised.heard("a", 2.0)
    assert not promised.waits("a")


def test_what_is_expected_of_a_ledger_is_the_same_value_until_something_is_sent_or_heard() -> None:
    promised, ledger = Promised(), apply(Ledger(1), Joined(Report(A)))
    assert promised.expected(ledger) is ledger
    promised.add(A.id, 7, 1.0)
    found = promised.expected(ledger)
    assert found.nodes[A.id].waiting == A.waiting + 1 and promised.expected(ledger) is found
    other = apply(ledger, Reported(replace(A, waiting=3)))
    assert promised.expected(other).nodes[A.id].waiting == 4
    promised.heard(A.id, 2.0)
    assert promised.expected(other) is other
    promised.add(A.id, 7, 3.0)
    assert promised.expected(other) is not other
    promised.forget(A.id)
    assert promised.expected(other) is other
