"""Who may speak of a loan: its borrower's present incarnation, for as long as the loan lasts, and nobody late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from infinillm import rpc, wire
from infinillm.core.pace import DOUBT_SECONDS
from infinillm.core.types import AttentionShape
from infinillm.errors import BadRequest, NodeLost, NotFound, Stale
from infinillm.kernels import reference
from infinillm.pool import borrow
from infinillm.pool.answer import POOL, PoolService
from infinillm.protos import pool_pb2 as pb
from tests.cluster import Cluster, Peer
from tests.pool.test_placement import decoder

SOON = 10.0
SHAPE = AttentionShape(4, 2, 16, 8, "float32", 0.25, (0, 0))


def lending(test: Callable[[rpc.Client, PoolService], Awaitable[None]]) -> None:
    """Run a test against one lender of 20 blocks."""

    async def main() -> None:
        peer = Peer("b", 20, SHAPE, reference, "tcp", SOON)
        await peer.start()
        async with rpc.channel(peer.address) as channel:
            try:
                await test(rpc.Client(channel, POOL), peer.service)
            finally:
                await peer.stop()
        peer.memory.blocks.check()

    asyncio.run(asyncio.wait_for(main(), 60))


async def lend(client: rpc.Client, incarnation: str, loan: str = "", borrower: str = "a", hold: float = 0.0) -> Any:
    request = pb.LendRequest(
        borrower=borrower, borrower_incarnation=incarnation, blocks=3, loan=loan, hold_seconds=hold
    )
    return await client.Lend(request, timeout=SOON)


def port(loan: str, shape: AttentionShape = SHAPE) -> pb.OpenPortRequest:
    return pb.OpenPortRequest(loan=loan, shape=wire.shape_to_wire(shape), kind="tcp")


def test_an_earlier_incarnation_of_a_borrower_gets_nothing_and_takes_nothing() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        old = (await lend(client, "a-1")).loan.id
        new = (await lend(client, "a-2")).loan.id
        assert old != new
        for loan in ("", old, new):
            with pytest.raises(Stale, match="b lends to a a-2, which was started after a-1"):
                await lend(client, "a-1", loan)
        with pytest.raises(NotFound) as refused:
            await client.OpenPort(port(old), timeout=SOON)
        assert refused.value.field == "loan"
        await client.Return(pb.ReturnRequest(loan=old), timeout=SOON)
        assert [(loan.id, loan.blocks) for loan in service.memory.blocks.loans.values()] == [(new, 3)]
        assert (await lend(client, "a-2", new)).loan.blocks == 6
        assert not service.conversations

    lending(test)


def test_a_late_word_about_a_loan_that_is_over_finds_nothing() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        old = (await lend(client, "a-1")).loan.id
        await client.Return(pb.ReturnRequest(loan=old), timeout=SOON)
        new = (await lend(client, "a-1")).loan.id
        await client.Return(pb.ReturnRequest(loan=old), timeout=SOON)
        await client.Return(pb.ReturnRequest(loan=old, blocks=2), timeout=SOON)
        assert (await lend(client, "a-1", old)).refused == f"b: the loan {old} is over"
        assert [(loan.id, loan.blocks) for loan in service.memory.blocks.loans.values()] == [(new, 3)]

    lending(test)


def test_a_conversation_of_a_loan_that_is_over_does_not_renew_another() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        old = (await lend(client, "a-1")).loan.id
        await client.OpenPort(port(old), timeout=SOON)
        (talk,) = service.conversations.values()
        until = service.memory.blocks.loans["a"].until
        service._renew(talk)
        assert service.memory.blocks.loans["a"].until > until
        new = (await lend(client, "a-1")).loan
        until = service.memory.blocks.loans["a"].until
        service._renew(talk)
        assert (service.memory.blocks.loans["a"].id, service.memory.blocks.loans["a"].until) == (new.id, until)

    lending(test)


def test_a_port_needs_a_loan_and_the_same_shape() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        with pytest.raises(NotFound, match="b has no loan '' in force"):
            await client.OpenPort(port(""), timeout=SOON)
        loan = (await lend(client, "a-1")).loan.id
        other = AttentionShape(4, 2, 16, 8, "float32", 0.25, (0, 16))
        with pytest.raises(BadRequest, match=r"windows is \(0, 0\) on this node, \(0, 16\) on the borrower"):
            await client.OpenPort(port(loan, other), timeout=SOON)
        assert not service.conversations

    lending(test)


def test_a_borrower_has_one_conversation_however_many_it_opens_at_once() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        loan = (await lend(client, "a-1")).loan.id
        await asyncio.gather(*(client.OpenPort(port(loan), timeout=SOON) for _ in range(6)))
        assert len(service.conversations) == 1

    lending(test)


def test_what_a_lender_remembers_of_borrowers_ends_with_their_loans() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        loans = [(await lend(client, "1", borrower=f"a{i}")).loan.id for i in range(6)]
        assert (await lend(client, "1", borrower="late")).refused
        assert len(service.incarnations) == 6
        for loan in loans[1:]:
            await client.Return(pb.ReturnRequest(loan=loan), timeout=SOON)
        service.expire(grace=0.0)
        assert service.incarnations == {"a0": "1"}

    lending(test)


def test_a_lender_that_opens_no_port_keeps_the_engine_waiting_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(borrow, "REOPEN_SECONDS", 0.2)
    with Cluster(decoder("llama"), {"a": 8, "b": 8}, port_kind="tcp") as cluster:
        cluster.lend("b", 4)
        lender, go = cluster.peers["b"].service, asyncio.Event()
        settle = lender._settle

        async def stand_still(borrower: str) -> None:
            await go.wait()
            await settle(borrower)

        monkeypatch.setattr(lender, "_settle", stand_still)
        cluster.home.lenders.reset(["b"])
        began = time.monotonic()
        with pytest.raises(NodeLost, match=r"b opened no port within 0\.2 s"):
            cluster.home.lenders.conversation("b")
        assert time.monotonic() - began < borrow.RPC_SECONDS / 2
        cluster.loop.call_soon_threadsafe(go.set)
        cluster.settle()


def test_a_borrower_that_fell_silent_keeps_its_loan_for_a_moment_not_for_the_whole_loan() -> None:
    async def test(client: rpc.Client, service: PoolService) -> None:
        loan = (await lend(client, "a-1")).loan.id
        await client.OpenPort(port(loan), timeout=SOON)
        (talk,) = service.conversations.values()
        talk.close()
        await asyncio.wait_for(talk.ended, SOON)
        left = service.memory.blocks.loans["a"].until - time.monotonic()
        assert 0 < left <= DOUBT_SECONDS < service.patience < service.loan_seconds

    lending(test)
