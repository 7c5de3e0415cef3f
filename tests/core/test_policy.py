"""Policies as pure functions: what they offer, whom they name, and the words they refuse with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infinillm.core.cost import Costs
from infinillm.core.ledger import Report, expecting, rebuild
from infinillm.core.policy import POLICIES, named
from infinillm.core.types import Ledger, Loan, Node, Refused, Span
from infinillm.errors import BadRequest
from tests.core.test_cost import LLAMA_H100

ISOLATED, POOLED = POLICIES["isolated"], POLICIES["pooled"]


def node(name: str, blocks: int = 160, *, cap: float = 0.9, **more: int | bool) -> Node:
    return Node(name, "1", f"{name}:1", blocks=blocks, lendable=int(blocks * cap), **more)


def ledger(*nodes: Node, loans: tuple[Loan, ...] = ()) -> Ledger:
    lent = {n.id: tuple(loan for loan in loans if loan.lender == n.id) for n in nodes}
    return rebuild(1, [Report(n, lent[n.id]) for n in nodes])


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    nodes = []
    for i in range(draw(st.integers(0, 6))):
        blocks = draw(st.integers(1, 200))
        nodes.append(
            Node(
                f"n{i}",
                "1",
                f"n{i}:1",
                blocks=blocks,
                lendable=draw(st.integers(0, blocks)),
                used=draw(st.integers(0, blocks)),
                serves=draw(st.booleans()),
                tier=draw(st.sampled_from(["device", "host"])),
                draining=draw(st.booleans()),
                running=draw(st.integers(0, 5)),
                waiting=draw(st.integers(0, 5)),
                wanted=draw(st.integers(0, 300)),
            )
        )
    loans = []
    for lender in nodes:
        for borrower in nodes:
            most = min(lender.lendable, lender.blocks - lender.used) // len(nodes)
            if lender is not borrower and most > 0 and draw(st.booleans()):
                loans.append(
                    Loan(f"{lender.id}>{borrower.id}", lender.id, borrower.id, draw(st.integers(1, most)), 1.0)
                )
    return ledger(*nodes, loans=tuple(loans))


@given(ledgers(), st.integers(1, 30_000), st.sampled_from([8, 16, 32]), st.sets(st.sampled_from(["n0", "n1", "n2"])))
def test_route_takes_what_capacity_promises_and_no_more(
    books: Ledger, tokens: int, block_size: int, exclude: set[str]
) -> None:
    for policy in POLICIES.values():
        reach = policy.capacity(books, block_size)
        found = policy.route(books, min(tokens, 100), tokens, block_size, exclude)
        assert found == policy.route(books, min(tokens, 100), tokens, block_size, exclude)
        if isinstance(found, str):
            chosen = books.nodes[found]
            assert chosen.serves
            assert not chosen.draining
            assert found not in exclude
            assert tokens <= reach
        elif not exclude:
            assert tokens > reach
        reaches = [policy.reach(books, n.id, block_size) for n in books.nodes.values() if n.serves and not n.draining]
        assert reach == max(reaches, default=0)
    assert ISOLATED.capacity(books, block_size) <= POOLED.capacity(books, block_size)


@given(ledgers(), st.integers(1, 500))
def test_creditors_are_others_alive_and_within_their_caps(books: Ledger, blocks: int) -> None:
    for asker in (*books.nodes, "stranger"):
        assert isinstance(ISOLATED.creditors(books, asker, blocks, (), False), Refused)
        offers = POOLED.creditors(books, asker, blocks, (), False)
        offering = {
            n.id: min(n.lendable - n.lent, n.free - n.running)
            for n in books.nodes.values()
            if n.id != asker and not n.draining
        }
        offering = {name: offer for name, offer in offering.items() if offer > 0}
        if isinstance(offers, Refused):
            assert not offering
            continue
        assert all(offering[name] == offer for name, offer in offers)
        assert len(dict(offers)) == len(offers)
        assert [name for name, _ in offers] == sorted(
            dict(offers),
            key=lambda name: (
                books.nodes[name].tier == "host",
                f"{name}>{asker}" not in books.loans,
                books.nodes[name].borrowed > 0,
                -offering[name],
                name,
            ),
        )
        assert sum(dict(offers).values()) >= min(2 * blocks, sum(offering.values()))


def test_capacity_is_ones_own_and_what_others_lend() -> None:
    three = ledger(node("a"), node("b"), node("c"))
    assert ISOLATED.capacity(three, 16) == 160 * 16
    assert POOLED.capacity(three, 16) == (160 + 144 + 144) * 16
    memory = ledger(node("a"), node("m", 1000, cap=1.0, serves=False))
    assert ISOLATED.capacity(memory, 16) == 160 * 16
    assert POOLED.capacity(memory, 16) == 1160 * 16
    assert POOLED.capacity(ledger(node("m", 1000, cap=1.0, serves=False)), 16) == 0
    assert POOLED.capacity(ledger(node("a"), node("b", draining=True)), 16) == 160 * 16
    assert POOLED.capacity(ledger(), 16) == ISOLATED.capacity(ledger(), 16) == 0


def test_refusals_say_what_was_needed_and_what_there_is() -> None:
    three = ledger(node("a"), node("b"), node("c"))
    assert ISOLATED.route(three, 5000, 5117, 16, ()) == Refused(
        "the request needs 320 blocks (5,117 tokens, 16 per block); "
        "policy isolated offers 160 on one worker, so at most 2,560 tokens"
    )
    assert POOLED.route(three, 5000, 9000, 16, ()) == Refused(
        "the request needs 563 blocks (9,000 tokens, 16 per block); "
        "the pool offers 448 on 3 workers, so at most 7,168 tokens"
    )
    assert POOLED.route(three, 10, 20, 16, ("a", "b", "c")) == Refused("no worker is ready to serve besides a, b, c")
    assert POOLED.route(ledger(), 10, 20, 16, ()) == Refused("no worker is ready to serve")
    refused = Refused("a needs 160 more blocks; policy isolated lends none")
    assert ISOLATED.creditors(three, "a", 160, (), False) == refused
    full = ledger(node("a", used=160), node("b", used=160), node("c", used=100, draining=True))
    assert POOLED.creditors(full, "a", 1, (), False) == Refused(
        "a needs 1 more block; 1 other worker may lend 144 in all, and none of them is free now"
    )


def test_requests_go_where_most_room_is_then_where_fewest_are() -> None:
    books = ledger(node("a", used=50), node("b", used=10, wanted=50), node("c", used=40, running=3))
    assert POOLED.route(books, 16, 32, 16, ()) == "c"
    assert POOLED.route(books, 16, 32, 16, ("c",)) == "a"
    equal = ledger(node("a", running=2), node("b", waiting=1), node("c", running=1, waiting=1))
    assert POOLED.route(equal, 16, 32, 16, ()) == "b"


def test_a_burst_spreads_when_what_was_sent_is_counted() -> None:
    books = ledger(node("a"), node("b"), node("c"))
    sent = dict.fromkeys(books.nodes, (0, 0))
    for _ in range(64):
        found = POOLED.route(expecting(books, sent), 160, 200, 16, ())
        assert isinstance(found, str)
        sent[found] = (sent[found][0] + 13, sent[found][1] + 1)
    assert sorted(requests for _, requests in sent.values()) == [21, 21, 22]


def test_lenders_keep_their_own_running_and_borrowers_are_asked_last() -> None:
    books = ledger(
        node("a", used=160),
        node("b", used=10, running=4),
        node("c", used=0),
        node("d", used=60),
        loans=(Loan("d>c", "d", "c", 20, 1.0),),
    )
    assert POOLED.creditors(books, "a", 200, (), False) == [("b", 144), ("d", 80), ("c", 144)]
    assert POOLED.creditors(books, "a", 70, (), False) == [("b", 144)]
    assert POOLED.creditors(books, "a", 200, ("b", "c"), False) == [("d", 80)]
    assert POOLED.creditors(books, "c", 1, (), False) == [("d", 80)], "who lends to it already comes first"
    assert POOLED.creditors(books, "a", 1, ("b", "c", "d"), False) == Refused(
        "a needs 1 more block; 0 other workers may lend 0 in all, and none of them is free now"
    )
    assert POOLED.creditors(ledger(node("a"), node("b", used=150, running=10)), "a", 5, (), False) != [("b", 0)]


def test_only_proactive_orders_what_nobody_asked_for() -> None:
    layout = (Span("a", 0, 2560),)
    books = rebuild(
        1, [Report(node("a", used=160, running=1, waiting=40, wanted=40), (), {"long": layout}), Report(node("b"))]
    )
    ordering = {policy.name for policy in POLICIES.values() if policy.plan(books, Costs(LLAMA_H100), 16)}
    assert ordering == {"proactive"}


def test_an_unknown_policy_is_refused_by_name() -> None:
    assert named("pooled") is POOLED
    with pytest.raises(BadRequest, match=r"isolated, pooled, proactive, not 'greedy'") as caught:
        named("greedy")
    assert caught.value.field == "policy"
