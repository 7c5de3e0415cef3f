"""A controller with a policy of somebody's own whose functions fail, and a gateway that has never heard of it."""

from __future__ import annotations

from typing import Any

import pytest

from infinillm import rpc
from infinillm.core.ledger import Report
from infinillm.core.policy.own import made
from infinillm.errors import InfinillmError, Unavailable
from infinillm.protos import controller_pb2 as pb
from tests.servers.fake_shard import Site
from tests.servers.test_controller import SOON, Member, World, living, node


def raising(*given: Any) -> Any:
    raise ZeroDivisionError("no nodes")


def taking(ledger: Any, *more: Any) -> Any:
    return raising()


def test_what_fails_is_told_and_the_controller_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr("infinillm.servers.controller.log", lambda event, **more: told.append((event, str(more))))

    async def test(world: World, client: rpc.Client) -> None:
        Member(world, Report(node("a")))
        await world.settled()
        world.controller.policy = made("mine", {"BASE": "pooled", "route": taking, "plan": taking})
        await world.controller.plan()
        assert [(event, "policy mine: plan raised ZeroDivisionError: no nodes" in more) for event, more in told][
            -1:
        ] == [("policy_failed", True)]
        assert not world.controller.orders
        with pytest.raises(InfinillmError, match="policy mine: route raised ZeroDivisionError"):
            await client.Route(pb.RouteRequest(prompt_tokens=5, longest_tokens=9), timeout=SOON)
        assert (await client.Snapshot(pb.SnapshotRequest(), timeout=SOON)).policy == "mine"

    living(test)


def test_a_gateway_that_is_left_alone_routes_as_pooled_does(site: Site) -> None:
    async def alone(policy: str) -> str:
        pool = site.gateway.pool
        await pool.refresh()
        assert pool.last is not None
        pool.last.policy = policy
        return pool._route_alone(10, 20, (), Unavailable("the controller is away")).node

    assert site.call(alone("mine")) == site.call(alone("pooled"))
