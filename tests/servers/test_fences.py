"""Who may be a member: one process of a name, the one started last, and only with the model of the others."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from infinillm import config, rpc, wire
from infinillm.core.ledger import Report
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.request import Sampling
from infinillm.core.types import Model
from infinillm.errors import BadRequest, Stale, Unavailable
from infinillm.protos import controller_pb2 as pb
from infinillm.protos import shard_pb2
from infinillm.servers import worker
from infinillm.servers.membership import Membership, Superseded
from infinillm.servers.shard import SHARD
from tests import tiny
from tests.servers.test_controller import MODEL, SHAPE, SOON, Member, World, beat, join, living, node


def _nobody_orders(order: MoveBlocks, address: str) -> None:
    raise AssertionError(order)


def test_a_later_incarnation_supersedes_an_earlier_one() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        old = Member(world, Report(node("a", used=50)))
        await world.settled()
        new = Report(replace(node("a"), incarnation="a-2", address="127.0.0.1:2"))
        await client.Join(join(new), timeout=SOON)
        with pytest.raises(Superseded, match="a is a-2 now, which was started after 'a-1'"):
            await asyncio.wait_for(old.task, SOON)  # it was told Stale, tried to join, and was told again
        assert world.controller.ledger.nodes["a"] == new.node
        for call in (
            client.Heartbeat(beat("a", "a-1"), timeout=SOON),
            client.Leave(pb.LeaveRequest(node="a", incarnation="a-1"), timeout=SOON),
            client.Join(join(Report(node("a"))), timeout=SOON),
            client.Creditors(pb.CreditorsRequest(node="a", incarnation="a-1", blocks=1), timeout=SOON),
        ):
            with pytest.raises(Stale):
                await call
        assert (await client.Heartbeat(beat("a", "a-2"), timeout=SOON)).known
        await client.Leave(pb.LeaveRequest(node="a", incarnation="a-2"), timeout=SOON)
        assert world.controller.ledger.nodes == {}

    living(test)


def test_after_a_restart_of_the_controller_the_later_incarnation_is_the_member_whoever_comes_first() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        early, late = Report(node("a")), Report(replace(node("a"), incarnation="a-2"))
        await client.Join(join(early, epoch=4), timeout=SOON)
        assert not (await client.Heartbeat(beat("a", "a-2"), timeout=SOON)).known
        await client.Leave(pb.LeaveRequest(node="a", incarnation="a-2"), timeout=SOON)  # not of the one that is here
        await client.Join(join(late, epoch=4), timeout=SOON)
        with pytest.raises(Stale):
            await client.Join(join(early, epoch=4), timeout=SOON)
        assert world.controller.ledger.nodes["a"].incarnation == "a-2"

    living(test)


def test_a_member_refused_at_its_first_join_ends_and_one_refused_later_tries_again() -> None:
    async def test(world: World, client: rpc.Client) -> None:
        Member(world, Report(node("a")))
        await world.settled()
        other = replace(MODEL, max_model_len=512)
        stranger = Membership(world.address, lambda: Report(node("b")), other, None, _nobody_orders)
        with pytest.raises(BadRequest, match="max_model_len is 0 in this cluster, 512 in the node that joins"):
            await asyncio.wait_for(stranger.run(), SOON)
        await stranger.leave()

        c = Member(world, Report(node("c")))
        await world.settled()
        refused = asyncio.Event()
        c.membership.model = other
        c.membership._fail = lambda error: refused.set()  # type: ignore[method-assign]
        await client.Leave(pb.LeaveRequest(node="c", incarnation="c-1"), timeout=SOON)
        await asyncio.wait_for(refused.wait(), SOON)
        c.membership.model = MODEL
        await world.settled()

    living(test)


@pytest.mark.parametrize(
    ("field", "model"),
    [
        ("block_size", replace(MODEL, shape=replace(SHAPE, block_size=32))),
        ("dtype", replace(MODEL, shape=replace(SHAPE, dtype="bfloat16"))),
        ("windows", replace(MODEL, shape=replace(SHAPE, windows=(0, 0, 0)))),
        ("name", replace(MODEL, name="other")),
        ("revision", replace(MODEL, revision="2")),
        ("max_model_len", replace(MODEL, max_model_len=512)),
    ],
)
def test_a_node_of_another_model_is_refused_until_it_is_alone(field: str, model: Model) -> None:
    async def test(world: World, client: rpc.Client) -> None:
        await client.Join(join(Report(node("a"))), timeout=SOON)
        with pytest.raises(BadRequest) as caught:
            await client.Join(join(Report(node("b")), model), timeout=SOON)
        assert caught.value.field == field
        await client.Leave(pb.LeaveRequest(node="a", incarnation="a-1"), timeout=SOON)
        await client.Join(join(Report(node("b")), model), timeout=SOON)
        assert world.controller.model == model

    living(test)


def test_a_worker_that_is_superseded_tells_its_requests_why_and_ends_with_an_error() -> None:
    settings = config.Worker(model=str(tiny.folder("llama")), id="w", kv_blocks=64, dtype="float32", metrics_port=-1)
    asked = shard_pb2.ShardGenerateRequest(
        id="s", prompt=[5, 6, 7], sampling=wire.sampling_to_wire(Sampling(max_tokens=1000, ignore_eos=True))
    )

    async def test(world: World, client: rpc.Client) -> None:
        running = asyncio.create_task(worker.run(replace(settings, controller=world.address)))
        await world.until(lambda: "w" in world.controller.ledger.nodes)
        async with rpc.channel(world.controller.ledger.nodes["w"].address) as channel:
            stream = rpc.Client(channel, SHARD).Generate(asked)
            await anext(aiter(stream))
            await client.Join(join(Report(replace(node("w"), incarnation="z"))), timeout=SOON)
            with pytest.raises(Unavailable, match="w ends: w is z now, which was started after"):
                async for _ in stream:
                    pass
        with pytest.raises(Superseded):
            await asyncio.wait_for(running, SOON)

    living(test)
