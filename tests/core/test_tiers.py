"""Host memory is lent last, and what lies there comes back as room appears and where the model says that it pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from infinillm.core.cost import Cost, Costs, Curve
from infinillm.core.ledger import Lent, Report, apply, check, rebuild
from infinillm.core.policy import POLICIES
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.policy.tiers import GROWTH, STEPS
from infinillm.core.types import Layout, Ledger, Loan, Node, Span
from tests.core.test_cost import LLAMA_H100

POOLED, PROACTIVE = POLICIES["pooled"], POLICIES["proactive"]
SIZE = 16


def node(name: str, blocks: int = 100, **more: int | bool | str) -> Node:
    return Node(name, "1", f"{name}:1", blocks=blocks, lendable=blocks * 9 // 10, **more)  # type: ignore[arg-type]


def host(blocks: int = 1000, **more: int) -> Node:
    return Node("h", "1", "h:1", blocks=blocks, lendable=blocks, serves=False, tier="host", **more)


def spilled(home: Node, tokens: int, *others: Node, lent: int = 0, at_home: int = 50) -> Ledger:
    """A request of `home` has its first 16 `at_home` tokens there, and the others in host memory."""
    loan = Loan("h>a", "h", "a", lent or -(-tokens // SIZE), 1.0, -(-tokens // SIZE))
    layout = (Span("a", 0, SIZE * at_home), Span("h", SIZE * at_home, SIZE * at_home + tokens))
    books = rebuild(
        1, [Report(home, (), {"s": layout}), Report(host(), (loan,)), *(Report(each, (), {}) for each in others)]
    )
    check(books)
    return books


def ordered(books: Ledger, cost: Cost | None = None, own: Mapping[str, Cost] | None = None) -> list[MoveBlocks]:
    found = POOLED.plan(books, Costs(cost, own or {}), SIZE)
    assert PROACTIVE.plan(books, Costs(cost, own or {}), SIZE)[: len(found)] == found
    return [order for order in found if isinstance(order, MoveBlocks)]


def told(orders: list[MoveBlocks]) -> list[tuple[str, str, int]]:
    assert {(order.home, order.seq) for order in orders} <= {("a", "s")}
    return [(order.source, order.target, order.blocks) for order in orders]


# --- lending ---------------------------------------------------------------------------------------------------------


def test_devices_lend_first_even_where_host_memory_lends_already() -> None:
    books = spilled(node("a", used=100, running=1), 160, node("b"), node("c", used=50))
    assert POOLED.creditors(books, "a", 60, (), False) == [("b", 90), ("c", 50)]
    assert POOLED.creditors(books, "a", 100, (), False) == [("b", 90), ("c", 50), ("h", 990)]
    assert POOLED.reach(books, "a", SIZE) == (100 + 90 + 90 + 1000) * SIZE, "it counts: a request may spill there"


def test_proactive_makes_room_on_devices_first() -> None:
    layouts: dict[str, Layout] = {"long": (Span("a", 0, 1600),)}
    full = Report(node("a", used=100, running=1, waiting=40, wanted=40), (), layouts)
    devices = rebuild(1, [full, Report(node("b", 30), (), {}), Report(host(), ())])
    targets = [
        order.target for order in PROACTIVE.plan(devices, Costs(LLAMA_H100), SIZE) if isinstance(order, MoveBlocks)
    ]
    assert targets == ["b", "h"]


# --- coming back -----------------------------------------------------------------------------------------------------


def test_nothing_moves_while_there_is_no_room_on_a_device() -> None:
    assert not ordered(spilled(node("a", used=100, running=1), 160, node("b", used=99, running=1)))


@pytest.mark.parametrize(
    ("free", "running", "wanted", "blocks"),
    [(30, 1, 0, 10), (8, 1, 0, 7), (30, 1, 25, 4), (30, 1, 29, 0), (30, 1, 60, 0), (1, 1, 0, 0), (30, 27, 0, 3)],
)
def test_what_lies_on_the_host_comes_home_as_far_as_nobody_else_needs_the_room(
    free: int, running: int, wanted: int, blocks: int
) -> None:
    home = node("a", used=100 - free, running=running, waiting=wanted and 1, wanted=wanted)
    assert told(ordered(spilled(home, 161))) == ([("h", "a", blocks)] if blocks else [])


def test_the_block_it_writes_into_stays() -> None:
    assert told(ordered(spilled(node("a", used=50, running=1), 160))) == [("h", "a", 9)]
    assert not ordered(spilled(node("a", used=50, running=1), 16))


def test_where_home_is_full_its_blocks_make_room_on_a_device() -> None:
    """What lies on the host takes their place: no block travels by way of a full home."""
    books = spilled(node("a", used=100, running=1), 161, node("b", used=50), node("c", used=70))
    assert told(ordered(books)) == [("a", "b", 10 + GROWTH), ("h", "a", 10)]
    scarce = spilled(node("a", used=100, running=1), 161, node("b", used=96))
    assert told(ordered(scarce)) == [("a", "b", 4), ("h", "a", 4)]
    some = spilled(node("a", used=96, running=1), 161, node("b", used=50))
    assert told(ordered(some)) == [("a", "b", 7 + GROWTH), ("h", "a", 10)]
    little = spilled(node("a", used=100, running=1), 161, node("b"), at_home=3)
    assert told(ordered(little)) == [("a", "b", 3), ("h", "a", 3)]


@pytest.mark.parametrize(
    "other",
    [node("b", waiting=1), node("b", draining=True), node("b", tier="host"), node("b", used=90, running=10)],
    ids=["its own queue", "it leaves", "no device", "no room"],
)
def test_a_node_that_needs_its_room_is_no_creditor(other: Node) -> None:
    assert not ordered(spilled(node("a", used=100, running=1), 161, other))


@pytest.mark.parametrize(("used", "blocks"), [(0, 10 + GROWTH), (1, 0)])
def test_a_node_that_lives_on_borrowed_blocks_is_none_either(used: int, blocks: int) -> None:
    books = spilled(node("a", used=100, running=1), 161, node("b"))
    borrowing = apply(books, Lent(Loan("h>b", "h", "b", 5, 1.0, used)))
    assert sum(order.blocks for order in ordered(borrowing) if order.target == "b") == blocks


def test_a_home_waits_for_what_is_on_its_way() -> None:
    books = spilled(node("a", used=100, running=1), 161, node("b"), lent=50)
    assert told(ordered(books)) == [("a", "b", 10 + GROWTH), ("h", "a", 10)], (
        "what the host lends beyond is of no matter"
    )
    lent = apply(books, Lent(Loan("b>a", "b", "a", 20, 1.0, 19)))
    assert not ordered(lent)


def test_a_home_that_leaves_or_has_a_queue_makes_no_room_elsewhere() -> None:
    assert not ordered(spilled(node("a", used=100, running=1, waiting=1, wanted=1), 161, node("b")))
    assert not ordered(spilled(node("a", used=50, running=1, draining=True), 161))


# --- what the model says ---------------------------------------------------------------------------------------------


def line(start: float, each: float) -> Curve:
    return Curve(((0.0, start), (1e6, start + each * 1e6)))


FREE = line(0.0, 0.0)
DEVICE = replace(
    LLAMA_H100, dense=FREE, attention=line(0, 1e-6), question=line(1e-3, 0), merging=FREE, move=line(0, 1e-7)
)
SLOW = replace(DEVICE, attention=line(0, 1e-4))


def test_slow_memory_is_left_and_quick_memory_that_reads_beside_home_is_kept() -> None:
    """Of 2,400 tokens home reads 800 in 0.8 ms. The host's 1,600 take it 161 ms, or 2.6 where it is as quick."""
    books = spilled(node("a", 300, used=50, running=1), 1601)
    assert told(ordered(books, DEVICE, {"h": SLOW})) == [("h", "a", 100)]
    quick = replace(DEVICE, question=FREE)
    even = spilled(node("a", 300, used=50, running=1), 801)
    assert not ordered(even, quick), "both read 800 tokens at once; home alone would read for twice as long"
    assert told(ordered(books, quick)) == [("h", "a", 25)], "the most, by halves, of what saves anything"


@pytest.mark.parametrize("times", [0.99, 1.01])
def test_a_move_saves_more_in_so_many_steps_than_it_takes(times: float) -> None:
    books = spilled(node("a", 300, used=50, running=1), 161)
    saved = (1e-3 + 161 * 1e-4) - (1e-3 + 1e-4)  # a question and reading 161 tokens, or only 1
    dear = replace(DEVICE, move=line(saved * STEPS * times / 2, saved * STEPS * times / 2 / 160))
    assert bool(told(ordered(books, dear, {"h": SLOW}))) == (times < 1)


def test_a_creditor_that_reads_for_others_slows_its_own() -> None:
    def books(running: int) -> Ledger:
        return spilled(node("a", used=100, running=1), 161, node("b", used=50, running=running))

    busy = replace(DEVICE, attention=line(0, 9e-5))
    assert told(ordered(books(0), DEVICE, {"h": SLOW, "b": busy})) == [("a", "b", 10 + GROWTH), ("h", "a", 10)]
    assert told(ordered(books(1), DEVICE, {"h": SLOW, "b": busy})) == [("a", "b", 5), ("h", "a", 5)]
