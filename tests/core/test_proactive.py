"""Policy proactive: the four instances of figure 5 of the Infinite-LLM paper, and what must hold of every plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from infinillm.core.cost import Cost, Costs, Curve
from infinillm.core.ledger import Report, check, rebuild
from infinillm.core.policy import POLICIES
from infinillm.core.policy.orders import MoveBlocks, offer
from infinillm.core.policy.proactive import make_room, throughput
from infinillm.core.types import Layout, Ledger, Loan, Node, NodeId, Refused, Span
from tests.core.test_cost import LLAMA_H100, QWEN_H100

PROACTIVE, POOLED = POLICIES["proactive"], POLICIES["pooled"]
BLOCK = 16

# --- figure 5 --------------------------------------------------------------------------------------------------------

# How busy the dense part keeps a GPU, by batch: read off the figure, to 0.02 (arXiv 2401.02669).
BUSY = Curve(
    (
        (1, 0.05),
        (45, 0.12),
        (103, 0.27),
        (131, 0.33),
        (156, 0.37),
        (250, 0.52),
        (400, 0.56),
        (443, 0.57),
        (454, 0.575),
        (510, 0.60),
    )
)
PAPER = {"a": 1.47, "b": 1.31, "c": 1.85}  # sums over the four instances
ORIGINAL = {"A": 1, "B": 443, "C": 454, "D": 103}
PASSIVE = {"A": 1, "B": 443, "C": 454, "D": 45}
SHORT = 4  # blocks of one short request
BLOCKS = 2700  # of each instance; the paper gives batches, not memory
# Seconds of a step are its batch over how busy it keeps the GPU; attention keeps it busy hardly at all.
A100 = replace(
    LLAMA_H100,
    dense=Curve(tuple((batch, batch / busy * 1e-4) for batch, busy in BUSY.points)),
    attention=Curve(((0, 0.0), (1 << 20, 1e-5))),
)


def sum_of(batches: dict[NodeId, int]) -> float:
    return sum(BUSY(batch) for batch in batches.values())


def instance(name: str, shorts: int, waiting: int, long: int = 0) -> Report:
    """`shorts` short requests and one long one of so many blocks, if any; `waiting` short ones for which more room is
    needed."""
    layouts: dict[str, Layout] = {f"{name}-{i}": (Span(name, 0, SHORT * BLOCK),) for i in range(shorts)}
    if long:
        layouts[f"{name}-long"] = (Span(name, 0, long * BLOCK),)
    return Report(
        Node(
            name,
            "1",
            f"{name}:1",
            blocks=BLOCKS,
            lendable=BLOCKS * 9 // 10,
            used=SHORT * shorts + long,
            running=len(layouts),
            waiting=waiting,
            wanted=SHORT * waiting,
        ),
        (),
        layouts,
    )


def test_figure_5_reaches_the_proactive_placement(capsys: pytest.CaptureFixture[str]) -> None:
    """A is full of one long request, D of one that has grown; B and C have room, and enough short requests wait."""
    books = rebuild(
        1,
        [
            instance("A", 0, 130, long=BLOCKS),
            instance("B", 443, 0),
            instance("C", 454, 0),
            instance("D", 102, 53, long=BLOCKS - 102 * SHORT),
        ],
    )
    assert POOLED.plan(books, Costs(A100), BLOCK) == ()
    orders = make_room(books, Costs(A100), BLOCK)
    after = done(books, orders)
    batches = {n.id: n.running + min(n.waiting, n.free // SHORT) for n in after.nodes.values()}
    assert batches == {"A": 131, "B": 443, "C": 454, "D": 156}

    sums = {"a": sum_of(ORIGINAL), "b": sum_of(PASSIVE), "c": sum_of(batches)}
    with capsys.disabled():
        print("\nutilisation of the four instances, ours (the paper's):", end="")
        print("".join(f"  ({state}) {sums[state]:.2f} ({PAPER[state]})" for state in PAPER))
    assert sums == pytest.approx(PAPER, abs=0.02)
    assert {(o.home, o.seq) for o in orders if isinstance(o, MoveBlocks)} == {("A", "A-long"), ("D", "D-long")}
    assert {o.target for o in orders if isinstance(o, MoveBlocks)} == {"B", "C"}


# --- every plan ------------------------------------------------------------------------------------------------------


def done(ledger: Ledger, orders: Iterable[MoveBlocks]) -> Ledger:
    """The ledger after the orders were carried out, each oldest blocks first: told anew by every node."""
    nodes = {**ledger.nodes}
    loans = {**ledger.loans}
    layouts = {home: dict(told) for home, told in ledger.layouts.items()}
    for o in orders:
        assert isinstance(o, MoveBlocks)
        home = nodes[o.home]
        nodes[o.home] = replace(home, used=home.used - o.blocks)
        name = f"{o.target}>{o.home}"
        loan = loans.get(name, Loan(name, o.target, o.home, 0, 1.0))
        loans[name] = replace(loan, blocks=loan.blocks + o.blocks, used=loan.used + o.blocks)
        left, spans = o.blocks * BLOCK, []
        for span in layouts[o.home][o.seq]:
            moved = min(left, (span.stop - span.start) // BLOCK * BLOCK) if span.node == o.source else 0
            left -= moved
            if moved:
                spans.append(Span(o.target, span.start, span.start + moved))
            if span.start + moved < span.stop:
                spans.append(replace(span, start=span.start + moved))
        assert left == 0, "there were not so many full blocks"
        layouts[o.home][o.seq] = tuple(spans)
    reports = (
        Report(n, tuple(loan for loan in loans.values() if loan.lender == n.id), layouts.get(n.id, {}))
        for n in nodes.values()
    )
    return rebuild(ledger.epoch, reports)


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    """Nodes full and empty, with long and short requests, queues, and loans in use."""
    names = [f"n{i}" for i in range(draw(st.integers(1, 6)))]
    blocks = {name: draw(st.integers(8, 400)) for name in names}
    cap = {name: draw(st.integers(0, blocks[name])) for name in names}
    room = dict(blocks)
    loans: list[Loan] = []
    layouts: dict[NodeId, dict[str, Layout]] = {name: {} for name in names}
    held = dict.fromkeys(names, 0)
    for name in names:
        for i in range(draw(st.integers(0, 4))):
            mine = draw(st.integers(0, room[name]))
            room[name] -= mine
            held[name] += mine
            spans = [Span(name, 0, mine * BLOCK - draw(st.integers(0, BLOCK - 1)))] if mine else []
            lender = draw(st.sampled_from(names))
            most = min(room[lender], cap[lender] - sum(loan.blocks for loan in loans if loan.lender == lender))
            loan = f"{lender}>{name}"
            if lender != name and most > 0 and loan not in {each.id for each in loans} and draw(st.booleans()):
                lent = draw(st.integers(1, most))
                room[lender] -= lent
                loans.append(Loan(loan, lender, name, lent, 1.0, lent))
                spans.append(Span(lender, mine * BLOCK, (mine + lent) * BLOCK))
            if spans:
                layouts[name][f"{name}-{i}"] = tuple(spans)
    reports = []
    for name in names:
        serves = bool(layouts[name]) or draw(st.booleans())
        waiting = draw(st.integers(0, 80)) if serves else 0
        node = Node(
            name,
            "1",
            f"{name}:1",
            blocks=blocks[name],
            lendable=cap[name],
            used=held[name],
            serves=serves,
            draining=draw(st.integers(0, 7)) == 0,
            running=len(layouts[name]),
            waiting=waiting,
            wanted=waiting * draw(st.integers(1, 20)),
        )
        reports.append(Report(node, tuple(loan for loan in loans if loan.lender == name), layouts[name]))
    return rebuild(1, reports)


def curves(least: float) -> st.SearchStrategy[Curve]:
    steps = st.lists(st.floats(0, 0.05), min_size=3, max_size=3)
    return st.builds(
        lambda start, rises: Curve(tuple(zip((1.0, 8.0, 64.0, 512.0), accumulate(rises, initial=start), strict=True))),
        st.floats(least, 0.05),
        steps,
    )


profiles: st.SearchStrategy[Cost] = st.builds(
    lambda dense, attention, question: replace(LLAMA_H100, dense=dense, attention=attention, question=question),
    curves(0.001),
    curves(0.0),
    curves(0.0),
)
mixes = st.builds(
    Costs,
    st.one_of(st.none(), st.just(LLAMA_H100), profiles),
    st.dictionaries(st.sampled_from(["n0", "n1", "n2", "n3"]), st.one_of(st.just(QWEN_H100), profiles)),
)


@given(ledgers(), mixes)
def test_every_order_gains_within_caps_and_nothing_cascades(books: Ledger, costs: Costs) -> None:
    check(books)
    orders = make_room(books, costs, BLOCK)
    assert orders == make_room(books, costs, BLOCK)
    event(f"{min(len(orders), 3)} orders")
    moves = [order for order in orders if isinstance(order, MoveBlocks)]
    assert len(moves) == len(orders)
    rate = throughput(books, costs, BLOCK)
    for order in moves:
        assert order.blocks > 0
        assert order.source == order.home != order.target
        assert order.blocks <= offer(books.nodes[order.target]), "beyond its cap, or what its own requests need"
        books = done(books, [order])
        check(books)
        later = throughput(books, costs, BLOCK)
        assert later > rate
        assert later - rate == pytest.approx(float(order.reason.split()[-2]), abs=0.051)  # what it was ordered for
        rate = later
    homes, targets = {order.home for order in moves}, {order.target for order in moves}
    assert not homes & targets
    for name in targets:
        assert not books.nodes[name].borrowed, "a node that borrows lends nothing new"
        assert not books.nodes[name].draining
    for name in homes | targets:
        assert costs.of(name) is not None


@given(ledgers(), mixes)
def test_planning_again_comes_to_an_end(books: Ledger, costs: Costs) -> None:
    for _ in range(20):
        orders = make_room(books, costs, BLOCK)
        if not orders:
            return
        books = done(books, orders)
    assert not make_room(books, costs, BLOCK)


@given(ledgers())
def test_without_a_profile_nothing_is_ordered(books: Ledger) -> None:
    assert make_room(books, Costs(), BLOCK) == ()
    assert throughput(books, Costs(), BLOCK) == 0


@given(ledgers(), st.integers(1, 500))
def test_besides_it_is_pooled(books: Ledger, blocks: int) -> None:
    assert PROACTIVE.capacity(books, BLOCK) == POOLED.capacity(books, BLOCK)
    assert PROACTIVE.route(books, 10, 20, BLOCK, ()) == POOLED.route(books, 10, 20, BLOCK, ()), "it fits any home"
    for name in books.nodes:
        named, theirs = (p.creditors(books, name, blocks, (), True) for p in (PROACTIVE, POOLED))
        if not isinstance(theirs, Refused):
            assert not isinstance(named, Refused)
            assert named[: len(theirs)] == theirs
        assert PROACTIVE.reach(books, name, BLOCK) == POOLED.reach(books, name, BLOCK)


# --- one move --------------------------------------------------------------------------------------------------------


def pair(cost: Cost, *, waiting: int, other: int = 0, cap: int = 300) -> tuple[MoveBlocks, ...]:
    """What is ordered where `a` is full of one request of 100 blocks and requests of 5 wait; `b` runs `other`."""
    a = Node("a", "1", "a:1", 100, 90, used=100, running=1, waiting=waiting, wanted=5 * waiting)
    b = Node("b", "1", "b:1", 300, cap, used=other, running=other)
    layouts: dict[str, Layout] = {f"b-{i}": (Span("b", 0, 16),) for i in range(other)}
    books = rebuild(1, [Report(a, (), {"long": (Span("a", 0, 1600),)}), Report(b, (), layouts)])
    return tuple(o for o in make_room(books, Costs(cost), BLOCK) if isinstance(o, MoveBlocks))


FREE = Curve(((0, 0.0), (1, 0.0)))
STEP = replace(LLAMA_H100, dense=Curve(((0, 1.0), (100, 1.0))), attention=FREE, question=FREE, merging=FREE)


@pytest.mark.parametrize(
    ("waiting", "cap", "blocks"),
    [(1, 300, 5), (7, 300, 35), (19, 300, 95), (100, 300, 95), (100, 33, 30), (100, 4, 0), (0, 300, 0)],
)
def test_as_much_as_lets_requests_in_moves_and_no_more(waiting: int, cap: int, blocks: int) -> None:
    """At most 99 of the 100: the block it writes into stays."""
    orders = pair(STEP, waiting=waiting, cap=cap)
    assert sum(o.blocks for o in orders) == blocks
    assert not orders or (orders[0].home, orders[0].seq, orders[0].target) == ("a", "long", "b")


def test_a_creditor_pays_for_what_it_reads() -> None:
    """Reading a block costs `b`, with its 40 requests, more and more; the best count lies in between, then nowhere."""
    found = []
    for each in (0.0, 1e-4, 3e-4, 1e-3, 1e-2):
        reading = Curve(((0, 0.0), (1e6, 1e6 * each)))
        found.append(sum(o.blocks for o in pair(replace(STEP, attention=reading), waiting=19, other=40)))
    assert found[0] == 95
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_a_home_waits_for_what_is_on_its_way() -> None:
    def told(used: int) -> Ledger:
        a = Node("a", "1", "a:1", 100, 90, used=100, running=1, waiting=9, wanted=45)
        b, c = (Node(name, "1", f"{name}:1", 300, 300) for name in ("b", "c"))
        layouts: dict[str, Layout] = {"long": (Span("b", 0, 16 * used), Span("a", 16 * used, 1600 + 16 * used))}
        return rebuild(1, [Report(a, (), layouts), Report(b, (Loan("b>a", "b", "a", 20, 1.0, used),)), Report(c)])

    assert not make_room(told(19), Costs(STEP), BLOCK)
    assert make_room(told(20), Costs(STEP), BLOCK)


def short_of(name: str, running: int) -> Report:
    """A node full of one request of 90 blocks and, in 10 blocks, others; 19 requests of one block wait."""
    layouts: dict[str, Layout] = {f"{name}-{i}": (Span(name, 0, 16),) for i in range(running - 1)}
    layouts[f"{name}-long"] = (Span(name, 0, 90 * BLOCK),)
    return Report(Node(name, "1", f"{name}:1", 100, 90, 100, running=running, waiting=19, wanted=19), (), layouts)


def test_a_node_that_borrows_lends_nothing_new() -> None:
    owing = Report(Node("b", "1", "b:1", 300, 300, used=10, running=1), (), {})
    lender = Report(Node("c", "1", "c:1", 8, 8), (Loan("c>b", "c", "b", 8, 1.0, 8),))
    assert not make_room(rebuild(1, [short_of("a", 3), owing, lender]), Costs(STEP), BLOCK)
    assert make_room(rebuild(1, [short_of("a", 3), owing]), Costs(STEP), BLOCK)


def test_the_smallest_batch_comes_first() -> None:
    room = Report(Node("z", "1", "z:1", 19, 19), (), {})
    orders = make_room(rebuild(1, [short_of("a", 9), short_of("b", 2), room]), Costs(STEP), BLOCK)
    assert [(o.home, o.blocks) for o in orders if isinstance(o, MoveBlocks)] == [("b", 19)]


def test_a_question_that_takes_too_long_is_not_asked() -> None:
    slow = replace(STEP, question=Curve(((0, 50.0), (1, 50.0))))
    assert pair(STEP, waiting=19)
    assert not pair(slow, waiting=19)


def test_the_best_count_is_found_among_many() -> None:
    """The dense part is flat up to a batch of 37, then steep: 36 of 400 that wait are let in."""
    steep = replace(STEP, dense=Curve(((1, 1.0), (37, 1.0), (38, 1.5), (1000, 900.0))))
    a = Node("a", "1", "a:1", 900, 90, used=900, running=1, waiting=400, wanted=400)
    books = rebuild(1, [Report(a, (), {"long": (Span("a", 0, 14400),)}), Report(Node("b", "1", "b:1", 900, 900))])
    (order,) = make_room(books, Costs(steep), BLOCK)
    assert isinstance(order, MoveBlocks)
    assert order.blocks == 36
    assert order.reason == "room for 36 waiting requests, +36.0 tokens/s"


def test_a_debtor_goes_on_to_its_next_request_and_the_next_creditor() -> None:
    layouts: dict[str, Layout] = {"one": (Span("a", 0, 30 * BLOCK),), "two": (Span("a", 0, 50 * BLOCK),)}
    a = Node("a", "1", "a:1", 80, 0, used=80, running=2, waiting=60, wanted=60)
    books = rebuild(
        1, [Report(a, (), layouts), *(Report(Node(n, "1", f"{n}:1", 40, 40), (), {}) for n in ("b", "c", "d"))]
    )
    orders = make_room(books, Costs(STEP), BLOCK)
    told = [(o.seq, o.target, o.blocks) for o in orders if isinstance(o, MoveBlocks)]
    assert told == [("two", "b", 40), ("one", "c", 20)]
