"""The controller and its members over real gRPC on loopback, with a clock the test moves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from infinillm import rpc, wire
from infinillm.core.cost import Cost
from infinillm.core.ledger import Event, Report, check, rebuild
from infinillm.core.policy import named
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.policy.saving import TURN_SECONDS
from infinillm.core.types import AttentionShape, Ledger, Loan, Model, Node, Refused, Span
from infinillm.errors import BadRequest, InfinillmError, NotFound, Stale, TooLong, Unavailable
from infinillm.protos import controller_pb2 as pb
from infinillm.servers.controller import CONTROLLER, Controller
from infinillm.servers.membership import LONGEST_PAUSE, Membership, Superseded
from infinillm.telemetry import Metrics

SOON = 10.0
BEAT = 0.01
SHAPE = AttentionShape(4, 2, 16, 16, "float32", 0.25, (0, 0))
MODEL = Model("tiny", SHAPE, 4096)


class Watched(Controller):
    """A controller that says when something reached it."""

    def __init__(self, world: World, epoch: int):
        self.world = world
        super().__init__(
            named(world.policy),
            epoch=epoch,
            heartbeat_seconds=BEAT,
            metrics=Metrics("controller"),
            clock=lambda: world.now,
            cost=None,
        )

    def hear(self, events: Iterable[Event]) -> None:
        super().hear(events)
        self.world.stirred.set()

    async def Heartbeat(self, request: pb.HeartbeatRequest, call: Any) -> pb.HeartbeatResponse:
        self.world.beats.append(request)
        self.world.stirred.set()
        return await super().Heartbeat(request, call)


class World:
    """One controller that can be restarted on its port, and members that keep their own books."""

    def __init__(self, policy: str = "pooled"):
        self.policy, self.now = policy, 1000.0
        self.stirred = asyncio.Event()
        self.beats: list[pb.HeartbeatRequest] = []
        self.port = 0
        self.members: list[Member] = []

    async def start(self, epoch: int) -> None:
        self.controller = Watched(self, epoch)
        self.server = rpc.Server("127.0.0.1", self.port, [(CONTROLLER, self.controller)])
        self.port = await self.server.start()
        self.address = f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self.server.stop(0)

    async def until(self, true: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not true():
                self.stirred.clear()
                await self.stirred.wait()

        await asyncio.wait_for(wait(), SOON)

    async def settled(self) -> Ledger:
        """The ledger, once it is what the members' own books say."""

        def equal() -> bool:
            books = rebuild(self.controller.ledger.epoch, [member.report for member in self.members])
            return timeless(self.controller.ledger) == timeless(books)

        await self.until(equal)
        check(self.controller.ledger)
        return self.controller.ledger


def timeless(ledger: Ledger) -> Ledger:
    """Without the moments loans lapse at, which are told in seconds left."""
    return replace(ledger, loans={name: replace(loan, until=0.0) for name, loan in ledger.loans.items()})


