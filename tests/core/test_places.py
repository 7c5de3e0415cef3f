"""Nodes of one place have the quicker links: who is asked first, and what goes to another place at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infinillm.core.cost import Cost, Costs, Curve
from infinillm.core.ledger import Report, rebuild
from infinillm.core.policy import POLICIES, isolated
from infinillm.core.policy.orders import MoveBlocks, by_rank
from infinillm.core.policy.places import too_far
from infinillm.core.policy.proactive import make_room
from infinillm.core.policy.site import Site, lending_rates
from infinillm.core.scheduler import Budget
from infinillm.core.types import HOST, Layout, Ledger, Loan, Node, Refused, Span
from infinillm.sim.hardware import cluster, read_size
from infinillm.sim.simulation import Simulation
from tests.core.test_cost import LLAMA_H100

BLOCK = 16
FREE = Curve(((0, 0.0), (1, 0.0)))
NEAR = replace(LLAMA_H100, dense=Curve(((0, 1.0), (100, 1.0))), attention=FREE, question=FREE, merging=FREE)
FAR = replace(NEAR, question=Curve(((0, 50.0), (1, 50.0))))


def node(name: str, place: str, blocks: int = 100, **more: int | str) -> Node:
    return Node(name, "1", f"{place}:{name}", blocks, lendable=blocks, **more)  # type: ignore[arg-type]


def ledger(*nodes: Node, loans: tuple[Loan, ...] = ()) -> Ledger:
    return rebuild(1, [Report(n, tuple(loan for loan in loans if loan.lender == n.id)) for n in nodes])


def test_the_address_tells_the_place() -> None:
    found = [replace(node("a", ""), address=each).place for each in ("10.0.0.7:7001", "[::1]:7001", "n3", "")]
    assert found == ["10.0.0.7", "[::1]", "", ""]


def test_nodes_of_the_same_place_lend_first() -> None:
    books = ledger(
        node("home", "one"),
        node("far", "two", 900),
        node("near", "one", 50),
        node("memory", "one", 999, tier=HOST),
        loans=(Loan("far>home", "far", "home", 10, 1.0),),
    )
    assert [name for name, _ in by_rank(books, "home", ())] == ["near", "far", "memory"]
    assert [name for name, _ in by_rank(books, "elsewhere", ())] == ["far", "near", "home", "memory"]


def test_where_the_place_has_enough_no_other_is_named() -> None:
    books = ledger(node("home", "one"), node("far", "two", 900), node("near", "one", 50))
    for policy in (POLICIES["pooled"], POLICIES["proactive"]):
        assert policy.creditors(books, "home", 25, (), False) == [("near", 50)]
        assert policy.creditors(books, "home", 26, (), False) == [("near", 50), ("far", 900)]


def test_a_request_that_outgrows_every_node_goes_to_the_roomiest_place() -> None:
    books = ledger(
        node("a", "one", used=60), node("b", "one", used=60), node("c", "two", used=40), node("d", "two", used=90)
    )
    for policy in (POLICIES["pooled"], POLICIES["proactive"]):
        assert policy.route(books, 1600, 1600, BLOCK, ()) == "c", "it fits one, so only that one counts"
        assert policy.route(books, 1601, 1601, BLOCK, ()) in ("a", "b")
        assert policy.route(books, 1601, 1601, BLOCK, ("a", "b")) == "c"
    queue = replace(books.nodes["a"], waiting=1, wanted=11)
    longer = replace(books, nodes={**books.nodes, "a": queue})
    assert POLICIES["pooled"].route(longer, 1601, 1601, BLOCK, ()) == "c"


def test_in_turn_goes_by_requests_and_not_by_memory() -> None:
    books = ledger(
        node("a", "one", used=0, running=3), node("b", "one", used=99, running=1, waiting=1), node("c", "one", 9)
    )
    assert isolated.route(books, 160, 160, BLOCK, ()) == "a"
    assert isolated.in_turn(books, 160, 160, BLOCK, ()) == "b"
    assert isolated.in_turn(books, 160, 160, BLOCK, ("b",)) == "a"
    assert isolated.in_turn(books, 9 * BLOCK, 9 * BLOCK, BLOCK, ()) == "c"
    refused = isolated.in_turn(books, 1601, 1601, BLOCK, ())
    assert refused == isolated.route(books, 1601, 1601, BLOCK, ())
    assert isinstance(refused, Refused)


def test_a_node_costs_what_the_way_to_it_costs() -> None:
    a, b, c = node("a", "one"), node("b", "one"), node("c", "two")
    costs = Costs(None, {"a": FAR, "b": FAR}, {"b": NEAR})
    assert costs.between(a, b) is NEAR
    assert costs.between(b, a) is FAR, "nobody measured it otherwise"
    assert costs.between(c, b) is FAR
    assert costs.between(a, c) is None


def home_of(requests: int, costs: Costs, *, lent: int = 0, place: str = "two") -> frozenset[str]:
    """Who is too far from a home that runs so many requests, one of which lies at `far` in part."""
    home = replace(node("home", "one"), used=90, running=requests)
    spans = (Span("far", 0, 16 * lent), Span("home", 16 * lent, 16 * lent + 160)) if lent else (Span("home", 0, 160),)
    loans = (Loan("far>home", "far", "home", lent, 1.0, lent),) if lent else ()
    others = [Report(node("far", place, 300), loans), Report(node("near", "one"))]
    return too_far(rebuild(1, [Report(home, (), {"some": spans}), *others]), costs, "home", BLOCK)


def test_a_slow_way_is_for_few_requests_only() -> None:
    """A step takes one second, an answer from afar a tenth: it holds eleven up for longer than one is worth."""
    slow = replace(NEAR, question=Curve(((0, 0.1), (1, 0.1))))
    assert home_of(9, both(slow, NEAR)) == frozenset()
    assert home_of(11, both(slow, NEAR)) == {"far"}
    assert home_of(11, both(slow, NEAR), place="one") == frozenset(), "near ways are quick, whatever the address"
    assert home_of(11, both(NEAR, NEAR)) == home_of(11, Costs()) == home_of(0, both(slow, NEAR)) == frozenset()


def test_a_way_that_is_used_in_every_step_anyway_costs_less() -> None:
    slow = replace(NEAR, question=Curve(((0, 0.1), (1, 0.1))))
    assert home_of(11, both(slow, NEAR), lent=5) == frozenset()
    by_row = replace(NEAR, question=Curve(((0, 0.0), (1, 0.1))))
    assert home_of(12, both(by_row, NEAR), lent=5) == {"far"}


@pytest.mark.parametrize(("waiting", "far"), [(0, frozenset()), (3, {"far"})])
def test_a_prompt_that_would_take_long_on_its_way_waits(waiting: int, far: set[str]) -> None:
    """Eight run, a step takes a second: a prompt of 160 tokens takes 16 seconds there, or 128 tokens of the others."""
    slow = replace(NEAR, question=Curve(((0, 0.0), (1, 0.1))), move=FREE)
    home = replace(node("home", "one"), used=90, running=8, waiting=waiting, wanted=10 * waiting)
    books = ledger(home, node("far", "two", 300), node("near", "one"))
    assert too_far(books, both(slow, NEAR), "home", BLOCK) == far
    quick = replace(slow, question=Curve(((0, 0.0), (1, 0.04))))
    assert too_far(books, both(quick, NEAR), "home", BLOCK) == frozenset()


def test_who_is_not_known_or_runs_nothing_finds_nobody_too_far() -> None:
    assert too_far(ledger(node("a", "one"), node("b", "two")), both(FAR, NEAR), "a", BLOCK) == frozenset()
    assert too_far(ledger(node("b", "two")), both(FAR, NEAR), "a", BLOCK) == frozenset()


def orders(costs: Costs, *lenders: Node) -> list[tuple[str, int]]:
    """Where blocks go from `home`, which is full of one request of 100 blocks while 19 of 5 blocks wait."""
    home = replace(node("home", "one"), used=100, running=1, waiting=19, wanted=95)
    layouts: dict[str, Layout] = {"long": (Span("home", 0, 1600),)}
    books = rebuild(1, [Report(home, (), layouts), *map(Report, lenders)])
    found = make_room(books, costs, BLOCK)
    return [(o.target, o.blocks) for o in found if isinstance(o, MoveBlocks)]


def both(cost: Cost, near: Cost) -> Costs:
    return Costs(cost, {}, dict.fromkeys(("near", "far", "other"), near))


def test_room_is_made_in_the_same_place_first() -> None:
    far, near = node("far", "two", 300), node("near", "one", 40)
    assert orders(both(NEAR, NEAR), far, near) == [("near", 40), ("far", 55)]
    assert orders(both(NEAR, NEAR), far, replace(near, blocks=200, lendable=200)) == [("near", 95)]


def test_nothing_goes_where_the_way_costs_more_than_waiting() -> None:
    far, near, other = node("far", "two", 300), node("near", "one", 40), node("other", "one", 30)
    assert orders(both(FAR, NEAR), far) == []
    assert orders(both(FAR, NEAR), far, near) == [("near", 40)]
    assert orders(both(FAR, NEAR), far, near, other) == [("near", 40), ("other", 30)]
    assert orders(both(FAR, FAR), far, near) == []


def test_what_lies_far_already_counts_at_the_cost_of_its_way() -> None:
    """A home that asks far in every step anyway gains less from room."""
    home = replace(node("home", "one"), used=100, running=1, waiting=19, wanted=95)
    layouts: dict[str, Layout] = {"long": (Span("far", 0, 160), Span("home", 160, 1760))}
    far = Report(node("far", "two", 300), (Loan("far>home", "far", "home", 10, 1.0, 10),))
    books = rebuild(1, [Report(home, (), layouts), far, Report(node("near", "one", 40))])
    quick, slow = (make_room(books, costs, BLOCK)[0] for costs in (both(NEAR, NEAR), both(FAR, NEAR)))
    assert (quick.target, slow.target) == ("near", "near")
    gains = [float(order.reason.split()[-2]) for order in (quick, slow)]
    assert gains[0] > 10 * gains[1]


def test_what_a_lender_comes_to_is_told_for_many_counts_at_once() -> None:
    site = Site(LLAMA_H100, 3, 4, 5, 22, 40, 7, {"b": (LLAMA_H100, frozenset({"s"}), 800)})
    rates = lending_rates(site, BLOCK)
    assert [rates(n) for n in range(23)] == [site.lending(n).rate(BLOCK) for n in range(23)]
    assert len(set(map(rates, range(23)))) > 4
    assert lending_rates(Site(LLAMA_H100, 0, 0, 1, 9, 0, 0, {}), BLOCK)(5) == 0.0


def test_a_plan_of_many_orders_goes_on_in_the_next() -> None:
    homes = [
        Report(
            replace(node(f"h{n}", "one"), used=100, running=100 - n, waiting=9, wanted=45),
            (),
            {f"s{n}": (Span(f"h{n}", 0, 1600),)},
        )
        for n in range(40)
    ]
    found = make_room(rebuild(1, [*homes, Report(node("roomy", "one", 99_999))]), Costs(NEAR), BLOCK)
    assert [each.home for each in found] == [f"h{n}" for n in range(39, 7, -1)], "the smallest batches first"


@pytest.mark.parametrize("policy", ["pooled", "proactive"])
def test_the_simulator_asks_as_the_controller_does(policy: str) -> None:
    """Four A100 in two servers, 125 MB/s between them; the first has 64 short requests."""
    size = read_size("Llama-2-7B", BLOCK, "float16")
    place = cluster("2x2xA100@infinite-llm", size)
    world = Simulation(place, POLICIES[policy], Budget(2048, 256, BLOCK), lend_fraction=0.9, beat_seconds=0.5)
    full = replace(world.ledger.nodes["n0"], used=64, running=64)
    world.ledger = replace(world.ledger, nodes={**world.ledger.nodes, "n0": full})
    far = {"n2", "n3"}
    refused = world.creditors("n0", 5, {"n1"}, False).offers
    assert isinstance(refused, Refused)
    offers = world.creditors("n0", 5, {"n1"}, True).offers
    assert not isinstance(offers, Refused)
    assert {name for name, _ in offers} <= far
