"""Several controllers, one of which leads: who is called, who is believed, and who finds out that it leads no more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from infinillm import rpc
from infinillm.core.ledger import Report
from infinillm.core.policy import named
from infinillm.core.types import Refused
from infinillm.errors import BadRequest, DeadlineExceeded, Stale, StandsBy, Unavailable, Unreachable
from infinillm.protos import controller_pb2 as pb
from infinillm.servers.controller import Controller
from infinillm.servers.controllers import CONTROLLER, Controllers
from infinillm.servers.membership import Membership
from infinillm.telemetry import Metrics
from tests.servers.test_controller import BEAT, MODEL, SOON, Member, World, beat, creditors, join, living, node, route

ASKED = {
    "Join": lambda: join(Report(node("a"))),
    "Heartbeat": lambda: beat("a", epoch=0),
    "Leave": lambda: pb.LeaveRequest(node="a", incarnation="a-1"),
    "Creditors": lambda: creditors("a", 1),
    "Route": lambda: route(5, 10),
    "Snapshot": lambda: pb.SnapshotRequest(),
}


class Two:
    """Two controllers on one clock, and what calls them."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.all: list[Controller] = []
        self.servers: list[rpc.Server] = []
        self.addresses: list[str] = []

    async def start(self, body: object) -> None:
        self.servers.append(rpc.Server("127.0.0.1", 0, [(CONTROLLER, body)]))
        self.addresses.append(f"127.0.0.1:{await self.servers[-1].start()}")

    def controller(self, epoch: int) -> Controller:
        made = Controller(
            named("pooled"),
            epoch=epoch,
            heartbeat_seconds=BEAT,
            metrics=Metrics("controller"),
            clock=lambda: self.now,
            cost=None,
        )
        self.all.append(made)
        return made


def with_two(test: Callable[[Two, Controllers], Awaitable[None]], *epochs: int) -> None:
    async def main() -> None:
        two = Two()
        for epoch in epochs:
            await two.start(two.controller(epoch))
        called = Controllers(",".join(two.addresses))
        try:
            await test(two, called)
        finally:
            await called.close()
            for server in two.servers:
                await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 60))


def ask(called: Controllers, method: str) -> Awaitable[Any]:
    return called.ask(method, ASKED[method](), timeout=SOON)


def test_the_one_that_leads_answers_wherever_it_stands_in_the_list() -> None:
    async def test(two: Two, called: Controllers) -> None:
        first = called.address
        for method in ("Join", "Heartbeat", "Creditors", "Route", "Snapshot", "Leave"):
            assert (await ask(called, method)).epoch == 5
        assert called.address == two.addresses[1] != first
        assert called.epoch == 5

    with_two(test, 0, 5)


@pytest.mark.parametrize("method", list(ASKED))
def test_one_that_stands_by_refuses_everything_and_says_who_leads(method: str) -> None:
    async def test(two: Two, called: Controllers) -> None:
        for each in two.all:
            each.stand_by("10.0.0.1:7000")
        with pytest.raises(StandsBy, match=r"this controller stands by; 10.0.0.1:7000 leads"):
            await ask(called, method)

    with_two(test, 0, 0)


@pytest.mark.parametrize("method", list(ASKED))
def test_a_leader_whose_time_is_over_refuses_everything_by_its_own_clock(method: str) -> None:
    async def test(two: Two, called: Controllers) -> None:
        (only,) = two.all
        only.lead(6, two.now + 1.0)
        assert (await ask(called, "Join")).epoch == 6
        two.now += 1.0
        with pytest.raises(StandsBy):
            await ask(called, method)
        assert only.ledger.nodes  # it was asleep: nothing has told it yet
        only.tick()
        assert not only.ledger.nodes
        assert b"infinillm_controller_leader 0.0" in only.metrics.exposition()
        only.lead(7, two.now + 1.0)
        assert (await ask(called, "Join")).epoch == 7
        only.tick()
        assert b"infinillm_controller_leader 1.0" in only.metrics.exposition()

    with_two(test, 5)


@pytest.mark.parametrize("method", list(ASKED))
def test_whoever_has_heard_of_a_larger_epoch_deposes_who_calls_itself_the_leader(method: str) -> None:
    async def test(two: Two, called: Controllers) -> None:
        old, _ = two.all
        async with rpc.channel(two.addresses[0]) as channel:
            direct = getattr(rpc.Client(channel, CONTROLLER), method)
            request = ASKED[method]()
            request.epoch = 6
            with pytest.raises(Stale, match="speaks for epoch 5, and 6 is known") as caught:
                await direct(request, timeout=SOON)
            assert caught.value.field == "epoch"
            assert (old.leads, old.seen) == (False, 6)
            with pytest.raises(StandsBy):
                await direct(request, timeout=SOON)

    with_two(test, 5, 6)


def test_a_call_that_meets_a_stale_leader_goes_on_to_the_real_one() -> None:
    async def test(two: Two, called: Controllers) -> None:
        called.epoch = 6
        assert (await ask(called, "Snapshot")).epoch == 6
        assert not two.all[0].leads
        assert called.address == two.addresses[1]

    with_two(test, 5, 6)


