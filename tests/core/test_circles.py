"""Debts in a circle are cancelled: what nodes keep for each other goes home, and nobody holds more than before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from hypothesis import event, given
from hypothesis import strategies as st

from infinillm.core.cost import Costs
from infinillm.core.ledger import Report, check, rebuild
from infinillm.core.policy import POLICIES
from infinillm.core.policy.circles import cancel, circle, debts
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.types import Layout, Ledger, Loan, Node, NodeId, Span

SIZE = 16
Debts = dict[tuple[NodeId, NodeId], list[int]]  # (borrower, lender): blocks of each of its requests there


def owing(owed: Debts, free: dict[NodeId, int]) -> Ledger:
    """Nodes that owe each other full blocks, each with so many free; a request's last block lies at home."""
    reports = []
    for name, spare in free.items():
        lent = [
            Loan(f"{name}>{borrower}", name, borrower, sum(each), 1.0, sum(each))
            for (borrower, lender), each in owed.items()
            if lender == name
        ]
        layouts: dict[str, Layout] = {
            f"{name}-{lender}-{i}": (Span(lender, 0, blocks * SIZE), Span(name, blocks * SIZE, blocks * SIZE + 1))
            for (borrower, lender), each in owed.items()
            if borrower == name
            for i, blocks in enumerate(each)
        }
        blocks = len(layouts) + sum(loan.blocks for loan in lent) + spare
        node = Node(name, "1", f"{name}:1", blocks, blocks, used=len(layouts), running=len(layouts))
        reports.append(Report(node, tuple(lent), layouts))
    books = rebuild(1, reports)
    check(books)
    return books


def done(ledger: Ledger, orders: Iterable[MoveBlocks]) -> Ledger:
    """The ledger after these blocks came home and were returned: told anew by every node."""
    nodes, loans = {**ledger.nodes}, {**ledger.loans}
    layouts = {home: dict(told) for home, told in ledger.layouts.items()}
    for order in orders:
        assert order.home == order.target != order.source
        nodes[order.home] = replace(nodes[order.home], used=nodes[order.home].used + order.blocks)
        name = f"{order.source}>{order.home}"
        loans[name] = replace(
            loans[name], blocks=loans[name].blocks - order.blocks, used=loans[name].used - order.blocks
        )
        there, here = layouts[order.home][order.seq]
        assert there.node == order.source
        rest = there.stop - order.blocks * SIZE
        assert rest >= 0, "there were not so many blocks"
        spans = (replace(there, stop=rest), replace(here, start=rest))
        layouts[order.home][order.seq] = tuple(span for span in spans if span.start < span.stop)
    kept = [loan for loan in loans.values() if loan.blocks]
    return rebuild(
        ledger.epoch,
        (Report(n, tuple(loan for loan in kept if loan.lender == n.id), layouts.get(n.id, {})) for n in nodes.values()),
    )


NAMES = ["a", "b", "c", "d", "e"]
pairs = st.sampled_from([(one, other) for one in NAMES for other in NAMES if one != other])
ledgers = st.builds(
    owing,
    st.dictionaries(pairs, st.lists(st.integers(1, 9), min_size=1, max_size=3), max_size=12),
    st.fixed_dictionaries({name: st.integers(0, 4) for name in NAMES}),
)


@given(ledgers)
def test_no_circle_is_left_where_there_is_room_and_nobody_holds_more_than_before(books: Ledger) -> None:
    orders = cancel(books, SIZE)
    event(f"{min(len(orders), 4)} orders")
    after = done(books, orders)
    check(after)
    for name, node in after.nodes.items():
        assert node.used + node.lent == books.nodes[name].used + books.nodes[name].lent
    left = debts(after, SIZE)
    assert not [name for name, node in books.nodes.items() if node.free and circle(left, name)]


@given(st.dictionaries(pairs, st.integers(1, 9)), st.sampled_from(NAMES))
def test_a_circle_is_found_where_there_is_one(debt: dict[tuple[NodeId, NodeId], int], start: NodeId) -> None:
    owed = {name: {lender: blocks for (b, lender), blocks in debt.items() if b == name} for name in NAMES}
    around = circle(owed, start)
    reached = {start}
    for _ in NAMES:
        reached |= {lender for name in reached for lender in owed[name]}
    back = any(start in owed[name] for name in reached)
    assert bool(around) == back
    if back:
        assert all(lender in owed[borrower] for borrower, lender in pairwise(around))
        assert around[0] == around[-1] == start
        assert len(set(around)) == len(around) - 1


def test_two_nodes_that_lend_each_other_stop_and_what_is_beyond_stays() -> None:
    books = owing({("a", "b"): [3, 4], ("b", "a"): [5], ("a", "c"): [6]}, {"a": 1, "b": 0, "c": 9})
    told = [(o.seq, o.source, o.target, o.blocks) for o in cancel(books, SIZE)]
    assert told == [("a-b-0", "b", "a", 3), ("a-b-1", "b", "a", 2), ("b-a-0", "a", "b", 5)]
    assert cancel(books, SIZE)[0].reason == "a and b are in a circle of debts"
    assert {name: loan.blocks for name, loan in done(books, cancel(books, SIZE)).loans.items()} == {"b>a": 2, "c>a": 6}


def test_a_longer_circle_is_opened_and_a_chain_is_none() -> None:
    ring: Debts = {("a", "b"): [4], ("b", "c"): [2], ("c", "d"): [3], ("d", "a"): [9]}
    room = dict.fromkeys("abcd", 1)
    assert sorted((o.source, o.target, o.blocks) for o in cancel(owing(ring, room), SIZE)) == [
        ("a", "d", 2),
        ("b", "a", 2),
        ("c", "b", 2),
        ("d", "c", 2),
    ]
    del ring["d", "a"]
    assert not cancel(owing(ring, room), SIZE)


def test_pooled_and_proactive_cancel_and_isolated_has_nothing_to() -> None:
    books = owing({("a", "b"): [3], ("b", "a"): [5]}, {"a": 1, "b": 0})
    orders = cancel(books, SIZE)
    assert len(orders) == 2
    found = {name: policy.plan(books, Costs(), SIZE) for name, policy in POLICIES.items()}
    assert found == {"isolated": (), "pooled": orders, "proactive": orders}


def test_without_any_room_nothing_is_ordered() -> None:
    assert not cancel(owing({("a", "b"): [3], ("b", "a"): [5]}, {"a": 0, "b": 0}), SIZE)
