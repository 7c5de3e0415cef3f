"""What the policy orders without being asked reaches the home it concerns, once, and nobody else."""

import asyncio
from dataclasses import replace

import pytest

from infinillm import rpc, wire
from infinillm.core.cost import Curve
from infinillm.core.ledger import Report
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.types import Span
from infinillm.errors import BadRequest
from infinillm.protos import controller_pb2 as pb
from tests.core.test_cost import LLAMA_H100
from tests.servers.test_controller import MODEL, SOON, Member, World, join, living, node


def crowded(name: str) -> Report:
    """A node that one long request fills, while short ones wait."""
    full = node(name, used=100, running=1, waiting=20, wanted=80)
    return Report(full, (), {"long": (Span(name, 0, 1600),)})


def test_a_home_is_told_to_make_room_on_a_node_that_has_some() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        a, b = Member(world, crowded("a"), cost=LLAMA_H100), Member(world, Report(node("b")), cost=LLAMA_H100)
        await world.settled()
        await world.controller.plan()
        counted = world.controller.metrics.exposition().decode()
        assert 'infinillm_orders_total{direction="away"} 1.0' in counted
        assert 'infinillm_orders_total{direction="between"} 0.0' in counted
        await world.until(lambda: bool(a.orders))
        [(order, address)] = a.orders
        assert (order.home, order.seq, order.source, order.target, address) == ("a", "long", "a", "b", "127.0.0.1:b")
        assert 0 < order.blocks <= 90  # what b lends at most
        assert not b.orders
        assert not world.controller.orders
        told = len(world.beats)
        await world.until(lambda: len(world.beats) > told + 2)
        assert len(a.orders) == 1  # an order is given once

    living(test, policy="proactive")


@pytest.mark.parametrize(("policy", "measured"), [("pooled", True), ("proactive", False)])
def test_nothing_is_ordered_by_pooled_or_of_nodes_whose_costs_nobody_knows(policy: str, measured: bool) -> None:
    async def test(world: World, client: rpc.Client) -> None:
        Member(world, crowded("a"), cost=LLAMA_H100 if measured else None)
        Member(world, Report(node("b")), cost=LLAMA_H100 if measured else None)
        await world.settled()
        await world.controller.plan()
        assert not world.controller.orders

    living(test, policy=policy)


def test_a_node_that_leaves_takes_its_costs_along_and_a_wrong_profile_is_refused_by_name() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        request = join(Report(node("a")))
        request.profile = wire.cost_to_wire(LLAMA_H100)
        await client.Join(request, timeout=SOON)
        assert world.controller.costs.of("a") == LLAMA_H100
        await client.Join(join(Report(replace(node("a"), incarnation="a-2"))), timeout=SOON)
        assert world.controller.costs.of("a") is None
        request.node.incarnation = "a-3"
        await client.Join(request, timeout=SOON)
        await client.Leave(pb.LeaveRequest(node="a", incarnation="a-3"), timeout=SOON)
        assert not world.controller.costs.own
        for wrong, field in (("{", "profile"), ('{"dense": 3}', "dense")):
            request = join(Report(node("c")), MODEL)
            request.profile = wrong
            with pytest.raises(BadRequest) as refused:
                await asyncio.wait_for(client.Join(request, timeout=SOON), SOON)
            assert refused.value.field == field
        assert "c" not in world.controller.ledger.nodes

    living(test)


@pytest.mark.parametrize(
    ("source", "target", "direction"), [("a", "b", "away"), ("b", "a", "home"), ("b", "c", "between")]
)
def test_where_an_order_leads_is_said_as_its_home_sees_it(source: str, target: str, direction: str) -> None:
    assert MoveBlocks("a", "s", source, target, 1, "a test").direction == direction


@pytest.mark.parametrize("measured", [True, False])
def test_nodes_of_another_place_are_not_named_where_asking_them_costs_more_than_waiting(measured: bool) -> None:
    slow = replace(LLAMA_H100, question=Curve(((0, 9.0), (1, 9.0)))) if measured else None

    async def test(world: World, client: rpc.Client) -> None:
        a = Member(world, Report(node("a", used=100, running=4)), cost=slow)
        Member(world, Report(replace(node("b"), address="10.0.0.2:b")), cost=slow)
        Member(world, Report(node("c", used=60)), cost=slow)
        await world.settled()
        near, far = ("c", "127.0.0.1:c", 40), ("b", "10.0.0.2:b", 90)
        assert await a.membership.creditors(40, (), False) == ([near] if measured else [near, far])
        assert await a.membership.creditors(40, (), True) == [near, far], "it fits nowhere else"

    living(test)