class Liar:
    """Answers everything for epoch 5, and orders moves, whatever it is told."""

    async def Join(self, request: Any, call: Any) -> pb.JoinResponse:
        return pb.JoinResponse(epoch=5, heartbeat_seconds=BEAT, policy="pooled")

    async def Heartbeat(self, request: Any, call: Any) -> pb.HeartbeatResponse:
        order = pb.MoveBlocks(sequence="s", source="a", target="b", target_address="x:1", blocks=1, reason="a lie")
        return pb.HeartbeatResponse(epoch=5, known=True, moves=[order])

    async def Creditors(self, request: Any, call: Any) -> pb.CreditorsResponse:
        return pb.CreditorsResponse(epoch=5, creditors=[pb.Creditor(node="b", address="x:1", blocks=9)])

    async def Route(self, request: Any, call: Any) -> pb.RouteResponse:
        return pb.RouteResponse(epoch=5, node="b", address="x:1")

    async def Snapshot(self, request: Any, call: Any) -> pb.SnapshotResponse:
        return pb.SnapshotResponse(epoch=5)

    async def Leave(self, request: Any, call: Any) -> pb.LeaveResponse:
        return pb.LeaveResponse(epoch=5)


@pytest.mark.parametrize("method", list(ASKED))
def test_no_answer_of_a_smaller_epoch_is_believed(method: str) -> None:
    async def test(two: Two, called: Controllers) -> None:
        await two.start(Liar())
        called = Controllers(two.addresses[0])
        called.epoch = 6
        with pytest.raises(Unavailable, match="speaks for epoch 5, which 6 ended"):
            await ask(called, method)
        assert called.epoch == 6
        await called.close()

    async def main() -> None:
        two = Two()
        try:
            await test(two, Controllers(""))
        finally:
            for server in two.servers:
                await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_member_obeys_and_asks_nobody_of_a_smaller_epoch() -> None:
    obeyed: list[object] = []

    async def main() -> None:
        two = Two()
        await two.start(two.controller(6))
        await two.start(Liar())
        member = Membership(
            ",".join(two.addresses), lambda: Report(node("a")), MODEL, None, lambda *order: obeyed.append(order)
        )
        try:
            await member._speak()
            assert (member.epoch, list(two.all[0].ledger.nodes)) == (6, ["a"])
            two.all[0].until = 0.0  # it leads no more; whoever else answers is older
            member.controllers.addresses.reverse()
            with pytest.raises(Unavailable, match="speaks for epoch 5, which 6 ended"):
                await member._speak()  # a heartbeat, to the other one
            with pytest.raises(Unavailable, match="speaks for epoch 5, which 6 ended"):
                await member._speak()  # Join, to both
            assert isinstance(await member.creditors(1, (), False), Refused)
            assert member.epoch == 6
        finally:
            await member.leave()
            for server in two.servers:
                await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 60))
    assert not obeyed


def test_members_follow_the_leader_and_their_books_with_them() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        other = Controller(
            named("pooled"),
            epoch=0,
            heartbeat_seconds=BEAT,
            metrics=Metrics("controller"),
            clock=lambda: world.now,
            cost=None,
        )
        server = rpc.Server("127.0.0.1", 0, [(CONTROLLER, other)])
        first = world.address
        world.address = f"127.0.0.1:{await server.start()},{first}"
        try:
            Member(world, Report(node("a", used=50)))
            Member(world, Report(node("b")))
            before = await world.settled()
            world.controller.stand_by("the other")
            other.lead(9, float("inf"))
            world.controller, old = other, world.controller  # type: ignore[assignment]
            other.hear = lambda events, hear=other.hear: (hear(events), world.stirred.set())  # type: ignore[assignment]
            after = await world.settled()
            assert (after.epoch, after.nodes) == (9, before.nodes)
            assert other.restarted  # until all have come, nothing is too long for good
            assert not old.ledger.nodes
        finally:
            for member in world.members:
                await member.leave()
            world.members.clear()
            await server.stop(0)

    living(test)


def test_what_a_leader_refuses_is_its_answer() -> None:
    async def test(two: Two, called: Controllers) -> None:
        with pytest.raises(Unavailable, match="no worker has joined yet"):
            await ask(called, "Route")
        assert called.address == two.addresses[0]

    with_two(test, 5, 0)


def test_where_nobody_answers_the_next_one_is_called_and_kept_to() -> None:
    async def test(two: Two, called: Controllers) -> None:
        await two.servers[0].stop(0)
        assert (await ask(called, "Snapshot")).epoch == 5
        assert called.address == two.addresses[1]
        await two.servers[1].stop(0)
        with pytest.raises(Unreachable):
            await ask(called, "Snapshot")

    with_two(test, 0, 5)


def test_a_controller_that_is_silent_costs_one_timeout() -> None:
    class Silent(Liar):
        async def Snapshot(self, request: Any, call: Any) -> pb.SnapshotResponse:
            await asyncio.Event().wait()
            raise AssertionError

    async def test(two: Two, called: Controllers) -> None:
        await two.start(Silent())
        asked = Controllers(f"{two.addresses[1]},{two.addresses[0]}")
        assert (await asked.ask("Snapshot", pb.SnapshotRequest(), timeout=0.2)).epoch == 5
        assert asked.address == two.addresses[0]
        await asked.close()
        alone = Controllers(two.addresses[1])
        with pytest.raises(DeadlineExceeded):
            await alone.ask("Snapshot", pb.SnapshotRequest(), timeout=0.1)
        await alone.close()

    with_two(test, 5)


@pytest.mark.parametrize("wrong", ["a:1,", ",", "a:1,,b:1", "a:1,a:1"])
def test_what_is_no_list_of_addresses_is_refused(wrong: str) -> None:
    with pytest.raises(BadRequest, match="--controller must be") as caught:
        Controllers(wrong)
    assert caught.value.field == "controller"