def node(name: str, blocks: int = 100, **more: Any) -> Node:
    return Node(name, f"{name}-1", f"127.0.0.1:{name}", blocks=blocks, lendable=blocks * 9 // 10, **more)


class Member:
    """A worker as its membership sees it."""

    def __init__(self, world: World, report: Report, model: Model = MODEL, cost: Cost | None = None):
        self.report = report
        self.orders: list[tuple[MoveBlocks, str]] = []
        self.membership = Membership(world.address, lambda: self.report, model, cost, self._obey)
        self.task = asyncio.create_task(self.membership.run())
        world.members.append(self)

    def _obey(self, order: MoveBlocks, address: str) -> None:
        self.orders.append((order, address))

    def change(self, **more: Any) -> None:
        self.report = replace(self.report, node=replace(self.report.node, **more))

    async def leave(self) -> None:
        await self.membership.leave()
        with suppress(Superseded):
            await asyncio.wait_for(self.task, SOON)


def living(test: Callable[[World, rpc.Client], Awaitable[None]], policy: str = "pooled") -> None:
    async def main() -> None:
        world = World(policy)
        await world.start(epoch=5)
        async with rpc.channel(world.address) as channel:
            try:
                await test(world, rpc.Client(channel, CONTROLLER))
            finally:
                for member in world.members:
                    await member.leave()
                await world.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


def join(report: Report, model: Model = MODEL, epoch: int = 0) -> pb.JoinRequest:
    return pb.JoinRequest(
        node=wire.node_to_wire(report.node),
        model=wire.model_to_wire(model),
        loans=[wire.loan_to_wire(loan, 0.0) for loan in report.lent],
        layouts=[wire.layout_to_wire(*each) for each in report.layouts.items()],
        epoch=epoch,
    )


def beat(name: str, incarnation: str = "", epoch: int = 5, **more: Any) -> pb.HeartbeatRequest:
    return pb.HeartbeatRequest(node=name, incarnation=incarnation or f"{name}-1", epoch=epoch, **more)


def route(prompt: int, longest: int, *exclude: str, model: str = "") -> pb.RouteRequest:
    return pb.RouteRequest(prompt_tokens=prompt, longest_tokens=longest, exclude=exclude, model=model)


def creditors(name: str, blocks: int) -> pb.CreditorsRequest:
    return pb.CreditorsRequest(node=name, incarnation=f"{name}-1", blocks=blocks)


LOAN = Loan("b>a", "b", "a", 30, until=2e9)


def test_members_join_beat_and_leave_and_the_ledger_is_their_books() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        a, b = Member(world, Report(node("a"))), Member(world, Report(node("b")))
        assert set((await world.settled()).nodes) == {"a", "b"}

        b.report = replace(b.report, lent=(LOAN,))
        a.report = Report(
            replace(a.report.node, used=90, running=1), (), {"s": (Span("a", 0, 1440), Span("b", 1440, 1500))}
        )
        ledger = await world.settled()
        assert (ledger.nodes["b"].lent, ledger.nodes["a"].borrowed) == (30, 30)
        assert ledger.layouts["a"]["s"][1] == Span("b", 1440, 1500)

        b.report = replace(b.report, lent=(replace(LOAN, blocks=40, used=4),))
        assert (await world.settled()).nodes["a"].borrowed == 40
        a.report, b.report = Report(node("a")), Report(node("b"))
        ledger = await world.settled()
        assert (ledger.loans, ledger.layouts) == ({}, {})

        await b.leave()
        world.members.remove(b)
        assert set((await world.settled()).nodes) == {"a"}

    living(test)


def test_heartbeats_carry_changes_only() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        layouts = {f"s{i}": (Span("a", 0, 16 * i + 16),) for i in range(50)}
        a = Member(world, Report(node("a", used=50), (), layouts))
        await world.settled()
        world.beats.clear()
        await world.until(lambda: len(world.beats) >= 3)
        assert all(len(told.SerializeToString()) < 16 for told in world.beats)
        a.report = Report(a.report.node, (), {**layouts, "s7": (Span("a", 0, 200),)})
        await world.settled()
        told = next(told for told in world.beats if told.placed)
        assert [each.sequence for each in told.placed] == ["s7"]
        assert not told.HasField("changed")
        assert len(told.SerializeToString()) < 40

    living(test)


def test_a_restarted_controller_rebuilds_the_same_ledger() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        a = Member(world, Report(node("a", used=50), (), {"s": (Span("a", 0, 160), Span("b", 160, 300))}))
        b = Member(world, Report(node("b"), (LOAN,)))
        before = await world.settled()
        await world.until(lambda: (a.membership.epoch, b.membership.epoch) == (5, 5))  # its answers have come, too
        await world.stop()
        await world.start(epoch=6)
        assert (ledger := await world.settled()).epoch == 6
        assert timeless(replace(ledger, epoch=5)) == timeless(before)
        await world.until(lambda: (a.membership.epoch, b.membership.epoch) == (6, 6))
        assert world.controller.restarted
        a.change(used=60)
        assert (await world.settled()).nodes["a"].used == 60

    living(test)


def test_a_member_waits_for_a_controller_that_is_not_there_yet() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await world.stop()
        a = Member(world, Report(node("a")))
        answer = await a.membership.creditors(5, (), False)
        assert isinstance(answer, Refused)
        with pytest.raises(Unavailable):
            await a.membership.capacity()
        assert not a.task.done()
        await world.start(epoch=6)
        await world.settled()

    living(test)


def test_while_nodes_come_back_nothing_is_called_too_long_for_good() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await client.Join(join(Report(node("a")), epoch=4), timeout=SOON)
        with pytest.raises(Unavailable, match=r"just restarted; so far the request needs 188 blocks"):
            await client.Route(route(2900, 3000), timeout=SOON)
        asked = await client.Creditors(creditors("a", 1), timeout=SOON)
        assert asked.max_tokens == 0
        world.now += world.controller.silence + LONGEST_PAUSE + 0.001
        with pytest.raises(TooLong, match=r"188 blocks .* offers 100 on 1 worker, so at most 1,600 tokens"):
            await client.Route(route(2900, 3000), timeout=SOON)
        asked = await client.Creditors(creditors("a", 1), timeout=SOON)
        assert asked.max_tokens == 1600

    living(test)


def test_who_is_silent_has_left_and_may_come_back() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        for name in ("a", "b"):
            await client.Join(join(Report(node(name), (LOAN,) if name == "b" else ())), timeout=SOON)
        controller = world.controller
        for _ in range(12):
            world.now += BEAT
            await client.Heartbeat(beat("a"), timeout=SOON)
            controller.tick()
        assert set(controller.ledger.nodes) == {"a"}
        assert controller.ledger.nodes["a"].borrowed == 0
        assert b'heartbeat_age_seconds{node="b"}' not in controller.metrics.exposition()
        assert b'infinillm_nodes{state="serving"} 1.0' in controller.metrics.exposition()
        assert not (await client.Heartbeat(beat("b"), timeout=SOON)).known
        await client.Join(join(Report(node("b"), (LOAN,))), timeout=SOON)
        assert controller.ledger.nodes["a"].borrowed == 30

    living(test)


def test_nobody_is_blamed_for_a_sleep_of_the_controller() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await client.Join(join(Report(node("a"))), timeout=SOON)
        world.now += 3600
        world.controller.tick()
        assert set(world.controller.ledger.nodes) == {"a"}
        for _ in range(8):
            world.now += BEAT
            world.controller.tick()
        assert world.controller.ledger.nodes == {}

    living(test)


def test_epochs() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await client.Join(join(Report(node("a"))), timeout=SOON)
        older = await client.Heartbeat(beat("a", epoch=4), timeout=SOON)
        assert (older.known, older.epoch) == (False, 5)
        with pytest.raises(Stale, match="epoch 5, and 6 is known"):
            await client.Heartbeat(beat("a", epoch=6), timeout=SOON)

    living(test)


def test_routes_spread_within_one_heartbeat_and_forget_what_has_arrived() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        for name in ("a", "b", "c"):
            await client.Join(join(Report(node(name))), timeout=SOON)
        replies = await asyncio.gather(*(client.Route(route(100, 200), timeout=SOON) for _ in range(64)))
        chosen = [reply.node for reply in replies]
        assert sorted(chosen.count(name) for name in ("a", "b", "c")) == [21, 21, 22]
        assert {reply.address for reply in replies} == {"127.0.0.1:a", "127.0.0.1:b", "127.0.0.1:c"}
        await client.Heartbeat(beat("a"), timeout=SOON)  # too early: they may still be on their way
        chosen += [(await client.Route(route(100, 200), timeout=SOON)).node for _ in range(3)]
        assert sorted(chosen.count(name) for name in ("a", "b", "c")) == [22, 22, 23]
        world.now += 1
        await client.Heartbeat(beat("a"), timeout=SOON)
        assert {(await client.Route(route(100, 200), timeout=SOON)).node for _ in range(20)} == {"a"}

    living(test)


def test_routes_are_refused_with_reasons() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        async def refusal(request: pb.RouteRequest) -> InfinillmError:
            with pytest.raises(InfinillmError) as caught:
                await client.Route(request, timeout=SOON)
            return caught.value

        assert isinstance(await refusal(route(5, 10)), Unavailable)
        for name in ("a", "b"):
            await client.Join(join(Report(node(name))), timeout=SOON)
        long = await refusal(route(1500, 1601))
        assert isinstance(long, TooLong)
        assert long.message == (
            "the request needs 101 blocks (1,601 tokens, 16 per block); "
            "policy isolated offers 100 on one worker, so at most 1,600 tokens"
        )
        assert (await client.Route(route(1500, 1600), timeout=SOON)).node
        assert isinstance(await refusal(route(1500, 1600, "a", "b")), Unavailable)
        unknown = await refusal(route(5, 10, model="other"))
        assert isinstance(unknown, NotFound)
        assert unknown.field == "model"
        assert (await client.Route(route(5, 10, model="tiny"), timeout=SOON)).node
        for wrong in (route(0, 10), route(11, 10)):
            assert isinstance(await refusal(wrong), BadRequest)
        assert b'infinillm_refusals_total{reason="too_long"} 1.0' in world.controller.metrics.exposition()

    living(test, "isolated")


def test_creditors_are_named_with_their_addresses() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        a = Member(world, Report(node("a", used=100)))
        Member(world, Report(node("b", used=60)))
        Member(world, Report(node("m", 500, serves=False)))
        await world.settled()
        assert await a.membership.creditors(400, (), False) == [("m", "127.0.0.1:m", 450), ("b", "127.0.0.1:b", 40)]
        assert await a.membership.creditors(400, ["m"], False) == [("b", "127.0.0.1:b", 40)]
        assert await a.membership.capacity() == (100 + 90 + 450) * 16
        with pytest.raises(BadRequest):
            await client.Creditors(creditors("a", 0), timeout=SOON)

    living(test)


def test_one_node_saves_up_at_a_time_and_only_under_policy_proactive() -> None:
    async def asks(client: rpc.Client, name: str, outgrown: bool = True) -> bool:
        request = creditors(name, 5)
        request.outgrown = outgrown
        return bool((await client.Creditors(request, timeout=SOON)).may_save)

    async def test(world: World, client: rpc.Client) -> None:
        _, b = (Member(world, Report(node(name, used=100))) for name in ("a", "b"))
        assert await world.settled() and not await asks(client, "a", outgrown=False)
        assert await asks(client, "a")
        assert not await asks(client, "b")
        world.now += TURN_SECONDS
        assert await asks(client, "b"), "a asks no more"
        assert not await asks(client, "a")
        await b.leave()
        assert await asks(client, "a"), "b is gone"
        world.members.remove(b)

    async def never(world: World, client: rpc.Client) -> None:
        Member(world, Report(node("a", used=100)))
        assert await world.settled() and not await asks(client, "a")

    living(test, "proactive")
    living(never, "pooled")


def test_who_was_just_sent_a_request_is_not_taken_for_idle() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        a, _ = Member(world, Report(node("a", used=100, running=1))), Member(world, Report(node("b")))
        await world.settled()
        assert await a.membership.creditors(4, (), False) == [("b", "127.0.0.1:b", 90)]
        assert (await client.Route(route(100, 200), timeout=SOON)).node == "b"
        assert isinstance(await a.membership.creditors(4, (), False), Refused)

    living(test, "proactive")


def test_isolated_names_no_creditors() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        a = Member(world, Report(node("a", used=100)))
        Member(world, Report(node("b")))
        await world.settled()
        none = Refused("a needs 4 more blocks; policy isolated lends none")
        assert await a.membership.creditors(4, (), False) == none
        assert await a.membership.capacity() == 1600

    living(test, "isolated")


def test_a_snapshot_is_the_whole_ledger() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        empty = await client.Snapshot(pb.SnapshotRequest(), timeout=SOON)
        assert (empty.epoch, empty.policy, empty.max_tokens, len(empty.nodes)) == (5, "pooled", 0, 0)
        Member(world, Report(node("a", used=50), (), {"s": (Span("a", 0, 160), Span("b", 160, 300))}))
        Member(world, Report(node("b"), (LOAN,)))
        ledger = await world.settled()
        shown = await client.Snapshot(pb.SnapshotRequest(), timeout=SOON)
        assert {each.id: wire.node_from_wire(each) for each in shown.nodes} == ledger.nodes
        assert {each.id: each.blocks for each in shown.loans} == {"b>a": 30}
        assert dict(map(wire.layout_from_wire, shown.layouts)) == ledger.layouts["a"]
        assert wire.model_from_wire(shown.model) == MODEL
        assert shown.max_tokens == 190 * 16

    living(test)


@pytest.mark.parametrize(
    "told",
    [
        beat("a", lent=[wire.loan_to_wire(LOAN, 0.0)]),
        beat("a", returned=["b>a"]),
        beat("a", changed=wire.node_to_wire(node("b"))),
        beat("a", changed=wire.node_to_wire(replace(node("a"), incarnation="a-2"))),
        beat("a", placed=[wire.layout_to_wire("", ())]),
    ],
)
def test_a_node_that_speaks_for_another_changes_nothing(told: pb.HeartbeatRequest) -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await client.Join(join(Report(node("a"))), timeout=SOON)
        await client.Join(join(Report(node("b"), (LOAN,))), timeout=SOON)
        before = world.controller.ledger
        with pytest.raises(BadRequest):
            await client.Heartbeat(told, timeout=SOON)
        assert world.controller.ledger is before

    living(test)


def test_books_that_cannot_be_are_noticed() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await client.Join(join(Report(node("b", used=90), (LOAN,))), timeout=SOON)
        world.controller.tick()
        assert not world.controller.sound
        await client.Heartbeat(beat("b", changed=wire.node_to_wire(node("b", used=10))), timeout=SOON)
        world.controller.tick()
        assert world.controller.sound

    living(test)


def test_the_process_is_ready_serves_and_ends_cleanly() -> None:
    code = """
import asyncio
from infinillm import config
from infinillm.servers import controller
asyncio.run(controller.run(config.Controller(port=0)))
"""

    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert process.stdout
        try:
            ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
            assert ready["ready"] == "controller"
            assert ready["metrics"]
            async with rpc.channel(ready["address"]) as channel:
                client = rpc.Client(channel, CONTROLLER)
                snapshot = await client.Snapshot(pb.SnapshotRequest(), timeout=SOON)
                assert snapshot.epoch > 1_600_000_000_000
                assert snapshot.policy == "pooled"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), SOON) == 0
            assert await process.stdout.read() == b""
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    asyncio.run(main())
